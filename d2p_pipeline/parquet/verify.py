# pyright: standard
"""Whether a Parquet file is still what was written: its bytes by its name, its pages by their checksums, its rows by their HMAC.

What a file does not claim cannot be checked: a name without MD5, pages without checksum, rows without key. Memory: the file's
bytes and one row group. pyarrow has no type information, hence `standard` above.
"""

import hashlib
import hmac
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2p_pipeline.parquet.encode import FOOTER
from d2p_pipeline.records.sign import HMAC, canonical_json, digest

SHOWN_ROWS = 10
"""Bad rows listed per file."""

_MD5 = re.compile(r"-([0-9a-f]{32})\.parquet$")


@dataclass
class Report:
    """What was found in a file. `bad_rows` are the numbers, from 0, of the first rows whose HMAC is missing or wrong."""

    path: str
    rows: int = 0
    good: int = 0
    bad: int = 0
    missing: int = 0
    bad_rows: list[int] = field(default_factory=list[int])
    problems: list[str] = field(default_factory=list[str])


def verify(path: Path, hmac_key: bytes | None = None) -> Report:
    """Check everything that can be checked of a file; HMACs only with their key. OSError when it cannot be opened."""
    report = Report(str(path))
    data = path.read_bytes()
    if claimed := _MD5.search(path.name):
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != claimed[1]:
            report.problems.append(f"its MD5 is {found}, its name says otherwise")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        report.problems += _footer_problems(file.metadata, path.name)
        for number in range(file.num_row_groups):
            # Arrow's threads, at times, abort a process that ends soon after.
            _check_rows(file.read_row_group(number, use_threads=False), hmac_key, report)
    except (pa.ArrowException, OSError, ValueError) as error:
        report.problems.append(f"cannot be read: {error}")
    if report.bad or report.missing:
        report.problems.append(f"{report.bad} rows have a wrong HMAC, {report.missing} have none")
    return report


def _footer_problems(metadata: pq.FileMetaData, name: str) -> Iterator[str]:
    entries = {key.decode("utf-8", "replace"): value for key, value in (metadata.metadata or {}).items()}
    if missing := [key for key in FOOTER if key not in entries]:
        yield f"its footer lacks {', '.join(missing)}"
    else:
        unit = f"{entries['d2p.batch'].decode('utf-8', 'replace')}-{entries['d2p.unit'].decode('utf-8', 'replace')}"
        if not re.fullmatch(re.escape(unit) + r"(\.\d+)?(-[0-9a-f]{32})?\.parquet", name):
            yield f"its name is not that of {unit}, which its footer names"
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if not (column.has_column_index and column.has_offset_index) and _can_have_index(column):
                yield f"column {column.path_in_schema} has no page index in row group {group}"


def _can_have_index(column: pq.ColumnChunkMetaData) -> bool:
    """Arrow writes none for a column without a type, nor for one with a page of nothing but NaN."""
    return column.statistics is not None and column.physical_type not in ("FLOAT", "DOUBLE")


def _check_rows(rows: pa.Table, key: bytes | None, report: Report) -> None:
    start = report.rows
    report.rows += rows.num_rows
    if key is None:
        return
    stored = rows.column(HMAC).to_pylist() if HMAC in rows.column_names else [None] * rows.num_rows
    for number, (line, claimed) in enumerate(zip(canonical_json(rows), stored, strict=True), start):
        if claimed is None:
            report.missing += 1
        elif hmac.compare_digest(digest(line, key).encode(), str(claimed).encode()):
            report.good += 1
            continue
        else:
            report.bad += 1
        if len(report.bad_rows) < SHOWN_ROWS:
            report.bad_rows.append(number)
