# pyright: standard
"""Chunks become typed rows: most lines in bulk, the few that need it one by one.

Every line that is not blank is a row or a dead letter, and the rows keep the order of the lines. Two steps:

1. Canonical text. Our own chunks claim to be canonical; large plain text is decoded first, and what its bytes do not prove
   canonical goes line by line through the normalizer (bulk.py); small or odd text is checked, then decoded.
2. Decoding by arrow-rs's JSON reader, whose flaws shape this module: it ignores unknown fields and reads some things
   that are no valid record (hence step 1), fails a whole block for one bad line (hence `_recover`), keeps both of two
   equal map keys (hence `_repeated_map_keys`), and takes the process down when the text it quotes in an error contains
   NUL (hence `_is_dangerous`).

pyarrow has no type information, hence `standard` above.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import arro3.core
import pyarrow as pa

from d2p_pipeline.records import bulk
from d2p_pipeline.records import chunk as chunk_format
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected
from d2p_pipeline.records.fields import TimestampUnit, arrow_schema
from d2p_pipeline.records.lines import Lines
from d2p_pipeline.records.normalize import BYTE_ORDER_MARK, WHITESPACE, Normalizer
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.shape import Shapes, joined, shape_of, shared_by

# Text decoded at once: enough that the cost per call does not show, little enough to repeat for one bad line.
_BLOCK = 4 << 20
# Plain text decoded before it is checked: enough that the accounting's cost per call does not show.
_BULK = 32 << 20
_WORTH = 64 << 10
# One in so many lines left open is no reason to look for another shape, nor to copy all others.
_FEW = 20
# Text checked at once: the checked objects of a block still fit into the processor's cache.
_CHECKED = 64 << 10
# A pattern is found in half the time that `in` takes.
_ESCAPED_NUL = re.compile(rb"\\u0000")


@dataclass(frozen=True)
class Parsed:
    """What some chunks hold: `lines` is the number of their lines that are not blank, each a row or a reject.

    `table` has the schema of `fields.arrow_schema`, or the columns of dynamic records. A chunk that cannot be read counts
    as one line.
    """

    table: pa.Table
    rejects: list[DeadLetter]
    lines: int
    _sources: "list[_Source]" = field(repr=False)

    def raw(self, row: int) -> bytes:
        """The line that `row` was made of, as received."""
        source = self._sources[bisect_right(self._sources, row, key=lambda source: source.first_row) - 1]
        return source.lines[row - source.first_row]


def parse(
    chunks: Sequence[bytes],
    rules: Rules,
    received_at: int,
    batch: str | None = None,
    chunk_limit: int = chunk_format.DEFAULT_LIMIT,
    shapes: Shapes | None = None,
) -> Parsed:
    """Decode chunks. `received_at` (ms since the epoch) and `batch` are for the dead letters; our own chunks carry their
    time of reception with them. `shapes` is what earlier calls found out about the producers: it makes this one faster
    and changes no result. Memory: the decompressed text and the table."""
    if rules.record_type == "dynamic":
        from d2p_pipeline.records.dynamic.parse import parse_dynamic

        rows = parse_dynamic(chunks, rules, received_at, batch, chunk_limit)
        return Parsed(rows.table, rows.rejects, rows.lines, [_Source(0, b"", rows.originals)])
    parser = _Parser(rules, received_at, batch, shapes or Shapes())
    for chunk in chunks:
        parser.add(chunk, chunk_limit)
    parser.finish()
    schema = arrow_schema(rules.timestamp_unit, rules.column_names)
    if parser.tables:
        table = pa.Table.from_arrays(pa.concat_tables(parser.tables).columns, schema=schema)
    else:
        table = schema.empty_table()
    return Parsed(table, parser.rejects, parser.lines, parser.sources)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Canonical NDJSON, one row per line. `originals` are the lines as received where they differ; `checked` tells that
    the lines passed the normalizer in this process."""

    text: bytes
    rows: int
    received_at: int
    checked: bool
    originals: list[bytes] | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    """One canonical line and how it was received."""

    text: bytes
    original: bytes
    received_at: int


