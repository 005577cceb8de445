"""How many of the newest records were rejected: per key, since the newest look that is at least a window ago.

The totals only ever grow, so two looks at them tell what happened in between. Looks are kept beside the totals, a few per
window.
"""

from dataclasses import dataclass

from d2p_pipeline.buffer.letters import LetterQueues, Look

LOOKS_PER_WINDOW = 8


@dataclass(frozen=True)
class Rejects:
    """Of so many records delivered or rejected, so many were rejected."""

    records: int
    rejected: int

    @property
    def share(self) -> float:
        return self.rejected / self.records if self.records else 0.0


def look(queues: LetterQueues, now: int, window: int) -> dict[str, Rejects]:
    """Every key's share of the last `window` ms before `now` (ms), or somewhat more; remembers the look."""
    found: dict[str, Rejects] = {}
    for key, rows, rejected, looks in queues.outcomes():
        since = max((one for one in looks if one.time <= now - window), default=Look(0, 0, 0))
        found[key] = Rejects(rows + rejected - since.rows - since.rejected, rejected - since.rejected)
        if not looks or now - looks[-1].time >= window / LOOKS_PER_WINDOW:
            kept = [one for one in looks if one.time >= since.time]
            queues.remember(key, [*kept, Look(now, rows, rejected)])
    return found
