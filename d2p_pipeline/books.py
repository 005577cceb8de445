"""The books of every key: where its records are, and whether that is all of them.

    accepted = rows + dead letters + discarded + buffered + in batches or recovery

Read from the buffer part by part while records move, so only a difference that stays is one. Metrics, status and the asset
check `books_balance` read them here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from d2p_pipeline.buffer.protocol import Batch, Buffer, Deliveries, Totals

LOOKS = 5
"""Looks at the books before a difference is believed."""
_NONE = Totals(0, 0, 0)
_NO_DELIVERIES = Deliveries()


@dataclass
class Book:
    """One key's. Sizes are raw bytes, `oldest` the time (ms) at which the oldest waiting record came, 0 for none."""

    totals: Totals = _NONE
    deliveries: Deliveries = _NO_DELIVERIES
    buffered: int = 0
    buffered_bytes: int = 0
    counted: int = 0
    """The buffered records that the totals know of already."""
    in_batches: int = 0
    in_recovery: int = 0
    batch_bytes: int = 0
    batches: int = 0
    recovering: int = 0
    foreign: bool = False
    """Batches under way hold records that nobody counted yet."""
    oldest: int = 0

    @property
    def waiting_bytes(self) -> int:
        return self.buffered_bytes + self.batch_bytes

    @property
    def difference(self) -> int:
        """Accepted records that are nowhere; negative: too many."""
        if self.foreign:
            return 0
        known = self.totals.rows + self.totals.dead_letters + self.totals.discarded
        return self.totals.accepted - known - self.counted - self.in_batches - self.in_recovery

    def _saw(self, first: int) -> None:
        self.oldest = min(self.oldest or first, first)

    def add(self, batch: Batch) -> None:
        # What a unit has acknowledged is counted in the totals already.
        records = batch.records - batch.rows - batch.dead_letters
        if batch.state == "recovery":
            self.in_recovery += records
            self.recovering += 1
        else:
            self.in_batches += records
            self.batches += 1
        self.batch_bytes += batch.size
        self.foreign = self.foreign or not batch.counted
        self._saw(batch.first)


@dataclass
class Books:
    """All keys' books, read at `time` (ms, the buffer's clock)."""

    time: int
    keys: dict[str, Book] = field(default_factory=dict[str, Book])

    def of(self, key: str) -> Book:
        return self.keys.setdefault(key, Book())


def waiting(buffer: Buffer) -> Books:
    """What waits, without what became of the rest."""
    books = Books(buffer.now())
    for state in buffer.waiting():
        book = books.of(state.key)
        book.buffered, book.buffered_bytes, book.counted = state.records, state.size, state.counted
        book.oldest = state.first
    for batch in _batches(buffer):
        books.of(batch.key).add(batch)
    return books


def read(buffer: Buffer) -> Books:
    """What waits, and what became of everything ever accepted."""
    books = waiting(buffer)
    for key, totals in buffer.totals():
        books.of(key).totals = totals
    for key, deliveries in buffer.deliveries():
        books.of(key).deliveries = deliveries
    return books


def differences(buffer: Buffer, books: Books) -> dict[str, int]:
    """Accepted records that are nowhere (negative: too many), by key, once they are no matter of records that move."""
    found = {key: book.difference for key, book in books.keys.items() if book.difference}
    for _ in range(LOOKS):
        if not found:
            break
        again = read(buffer).keys
        found = {key: lost for key, lost in found.items() if key in again and again[key].difference == lost}
    return found


def _batches(buffer: Buffer) -> Iterator[Batch]:
    yield from buffer.open_batches()
    yield from buffer.recovering()
