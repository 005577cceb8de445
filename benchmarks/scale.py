"""What many keys and a large backlog cost: the tick of the sensor, the runs it asks for, the drain of what waits.

    python -m benchmarks.scale tick       10,000 keys with 1,000 due; 100,000 idle buffers; a cold start with 100,000
    python -m benchmarks.scale deliver    10,000 keys with 1,000 due, delivered by `d2p up`
    python -m benchmarks.scale budget     flushes of 1,000 records by `d2p up`, by phase
    python -m benchmarks.scale backlog    a backlog of several keys, drained by `d2p up`, beside `d2p convert --jobs 2`

Redis is the embedded server, without persistence; ticks go through Dagster's own evaluation of the sensor. Nothing is asserted
but that every record arrived, once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measure import Contender, Cost, run
from benchmarks.runs import Ran, up
from benchmarks.scale_fill import CHUNK

KEYS, DUE, IDLE = 10_000, 1_000, 100_000
_TICKS = 9
_FLUSHES = 5


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("what", choices=["tick", "deliver", "budget", "backlog"])
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the backlog (%(default)s)")
    parser.add_argument("--keys", type=int, default=8, help="keys of the backlog (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = {"tick": _tick, "deliver": _deliver, "budget": _budget, "backlog": _backlog}[options.what](
            Path(directory), options
        )
    print(json.dumps(figures, indent=2))


@contextmanager
def _system(directory: Path, **settings: Any) -> Iterator[Any]:
    """A Redis, a Dagster home and the environment that names both; gives the buffer."""
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.embedded import EmbeddedRedis
    from d2p_pipeline.cli.supervise import dagster_home
    from d2p_pipeline.settings import load

    with EmbeddedRedis(directory / "redis", durable=False) as server:
        given = {"redis_url": server.url, "writer_file_path": directory / "out", "flush_interval": 3600} | settings
        os.environ |= {f"D2P_{name.upper()}": str(value) for name, value in given.items()}
        os.environ["DAGSTER_HOME"] = str(dagster_home(directory))
        buffer, _ = wiring.open_buffer(load())
        yield buffer


def _push(buffer: Any, keys: Sequence[str], records: int) -> None:
    """`records` canonical records into each key's buffer, in one chunk, as the receiver does."""
    from d2p_pipeline.buffer.protocol import Push
    from d2p_pipeline.ingest.generator import generate
    from d2p_pipeline.records import chunk

    now = buffer.now()
    lines = list(generate(records, profile="canonical", keys=1, seed=1))
    size = sum(map(len, lines)) + len(lines)
    iterator = iter(keys)
    while page := list(islice(iterator, 1000)):
        pushes: list[Push] = []
        for key in page:
            own = [line.replace(b'"payments"', json.dumps(key).encode()) for line in lines]
            pushes.append(Push(key, f"{time.time_ns()}", 5, chunk.encode(own, now), len(own), size))
        buffer.push(pushes)


# --- ticks


