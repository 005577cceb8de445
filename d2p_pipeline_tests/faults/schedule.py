"""A schedule of faults, made from a seed: the same seed gives the same faults at the same steps, and in the processes they
strike at the same call, against the same server and the same kind of target; and the same records by the same producers.

How processes interleave between the faults is theirs to decide, so a seed repeats the blows, not every microsecond.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Kind = Literal[
    "run killed",
    "run killed anywhere",
    "run killed while it tidies up",
    "run paused",
    "run under other settings",
    "run without disk space",
    "run refused by the disk",
    "run under another clock",
    "run asked for twice",
    "run request lost",
    "lease lost",
    "ticks at once",
    "two daemons",
    "tick killed",
    "tick under another clock",
    "receiver killed",
    "receiver paused",
    "receiver replaced",
    "listener killed",
    "listener paused",
    "poller killed",
    "poller paused",
    "Redis killed",
    "Redis paused",
    "Redis full",
    "Redis clock steps",
    "scripts forgotten",
    "index lost",
    "directory blocked",
    "S3 breaks",
    "S3 stalls",
    "doors under another clock",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LOCAL: set[Kind] = {"run without disk space", "run refused by the disk", "directory blocked"}
_S3: set[Kind] = {"S3 breaks", "S3 stalls"}
_BESIDE: set[Kind] = {"doors under another clock"}
"""Drawn after all others, so that a seed keeps those it always gave."""

RUN_POINTS = ["plan", "read", "check", "build", "announce", "writes", "acknowledge"]
"""Steps of every run that has something to deliver."""
FILE_POINTS = {"local": ["write", "rename", "fsync"], "s3": ["put"]}
TIDY_POINTS = {"local": "remove", "s3": "delete"}
TICK_POINTS = ["seal", "postpone", "reconcile"]
OTHER_SETTINGS = [
    {"partition_time": "ingest"},
    {"use_hash": "true"},
    {"column_names": "snake"},
    {"use_hash": "true", "column_names": "snake"},
    {"writer_compression_type": "zstd"},
]
ANSWERS: list[Literal["500", "503", "reset", "lost"]] = ["500", "503", "reset", "lost"]

Target = Literal["local", "s3"]


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
    server: Literal["6.2", "newer"]
    """Of Redis: the one inside the wheel, or the one on PATH."""
    target: Target
    shared_runs: bool
    """Whether few keys share runs as many do."""
    faults: tuple[Fault, ...]


def schedule(seed: int, steps: int = 4) -> Schedule:
    """One fault per step or more, of kinds chosen at random. Every fourth schedule writes to S3."""
    random = Random(seed)
    target: Target = "s3" if seed % 8 in (3, 6) else "local"
    left_out = _BESIDE | (_LOCAL if target == "s3" else _S3)
    kinds: list[Kind] = [kind for kind in KINDS if kind not in left_out]
    faults: list[Fault] = []
    for _ in range(random.randint(steps, steps + 3)):
        kind: Kind = random.choice(kinds)
        number = 1
        if kind == "tick killed":
            step = random.choice(TICK_POINTS)
        elif kind == "run killed while it tidies up":
            step = TIDY_POINTS[target]
        elif kind == "run refused by the disk":
            step = random.choice(FILE_POINTS[target])
        else:
            step = random.choice([*RUN_POINTS, *FILE_POINTS[target]])
            number = random.choice([1, 1, 2])
            if step == "plan":
                number = 1
        when = "before" if kind == "run refused by the disk" else random.choice(["before", "after"])
        point = f"{when}:{step}:{number}"
        faults.append(Fault(random.randrange(steps), kind, random.randint(1, 3), point, random.randrange(1 << 16)))
    shared_runs = random.random() < 0.7
    for kind in sorted(_BESIDE):
        if random.random() < 0.3:
            faults.append(Fault(random.randrange(steps), kind, random.randint(1, 3), choice=random.randrange(1 << 16)))
    faults.sort(key=lambda fault: fault.at)
    return Schedule(seed, steps, "newer" if seed % 2 else "6.2", target, shared_runs, tuple(faults))
