"""Back-pressure: what a key, and all keys together, may have waiting in the buffer before requests are turned away.

How much waits is looked up every second, in the background; what this process adds in between is counted. So the limits hold
up to what other processes add within a second.
"""

import asyncio
import contextlib
import time
from collections import Counter

from d2p_pipeline import books
from d2p_pipeline.buffer.protocol import Buffer, BufferFullError, BufferUnavailableError
from d2p_pipeline.ingest.commit import Request

LOOK_SECONDS = 1.0
SHARE = 0.05
"""Of its time this process looks no more than that, so that many keys make the looks rarer."""


class KeyFullError(BufferFullError):
    """A key has as much waiting as it may."""


class Pressure:
    """The limits over one buffer; one per event loop. 0: no limit."""

    def __init__(self, buffer: Buffer, *, max_key_bytes: int, max_bytes: int) -> None:
        self._buffer = buffer
        self._max_key_bytes = max_key_bytes
        self._max_bytes = max_bytes
        self._waiting: dict[str, int] = {}
        self._total = 0
        self._added: Counter[str] = Counter()
        self._next_look = 0.0
        self._look: asyncio.Task[None] | None = None

    async def admit(self, request: Request) -> None:
        """`admit_now`, after the first look."""
        if not self.is_known and self._look:
            await asyncio.shield(self._look)
        self.admit_now(request)

    @property
    def is_known(self) -> bool:
        """Whether there was a look already, or none is needed; begins one when the last is too old."""
        if not (self._max_key_bytes or self._max_bytes):
            return True
        if self._look is None and time.monotonic() >= self._next_look:
            self._look = asyncio.create_task(self._looked())
        return self._next_look > 0

    def admit_now(self, request: Request) -> None:
        """Raises BufferFullError, or KeyFullError, when what waits already has reached a limit."""
        if self._max_bytes and self._total + self._added.total() >= self._max_bytes:
            raise BufferFullError(
                f"{self._max_bytes} bytes or more wait for delivery (max_buffer_bytes); nothing was stored, try again later"
            )
        for key in request.keys if self._max_key_bytes else ():
            if self._waiting.get(key, 0) + self._added[key] >= self._max_key_bytes:
                raise KeyFullError(
                    f"{self._max_key_bytes} bytes or more of {key!r} wait for delivery (max_key_bytes); "
                    "nothing was stored, try again later"
                )

    def added(self, request: Request) -> None:
        """Count what was stored."""
        if self._max_key_bytes or self._max_bytes:
            self._added.update(request.sizes())

    async def _looked(self) -> None:
        before = self._added.copy()
        started = time.monotonic()
        try:
            # A buffer that does not answer takes no requests either.
            with contextlib.suppress(BufferUnavailableError):
                found = await asyncio.to_thread(self._read)
                self._added.subtract(before)
                self._added += Counter()  # drops what is zero
                self._waiting, self._total = found, sum(found.values())
        finally:
            took = time.monotonic() - started
            self._next_look = time.monotonic() + max(LOOK_SECONDS, took / SHARE)
            self._look = None

    def _read(self) -> dict[str, int]:
        return {key: book.waiting_bytes for key, book in books.waiting(self._buffer).keys.items()}
