"""How many receivers, Redis shards and workers a rate of records needs, and a simulation that checks the answer.

    python -m benchmarks.capacity

`Costs` holds what was measured (docs/scaling.md says how). `needed` divides by it; `simulate` does not: it lets records arrive,
ticks, seals, starts runs in slots and lets them work, second by second, and says whether what waits stays bounded.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

RATES = (10_000, 100_000, 1_000_000, 10_000_000)
SPARE = 0.6
"""How much of a part is used: what is left is for bursts, and for the backlog of a part that was gone."""


@dataclass(frozen=True)
class Costs:
    """Of one core, measured with records of 860 bytes that arrive 500 to a request."""

    receive: float
    """Records a second that one core of a receiver normalizes, compresses and pushes."""
    deliver: float
    """Records a second that one run delivers, once it works."""
    run_start: float
    """Seconds from asking for a run until it works."""
    push: float
    """Records a second that one Redis takes, each push on disk before its answer."""
    redis_bytes: float
    """Bytes of Redis' memory per waiting record."""
    file_bytes: float
    """Bytes of Parquet per record."""
    tick: float = 5.0
    submit: float = 3.5
    """Runs a second that one Dagster instance creates and starts."""


STOCK = Costs(receive=100_000, deliver=90_000, run_start=6.0, push=1_000_000, redis_bytes=130, file_bytes=85)
WARM = Costs(receive=100_000, deliver=90_000, run_start=1.0, push=1_000_000, redis_bytes=130, file_bytes=85)


@dataclass(frozen=True)
class Needed:
    """Cores and shards for a rate."""

    receivers: int
    shards: int
    workers: int
    memory: float
    """Bytes that wait in Redis, all shards together."""
    backlog_hour: float
    """Bytes that wait after an hour without deliveries."""
    files_mb: float
    """MB of Parquet a second."""
    runs: float
    """Runs a minute."""


def needed(rate: float, costs: Costs, *, flush_interval: float, run_seconds: float) -> Needed:
    """A run works for `run_seconds` on average, over the records of its keys that came within a flush interval."""
    # A worker's slot is taken for the start of a run too.
    share = run_seconds / (run_seconds + costs.run_start)
    workers = rate / (costs.deliver * share * SPARE)
    waits = flush_interval + costs.tick + costs.run_start + run_seconds
    return Needed(
        receivers=math.ceil(rate / (costs.receive * SPARE)),
        shards=math.ceil(rate / (costs.push * SPARE)),
        workers=math.ceil(workers),
        memory=rate * waits * costs.redis_bytes,
        backlog_hour=rate * 3600 * costs.redis_bytes,
        files_mb=rate * costs.file_bytes / 1e6,
        runs=rate / (costs.deliver * run_seconds) * 60,
    )


@dataclass(frozen=True)
class Outcome:
    """What a simulation saw in its last third."""

    most_waiting: float
    """Records in Redis at most."""
    oldest: float
    """Seconds that the oldest of them had waited at most."""
    grows: bool
    """Whether more waited at its end than in its middle."""


def simulate(
    rate: float, workers: int, costs: Costs, *, flush_interval: float, run_records: float, seconds: int = 600
) -> Outcome:
    """Records arrive evenly; every tick seals what is old enough into runs of at most `run_records`; slots take the oldest."""
    step = 0.25
    buffered = waiting = 0.0
    since = 0.0
    queue: list[tuple[float, float]] = []
    slots: list[tuple[float, float, float]] = []
    seen: list[tuple[float, float]] = []
    created = 0.0
    next_tick = 0.0
    for number in range(int(seconds / step)):
        now = number * step
        buffered += rate * step
        waiting += rate * step
        if now >= next_tick:
            next_tick += costs.tick
            if now - since >= flush_interval:
                left = buffered
                while left > 0:
                    queue.append((since, min(left, run_records)))
                    left -= run_records
                buffered, since = 0.0, now
        waiting -= sum(records for end, _, records in slots if end <= now)
        slots = [slot for slot in slots if slot[0] > now]
        created = min(created + costs.submit * step, 10.0)
        while queue and len(slots) < workers and created >= 1:
            created -= 1
            first, records = queue.pop(0)
            slots.append((now + costs.run_start + records / costs.deliver, first, records))
        oldest = min([since, *(first for first, _ in queue), *(first for _, first, _ in slots)])
        seen.append((waiting, now - oldest))
    tail = seen[len(seen) * 2 // 3 :]
    middle = seen[len(seen) // 2 : len(seen) * 2 // 3]
    return Outcome(
        most_waiting=max(waiting for waiting, _ in tail),
        oldest=max(age for _, age in tail),
        grows=max(waiting for waiting, _ in tail) > 1.1 * max(waiting for waiting, _ in middle),
    )


def main() -> None:
    console = Console(width=150)
    for name, costs, run_seconds in (("a Python per run", STOCK, 60.0), ("forked runs, warm workers", WARM, 30.0)):
        table = Table(title=f"{name}, flush_interval 60 s, runs of {run_seconds:.0f} s, {SPARE:.0%} used", box=None)
        for column in (
            "records/s",
            "receiver cores",
            "Redis shards",
            "run slots",
            "Redis GB",
            "GB after 1 h of outage",
        ):
            table.add_column(column, justify="right")
        for column in ("Parquet MB/s", "runs/min", "simulated: waits at most", "with half the slots"):
            table.add_column(column, justify="right")
        for rate in RATES:
            found = needed(rate, costs, flush_interval=60, run_seconds=run_seconds)
            records = costs.deliver * run_seconds
            full = simulate(rate, found.workers, costs, flush_interval=60, run_records=records)
            half = simulate(rate, max(1, found.workers // 2), costs, flush_interval=60, run_records=records)
            table.add_row(
                f"{rate:,}",
                str(found.receivers),
                str(found.shards),
                str(found.workers),
                f"{found.memory / 1e9:,.1f}",
                f"{found.backlog_hour / 1e9:,.0f}",
                f"{found.files_mb:,.0f}",
                f"{found.runs:,.1f}",
                "grows" if full.grows else f"{full.oldest:,.0f} s",
                "grows" if half.grows else f"{half.oldest:,.0f} s",
            )
        console.print(table)


if __name__ == "__main__":
    main()
