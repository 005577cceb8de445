# pyright: standard
"""Plain NDJSON decoded first and checked afterwards: whether the decoder saw all of a line shows in its number of bytes.

The bulk decoder ignores unknown fields, keeps the last of two equal ones and takes null for absent, so it may be trusted with
canonical lines only; and looking at each line before costs as much as decoding it. But every decoded value has a shortest
JSON form, so a row accounts for a known number of bytes. A line of exactly these bytes, plus one for each two-character
escape in it, holds nothing else: an unknown, repeated or null field adds bytes, and always more than one per escape in it.
The same goes for text with `, ` and `: `, as Python writes it, where every comma and colon is known to have its space.

Any other line is doubtful, not wrong: the normalizer decides. pyarrow has no type information, hence `standard` above.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import arro3.core
import arro3.io
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from d2p_pipeline.records.fields import LOG_FIELDS, TimestampUnit, arrow_schema
from d2p_pipeline.records.shape import ARROW_TYPES, Shape, fold

BATCH_ROWS = 1024
"""Rows per Arrow batch; larger ones make the decoder slower."""

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_DIGITS = {"ms": 3, "us": 6, "ns": 9}
_QUOTES = 2
_NULL = 4  # bytes of `null`


_PAIR = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")


def without_pairs(text: bytes) -> bytes:
    """Escaped surrogate pairs as the characters they mean: arrow-rs reads those of U+20000 and above as others."""
    return _PAIR.sub(_character, text) if b"\\u" in text else text


def _character(pair: "re.Match[bytes]") -> bytes:
    high, low = int(pair[2], 16) - 0xD800, int(pair[3], 16) - 0xDC00
    return pair[1] + chr(0x10000 + (high << 10) + low).encode()


class Undecided(Exception):
    """The lines are no sequence of objects with fitting types, one per line: they have to be looked at one by one."""


@dataclass(frozen=True)
class Decoded:
    """A block's rows. `doubtful` ones may hold more than the row says or lack what they need; the time of `untimed` ones
    was not read."""

    table: pa.Table
    doubtful: set[int]
    untimed: set[int]


def decode(lines: list[bytes], unit: TimestampUnit, shape: Shape = (), text: bytes = b"") -> Decoded:
    """Decode lines of records that differ from the schema by `shape`; `text`: the same lines in one, if at hand.

    The lines have no newlines, and no NUL, raw or escaped: the decoder aborts the process over one in an error message.
    """
    text = text or b"\n".join((*lines, b""))
    members = _members(shape)
    try:
        table = _decoder(members)(text)
    except pa.ArrowInvalid as error:
        raise Undecided from error
    if table.num_rows != len(lines):
        raise Undecided
    folded = fold(table, shape)
    if folded is None:
        raise Undecided
    doubtful = _incomplete_rows(folded)
    if not _is_explained(table, members, text, [lines[row] for row in doubtful], sorted(doubtful)):
        doubtful.update(_doubtful_rows(table, members, lines))
    table = folded
    time = pl.Series(pl.from_arrow(table.column("time")))
    untimed: set[int] = set()
    readable = time.str.contains(_time_pattern(unit))
    if not readable.all():
        unreadable = (~readable).fill_null(False)
        untimed.update(unreadable.arg_true())
        time = time.set(unreadable, None)
    if (time.str.len_bytes() > len("2026-11-21T10:00:00.Z") + _DIGITS[unit]).any():  # cut off what Arrow would refuse
        time = time.str.replace(rf"(\.\d{{{_DIGITS[unit]}}})\d+", "$1")
    try:
        moments = pc.cast(time.to_arrow(), pa.timestamp(unit, "UTC"))
    except pa.ArrowInvalid as error:  # a 30th of February
        raise Undecided from error
    return Decoded(table.set_column(0, arrow_schema(unit).field("time"), moments), doubtful, untimed)


Members = tuple[tuple[str, str], ...]
"""Names and kinds of the columns that are decoded."""


@cache
def _members(shape: Shape) -> Members:
    """The schema's fields with the kinds that the shape gives them, then the shape's unknown names."""
    kinds: dict[str, str] = {field.name: field.kind for field in LOG_FIELDS}
    return tuple((kinds | dict(shape)).items())


@cache
def _decoder(members: Members) -> Callable[[bytes], pa.Table]:
    """Reads `time` as text: its bytes have to be accounted for too."""
    known = arrow_schema()
    fields = [
        pa.field(name, pa.string() if kind == "timestamp" else ARROW_TYPES[kind])
        if kind in ("timestamp", *ARROW_TYPES)
        else known.field(name)
        for name, kind in members
    ]
    schema = arro3.core.Schema.from_arrow(pa.schema(fields))

    def decode(text: bytes) -> pa.Table:
        return pa.table(arro3.io.read_json(io.BytesIO(without_pairs(text)), schema, batch_size=BATCH_ROWS))

    return decode


@cache
def _time_pattern(unit: TimestampUnit) -> str:
    """Times that Arrow's cast and the normalizer read alike, in years that have no edge to fall off in any offset."""
    years = r"(1[7-9]\d\d|2[01]\d\d|22[0-5]\d)" if unit == "ns" else r"([1-8]\d{3}|9[0-8]\d\d|99[0-8]\d)"
    return rf"^{years}-\d\d-\d\d[T ]\d\d:\d\d:[0-5]\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"


