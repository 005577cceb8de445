"""Request bodies into raw records: NDJSON, a JSON array, `{"logs": [...]}`, one object, or MessagePack; told apart by looking.

Many clients call NDJSON `application/json`, so the body decides, not its Content-Type; only MessagePack is believed by its
name too. A `Splitter` takes a body piece by piece: lines and MessagePack leave it as they come, a document (array, logs, one
indented object) when it is whole, because a broken one is refused whole.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgpack
import msgspec

from d2p_pipeline.ingest import fluent

SNIFFED = 1024
"""Bytes in which a body's form shows."""

MOST_COMMAS = 4 << 20
"""Commas a document may have. Each may separate elements, and each element takes some 73 bytes of memory, however short."""

_LOGS = re.compile(rb'\s*\{\s*"logs"\s*:\s*\[')
_INDENTED = re.compile(rb"\s*\{[ \t\r]*\n")
_BOM = b"\xef\xbb\xbf"
_PACKED_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
_LONGEST_HEAD = 5

Raw = bytes | fluent.Misfit
"""A record's JSON text, or bytes that are none with the reason."""


class BodyError(Exception):
    """The body as a whole cannot be read."""


class _Logs(msgspec.Struct, forbid_unknown_fields=True):
    logs: list[msgspec.Raw]


_array = msgspec.json.Decoder(list[msgspec.Raw])
_logs = msgspec.json.Decoder(_Logs)
_value = msgspec.json.Decoder(msgspec.Raw)


def records(body: bytes) -> Iterable[bytes]:
    """The raw records of a JSON body, in order; NDJSON lines are not looked into, so a malformed one spoils no other."""
    body = body.removeprefix(_BOM)
    start = body[:SNIFFED].lstrip()[:1]
    if start == b"[":
        _check_commas(body)
        return map(bytes, _decode(_array, body))
    if start == b"{":
        if _LOGS.match(body):
            _check_commas(body)
            try:
                return map(bytes, _logs.decode(body).logs)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass  # NDJSON whose first record has a field "logs"
        try:
            return [bytes(_value.decode(body))]
        except (msgspec.DecodeError, RecursionError):
            pass  # more than one line, or a malformed one
    return [line for line in body.split(b"\n") if line and not line.isspace()]


def _check_commas(body: bytes) -> None:
    if (found := body.count(b",")) > MOST_COMMAS:
        raise BodyError(f"the JSON array has {found} commas, more than {MOST_COMMAS}; send NDJSON, or smaller arrays")


def _decode(decoder: "msgspec.json.Decoder[list[msgspec.Raw]]", body: bytes) -> list[msgspec.Raw]:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BodyError(f"the JSON array cannot be read: {error}; nothing of it was stored") from error
    except RecursionError:
        raise BodyError("the JSON array is nested too deep; nothing of it was stored") from None


def is_packed(beginning: bytes, content_type: str) -> bool:
    """Whether a body is MessagePack: a map or an array, bytes that no JSON text begins with, or by its Content-Type."""
    first = beginning[:1]
    return (b"\x80" <= first <= b"\x9f" or b"\xdc" <= first <= b"\xdf") or (
        content_type.partition(";")[0].strip().lower() in _PACKED_TYPES
    )


# --- piece by piece


class Splitter(Protocol):
    """Takes a body piece by piece, gives its records."""

    def feed(self, piece: bytes) -> Iterable[Raw]: ...

    def end(self) -> Iterable[Raw]:
        """The last ones; BodyError if the body breaks off."""
        ...


def splitter(head: bytes, content_type: str, completion: fluent.Completion, tag: str = "") -> Splitter:
    """What splits a body that begins with `head`, which is not fed."""
    if is_packed(head, content_type):
        return Packed(completion, tag)
    text = head.removeprefix(_BOM)
    if text.lstrip()[:1] == b"[" or _LOGS.match(text) or _INDENTED.match(text):
        return Document()
    return Lines()


class Lines:
    """NDJSON. Only a line that has not ended yet is kept."""

    def __init__(self) -> None:
        self._open: list[bytes] = []
        self._begun = False

    def feed(self, piece: bytes) -> Iterable[Raw]:
        if not self._begun:
            piece, self._begun = piece.removeprefix(_BOM), True
        end = piece.rfind(b"\n")
        if end < 0:
            self._open.append(piece)
            return ()
        lines = b"".join((*self._open, piece[:end])).split(b"\n")
        self._open = [piece[end + 1 :]]
        return (line for line in lines if line and not line.isspace())

    def end(self) -> Iterable[Raw]:
        last = b"".join(self._open)
        return [last] if last and not last.isspace() else ()


class Document:
    """One JSON value that is read when it is whole."""

    def __init__(self) -> None:
        self._body = bytearray()

    def feed(self, piece: bytes) -> Iterable[Raw]:
        self._body += piece
        return ()

    def end(self) -> Iterable[Raw]:
        body, self._body = bytes(self._body), bytearray()
        return records(body)


class Packed:
    """MessagePack: maps, Fluent events, or arrays of them, one after the other.

    A value is decoded when all of it is there: what it claims of its length is not believed before.
    """

    def __init__(self, completion: fluent.Completion, tag: str = "") -> None:
        self._lines = fluent.Lines(completion, tag)
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)
        self._open = bytearray()
        self._start = 0
        self._inside = 0
        """Elements that are still to come of an array that holds records."""

    def feed(self, piece: bytes) -> Iterable[Raw]:
        self._unpacker.feed(piece)
        self._open += piece
        return self._lines.of(self._values())

    def end(self) -> Iterable[Raw]:
        yield from self._lines.of(self._values(last=True))
        if self._open or self._inside:
            raise BodyError("the MessagePack breaks off within a value; nothing of it was stored")

    def _values(self, last: bool = False) -> Iterator[bytes]:
        """The values that have arrived, as their bytes."""
        taken = 0
        try:
            while taken < len(self._open):
                head = bytes(self._open[taken : taken + _LONGEST_HEAD + 1])
                if not self._inside and len(head) <= _LONGEST_HEAD and not last:
                    return
                if not self._inside and _holds_records(head):
                    self._inside = self._unpacker.read_array_header()
                    end = self._unpacker.tell() - self._start
                else:
                    self._unpacker.skip()
                    end = self._unpacker.tell() - self._start
                    yield bytes(self._open[taken:end])
                    self._inside = max(0, self._inside - 1)
                taken = end
        except msgpack.OutOfData:
            return
        except ValueError as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise BodyError(f"the MessagePack cannot be read: {reason}; nothing of it was stored") from error
        finally:
            del self._open[:taken]
            self._start += taken


def _holds_records(head: bytes) -> bool:
    """Whether a value that begins like this is an array of records: no event, which has two elements, the first no map."""
    first = head[0]
    if 0x90 <= first <= 0x9F:
        count, inner = first & 0xF, head[1:2]
    elif first == 0xDC:
        count, inner = int.from_bytes(head[1:3]), head[3:4]
    elif first == 0xDD:
        count, inner = int.from_bytes(head[1:5]), head[5:6]
    else:
        return False
    is_map = b"\x80" <= inner <= b"\x8f" or inner in (b"\xde", b"\xdf")
    return count != 2 or is_map
