"""Inputs become blocks of complete lines, one record a line, in bounded memory and whatever their size.

`Content` reads an input decompressed; `blocks` tells its form by looking and cuts it:

    lines      NDJSON, passed on byte for byte
    an array   `[…]` or `{"logs": […]}`: one line an element
    objects    one after the other, each over several lines, as `jq` prints them

`ranges` cuts in the same places, and reads hardly anything of lines. Where a block ends depends on the content alone, so the
same content gives the same blocks from whatever it is read. In an array, a bad element spoils no other as long as its quotes
and brackets come in pairs. Where a document breaks off, what came before is passed on, and the rest becomes one `Break`.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, TypeVar

import msgspec
import xxhash
import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

Readable = io.RawIOBase | io.BufferedIOBase
_T = TypeVar("_T")

# Bytes in which the form of the content shows.
_SNIFFED = 64 << 10
# Bytes of a document looked at together.
_WINDOW = 1 << 20
# Bytes gunzipped or passed over at once.
_PIECE = 256 << 10
# Bytes of a range's end that are read, to find its last newline and to know it again.
_ENDING = 64 << 10
# Bytes of zstd decompressed at once: nothing bounds the result but that a byte makes at most 32 KiB.
_ZSTD_PIECE = 1 << 10
# Bytes kept of what is too long for a record.
_KEPT = 64 << 10

_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60)))
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a ZIP archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_LONGEST_MAGIC = 6


class ForeignError(Exception):
    """The input is something else than JSON text, as its first bytes tell."""


@dataclass(frozen=True, slots=True)
class Break:
    """Content that is no line: its beginning, where that lies in the content, and what is wrong with it."""

    offset: int
    reason: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Complete lines, the last of them perhaps without newline, and what came after them and is no line.

    The text lies at `offset` of the content, byte for byte, or nowhere: newlines within elements became `\\r`, which is
    the same to JSON where a newline is allowed, and an error where a newline is one.
    """

    text: bytes | memoryview
    offset: int | None = None
    breaks: tuple[Break, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the text."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class Range:
    """A block of lines that was passed over, perhaps blank ones: its text is the `size` bytes of the content at `offset`.

    `ending` is the hash of its last bytes, by which the text is known again.
    """

    offset: int
    size: int
    ending: int
    breaks: ClassVar[tuple[Break, ...]] = ()


def ending(text: bytes) -> int:
    """A hash of the end of a text."""
    return xxhash.xxh3_64_intdigest(text[-_ENDING:])


class Content:
    """What a file, a pipe or standard input holds; decompressed if its first bytes say so, whatever its name says.

    `damage` tells, after everything that can be read was read, why that is not everything. ForeignError for what cannot
    be JSON text.
    """

    def __init__(self, file: Readable) -> None:
        magic = b""
        # A pipe may give less than it is asked for.
        while len(magic) < _LONGEST_MAGIC and (more := file.read(_LONGEST_MAGIC - len(magic))):
            magic += more
        for beginning, what in _FOREIGN.items():
            if magic.startswith(beginning):
                raise ForeignError(f"it is {what}; only UTF-8 JSON is read, plain or compressed with gzip or zstd")
        self.compressed = magic.startswith((_GZIP, *ZSTD_MAGICS))
        self.offset = 0
        self.damage: str | None = None
        self._rest = b""
        self._file = file
        self._seekable = file.seekable() and not self.compressed
        self._raw = _Replay(magic, file)
        self._first = 0
        if self._seekable:
            self._first = file.seek(-len(magic), io.SEEK_CUR)
            self._take: Callable[[int], bytes] = lambda size: file.read(size) or b""
        elif self.compressed:
            self._take = _gunzip(self._raw) if magic.startswith(_GZIP) else _unzstd(self._raw)
        else:
            self._take = io.BufferedReader(self._raw).read

    @property
    def taken(self) -> int:
        """Bytes taken from the input so far, compressed ones if it is compressed."""
        return self._raw.taken if self.compressed else self.offset

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        pieces, length = [self._rest], len(self._rest)
        while length < size and (piece := self._piece(size - length)):
            pieces.append(piece)
            length += len(piece)
        data = b"".join(pieces) if pieces[0] or len(pieces) > 2 else pieces[-1]
        data, self._rest = (data[:size], data[size:]) if length > size else (data, b"")
        self.offset += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Take back what was read last, to read it again."""
        self.offset -= len(data)
        if self._seekable and not self._rest:
            self._file.seek(-len(data), io.SEEK_CUR)
        else:
            self._rest = data + self._rest

    def seek(self, offset: int) -> int:
        """Go on at `offset`, or at the end if that comes before; returns where. Of a plain file, with nothing unread."""
        self.offset = min(offset, self._file.seek(0, io.SEEK_END) - self._first)
        self._file.seek(self._first + self.offset)
        return self.offset

    def _piece(self, size: int) -> bytes:
        if self.damage:
            return b""
        try:
            return self._take(size)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            self.damage = f"it cannot be read to its end: {error}"
            return b""


def blocks(content: Content, size: int, longest: int, window: int = _WINDOW) -> Iterator[Block]:
    """Cut `content` into blocks of about `size` bytes; only a single line that is longer makes a block longer.

    What has more than `longest` bytes is no record. Of a document, `window` bytes are looked at together, more only for a
    longer element. Memory: a few times the largest of the three.
    """
    return _cut(content, size, longest, window, lambda text: _lines(text, size, longest))


def ranges(content: Content, size: int, longest: int, piece: int = _ENDING) -> Iterator[Block | Range]:
    """The same blocks, of a plain file. Those of lines come without text: of that only the end is read, `piece` bytes at a
    time."""
    return _cut(content, size, longest, _WINDOW, lambda text: _line_ranges(text, size, longest, piece))


def _cut(
    content: Content, size: int, longest: int, window: int, lines: Callable[["_Text"], Iterator[_T]]
) -> Iterator[Block | _T]:
    text = _Text(content)
    while text.fill(_SNIFFED):
        yield from _gathered(_documents(text, longest, window), size) if _opening(text) else lines(text)


class _Text:
    """The part of the content that is looked at: `data` from `at` on."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.data = b""
        self.at = 0

    @property
    def offset(self) -> int:
        """Where `at` lies in the content."""
        return self.content.offset - self.available

    @property
    def available(self) -> int:
        return len(self.data) - self.at

    def fill(self, size: int) -> int:
        """Have `size` bytes at least, unless the content ends before; returns how many there are."""
        if (missing := size - self.available) > 0:
            more = self.content.read(missing)
            self.data = self.data[self.at :] + more if self.available else more
            self.at = 0
        return self.available

    def take(self, end: int) -> bytes:
        """What lies before the position `end` of `data`, to go on there."""
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def put_back(self) -> None:
        """Give what is left back to the content, so that it need not be copied to get more of it."""
        self.content.unread(self.data[self.at :])
        self.data, self.at = b"", 0

    def drain(self) -> int:
        """Read all that is left of the content; returns its length."""
        length = self.available
        while more := self.content.read(_PIECE):
            length += len(more)
        self.data, self.at = b"", 0
        return length


def _lines(text: _Text, size: int, longest: int) -> Iterator[Block]:
    text.put_back()
    while available := text.fill(size):
        offset = text.offset
        end = text.data.rfind(b"\n") + 1 if available == size else available
        while not end and (searched := text.available) <= longest:
            grown = text.fill(searched + size)
            end = text.data.find(b"\n", searched) + 1 if grown > searched else searched
        if end:
            lines = memoryview(text.data)[:end]
            text.at = end
            text.put_back()
            if not _is_blank(lines):
                yield Block(lines, offset)
        else:
            broken = _overlong_line(text, longest)
            text.put_back()
            yield Block(b"", breaks=(broken,))


def _line_ranges(text: _Text, size: int, longest: int, piece: int) -> Iterator[Block | Range]:
    content = text.content
    text.put_back()
    is_end = False
    while not (is_end or content.damage):
        start = content.offset
        end = content.seek(start + size)
        is_end = end < start + size
        if not is_end:
            end = _end_of_lines(content, start, end, piece)
        if end > start:
            content.seek(max(start, end - _ENDING))
            yield Range(start, end - start, ending(content.read(end - content.offset)))
        elif not is_end:  # a line that is longer than a block
            yield from islice(_lines(text, size, longest), 1)


def _end_of_lines(content: Content, start: int, end: int, piece: int) -> int:
    """Where the last line ends that ends between `start` and `end`; `start` if there is none."""
    while end > start:
        content.seek(max(start, end - piece))
        first = content.offset
        if length := content.read(end - first).rfind(b"\n") + 1:
            end = first + length
            break
        end = first
    content.seek(end)
    return end


def _is_blank(lines: memoryview) -> bool:
    return bytes(lines[:_PIECE]).isspace() and bytes(lines).isspace()


def _overlong_line(text: _Text, longest: int) -> Break:
    text.fill(_KEPT)
    offset = text.offset
    kept = text.data[text.at : text.at + _KEPT].partition(b"\n")[0]
    while (end := text.data.find(b"\n", text.at)) < 0:
        text.at = len(text.data)
        if not text.fill(_PIECE):
            end = text.at
            break
    text.at = end
    reason = too_long(text.offset - offset, longest)
    text.at = min(end + 1, len(text.data))
    return Break(offset, f"{reason}; its first {_KEPT} bytes are kept" if len(kept) == _KEPT else reason, kept)


def too_long(length: int, longest: int) -> str:
    """Why a record is rejected that is longer than any may be."""
    return f"the record has {length} bytes, more than max_record_bytes ({longest})"


# --- documents

_OPENING = re.compile(
    rb"""(?:\xef\xbb\xbf)?[ \t\r\n]*(?:
        (?P<array>\[)
        |(?P<logs>\{[ \t\r\n]*"logs"[ \t\r\n]*:[ \t\r\n]*\[)
        |(?P<objects>(?=\{[ \t\r]*\n))
    )""",
    re.VERBOSE,
)
# Everything up to the next bracket, or outside of brackets up to the next comma too. Strings are passed over whole.
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_TO_DELIMITER = re.compile(rb'(?:[^"{}\[\],]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
# A comma that, likely, stands between two elements.
_LIKELY_DELIMITER = re.compile(rb"\}[ \t\r\n]*(,)(?=[ \t\r\n]*\{)")
# How far from the end of a window, and how many of them, are tried.
_TAIL = 128 << 10
_TRIES = 3

_array = msgspec.json.Decoder(list[msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _opening(text: _Text) -> re.Match[bytes] | None:
    """How the document begins, if it is one."""
    opening = _OPENING.match(text.data, text.at)
    if opening and opening["logs"]:
        end = text.data.find(b"\n", opening.end())
        try:
            line = _object.decode(text.data[text.at : end if end >= 0 else len(text.data)].removeprefix(_BOM))
        except _UNDECODABLE:
            return opening
        if len(line) > 1:
            return None  # a record that has a field "logs"
    return opening


def _documents(text: _Text, longest: int, window: int) -> Iterator[bytes | Break]:
    """One document after the other, as long as there are some."""
    while text.fill(_SNIFFED) and (opening := _opening(text)):
        text.at = opening.end()
        if window < text.available:
            text.put_back()
        yield from _document(text, opening, longest, window)


def _document(text: _Text, opening: re.Match[bytes], longest: int, window: int) -> Iterator[bytes | Break]:
    """The elements as lines, many together, and what is no element. Afterwards the document is behind `text.at`."""
    is_array = opening["objects"] is None
    while True:
        text.fill(window)
        if is_array and (lines := _many(text)):
            yield lines
            continue
        lines, closed = _some(text, is_array)
        if lines:
            yield lines
        if closed:
            break
        if not lines and not _grow(text, longest):
            if is_array or text.data[text.at :].strip(_BLANK):
                yield from _broken_off(text, "the array" if is_array else "the object")
            text.at = len(text.data)
            return
    if opening["logs"]:
        yield from _after_logs(text, longest)


def _many(text: _Text) -> bytes | None:
    """Nearly all elements of the window, found by a decoder: had it begun or ended amid one, it would refuse them."""
    start = max(text.at, len(text.data) - _TAIL)
    delimiters = [found.start(1) for found in _LIKELY_DELIMITER.finditer(text.data, start)]
    for delimiter in reversed(delimiters[-_TRIES:]):
        try:
            elements = _array.decode(b"[%b]" % text.data[text.at : delimiter].replace(b"\n", b"\r"))
        except _UNDECODABLE:
            continue
        text.at = delimiter + 1
        return b"\n".join((*elements, b""))
    return None


def _some(text: _Text, is_array: bool) -> tuple[bytes, bool]:
    """The complete elements of the window, found bracket by bracket, and whether the array ended."""
    lines: list[bytes] = []
    closed = False
    while not closed and (end := _end(text.data, text.at, is_array)) is not None:
        if element := text.take(end).strip(_BLANK):
            lines.append(element.replace(b"\n", b"\r"))
        if is_array:
            closed = text.data[end] == _CLOSING
            text.at += 1
    return b"\n".join((*lines, b"")) if lines else b"", closed


_CLOSING = ord("]")


def _end(data: bytes, at: int, is_array: bool, depth: int = 0) -> int | None:
    """Where the element at `at` ends: at the comma or bracket after it, or without an array after its own bracket.

    None if the data ends before. Brackets are counted, not matched: what is no JSON is found out when it is decoded.
    """
    while (at := _passed(_TO_DELIMITER if is_array and not depth else _TO_BRACKET, data, at)) < len(data):
        match data[at : at + 1]:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]" if depth:
                depth -= 1
                if not depth and not is_array:
                    return at + 1
            case b"," | b"]" if is_array:
                return at
            case b'"':
                return None
        at += 1
    return None


def _passed(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    found = pattern.match(data, at)
    return found.end() if found else at


_MORE = 1 << 10


def _grow(text: _Text, longest: int) -> bool:
    """Have more of an element that is longer than all there is; False if there is no more, or it is no record any more."""
    available = text.available
    return available <= longest and text.fill(2 * available + _MORE) > available


def _after_logs(text: _Text, longest: int) -> Iterator[Break]:
    """Pass what follows the array in `{"logs": […]}`."""
    while (end := _end(text.data, text.at, is_array=False, depth=1)) is None:
        if not _grow(text, longest):
            yield from _broken_off(text, 'the object around "logs"')
            return
    offset = text.offset
    if beside := text.take(end)[:-1].strip(_BLANK):
        yield Break(
            offset, f'after "logs" the document has other members, at byte {offset}: they are no records', beside
        )


def _broken_off(text: _Text, what: str) -> Iterator[Break]:
    rest = text.data[text.at :].lstrip(_BLANK)
    offset = text.content.offset - len(rest)
    raw = rest.rstrip(_BLANK)
    text.at = len(text.data) - len(rest)
    length = text.drain()
    reason = f"{what} breaks off at byte {offset}"
    text.content.damage = text.content.damage or reason
    if raw and length == len(rest):
        yield Break(offset, f"{reason}; this is the rest", raw)
    elif raw:
        raw = raw[:_KEPT]
        yield Break(offset, f"{reason}; the first {len(raw)} bytes of the {length} bytes that follow are kept", raw)


def _gathered(pieces: Iterator[bytes | Break], size: int) -> Iterator[Block]:
    """Pieces of lines together as blocks; what is no line ends one."""
    held: list[bytes] = []
    length = 0
    for piece in pieces:
        if isinstance(piece, Break):
            yield Block(b"".join(held), breaks=(piece,))
            held, length = [], 0
            continue
        if held and length + len(piece) > size:
            yield Block(b"".join(held))
            held, length = [], 0
        held.append(piece)
        length += len(piece)
    if held:
        yield Block(b"".join(held))


# --- reading


class _Replay(io.RawIOBase):
    """A file whose first bytes were read already, and the number of bytes taken from it."""

    def __init__(self, head: bytes, file: "Readable") -> None:
        self._head = head
        self._file = file
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        view = memoryview(buffer).cast("B")
        if self._head:
            data, self._head = self._head[: len(view)], self._head[len(view) :]
            view[: len(data)] = data
            length = len(data)
        else:
            length = self._file.readinto(view) or 0
        self.taken += length
        return length


def _gunzip(raw: _Replay) -> Callable[[int], bytes]:
    # read1: what was decompressed before an error is not lost with it.
    file = gzip.GzipFile(fileobj=io.BufferedReader(raw))
    return lambda size: file.read1(min(size, _PIECE))


def _unzstd(raw: _Replay) -> Callable[[int], bytes]:
    pieces = _unzstd_pieces(raw)
    return lambda size: next(pieces, b"")


def _unzstd_pieces(raw: _Replay) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    file = io.BufferedReader(raw)
    while piece := file.read(_ZSTD_PIECE):
        while piece:
            frame = frame or decompressor.decompressobj()
            data = frame.decompress(piece)
            # However much it is, it is taken little by little.
            yield from (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
            if not frame.eof:
                break
            piece, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle of a zstd frame")
