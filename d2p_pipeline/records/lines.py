# pyright: standard
"""The lines of a text, and what single bytes tell of them, found for all lines at once and without cutting the text.

The bulk decoder reads objects, not lines: it passes over newlines, wherever they stand. `Lines.odd` are the lines it must not
see. Of the others, each begins with a brace and ends with one, and none holds two objects. So a text of them that
decodes into as many rows as it has lines has one row per line, whatever is in these lines.
pyarrow has no type information, hence `standard` above.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property

import polars as pl
import pyarrow as pa

_NEWLINE, _SPACE, _BACKSLASH, _OPEN, _CLOSE, _U = b"\n \\{}u"
_FIRST_PRINTABLE = _SPACE
_ESCAPED_NUL = re.compile(rb"\\u0000")


class Lines:
    """The lines of `text`, each ended by a newline, by number."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._buffer = pa.py_buffer(text)
        self._bytes = _series(pa.Array.from_buffers(pa.uint8(), len(text), [None, self._buffer]))
        self._ends = _places(self._bytes == _NEWLINE)
        self._starts = pl.concat([pl.Series([0], dtype=pl.Int64), self._ends.head(-1) + 1])
        self.lengths = self._ends - self._starts

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        """A line without its newline."""
        start, end = self._bounds
        return self.text[start[number] : end[number]]

    def text_of(self, first: int, stop: int) -> tuple[bytes | pa.Buffer, int]:
        """The lines from `first` to `stop` but the odd ones, as one text, and how many they are; no copy if none is odd."""
        start, end = self._bounds
        odd = self.odd[bisect_left(self.odd, first) : bisect_left(self.odd, stop)]
        if not odd:
            return self._buffer.slice(start[first], end[stop - 1] + 1 - start[first]), stop - first
        pieces: list[bytes] = []
        at = start[first]
        for number in odd:
            pieces.append(self.text[at : start[number]])
            at = end[number] + 1
        pieces.append(self.text[at : end[stop - 1] + 1])
        return b"".join(pieces), stop - first - len(odd)

    @cached_property
    def odd(self) -> list[int]:
        """Lines that are no object, for what their bytes tell, and those that nobody but their reader can tell about: with
        control characters, an escaped NUL, or what may be two objects."""
        # Before an empty first line the text's last byte is looked at, a newline.
        looks = (self._bytes.gather(self._starts) != _OPEN) | (self._bytes.gather(self._ends - 1) != _CLOSE)
        odd = set(looks.arg_true())
        if (self._bytes < _FIRST_PRINTABLE).sum() != len(self):
            controls = (self._bytes < _FIRST_PRINTABLE) & (self._bytes != _NEWLINE)
            odd.update(self._numbers_at(controls.arg_true()))
        odd.update(self._numbers_at(self._second_objects()))
        if self.has_unicode_escapes:
            odd.update(self._numbers_at(found.start() for found in _ESCAPED_NUL.finditer(self.text)))
        return sorted(odd)

    @cached_property
    def has_unicode_escapes(self) -> bool:
        """Whether there may be any; the text ends with a newline, so something follows each backslash."""
        return bool(len(self._backslashes)) and bool((self._bytes.gather(self._backslashes + 1) == _U).any())

    @cached_property
    def escapes(self) -> pl.Series:
        """How many two-character escapes each line has; `\\u` counts as one of these."""
        count = self._backslashes.search_sorted(self._ends).cast(pl.Int64)
        escapes = count.diff().fill_null(count.head(1))
        adjacent = (self._backslashes.diff() == 1).arg_true()
        for number in set(self._numbers_at(self._backslashes.gather(adjacent))):
            line = self[number]
            escapes[number] = line.count(b"\\") - line.count(b"\\\\")
        return escapes

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        return self._starts.to_list(), self._ends.to_list()

    @cached_property
    def _backslashes(self) -> pl.Series:
        if b"\\" not in self.text:
            return pl.Series([], dtype=pl.Int64)
        return _places(self._bytes == _BACKSLASH)

    def _second_objects(self) -> Iterable[int]:
        """Where an object may begin that another one precedes within a line: after a brace, or after a brace and spaces."""
        braces = _places(self._bytes == _OPEN)
        # Before the text's first byte its last one is looked at, a newline.
        before = self._bytes.gather(braces - 1)
        earlier = self._bytes.gather(braces - 2)
        return braces.filter((before == _CLOSE) | ((before == _SPACE) & ((earlier == _CLOSE) | (earlier == _SPACE))))

    def _numbers_at(self, places: Iterable[int]) -> list[int]:
        ends = self._bounds[1]
        return [bisect_left(ends, place) for place in places]


def _places(mask: pl.Series) -> pl.Series:
    """Where a mask is true, ascending. For masks that are nearly always false, a third of the time that `arg_true` takes:
    they are looked through 64 answers at once."""
    bits = mask.to_arrow().buffers()[1]
    count = len(mask) // _WORD
    words = _series(pa.Array.from_buffers(pa.uint64(), count, [None, bits]))
    numbers = (words != 0).arg_true()
    left = words.gather(numbers)
    found = [(mask.tail(len(mask) % _WORD).arg_true() + count * _WORD).cast(pl.Int64)]
    while len(numbers):
        found.insert(-1, numbers.cast(pl.Int64) * _WORD + left.bitwise_trailing_zeros().cast(pl.Int64))
        left &= left - 1
        more = left != 0
        numbers, left = numbers.filter(more), left.filter(more)
    return pl.concat(found) if len(found) <= _ONE_PASS else pl.concat(found).sort()


_WORD = 64
# The first of a word each, and the last bits.
_ONE_PASS = 2


def _series(array: pa.Array) -> pl.Series:
    return pl.Series(pl.from_arrow(array))
