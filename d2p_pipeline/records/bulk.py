# pyright: standard
"""Plain NDJSON decoded first and checked afterwards: whether the decoder saw all of a line shows in its number of bytes.

The bulk decoder ignores unknown fields, keeps the last of two equal ones and takes null for absent, so it may be trusted with
canonical lines only; and looking at each line before costs as much as decoding it. But every decoded value has a shortest
JSON form, so a row accounts for a known number of bytes. A line of exactly these bytes, plus one for each two-character
escape in it, holds nothing else: an unknown, repeated or null field adds bytes, and always more than one per escape in it.
The same goes for text with `, ` and `: `, as Python writes it, where every comma and colon is known to have its space.

Any other line is doubtful, not wrong: the normalizer decides. What the decoder refuses is narrowed to a few hundred lines,
which are left to the normalizer too. pyarrow has no type information, hence `standard` above.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

import arro3.core
import arro3.io
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from d2p_pipeline.records.fields import LOG_FIELDS, TimestampUnit, arrow_schema
from d2p_pipeline.records.lines import Lines
from d2p_pipeline.records.shape import ARROW_TYPES, Shape, fold

BATCH_ROWS = 1024
"""Rows per Arrow batch; larger ones make the decoder slower."""

# Lines decoded in one call, and those that are not narrowed any further where the decoder refuses one of them.
_LINES = 4096
_FEW_LINES = 256

_DIGITS = {"ms": 3, "us": 6, "ns": 9}
_QUOTES = 2
_NULL = 4  # bytes of `null`

_PAIR = re.compile(rb"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
# A pattern is found in a third of the time that `in` takes.
_UNICODE_ESCAPE = re.compile(rb"\\u")


def without_pairs(text: bytes) -> bytes:
    """Escaped surrogate pairs as the characters they mean: arrow-rs reads those of U+20000 and above as others."""
    return _PAIR.sub(_character, text) if b"\\" in text and _UNICODE_ESCAPE.search(text) else text


def _character(pair: "re.Match[bytes]") -> bytes:
    high, low = int(pair[2], 16) - 0xD800, int(pair[3], 16) - 0xDC00
    return pair[1] + chr(0x10000 + (high << 10) + low).encode()


@dataclass(frozen=True)
class Decoded:
    """The rows of some lines. `numbers` has the line of each row, ascending; `left` are the lines that have none.

    `doubtful` rows may hold more than the row says or lack what they need; the time of `untimed` ones was not read.
    """

    table: pa.Table
    numbers: Sequence[int]
    left: set[int]
    doubtful: set[int]
    untimed: set[int]

    @property
    def open(self) -> int:
        """How many lines somebody has to look at."""
        return len(self.left) + len(self.doubtful)


def decode(lines: Lines, unit: TimestampUnit, shape: Shape = ()) -> Decoded:
    """Decode lines of records that differ from the schema by `shape`."""
    members = _members(shape)
    batches: list[pa.RecordBatch] = []
    left = set(lines.odd)
    for first in range(0, len(lines), _LINES):
        _decode_some(lines, first, min(first + _LINES, len(lines)), members, batches, left)
    numbers = [number for number in range(len(lines)) if number not in left] if left else range(len(lines))
    table = pa.Table.from_batches(batches, _schema(members))
    folded, doubtful = fold(table, shape)
    doubtful |= _incomplete_rows(folded)
    doubtful |= _unexplained_rows(table, members, lines, numbers)
    moments, untimed = _moments(pl.Series(pl.from_arrow(folded.column("time"))), unit)
    return Decoded(folded.set_column(0, arrow_schema(unit).field("time"), moments), numbers, left, doubtful, untimed)


def _decode_some(
    lines: Lines, first: int, stop: int, members: "Members", batches: list[pa.RecordBatch], left: set[int]
) -> None:
    """Decode the lines from `first` to `stop`; those among which the decoder refuses one are added to `left`."""
    text, count = lines.text_of(first, stop)
    if not count:
        return
    try:
        text = without_pairs(bytes(text)) if lines.has_unicode_escapes else text
        table = table_of(text, _arro3_schema(members))
    except pa.ArrowInvalid:
        table = None
    if table is not None and table.num_rows == count:
        batches.extend(table.to_batches())
    elif stop - first <= _FEW_LINES:
        left.update(range(first, stop))
    else:
        for some in range(first, stop, _FEW_LINES):
            _decode_some(lines, some, min(some + _FEW_LINES, stop), members, batches, left)


Members = tuple[tuple[str, str], ...]
"""Names and kinds of the columns that are decoded."""


@cache
def _members(shape: Shape) -> Members:
    """The schema's fields with the kinds that the shape gives them, then the shape's unknown names."""
    kinds: dict[str, str] = {field.name: field.kind for field in LOG_FIELDS}
    return tuple((kinds | dict(shape)).items())


@cache
def _schema(members: Members) -> pa.Schema:
    """`time` is text: its bytes have to be accounted for too."""
    known = arrow_schema()
    return pa.schema(
        [
            pa.field(name, pa.string() if kind == "timestamp" else ARROW_TYPES[kind])
            if kind in ("timestamp", *ARROW_TYPES)
            else known.field(name)
            for name, kind in members
        ]
    )


@cache
def _arro3_schema(members: Members) -> arro3.core.Schema:
    return arro3.core.Schema.from_arrow(_schema(members))


def table_of(text: bytes | pa.Buffer, schema: arro3.core.Schema) -> pa.Table:
    """The rows of NDJSON, as arrow-rs decodes them. ArrowInvalid if it refuses."""
    try:
        return pa.table(arro3.io.read_json(pa.BufferReader(text), schema, batch_size=BATCH_ROWS))
    finally:
        # It lets go of a text only when it is called again.
        arro3.io.read_json(*_NOTHING)


_NOTHING = (pa.BufferReader(b""), arro3.core.Schema([]))


def _moments(time: pl.Series, unit: TimestampUnit) -> tuple[pa.Array, set[int]]:
    """Times read as Arrow reads them, null where that is not certain to be as the normalizer would; and these rows."""
    untimed = ~time.str.contains(_time_pattern(unit)).fill_null(True)
    if untimed.any():
        time = time.set(untimed, None)
    if (time.str.len_bytes() > len("2026-11-21T10:00:00.Z") + _DIGITS[unit]).any():  # cut off what Arrow would refuse
        time = time.str.replace(rf"(\.\d{{{_DIGITS[unit]}}})\d+", "$1")
    type_ = pa.timestamp(unit, "UTC")
    try:
        return pc.cast(time.to_arrow(), type_), set(untimed.arg_true())
    except pa.ArrowInvalid:  # a 30th of February
        late = time.str.contains(r"^\d{4}-\d\d-(29|3)").fill_null(False)
        return pc.cast(time.set(late, None).to_arrow(), type_), set((untimed | late).arg_true())


@cache
def _time_pattern(unit: TimestampUnit) -> str:
    """Times that Arrow's cast and the normalizer read alike, in years that have no edge to fall off in any offset."""
    years = r"(1[7-9]\d\d|2[01]\d\d|22[0-5]\d)" if unit == "ns" else r"([1-8]\d{3}|9[0-8]\d\d|99[0-8]\d)"
    days = r"(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    minutes = r"([01]\d|2[0-3]):[0-5]\d"
    return rf"^{years}-{days}[T ]{minutes}:[0-5]\d(\.\d+)?(Z|[+-]{minutes})$"


