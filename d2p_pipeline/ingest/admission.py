"""One request's records on their way into a `Request`: counted, bounded, and packed while more of a large body comes.

Whatever it brings, a request is turned down whole when it has more keys than a commit should write at once, or more
malformed records than can be kept.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import xxhash

from d2p_pipeline.ingest.answers import HttpError
from d2p_pipeline.ingest.bodies import Raw
from d2p_pipeline.ingest.commit import CHUNK_BYTES, Request
from d2p_pipeline.ingest.fluent import Misfit
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.reading import Limits

SHOWN_ERRORS = 20
"""Reasons listed in the answer to a batch."""
TURN_BYTES = 256 << 10
"""Raw bytes after which other requests have their turn."""
PACKED_BYTES = 4 * CHUNK_BYTES
"""Raw bytes after which full chunks are made."""
RECORD_BYTES = 256
"""A record of no bytes takes as long as that many bytes of a long one."""
LARGE_RECORD = 256 << 10
"""A record of more bytes is looked at beside the event loop."""
LETTER_BYTES = 256
"""About what a dead letter takes beside the record."""


class Admission:
    """What one request brings. Records come in order; `request` has all of them that are packed or waiting."""

    def __init__(self, intake: Intake, limits: Limits, idempotency_key: str = "") -> None:
        self.request = Request()
        self.records = 0
        self.rejected = 0
        self.errors: list[dict[str, Any]] = []
        self._intake = intake
        self._limits = limits
        self._received_at = time.time_ns() // 1_000_000
        self._letters = 0
        self._turn = 0
        self._unpacked = 0
        self._name = Name(idempotency_key) if idempotency_key else None

    def take(self, raw: Raw) -> None:
        """Add one record, or a dead letter for what is none."""
        self.records += 1
        if isinstance(raw, Misfit):
            raw, reason = raw.raw, raw.reason
            self._intake.refuse(raw, reason, self.request, self._received_at)
        else:
            reason = self._intake.take(raw, self.request, self._received_at)
        self.request.size += len(raw)
        self._turn += len(raw) + RECORD_BYTES
        self._unpacked += len(raw)
        if reason is not None:
            self._rejected(raw, reason)
        if len(self.request.lines) > self._limits.keys or len(self.request.dead_letters) > self._limits.keys:
            reason = (
                f"the request has records of more than {self._limits.keys} keys (max_request_keys); send fewer at once"
            )
            raise HttpError(413, "too_many_keys", reason)

    def _rejected(self, raw: bytes, reason: str) -> None:
        self.rejected += 1
        self._letters += len(raw) + LETTER_BYTES
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append({"line": self.records, "reason": reason})
        if self._letters > self._limits.body_bytes + LETTER_BYTES:
            first = f"the first: line {self.errors[0]['line']}: {self.errors[0]['reason']}"
            reason = f"the request has more malformed records than can be kept at once; {first}"
            raise HttpError(413, "too_many_rejects", reason)

    async def take_all(self, raws: Iterable[Raw]) -> None:
        """Add records without keeping other requests from their turn."""
        for raw in raws:
            if not isinstance(raw, Misfit) and len(raw) > LARGE_RECORD:
                await asyncio.to_thread(self.take, raw)
            else:
                self.take(raw)
            if self._turn > TURN_BYTES:
                self._turn = 0
                await self._pause()

    async def _pause(self) -> None:
        if self._unpacked > PACKED_BYTES:
            self._unpacked = 0
            await asyncio.to_thread(self.request.pack)
        else:
            await asyncio.sleep(0)

    def saw(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._name:
            self._name.update(piece)

    def named(self) -> Request:
        """The request, all of it seen."""
        if self._name:
            self.request.id = self._name.id
        return self.request


class Name:
    """What names a request that has an Idempotency-Key: key and body together."""

    def __init__(self, idempotency_key: str) -> None:
        self._digest = xxhash.xxh3_128(idempotency_key.encode())
        self.update = self._digest.update

    @property
    def id(self) -> str:
        return f"http-{self._digest.hexdigest()}"
