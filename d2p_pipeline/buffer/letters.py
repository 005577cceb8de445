"""Dead letters in Redis: each key's queue, what is known of the files it was spilled to, and the replay under way.

A letter's place is its index in the queue or in a file. The queue only grows at its end, so places hold until letters are
taken out or spilled; each such step raises the key's `version`, and is refused under an older one. A replay pushes to other
keys, in other slots, so it cannot be one step: it is written down first (`intend`), then carried out, then ended by `take`.
Until then no other step changes the key's letters, and anybody may carry it out again, because its pushes have ids.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from d2p_pipeline.buffer.names import Names, glob
from d2p_pipeline.buffer.protocol import Push
from d2p_pipeline.buffer.server import PAGE, Call, Server

BUSY_MS = 60_000
"""How long after its last sign of life a replay or discard is taken for ended by whoever would spill."""


class LettersMovedError(Exception):
    """A key's letters are not where they were read: another replay, discard or spill was quicker. Nothing was changed."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(
            f"the dead letters of key {key!r} are being worked on by another replay, discard or spill; what was done so far "
            "stays done: run it again for the rest"
        )


class SpilledFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of letters. Times are those at which its letters were received, in ms."""

    name: str
    letters: int
    size: int
    first: int
    last: int
    order: int
    """Grows with each file of the key."""
    left: int = 0
    """Letters that are neither replayed nor discarded; not part of what is stored."""


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """A replay of letters in a file, or in the queue if `file` is empty."""

    id: str
    file: str
    places: Sequence[int]
    pushes: Sequence[Push]


class Letters(msgspec.Struct, frozen=True):
    """Where a key's letters are: `length` of them in the queue."""

    key: str
    version: int
    length: int
    files: tuple[SpilledFile, ...]
    intent: Intent | None


class Look(NamedTuple):
    """A key's rows and rejected records at a time (ms)."""

    time: int
    rows: int
    rejected: int


