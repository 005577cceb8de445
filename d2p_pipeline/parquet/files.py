"""A unit's rows as files: one per partition, encoded and named. Runs and `d2p convert` make theirs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2p_pipeline import __version__
from d2p_pipeline.parquet.encode import Encoding, encode, split
from d2p_pipeline.parquet.layout import file_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from d2p_pipeline.records.rules import Rules


@dataclass(frozen=True)
class EncodedFile:
    """A file's path relative to the root, its content, and the number of its rows."""

    path: str
    rows: int
    data: pa.Buffer


def encoded_files(
    table: pa.Table,
    rules: Rules,
    encoding: Encoding,
    *,
    batch: str,
    unit: int,
    key: str | None = None,
    ingested_at: int | None = None,
    use_hash: bool = False,
) -> Iterator[EncodedFile]:
    """One file per capability and hour: of the records' `time`, or of `ingested_at` (ms since the epoch) if that is given.
    The same rows of the same unit give the same paths and bytes. `key` is the buffer they come from; without one, the
    footer says their capability."""
    for capability, hour, rows in split(table, rules, ingested_at):
        metadata = {
            "d2p.batch": batch,
            "d2p.unit": str(unit),
            "d2p.key": capability if key is None else key,
            "d2p.schema_version": rules.schema_version,
            "d2p.software": f"d2p-pipeline {__version__}",
        }
        data = encode(rows, encoding, metadata)
        path = file_path(capability, hour, batch, unit, data if use_hash else None)
        yield EncodedFile(path, rows.num_rows, data)
