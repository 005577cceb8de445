"""What people do with dead letters: look at them, replay them, throw them away, wherever they lie.

Letters lie in their key's queue in Redis, the oldest ones perhaps in files beside the data. A replay is written down before
it begins, pushes its records as any producer does, and only then takes its letters out; whoever comes after a process that
died in between carries the same replay out, and its pushes arrive once. A record that is rejected again stays a dead letter
with its history, so nothing loops. Everything goes page by page, in bounded memory.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import get_args

import msgspec
from ulid import ULID

from d2p_pipeline import spill
from d2p_pipeline.buffer.letters import Intent, LettersMovedError
from d2p_pipeline.buffer.protocol import Push
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.parquet.store import Store
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected, Stage

REPLAY_WINDOW = 7 * 24 * 3600
"""Seconds in which a replay carried out twice stores its records once."""
MOST_GROUPS = 10_000
"""Groups that `count` tells apart; what comes beyond is counted per key and stage."""
OTHER_REASONS = "other reasons"
_PAGE_LETTERS = 500
_PAGE_BYTES = 2 << 20
"""A page ends when it has so many bytes."""
_READ = 100
"""Letters per round trip, before anybody knows how large they are."""

Canonical = Callable[[bytes], tuple[str, bytes]]
"""From a record to its key and its canonical line; raises Rejected."""
Mend = Callable[[DeadLetter], bytes | None]
"""From a letter to the record to send in its stead; None leaves the letter where it is. Raises Rejected."""


class MendError(Exception):
    """The user's function for mending records cannot be used: `name` is `module:function`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class Selection:
    """Which dead letters: of these keys (none: all), whose reason contains a text, rejected at a stage, received in a time (ms,
    both ends included)."""

    keys: tuple[str, ...] = ()
    reason: str = ""
    stage: str = ""
    since: int = 0
    until: int = 1 << 62

    @classmethod
    def of(
        cls, keys: Iterable[str], reason: str = "", stage: str = "", since: str = "", until: str = ""
    ) -> "Selection":
        """As people write it: times are ISO 8601, UTC where they name no offset. ValueError names what is wrong."""
        if stage not in ("", *get_args(Stage)):
            raise ValueError(f"stage {stage!r} is none of {', '.join(get_args(Stage))}")
        first, last = _moment("since", since), _moment("until", until)
        everything = cls()
        return cls(
            tuple(keys),
            reason,
            stage,
            everything.since if first is None else first,
            everything.until if last is None else last,
        )

    def takes(self, letter: DeadLetter) -> bool:
        return (
            self.reason in letter.reason
            and self.stage in ("", letter.stage)
            and self.since <= letter.received_at <= self.until
        )


@dataclass(frozen=True)
class Stored:
    """A dead letter where it lies: its place in the queue, or in a file."""

    key: str
    file: str
    place: int
    data: bytes
    letter: DeadLetter


@dataclass
class Group:
    """Letters alike; times in ms."""

    letters: int = 0
    first: int = 1 << 62
    last: int = 0
    sample: DeadLetter | None = None


@dataclass
class Outcome:
    """What became of the letters selected. Those `left` were left by the user's function."""

    selected: int = 0
    replayed: int = 0
    discarded: int = 0
    left: int = 0
    rejected_again: Counter[str] = field(default_factory=Counter[str])


@dataclass
class Page:
    """Selected letters that lie together, and the version of their key's letters under which they were read."""

    version: int
    letters: list[Stored]
    taken: int | None = None
    """How many of them were taken out, by the one step that may be made; to be filled in by who makes it."""


