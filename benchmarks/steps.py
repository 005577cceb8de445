"""The steps of the engine alone, in one process: CPU seconds per 100,000 records, and what one small file costs.

    python -m benchmarks.steps <NDJSON file>

Prints JSON. CPU seconds count all threads of the process.
"""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from d2p_pipeline.parquet.encode import Compression, Encoding, encode, split
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.validate import validate

_BLOCK = 16 << 20
_SMALL_ROWS = 10_000
_SMALL_RUNS = 301
_WARM_UP_LINES = 1000


def steps(source: Path) -> dict[str, float]:
    """CPU seconds of each step per 100,000 records, block by block like `d2p convert`."""
    rules, encoding = Rules(), Encoding()
    spent: Counter[str] = Counter()
    records = 0
    _warm_up(source, rules)
    for text in _blocks(source):
        began = time.process_time_ns()
        parsed = parse([text], rules, received_at=0)
        after_parse = time.process_time_ns()
        good = validate(parsed.table, rules).good
        after_validate = time.process_time_ns()
        partitions = split(good, rules)
        after_split = time.process_time_ns()
        for _, _, rows in partitions:
            encode(rows, encoding, {})
        after_encode = time.process_time_ns()
        spent["parse"] += after_parse - began
        spent["validate"] += after_validate - after_parse
        spent["split"] += after_split - after_validate
        spent["encode"] += after_encode - after_split
        records += parsed.lines
    return {step: nanoseconds / 1e9 / records * 100_000 for step, nanoseconds in spent.items()}


def encode_small() -> dict[str, float]:
    """Microseconds, median, to encode 10,000 rows of (int64, "item-N", float64) to memory."""
    rows = range(_SMALL_ROWS)
    table = pa.table(
        {
            "id": pa.array(rows, pa.int64()),
            "name": pa.array([f"item-{row}" for row in rows]),
            "value": pa.array([row * 1.5 for row in rows], pa.float64()),
        }
    )
    return {compression: _median_us(table, Encoding(compression)) for compression in _COMPRESSIONS}


_COMPRESSIONS: tuple[Compression, ...] = ("none", "snappy")


def _median_us(table: pa.Table, encoding: Encoding) -> float:
    times: list[int] = []
    for _ in range(_SMALL_RUNS):
        began = time.perf_counter_ns()
        encode(table, encoding, {})
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1000


def _warm_up(source: Path, rules: Rules) -> None:
    """What costs time once per process belongs to no step."""
    with source.open("rb") as file:
        text = b"".join(islice(file, _WARM_UP_LINES))
    for _, _, rows in split(validate(parse([text], rules, received_at=0).table, rules).good, rules):
        encode(rows, Encoding(), {})


def _blocks(source: Path) -> Iterator[bytes]:
    rest = b""
    with source.open("rb", buffering=0) as file:
        while read := file.read(_BLOCK - len(rest)):
            text = rest + read
            end = text.rfind(b"\n") + 1
            rest = text[end:]
            yield text[:end]


if __name__ == "__main__":
    print(json.dumps({"steps": steps(Path(sys.argv[1])), "encode_small": encode_small()}))
