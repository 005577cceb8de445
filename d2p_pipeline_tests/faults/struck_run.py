"""A flush run in a process of its own that a signal strikes at a named point.

A point is `before:STEP:N` or `after:STEP:N`: the Nth call of a step of the delivery, of a file's write or removal, or of a
step of the buffer. The run is the real job in a real process; only the blow is added. Processes are forked from a server that
has imported the libraries, so that one costs a fraction of a second.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2p_pipeline.buffer.protocol import BatchRef

_FORKS = multiprocessing.get_context("forkserver")
# None of the modules that read settings when they are imported.
_FORKS.set_forkserver_preload(["dagster", "pandera.polars", "pyarrow.parquet", "d2p_pipeline.buffer.redis"])


class StruckRun:
    """A run over batches; `blow` hits it at `point`, if any. `settings` beside those of this process."""

    def __init__(
        self,
        log: Path,
        refs: Sequence[BatchRef],
        point: str = "",
        blow: signal.Signals = signal.SIGKILL,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        environment = os.environ | {f"D2P_{name.upper()}": value for name, value in (settings or {}).items()}
        self.process = _FORKS.Process(target=_run, args=(log, environment, list(refs), point, int(blow)), daemon=True)
        self.process.start()

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


def _state(pid: int) -> str:
    """One letter, as in ps; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def _run(log: Path, environment: dict[str, str], refs: list[BatchRef], point: str, blow: int) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if point:
        strike_at(point, signal.Signals(blow))
    import dagster as dg

    from d2p_pipeline.definitions import defs

    config = {"ops": {"plan_units": {"config": {"batches": [{"key": ref.key, "id": ref.id} for ref in refs]}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_job_def("flush")
        succeeded = job.execute_in_process(instance=instance, run_config=config, raise_on_error=False).success
    sys.stdout.flush()
    os._exit(not succeeded)


def strike_at(point: str, blow: signal.Signals) -> None:
    """Arrange for this process to be struck at `point`."""
    when, step, number = point.split(":")
    owner, name = _steps()[step]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        last = calls == int(number)
        if last and when == "before":
            os.kill(os.getpid(), blow)
        result = original(*args, **kwargs)
        if last and when == "after":
            os.kill(os.getpid(), blow)
        return result

    setattr(owner, name, wrapped)


def _steps() -> dict[str, tuple[Any, str]]:
    from d2p_pipeline import delivery
    from d2p_pipeline.buffer.redis import RedisBuffer
    from d2p_pipeline.parquet.store import LocalStore

    return {
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
    }
