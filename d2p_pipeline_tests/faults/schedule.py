"""A schedule of faults, made from a seed: the same seed gives the same faults at the same moments.

How processes interleave between the faults is theirs to decide, so a seed repeats the blows, not every microsecond.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal[
    "run killed",
    "run paused",
    "run under other settings",
    "run without disk space",
    "run request lost",
    "lease lost",
    "ticks at once",
    "tick killed",
    "receiver killed",
    "receiver paused",
    "Redis killed",
    "Redis paused",
    "Redis full",
    "scripts forgotten",
    "index lost",
    "directory blocked",
]
KINDS: tuple[Kind, ...] = Kind.__args__

RUN_POINTS = [
    "plan:1",
    "read:1",
    "check:1",
    "build:1",
    "announce:1",
    "remove:1",
    "write:1",
    "write:2",
    "rename:1",
    "rename:2",
    "acknowledge:1",
    "acknowledge:2",
    "release:1",
]
TICK_POINTS = ["seal:1", "postpone:1", "reconcile:1"]
OTHER_SETTINGS = [
    {"partition_time": "ingest"},
    {"use_hash": "true"},
    {"column_names": "snake"},
    {"use_hash": "true", "column_names": "snake"},
    {"writer_compression_type": "zstd"},
]


@dataclass(frozen=True)
class Fault:
    """At step `at` of the schedule; `lasts` that many steps, where it lasts."""

    at: int
    kind: Kind
    lasts: int = 0
    point: str = ""
    choice: int = 0


@dataclass(frozen=True)
class Schedule:
    seed: int
    steps: int
    faults: tuple[Fault, ...]


def schedule(seed: int, steps: int = 8) -> Schedule:
    """About one fault per step, of kinds chosen at random."""
    random = Random(seed)
    faults: list[Fault] = []
    for _ in range(random.randint(steps // 2, steps + 2)):
        kind = random.choice(KINDS)
        points = TICK_POINTS if kind == "tick killed" else RUN_POINTS
        point = f"{random.choice(['before', 'after'])}:{random.choice(points)}"
        faults.append(Fault(random.randrange(steps), kind, random.randint(1, 3), point, random.randrange(1 << 16)))
    return Schedule(seed, steps, tuple(sorted(faults, key=lambda fault: fault.at)))
