"""A flush run, or a tick of the buffer sensor, in a process of its own that is struck at a named point.

A point is `before:STEP:N` or `after:STEP:N`: the Nth call of a step of the delivery, of a file's write or removal, or of a
step of the buffer. What strikes is a signal, or an error of the operating system. The run is the real job in a real process;
only the blow is added. Processes are forked from a server that has imported the libraries, so that one costs a fraction of a
second.
"""

import json
import multiprocessing
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2p_pipeline.buffer.protocol import BatchRef

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["d2p_pipeline_tests.faults.preloaded"])


class Struck:
    """A process that `blow` hits at `point`, if any. `settings` beside those of this process."""

    def __init__(
        self,
        work: Callable[..., int],
        arguments: Sequence[Any],
        log: Path,
        point: str = "",
        blow: signal.Signals = signal.SIGKILL,
        settings: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        error: int = 0,
        clock: float = 0,
    ) -> None:
        """`error`: a number of errno, raised at the point and ever after instead of the blow. `clock`: seconds by which the
        process's own clock is wrong."""
        self._log = log
        self._mark = log.with_name(f"{log.name}.{secrets.token_hex(8)}")
        environment = os.environ | {f"D2P_{name.upper()}": value for name, value in (settings or {}).items()}
        blows = _Blows(point, int(blow), error, file_bytes, clock, self._mark)
        self.process = FORKS.Process(target=_work, args=(work, arguments, log, environment, blows), daemon=True)
        self.process.start()

    def was_struck(self) -> bool:
        """Whether it came to its point."""
        return self._mark.exists()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait(self, seconds: float = 90) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"the run {self.pid} did not end: {self.output()}"
        return self.process.exitcode

    def is_paused(self) -> bool:
        return _state(self.pid) == "T"

    def wait_until_paused(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_paused():
            assert self.process.exitcode is None, self.output()
            assert time.monotonic() < deadline, f"the run {self.pid} was not paused: {self.output()}"
            time.sleep(0.01)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def has_ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        self.process.kill()


class StruckRun(Struck):
    """A flush over batches."""

    def __init__(
        self,
        log: Path,
        refs: Sequence[BatchRef],
        point: str = "",
        blow: signal.Signals = signal.SIGKILL,
        settings: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        error: int = 0,
        clock: float = 0,
    ) -> None:
        self.refs = refs
        self.settings = settings or {}
        self.can_be_killed = bool(point) and blow == signal.SIGKILL and not error
        super().__init__(_flush, [list(refs)], log, point, blow, settings, file_bytes, error, clock)


def _state(pid: int) -> str:
    """One letter, as in ps; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone, before or while it was read
        return ""


@dataclass(frozen=True)
class _Blows:
    point: str
    blow: int
    error: int
    file_bytes: int | None
    clock: float
    mark: Path


def _work(
    work: Callable[..., int], arguments: Sequence[Any], log: Path, environment: dict[str, str], blows: _Blows
) -> None:
    # The limit would hit the log, too.
    with (log if blows.file_bytes is None else Path(os.devnull)).open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if blows.point:
        strike_at(blows.point, signal.Signals(blows.blow), blows.error, blows.mark)
    if blows.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (blows.file_bytes, resource.RLIM_INFINITY))
    if blows.clock:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + blows.clock
        time.time_ns = lambda: now_ns() + int(blows.clock * 1e9)
    code = work(*arguments)
    sys.stdout.flush()
    os._exit(code)


def _flush(refs: Sequence[BatchRef]) -> int:
    from d2p_pipeline.definitions import defs
    from d2p_pipeline_tests.faults.preloaded import INSTANCE

    batches = [{"key": ref.key, "id": ref.id} for ref in refs]
    config = {
        "ops": {"plan_units": {"config": {"batches": batches}}},
        "loggers": {"console": {"config": {"log_level": "INFO"}}},
    }
    job = defs.resolve_job_def("flush")
    return not job.execute_in_process(instance=INSTANCE, run_config=config, raise_on_error=False).success


def tick(requests: Path) -> int:
    """Evaluate the buffer sensor as the daemon does; the runs it asks for are written to a file, whole or not at all."""
    import dagster as dg

    from d2p_pipeline.orchestration.sensor import buffer_sensor
    from d2p_pipeline_tests.faults.preloaded import INSTANCE

    with dg.build_sensor_context(instance=INSTANCE) as context:
        found = [one.run_config for one in cast(Any, buffer_sensor(context)) if isinstance(one, dg.RunRequest)]
    temporary = requests.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.rename(requests)
    return 0


def strike_at(point: str, blow: signal.Signals, error: int = 0, mark: Path | None = None) -> None:
    """Arrange for this process to be struck at `point`; `mark` is a file that says that it was."""
    when, step, number = point.split(":")
    owner, name = _steps()[step]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def strike() -> None:
        if mark:
            mark.touch()
        if error:
            raise OSError(error, os.strerror(error))
        os.kill(os.getpid(), blow)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls >= int(number) if error else calls == int(number)
        if now and when == "before":
            strike()
        result = original(*args, **kwargs)
        if now and when == "after":
            strike()
        return result

    setattr(owner, name, wrapped)


def _steps() -> dict[str, tuple[Any, str]]:
    from d2p_pipeline import delivery
    from d2p_pipeline.buffer.redis import RedisBuffer
    from d2p_pipeline.orchestration.io_manager import ParquetIOManager
    from d2p_pipeline.parquet.s3 import S3Store
    from d2p_pipeline.parquet.store import LocalStore

    return {
        "writes": (ParquetIOManager, "write"),
        "put": (S3Store, "write"),
        "delete": (S3Store, "remove"),
        "fsync": (os, "fsync"),
        "plan": (delivery, "plan"),
        "read": (delivery, "read"),
        "check": (delivery, "check"),
        "build": (delivery, "build"),
        "announce": (RedisBuffer, "announce"),
        "remove": (LocalStore, "remove"),
        "write": (LocalStore, "write"),
        "rename": (os, "replace"),
        "acknowledge": (RedisBuffer, "acknowledge"),
        "release": (RedisBuffer, "release"),
        "seal": (RedisBuffer, "seal"),
        "postpone": (RedisBuffer, "postpone"),
        "reconcile": (RedisBuffer, "reconcile"),
    }