class DeadLetters:
    """All dead letters of a buffer. `store` opens the files' store when there are files.

    Methods raise what the buffer and the store raise, and LettersMovedError.
    """

    def __init__(self, buffer: RedisBuffer, store: Callable[[], Store]) -> None:
        self._buffer = buffer
        self._queues = buffer.letters
        self._open_store = store

    @cached_property
    def _store(self) -> Store:
        return self._open_store()

    def select(self, selection: Selection) -> Iterator[Stored]:
        """The letters selected, oldest first per key."""
        for key in self._keys(selection):
            for page in self._pages(key, selection):
                yield from page.letters

    def count(self, selection: Selection) -> dict[tuple[str, str, str], Group]:
        """Letters by key, stage and reason, the largest group first; with the oldest one of each."""
        groups: dict[tuple[str, str, str], Group] = {}
        for stored in self.select(selection):
            name = (stored.key, stored.letter.stage, stored.letter.reason)
            if name not in groups and len(groups) >= MOST_GROUPS:
                name = (*name[:2], OTHER_REASONS)
            group = groups.setdefault(name, Group(sample=stored.letter))
            received = stored.letter.received_at
            group.letters, group.first, group.last = (
                group.letters + 1,
                min(group.first, received),
                max(group.last, received),
            )
        return dict(sorted(groups.items(), key=lambda group: -group[1].letters))

    def replay(
        self,
        canonical: Canonical,
        selection: Selection,
        mend: Mend = lambda letter: letter.raw,
        *,
        dry_run: bool = False,
    ) -> Outcome:
        """Send records again, mended."""
        outcome = Outcome()
        for key in self._keys(selection):
            with _AtWork(self, key, dry_run) as work:
                for page in self._pages(key, selection):
                    intent, part = _intent(key, page.letters, canonical, mend)
                    if not dry_run and intent.places:
                        work.goes_on()
                        self._queues.intend(key, page.version, intent)
                        self._carry_out(key, intent)
                        page.taken = len(intent.places)
                    _add(outcome, part)
        return outcome

    def discard(self, selection: Selection, *, dry_run: bool = False) -> Outcome:
        """Throw letters away for good; they stay counted as discarded."""
        outcome = Outcome()
        for key in self._keys(selection):
            with _AtWork(self, key, dry_run) as work:
                for page in self._pages(key, selection):
                    outcome.selected += len(page.letters)
                    if not dry_run:
                        work.goes_on()
                        places = [stored.place for stored in page.letters]
                        file = page.letters[0].file
                        page.taken = self._queues.discard(key, page.version, str(ULID()), file, places)
                        outcome.discarded += page.taken
        return outcome

    def to_spill(self, limits: spill.Limits) -> list[str]:
        """Keys whose queues are too large, or where a replay was never ended; those at which people work are left alone."""
        found: list[str] = []
        for key in self._queues.keys():  # noqa: SIM118 (no mapping)
            letters = self._queues.letters(key)
            needed = letters.intent is not None or spill.is_oversized(self._queues, key, letters.length, limits)
            if (needed or any(not file.left for file in letters.files)) and not self._queues.is_busy(key):
                found.append(key)
        return found

    def spill(self, limits: spill.Limits) -> dict[str, int]:
        """Move letters of oversized queues to files, end what died, remove emptied files; returns letters moved by key."""
        moved: dict[str, int] = {}
        for key in self.to_spill(limits):
            try:
                self.settle(key)
                moved[key] = sum(file.letters for file in spill.spill(self._queues, self._store, key, limits))
            except LettersMovedError:
                continue  # somebody began to work on them; the next time will do
        return moved

    def settle(self, key: str) -> None:
        """End a replay that died, and remove files whose letters are gone."""
        letters = self._queues.letters(key)
        if letters.intent:
            self._carry_out(key, letters.intent)
        if letters.files:
            spill.remove_emptied(self._queues, self._store, key)

    def busy(self, key: str) -> None:
        self._queues.busy(key)

    def idle(self, key: str) -> None:
        self._queues.idle(key)

    def _carry_out(self, key: str, intent: Intent) -> None:
        self._buffer.push(intent.pushes)
        self._queues.end(key, intent)

    def _keys(self, selection: Selection) -> list[str]:
        return list(selection.keys) or self._queues.keys()

    def _pages(self, key: str, selection: Selection) -> Iterator[Page]:
        """Letters that come in meanwhile, those rejected again included, are left for the next time."""
        found = self._queues.letters(key)
        version = found.version
        for file in found.files:
            if not file.left or file.last < selection.since or file.first > selection.until:
                continue
            gone = self._queues.gone(key, file.name)
            some = (
                Stored(key, file.name, place, data, DeadLetter.read(data))
                for place, data in enumerate(spill.lines(self._store, key, file))
                if not _is_set(gone, place)
            )
            for letters in _cut(stored for stored in some if selection.takes(stored.letter)):
                page = Page(version, letters)
                yield page
                version += page.taken is not None
        start, end, read = 0, found.length, _READ
        while start < end:
            data = self._queues.read(key, start, min(start + read, end))
            if not data:
                break
            some = [Stored(key, "", place, one, DeadLetter.read(one)) for place, one in enumerate(data, start)]
            letters = [stored for stored in some if selection.takes(stored.letter)]
            start += len(data)
            if letters:
                page = Page(version, letters)
                yield page
                if page.taken is not None:
                    version, start, end = version + 1, start - page.taken, end - page.taken
            read = min(2 * read, _PAGE_LETTERS) if sum(map(len, data)) < _PAGE_BYTES // 2 else max(1, read // 2)


