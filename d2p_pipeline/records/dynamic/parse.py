# pyright: standard
"""Chunks of dynamic records become a table.

    lines     every line that is a record, or a dead letter
    columns   those of the JSON Schema, or those that hold all lines
    fitted    a line whose values do not fit as they are written is written anew
    decoded   in bulk by arrow-rs's JSON reader, which drops what it does not know: hence the step before

A record without a time gets that of its reception. pyarrow has no type information, hence `standard` above.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import arro3.core
import msgspec
import polars as pl
import pyarrow as pa

from d2p_pipeline.records import chunk as chunk_format
from d2p_pipeline.records.bulk import table_of, without_pairs
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected
from d2p_pipeline.records.dynamic.columns import TEXT, TIMESTAMP, Column, arrow_schema, fitted, settled, strict_type
from d2p_pipeline.records.dynamic.infer import column_of, join
from d2p_pipeline.records.dynamic.normalize import DynamicNormalizer
from d2p_pipeline.records.dynamic.schema import compiled
from d2p_pipeline.records.fields import TimestampUnit
from d2p_pipeline.records.normalize import BYTE_ORDER_MARK, WHITESPACE, members_of
from d2p_pipeline.records.place import places
from d2p_pipeline.records.rules import Rules

# Text decoded at once: enough that the cost per call does not show, little enough to repeat for one bad line.
_BLOCK = 4 << 20
# Records whose types are joined before the others are tried against the result.
_SAMPLE = 200
_SAMPLE_GROWTH = 4


class _Line(NamedTuple):
    """A record's line, how it was received and when (ms)."""

    text: bytes
    original: bytes
    received_at: int


class Rows(NamedTuple):
    """A table, the line that each row was received as, the dead letters, and the number of lines that were no blank."""

    table: pa.Table
    originals: list[bytes]
    rejects: list[DeadLetter]
    lines: int


def parse_dynamic(chunks: Sequence[bytes], rules: Rules, received_at: int, batch: str | None, chunk_limit: int) -> Rows:
    """Decode chunks; see `d2p_pipeline.records.parse.parse`."""
    parser = _Parser(rules, received_at, batch)
    for chunk in chunks:
        parser.add(chunk, chunk_limit)
    return parser.finish()


class _Parser:
    def __init__(self, rules: Rules, received_at: int, batch: str | None) -> None:
        self._rules = rules
        self._received_at = received_at
        self._batch = batch
        self._normalizer = DynamicNormalizer(rules)
        self._lines: list[_Line] = []
        self._rejects: list[DeadLetter] = []

    def add(self, chunk: bytes, limit: int) -> None:
        try:
            content = chunk_format.decode(chunk, limit)
        except chunk_format.ChunkError as error:
            self._reject(str(error), chunk, self._received_at)
            return
        received_at = self._received_at if content.received_at is None else content.received_at
        for raw in content.body.split(b"\n"):
            if not raw.removeprefix(BYTE_ORDER_MARK).strip(WHITESPACE):
                continue
            if content.canonical and self._normalizer.fits(raw):
                self._lines.append(_Line(raw, raw, received_at))
                continue
            try:
                self._lines.append(_Line(self._normalizer.canonical(raw).line, raw, received_at))
            except Rejected as error:
                self._reject(error.reason, raw, received_at)

    def finish(self) -> Rows:
        lines, columns = self._lines, self._columns()
        if self._rules.json_schema is None:
            lines = list(self._fitted(lines, columns))
        schema = arrow_schema(columns, self._rules.timestamp_unit)
        decoded = list(_Decoder(schema, columns, self._rules, self._reject).decode(lines))
        tables = [table for table, _ in decoded]
        kept = [line for _, some in decoded for line in some]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        table, kept = self._placed(_timed(table, kept, self._rules), kept)
        return Rows(table, [line.original for line in kept], self._rejects, len(kept) + len(self._rejects))

    def _columns(self) -> Column:
        if self._rules.json_schema is not None:
            return compiled(self._rules).columns
        apart = frozenset({"hmac"} if self._rules.hmac_key is not None else ())
        columns = Column("object", ((self._rules.time_field, TIMESTAMP),))
        pending, size = self._lines, _SAMPLE
        while pending:
            for line in pending[:size]:
                if (record := self._record(line)) is not None:
                    columns = join(columns, column_of(record, apart))
            tried = msgspec.json.Decoder(strict_type(columns, self._rules.timestamp_unit, lenient_text=True)).decode
            pending = [line for line in pending[size:] if not _decodes(tried, line.text)]
            size *= _SAMPLE_GROWTH
        for name in self._rules.key_fields:
            columns = _with_text(columns, name)
        return settled(columns)

    def _record(self, line: _Line) -> dict[str, Any] | None:
        """The line's record; None if it is none after all, which the next step finds too."""
        try:
            return members_of(line.text)
        except (Rejected, RecursionError):
            return None

    def _fitted(self, lines: list[_Line], columns: Column) -> Iterator[_Line]:
        """The lines as the columns hold them."""
        strict = msgspec.json.Decoder(strict_type(columns, self._rules.timestamp_unit)).decode
        for line in lines:
            if _decodes(strict, line.text):
                yield line
                continue
            try:
                record = fitted(columns, members_of(line.text), self._rules.timestamp_unit)
            except Rejected as error:
                self._reject(error.reason, line.original, line.received_at)
            except RecursionError:
                self._reject("nested too deep to be read", line.original, line.received_at)
            else:
                yield line._replace(text=msgspec.json.encode(record))

    def _placed(self, table: pa.Table, lines: list[_Line]) -> tuple[pa.Table, list[_Line]]:
        """Without the rows whose key is not told."""
        if not lines:
            return table, lines
        try:
            untold = set(places(table, self._rules)["key"].is_null().arg_true())
        except KeyError:
            untold = set(range(table.num_rows))
        if not untold:
            return table, lines
        for row in sorted(untold):
            name = ", ".join(self._rules.key_fields)
            self._reject(f"{name}: key field, is missing, null or empty", lines[row].original, lines[row].received_at)
        good = [row for row in range(table.num_rows) if row not in untold]
        return table.take(pa.array(good, pa.int64())), [lines[row] for row in good]

    def _reject(self, reason: str, raw: bytes, received_at: int) -> None:
        raw = conceal(raw, self._rules)
        letter = DeadLetter(reason=reason, stage="parse", received_at=received_at, raw=raw, batch=self._batch)
        self._rejects.append(letter)