def _incomplete_rows(table: pa.Table) -> set[int]:
    """Rows that lack a required field, or have an explicit null there."""
    rows: set[int] = set()
    for field in LOG_FIELDS:
        if field.required and table.column(field.name).null_count:
            rows.update(_series(table.column(field.name).is_null()).arg_true())
    return rows


def _unexplained_rows(table: pa.Table, members: Members, lines: Lines, numbers: Sequence[int]) -> set[int]:
    """Rows that do not account for all bytes of their lines."""
    if not table.num_rows:
        return set()
    least, separators = _account(table, members)
    every = len(numbers) == len(lines)
    places = pl.Series(numbers, dtype=pl.Int64) if not every else None
    extra = (lines.lengths if places is None else lines.lengths.gather(places)) - least
    if (extra == 0).all():
        rows: set[int] = set()
    else:
        escapes = lines.escapes if places is None else lines.escapes.gather(places)
        rows = set((extra != escapes).arg_true())
        spaced = (extra == escapes + separators) & (extra != escapes)
        rows.difference_update(row for row in spaced.arg_true() if _is_spaced(lines[numbers[row]]))
    for name, kind in members:
        if kind == "int":
            rows.update(_maybe_exponents(table.column(name), name, lines, numbers))
    return rows


def _is_spaced(line: bytes) -> bool:
    """Whether as many spaces as there are commas and colons can only be those after commas and colons."""
    return line.count(b'":') == line.count(b'": ') and b',"' not in line and b",n" not in line


def _maybe_exponents(column: pa.ChunkedArray, name: str, lines: Lines, numbers: Sequence[int]) -> list[int]:
    """Rows whose number may be written like `1e2`: as long as `100`, which it is read as, but another text."""
    values = _series(column)
    exponent = re.compile(rb'"%b"\s*:\s*-?[\d.]+[eE]' % re.escape(name.encode()))
    return [
        row
        for row in ((values != 0) & (values % 100 == 0)).fill_null(False).arg_true()
        if exponent.search(lines[numbers[row]])
    ]


