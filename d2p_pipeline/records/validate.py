# pyright: standard
"""Typed rows are checked by pandera, and split into good ones and rejected ones with their reasons.

Types are not in question any more (parse.py made them); what is checked is what a column's type cannot say. A quick look
finds whether anything is wrong at all; if so, pandera says what. It validates the eager, typed frame with `coerce=False`
and `lazy=True`: coercing fails a whole column for one bad value, and validation of lazy frames looks at no data. pyarrow
and pandera have no complete type information, hence `standard` above.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from d2p_pipeline.records.fields import LOG_FIELDS, TimestampUnit, arrow_schema, column_name
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.timestamps import first_and_last

if TYPE_CHECKING:
    from pandera.polars import DataFrameSchema


@dataclass(frozen=True)
class Split:
    """`good` rows in their order, and the numbers of the other rows in the table given, each with all its reasons."""

    good: pa.Table
    bad: list[tuple[int, str]]


def validate(table: pa.Table, rules: Rules) -> Split:
    """Check a table of `parse`: required fields are there, key fields are not empty, times lie in the calendar.

    Dynamic records were checked when they were parsed, by their JSON Schema.
    """
    if rules.record_type == "dynamic":
        return Split(table, [])
    if not table.schema.equals(arrow_schema(rules.timestamp_unit, rules.column_names)):
        raise TypeError("the table does not have the schema of its rules")
    checked = table.select(_checked_columns(rules))
    if _is_sound(checked, rules):
        return Split(table, [])
    # Importing pandera takes a second of processor time: more than a small batch, and spent only where there is a verdict
    # to give.
    from pandera.errors import SchemaErrors

    # Times are checked as numbers: pandera shows failing values as datetimes, which reach as far as the calendar only.
    frame = pl.DataFrame(pl.from_arrow(checked)).with_columns(pl.col("time").to_physical())
    try:
        _schema(rules).validate(frame, lazy=True)
    except SchemaErrors as errors:
        reasons = _reasons(errors.failure_cases, rules)
    else:
        return Split(table, [])
    keep = pl.select(~pl.int_range(table.num_rows).is_in(list(reasons))).to_series()
    return Split(table.filter(keep.to_arrow()), sorted(reasons.items()))


def _is_sound(table: pa.Table, rules: Rules) -> bool:
    """Whether pandera could find nothing: its checks as three vectorized looks, without names for what is wrong."""
    if not table.num_rows or any(column.null_count for column in table.columns):
        return not table.num_rows
    times = pc.call_function("min_max", [table.column("time").cast(pa.int64())]).as_py()
    first, last = _first_and_last(rules.timestamp_unit)
    keys = (table.column(column_name(name, rules.column_names)) for name in rules.key_fields)
    return (
        first <= times["min"]
        and times["max"] <= last
        and all(pc.call_function("min", [pc.call_function("binary_length", [key])]).as_py() for key in keys)
    )


def _checked_columns(rules: Rules) -> list[str]:
    names = [field.name for field in LOG_FIELDS if field.required or field.name in rules.key_fields]
    return [column_name(name, rules.column_names) for name in names]


def _schema(rules: Rules) -> "DataFrameSchema":
    from pandera.polars import Check, Column, DataFrameSchema

    first, last = _first_and_last(rules.timestamp_unit)
    columns: dict[str, Column] = {}
    for field in LOG_FIELDS:
        is_key = field.name in rules.key_fields
        if not (field.required or is_key):
            continue
        checks: list[Check] = []
        dtype = pl.Int64 if field.kind == "timestamp" else pl.String
        if field.kind == "timestamp":
            checks.append(Check.in_range(first, last, error=_IN_CALENDAR))
        if is_key:
            checks.append(Check.str_length(min_value=1, error=_NOT_EMPTY))
        columns[column_name(field.name, rules.column_names)] = Column(dtype, checks, nullable=False)
    return DataFrameSchema(columns, coerce=False)


_NOT_EMPTY = "key field, is empty"
_IN_CALENDAR = "lies outside the years that can be stored"


def _first_and_last(unit: TimestampUnit) -> tuple[int, int]:
    """The times that can be stored, since the epoch. The last microsecond has all of its nanoseconds."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    first, last = ((moment - epoch) // timedelta(microseconds=1) for moment in first_and_last(unit))
    return {"ms": (first // 1000, last // 1000), "us": (first, last), "ns": (first * 1000, last * 1000 + 999)}[unit]


def _reasons(failures: pl.DataFrame, rules: Rules) -> dict[int, str]:
    """Every failed row with its reasons in the order of the fields."""
    names = {column_name(field.name, rules.column_names): field.name for field in LOG_FIELDS}
    reasons: dict[int, list[str]] = {}
    for row, column, check in failures.select("index", "column", "check").iter_rows():
        text = "required, is missing or null" if check == "not_nullable" else check
        reasons.setdefault(row, []).append(f"{names[column]}: {text}")
    return {row: "; ".join(texts) for row, texts in reasons.items()}
