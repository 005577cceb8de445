"""Written files as one Polars LazyFrame, for whoever computes with them; deliveries never read what they wrote.

Log records have the same columns in every file. Those of dynamic records come, go and widen from unit to unit, so that every
file's footer is looked at before; columns that widened are cast, and those that have no type in common are an error, since
Polars would turn some of them into something else without a word.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl

_FOOTERS = 16
"""Footers read at the same time."""
_SHOWN = 5
_TIMES = pl.ScanCastOptions(
    datetime_cast=["nanosecond-downcast", "microsecond-downcast", "microsecond-upcast", "millisecond-upcast"]
)
"""For files from before and after a change of `timestamp_unit`; the first one's unit is that of all."""


class ColumnsDifferError(ValueError):
    """A column has types that no common one holds: `types`, with a file of each."""

    def __init__(self, column: str, types: Mapping[str, str]) -> None:
        self.column, self.types = column, types
        shown = "; ".join(f"{name} in {path}" for name, path in list(types.items())[:_SHOWN])
        super().__init__(
            f"column {column!r} has types that cannot be one column: {shown}. Scan the files of one type by themselves, with "
            f"polars.scan_parquet, or give the records a JSON Schema that fixes the column's type"
        )


def scan(paths: Sequence[str], storage_options: Mapping[str, Any] | None, *, may_differ: bool) -> pl.LazyFrame:
    """Rows of all files, with the columns of their directories. A column that a file lacks is null in its rows.

    `may_differ`: read all footers first. Raises ColumnsDifferError.
    """
    if not may_differ or len(paths) < 2:
        return _scan(paths, storage_options)
    options = dict(storage_options) if storage_options else None

    def schema(path: str) -> pl.Schema:
        return pl.scan_parquet(path, glob=False, storage_options=options).collect_schema()

    with ThreadPoolExecutor(_FOOTERS) as pool:
        found = dict(zip(paths, pool.map(schema, paths), strict=True))
    _check(found)
    alike: dict[tuple[tuple[str, pl.DataType], ...], list[str]] = {}
    for path, columns in found.items():
        alike.setdefault(tuple(columns.items()), []).append(path)
    return pl.concat([_scan(some, storage_options) for some in alike.values()], how="diagonal_relaxed")


def _scan(paths: Sequence[str], storage_options: Mapping[str, Any] | None) -> pl.LazyFrame:
    return pl.scan_parquet(
        list(paths),
        glob=False,
        hive_partitioning=True,
        missing_columns="insert",
        cast_options=_TIMES,
        storage_options=dict(storage_options) if storage_options else None,
    )


def _check(schemas: Mapping[str, pl.Schema]) -> None:
    types: dict[str, dict[pl.DataType, str]] = {}
    for path, schema in schemas.items():
        for column, kind in schema.items():
            types.setdefault(column, {}).setdefault(kind, path)
    for column, found in types.items():
        if not _have_one_type(list(found)):
            raise ColumnsDifferError(column, {str(kind): path for kind, path in found.items()})


def _have_one_type(types: Sequence[Any]) -> bool:
    """Whether one type holds the values of all as they are: the wider number; text, of anything but objects and lists."""
    if len(set(types)) == 1 or all(kind.is_numeric() for kind in types) or all(kind.is_temporal() for kind in types):
        return True
    if all(isinstance(kind, pl.List) for kind in types):
        return _have_one_type([kind.inner for kind in types])
    if all(isinstance(kind, pl.Struct) for kind in types):
        members: dict[str, list[Any]] = {}
        for field in (field for kind in types for field in kind.fields):
            members.setdefault(field.name, []).append(field.dtype)
        return all(map(_have_one_type, members.values()))
    return pl.String in types and not any(kind.is_nested() for kind in types)
