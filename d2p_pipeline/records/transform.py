# pyright: standard
"""The user's own step: a function from a Polars frame to a Polars frame, between validation and the files.

It sees a part's valid rows and may add, change and drop columns and drop rows; what it returns is written. It works on
batches that are delivered again after a failure, so it has to give the same rows for the same rows. When it fails, nothing
of the batch is lost: the run fails, and the batch waits in recovery until the function is mended.
pyarrow has no type information, hence `standard` above.
"""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa

from d2p_pipeline.records.place import places
from d2p_pipeline.records.rules import Rules

Function = Callable[[pl.DataFrame], object]


class TransformError(Exception):
    """The function named by the setting `transform` cannot be used: `name` is `module:function`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"transform {name}: {reason}")
        self.name = name
        self.reason = reason


@cache
def load(name: str) -> Function:
    """The function `module:function`, found as Python finds modules, or in the current directory."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise TransformError(name, f"cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise TransformError(name, f"is no function, but {type(function).__name__}")
    return function


def transform(table: pa.Table, rules: Rules) -> pa.Table:
    """The rows that the user's function makes of the table's; the table itself if there is no function or no row.

    TransformError when the function raises, or returns what cannot be written.
    """
    if rules.transform is None or not table.num_rows:
        return table
    import pyarrow.parquet as pq

    function = load(rules.transform)
    try:
        result = function(pl.DataFrame(pl.from_arrow(table)))
        if isinstance(result, pl.LazyFrame):
            result = result.collect()
    except (Exception, SystemExit, pl.exceptions.PanicException) as error:
        raise TransformError(rules.transform, f"raised {type(error).__name__}: {error}") from error
    if not isinstance(result, pl.DataFrame):
        raise TransformError(rules.transform, f"returned {type(result).__name__} instead of a Polars frame")
    if objects := [name for name, dtype in result.schema.items() if dtype == pl.Object]:
        raise TransformError(rules.transform, f"returned Python objects in {', '.join(objects)}, which no file holds")
    try:
        written = _as_table(result, table.schema)
        pq.write_table(written.slice(0, 0), pa.BufferOutputStream())
    except pa.ArrowException as error:
        raise TransformError(rules.transform, f"returned columns that no file holds: {error}") from error
    if problem := _problem(result, written, table, rules):
        raise TransformError(rules.transform, f"returned {problem}")
    return written


def _problem(frame: pl.DataFrame, written: pa.Table, before: pa.Table, rules: Rules) -> str | None:
    """What keeps the frame from being written."""
    if frame.height > before.num_rows:
        return f"{frame.height} rows for {before.num_rows}; it may drop rows, but not add any"
    time = pl.Datetime(rules.timestamp_unit, "UTC")
    found = frame.schema.get(rules.time_column, time)
    if found != time:
        return f"the column {rules.time_column} as {found}; it has to stay {time}"
    try:
        placed = places(written, rules)
    except KeyError as error:
        return f"a frame without the column {error.args[0]}, which places rows in files"
    for names, column in ((rules.key_columns, "key"), ((rules.time_column,), "time")):
        if placed[column].null_count():
            return f"rows without a value in {', '.join(names)}, which places rows in files"
    return None


def _as_table(frame: pl.DataFrame, before: pa.Schema) -> pa.Table:
    """Arrow types as they were where they are the same in Polars, with the ids of their fields."""
    table = frame.to_arrow()
    fields: list[pa.Field] = []
    for field in table.schema:
        plain = _plain(field.type)
        known = before.field(field.name) if field.name in before.names else None
        fields.append(known if known is not None and _plain(known.type) == plain else pa.field(field.name, plain))
    return table.cast(pa.schema(fields))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without what Polars adds: 64-bit offsets, views, dictionaries, and names and ids of children."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", _plain(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    return kind
