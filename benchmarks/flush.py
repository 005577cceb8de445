"""The real `flush` job on a buffer full of one key's records.

    python -m benchmarks.flush fill <NDJSON file>     push its records as the receiver does, 500 a chunk
    python -m benchmarks.flush run                    seal and deliver what waits, in this process

The environment names the Redis and the directory. `run` prints JSON: records, and the seconds of the job without imports.
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

from ulid import ULID

_CHUNK = 500
_PUSHES = 100


def fill(source: Path) -> None:
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.protocol import Push
    from d2p_pipeline.records import chunk
    from d2p_pipeline.settings import load

    buffer, _ = wiring.open_buffer(load())
    now = buffer.now()
    # Ids of its own: a push whose id Redis has seen lately changes nothing.
    fill_id = ULID()
    pushes: list[Push] = []
    with source.open("rb") as file:
        number = 0
        while lines := [line.rstrip(b"\n") for line in islice(file, _CHUNK)]:
            size = sum(map(len, lines)) + len(lines)
            pushes.append(Push(KEY, f"{fill_id}-{number}", 60, chunk.encode(lines, now), len(lines), size))
            number += 1
            if len(pushes) == _PUSHES:
                buffer.push(pushes)
                pushes = []
        if pushes:
            buffer.push(pushes)


def run() -> None:
    import dagster as dg

    from d2p_pipeline import wiring
    from d2p_pipeline.definitions import defs
    from d2p_pipeline.settings import load

    buffer, _ = wiring.open_buffer(load())
    rows_before = dict(buffer.totals())[KEY].rows
    with dg.DagsterInstance.ephemeral() as instance:
        began = time.monotonic()
        defs.resolve_job_def("flush").execute_in_process(instance=instance)
        seconds = time.monotonic() - began
    # The totals are of all runs on this Redis.
    rows = dict(buffer.totals())[KEY].rows - rows_before
    print(json.dumps({"seconds": seconds, "records": rows}))


KEY = "payments"
"""The only capability of records that are generated with one key."""


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(Path(sys.argv[2]))
    else:
        run()