def _incomplete_rows(table: pa.Table) -> set[int]:
    """Rows that lack a required field, or have an explicit null there."""
    rows: set[int] = set()
    for field in LOG_FIELDS:
        if field.required and table.column(field.name).null_count:
            rows.update(pl.Series(pl.from_arrow(table.column(field.name))).is_null().arg_true())
    return rows


def _is_explained(table: pa.Table, members: Members, text: bytes, others: list[bytes], other_rows: list[int]) -> bool:
    """Whether the rows together explain all of a block but some `others`; then each does by its own, as none can have too
    few bytes."""
    least, separators = _sum(table, members)
    size, escapes = len(text) - table.num_rows, len(_ESCAPE.findall(text))
    if others:
        other_least, other_separators = _sum(table.take(pa.array(other_rows)), members)
        least, separators = least - other_least, separators - other_separators
        size -= sum(map(len, others))
        escapes -= sum(map(_escapes, others))
    return _explains(text, size - least, separators, escapes)


def _doubtful_rows(table: pa.Table, members: Members, lines: list[bytes]) -> Iterator[int]:
    least, separators = _account(table.combine_chunks(), members)
    extra = pl.Series(list(map(len, lines)), dtype=pl.Int64) - least
    for row in (extra != 0).arg_true():
        line = lines[row]
        if not _explains(line, extra[row], separators[row], _escapes(line)):
            yield row


def _escapes(line: bytes) -> int:
    return line.count(b"\\") - line.count(b"\\\\")


def _explains(text: bytes, extra: int, separators: int, escapes: int) -> bool:
    """Whether `extra` bytes beyond the least are nothing but escapes, or these and a space per comma and colon."""
    if extra == escapes:
        return True
    if extra != escapes + separators:
        return False
    return text.count(b'":') == text.count(b'": ') and b',"' not in text and b",n" not in text


def _sum(table: pa.Table, members: Members) -> tuple[int, int]:
    """The least bytes the JSON of all rows can have, and how many commas and colons that has."""
    size = separators = fields = 0
    for name, kind in members:
        column = table.column(name)
        present = table.num_rows - column.null_count
        fields += present
        size += present * (_name_bytes(name) + _QUOTES)
        match kind:
            case "string" | "timestamp":
                size += _total(_lengths(column)) + present * _QUOTES
            case "bool":
                size += present * len("false") - _total(column)
            case "int":
                size += _total(_lengths(column.cast(pa.string())))
            case _:
                inner_size, inner_separators = _sum_nested(column, is_map=kind == "map")
                size += inner_size + present * _QUOTES + inner_separators
                separators += inner_separators
    # Braces, colons, and a comma between any two fields.
    separators += 2 * fields - table.num_rows
    return size + table.num_rows * _QUOTES + 2 * fields - table.num_rows, separators


