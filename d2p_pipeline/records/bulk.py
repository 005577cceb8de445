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

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

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


def without_pairs(text: bytes) -> bytes:
    """Escaped surrogate pairs as the characters they mean: arrow-rs reads those of U+20000 and above as others."""
    return _PAIR.sub(_character, text) if b"\\" in text and b"\\u" in text else text


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
        table = _decoder(members)(without_pairs(text) if lines.has_unicode_escapes else text)
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
def _decoder(members: Members) -> Callable[[bytes], pa.Table]:
    schema = arro3.core.Schema.from_arrow(_schema(members))

    def decode(text: bytes) -> pa.Table:
        return pa.table(arro3.io.read_json(io.BytesIO(text), schema, batch_size=BATCH_ROWS))

    return decode


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
    columns: dict[str, pl.Series] = {}
    least: list[pl.Expr] = []
    inner: list[pl.Expr] = []
    always = 0
    sometimes: list[pl.Expr] = []
    for name, kind in members:
        column = table.column(name)
        if column.null_count == table.num_rows:
            continue
        value = pl.col(name)
        match kind:
            case "string" | "timestamp":
                columns[name], value = _lengths(column), value + _QUOTES
            case "bool":
                columns[name], value = _series(column), len("false") - value.cast(pl.Int32)
            case "int":
                columns[name] = _lengths(column.cast(pa.string()))
            case _:
                columns[name], separators = _account_nested(column, is_map=kind == "map")
                columns[f"{name} separators"] = separators
                inner.append(pl.col(f"{name} separators"))
        value = value + (len(name.encode()) + _QUOTES + 2)  # with its quotes, colon and comma
        if column.null_count:
            sometimes.append(pl.col(name).is_not_null().cast(pl.Int32))
            value = value.fill_null(0)
        else:
            always += 1
        least.append(value)
    if not columns:
        nothing = pl.zeros(table.num_rows, dtype=pl.Int64, eager=True)
        return nothing + _QUOTES, nothing
    count = pl.sum_horizontal(sometimes) + always if sometimes else pl.lit(always, pl.Int32)
    result = pl.DataFrame(columns).select(
        # Braces; the last field has no comma.
        least=pl.sum_horizontal(least).cast(pl.Int64) + _QUOTES - (count > 0).cast(pl.Int64),
        separators=(pl.sum_horizontal(inner).cast(pl.Int64) if inner else pl.lit(0, pl.Int64))
        + pl.max_horizontal(2 * count.cast(pl.Int64) - 1, pl.lit(0, pl.Int64)),
    )
    return result["least"], result["separators"]


def _account_nested(column: pa.ChunkedArray, *, is_map: bool) -> tuple[pl.Series, pl.Series]:
    """Per row of a list or map of strings: least bytes, null where there is none, and separators; brackets included."""
    array = column.combine_chunks()
    offsets = _series(array.offsets).cast(pl.Int64)
    entries = offsets.diff().slice(1)
    some = (entries > 0).cast(pl.Int64)
    # Brackets; every entry with its comma but the last.
    size = entries + _QUOTES - some
    for strings in (array.keys, array.items) if is_map else (array.values,):
        size += _between(offsets, _string_offsets(strings)) + entries * _QUOTES
        if strings.null_count:
            nulls = pl.concat([pl.Series([0], dtype=pl.Int64), _series(strings.is_null()).cast(pl.Int64).cum_sum()])
            size += _between(offsets, nulls) * (_NULL - _QUOTES)
    separators = entries * (2 if is_map else 1) - some
    if is_map:
        size += entries  # colons
    if column.null_count:
        absent = _series(array.is_null())
        return size.set(absent, None), separators.set(absent, 0)
    return size, separators


def _between(offsets: pl.Series, totals: pl.Series) -> pl.Series:
    """How much of a running total lies between consecutive offsets."""
    return totals.gather(offsets).diff().slice(1)


def _string_offsets(strings: pa.Array) -> pl.Series:
    """Where each string begins in the bytes of all of them, and where the last one ends."""
    if not len(strings):
        return pl.Series([0], dtype=pl.Int64)
    offsets = pa.Array.from_buffers(pa.int32(), len(strings) + 1, [None, strings.buffers()[1]], offset=strings.offset)
    return _series(offsets).cast(pl.Int64)


def _lengths(strings: pa.ChunkedArray) -> pl.Series:
    return _series(pc.call_function("binary_length", [strings]))


def _series(array: pa.Array | pa.ChunkedArray) -> pl.Series:
    return pl.Series(pl.from_arrow(array))


_MAPS = [field.name for field in LOG_FIELDS if field.kind == "map"]


def repeated_map_keys(table: pa.Table) -> frozenset[int]:
    """Rows with a map that has a key twice, which readers of Parquet take for damage."""
    rows: set[int] = set()
    for name in _MAPS:
        maps = table.column(name).combine_chunks()
        keys = _series(pa.ListArray.from_arrays(maps.offsets, maps.keys))
        rows.update((keys.list.n_unique() != keys.list.len()).arg_true())
    return frozenset(rows)
