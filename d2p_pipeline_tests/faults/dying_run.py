"""A flush run that is struck by a signal at a named point: `python -m d2p_pipeline_tests.faults.dying_run SIGKILL POINT KEY ID`.

POINT is `before:STEP:N` or `after:STEP:N`: the Nth call of a step of the delivery, of a file's write, or of the buffer's
acknowledgement. The run is the real job in the real process; only the blow is added.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import dagster as dg

from d2p_pipeline import delivery
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.parquet.store import LocalStore

STEPS: dict[str, tuple[Any, str]] = {
    "plan": (delivery, "plan"),
    "read": (delivery, "read"),
    "check": (delivery, "check"),
    "build": (delivery, "build"),
    "write": (LocalStore, "write"),
    "rename": (os, "replace"),
    "acknowledge": (RedisBuffer, "acknowledge"),
    "release": (RedisBuffer, "release"),
}


def strike_at(point: str, blow: signal.Signals) -> None:
    """Arrange for this process to be struck at `point`."""
    when, step, number = point.split(":")
    owner, name = STEPS[step]
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


def main() -> None:
    blow, point, key, batch_id = sys.argv[1:]
    strike_at(point, signal.Signals[blow])
    from d2p_pipeline.definitions import defs

    config = {"ops": {"plan_units": {"config": {"batches": [{"key": key, "id": batch_id}]}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        defs.resolve_job_def("flush").execute_in_process(instance=instance, run_config=config)


if __name__ == "__main__":
    main()
