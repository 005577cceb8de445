# pyright: standard
"""Producers that name a field their own way do so in every record: what one line shows lets the rest be decoded in bulk.

A `Shape` lists the members that differ from the schema: unknown names, aliases and other spellings, and numbers or booleans
in string fields. The bulk decoder reads them as columns of their own (bulk.py), and `fold` puts these where the normalizer
would put the values: into the field they mean, or into `extra-fields`. What needs a decision per record (a field and its
alias in one record, nested values, fractions, whose text counts) has no shape and goes through the normalizer.
pyarrow has no type information, hence `standard` above.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from d2p_pipeline.records.fields import BY_NAME, arrow_schema, normalize_name, target_name

Kind = Literal["string", "int", "bool"]


class Member(NamedTuple):
    """A member that differs from the schema, under its name as written."""

    name: str
    kind: Kind


Shape = tuple[Member, ...]


@dataclass
class Shapes:
    """What is known of the producers: the shape that served last, None before there was any."""

    last: Shape | None = None


ARROW_TYPES: dict[Kind, pa.DataType] = {"string": pa.string(), "int": pa.int64(), "bool": pa.bool_()}
_PYTHON_TYPES: dict[type, Kind] = {str: "string", int: "int", bool: "bool"}
_INT64 = 2**63

_object = msgspec.json.Decoder(dict[str, Any]).decode


def shape_of(line: bytes) -> Shape | None:
    """What of a line differs from the schema; None if it cannot be decoded in bulk."""
    try:
        members = _object(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    shape: list[Member] = []
    meant: set[str] = set(members) & BY_NAME.keys()
    for name, value in members.items():
        known = BY_NAME.get(name)
        if value is None or (known and (known.kind != "string" or isinstance(value, str))):
            continue
        kind = _PYTHON_TYPES.get(type(value))
        if kind is None or (kind == "int" and not -_INT64 <= value < _INT64):
            return None
        if known is None:
            target = target_name(normalize_name(name))
            if target in meant or not _fits(target, kind):
                return None
            meant.add(target)
        shape.append(Member(name, kind))
    return tuple(shape)


def shared_by(lines: Sequence[bytes]) -> Shape:
    """The shape that all of some lines have; the schema's own if they differ."""
    first, *others = {shape_of(line) for line in lines}
    return first or () if not others else ()


def joined(shape: Shape, other: Shape) -> Shape:
    """A shape for the records of both; the other one alone where that would be too many columns."""
    members = dict(shape) | dict(other)
    return tuple(starmap(Member, members.items())) if len(members) <= _MOST_MEMBERS else other


_MOST_MEMBERS = 64


def _fits(target: str, kind: Kind) -> bool:
    """Whether a column of this kind can become the field it means, or an entry of `extra-fields`."""
    known = BY_NAME.get(target)
    return bool(target) and (
        known is None
        or known.kind == "string"
        or (known.kind == "timestamp" and kind == "string")
        or (known.kind == "bool" and kind == "bool")
    )


def fold(table: pa.Table, shape: Shape) -> tuple[pa.Table, set[int]]:
    """The table with the shape's columns where their values belong, and the rows that need a decision: those that have
    two names for one field.

    Columns: those of the schema with `time` as text, then the shape's unknown names.
    """
    unknown: list[tuple[str, pa.ChunkedArray]] = []
    undecided: set[int] = set()
    for member in shape:
        column = table.column(member.name)
        if member.name not in BY_NAME:
            table = table.drop_columns(member.name)
        target = target_name(normalize_name(member.name))
        known = BY_NAME.get(target)
        if known is None:
            unknown.append((target, _as_text(column)))
            continue
        column = column if known.kind == "bool" else _as_text(column)
        if member.name != target:
            column, both = _either(table.column(target), column)
            undecided.update(both)
        position = table.schema.get_field_index(target)
        field = arrow_schema().field(target) if known.kind != "timestamp" else pa.field("time", pa.string())
        table = table.set_column(position, field, column)
    if unknown:
        # In the order of the normalizer.
        table = _with_extra_fields(table, sorted(unknown, key=itemgetter(0)))
    return table, undecided


def _either(one: pa.ChunkedArray, other: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[int]]:
    """The values of two columns as one, and the rows where both have some."""
    if one.null_count == len(one):
        return other, []
    one = _as_text(one) if one.type != other.type else one
    both = pl.Series(pl.from_arrow(one.is_valid())) & pl.Series(pl.from_arrow(other.is_valid()))
    return pc.call_function("coalesce", [one, other]), both.arg_true().to_list()


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers and booleans as their JSON text."""
    return column if column.type == pa.string() else column.cast(pa.string())


def _with_extra_fields(table: pa.Table, unknown: list[tuple[str, pa.ChunkedArray]]) -> pa.Table:
    """Entries appended to `extra-fields`: first a record's own, then those of `unknown` in order."""
    rows = pl.int_range(table.num_rows, eager=True)
    own = table.column("extra-fields").combine_chunks()
    offsets = pl.Series(pl.from_arrow(own.offsets)).cast(pl.Int64)
    first = int(offsets[0])
    parts = (
        [
            pl.DataFrame(
                {
                    "row": rows.repeat_by(offsets.diff().slice(1)).explode(empty_as_null=False),
                    "key": pl.Series(pl.from_arrow(own.keys)),
                    "value": pl.Series(pl.from_arrow(own.items)),
                }
            )
        ]
        if len(own.keys) and first == 0
        else []
    )
    for name, column in unknown:
        values = pl.Series(pl.from_arrow(column))
        entries = pl.DataFrame({"row": rows, "value": values}).filter(pl.col("value").is_not_null())
        parts.append(entries.select("row", pl.lit(name).alias("key"), "value"))
    entries = pl.concat(parts).sort("row", maintain_order=True)
    counts = rows.to_frame("row").join(entries.group_by("row").len(), on="row", how="left", maintain_order="left")[
        "len"
    ]
    ends = counts.fill_null(0).cum_sum()
    bounds = pa.concat_arrays([pa.array([0], pa.int32()), ends.cast(pl.Int32).to_arrow()])
    present = (counts.fill_null(0) > 0) | pl.Series(pl.from_arrow(own.is_valid()))
    field = arrow_schema().field("extra-fields")
    maps = pa.MapArray.from_arrays(
        bounds,
        entries["key"].to_arrow().cast(pa.string()),
        entries["value"].to_arrow().cast(pa.string()),
        type=field.type,
        mask=(~present).to_arrow(),
    )
    return table.set_column(table.schema.get_field_index("extra-fields"), field, maps)
