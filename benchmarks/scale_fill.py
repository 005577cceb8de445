"""Fills one key's buffer as the receiver does, 500 records a chunk: `python -m benchmarks.scale_fill KEY RECORDS START`."""

import json
import sys
from datetime import UTC, datetime
from itertools import islice


def main() -> None:
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.protocol import Push
    from d2p_pipeline.ingest.generator import generate
    from d2p_pipeline.records import chunk
    from d2p_pipeline.settings import load

    key, records, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    buffer, _ = wiring.open_buffer(load())
    now, name = buffer.now(), json.dumps(key).encode()
    lines = generate(records, profile="canonical", keys=1, seed=start, start=datetime(2026, 11, 21, 10, tzinfo=UTC))
    number = 0
    while some := [line.replace(b'"payments"', name) for line in islice(lines, 500)]:
        size = sum(map(len, some)) + len(some)
        buffer.push([Push(key, f"{start}-{number}", 5, chunk.encode(some, now), len(some), size)])
        number += 1


if __name__ == "__main__":
    main()
