"""Runs as users have them: `d2p up` over a Redis without persistence is asked to flush, and its runs are watched.

Dagster's events tell when something happened, the processes of the runs what it cost.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from d2p_pipeline.buffer.redis import RedisBuffer

LOOK = 0.05
"""Seconds between two looks at the processes of runs."""
_PROCESS = "multiprocessing.forkserver"
_UNBOUNDED = {"flush_interval": 3600, "buffer_size": 10**9, "flush_bytes": 10**12}
"""Nothing is due before it is asked for."""


@dataclass
class Ran:
    """One run: when each of Dagster's events came first and last, in seconds since the request to flush; seconds of processor
    time, bytes."""

    first: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])
    steps: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds that the steps of each op took."""
    cpu: float = 0.0
    peak: int = 0

    @property
    def seconds(self) -> float:
        """From the first step to the last one's end."""
        return self.last["STEP_SUCCESS"] - self.first["STEP_START"]

    @property
    def with_its_start(self) -> float:
        """From the launch to the end."""
        return self.last["PIPELINE_SUCCESS"] - self.first["PIPELINE_STARTING"]


@dataclass(frozen=True)
class Flushed:
    """What came of one request to flush: `seconds` until the last record was acknowledged."""

    seconds: float
    runs: list[Ran]

    @property
    def tick(self) -> float:
        """When the tick began that asked for the first run, in seconds since the request."""
        return min(run.first["tick"] for run in self.runs)


class Up:
    """A running `d2p up`."""

    def __init__(self, buffer: "RedisBuffer", process: psutil.Process) -> None:
        self.buffer = buffer
        self._process = process
        self._costs: dict[int, tuple[float, int]] = {}

    def rows(self) -> int:
        return sum(totals.rows for _, totals in self.buffer.totals())

    def flush(self, keys: Sequence[str] | None = None) -> Flushed:
        """Ask for it, wait until all of these keys is delivered and its runs have ended."""
        import dagster as dg

        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,))
        watch.start()
        waiting = sum(state.records for state in self.buffer.waiting() if keys is None or state.key in set(keys))
        wanted = self.rows() + waiting
        asked = time.time()
        self.buffer.request_flush(keys)
        while self.rows() < wanted:
            time.sleep(LOOK)
        seconds = time.time() - asked
        with dg.DagsterInstance.get() as instance:
            unfinished = [status for status in dg.DagsterRunStatus if status.value not in _FINISHED]
            while instance.get_runs_count(dg.RunsFilter(statuses=unfinished)):
                time.sleep(LOOK)
            found = instance.get_run_records(dg.RunsFilter(job_name="flush"))
            mine = [record.dagster_run.run_id for record in found if record.create_timestamp.timestamp() >= asked]
            runs = [self._ran(instance, run_id, asked) for run_id in mine]
        ended.set()
        watch.join()
        return Flushed(seconds, runs)

    def _ran(self, instance: Any, run_id: str, asked: float) -> Ran:
        ran = Ran(first={"tick": _tick_of(instance, run_id) - asked})
        begun: dict[str, float] = {}
        for record in instance.all_logs(run_id):
            event, at = record.dagster_event, record.timestamp - asked
            if event is None:
                continue
            kind, step = event.event_type_value, event.step_key or ""
            if kind == "ENGINE_EVENT" and "Started process for run" in record.message:
                kind = "process"
                ran.cpu, ran.peak = self._costs.get(int(record.message.split("pid: ")[1].split(")")[0]), (0.0, 0))
            ran.first.setdefault(kind, at)
            ran.last[kind] = at
            if kind == "STEP_START":
                begun[step] = at
            elif kind == "STEP_SUCCESS":
                op = step.partition("[")[0]
                ran.steps[op] = ran.steps.get(op, 0.0) + at - begun[step]
        return ran

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(LOOK):
            try:
                processes = self._process.children(recursive=True)
            except psutil.Error:  # one of them ended meanwhile
                continue
            for process in processes:
                try:
                    if _PROCESS in " ".join(process.cmdline()):
                        times, status = process.cpu_times(), Path(f"/proc/{process.pid}/status").read_text()
                        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
                        self._costs[process.pid] = (times.user + times.system, peak)
                except (psutil.Error, OSError, IndexError):  # it has ended
                    continue


_FINISHED = ("SUCCESS", "FAILURE", "CANCELED")


def _tick_of(instance: Any, run_id: str) -> float:
    """When the tick began that asked for a run."""
    for state in instance.all_instigator_state():
        for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id):
            if run_id in tick.run_ids:
                return tick.timestamp
    raise LookupError(run_id)


@contextmanager
def up(directory: Path, **settings: Any) -> Iterator[Up]:
    """Redis and `d2p up` below a directory; files in its `out`. This process's environment names them afterwards."""
    from benchmarks.end_to_end import free_port
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.embedded import EmbeddedRedis
    from d2p_pipeline.settings import load

    with EmbeddedRedis(directory / "redis", durable=False) as server:
        given = {"redis_url": server.url, "home": directory / "home", "writer_file_path": directory / "out"}
        os.environ |= {f"D2P_{name.upper()}": str(value) for name, value in (given | _UNBOUNDED | settings).items()}
        os.environ["DAGSTER_HOME"] = str(directory / "home" / "dagster")
        command = [sys.executable, "-m", "d2p_pipeline.cli.main", "up", "--port", str(free_port())]
        log = directory / "up.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--dagster-port", str(free_port())], stdout=output, stderr=output, start_new_session=True
            )
        buffer, _ = wiring.open_buffer(load())
        try:
            while "Ctrl-C ends all" not in log.read_text(errors="replace"):
                assert process.poll() is None, log.read_text()
                time.sleep(LOOK)
            yield Up(buffer, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(120)
            buffer.close()
