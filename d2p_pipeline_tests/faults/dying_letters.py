"""Work on dead letters that is killed at a named point: `python -m d2p_pipeline_tests.faults.dying_letters POINT WORK`.

POINT is `before:STEP:N` or `after:STEP:N`, the Nth call of a step; WORK is `spill`, `replay` or `discard`. It is the real work
with the settings of the environment; only the blow is added.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from d2p_pipeline import wiring
from d2p_pipeline.buffer.letters import LetterQueues
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.dead_letters import Selection, mending
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.settings import load

STEPS: dict[str, tuple[Any, str]] = {
    "rename": (os, "replace"),
    "write": (LocalStore, "write"),
    "remove": (LocalStore, "remove"),
    "push": (RedisBuffer, "push"),
    **{name: (LetterQueues, name) for name in ("spill", "intend", "end", "discard", "forget")},
}


def kill_at(point: str) -> None:
    when, step, number = point.split(":")
    owner, name = STEPS[step]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        last = calls == int(number)
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def work(what: str, **changes: object) -> None:
    settings = load()
    buffer, _ = wiring.open_buffer(settings)
    letters = wiring.dead_letters(settings, buffer)
    if what == "spill":
        letters.spill(wiring.spill_limits(settings))
    elif what == "replay":
        letters.replay(wiring.canonical(settings), Selection(), mending(changes))
    else:
        letters.discard(Selection())
    buffer.close()


if __name__ == "__main__":
    kill_at(sys.argv[1])
    work(sys.argv[2], **{"business-capability": "first"})