class _AtWork:
    """While letters of a key are gone through: begins with what a dead process left, ends with emptied files removed."""

    def __init__(self, letters: DeadLetters, key: str, dry_run: bool) -> None:
        self._letters, self._key, self._dry_run = letters, key, dry_run

    def __enter__(self) -> "_AtWork":
        if not self._dry_run:
            self.goes_on()
            self._letters.settle(self._key)
        return self

    def goes_on(self) -> None:
        self._letters.busy(self._key)

    def __exit__(self, error: object, *_: object) -> None:
        if not self._dry_run:
            if error is None:
                self._letters.settle(self._key)
            self._letters.idle(self._key)


def mending(changes: Mapping[str, object], function: str | None = None) -> Mend:
    """Set fields, then call the user's `module:function`.

    It is given the letter, whose `raw` has the fields set already, and returns the record (a dict, or JSON text), or None to
    leave the letter where it is. MendError when it cannot be used, now or later.
    """
    if not function:
        return lambda letter: _changed(letter.raw, changes)
    from d2p_pipeline.records.transform import TransformError, load

    try:
        mend: Callable[[DeadLetter], object] = load(function)  # pyright: ignore[reportAssignmentType]
    except TransformError as error:
        raise MendError(function, error.reason) from error

    def mended(letter: DeadLetter) -> bytes | None:
        given = msgspec.structs.replace(letter, raw=_changed(letter.raw, changes)) if changes else letter
        try:
            record = mend(given)
            encoded = msgspec.json.encode(record) if isinstance(record, dict) else record
        except Exception as error:
            reason = f"raised {type(error).__name__}: {error}; letter {letter.id!r}, rejected for {letter.reason!r}"
            raise MendError(function, reason) from error
        if encoded is None or isinstance(encoded, bytes):
            return encoded
        if isinstance(encoded, str):
            return encoded.encode()
        reason = f"returned {type(record).__name__} instead of a dict, JSON text or None; letter {letter.id!r}"
        raise MendError(function, reason)

    return mended


def _intent(key: str, letters: list[Stored], canonical: Canonical, mend: Mend) -> tuple[Intent, Outcome]:
    """What a replay of letters that lie together does."""
    outcome = Outcome(selected=len(letters))
    name = str(ULID())
    lines: dict[str, list[bytes]] = {}
    again: list[bytes] = []
    places: list[int] = []
    for stored in letters:
        try:
            record = mend(stored.letter)
            if record is None:
                outcome.left += 1
                continue
            target, line = canonical(record)
        except Rejected as error:
            outcome.rejected_again[error.reason] += 1
            if error.reason != stored.letter.reason:
                again.append(_again(stored.letter, error.reason, f"{name}-{len(again)}"))
                places.append(stored.place)
            continue
        outcome.replayed += 1
        lines.setdefault(target, []).append(line)
        places.append(stored.place)
    now = time.time_ns() // 1_000_000
    pushes = [
        Push(
            target,
            f"replay-{name}",
            REPLAY_WINDOW,
            chunk.encode(some, now),
            len(some),
            sum(map(len, some)) + len(some),
        )
        for target, some in lines.items()
    ]
    if again:
        pushes.append(Push(key, f"again-{name}", REPLAY_WINDOW, rejected=len(again), dead_letters=again))
    return Intent(id=name, file=letters[0].file, places=places, pushes=pushes), outcome


def _again(letter: DeadLetter, reason: str, name: str) -> bytes:
    """The letter with its new reason, the old one in its history."""
    history = (*letter.history, letter.reason)
    return msgspec.structs.replace(letter, reason=reason, history=history, id=name).to_json()


def _add(outcome: Outcome, part: Outcome) -> None:
    outcome.selected += part.selected
    outcome.replayed += part.replayed
    outcome.left += part.left
    outcome.rejected_again += part.rejected_again


def _cut(letters: Iterator[Stored]) -> Iterator[list[Stored]]:
    page: list[Stored] = []
    size = 0
    for stored in letters:
        if page and (len(page) == _PAGE_LETTERS or size + len(stored.data) > _PAGE_BYTES):
            yield page
            page, size = [], 0
        page.append(stored)
        size += len(stored.data)
    if page:
        yield page


def _moment(name: str, text: str) -> int | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r} is no time; write 2026-11-21 or 2026-11-21T10:30:00+01:00") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _is_set(bits: bytes, place: int) -> bool:
    byte = place // 8
    return byte < len(bits) and bool(bits[byte] & (0x80 >> place % 8))


def _changed(raw: bytes, changes: Mapping[str, object]) -> bytes:
    """The record with fields set; raises Rejected when there is no object to set them in."""
    if not changes:
        return raw
    try:
        record = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Rejected(f"no JSON object to set fields in: {error}") from error
    return msgspec.json.encode({**record, **changes})
