"""Reads request bodies within the limits: of bytes, of expansion, of time, and of memory for all of them together.

A body within `SMALL_BYTES` is read at once; a larger one comes piece by piece, as it was sent or as it expands.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from d2p_pipeline.ingest.answers import HttpError
from d2p_pipeline.ingest.compression import Bounds, CompressionError, ExpandedTooLargeError, Expansion
from d2p_pipeline.ingest.http import Exchange

SMALL_BYTES = 256 << 10
DISCARDED_BODIES = 4
"""How many times `body_bytes` of a body too large is read and thrown away before the connection is cut."""
SLOWEST = 64 << 10
"""Bytes per second that a body may come by, once its `body_seconds` are over."""
_NAMES = {"": None, "identity": None, "gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}
_CLOSE = ("connection", "close")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may bring. `memory_bytes`: what all bodies of this process together may be."""

    body_bytes: int = 64 << 20
    record_bytes: int = 16 << 20
    keys: int = 1000
    expansion: int = 1000
    body_seconds: float = 60.0
    memory_bytes: int = 512 << 20


class Bodies:
    """The bodies that are being read and converted. One per event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0
        """Bytes of all bodies now in memory, at most."""

    def is_at_once(self, exchange: Exchange) -> bool:
        """Whether all of a request's body is there, as it was before it was sent, and not too large."""
        return (
            exchange.complete
            and exchange.waiting <= self.limits.body_bytes
            and "content-encoding" not in exchange.headers
        )

    def open(self, exchange: Exchange) -> "Body":
        """The body of a request; `close` it when the request is answered."""
        return Body(self, exchange, exchange.headers.get("content-encoding", ""))


class Body:
    """One request's body, not read yet."""

    __slots__ = ("_all", "_encoding", "_exchange", "_held", "_length", "_limits")

    def __init__(self, bodies: Bodies, exchange: Exchange, encoding: str) -> None:
        self._all = bodies
        self._limits = bodies.limits
        self._exchange = exchange
        self._length = length = exchange.length
        self._held = 0
        name = encoding.strip().lower()
        if name not in _NAMES:
            raise HttpError(415, "encoding", f"Content-Encoding {encoding} is not supported; use gzip, zstd or none")
        self._encoding = _NAMES[name]
        read = 1 if exchange.expects else DISCARDED_BODIES  # a client that waits to be asked reads the answer at once
        if length is not None and length > read * self._limits.body_bytes:
            raise self._too_large()

    @property
    def is_small(self) -> bool:
        """Whether `whole` reads it at once, as it was sent."""
        return self._encoding is None and self._length is not None and self._length <= SMALL_BYTES

    def at_once(self) -> bytes:
        """All of it, if it `is_at_once`."""
        self._hold(self._exchange.waiting)
        return self._exchange.take()

    async def whole(self) -> bytes:
        """All of it, expanded."""
        if self._all.is_at_once(self._exchange):
            return self.at_once()
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """Piece by piece, expanded."""
        if self._encoding is None:
            async for part in self._parts():
                self._hold(len(part))
                yield part
            return
        expansion = Expansion(self._encoding, Bounds(self._limits.body_bytes, self._limits.expansion))
        try:
            async for part in self._parts():
                for piece in expansion.feed(part):
                    self._hold(len(piece))
                    yield piece
            expansion.end()
        except ExpandedTooLargeError as error:
            raise HttpError(413, "body_too_large", f"the body {error}; send smaller batches", _CLOSE) from error
        except CompressionError as error:
            raise HttpError(400, "body_unreadable", f"the body {error}", _CLOSE) from error

    async def _parts(self) -> AsyncIterator[bytes]:
        """As it was sent, in the time and up to the bytes it may take."""
        size, limit = 0, self._limits.body_bytes
        deadline = self._exchange.arrived + self._limits.body_seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline + size / SLOWEST):
                    part = await self._exchange.read()
            except TimeoutError:
                raise self._too_slow() from None
            if not part:
                break
            size += len(part)
            # Most clients read the answer only when they have sent everything: take in what is not absurd.
            if size > DISCARDED_BODIES * limit:
                break
            if size <= limit and (self._length or 0) <= limit:
                yield part
        if size > limit:
            raise self._too_large()

    def close(self) -> None:
        """Its bytes are in memory no more."""
        self._all.held -= self._held
        self._held = 0

    def _hold(self, size: int) -> None:
        if self._all.held + size > self._limits.memory_bytes:
            reason = "too many large bodies are on their way in at once (max_held_bytes); try again"
            raise HttpError(503, "memory", reason, ("retry-after", "1"), _CLOSE)
        self._all.held += size
        self._held += size

    def _too_large(self) -> HttpError:
        reason = f"the body exceeds max_body_bytes ({self._limits.body_bytes}); send smaller batches"
        return HttpError(413, "body_too_large", reason, _CLOSE)

    def _too_slow(self) -> HttpError:
        reason = f"the body did not come within {self._limits.body_seconds:g} s (body_timeout)"
        return HttpError(408, "body_too_slow", reason, _CLOSE)
