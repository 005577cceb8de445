"""The buffer in Redis: the protocol's steps as Lua scripts, and two indexes that are hints.

A step that changes something is one script on one key's slot, so it happens whole or not at all, and Redis Cluster works. The
indexes (`keys`, `batches`: sorted sets by the time of the next look) live in other slots and are written beside the scripts;
what they miss because a process died in between, or because a foreign producer never wrote them, `reconcile` finds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import msgspec
from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import (
    Announcement,
    Batch,
    BatchRef,
    BufferFullError,
    BufferState,
    BufferUnavailableError,
    Claim,
    ClaimLostError,
    Push,
    Seal,
    State,
    Totals,
)

Client = Redis | RedisCluster
_T = TypeVar("_T")
Plan = tuple[tuple[int, int], ...]

_SCRIPTS = {path.stem: path.read_text() for path in (Path(__file__).parent / "scripts").glob("*.lua")}
_UNAVAILABLE = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, ClusterDownError)
_KEEP_STRAYS = 7 * 24 * 3600
"""Seconds that the announcements of a batch outlive it where its attempts announced different files."""
_PAGE = 1000
"""Members or keys per round trip of whatever walks through many of them."""


class _Call(NamedTuple):
    """One script call, or one plain command when `keys` is None."""

    name: str
    keys: Sequence[bytes | str] | None
    args: Sequence[Any]


class RedisBuffer:
    """A `Buffer` on a Redis server, Sentinel group or Cluster.

    `full_records` and `full_bytes` are the sizes at which a push makes its key due.
    """

    def __init__(self, client: Client, names: Names, *, full_records: int, full_bytes: int) -> None:
        self._client: Any = client  # redis-py's annotations are too loose to check against
        self._cluster = isinstance(client, RedisCluster)
        self._names = names
        self._full_records = full_records
        self._full_bytes = full_bytes
        self._cursor = 0
        self._shas: dict[str, str] = {}

    def now(self) -> int:
        seconds, micros = self._one("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def push(self, pushes: Sequence[Push]) -> None:
        of = self._names.of
        replies = self._run(
            [
                _Call(
                    "push",
                    [of(name, push.key) for name in (self._names.data, "stats", self._names.dlq, "totals")]
                    + [of("pushed", push.key, push.id)],
                    [push.window, push.records, push.size, push.chunk, push.rejected, *push.dead_letters],
                )
                for push in pushes
            ],
            atomic=True,
        )
        index: list[_Call] = []
        for push, (records, size, fresh) in zip(pushes, replies, strict=True):
            if self._fills(push, records, size):
                index.append(_schedule(self._names.keys, 0, push.key))
            elif fresh:
                index.append(_schedule(self._names.keys, self.now(), push.key))
        self._run(index)

    def _fills(self, push: Push, records: int, size: int) -> bool:
        """Whether it was this push that filled the buffer."""
        return (records >= self._full_records > records - push.records) or (size >= self._full_bytes > size - push.size)

    def check_writable(self) -> None:
        self._one("SET", "d2p:ready", 1, "EX", 10)

    def request_flush(self, keys: Iterable[str] | None = None) -> list[str]:
        states = self.waiting() if keys is None else iter(self._states(list(keys)))
        found = [state.key for state in states if state.chunks]
        self._run([_schedule(self._names.keys, 0, key) for key in found])
        return found

    def due(self, before: int, limit: int) -> list[BufferState]:
        members = self._one("ZRANGEBYSCORE", self._names.keys, "-inf", before, "LIMIT", 0, limit)
        return self._states([_text(member) for member in members])

    def waiting(self) -> Iterator[BufferState]:
        for page in _pages(key for key, _ in self._keys_of(self._names.data)):
            yield from (state for state in self._states(page) if state.chunks)

    def _states(self, keys: Sequence[str]) -> list[BufferState]:
        of = self._names.of
        calls = [
            (
                _Call("LLEN", None, [of(self._names.data, key)]),
                _Call("HMGET", None, [of("stats", key), "records", "bytes", "chunks", "first"]),
            )
            for key in keys
        ]
        replies = self._run(list(chain.from_iterable(calls)), errors=True)
        now = self.now() if keys else 0
        states: list[BufferState] = []
        for key, chunks, stats in zip(keys, replies[::2], replies[1::2], strict=True):
            if isinstance(chunks, RedisError):  # another program's value under our name: sealing it says so
                states.append(BufferState(key, 0, 0, 0, now))
                continue
            records, size, pushed, first = (int(value or 0) for value in stats)
            if chunks > pushed:  # Redis can only estimate what a foreign producer pushed
                size = max(size, self._one("MEMORY USAGE", of(self._names.data, key)) or 0)
            states.append(BufferState(key, records + max(0, chunks - pushed), size, chunks, first or now, records))
        return states

    def seal(self, seals: Sequence[Seal]) -> list[Batch]:
        if not seals:
            return []
        of = self._names.of
        # The buffer leaves the index before it is sealed: a push that begins the next buffer in between indexes it again.
        self._run([_Call("ZREM", None, [self._names.keys, seal.key]) for seal in seals])
        sealed = self._run(
            [
                _Call(
                    "seal",
                    [
                        of(self._names.data, seal.key),
                        of("stats", seal.key),
                        of("batch", seal.key, seal.batch_id),
                        of("batch-meta", seal.key, seal.batch_id),
                    ],
                    [seal.reason],
                )
                for seal in seals
            ],
        )
        refs = [BatchRef(seal.key, seal.batch_id) for seal, done in zip(seals, sealed, strict=True) if done]
        now = self.now()
        self._run([_schedule(self._names.batches, now, _member(ref)) for ref in refs])
        return [batch for batch in self._batches(refs) if batch is not None]

    def batch(self, ref: BatchRef) -> Batch | None:
        return self._batches([ref])[0]

    def _batches(self, refs: Sequence[BatchRef]) -> list[Batch | None]:
        metas = self._run([_Call("HGETALL", None, [self._names.of("batch-meta", *ref)]) for ref in refs])
        return [_batch(ref, meta) if meta else None for ref, meta in zip(refs, metas, strict=True)]

    def due_batches(self, before: int, limit: int) -> list[Batch]:
        members = self._one("ZRANGEBYSCORE", self._names.batches, "-inf", before, "LIMIT", 0, limit)
        return self._in_state("open", self._names.batches, members)

    def open_batches(self) -> Iterator[Batch]:
        members: list[bytes] = self._one("ZRANGE", self._names.batches, 0, -1)
        for page in _pages(members):
            yield from self._in_state("open", self._names.batches, page)

    def _in_state(self, state: State, index: str, members: Sequence[bytes]) -> list[Batch]:
        """The batches behind an index's members; those in another state leave the index."""
        found = self._batches([_ref(member) for member in members])
        moved = [member for member, batch in zip(members, found, strict=True) if not batch or batch.state != state]
        self._run([_Call("ZREM", None, [index, member]) for member in moved])
        return [batch for batch in found if batch and batch.state == state]

    def postpone(self, ref: BatchRef, until: int, *, requested: bool = False) -> None:
        if requested:
            self._count_request(ref)
        self._run([_schedule(self._names.batches, until, _member(ref))])

    def _count_request(self, ref: BatchRef) -> None:
        self._run([_Call("request", [self._names.of("batch-meta", *ref)], [])])

    def is_claimed(self, ref: BatchRef) -> bool:
        return bool(self._one("EXISTS", self._names.of(self._names.lock, *ref)))

    def claim(self, ref: BatchRef, owner: str, lease_ms: int) -> Claim | None:
        token = self._claim(ref, owner, lease_ms, 0)
        return Claim(ref, owner, token) if token else None

    def renew(self, claim: Claim, lease_ms: int) -> bool:
        return self._claim(claim.batch, claim.owner, lease_ms, claim.token) > 0

    def _claim(self, ref: BatchRef, owner: str, lease_ms: int, token: int) -> int:
        keys = [self._names.of(self._names.lock, *ref), self._names.of("batch-meta", *ref)]
        [(_, held)] = self._run([_Call("claim", keys, [owner, lease_ms, token])])
        return held

    def release(self, claim: Claim) -> None:
        self._run([_Call("release", [self._names.of(self._names.lock, *claim.batch)], [claim.owner])])

    def fail(self, claim: Claim, error: str) -> int:
        keys = [self._names.of("batch-meta", *claim.batch), self._names.of(self._names.lock, *claim.batch)]
        [failures] = self._run([_Call("fail", keys, [claim.token, error])])
        if failures:
            self.retry_at(claim.batch, None)
            self._run([_Call("ZREM", None, [self._names.batches, _member(claim.batch)])])
        return failures

    def recovering(self, before: int | None = None) -> Iterator[Batch]:
        end = "+inf" if before is None else before
        members: list[bytes] = self._one("ZRANGEBYSCORE", self._names.recovery, "-inf", end)
        for page in _pages(members):
            yield from self._in_state("recovery", self._names.recovery, page)

    def retry_at(self, ref: BatchRef, when: int | None, *, requested: bool = False) -> None:
        if requested:
            self._count_request(ref)
        self._run([_schedule(self._names.recovery, "+inf" if when is None else when, _member(ref))])

    def plan(self, ref: BatchRef, units: Sequence[tuple[int, int]]) -> Plan | None:
        [plan] = self._run([_Call("plan", [self._names.of("batch-meta", *ref)], [msgspec.json.encode(units)])])
        return msgspec.json.decode(plan, type=Plan) if plan else None

    def read(self, ref: BatchRef, start: int, stop: int) -> list[bytes]:
        return self._one("LRANGE", self._names.of("batch", *ref), start, stop - 1) if stop > start else []

    def announce(self, announcements: Sequence[Announcement]) -> list[list[str] | None]:
        answers = self._run(
            [
                _Call(
                    "announce",
                    [self._names.of("batch-meta", *one.claim.batch)],
                    [one.claim.token, one.unit, msgspec.json.encode(one.files), _KEEP_STRAYS],
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
        self, claim: Claim, unit: int, *, units: int, rows: int, rejected: int = 0, dead_letters: Sequence[bytes] = ()
    ) -> Literal["complete", "marked", "repeated"]:
        of, ref = self._names.of, claim.batch
        keys = [of("batch-meta", *ref), of("batch", *ref), of(self._names.lock, *ref)]
        keys += [of(self._names.dlq, ref.key), of("totals", ref.key)]
        args = [claim.token, unit, units, rows, rejected, *dead_letters]
        [reply] = self._run([_Call("acknowledge", keys, args)])
        answer = _text(reply)
        if answer == "stale":
            raise ClaimLostError(claim)
        if answer == "complete":
            self._run(
                [_Call("ZREM", None, [index, _member(ref)]) for index in (self._names.batches, self._names.recovery)]
            )
        return cast(Literal["complete", "marked", "repeated"], answer)

    def dead_letters(self, key: str, start: int = 0, stop: int | None = None) -> list[bytes]:
        return self._one("LRANGE", self._names.of(self._names.dlq, key), start, -1 if stop is None else stop - 1)

    def remove_dead_letters(self, key: str, letters: Sequence[bytes], *, discarded: bool) -> int:
        keys = [self._names.of(self._names.dlq, key), self._names.of("totals", key)]
        [removed] = self._run([_Call("remove", keys, [int(discarded), *letters])])
        return removed

    def dead_letter_keys(self) -> Iterator[tuple[str, int]]:
        for key, name in self._keys_of(self._names.dlq):
            yield key, self._one("LLEN", name)

    def totals(self) -> Iterator[tuple[str, Totals]]:
        for key, name in self._keys_of("totals"):
            values = self._one("HMGET", name, "accepted", "rows", "dead_letters", "discarded")
            accepted, rows, dead_letters, discarded = (int(value or 0) for value in values)
            yield key, Totals(accepted, rows, dead_letters, discarded)

    def _keys_of(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        names: Iterator[bytes] = self._client.scan_iter(match=f"{_glob(prefix)}:{{*", count=_PAGE)
        while page := self._guard(lambda: list(islice(names, _PAGE))):
            for name in page:
                key = self._names.key_of(name, prefix)
                if key is not None:
                    yield key, name

    def reconcile(self, steps: int = 1) -> int:
        return sum(self._adopt(names) for names in self._scan_lists(steps))

    def _scan_lists(self, steps: int) -> Iterator[list[bytes]]:
        """Pages of list names; on a single server each call goes on where the last one stopped."""
        if self._cluster:
            yield list(self._client.scan_iter(count=_PAGE, _type="list"))
            return
        for _ in range(steps):
            self._cursor, names = self._one("SCAN", self._cursor, "COUNT", _PAGE, "TYPE", "list")
            yield names
            if not self._cursor:
                return

    def _adopt(self, names: Sequence[bytes]) -> int:
        keys = [key for name in names if (key := self._names.key_of(name, self._names.data)) is not None]
        states = self._states(keys)
        refs = [BatchRef(*found) for name in names if (found := self._names.batch_of(name, "batch"))]
        calls = [
            _Call("ZADD", None, [self._names.keys, "LT", 0 if self._is_full(state) else state.first, state.key])
            for state in states
        ]
        batches = [batch for batch in self._batches(refs) if batch]
        calls += [
            _Call("ZADD", None, [self._names.batches, "NX", batch.sealed_at, _member(batch.ref)])
            for batch in batches
            if batch.state == "open"
        ]
        calls += [
            _Call("ZADD", None, [self._names.recovery, "NX", "+inf", _member(batch.ref)])
            for batch in batches
            if batch.state == "recovery"
        ]
        return sum(self._run(calls))

    def _is_full(self, state: BufferState) -> bool:
        return state.records >= self._full_records or state.size >= self._full_bytes

    def close(self) -> None:
        self._client.close()

    # -- transport ----------------------------------------------------------------------------------------------------

    def _one(self, command: str, *args: Any) -> Any:
        return self._run([_Call(command, None, args)])[0]

    def _run(self, calls: Sequence[_Call], *, atomic: bool = False, errors: bool = False) -> list[Any]:
        """Send calls in one round trip; `atomic`: all or nothing, where they share a server; `errors`: return them."""
        if not calls:
            return []
        replies = self._guard(lambda: self._send(calls, atomic))
        if any(isinstance(reply, NoScriptError) for reply in replies):
            self._load()
            replies = self._guard(lambda: self._send(calls, atomic))
        for reply in replies:
            if isinstance(reply, Exception) and not errors:
                raise _translate(reply) from reply
        return replies

    def _send(self, calls: Sequence[_Call], atomic: bool) -> list[Any]:
        if not self._shas:
            self._load()
        pipe = self._client.pipeline(transaction=atomic and not self._cluster)
        for call in calls:
            if call.keys is None:
                pipe.execute_command(*call.name.split(" "), *call.args)
            else:
                pipe.execute_command("EVALSHA", self._shas[call.name], len(call.keys), *call.keys, *call.args)
        return pipe.execute(raise_on_error=False)

    def _load(self) -> None:
        self._shas = {name: self._client.script_load(text) for name, text in _SCRIPTS.items()}

    def _guard(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except RedisError as error:
            raise _translate(error) from error


def _translate(error: Exception) -> Exception:
    # Inside a script or a transaction the error arrives as text.
    if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM command" in str(error)):
        return BufferFullError("Redis is out of memory (maxmemory reached); nothing was stored, try again later")
    if isinstance(error, _UNAVAILABLE) or "MISCONF" in str(error):
        return BufferUnavailableError(f"Redis does not take the request: {error}")
    return error


def _pages(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while page := list(islice(iterator, _PAGE)):
        yield page


def _schedule(index: str, score: int | str, member: bytes | str) -> _Call:
    return _Call("schedule", [index], [score, member])


def _member(ref: BatchRef) -> str:
    return f"{ref.id}:{ref.key}"


def _ref(member: bytes) -> BatchRef:
    batch_id, _, key = _text(member).partition(":")
    return BatchRef(key, batch_id)


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _glob(prefix: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]\\^" else char for char in prefix)


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
    )
