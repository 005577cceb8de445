"""Group commit: all requests that wait in one turn of the event loop share one round trip to the buffer.

While one commit is under way the next group gathers, so the group grows with the load and the time a request waits does not.
A request is answered after its commit: everything of it is stored, or nothing.
"""

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from d2p_pipeline.buffer.protocol import Buffer, ForeignValueError, PartlyStoredError, Push
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter, log_unkept

if TYPE_CHECKING:
    from d2p_pipeline.ingest.pressure import Pressure

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Raw bytes after which a key's lines go on in another chunk, so that units can be cut evenly."""
GROUP_BYTES = 8 << 20
"""Raw bytes after which a group takes no further request, so that small requests do not wait for many large ones."""
SMALL_BYTES = 256 << 10
"""Raw bytes that are packed between other requests; more of them in a thread of the commits' own."""
MOST = 0.8
"""The part of the requests that came together before for which a commit waits, within `LONGEST_PATIENCE`."""
LONGEST_PATIENCE = 0.004
"""Seconds that a request may wait for others to share its commit, however long commits take."""


class Packed(NamedTuple):
    """A chunk that is ready, with its number of records and their raw bytes."""

    chunk: bytes
    records: int
    size: int


Done = Callable[[Exception | None], None]
"""Told once whether a request was stored, or why nothing of it was. Raises nothing."""


@dataclass
class Request:
    """What one request brings: canonical lines and dead letters by key; of a large one, full chunks too.

    One with an `id` is stored once, however often it comes within the window; it shares chunks with no other.
    """

    id: str = ""
    lines: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])
    dead_letters: dict[str, list[DeadLetter]] = field(default_factory=dict[str, list[DeadLetter]])
    packed: dict[str, list[Packed]] = field(default_factory=dict[str, list[Packed]])
    size: int = 0
    """Raw bytes, as far as they were counted."""

    @property
    def keys(self) -> set[str]:
        return {*self.lines, *self.dead_letters, *self.packed}

    def sizes(self) -> Counter[str]:
        """Raw bytes of good records, by key."""
        sizes = Counter({key: sum(map(len, lines)) + len(lines) for key, lines in self.lines.items()})
        for key, packed in self.packed.items():
            sizes[key] += sum(part.size for part in packed)
        return sizes

    def pack(self) -> None:
        """Make chunks of all lines that fill some. Where they are cut depends on the lines alone."""
        now = time.time_ns() // 1_000_000
        for key, lines in self.lines.items():
            *full, last = _parts(lines)
            if full:
                self.packed.setdefault(key, []).extend(_packed(part, now) for part in full)
                self.lines[key] = last


