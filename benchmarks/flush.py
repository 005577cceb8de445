"""Pushes the records of an NDJSON file, all of one key, as the receiver does, 500 a chunk: `python -m benchmarks.flush FILE`.

The environment names the Redis.
"""

import sys
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


KEY = "payments"
"""The only capability of records that are generated with one key."""


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
