"""The buffer in Redis: the protocol's steps as Lua scripts, and two indexes that are hints.

A step that changes something is one script on one key's slot, so it happens whole or not at all, and Redis Cluster works. The
indexes (`keys`, `batches`: sorted sets by the time of the next look) live in other slots and are written beside the scripts;
what they miss because a process died in between, or because a foreign producer never wrote them, `reconcile` finds.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, Literal, TypeVar, cast

import msgspec
from redis.exceptions import RedisError

from d2p_pipeline.buffer.letters import LetterQueues
from d2p_pipeline.buffer.line import Line
from d2p_pipeline.buffer.names import Names, glob
from d2p_pipeline.buffer.protocol import (
    FORMAT,
    Announcement,
    Batch,
    BatchRef,
    BufferFullError,
    BufferState,
    BufferUnavailableError,
    Claim,
    ClaimLostError,
    Deliveries,
    ForeignValueError,
    NewerFormatError,
    PartlyStoredError,
    Push,
    Seal,
    State,
    Totals,
)
from d2p_pipeline.buffer.server import PAGE, Call, Client, Server, pages, translate

Plan = tuple[tuple[int, int], ...]
_T = TypeVar("_T")

_KEEP_STRAYS = 7 * 24 * 3600
"""Seconds that the announcements of a batch outlive it where its attempts announced different files."""
FIRST_PASS_MS = 5000
"""What `reconcile` may cost until it has seen every name once."""


class RedisBuffer:
    """A `Buffer` on a Redis server, Sentinel group or Cluster.

    `full_records` and `full_bytes` are the sizes at which a push makes its key due.
    """

    def __init__(
        self, client: Client, names: Names, *, full_records: int, full_bytes: int, line: Line | None = None
    ) -> None:
        self._server = Server(client)
        self._run, self._one = self._server.run, self._server.one
        self.letters = LetterQueues(self._server, names)
        self._names = names
        self._full_records = full_records
        self._full_bytes = full_bytes
        self._line = line
        # The event loop's own threads may all be busy with other things, and pushes wait for nothing but Redis.
        self._thread = ThreadPoolExecutor(1, "d2p-push")
        self._ahead: int | None = None
        """Redis's clock against this process's, or less: a pause makes it seem earlier."""

    def now(self) -> int:
        seconds, micros = self._one("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        self._ahead = now - time.monotonic_ns() // 1_000_000
        return now

    def _about_now(self) -> int:
        """Redis's time or earlier, without asking for it each time."""
        return time.monotonic_ns() // 1_000_000 + self._ahead if self._ahead is not None else self.now()

    def push(self, pushes: Sequence[Push]) -> None:
        self._push(pushes, self._about_now())

    def _push(self, pushes: Sequence[Push], sent: int) -> None:
        """`sent`: when it was tried first."""
        # One script for all, so that it is all or nothing; of a Cluster each touches one slot.
        together = [[push] for push in pushes] if self._server.is_cluster else [list(pushes)] if pushes else []
        stored: list[Push] = []
        answers: list[Any] = []
        refused: dict[str, ForeignValueError] = {}
        failure: Exception | None = None
        try:
            replies = self._run([self._push_of(some, sent) for some in together], errors=True)
            for some, reply in zip(together, replies, strict=True):
                if not isinstance(reply, Exception):
                    stored += some
                    answers += reply
                elif isinstance(error := translate(reply), ForeignValueError):
                    refused[some[0].key] = error
                else:
                    failure = failure or error
            self._index(*self._filled_and_begun(stored, answers))
            if isinstance(failure, BufferFullError) and len(together) > 1:
                raise BufferUnavailableError("a node of the Redis Cluster is out of memory, others may not be")
            if failure:
                raise failure
        except BufferUnavailableError:
            self._ahead = None  # it may be that the clocks went apart
            raise
        if refused:
            raise PartlyStoredError(refused) if stored else next(iter(refused.values()))

    async def push_async(self, pushes: Sequence[Push]) -> None:
        sent = await self._aside(self._about_now) if self._ahead is None else self._about_now()
        try:
            replies = await self._line.ask(self._push_of(pushes, sent)) if self._line else None
        except (RedisError, OSError):
            replies = None
        if replies is None:  # the other way tries again, stores nothing twice, and finds out what is wrong
            await self._aside(lambda: self._push(pushes, sent))
            return
        filled, begun = self._filled_and_begun(pushes, replies)
        if filled or begun:
            await self._aside(lambda: self._index(filled, begun))

    async def _aside(self, action: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    async def end_async(self) -> None:
        if self._line:
            await self._line.close()

    def _filled_and_begun(self, pushes: Sequence[Push], replies: Sequence[Any]) -> tuple[set[str], set[str]]:
        """The keys whose buffers these pushes filled, and those whose buffers they began."""
        filled = {
            push.key
            for push, (records, size, _) in zip(pushes, replies, strict=True)
            if self._fills(push, records, size)
        }
        begun = {push.key for push, (_, _, fresh) in zip(pushes, replies, strict=True) if fresh} - filled
        return filled, begun

    def _index(self, filled: set[str], begun: set[str]) -> None:
        """Have keys looked at when they are due."""
        looks = dict.fromkeys(filled, 0) | (dict.fromkeys(begun, self.now()) if begun else {})
        self._schedule(self._names.keys, looks)

    def _push_of(self, pushes: Sequence[Push], sent: int) -> Call:
        of, keys, args = self._names.of, list[bytes | str](), list[Any]()
        for push in pushes:
            keys += [of(name, push.key) for name in (self._names.data, "stats", self._names.dlq, "totals")]
            keys.append(of("pushed", push.key, push.id))
            args += [push.window, push.records, push.size, push.chunk, push.rejected, len(push.dead_letters)]
            args += push.dead_letters
        return Call("push", keys, [*args, sent])

    def _fills(self, push: Push, records: int, size: int) -> bool:
        """Whether it was this push that filled the buffer."""
        return (records >= self._full_records > records - push.records) or (size >= self._full_bytes > size - push.size)

    def check_writable(self) -> None:
        self._one("SET", "d2p:ready", 1, "EX", 10)

    def request_flush(self, keys: Iterable[str] | None = None) -> list[str]:
        states = self.waiting() if keys is None else iter(self._states(list(keys)))
        found = [state.key for state in states if state.chunks]
        self._schedule(self._names.keys, dict.fromkeys(found, 0))
        return found

    def due(self, before: int, limit: int) -> list[BufferState]:
        found: list[str] = []
        now, start = self.now(), 0
        while len(found) < limit:
            members = self._one("ZRANGEBYSCORE", self._names.keys, "-inf", before, "LIMIT", start, PAGE)
            ends = self._scores(self._names.attended, members)
            found += [_text(member) for member, end in zip(members, ends, strict=True) if end is None or end <= now]
            start += PAGE
            if len(members) < PAGE:
                break
        return self._states(found[:limit])

    def due_among(self, keys: Sequence[str], before: int) -> list[BufferState]:
        scores = self._scores(self._names.keys, keys)
        return self._states(
            [key for key, score in zip(keys, scores, strict=True) if score is not None and score <= before]
        )

    def attend(self, keys: Sequence[str], until: int) -> None:
        self._schedule(self._names.attended, dict.fromkeys(keys, until))

    def leave(self, keys: Sequence[str]) -> None:
        self._forget(self._names.attended, keys)

    def lives(self, run: str, until: int) -> None:
        self._schedule(self._names.runs, {run: until})

    def ends(self, run: str) -> None:
        self._forget(self._names.runs, [run])

    def silent(self, since: int) -> dict[str, int]:
        runs = self._one("ZRANGEBYSCORE", self._names.runs, "-inf", f"({since}")
        ends = self._scores(self._names.runs, runs)
        return {_text(run): int(end) for run, end in zip(runs, ends, strict=True) if end is not None}

    def _scores(self, index: str, members: Sequence[bytes | str]) -> list[float | None]:
        scores = self._run([Call("ZMSCORE", None, [index, *page]) for page in pages(members)])
        return [None if score is None else float(score) for score in chain.from_iterable(scores)]

    def waiting(self) -> Iterator[BufferState]:
        for page in pages(key for key, _ in self._keys_of(self._names.data)):
            yield from (state for state in self._states(page) if state.chunks)

    def _states(self, keys: Sequence[str]) -> list[BufferState]:
        of = self._names.of
        calls = [
            (
                Call("LLEN", None, [of(self._names.data, key)]),
                Call("HMGET", None, [of("stats", key), "records", "bytes", "chunks", "first"]),
            )
            for key in keys
        ]
        replies = self._run(list(chain.from_iterable(calls)), errors=True)
        now = self.now() if keys else 0
        states: list[BufferState] = []
        foreign: dict[int, bytes] = {}
        for key, chunks, stats in zip(keys, replies[::2], replies[1::2], strict=True):
            if isinstance(chunks, RedisError):  # another program's value under our name: sealing it says so
                states.append(BufferState(key, 0, 0, 0, now))
                continue
            records, size, pushed, first = (int(value or 0) for value in stats)
            if chunks > pushed:
                foreign[len(states)] = of(self._names.data, key)
            states.append(BufferState(key, records + max(0, chunks - pushed), size, chunks, first or now, records))
        # Redis can only estimate what a foreign producer pushed.
        estimates = self._run([Call("MEMORY USAGE", None, [name]) for name in foreign.values()])
        for place, estimate in zip(foreign, estimates, strict=True):
            states[place] = msgspec.structs.replace(states[place], size=max(states[place].size, estimate or 0))
        return states

    def seal(self, seals: Sequence[Seal], *, look_in: int = 0) -> list[Batch]:
        if not seals:
            return []
        of, ordered_at = self._names.of, self.now()
        # The buffer leaves the index before it is sealed: a push that begins the next buffer in between indexes it again.
        self._forget(self._names.keys, [seal.key for seal in seals])
        sealed = self._run(
            [
                Call(
                    "seal",
                    [
                        of(self._names.data, seal.key),
                        of("stats", seal.key),
                        of("batch", seal.key, seal.batch_id),
                        of("batch-meta", seal.key, seal.batch_id),
                        of("totals", seal.key),
                    ],
                    [seal.reason, ordered_at],
                )
                for seal in seals
            ],
        )
        refs = [BatchRef(seal.key, seal.batch_id) for seal, done in zip(seals, sealed, strict=True) if done]
        batches = [batch for batch in self._batches(refs) if batch is not None]
        look_at = self.now() + look_in
        # An order that arrives again may find its batch in recovery or delivered.
        self._schedule(self._names.batches, {_member(batch.ref): look_at for batch in batches if batch.state == "open"})
        return batches

    def batch(self, ref: BatchRef) -> Batch | None:
        return self._batches([ref])[0]

    def _batches(self, refs: Sequence[BatchRef]) -> list[Batch | None]:
        metas = self._run([Call("HGETALL", None, [self._names.of("batch-meta", *ref)]) for ref in refs])
        return [_batch(ref, meta) if meta else None for ref, meta in zip(refs, metas, strict=True)]

    def due_batches(self, before: int, limit: int) -> list[Batch]:
        members = self._one("ZRANGEBYSCORE", self._names.batches, "-inf", before, "LIMIT", 0, limit)
        return [batch for page in pages(members) for batch in self._in_state("open", self._names.batches, page)]

    def open_batches(self) -> Iterator[Batch]:
        members: list[bytes] = self._one("ZRANGE", self._names.batches, 0, -1)
        for page in pages(members):
            yield from self._in_state("open", self._names.batches, page)

    def _in_state(self, state: State, index: str, members: Sequence[bytes]) -> list[Batch]:
        """The batches behind an index's members; those in another state leave the index."""
        found = self._batches([_ref(member) for member in members])
        moved = [member for member, batch in zip(members, found, strict=True) if not batch or batch.state != state]
        self._forget(index, moved)
        return [batch for batch in found if batch and batch.state == state]

    def postpone(self, looks: Mapping[BatchRef, int], *, requested: bool = False) -> None:
        if requested:
            self._count_requests(looks)
        self._schedule(self._names.batches, {_member(ref): until for ref, until in looks.items()})

    def _count_requests(self, refs: Iterable[BatchRef]) -> None:
        self._run([Call("request", [self._names.of("batch-meta", *ref)], []) for ref in refs])

    def is_claimed(self, ref: BatchRef) -> bool:
        return ref in self.claimed([ref])

    def claimed(self, refs: Sequence[BatchRef]) -> set[BatchRef]:
        held = self._run([Call("EXISTS", None, [self._names.of(self._names.lock, *ref)]) for ref in refs])
        return {ref for ref, lease in zip(refs, held, strict=True) if lease}

    def claim(self, ref: BatchRef, owner: str, lease_ms: int) -> Claim | None:
        token = self._claim(ref, owner, lease_ms, 0)
        return Claim(ref, owner, token) if token else None

    def renew(self, claim: Claim, lease_ms: int) -> bool:
        return self._claim(claim.batch, claim.owner, lease_ms, claim.token) > 0

    def _claim(self, ref: BatchRef, owner: str, lease_ms: int, token: int) -> int:
        keys = [self._names.of(self._names.lock, *ref), self._names.of("batch-meta", *ref)]
        [(answer, held)] = self._run([Call("claim", keys, [owner, lease_ms, token, FORMAT])])
        if answer == b"newer":
            raise NewerFormatError(ref, held)
        return held

    def release(self, claim: Claim) -> None:
        self._run([Call("release", [self._names.of(self._names.lock, *claim.batch)], [claim.owner])])

    def fail(self, claim: Claim, error: str) -> int:
        keys = [self._names.of("batch-meta", *claim.batch), self._names.of(self._names.lock, *claim.batch)]
        keys.append(self._names.of("totals", claim.batch.key))
        [failures] = self._run([Call("fail", keys, [claim.token, error])])
        if failures:
            # A process that dies before it says when to try again leaves the time it was asked to try this time.
            if self._scores(self._names.recovery, [_member(claim.batch)]) == [None]:
                self.retry_at(claim.batch, None)
            self._forget(self._names.batches, [_member(claim.batch)])
        return failures

    def recovering(self, before: int | None = None) -> Iterator[Batch]:
        end = "+inf" if before is None else before
        members: list[bytes] = self._one("ZRANGEBYSCORE", self._names.recovery, "-inf", end)
        for page in pages(members):
            yield from self._in_state("recovery", self._names.recovery, page)

    def retry_at(self, ref: BatchRef, when: int | None, *, requested: bool = False) -> None:
        if requested:
            self._count_requests([ref])
        self._schedule(self._names.recovery, {_member(ref): "+inf" if when is None else when})

    def plan(self, ref: BatchRef, units: Sequence[tuple[int, int]]) -> Plan | None:
        [plan] = self._run([Call("plan", [self._names.of("batch-meta", *ref)], [msgspec.json.encode(units)])])
        return msgspec.json.decode(plan, type=Plan) if plan else None

    def read(self, ref: BatchRef, start: int, stop: int) -> list[bytes]:
        return self._one("LRANGE", self._names.of("batch", *ref), start, stop - 1) if stop > start else []

    def announce(self, announcements: Sequence[Announcement]) -> list[list[str] | None]:
        answers = self._run(
            [
                Call(
                    "announce",
                    [self._names.of("batch-meta", *one.claim.batch)],
                    [one.claim.token, one.unit, msgspec.json.encode(one.files), _KEEP_STRAYS, int(one.own)],
                )
                for one in announcements
            ]
        )
        for one, (answer, *_) in zip(announcements, answers, strict=True):
            if answer == b"stale":
                raise ClaimLostError(one.claim)
        return [None if answer == b"contested" else [_text(stray) for stray in strays] for answer, *strays in answers]

    def announced(self, ref: BatchRef, unit: int) -> Mapping[str, str] | None:
        files = self._one("HGET", self._names.of("batch-meta", *ref), f"files:{unit}")
        return None if files is None else msgspec.json.decode(files, type=dict[str, str])

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
        of, ref = self._names.of, claim.batch
        keys = [of("batch-meta", *ref), of("batch", *ref), of(self._names.lock, *ref)]
        keys += [of(self._names.dlq, ref.key), of("totals", ref.key)]
        args = [claim.token, unit, units, rows, rejected, len(files), sum(files), *dead_letters]
        [reply] = self._run([Call("acknowledge", keys, args)])
        answer = _text(reply)
        if answer == "stale":
            raise ClaimLostError(claim)
        if answer == "complete":
            self._run(
                [Call("ZREM", None, [index, _member(ref)]) for index in (self._names.batches, self._names.recovery)]
            )
        return cast(Literal["complete", "marked", "repeated"], answer)

    def dead_letters(self, key: str, start: int = 0, stop: int | None = None) -> list[bytes]:
        return self._one("LRANGE", self._names.of(self._names.dlq, key), start, -1 if stop is None else stop - 1)

    def dead_letter_keys(self) -> Iterator[tuple[str, int]]:
        yield from self._values_of(self._names.dlq, "LLEN")

    def totals(self) -> Iterator[tuple[str, Totals]]:
        for key, values in self._values_of("totals", "HMGET", "accepted", "rows", "dead_letters", "discarded"):
            accepted, rows, dead_letters, discarded = (int(value or 0) for value in values)
            yield key, Totals(accepted, rows, dead_letters, discarded)

    def deliveries(self) -> Iterator[tuple[str, Deliveries]]:
        for key, values in self._values_of("totals", "HGETALL"):
            found = {_text(name): int(value) for name, value in values.items()}
            sealed = {name[7:]: value for name, value in found.items() if name.startswith("sealed:")}
            numbers = [found.get(name, 0) for name in ("files", "file_bytes", "units", "delivery_ms", "failures")]
            yield key, Deliveries(*numbers, sealed=sealed)

    def _values_of(self, prefix: str, command: str, *args: str) -> Iterator[tuple[str, Any]]:
        """A command's reply for every key that has something under a prefix, a page per round trip."""
        for page in pages(self._keys_of(prefix)):
            replies = self._run([Call(command, None, [name, *args]) for _, name in page])
            yield from zip((key for key, _ in page), replies, strict=True)

    def _keys_of(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        for name in self._server.names(f"{glob(prefix)}:{{*"):
            key = self._names.key_of(name, prefix)
            if key is not None:
                yield key, name

    def reconcile(self, budget_ms: int) -> int:
        # The first pass of a process is the one that finds what an outage left; the rest keeps an eye on it.
        end = time.monotonic() + max(budget_ms, 0 if self._server.walked else FIRST_PASS_MS) / 1000
        adopted = 0
        for names in self._server.walk_lists():
            adopted += self._adopt(names)
            if time.monotonic() >= end:
                break
        return adopted

    def _adopt(self, names: Sequence[bytes]) -> int:
        """Index what is not; returns how many. Costs one look per list, and more only for what is news."""
        keys = [key for name in names if (key := self._names.key_of(name, self._names.data)) is not None]
        of = self._names.of
        looks = self._scores(self._names.keys, keys)
        lengths = self._run([Call("LLEN", None, [of(self._names.data, key)]) for key in keys])
        pushed = self._run([Call("HGET", None, [of("stats", key), "chunks"]) for key in keys])
        news = [
            key
            for key, look, length, counted in zip(keys, looks, lengths, pushed, strict=True)
            if look is None or (look > 0 and length > int(counted or 0))
        ]
        index = self._names.keys
        adopted: int = sum(
            self._run(
                [
                    Call("ZADD", None, [index, "LT", 0 if self._is_full(state) else state.first, state.key])
                    for state in self._states(news)
                ]
            )
        )
        return adopted + self._adopt_batches(names)

    def _adopt_batches(self, names: Sequence[bytes]) -> int:
        refs = [BatchRef(*found) for name in names if (found := self._names.batch_of(name, "batch"))]
        members = [_member(ref) for ref in refs]
        indexed = zip(
            refs, self._scores(self._names.batches, members), self._scores(self._names.recovery, members), strict=True
        )
        unknown = [ref for ref, look, attempt in indexed if look is None and attempt is None]
        calls: list[Call] = []
        for batch in filter(None, self._batches(unknown)):
            if batch.state == "open":
                calls.append(Call("ZADD", None, [self._names.batches, "NX", batch.sealed_at, _member(batch.ref)]))
            elif batch.state == "recovery":
                calls.append(Call("ZADD", None, [self._names.recovery, "NX", "+inf", _member(batch.ref)]))
        return sum(self._run(calls))

    def _is_full(self, state: BufferState) -> bool:
        return state.records >= self._full_records or state.size >= self._full_bytes

    def close(self) -> None:
        self._thread.shutdown()
        self._server.close()

    def _schedule(self, index: str, looks: Mapping[str, int | str]) -> None:
        """When members of an index are looked at next."""
        self._run(
            [
                Call("schedule", [index], [*chain.from_iterable((look, member) for member, look in page)])
                for page in pages(looks.items())
            ]
        )

    def _forget(self, index: str, members: Iterable[bytes | str]) -> None:
        self._run([Call("ZREM", None, [index, *page]) for page in pages(members)])


def _member(ref: BatchRef) -> str:
    return f"{ref.id}:{ref.key}"


def _ref(member: bytes) -> BatchRef:
    batch_id, _, key = _text(member).partition(":")
    return BatchRef(key, batch_id)


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _batch(ref: BatchRef, meta: dict[bytes, bytes]) -> Batch:
    fields = {_text(name): value for name, value in meta.items()}
    plan = fields.get("plan")
    return Batch(
        key=ref.key,
        id=ref.id,
        state=cast(State, _text(fields["state"])),
        reason=_text(fields["reason"]),
        sealed_at=int(fields["sealed_at"]),
        first=int(fields["first"]),
        chunks=int(fields["chunks"]),
        records=int(fields["records"]),
        size=int(fields["bytes"]),
        counted=fields["chunks"] == fields["pushed_chunks"],
        token=int(fields["token"]),
        requests=int(fields["requests"]),
        units_done=frozenset(int(name[5:]) for name in fields if name.startswith("unit:")),
        rows=int(fields["rows"]),
        dead_letters=int(fields["dead_letters"]),
        plan=msgspec.json.decode(plan, type=Plan) if plan else None,
        failures=int(fields.get("failures", 0)),
        failed_at=int(fields.get("failed_at", 0)),
        failed_token=int(fields.get("failed_token", 0)),
        error=_text(fields.get("error", b"")),
        format=int(fields.get("format", 1)),
    )
