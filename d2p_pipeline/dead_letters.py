"""What people do with dead letters: look at them, replay them, throw them away.

A replay is a push like any other, under the letter's own id, and only then leaves the queue: a process that dies in between
replays into a push that Redis remembers. A record that is rejected again stays where it is, with its history; so nothing
loops. Works through the queues by pages, in bounded memory.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from d2p_pipeline.buffer.protocol import Buffer, Push
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected

REPLAY_WINDOW = 7 * 24 * 3600
"""Seconds in which a letter replayed twice is stored once."""
_PAGE = 500


@dataclass(frozen=True)
class Selection:
    """Which dead letters: of these keys (none: all), whose reason contains a text, rejected at a stage, in a time (ms)."""

    keys: tuple[str, ...] = ()
    reason: str = ""
    stage: str = ""
    since: int = 0
    until: int = 1 << 62

    def takes(self, letter: DeadLetter) -> bool:
        return (
            self.reason in letter.reason
            and self.stage in ("", letter.stage)
            and self.since <= letter.received_at <= self.until
        )


@dataclass(frozen=True)
class Stored:
    """A dead letter where it lies."""

    key: str
    data: bytes
    letter: DeadLetter

    @property
    def id(self) -> str:
        """Letters of before there were ids are known by their content."""
        return self.letter.id or hashlib.sha256(self.data).hexdigest()


@dataclass
class Outcome:
    """What became of the letters selected."""

    selected: int = 0
    replayed: int = 0
    discarded: int = 0
    rejected_again: Counter[str] = field(default_factory=Counter[str])


def select(buffer: Buffer, selection: Selection) -> Iterator[Stored]:
    """The letters selected, oldest first per key."""
    for page, _ in _pages(buffer, selection):
        yield from page


def replay(
    buffer: Buffer,
    canonical: Callable[[bytes], tuple[str, bytes]],
    selection: Selection,
    changes: Mapping[str, object] | None = None,
    *,
    dry_run: bool = False,
) -> Outcome:
    """Send records again, with some fields changed; `canonical` gives a record's key and canonical line or raises Rejected."""
    outcome = Outcome()
    for page, done in _pages(buffer, selection):
        pushes: list[Push] = []
        gone: list[Stored] = []
        for stored in page:
            outcome.selected += 1
            try:
                key, line = canonical(_changed(stored.letter.raw, changes or {}))
            except Rejected as error:
                outcome.rejected_again[error.reason] += 1
                if error.reason != stored.letter.reason:
                    pushes.append(_again(stored, error.reason))
                    gone.append(stored)
                continue
            outcome.replayed += 1
            body = chunk.encode([line], time.time_ns() // 1_000_000)
            pushes.append(Push(key, f"replay-{stored.id}", REPLAY_WINDOW, body, 1, len(line) + 1))
            gone.append(stored)
        if not dry_run and pushes:
            buffer.push(pushes)
            done(_remove(buffer, gone, discarded=False))
    return outcome


def discard(buffer: Buffer, selection: Selection, *, dry_run: bool = False) -> Outcome:
    """Throw letters away for good; they stay counted as discarded."""
    outcome = Outcome()
    for page, done in _pages(buffer, selection):
        outcome.selected += len(page)
        if not dry_run:
            removed = _remove(buffer, page, discarded=True)
            outcome.discarded += removed
            done(removed)
    return outcome


def _again(stored: Stored, reason: str) -> Push:
    """The letter with its new reason, the old one in its history."""
    history = (*stored.letter.history, stored.letter.reason)
    letter = msgspec.structs.replace(stored.letter, reason=reason, history=history, id=f"{stored.id}+")
    return Push(stored.key, f"again-{stored.id}", REPLAY_WINDOW, rejected=1, dead_letters=[letter.to_json()])


def _remove(buffer: Buffer, letters: list[Stored], *, discarded: bool) -> int:
    return (
        buffer.remove_dead_letters(letters[0].key, [one.data for one in letters], discarded=discarded) if letters else 0
    )


def _pages(buffer: Buffer, selection: Selection) -> Iterator[tuple[list[Stored], Callable[[int], None]]]:
    """Pages of one key's selected letters, and what to call with the number removed from each.

    Letters that come in meanwhile, those rejected again included, are left for the next time.
    """
    for key, length in list(buffer.dead_letter_keys()):
        if selection.keys and key not in selection.keys:
            continue
        start, end = 0, length
        while start < end:
            data = buffer.dead_letters(key, start, min(start + _PAGE, end))
            if not data:
                break
            removed: list[int] = []
            page = [Stored(key, one, DeadLetter.from_json(one)) for one in data]
            taken = [stored for stored in page if selection.takes(stored.letter)]
            if taken:
                yield taken, removed.append
            start, end = start + len(data) - sum(removed), end - sum(removed)


def _changed(raw: bytes, changes: Mapping[str, object]) -> bytes:
    """The record with fields set; raises Rejected when there is no object to set them in."""
    if not changes:
        return raw
    try:
        record = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Rejected(f"no JSON object to set fields in: {error}") from error
    return msgspec.json.encode({**record, **changes})