class GroupCommit:
    """Commits requests to a buffer in groups; one per event loop.

    `observe` is told requests and seconds of each commit, and whether it failed.
    """

    def __init__(
        self,
        buffer: Buffer,
        *,
        window: int,
        keep_dead_letters: bool,
        pressure: "Pressure | None" = None,
        observe: Callable[[int, float, bool], None] = lambda requests, seconds, failed: None,
    ) -> None:
        self._buffer = buffer
        self._window = window
        self._keep_dead_letters = keep_dead_letters
        self._pressure = pressure
        self._observe = observe
        self._waiting: deque[tuple[Request, Done]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._concurrency = 1.0
        self._seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Not one of the event loop's, which may all be busy with bodies, probes and metrics.
        self._thread = ThreadPoolExecutor(1, "d2p-commit")
        self._producer = os.urandom(8).hex()
        self._sequence = count()

    async def store(self, request: Request) -> None:
        """Return when the buffer has the whole request; raises what the buffer raises, with nothing of it stored."""
        if self._pressure:
            await self._pressure.admit(request)
        stored = asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:
            if stored.done():  # whoever waited went away
                return
            if error:
                stored.set_exception(error)
            else:
                stored.set_result(None)

        self._add(request, done)
        await stored

    @property
    def takes_at_once(self) -> bool:
        """Whether `submit` may be used; else `store`."""
        return self._pressure is None or self._pressure.is_known

    def submit(self, request: Request, done: "Done") -> None:
        """`store` without a wait: `done` is called with None or the error. Raises if there is no room."""
        if self._pressure:
            self._pressure.admit_now(request)
        self._add(request, done)

    def _add(self, request: Request, done: "Done") -> None:
        self._waiting.append((request, done))
        if self._running is None:
            self._start_if_worth()

    def _start_if_worth(self) -> None:
        """Begin a commit when most of those who are to be expected wait, or they do not come soon.

        Without this, the first to come back after a commit would get one of its own, for which all others had to wait.
        """
        if len(self._waiting) >= self._concurrency * MOST:
            self._start()
        elif self._timer is None:
            patience = min(self._seconds, LONGEST_PATIENCE)
            self._timer = asyncio.get_running_loop().call_later(patience, self._start)

    def _start(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._waiting and self._running is None:
            self._running = asyncio.create_task(self._commit_group())

    async def _commit_group(self) -> None:
        await asyncio.sleep(0)  # let every request of this turn join
        group = self._group()
        started = time.perf_counter()
        outcomes = await self._commit([request for request, _ in group])
        self._seconds = time.perf_counter() - started
        self._observe(len(group), self._seconds, any(outcomes))
        for (request, done), error in zip(group, outcomes, strict=True):
            if error is None and self._pressure:
                self._pressure.added(request)
            try:
                done(error)
            except Exception:  # else nobody would be answered any more
                log.exception("whoever waited for a commit could not be told of it")
        self._running = None
        self._concurrency = max(len(group) + len(self._waiting), self._concurrency * 0.8)
        if self._waiting:
            self._start_if_worth()

    def _group(self) -> list[tuple[Request, "Done"]]:
        group: list[tuple[Request, Done]] = []
        size = 0
        while self._waiting and size < GROUP_BYTES:
            group.append(self._waiting.popleft())
            size += group[-1][0].size
        return group

    async def _commit(self, requests: Sequence[Request]) -> list[Exception | None]:
        """Store requests; what became of each."""
        name = f"{self._producer}-{next(self._sequence)}"
        outcomes: list[Exception | None] = [None] * len(requests)
        try:
            if sum(request.size for request in requests) <= SMALL_BYTES:
                await self._buffer.push_async(self._pushes(requests, name))
            else:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._push, requests, name)
        except PartlyStoredError as error:
            outcomes = [error.of(request.keys) for request in requests]
        except ForeignValueError as error:
            # Nothing was stored, and most requests have no part in it.
            return [error] if len(requests) == 1 else [(await self._commit([request]))[0] for request in requests]
        except Exception as error:  # noqa: BLE001  # it is everybody's who waits
            return [error] * len(requests)
        if not self._keep_dead_letters:
            for request, error in zip(requests, outcomes, strict=True):
                for key, letters in request.dead_letters.items() if error is None else ():
                    log_unkept(key, letters)
        return outcomes

    def _push(self, requests: Sequence[Request], name: str) -> None:
        self._buffer.push(self._pushes(requests, name))

    def _pushes(self, requests: Sequence[Request], name: str) -> list[Push]:
        return list(pushes(requests, name, self._window, keep_dead_letters=self._keep_dead_letters))

    async def close(self) -> None:
        """Finish what waits."""
        while self._waiting or self._running:
            self._start()
            if self._running:
                await self._running
        self._thread.shutdown()
        await self._buffer.end_async()


def pushes(requests: Sequence[Request], name: str, window: int, *, keep_dead_letters: bool) -> Iterator[Push]:
    """The pushes of a group: per key its lines in chunks of about `CHUNK_BYTES`, and its dead letters."""
    yield from _pushes([request for request in requests if not request.id], name, window, keep_dead_letters)
    for request in requests:
        if request.id:
            yield from _pushes([request], request.id, window, keep_dead_letters)


def _pushes(requests: Sequence[Request], name: str, window: int, keep_dead_letters: bool) -> Iterator[Push]:
    lines: dict[str, list[bytes]] = {}
    ready: dict[str, list[Packed]] = {}
    dead_letters: dict[str, list[DeadLetter]] = {}
    for request in requests:
        for key, some in request.lines.items():
            lines.setdefault(key, []).extend(some)
        for key, packed in request.packed.items():
            ready.setdefault(key, []).extend(packed)
        for key, letters in request.dead_letters.items():
            dead_letters.setdefault(key, []).extend(letters)
    now = time.time_ns() // 1_000_000
    for key, every in lines.items():
        some = (*ready.get(key, ()), *(_packed(part, now) for part in _parts(every)))
        for number, part in enumerate(some):
            yield Push(key, f"{name}-{number}", window, *part)
    number = count()
    for key, letters in dead_letters.items():
        kept = [msgspec.structs.replace(letter, id=f"{name}-{next(number)}").to_json() for letter in letters]
        yield Push(key, f"{name}-dead", window, rejected=len(letters), dead_letters=kept if keep_dead_letters else [])


def _packed(lines: list[bytes], now: int) -> Packed:
    return Packed(chunk.encode(lines, now), len(lines), sum(map(len, lines)) + len(lines))


def _parts(lines: list[bytes]) -> Iterator[list[bytes]]:
    if sum(map(len, lines)) + len(lines) <= CHUNK_BYTES:
        yield lines
        return
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and size + len(line) + 1 > CHUNK_BYTES:
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
    yield part
