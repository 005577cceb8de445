"""What many keys and a large backlog cost: the tick of the sensor, the runs it asks for, the drain of what waits.

    python -m benchmarks.scale tick       10,000 keys with 1,000 due; 100,000 idle buffers; a cold start with 100,000
    python -m benchmarks.scale deliver    10,000 keys with 1,000 due, delivered by real run processes, two at a time
    python -m benchmarks.scale budget     one flush of 1,000 records, by phase, in a fresh process and in a warm one
    python -m benchmarks.scale backlog    a backlog of several keys, drained by real run processes, beside the engine alone

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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measure import Contender, Cost, run
from benchmarks.scale_fill import CHUNK

KEYS, DUE, IDLE = 10_000, 1_000, 100_000
_TICKS = 9


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("what", choices=["tick", "deliver", "budget", "backlog"])
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the backlog (%(default)s)")
    parser.add_argument("--keys", type=int, default=8, help="keys of the backlog (%(default)s)")
    parser.add_argument("--no-engine", action="store_true", help="do not run the engine alone beside the backlog")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time (%(default)s)")
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


@dataclass(frozen=True)
class Drain:
    """What became of the runs that were asked for."""

    seconds: float
    runs: int
    peak: int
    cpu: float


def _deliver(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    with _system(directory, buffer_size=1000) as buffer:
        _push(buffer, [f"idle {number}" for number in range(KEYS - DUE)], 1)
        _push(buffer, [f"due {number}" for number in range(DUE)], 20)
        buffer.request_flush([f"due {number}" for number in range(DUE)])
        drain = _drain(options.processes)
        rows = sum(totals.rows for _, totals in buffer.totals())
        assert rows == DUE * 20 == _rows_in_files(directory / "out"), rows
        return {
            "keys due": DUE,
            "runs": drain.runs,
            "from the tick to the last acknowledgement, s": round(drain.seconds, 1),
            "CPU of the runs, s": round(drain.cpu, 1),
            "largest run, MB": drain.peak // 10**6,
            "records": rows,
        }


def _backlog(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """As many records as wanted over some keys, each one batch, between two runs of the engine alone."""
    figures: dict[str, Any] = {"records": options.records, "keys": options.keys, "processes": options.processes}
    engine = [] if options.no_engine else [_convert(directory, options)]
    with _system(directory, buffer_size=10**9, flush_bytes=10**12, max_runs_per_tick=100) as buffer:
        each = options.records // options.keys // CHUNK * CHUNK
        for number in range(options.keys):
            _fill(f"key {number}", each)
        with _client(directory) as client:
            figures["bytes of Redis per record"] = round(client.info("memory")["used_memory"] / each / options.keys)
        buffer.request_flush()
        drain = _drain(options.processes)
        rows = sum(totals.rows for _, totals in buffer.totals())
        assert rows == each * options.keys == _rows_in_files(directory / "out"), rows
        figures |= {
            "drained, records/s": round(rows / drain.seconds),
            "runs": drain.runs,
            "CPU s per 100,000 records": round(drain.cpu / rows * 1e5, 2),
            "largest run, MB": drain.peak // 10**6,
        }
    if engine:
        # Before and after, since a machine with other work does not stay the same.
        engine.append(_convert(directory, options))
        rates = [found.said["records"] / found.wall for found in engine]
        costs = [found.cpu / found.said["records"] * 1e5 for found in engine]
        figures["engine alone (d2p convert), records/s, before and after"] = [round(rate) for rate in rates]
        figures["engine alone, CPU s per 100,000 records"] = [round(cost, 2) for cost in costs]
        figures["drain ÷ engine"] = round(figures["drained, records/s"] / statistics.mean(rates), 2)
    return figures


def _convert(directory: Path, options: argparse.Namespace) -> Cost:
    """The engine alone, on a million records at most: ten take ten times as long."""
    from benchmarks.data import Data

    data = Data(min(options.records, 1_000_000), keys=options.keys)
    run(Contender("data", [sys.executable, "-m", "benchmarks.data", *data.arguments]))
    command = [sys.executable, "-m", "d2p_pipeline.cli.main", "convert", str(data.path), "--json"]
    command += ["--jobs", str(options.processes), "--out", str(directory / "converted")]
    cost = run(Contender("engine", command, records=data.count))
    assert cost
    return cost


def _budget(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    del options
    with _system(directory):
        cost = run(Contender("budget", [sys.executable, "-m", "benchmarks.scale_budget"]))
    assert cost
    return cost.said


def _fill(key: str, records: int) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.scale_fill", key, str(records)], check=True)


def _drain(processes: int) -> Drain:
    """Ticks, and a real process for each run asked for, until nothing is left; a fifth of a second between two looks."""
    import dagster as dg

    from d2p_pipeline.orchestration.sensor import buffer_sensor

    runs = 0
    costs: list[Cost] = []
    began = time.monotonic()
    with dg.DagsterInstance.get() as instance:
        requests: list[dg.RunRequest] = []
        while True:
            found = buffer_sensor.evaluate_tick(dg.build_sensor_context(instance=instance)).run_requests or []
            requests += found
            if not requests:
                break
            requests.sort(key=lambda request: -int(request.tags["dagster/priority"]))
            with _Processes(processes) as pool:
                costs += pool.run_all(requests)
            runs += len(requests)
            requests = []
    seconds = time.monotonic() - began
    return Drain(seconds, runs, max(cost.peak for cost in costs), sum(cost.cpu for cost in costs))


class _Processes:
    """Run processes, as the launcher of Dagster starts them: each loads the definitions anew."""

    def __init__(self, most: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(most)

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run_all(self, requests: Sequence[Any]) -> list[Cost]:
        def one(request: Any) -> Cost:
            configuration = json.dumps(request.run_config)
            cost = run(Contender("run", [sys.executable, "-m", "benchmarks.scale_run", configuration]))
            assert cost
            return cost

        return list(self._pool.map(one, requests))


def _rows_in_files(root: Path) -> int:
    import duckdb

    [(rows,)] = duckdb.connect().execute(f"SELECT count(*) FROM read_parquet('{root}/**/*.parquet')").fetchall()
    return rows


if __name__ == "__main__":
    main()
