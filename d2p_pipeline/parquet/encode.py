"""Tables become Parquet: split by partition, then encoded in memory.

The same table, encoding and metadata give the same bytes, so that a replay overwrites a file with itself. Schema and field
ids are the table's (records/fields.py); the Arrow schema is not stored beside Parquet's own. Processes that know an
`Encoding` and encode nothing do without Polars and pyarrow: these are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from d2p_pipeline.records.rules import Rules

Compression = Literal["snappy", "zstd", "gzip", "none"]

FOOTER = ("d2p.batch", "d2p.unit", "d2p.key", "d2p.schema_version", "d2p.software")
"""Keys that the footer of every file has."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR = {"ms": 3_600_000, "us": 3_600_000_000, "ns": 3_600_000_000_000}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How files are written; `row_group_bytes` bounds a row group's size in memory, before encoding."""

    compression: Compression = "snappy"
    row_group_bytes: int = 128 << 20


def split(table: pa.Table, rules: Rules, ingested_at: int | None = None) -> list[tuple[str, datetime, pa.Table]]:
    """The table's partitions as (key, hour, rows): by the records' own key and the hour of their `time`, in UTC.

    With `ingested_at` (ms since the epoch) all rows belong to that hour instead. Partitions come in the order of their
    first rows, rows keep their order; where partitions lie one after the other already, nothing is copied.
    """
    import polars as pl

    if not table.num_rows:
        return []
    labels = _labels(table, rules, ingested_at).with_row_index()
    groups = labels.group_by("key", "hour", maintain_order=True).agg("index")
    order = groups["index"].explode()
    together = table if order.is_sorted() else table.take(order.to_arrow())
    partitions: list[tuple[str, datetime, pa.Table]] = []
    start = 0
    for key, hour, height in groups.select("key", "hour", pl.col("index").list.len()).iter_rows():
        partitions.append((key, _EPOCH + timedelta(hours=hour), together.slice(start, height)))
        start += height
    return partitions


def encode(table: pa.Table, encoding: Encoding, metadata: Mapping[str, str]) -> pa.Buffer:
    """A Parquet file, with `metadata` as the footer's key-value pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        version="2.6",
        compression=encoding.compression,
        use_dictionary=True,
        write_statistics=True,
        write_page_index=True,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for rows in _row_groups(table, encoding.row_group_bytes):
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        writer.add_key_value_metadata(dict(metadata))
    return sink.getvalue()


def _labels(table: pa.Table, rules: Rules, ingested_at: int | None) -> pl.DataFrame:
    """Key and hour (since the epoch) of every row."""
    import polars as pl

    from d2p_pipeline.records.place import places

    frame = places(table, rules)
    if ingested_at is None:
        hour = pl.col("time").to_physical() // _HOUR[rules.timestamp_unit]
    else:
        hour = pl.lit(ingested_at // _HOUR["ms"])
    return frame.select("key", hour=hour)


def _row_groups(table: pa.Table, limit: int) -> Iterator[pa.Table]:
    # What all its buffers hold, other rows too, is known at once; the bytes of these rows are counted.
    if table.get_total_buffer_size() <= limit or table.nbytes <= limit or table.num_rows <= 1:
        yield table
        return
    pieces = min(table.num_rows, -(-table.nbytes // limit))
    height = -(-table.num_rows // pieces)
    for start in range(0, table.num_rows, height):
        # Rows differ in size, so a piece may still be too large.
        yield from _row_groups(table.slice(start, height), limit)