def _tick(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    del options
    import dagster as dg

    from d2p_pipeline.orchestration.sensor import buffer_sensor

    def tick(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
        return list(buffer_sensor.evaluate_tick(dg.build_sensor_context(instance=instance)).run_requests or [])

    figures: dict[str, Any] = {}
    with _system(directory, buffer_size=1000) as buffer, dg.DagsterInstance.get() as instance:
        tick(instance)
        empty = _median(lambda: tick(instance))
        _push(buffer, [f"idle {number}" for number in range(KEYS - DUE)], 1)
        tick(instance)
        _push(buffer, [f"due {number}" for number in range(DUE)], 3)
        buffer.request_flush([f"due {number}" for number in range(DUE)])
        seconds, requests = _timed(lambda: tick(instance))
        figures["10,000 keys, 1,000 due: the tick, s"] = round(seconds, 3)
        figures["10,000 keys, 1,000 due: runs"] = len(requests)
        _push(buffer, [f"more {number}" for number in range(IDLE - KEYS)], 1)
        for _ in range(1000):  # a pass over all names ends
            tick(instance)
        full = _median(lambda: tick(instance))
        figures["a tick without buffers, ms"] = round(empty * 1000, 1)
        figures["a tick with 100,000 idle buffers, ms"] = round(full * 1000, 1)
        figures["what 100,000 idle buffers add, ms"] = round((full - empty) * 1000, 1)

        # The server was restored from a snapshot by somebody who took only the lists: no index knows anything.
        _forget_indexes(directory)
        from d2p_pipeline.orchestration import sensor

        sensor.parts.cache_clear()
        began, ticks = time.monotonic(), 0
        while (found := _indexed(directory)) < IDLE - DUE:
            tick(instance)
            ticks += 1
        figures["cold start, 100,000 buffers no index knows: ticks, s"] = [ticks, round(time.monotonic() - began, 1)]
        figures["cold start: buffers found"] = found
    return figures


def _median(action: Callable[[], object]) -> float:
    return statistics.median(_timed(action)[0] for _ in range(_TICKS))


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = action()
    return time.monotonic() - began, result


def _client(directory: Path) -> Any:
    from redis import Redis

    return Redis.from_url(f"unix://{directory / 'redis' / 'redis.sock'}")


def _forget_indexes(directory: Path) -> None:
    with _client(directory) as client:
        client.delete("keys", "batches")


def _indexed(directory: Path) -> int:
    with _client(directory) as client:
        return client.zcard("keys")


# --- deliveries


def _deliver(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    del options
    with up(directory, buffer_size=1000) as system:
        due = [f"due {number}" for number in range(DUE)]
        _push(system.buffer, [f"idle {number}" for number in range(KEYS - DUE)], 1)
        _push(system.buffer, due, 20)
        flushed = system.flush(due)
        assert system.rows() == DUE * 20 == _rows_in_files(directory / "out"), system.rows()
    return {
        "keys due": DUE,
        "runs": len(flushed.runs),
        "from the tick to the last acknowledgement, s": round(flushed.seconds - flushed.tick, 1),
        "CPU of the runs, s": round(sum(ran.cpu for ran in flushed.runs), 1),
        "largest run, MB": max(ran.peak for ran in flushed.runs) // 10**6,
    }


def _budget(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of milliseconds; the first flush, which loads what no other loads, is left out."""
    del options
    runs: list[Ran] = []
    with up(directory) as system:
        for _ in range(_FLUSHES + 1):
            _push(system.buffer, ["payments"], 1000)
            [ran] = system.flush().runs
            runs.append(ran)
    phases = [_phases(ran) for ran in runs[1:]]
    return {name: round(statistics.median(phase[name] for phase in phases) * 1000) for name in phases[0]} | {
        "processor time of the run": round(statistics.median(ran.cpu for ran in runs[1:]) * 1000)
    }


def _phases(ran: Ran) -> dict[str, float]:
    at, end = ran.first, ran.last
    unit = ("read_records", "validate_records", "build_parquet", "acknowledge")
    return {
        "wait for the tick": at["tick"],
        "tick, until the run is in the queue": at["PIPELINE_ENQUEUED"] - at["tick"],
        "wait in the queue": at["PIPELINE_STARTING"] - at["PIPELINE_ENQUEUED"],
        "process, instance": at["process"] - at["PIPELINE_STARTING"],
        "definitions, plan of the run, Redis": at["STEP_START"] - at["process"],
        "plan: claim, cut": ran.steps["plan_units"],
        "read": ran.steps["read_records"],
        "validate": ran.steps["validate_records"],
        "build and write": ran.steps["build_parquet"],
        "acknowledge": ran.steps["acknowledge"],
        "go on, report": ran.steps["go_on"] + ran.steps["report"],
        "between the steps": ran.seconds - sum(ran.steps[op] for op in ("plan_units", *unit, "go_on", "report")),
        "end the run": end["PIPELINE_SUCCESS"] - end["STEP_SUCCESS"],
        "together, without tick and queue": end["PIPELINE_SUCCESS"] - at["PIPELINE_STARTING"],
    }


def _backlog(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """As many records as wanted over some keys, each one batch, between two conversions of a million."""
    figures: dict[str, Any] = {"records": options.records, "keys": options.keys}
    engine = [_convert(directory, options)]
    with up(directory, max_runs_per_tick=100) as system:
        each = options.records // options.keys // CHUNK * CHUNK
        for number in range(options.keys):
            subprocess.run([sys.executable, "-m", "benchmarks.scale_fill", f"key {number}", str(each)], check=True)
        with _client(directory) as client:
            figures["bytes of Redis per record"] = round(client.info("memory")["used_memory"] / each / options.keys)
        flushed = system.flush()
        rows = system.rows()
        assert rows == each * options.keys == _rows_in_files(directory / "out"), rows
    drained = rows / (flushed.seconds - flushed.tick)
    # Before and after, since a machine with other work does not stay the same.
    engine.append(_convert(directory, options))
    rates = [found.said["records"] / found.wall for found in engine]
    return figures | {
        "drained, records/s from the tick on": round(drained),
        "runs": len(flushed.runs),
        "CPU s per 100,000 records": round(sum(ran.cpu for ran in flushed.runs) / rows * 1e5, 2),
        "largest run, MB": max(ran.peak for ran in flushed.runs) // 10**6,
        "d2p convert --jobs 2, records/s, before and after": [round(rate) for rate in rates],
        "d2p convert, CPU s per 100,000 records": [round(one.cpu / one.said["records"] * 1e5, 2) for one in engine],
        "Targets": {
            "drain ÷ convert, at least 0.7": round(drained / statistics.mean(rates), 2),
            "largest run, MB, below 700": max(ran.peak for ran in flushed.runs) // 10**6,
        },
    }


def _convert(directory: Path, options: argparse.Namespace) -> Cost:
    """The engine alone, on a million records at most: ten take ten times as long."""
    from benchmarks.data import Data

    data = Data(min(options.records, 1_000_000), keys=options.keys)
    run(Contender("data", [sys.executable, "-m", "benchmarks.data", *data.arguments]))
    command = [sys.executable, "-m", "d2p_pipeline.cli.main", "convert", str(data.path), "--json"]
    cost = run(
        Contender("engine", [*command, "--jobs", "2", "--out", str(directory / "converted")], records=data.count)
    )
    assert cost
    return cost


def _rows_in_files(root: Path) -> int:
    import duckdb

    [(rows,)] = duckdb.connect().execute(f"SELECT count(*) FROM read_parquet('{root}/**/*.parquet')").fetchall()
    return rows


if __name__ == "__main__":
    main()
