"""What a whole process costs, and the medians of several: contenders run in turn, so that a disturbance hits all of them."""

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3
"""Exit code of a contender whose library is not there."""

_LOOK = 0.1  # seconds between two looks at the memory of a process and its children


class ContenderError(Exception):
    """A contender ended with another exit code than it should."""

    def __init__(self, name: str, code: int, said: str) -> None:
        super().__init__(f"{name} ended with exit code {code}:\n{said}")


@dataclass(frozen=True)
class Contender:
    """A program to measure; `before` is called ahead of each run and is not measured."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    before: Callable[[], None] = lambda: None
    exit_codes: tuple[int, ...] = (0,)
    records: int | None = None
    """What it has to say it took, in every run: a run that found nothing to do is no fast one."""


@dataclass(frozen=True)
class Cost:
    """Of one process and its children, or medians of such: seconds, seconds, bytes. `said` is the JSON it printed."""

    wall: float
    cpu: float
    peak: int
    said: dict[str, Any] = field(default_factory=dict[str, Any])


def measure(contenders: Sequence[Contender], runs: int) -> dict[str, Cost | None]:
    """Medians by name, None for what is not installed.

    In its turn a contender runs twice. The first run gives its peak (looking at memory takes time), and leaves what it reads and
    as much memory as it needs at hand for the second, which is timed: a machine that takes back what nobody uses for
    seconds would else be slower for one contender than for another.
    """
    costs: dict[str, list[Cost]] = {contender.name: [] for contender in contenders}
    peaks: dict[str, list[int]] = {contender.name: [] for contender in contenders}
    missing: set[str] = set()
    for _ in range(runs):
        for contender in contenders:
            if contender.name in missing:
                continue
            contender.before()
            first = run(contender, watched=True)
            if first is None:
                missing.add(contender.name)
                continue
            contender.before()
            second = run(contender, watched=False)
            assert second
            peaks[contender.name].append(first.peak)
            costs[contender.name].append(second)
    return {name: None if name in missing else median(some, max(peaks[name])) for name, some in costs.items()}


def run(contender: Contender, *, watched: bool = True) -> Cost | None:
    """Run once; None if its library is not installed. Unless `watched`, the peak is that of the largest process."""
    # Nothing large may be allocated in this process: Linux counts what it holds as the peak of what it starts.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        os.sync()
        began = time.monotonic()
        process = subprocess.Popen(contender.command, env=os.environ | contender.environment, stdout=out, stderr=errors)
        watch = _Together(process.pid) if watched else None
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = code = os.waitstatus_to_exitcode(status)
        together = watch.stop() if watch else 0
        if code == NOT_INSTALLED:
            return None
        if code not in contender.exit_codes:
            errors.seek(0)
            raise ContenderError(contender.name, code, errors.read().decode())
        out.seek(0)
        printed = out.read()
    said = json.loads(printed) if printed[:1] == b"{" else {}
    if contender.records is not None and said.get("records") != contender.records:
        raise ContenderError(contender.name, code, f"it took {said.get('records')} of {contender.records} records")
    return Cost(wall, usage.ru_utime + usage.ru_stime, together or usage.ru_maxrss * 1024, said)


def median(costs: Sequence[Cost], peak: int) -> Cost:
    """The median of each figure, with what the one in the middle said."""
    by_wall = sorted(costs, key=lambda cost: cost.wall)
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        cpu=statistics.median(cost.cpu for cost in costs),
        peak=peak,
        said=by_wall[len(costs) // 2].said,
    )


class _Together:
    """The most memory that a process and all below it took at one time; what they share is counted once."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK):
            self._peak = max(self._peak, sum(_proportional(process) for process in _family(self._process)))


def _family(process: int) -> list[int]:
    """A process and all below it; nothing where this is not Linux."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [process, *(one for child in children.split() for one in _family(int(child)))]


def _proportional(process: int) -> int:
    """Bytes of memory, shared ones divided by those that share them; nothing once it has ended."""
    try:
        told = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return int(told.partition("Pss:")[2].split()[0]) * 1024 if "Pss:" in told else 0