class _Source:
    """The lines of consecutive rows. They are split only when one is asked for; `kept` are the numbers of those that are
    rows, None if all are."""

    def __init__(
        self, first_row: int, text: bytes, originals: list[bytes] | None = None, kept: Sequence[int] | None = None
    ) -> None:
        self.first_row = first_row
        self._text = text
        self._originals = originals
        self._kept = kept

    @cached_property
    def lines(self) -> list[bytes]:
        lines = self._text.split(b"\n") if self._originals is None else self._originals
        return lines if self._kept is None else [lines[number] for number in self._kept]


class _Parser:
    """Collects pieces into blocks and decodes block by block."""

    def __init__(self, rules: Rules, received_at: int, batch: str | None, shapes: Shapes) -> None:
        self.tables: list[pa.Table] = []
        self.rejects: list[DeadLetter] = []
        self.sources: list[_Source] = []
        self.lines = 0
        self._rules = rules
        self._normalizer = Normalizer(rules)
        self._decode = _decoder(rules.timestamp_unit)
        self._shapes = shapes
        self._unit: TimestampUnit = rules.timestamp_unit
        # A hidden field or a capability to fill in is nothing that the number of bytes tells.
        self._in_bulk = not (rules.ignored_fields or rules.masked_fields or rules.default_capability or rules.hmac_key)
        self._received_at = received_at
        self._batch = batch
        self._rows = 0
        self._unchecked: list[bytes] = []
        self._unchecked_size = 0
        self._block: list[_Piece] = []
        self._block_size = 0

    def add(self, chunk: bytes, limit: int) -> None:
        try:
            content = chunk_format.decode(chunk, limit)
        except chunk_format.ChunkError as error:
            self._check()
            self.lines += 1
            self._reject(str(error), chunk, self._received_at)
            return
        received_at = self._received_at if content.received_at is None else content.received_at
        if content.records and content.body.count(b"\n") == content.records:
            self._check()
            self.lines += content.records
            self._push(_Piece(content.body, content.records, received_at, checked=False))
        elif content.canonical:
            self._check()
            self._check_text(content.body, received_at)
        elif text := content.body.removeprefix(BYTE_ORDER_MARK):
            # Other producers often push one line per chunk: these are checked together.
            self._unchecked.append(text if text.endswith(b"\n") else text + b"\n")
            self._unchecked_size += len(text)
            if self._unchecked_size >= (_BULK if self._in_bulk else _CHECKED):
                self._check()

    def finish(self) -> None:
        self._check()
        self._flush()

    def _check(self) -> None:
        if self._unchecked:
            text, self._unchecked, self._unchecked_size = b"".join(self._unchecked), [], 0
            self._check_text(text, self._received_at)

    def _check_text(self, text: bytes, received_at: int) -> None:
        for block in _blocks(text, _BULK):
            if self._in_bulk and len(block) >= _WORTH and self._decoded(block, received_at):
                continue
            for part in _blocks(block, _CHECKED):
                self._push(self._checked(part, received_at))

    def _decoded(self, text: bytes, received_at: int) -> bool:
        """Decode a block before it is checked; False when that cannot be done."""
        lines = Lines(text)
        # No NDJSON: what is told of every line would take more memory than it is worth.
        if len(lines.odd) * 2 > len(lines):
            return False
        decoded = self._in_shape(lines)
        mended, refused, blank = self._mended(lines, decoded)
        merged = self._merged(decoded, mended, {*refused, *blank})
        if merged is None:
            return False
        self._flush()
        self.lines += len(lines) - len(blank)
        for number, reason in refused.items():
            self._reject(reason, lines[number], received_at)
        if merged.num_rows:
            gone = {*refused, *blank}
            kept = [number for number in range(len(lines)) if number not in gone] if gone else None
            self._source(merged.num_rows, _Source(self._rows, text, kept=kept))
            self.tables.append(merged)
        return True

    def _in_shape(self, lines: Lines) -> bulk.Decoded:
        """Decode lines in the shape that served before, or that some share; where that leaves too much open, also in that of a
        line left open."""
        known = self._shapes.last
        if known is None:
            known = self._shapes.last = shared_by([lines[number] for number in (0, len(lines) // 2, len(lines) - 1)])
        decoded = bulk.decode(lines, self._unit, known)
        odd = len(lines.odd)
        if (decoded.open - odd) * _FEW <= len(lines):
            return decoded
        rows = (decoded.numbers[row] for row in decoded.doubtful)
        sample = lines[min(chain(rows, decoded.left.difference(lines.odd)))]
        shape = shape_of(sample)
        if shape is None or (shape := joined(known, shape)) == known:
            return decoded
        better = bulk.decode(lines, self._unit, shape)
        if decoded.open < better.open:
            return decoded
        self._shapes.last = shape
        return better

    def _mended(self, lines: Lines, decoded: bulk.Decoded) -> tuple[dict[int, bytes], dict[int, str], list[int]]:
        """Lines whose canonical line is not the one decoded, with that line; those that are none, with the reason; and
        blank ones."""
        mended: dict[int, bytes] = {}
        refused: dict[int, str] = {}
        blank: list[int] = []
        unread = decoded.left | {decoded.numbers[row] for row in decoded.untimed}
        repeated = {decoded.numbers[row] for row in bulk.repeated_map_keys(decoded.table)}
        for number in sorted(unread | repeated | {decoded.numbers[row] for row in decoded.doubtful}):
            line = lines[number]
            again = self._normalizer.rewritten_line if number in repeated else self._canonical
            try:
                canonical = again(line)
            except Rejected as error:
                if line.removeprefix(BYTE_ORDER_MARK).strip(WHITESPACE):
                    refused[number] = error.reason
                else:
                    blank.append(number)
            else:
                # A number that is text to this line may have been read as a number, as the shape said.
                if number in unread or self._shapes.last or canonical != line.strip(WHITESPACE):
                    mended[number] = canonical
        return mended, refused, blank

    def _canonical(self, line: bytes) -> bytes:
        return self._normalizer.canonical(line).line

    def _merged(self, decoded: bulk.Decoded, mended: dict[int, bytes], gone: set[int]) -> pa.Table | None:
        """The rows with those of mended lines in place of theirs, without those that are gone; None if that fails."""
        table, numbers = decoded.table, decoded.numbers
        if not mended and not gone:
            return table
        if mended:
            try:
                fresh = self._decode(b"\n".join((*mended.values(), b"")))
            except pa.ArrowInvalid:
                return None
            if fresh.num_rows != len(mended) or bulk.repeated_map_keys(fresh):
                return None
            if not table.num_rows:
                return fresh
            table = pa.concat_tables([table, fresh])
        return _rows_of(table, list(_runs(numbers, list(mended), gone)))

    def _flush(self) -> None:
        if self._block:
            block, self._block, self._block_size = self._block, [], 0
            self._decode_block(block)

    def _push(self, piece: _Piece) -> None:
        if not piece.rows:
            return
        self._block.append(piece)
        self._block_size += len(piece.text)
        if self._block_size >= _BLOCK:
            self._flush()

    def _checked(self, text: bytes, received_at: int) -> _Piece:
        rows = self._normalizer.count_canonical(text)
        if rows is not None:
            self.lines += rows
            return _Piece(text, rows, received_at, checked=True)
        lines: list[bytes] = []
        originals: list[bytes] = []
        for line in text.split(b"\n"):
            if not line.removeprefix(BYTE_ORDER_MARK).strip(WHITESPACE):
                continue
            self.lines += 1
            try:
                lines.append(self._normalizer.canonical(line).line)
            except Rejected as error:
                self._reject(error.reason, line, received_at)
            else:
                originals.append(line)
        return _Piece(b"\n".join((*lines, b"")), len(lines), received_at, checked=True, originals=originals)

    def _decode_block(self, block: list[_Piece]) -> None:
        text = b"".join(piece.text for piece in block)
        if _is_dangerous(text) and not all(piece.checked for piece in block):
            self._recover(block)
            return
        try:
            table = self._decode(text)
        except pa.ArrowInvalid:
            self._recover(block)
            return
        if table.num_rows != sum(piece.rows for piece in block) or bulk.repeated_map_keys(table):
            self._recover(block)
            return
        if self._rules.hmac_key is not None and table.column("hmac").null_count < table.num_rows:
            # Received before the column was computed here: the normalizer finds another place for it.
            self._recover(block)
            return
        for piece in block:
            self._source(piece.rows, _Source(self._rows, piece.text, piece.originals))
        self.tables.append(table)

    def _recover(self, block: list[_Piece]) -> None:
        """Decode a block that has bad lines: reject or mend these, keep all others, in order."""
        lines: list[_Line] = []
        for piece in block:
            texts = piece.text.split(b"\n")[:-1]
            for text, original in zip(texts, piece.originals or texts, strict=True):
                line = _Line(text, original, piece.received_at)
                lines.extend(
                    [line] if piece.checked else self._anew(line, lambda raw: self._normalizer.canonical(raw).line)
                )
        self._bisect(lines)

    def _bisect(self, lines: list[_Line]) -> None:
        if not lines:
            return
        text = b"".join(line.text + b"\n" for line in lines)
        try:
            table = self._decode(text)
        except pa.ArrowInvalid as error:
            if len(lines) == 1:
                self._reject(f"the decoder refuses it: {error}", lines[0].original, lines[0].received_at)
                return
            middle = len(lines) // 2
            self._bisect(lines[:middle])
            self._bisect(lines[middle:])
            return
        if repeated := bulk.repeated_map_keys(table):
            mended: list[_Line] = []
            for row, line in enumerate(lines):
                mended.extend(self._anew(line, self._normalizer.rewritten_line) if row in repeated else [line])
            self._bisect(mended)
            return
        self._source(len(lines), _Source(self._rows, text, [line.original for line in lines]))
        self.tables.append(table)

    def _anew(self, line: _Line, normalize: Callable[[bytes], bytes]) -> list[_Line]:
        """The line normalized once more, or nothing if it is rejected."""
        try:
            return [replace(line, text=normalize(line.text))]
        except Rejected as error:
            self._reject(error.reason, line.original, line.received_at)
            return []

    def _source(self, rows: int, source: _Source) -> None:
        self.sources.append(source)
        self._rows += rows

    def _reject(self, reason: str, raw: bytes, received_at: int) -> None:
        raw = conceal(raw, self._rules)
        letter = DeadLetter(reason=reason, stage="parse", received_at=received_at, raw=raw, batch=self._batch)
        self.rejects.append(letter)


def _blocks(body: bytes, size: int) -> Iterator[bytes]:
    """`body` cut after newlines, every `size` bytes or so; the last line gets its newline if it has none."""
    if len(body) <= size and body.endswith(b"\n"):
        yield body
        return
    start = 0
    while start < len(body):
        end = body.find(b"\n", min(start + size, len(body) - 1)) + 1
        yield body[start:end] if end else body[start:] + b"\n"
        start = end or len(body)


def _decoder(unit: TimestampUnit) -> Callable[[bytes], pa.Table]:
    schema = arro3.core.Schema.from_arrow(arrow_schema(unit))

    def decode(text: bytes) -> pa.Table:
        return bulk.table_of(bulk.without_pairs(text), schema)

    return decode


def _is_dangerous(text: bytes) -> bool:
    return b"\0" in text or (b"\\" in text and _ESCAPED_NUL.search(text) is not None)


def _runs(numbers: Sequence[int], mended: Sequence[int], gone: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where the rows that stay lie, in the order of their lines: as (start, length) in a table of the decoded rows, which
    have these line numbers, and of the `mended` ones behind them."""
    at = 0
    fresh = len(numbers)
    is_mended = set(mended)
    for number in sorted({*mended, *gone}):
        row = bisect_left(numbers, number)
        if row > at:
            yield at, row - at
        at = row + 1 if row < len(numbers) and numbers[row] == number else row
        if number in is_mended:
            yield fresh, 1
            fresh += 1
    if at < len(numbers):
        yield at, len(numbers) - at


def _rows_of(table: pa.Table, runs: list[tuple[int, int]]) -> pa.Table:
    """The rows of these runs, in one piece: each piece would cost something in every later step."""
    if len(runs) * _FEW > table.num_rows:
        return table.take(pa.array(chain.from_iterable(range(at, at + length) for at, length in runs), pa.int64()))
    pieces = [table.slice(at, length) for at, length in runs]
    return pa.concat_tables(pieces).combine_chunks() if runs else table.slice(0, 0)