def _sum_nested(column: pa.ChunkedArray, *, is_map: bool) -> tuple[int, int]:
    """Bytes of all entries without commas and colons, and how many of these there are."""
    size = separators = 0
    for chunk in column.chunks:
        entries = 0
        for strings in (chunk.keys, chunk.items) if is_map else (chunk.values,):
            entries = len(strings)
            size += _total(_lengths(strings)) + entries * _QUOTES + strings.null_count * (_NULL - _QUOTES)
        filled = _total(pc.call_function("not_equal", [chunk.offsets[1:], chunk.offsets[:-1]]))
        separators += entries * (2 if is_map else 1) - filled
    return size, separators


def _name_bytes(name: str) -> int:
    return len(name.encode())


def _total(values: pa.Array | pa.ChunkedArray) -> int:
    return pc.call_function("sum", [values]).as_py() or 0


def _lengths(strings: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.call_function("binary_length", [strings])


def _account(table: pa.Table, members: Members) -> tuple[pl.Series, pl.Series]:
    """`_sum` per row; slower."""
    columns = pl.DataFrame(pl.from_arrow(table))
    least: list[pl.Expr] = []
    fields: list[pl.Expr] = []
    nested: dict[str, pl.Series] = {}
    for name, kind in members:
        column = pl.col(name)
        fields.append(column.is_not_null().cast(pl.Int64))
        match kind:
            case "string" | "timestamp":
                value = column.str.len_bytes().cast(pl.Int64) + _QUOTES
            case "bool":
                value = pl.when(column).then(len("true")).otherwise(len("false"))
            case "int":
                value = column.cast(pl.String).str.len_bytes().cast(pl.Int64)
            case _:
                size, inner = _account_nested(table.column(name), is_map=kind == "map")
                nested[f"{name} size"], nested[f"{name} separators"] = size, inner
                value = pl.col(f"{name} size")
        # With its quotes, colon and comma.
        least.append(pl.when(column.is_null()).then(0).otherwise(value + _name_bytes(name) + _QUOTES + 2))
    extended = columns.with_columns(**nested)
    inner = [pl.col(name) for name in nested if name.endswith("separators")]
    count = pl.sum_horizontal(fields)
    result = extended.select(
        # Braces; the last field has no comma.
        least=pl.sum_horizontal(least) + _QUOTES - (count > 0).cast(pl.Int64),
        separators=pl.sum_horizontal(inner) + pl.max_horizontal(2 * count - 1, pl.lit(0)),
    )
    return result["least"], result["separators"]


def _account_nested(column: pa.ChunkedArray, *, is_map: bool) -> tuple[pl.Series, pl.Series]:
    """Per row of a list or map of strings: least bytes and separators, brackets included; null counts as empty."""
    sizes: list[pl.Series] = []
    separators: list[pl.Series] = []
    for chunk in column.chunks:
        offsets = pl.Series(pl.from_arrow(chunk.offsets)).cast(pl.Int64)
        each = _string_bytes(chunk.items if is_map else chunk.values) + 1  # comma
        if is_map:
            each = each + _string_bytes(chunk.keys) + 1  # colon
        until = pl.concat([pl.Series([0], dtype=pl.Int64), each.cum_sum()])
        entries = offsets.diff().slice(1)
        some = (entries > 0).cast(pl.Int64)
        sizes.append(until.gather(offsets).diff().slice(1) + 2 - some)
        separators.append(entries * (2 if is_map else 1) - some)
    empty = pl.Series([], dtype=pl.Int64)
    return pl.concat([empty, *sizes]), pl.concat([empty, *separators])


def _string_bytes(strings: pa.Array) -> pl.Series:
    lengths = pl.Series(pl.from_arrow(strings)).str.len_bytes().cast(pl.Int64)
    return (lengths + _QUOTES).fill_null(_NULL)