def _account(table: pa.Table, members: Members) -> tuple[pl.Series, pl.Series]:
    """Per row, the least bytes its JSON can have, and how many commas and colons that has."""
    always = fields = 0
    least: list[pa.ChunkedArray] = []
    present: list[pa.ChunkedArray] = []
    inner: list[pa.ChunkedArray] = []
    for name, kind in members:
        column = table.column(name)
        if column.null_count == table.num_rows:
            continue
        named = len(name.encode()) + _QUOTES + 2  # with its quotes, colon and comma
        match kind:
            case "string" | "timestamp":
                size, named = _call("binary_length", column), named + _QUOTES
            case "bool":
                size, named = _call("negate", column.cast(pa.int8()).cast(pa.int32())), named + len("false")
            case "int":
                size = _call("binary_length", column.cast(pa.string()))
            case _:
                size, separators = _account_nested(column, is_map=kind == "map")
                inner.append(separators)
        if column.null_count:
            size = _call("coalesce", _call("add", size, pa.scalar(named, pa.int32())), pa.scalar(0, pa.int32()))
            present.append(column.is_valid().cast(pa.int8()).cast(pa.int32()))
        else:
            always += named
            fields += 1
        least.append(size)
    nothing = pl.zeros(table.num_rows, dtype=pl.Int64, eager=True)
    count = _total(present, nothing) + fields
    some = count > 0
    # Braces; the last field has no comma.
    return (
        _total(least, nothing) + (always + _QUOTES) - some.cast(pl.Int64),
        _total(inner, nothing) + 2 * count - some.cast(pl.Int64),
    )


def _total(columns: list[pa.ChunkedArray], nothing: pl.Series) -> pl.Series:
    return _series(reduce(partial(_call, "add"), columns)).cast(pl.Int64) if columns else nothing


def _account_nested(column: pa.ChunkedArray, *, is_map: bool) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Per row of a list or map of strings: least bytes, null where there is none, and separators; brackets included."""
    array = column.combine_chunks()
    absent = array.is_null() if column.null_count else None
    entries = _steps(array.offsets)
    some = _call("min_element_wise", entries, pa.scalar(1, pa.int32()))
    # Quotes and comma of every entry; of a map also the key's, and a colon.
    size = _call("subtract", _call("multiply", entries, pa.scalar(6 if is_map else 3, pa.int32())), some)
    for strings in (array.keys, array.items) if is_map else (array.values,):
        size = _call("add", size, _steps(_call("take", _string_offsets(strings), array.offsets)))
        if strings.null_count:
            nulls = _call("cumulative_sum", strings.is_null().cast(pa.int8()).cast(pa.int32()))
            before = pa.concat_arrays([pa.array([0], pa.int32()), nulls]).take(array.offsets)
            size = _call("add", size, _call("multiply", _steps(before), pa.scalar(_NULL - _QUOTES, pa.int32())))
    size = _call("add", size, pa.scalar(_QUOTES, pa.int32()))  # brackets
    if absent is not None:
        size = _call("if_else", absent, pa.scalar(None, pa.int32()), size)
    separators = _call("subtract", _call("multiply", entries, pa.scalar(2 if is_map else 1, pa.int32())), some)
    return pa.chunked_array([size]), pa.chunked_array([separators])


def _steps(totals: pa.Array) -> pa.Array:
    """By how much each element is more than the one before it; one fewer than these are."""
    return _call("subtract", totals.slice(1), totals.slice(0, len(totals) - 1))


def _call(function: str, *values: object) -> Any:
    return pc.call_function(function, list(values))


def _string_offsets(strings: pa.Array) -> pa.Array:
    """Where each string begins in the bytes of all of them, and where the last one ends."""
    if not len(strings):
        return pa.array([0], pa.int32())
    return pa.Array.from_buffers(pa.int32(), len(strings) + 1, [None, strings.buffers()[1]], offset=strings.offset)


def _series(array: pa.Array | pa.ChunkedArray) -> pl.Series:
    return pl.Series(pl.from_arrow(array))


_MAPS = [field.name for field in LOG_FIELDS if field.kind == "map"]


def repeated_map_keys(table: pa.Table) -> frozenset[int]:
    """Rows with a map that has a key twice, which readers of Parquet take for damage."""
    rows: set[int] = set()
    for name in _MAPS:
        column = table.column(name)
        if column.null_count == table.num_rows:
            continue
        maps = column.combine_chunks()
        keys = _series(pa.ListArray.from_arrays(maps.offsets, maps.keys))
        if _repeats(keys.unique()).any():  # few lists of names serve many rows
            rows.update(_repeats(keys).arg_true())
    return frozenset(rows)


def _repeats(lists: pl.Series) -> pl.Series:
    return lists.list.n_unique() != lists.list.len()
