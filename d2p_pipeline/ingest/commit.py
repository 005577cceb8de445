"""Group commit: all requests that wait in one turn of the event loop share one round trip to the buffer.

While one commit is under way the next group gathers, so the group grows with the load and the time a request waits does not.
A request is answered after its commit: everything of it is stored, or nothing.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import msgspec

from d2p_pipeline.buffer.protocol import Buffer, Push
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter

CHUNK_BYTES = 1 << 20
"""Raw bytes after which a key's lines go on in another chunk, so that units can be cut evenly."""


@dataclass
class Request:
    """What one request brings: canonical lines and dead letters by key."""

    lines: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])
    dead_letters: dict[str, list[DeadLetter]] = field(default_factory=dict[str, list[DeadLetter]])


class GroupCommit:
    """Commits requests to a buffer in groups; one per event loop."""

    def __init__(self, buffer: Buffer, *, window: int, keep_dead_letters: bool) -> None:
        self._buffer = buffer
        self._window = window
        self._keep_dead_letters = keep_dead_letters
        self._waiting: list[tuple[Request, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "d2p-commit")
        self._producer = os.urandom(8).hex()
        self._sequence = 0

    async def store(self, request: Request) -> None:
        """Return when the buffer has the whole request; raises what the buffer raises, with nothing of it stored."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._running is None:
            self._running = asyncio.create_task(self._commit_all())
        await done

    async def _commit_all(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # let every request of this turn join
        while self._waiting:
            group, self._waiting = self._waiting, []
            commit = loop.run_in_executor(self._thread, self._commit, [request for request, _ in group])
            [outcome] = await asyncio.gather(commit, return_exceptions=True)
            for _, done in group:
                if done.done():  # its client went away
                    continue
                if outcome is None:
                    done.set_result(None)
                else:
                    done.set_exception(outcome)
        self._running = None

    def _commit(self, requests: Sequence[Request]) -> None:
        self._sequence += 1
        name = f"{self._producer}-{self._sequence}"
        self._buffer.push(list(pushes(requests, name, self._window, keep_dead_letters=self._keep_dead_letters)))

    async def close(self) -> None:
        """Finish what waits."""
        if self._running:
            await self._running
        self._thread.shutdown()


def pushes(requests: Sequence[Request], name: str, window: int, *, keep_dead_letters: bool) -> Iterator[Push]:
    """The pushes of a group: per key its lines in chunks of about `CHUNK_BYTES`, and its dead letters."""
    lines: dict[str, list[bytes]] = {}
    dead_letters: dict[str, list[DeadLetter]] = {}
    for request in requests:
        for key, some in request.lines.items():
            lines.setdefault(key, []).extend(some)
        for key, letters in request.dead_letters.items():
            dead_letters.setdefault(key, []).extend(letters)
    now = time.time_ns() // 1_000_000
    for key, every in lines.items():
        for number, part in enumerate(_parts(every)):
            size = sum(map(len, part)) + len(part)
            yield Push(key, f"{name}-{number}", window, chunk.encode(part, now), len(part), size)
    number = count()
    for key, letters in dead_letters.items():
        kept = [msgspec.structs.replace(letter, id=f"{name}-{next(number)}").to_json() for letter in letters]
        yield Push(key, f"{name}-dead", window, rejected=len(letters), dead_letters=kept if keep_dead_letters else [])


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
