"""Which buffers are sealed and which batches share a run: pure functions over what a tick found."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from d2p_pipeline.buffer.protocol import Batch, BufferState, Reason

BATCHES_PER_RUN = 1000
"""Bounds a run's configuration, and the events it logs."""


@dataclass(frozen=True)
class Limits:
    """When a buffer is full or old, and what one run takes on."""

    records: int
    size: int
    age_ms: int
    run_bytes: int
    runs: int


def why_seal(state: BufferState, now: int, limits: Limits) -> Reason:
    """The reason a due buffer is due; one that is neither full nor old was asked for."""
    if state.records >= limits.records:
        return "size"
    if state.size >= limits.size:
        return "bytes"
    if now - state.first >= limits.age_ms:
        return "age"
    return "request"


def share_runs(batches: Iterable[Batch], limits: Limits) -> list[list[Batch]]:
    """Batches per run: a key's batches together; one run per key while the keys are few, else shared up to `run_bytes`.

    A run costs seconds of processor time before it does anything, so many small keys share one. Oldest first; what exceeds
    `limits.runs` runs is left for the next tick.
    """
    by_key: dict[str, list[Batch]] = {}
    for batch in sorted(batches, key=lambda batch: batch.sealed_at):
        by_key.setdefault(batch.key, []).append(batch)
    groups = [piece for group in by_key.values() for piece in _pieces(group, limits.run_bytes)]
    if len(groups) > limits.runs:
        groups = list(_packed(groups, limits.run_bytes))
    return groups[: limits.runs]


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


def _packed(groups: Iterable[list[Batch]], budget: int) -> Iterator[list[Batch]]:
    yield from _pieces([batch for group in groups for batch in group], budget)
