# pyright: standard
"""The `hmac` column: HMAC-SHA256 of each row's canonical JSON, which anybody can rebuild from the row of a file.

Canonical JSON is defined in docs/record.md; it depends on the row's values alone, not on the style of the column names, the
order of the columns, or columns that hold nothing. It is made of the rows that are written, after every other step.
pyarrow has no type information, hence `standard` above.
"""

import hmac
from collections.abc import Iterator

import msgspec
import polars as pl
import pyarrow as pa

from d2p_pipeline.records.fields import LOG_FIELDS, column_name
from d2p_pipeline.records.rules import Rules

HMAC = "hmac"
"""The column."""

# Rows that are Python objects at a time.
_SLICE = 4096

_KEBAB = {column_name(field.name, "snake"): field.name for field in LOG_FIELDS}
_encode = msgspec.json.Encoder(order="deterministic").encode


def sign(table: pa.Table, rules: Rules) -> pa.Table:
    """The table with its column `hmac` filled, or as it is if there is no key."""
    if rules.hmac_key is None:
        return table
    digests = pa.array([digest(line, rules.hmac_key) for line in canonical_json(table)], pa.string())
    if HMAC in table.column_names:
        position = table.schema.get_field_index(HMAC)
        return table.set_column(position, table.schema.field(position), digests)
    return table.append_column(pa.field(HMAC, pa.string()), digests)


def digest(line: bytes, key: bytes) -> str:
    """HMAC-SHA256 in hexadecimal digits."""
    return hmac.digest(key, line, "sha256").hex()


def canonical_json(table: pa.Table) -> Iterator[bytes]:
    """The canonical JSON of every row."""
    held: list[str] = [
        name for name in table.column_names if name != HMAC and table.column(name).null_count < table.num_rows
    ]
    for start in range(0, table.num_rows, _SLICE):
        frame = pl.DataFrame(pl.from_arrow(table.select(held).slice(start, _SLICE)))
        readable = frame.select(pl.col(name).cast(_readable(dtype)) for name, dtype in frame.schema.items())
        names: dict[str, str] = {old: new for old, new in _KEBAB.items() if old in held and new not in held}
        for row in readable.rename(names).to_dicts():
            yield _encode({name: value for name, value in row.items() if value is not None})


def _readable(dtype: object) -> pl.DataType:
    """The type whose Python value is JSON as documented: Python's own times end at microseconds."""
    match dtype:
        case pl.Datetime() | pl.Time() | pl.Categorical() | pl.Enum():
            return pl.String()
        case pl.Duration():  # as files hold it
            return pl.Int64()
        case pl.List():
            return pl.List(_readable(dtype.inner))
        case pl.Struct():
            return pl.Struct([pl.Field(field.name, _readable(field.dtype)) for field in dtype.fields])
        case pl.DataType():
            return dtype
        case _:
            raise TypeError(f"{dtype!r} is no type of a column")
