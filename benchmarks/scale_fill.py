"""Fills one key's buffer as the receiver does, 500 records a chunk: `python -m benchmarks.scale_fill KEY RECORDS`.

The same hundred thousand records again and again: making more takes longer than delivering them.
"""

import json
import sys
import time
from datetime import UTC, datetime
from itertools import count, islice

DIFFERENT, CHUNK = 100_000, 500


def main() -> None:
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.protocol import Push
    from d2p_pipeline.ingest.generator import generate
    from d2p_pipeline.records import chunk
    from d2p_pipeline.settings import load

    key, records = sys.argv[1], int(sys.argv[2])
    buffer, _ = wiring.open_buffer(load())
    now, name = buffer.now(), json.dumps(key).encode()
    lines = generate(
        min(records, DIFFERENT), profile="canonical", keys=1, seed=1, start=datetime(2026, 11, 21, 10, tzinfo=UTC)
    )
    chunks: list[tuple[bytes, int, int]] = []
    while some := [line.replace(b'"payments"', name) for line in islice(lines, CHUNK)]:
        chunks.append((chunk.encode(some, now), len(some), sum(map(len, some)) + len(some)))
    # Pushes are known by their ids: another call makes others.
    for number in count(time.time_ns()):
        pushes: list[Push] = []
        for place, (data, several, size) in enumerate(chunks):
            if records >= several:
                pushes.append(Push(key, f"{number}-{place}", 5, data, several, size))
                records -= several
        if not pushes:
            break
        buffer.push(pushes)


if __name__ == "__main__":
    main()