def _decodes(decode: Callable[[bytes], Any], text: bytes) -> bool:
    try:
        decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _with_text(column: Column, path: str) -> Column:
    """The columns with those that hold a key as text: by its name, and by its path."""
    first, _, rest = path.partition(".")
    members = [
        (name, TEXT if name == path else _with_text(member, rest) if name == first and rest else member)
        for name, member in column.members
    ]
    return replace(column, members=tuple(members))


def _timed(table: pa.Table, lines: list[_Line], rules: Rules) -> pa.Table:
    """The table with the time of reception where a record has none."""
    position = table.schema.get_field_index(rules.time_field)
    time = table.column(position)
    if not time.null_count:
        return table
    received = pa.array([line.received_at for line in lines], pa.timestamp("ms", "UTC")).cast(time.type)
    times = pl.Series(pl.from_arrow(time)).fill_null(pl.Series(pl.from_arrow(received)))
    return table.set_column(position, table.schema.field(position), times.to_arrow())


class _Decoder:
    """Decodes lines block by block, and finds those that cannot be decoded."""

    def __init__(
        self, schema: pa.Schema, columns: Column, rules: Rules, reject: Callable[[str, bytes, int], None]
    ) -> None:
        self._target = schema
        self._schema = arro3.core.Schema.from_arrow(schema)
        self._columns = columns
        self._unit: TimestampUnit = rules.timestamp_unit
        self._reject = reject

    def decode(self, lines: list[_Line]) -> Iterator[tuple[pa.Table, list[_Line]]]:
        block: list[_Line] = []
        size = 0
        for line in lines:
            block.append(line)
            size += len(line.text)
            if size >= _BLOCK:
                yield from self._block(block)
                block, size = [], 0
        if block:
            yield from self._block(block)

    def _block(self, lines: list[_Line], *, written_anew: bool = False) -> Iterator[tuple[pa.Table, list[_Line]]]:
        text = without_pairs(b"".join(line.text + b"\n" for line in lines))
        try:
            table = table_of(text, self._schema)
        except pa.ArrowInvalid as error:
            if len(lines) == 1:
                self._refuse(lines[0], error)
                return
            middle = len(lines) // 2
            yield from self._block(lines[:middle], written_anew=written_anew)
            yield from self._block(lines[middle:], written_anew=written_anew)
            return
        if not written_anew and any(_repeats_keys(column.combine_chunks()) for column in table.columns):
            yield from self._block([self._anew(line) for line in lines], written_anew=True)
            return
        yield table.cast(self._target), lines

    def _anew(self, line: _Line) -> _Line:
        """The line with every name once: of a repeated one the last value counts."""
        return line._replace(text=msgspec.json.encode(fitted(self._columns, members_of(line.text), self._unit)))

    def _refuse(self, line: _Line, error: pa.ArrowInvalid) -> None:
        reason = f"the decoder refuses it: {error}"
        try:
            fitted(self._columns, members_of(line.text), self._unit)
        except Rejected as rejected:
            reason = rejected.reason
        self._reject(reason, line.original, line.received_at)


def _repeats_keys(array: pa.Array) -> bool:
    """Whether a map in it, at any depth, has a key twice, which readers of Parquet take for damage."""
    kind = array.type
    if pa.types.is_map(kind):
        keys = pl.Series(pl.from_arrow(pa.ListArray.from_arrays(array.offsets, array.keys)))
        return bool((keys.list.n_unique() != keys.list.len()).any()) or _repeats_keys(array.items)
    if pa.types.is_list(kind):
        return _repeats_keys(array.flatten())
    if pa.types.is_struct(kind):
        return any(_repeats_keys(child) for child in array.flatten())
    return False
