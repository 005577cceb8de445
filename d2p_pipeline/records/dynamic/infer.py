"""Columns that hold every record of a batch, found by joining the types of their values.

The join only widens and never fails: integer → number → text, and text for whatever has no type in common (an object and a
string, a list of numbers and strings). Text is the value itself if it is a string, else its JSON. The order of columns is
that of first appearance, so the same records give the same columns.
"""

import math
from typing import Any, cast

import msgspec

from d2p_pipeline.records.dynamic.columns import (
    BIGINT,
    BOOLEAN,
    EXACT,
    EXTRA,
    INT64,
    INTEGER,
    NULL,
    NUMBER,
    STRING,
    TEXT,
    Column,
    can_be_column,
)

MOST_MEMBERS = 1000
"""Columns of one object; further names go to its `extra-fields`, so that names made of ids do not become columns."""
DEEPEST = 12
"""Levels of objects and lists that become columns; what lies deeper is JSON text."""

_OPEN = STRING


def column_of(value: Any, kept_apart: frozenset[str] = frozenset(), depth: int = 0) -> Column:
    """The narrowest column for a value; floats are msgspec.Raw. Names of `kept_apart` go to the top's `extra-fields`."""
    match value:
        case None:
            return NULL
        case bool():
            return BOOLEAN
        case int():
            return INTEGER if abs(value) <= EXACT else BIGINT if -INT64 <= value < INT64 else TEXT
        case msgspec.Raw():
            return NUMBER if math.isfinite(float(bytes(value))) else TEXT
        case str():
            return STRING
        case dict() | list() if depth == DEEPEST:
            return TEXT
        case dict():
            return _object_of(cast(dict[str, Any], value), kept_apart, depth)
        case _:
            item = NULL
            for element in cast(list[Any], value):
                item = join(item, column_of(element, frozenset(), depth + 1))
            return _list_of(item)


def join(one: Column, other: Column) -> Column:
    """The narrowest column that holds the values of both."""
    if one == other or other.kind == "null":
        return one
    if one.kind == "null":
        return other
    kinds = {one.kind, other.kind}
    if kinds == {"object"}:
        return _joined_objects(one, other)
    if kinds == {"list"}:
        return _list_of(join(one.item or NULL, other.item or NULL))
    if kinds == {"integer", "bigint"}:
        return BIGINT
    if kinds == {"integer", "number"}:
        return NUMBER
    # The time column holds whatever it is given, or the record is refused.
    return one if one.kind == "timestamp" else other if other.kind == "timestamp" else TEXT


def _list_of(item: Column) -> Column:
    return TEXT if item == TEXT else Column("list", item=item)


def _object_of(value: dict[str, Any], kept_apart: frozenset[str], depth: int) -> Column:
    members = {
        name: column_of(inner, frozenset(), depth + 1)
        for name, inner in value.items()
        if name != EXTRA and name not in kept_apart and can_be_column(name)
    }
    return _object(members, is_open=len(members) < len(value))


def _joined_objects(one: Column, other: Column) -> Column:
    members = dict(one.members)
    for name, column in other.members:
        known = members.get(name)
        members[name] = join(known, column) if known else column
    return _object(members, is_open=bool(one.extra or other.extra))


def _object(members: dict[str, Column], *, is_open: bool) -> Column:
    kept = tuple(members.items())[:MOST_MEMBERS]
    return Column("object", kept, extra=_OPEN if is_open or len(kept) < len(members) else None)
