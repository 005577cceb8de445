"""Which buffers are sealed and which batches share a run: pure functions over what a tick found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from d2p_pipeline.buffer.protocol import Batch, BufferState, Reason
from d2p_pipeline.settings import Settings

BATCHES_PER_RUN = 500
"""Bounds a run's configuration, the events it logs and the time its last batch waits for the first."""


@dataclass(frozen=True)
class Limits:
    """When a buffer is full or old, and what one run takes on."""

    records: int
    size: int
    age_ms: int
    run_bytes: int
    hot_bytes: int
    """A key with this much due fills a run's passes by itself: it shares with nobody."""
    own_runs: int
    """Up to so many due keys, each has a run of its own."""
    runs: int
    """Runs that may wait for their start."""


def limits_of(settings: Settings) -> Limits:
    """What the settings say about sealing and sharing."""
    return Limits(
        records=settings.buffer_size,
        size=settings.flush_bytes,
        age_ms=int(settings.flush_interval * 1000),
        run_bytes=settings.run_bytes,
        hot_bytes=settings.unit_bytes,
        own_runs=settings.own_runs,
        runs=settings.max_runs_per_tick,
    )


@dataclass(frozen=True)
class Share:
    """The batches of one run, oldest first, and why they are together."""

    batches: tuple[Batch, ...]
    why: str
    behind: int = 0
    """How many runs with the same key were asked for before: the run stands back behind other keys' by that."""


def why_seal(state: BufferState, now: int, limits: Limits) -> Reason:
    """The reason a due buffer is due; one that is neither full nor old was asked for."""
    if state.records >= limits.records:
        return "size"
    if state.size >= limits.size:
        return "bytes"
    if now - state.first >= limits.age_ms:
        return "age"
    return "request"


def share_runs(batches: Iterable[Batch], limits: Limits, waiting: Mapping[str, int] | None = None) -> list[Share]:
    """Batches per run, at most as many runs as may still wait; `waiting`: runs of its own that each key already has waiting.

    A run costs seconds of processor time before it does anything, so keys share runs up to `run_bytes`, except for hot keys,
    and while few are due. Every key's oldest batches come first, then the second run of the keys that need two: a flood of one
    key does not hold up the others. What exceeds the limit is left for the next tick.
    """
    waiting = waiting or {}
    by_key: dict[str, list[Batch]] = {}
    for batch in sorted(batches, key=lambda batch: batch.sealed_at):
        by_key.setdefault(batch.key, []).append(batch)
    few = len(by_key) <= limits.own_runs
    shares: list[Share] = []
    small: list[Batch] = []
    for key, found in by_key.items():
        hot = sum(batch.size for batch in found) >= limits.hot_bytes
        if hot or few:
            why = "hot key" if hot else "few keys due"
            shares += [
                Share(tuple(piece), why, waiting.get(key, 0) + place)
                for place, piece in enumerate(_pieces(found, limits.run_bytes))
            ]
        else:
            small += found
    shares += [Share(tuple(piece), "shared") for piece in _pieces(small, limits.run_bytes)]
    shares.sort(key=lambda share: (share.behind, share.batches[0].sealed_at))
    return shares[: limits.runs]


def _pieces(batches: Sequence[Batch], budget: int) -> Iterator[list[Batch]]:
    """Cut a sequence of batches at the byte budget; one that is larger than it stands alone."""
    piece: list[Batch] = []
    size = 0
    for batch in batches:
        if piece and (size + batch.size > budget or len(piece) == BATCHES_PER_RUN):
            yield piece
            piece, size = [], 0
        piece.append(batch)
        size += batch.size
    if piece:
        yield piece
