"""The element of a buffer: lines of canonical JSON, compressed, with a header that tells what they are.

A chunk of ours is two zstd frames, so that any zstd tool reads it: a skippable frame (RFC 8878, 3.1.2) whose content is
`_HEADER`, and one frame with the NDJSON. The header is the claim that every line is canonical. Chunks of other
producers carry no such claim: zstd without the header, or plain text.
"""

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

DEFAULT_LIMIT = 1 << 30
"""Most bytes one chunk may decompress to, unless told otherwise."""

# Magic number and length of the content; then tag, format version, records, received-at in ms, bytes of NDJSON.
_SKIPPABLE = struct.Struct("<II")
_HEADER = struct.Struct("<3sBIQQ")
_SKIPPABLE_MAGIC = 0x184D2A50
_TAG = b"d2p"
_VERSION = 1
_PREFIX_SIZE = _SKIPPABLE.size + _HEADER.size
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Other tools put skippable frames of their own first; their magic numbers differ in the lowest four bits.
_SKIPPABLE_MAGICS = tuple((_SKIPPABLE_MAGIC + low).to_bytes(4, "little") for low in range(16))

# What JSON records typically compress by, for foreign frames that do not tell their size.
_ASSUMED_RATIO = 8

_LEVEL = 1

# The end of the year 9999, beyond which a time cannot be written down.
_LAST_MS = 253_402_300_799_999

# Bytes given to the decompressor at once where the size is unknown: the best a byte can do is 32 KiB of output.
_PIECE = 4096


class ChunkError(ValueError):
    """A chunk that cannot be read: `reason` says why, `size` is its length in bytes."""

    def __init__(self, reason: str, size: int) -> None:
        super().__init__(f"chunk of {size} bytes: {reason}")
        self.reason = reason
        self.size = size


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a chunk holds. `records` and `received_at` (ms since the epoch) are None when a chunk is not ours."""

    body: bytes
    canonical: bool
    records: int | None
    received_at: int | None


def encode(lines: Sequence[bytes], received_at_ms: int) -> bytes:
    """A chunk of canonical lines (without newlines, at least one)."""
    if not lines:
        raise ValueError("a chunk needs at least one line")
    body = b"\n".join((*lines, b""))
    header = _HEADER.pack(_TAG, _VERSION, len(lines), received_at_ms, len(body))
    return _SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(header)) + header + _codecs.compressor.compress(body)


def decode(chunk: bytes, limit: int = DEFAULT_LIMIT) -> Chunk:
    """The content of a chunk. ChunkError for damaged zstd, an unknown header version, or more than `limit` bytes."""
    header = _header(chunk)
    if header is None:
        if chunk.startswith((_ZSTD_MAGIC, *_SKIPPABLE_MAGICS)):
            return Chunk(_decompress_foreign(chunk, limit), canonical=False, records=None, received_at=None)
        return Chunk(chunk, canonical=False, records=None, received_at=None)
    records, received_at, size = header
    return Chunk(_decompress_ours(chunk, size, limit), canonical=True, records=records, received_at=received_at)


def raw_size(chunk: bytes) -> int:
    """Bytes of a chunk's records, without decompressing: exact for ours, an estimate for zstd frames without a size."""
    try:
        if header := _header(chunk):
            return header[2]
        if chunk.startswith(_ZSTD_MAGIC):
            size = zstandard.frame_content_size(chunk)
            return size if size >= 0 else len(chunk) * _ASSUMED_RATIO
    except (ChunkError, zstandard.ZstdError):
        # Reading it will fail, and say why; until then its bytes are all that is known.
        return len(chunk)
    return len(chunk)


def _header(chunk: bytes) -> tuple[int, int, int] | None:
    """Records, received-at and raw size; None if the chunk is not ours."""
    if len(chunk) < _SKIPPABLE.size + len(_TAG) + 1:
        return None
    magic, length = _SKIPPABLE.unpack_from(chunk)
    if magic != _SKIPPABLE_MAGIC or chunk[_SKIPPABLE.size : _SKIPPABLE.size + len(_TAG)] != _TAG:
        return None
    version = chunk[_SKIPPABLE.size + len(_TAG)]
    if version != _VERSION:
        raise ChunkError(
            f"has format version {version}, this program reads {_VERSION}; read it with a newer one", len(chunk)
        )
    if length != _HEADER.size or len(chunk) < _PREFIX_SIZE:
        raise ChunkError("its header is damaged", len(chunk))
    _, _, records, received_at, size = _HEADER.unpack_from(chunk, _SKIPPABLE.size)
    if received_at > _LAST_MS:
        raise ChunkError(f"its header is damaged: received at {received_at} ms", len(chunk))
    return records, received_at, size


def _decompress_ours(chunk: bytes, size: int, limit: int) -> bytes:
    """The one frame after the header, in one go."""
    frame = chunk[_PREFIX_SIZE:]
    if size > limit:
        raise _too_large(chunk, limit)
    try:
        # Were the frame to claim another size, the output buffer would be allocated for that one.
        if zstandard.frame_content_size(frame) == size:
            return _codecs.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(chunk, error) from error
    raise ChunkError("its two headers tell different sizes", len(chunk))


def _decompress_foreign(chunk: bytes, limit: int) -> bytes:
    """All frames of a chunk, piece by piece: what they claim of their size is neither needed nor trusted."""
    body = bytearray()
    rest = chunk
    while rest:
        frame = _codecs.decompressor.decompressobj()
        for start in range(0, len(rest), _PIECE):
            try:
                body += frame.decompress(rest[start : start + _PIECE])
            except zstandard.ZstdError as error:
                raise _damaged(chunk, error) from error
            if len(body) > limit:
                raise _too_large(chunk, limit)
            if frame.eof:
                rest = frame.unused_data + rest[start + _PIECE :]
                break
        else:
            raise ChunkError("ends in the middle of a zstd frame", len(chunk))
    return bytes(body)


def _damaged(chunk: bytes, error: zstandard.ZstdError) -> ChunkError:
    return ChunkError(f"is not readable zstd: {error}", len(chunk))


def _too_large(chunk: bytes, limit: int) -> ChunkError:
    return ChunkError(f"holds more than the {limit} bytes that are read at once", len(chunk))


class _Codecs(threading.local):
    """One compressor and one decompressor per thread: they are costly to make and not to be shared."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_codecs = _Codecs()
