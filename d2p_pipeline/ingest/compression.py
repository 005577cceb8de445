"""Compressed bodies, expanded piece by piece and no further than the limits: a bomb is refused before it is in memory.

Several gzip members or zstd frames one after the other are one body, as both formats have it.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zstandard

_GZIP = 16 + zlib.MAX_WBITS
_GZIP_PIECE = 256 << 10
"""Bytes gunzipped at once."""
_ZSTD_PIECE = 1 << 10
"""Bytes given to zstd at once: one byte may expand to 32 KiB, so at most 32 MiB come of it."""
_ANY_RATIO = 1 << 20
"""Bytes a body may expand to whatever it is compressed by: short ones of equal records are compressed by a lot."""


class CompressionError(Exception):
    """A body that cannot be decompressed."""


class ExpandedTooLargeError(CompressionError):
    """A body that expands beyond a limit; `limit` says which."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"expands to more than {limit}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a body may expand: to `size` bytes, and beyond the first MiB by `ratio` of what was sent."""

    size: int
    ratio: int = 1000

    def check(self, expanded: int, sent: int) -> None:
        if expanded > self.size:
            raise ExpandedTooLargeError(f"{self.size} bytes (max_body_bytes)")
        if expanded > _ANY_RATIO and expanded > sent * self.ratio:
            raise ExpandedTooLargeError(f"{self.ratio} times what was sent (max_expansion)")


class Expansion:
    """One body as it arrives: feed it part by part, take what it expands to."""

    def __init__(self, encoding: str, bounds: Bounds) -> None:
        if encoding not in ("gzip", "zstd"):
            raise CompressionError(f"compression {encoding!r} is not known; gzip and zstd are")
        self._encoding = encoding
        self._bounds = bounds
        self._sent = 0
        self._expanded = 0
        # A frame may ask for a window of gigabytes; nothing within the limit needs more than the limit itself.
        window = 1 << min(31, max(23, (bounds.size - 1).bit_length()))
        self._zstd = zstandard.ZstdDecompressor(max_window_size=window)
        self._member: Any = None  # the two libraries' objects have no type in common

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The pieces that a part expands to; CompressionError if it is damaged or goes beyond the limits."""
        self._sent += len(part)
        try:
            for piece in self._gunzipped(part) if self._encoding == "gzip" else self._unzstd(part):
                self._expanded += len(piece)
                self._bounds.check(self._expanded, self._sent)
                if piece:
                    yield piece
        except (zlib.error, zstandard.ZstdError) as error:
            raise CompressionError(f"is not readable {self._encoding}: {error}") from error

    def end(self) -> None:
        """CompressionError if the body has to go on."""
        if self._member is not None:
            raise CompressionError(f"ends in the middle of its {self._encoding}")

    def _gunzipped(self, part: bytes) -> Iterator[bytes]:
        full = False  # a piece that is full may leave more in the member than there is of the part
        while part or full:
            member = self._member = self._member or zlib.decompressobj(_GZIP)
            piece = member.decompress(part, _GZIP_PIECE)
            yield piece
            part, full = member.unconsumed_tail, len(piece) == _GZIP_PIECE
            if member.eof:
                part, full, self._member = member.unused_data, False, None

    def _unzstd(self, part: bytes) -> Iterator[bytes]:
        for start in range(0, len(part), _ZSTD_PIECE):
            rest = part[start : start + _ZSTD_PIECE]
            while rest:
                frame = self._member = self._member or self._zstd.decompressobj()
                yield frame.decompress(rest)
                if not frame.eof:
                    break
                rest, self._member = frame.unused_data, None


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """The content of `body`, gzip or zstd; CompressionError if it is damaged or larger than `limit`."""
    expansion = Expansion(encoding, Bounds(limit))
    expanded = b"".join(expansion.feed(body))
    expansion.end()
    return expanded