class LetterQueues:
    """The dead letters of all keys."""

    def __init__(self, server: Server, names: Names) -> None:
        self._run, self._one, self._find = server.run, server.one, server.names
        self._names = names

    def keys(self) -> list[str]:
        """Keys that have letters in a queue or in files."""
        found: dict[str, None] = {}
        for prefix in (self._names.dlq, self._prefix("files")):
            for name in self._find(f"{glob(prefix)}:{{*"):
                key = self._names.key_of(name, prefix)
                if key is not None:
                    found[key] = None
        return sorted(found)

    def letters(self, key: str) -> Letters:
        """Where the key's letters are now."""
        # The version first: what changes meanwhile is refused later.
        version = int(self._one("HGET", self._name("state", key), "version") or 0)
        body = self._one("HGET", self._name("intent", key), "body")
        entries: list[bytes] = self._one("HVALS", self._name("files", key))
        stored = [msgspec.json.decode(entry, type=SpilledFile) for entry in entries]
        gone = self._run([Call("BITCOUNT", None, [self._gone(key, file.name)]) for file in stored])
        files = [
            msgspec.structs.replace(file, left=file.letters - count) for file, count in zip(stored, gone, strict=True)
        ]
        return Letters(
            key,
            version,
            self._one("LLEN", self._queue(key)),
            tuple(sorted(files, key=lambda file: file.order)),
            msgspec.msgpack.decode(body, type=Intent) if body else None,
        )

    def size(self, key: str) -> int:
        """Bytes that the queue takes in Redis, estimated."""
        return self._one("MEMORY USAGE", self._queue(key)) or 0

    def read(self, key: str, start: int, stop: int) -> list[bytes]:
        """Letters `start` to `stop` (exclusive) of the queue."""
        return self._one("LRANGE", self._queue(key), start, stop - 1) if stop > start else []

    def gone(self, key: str, file: str) -> bytes:
        """One bit per letter of a file, from the highest of the first byte on: set where the letter is gone."""
        return self._one("GET", self._gone(key, file)) or b""

    def intend(self, key: str, version: int, intent: Intent) -> None:
        """Write down a replay; raises LettersMovedError."""
        body = msgspec.msgpack.encode(intent)
        keys = [self._name("state", key), self._name("intent", key)]
        [answer] = self._run([Call("intend", keys, [intent.id, version, body])])
        if answer != b"intended":
            raise LettersMovedError(key)

    def end(self, key: str, intent: Intent) -> None:
        """Take out the letters of a replay whose pushes are stored."""
        self._take(key, intent.id, "replayed", 0, intent.file, intent.places)

    def discard(self, key: str, version: int, step: str, file: str, places: Sequence[int]) -> int:
        """Take letters out for good; returns how many were there. Raises LettersMovedError. `step` is this call's id."""
        return self._take(key, step, "discarded", version, file, places)

    def _take(self, key: str, step: str, fate: str, version: int, file: str, places: Sequence[int]) -> int:
        keys = [self._queue(key), self._totals(key), self._name("intent", key), self._gone(key, file)]
        keys.append(self._name("state", key))
        args = [step, fate, version, "file" if file else "queue", *places]
        [(answer, taken)] = self._run([Call("take", keys, args)])
        if answer != b"taken":
            raise LettersMovedError(key)
        return taken

    def spill(self, key: str, version: int, file: SpilledFile) -> None:
        """Let go of the queue's oldest letters, which are durable in `file`; raises LettersMovedError."""
        keys = [self._queue(key), self._name("state", key), self._name("intent", key), self._name("files", key)]
        args = [file.name, version, msgspec.json.encode(msgspec.structs.replace(file, left=0)), file.letters]
        [answer] = self._run([Call("spill", keys, args)])
        if answer != b"spilled":
            raise LettersMovedError(key)

    def forget(self, key: str, file: SpilledFile) -> None:
        """Forget a file that has been removed, all of its letters being gone."""
        keys = [self._name("files", key), self._gone(key, file.name)]
        self._run([Call("forget", keys, [file.name, file.letters])])

    def busy(self, key: str) -> None:
        """Ask those who would spill to wait: a replay or discard goes through the key's letters."""
        # A hint: that Redis is out of memory must not keep anybody from discarding.
        self._run([Call("SET", None, [self._name("busy", key), 1, "PX", BUSY_MS])], errors=True)

    def idle(self, key: str) -> None:
        """The replay or discard has ended."""
        self._one("DEL", self._name("busy", key))

    def is_busy(self, key: str) -> bool:
        return bool(self._one("EXISTS", self._name("busy", key)))

    def outcomes(self) -> Iterator[tuple[str, int, int, list[Look]]]:
        """Every key's rows ever written and records ever rejected, neither of which ever falls, and earlier looks at them."""
        names = [
            (key, name) for name in self._find("totals:{*") if (key := self._names.key_of(name, "totals")) is not None
        ]
        for start in range(0, len(names), PAGE):
            page = names[start : start + PAGE]
            replies = self._run([Call("HMGET", None, [name, "rows", "rejected"]) for _, name in page])
            every = self._run([Call("GET", None, [self._names.of("looks", key)]) for key, _ in page])
            for (key, _), (rows, rejected), looks in zip(page, replies, every, strict=True):
                yield key, int(rows or 0), int(rejected or 0), msgspec.json.decode(looks or b"[]", type=list[Look])

    def remember(self, key: str, looks: Sequence[Look]) -> None:
        """Keep looks, oldest first, in place of the earlier ones."""
        # A look that is not kept, for want of memory in Redis, costs nothing but the precision of later ones.
        self._run([Call("SET", None, [self._names.of("looks", key), msgspec.json.encode(looks)])], errors=True)

    def _queue(self, key: str) -> bytes:
        return self._names.of(self._names.dlq, key)

    def _totals(self, key: str) -> bytes:
        return self._names.of("totals", key)

    def _prefix(self, what: str) -> str:
        return f"{self._names.dlq}-{what}"

    def _name(self, what: str, key: str) -> bytes:
        return self._names.of(self._prefix(what), key)

    def _gone(self, key: str, file: str) -> bytes:
        return self._names.of(self._prefix("gone"), key, file or "queue")
