"""The buffer in this process's memory, for conversions without Redis and for tests: the same protocol, gone at exit."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from d2p_pipeline.buffer.protocol import (
    Announcement,
    Batch,
    BatchRef,
    BufferState,
    Claim,
    ClaimLostError,
    Deliveries,
    Push,
    Seal,
    Totals,
)


@dataclass
class _Waiting:
    first: int
    chunks: list[bytes] = field(default_factory=list[bytes])
    records: int = 0
    size: int = 0


@dataclass
class _Sealed:
    batch: Batch
    chunks: list[bytes]
    look_at: int
    owner: str = ""
    lease_end: int = 0
    retry_at: int | None = None
    files: dict[int, Mapping[str, str]] = field(default_factory=dict[int, Mapping[str, str]])
    strays: dict[int, Mapping[str, str]] = field(default_factory=dict[int, Mapping[str, str]])


class MemoryBuffer:
    """A `Buffer` in one process; every method may be called from any thread."""

    def __init__(self, *, full_records: int, full_bytes: int) -> None:
        self._full_records = full_records
        self._full_bytes = full_bytes
        self._lock = threading.RLock()
        self._waiting: dict[str, _Waiting] = {}
        self._requested: set[str] = set()
        self._sealed: dict[BatchRef, _Sealed] = {}
        self._dead_letters: dict[str, list[bytes]] = {}
        self._totals: dict[str, Totals] = {}
        self._deliveries: dict[str, Deliveries] = {}
        self._pushed: dict[tuple[str, str], int] = {}
        self._attended: dict[str, int] = {}
        self._runs: dict[str, int] = {}

    def now(self) -> int:
        return time.time_ns() // 1_000_000

    def push(self, pushes: Sequence[Push]) -> None:
        with self._lock:
            for push in pushes:
                self._push(push)

    async def push_async(self, pushes: Sequence[Push]) -> None:
        self.push(pushes)

    async def end_async(self) -> None: ...

    def _push(self, push: Push) -> None:
        now, name = self.now(), (push.key, push.id)
        if self._pushed.get(name, 0) > now:
            return
        self._pushed[name] = now + push.window * 1000
        self._count(push.key, accepted=push.records + push.rejected, dead_letters=push.rejected)
        if push.dead_letters:
            self._dead_letters.setdefault(push.key, []).extend(push.dead_letters)
        if push.chunk:
            waiting = self._waiting.setdefault(push.key, _Waiting(now))
            waiting.chunks.append(push.chunk)
            waiting.records += push.records
            waiting.size += push.size

    def _count(self, key: str, *, accepted: int = 0, rows: int = 0, dead_letters: int = 0) -> None:
        old = self._totals.get(key, Totals(0, 0, 0))
        self._totals[key] = Totals(
            old.accepted + accepted, old.rows + rows, old.dead_letters + dead_letters, old.discarded
        )

    def check_writable(self) -> None:
        pass

    def request_flush(self, keys: Iterable[str] | None = None) -> list[str]:
        with self._lock:
            found = [key for key in (self._waiting if keys is None else keys) if key in self._waiting]
            self._requested.update(found)
            return found

    def due(self, before: int, limit: int) -> list[BufferState]:
        with self._lock:
            now = self.now()
            due = [
                state
                for state in self.waiting()
                if self._is_due(state, before) and self._attended.get(state.key, 0) <= now
            ]
            return sorted(due, key=lambda state: state.first)[:limit]

    def due_among(self, keys: Sequence[str], before: int) -> list[BufferState]:
        with self._lock:
            return [state for state in self.waiting() if state.key in keys and self._is_due(state, before)]

    def attend(self, keys: Sequence[str], until: int) -> None:
        with self._lock:
            self._attended.update(dict.fromkeys(keys, until))

    def leave(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._attended.pop(key, None)

    def lives(self, run: str, until: int) -> None:
        with self._lock:
            self._runs[run] = until

    def ends(self, run: str) -> None:
        with self._lock:
            self._runs.pop(run, None)

    def silent(self, since: int) -> dict[str, int]:
        with self._lock:
            return {run: until for run, until in self._runs.items() if until < since}

    def _is_due(self, state: BufferState, before: int) -> bool:
        return self._is_full(state) or state.first <= before

    def _is_full(self, state: BufferState) -> bool:
        full = state.records >= self._full_records or state.size >= self._full_bytes
        return full or state.key in self._requested

    def waiting(self) -> Iterator[BufferState]:
        with self._lock:
            return iter(
                [
                    BufferState(key, waiting.records, waiting.size, len(waiting.chunks), waiting.first, waiting.records)
                    for key, waiting in self._waiting.items()
                ]
            )

    def seal(self, seals: Sequence[Seal], *, look_in: int = 0) -> list[Batch]:
        with self._lock:
            return [batch for seal in seals if (batch := self._seal(seal, look_in))]

    def _seal(self, seal: Seal, look_in: int) -> Batch | None:
        ref = BatchRef(seal.key, seal.batch_id)
        if ref in self._sealed:
            return self._sealed[ref].batch
        self._requested.discard(seal.key)
        waiting = self._waiting.pop(seal.key, None)
        if waiting is None:
            return None
        now = self.now()
        batch = Batch(
            key=seal.key,
            id=seal.batch_id,
            state="open",
            reason=seal.reason,
            sealed_at=now,
            first=waiting.first,
            chunks=len(waiting.chunks),
            records=waiting.records,
            size=waiting.size,
            counted=True,
            token=0,
            requests=0,
            units_done=frozenset(),
            rows=0,
            dead_letters=0,
        )
        self._sealed[ref] = _Sealed(batch, waiting.chunks, now + look_in)
        old = self._deliveries.get(seal.key, Deliveries())
        sealed = {**old.sealed, seal.reason: old.sealed.get(seal.reason, 0) + 1}
        self._deliveries[seal.key] = msgspec.structs.replace(old, sealed=sealed)
        return batch

    def batch(self, ref: BatchRef) -> Batch | None:
        with self._lock:
            sealed = self._sealed.get(ref)
            return sealed.batch if sealed else None

    def due_batches(self, before: int, limit: int) -> list[Batch]:
        with self._lock:
            due = [sealed for sealed in self._sealed.values() if _is_open(sealed) and sealed.look_at <= before]
            return [sealed.batch for sealed in sorted(due, key=lambda sealed: sealed.look_at)[:limit]]

    def open_batches(self) -> Iterator[Batch]:
        with self._lock:
            return iter([sealed.batch for sealed in self._sealed.values() if _is_open(sealed)])

    def postpone(self, looks: Mapping[BatchRef, int], *, requested: bool = False) -> None:
        with self._lock:
            for ref, until in looks.items():
                sealed = self._sealed.get(ref)
                if sealed and not _is_done(sealed):
                    sealed.look_at = until
                    requests = sealed.batch.requests + requested
                    sealed.batch = msgspec.structs.replace(sealed.batch, requests=requests)

    def is_claimed(self, ref: BatchRef) -> bool:
        with self._lock:
            sealed = self._sealed.get(ref)
            return bool(sealed and sealed.lease_end > self.now())

    def claimed(self, refs: Sequence[BatchRef]) -> set[BatchRef]:
        return {ref for ref in refs if self.is_claimed(ref)}

    def claim(self, ref: BatchRef, owner: str, lease_ms: int) -> Claim | None:
        with self._lock:
            sealed, held = self._sealed.get(ref), self.is_claimed(ref)
            if sealed is None or _is_done(sealed) or (held and sealed.owner != owner):
                return None
            if not held:
                sealed.batch = msgspec.structs.replace(sealed.batch, token=sealed.batch.token + 1)
            sealed.owner, sealed.lease_end = owner, self.now() + lease_ms
            return Claim(ref, owner, sealed.batch.token)

    def renew(self, claim: Claim, lease_ms: int) -> bool:
        with self._lock:
            sealed = self._sealed.get(claim.batch)
            if sealed is None or _is_done(sealed) or sealed.batch.token != claim.token:
                return False
            sealed.owner, sealed.lease_end = claim.owner, self.now() + lease_ms
            return True

    def release(self, claim: Claim) -> None:
        with self._lock:
            sealed = self._sealed.get(claim.batch)
            if sealed and sealed.owner == claim.owner:
                sealed.owner, sealed.lease_end = "", 0

    def fail(self, claim: Claim, error: str) -> int:
        with self._lock:
            sealed = self._sealed.get(claim.batch)
            if (
                sealed is None
                or _is_done(sealed)
                or claim.token != sealed.batch.token
                or claim.token == sealed.batch.failed_token
            ):
                return 0
            old = self._deliveries.get(claim.batch.key, Deliveries())
            self._deliveries[claim.batch.key] = msgspec.structs.replace(old, failures=old.failures + 1)
            sealed.batch = msgspec.structs.replace(
                sealed.batch,
                state="recovery",
                error=error,
                failures=sealed.batch.failures + 1,
                failed_at=self.now(),
                failed_token=claim.token,
            )
            sealed.owner, sealed.lease_end, sealed.retry_at = "", 0, None
            return sealed.batch.failures

    def recovering(self, before: int | None = None) -> Iterator[Batch]:
        with self._lock:
            found = [sealed for sealed in self._sealed.values() if sealed.batch.state == "recovery"]
            if before is not None:
                found = [sealed for sealed in found if sealed.retry_at is not None and sealed.retry_at <= before]
            return iter([sealed.batch for sealed in sorted(found, key=lambda sealed: sealed.retry_at or sys.maxsize)])

    def retry_at(self, ref: BatchRef, when: int | None, *, requested: bool = False) -> None:
        with self._lock:
            sealed = self._sealed[ref]
            sealed.retry_at = when
            sealed.batch = msgspec.structs.replace(sealed.batch, requests=sealed.batch.requests + requested)

    def plan(self, ref: BatchRef, units: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...] | None:
        with self._lock:
            sealed = self._sealed.get(ref)
            if sealed is None:
                return None
            if sealed.batch.plan is None:
                sealed.batch = msgspec.structs.replace(sealed.batch, plan=tuple(units))
            return sealed.batch.plan

    def read(self, ref: BatchRef, start: int, stop: int) -> list[bytes]:
        with self._lock:
            sealed = self._sealed.get(ref)
            return sealed.chunks[start:stop] if sealed else []

    def announce(self, announcements: Sequence[Announcement]) -> list[list[str] | None]:
        with self._lock:
            return [self._announce(one) for one in announcements]

    def _announce(self, one: Announcement) -> list[str] | None:
        sealed = self._sealed.get(one.claim.batch)
        if sealed is None or _is_done(sealed) or sealed.batch.token != one.claim.token:
            raise ClaimLostError(one.claim)
        files, strays = sealed.files.get(one.unit, {}), sealed.strays.get(one.unit, {})
        taken = not strays.keys().isdisjoint(one.files) or any(
            one.files.get(path, md5) != md5 for path, md5 in files.items()
        )
        if taken and not one.own:
            return None
        earlier = {**files, **strays}
        sealed.files[one.unit] = one.files
        sealed.strays[one.unit] = {path: md5 for path, md5 in earlier.items() if path not in one.files}
        return list(sealed.strays[one.unit])

    def announced(self, ref: BatchRef, unit: int) -> Mapping[str, str] | None:
        with self._lock:
            sealed = self._sealed.get(ref)
            return sealed.files.get(unit) if sealed else None

    def acknowledge(
        self,
        claim: Claim,
        unit: int,
        *,
        units: int,
        rows: int,
        rejected: int = 0,
        dead_letters: Sequence[bytes] = (),
        files: Sequence[int] = (),
    ) -> Literal["complete", "marked", "repeated"]:
        with self._lock:
            sealed = self._sealed.get(claim.batch)
            if sealed is None or _is_done(sealed) or unit in sealed.batch.units_done:
                return "repeated"
            if sealed.batch.token != claim.token:
                raise ClaimLostError(claim)
            batch = sealed.batch
            sealed.batch = msgspec.structs.replace(
                batch,
                units_done=batch.units_done | {unit},
                rows=batch.rows + rows,
                dead_letters=batch.dead_letters + rejected,
            )
            self._dead_letters.setdefault(claim.batch.key, []).extend(dead_letters)
            self._count(claim.batch.key, rows=rows, dead_letters=rejected)
            old = self._deliveries.get(batch.key, Deliveries())
            self._deliveries[batch.key] = msgspec.structs.replace(
                old,
                files=old.files + len(files),
                file_bytes=old.file_bytes + sum(files),
                units=old.units + 1,
                delivery_ms=old.delivery_ms + self.now() - batch.sealed_at,
            )
            if len(sealed.batch.units_done) < units:
                return "marked"
            sealed.batch = msgspec.structs.replace(sealed.batch, state="done")
            sealed.chunks, sealed.lease_end = [], 0
            return "complete"

    def dead_letters(self, key: str, start: int = 0, stop: int | None = None) -> list[bytes]:
        with self._lock:
            return self._dead_letters.get(key, [])[start:stop]

    def dead_letter_keys(self) -> Iterator[tuple[str, int]]:
        with self._lock:
            return iter([(key, len(letters)) for key, letters in self._dead_letters.items() if letters])

    def totals(self) -> Iterator[tuple[str, Totals]]:
        with self._lock:
            return iter(list(self._totals.items()))

    def deliveries(self) -> Iterator[tuple[str, Deliveries]]:
        with self._lock:
            return iter(list(self._deliveries.items()))

    def reconcile(self, budget_ms: int) -> int:
        del budget_ms
        return 0  # there is no index that could miss anything

    def close(self) -> None:
        pass


def _is_open(sealed: _Sealed) -> bool:
    return sealed.batch.state == "open"


def _is_done(sealed: _Sealed) -> bool:
    return sealed.batch.state == "done"
