"""Measure the receiver: `python -m benchmarks.receiver`, with wrk on the PATH. aiohttp takes part if it is installed.

One worker, an embedded Redis, everything on this machine. Servers take turns within each round, so that a disturbance hits
all; tables show medians. Rates per core divide by the CPU time of the receiving process alone. Requests of one record are
measured with `appendfsync always`, as `d2p up` has it, and `everysec`, Redis' own default: the difference is the disk's.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from redis import Redis
from rich.console import Console
from rich.table import Table

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.ingest.generator import generate

CONNECTIONS = 32
BATCH = 1000
SYNCS = ("always", "everysec")
TICKS = os.sysconf("SC_CLK_TCK")
SERVERS = {
    "receiver": [sys.executable, "-m", "d2p_pipeline.cli.main", "receive", "--port"],
    "without Redis": [sys.executable, "-m", "benchmarks.receivers", "silent"],
    "Starlette, one RPUSH each": [sys.executable, "-m", "benchmarks.receivers", "plain"],
}
if find_spec("aiohttp"):
    SERVERS["aiohttp, one RPUSH each"] = [sys.executable, "-m", "benchmarks.receivers", "aiohttp"]


@dataclass(frozen=True)
class Load:
    """What wrk saw, and the CPU seconds of the server's processes meanwhile."""

    rate: float
    p99_ms: float
    seconds: float
    cpu: float
    redis_cpu: float
    failed: int


class Server:
    """A running server, all its processes."""

    def __init__(self, name: str, redis_url: str, directory: Path) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            self.port = listener.getsockname()[1]
        environment = {n: v for n, v in os.environ.items() if not n.startswith("D2P_")}
        self._process = subprocess.Popen(
            [*SERVERS[name], str(self.port)],
            env={**environment, "D2P_REDIS_URL": redis_url, "D2P_HOME": str(directory)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{name} did not come up")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [self._process.pid, *map(int, children)]

    @property
    def cpu(self) -> float:
        return sum(map(cpu_of, self.pids))

    @property
    def resident(self) -> int:
        """Bytes of the largest process."""
        sizes = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return max(sizes) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def cpu_of(pid: int) -> float:
    found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(found[11]) + int(found[12])) / TICKS


@contextmanager
def running(redis: EmbeddedRedis, directory: Path, names: list[str]) -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    try:
        for name in names:
            servers[name] = Server(name, redis.url, directory)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def load(
    redis: EmbeddedRedis,
    server: Server,
    path: str,
    bodies: list[bytes],
    seconds: int,
    connections: int,
    delay_ms: float = 0,
) -> Load:
    """POST bodies in turn to a server with an empty Redis; with a delay, each connection waits about that long between two."""
    emptied(redis)
    assert redis.process
    with tempfile.TemporaryDirectory() as directory:
        script = ["local bodies = {}", 'wrk.headers["Host"] = "x"']
        for number, body in enumerate(bodies):
            (Path(directory) / str(number)).write_bytes(body)
            script.append(f'file = io.open("{directory}/{number}", "rb")')
            script.append(f'bodies[{number + 1}] = wrk.format("POST", "{path}", nil, file:read("*a")) file:close()')
        script.append("local turn = 0")
        script.append("function request() turn = turn % #bodies + 1 return bodies[turn] end")
        if delay_ms:
            # Spread, so that the connections do not go in step; wrk takes whole milliseconds and drops the rest.
            script.append(f"function delay() return {2 * delay_ms} * math.random() + math.random() end")
        lua = Path(directory) / "wrk.lua"
        lua.write_text("\n".join(script))
        before, redis_before, began = server.cpu, cpu_of(redis.process.pid), time.monotonic()
        said = subprocess.run(
            ["wrk", "-t1", "--latency", *(f"-c{connections}", f"-d{seconds}s"), "-s", str(lua), server.url],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        took, cpu, redis_cpu = time.monotonic() - began, server.cpu - before, cpu_of(redis.process.pid) - redis_before
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    assert rate and p99, said
    unit = {"us": 1e-3, "ms": 1.0, "s": 1e3}[p99[2]]
    return Load(float(rate[1]), float(p99[1]) * unit, took, cpu, redis_cpu, int(failed[1]) if failed else 0)


def emptied(redis: EmbeddedRedis) -> None:
    subprocess.run([sys.executable, "-c", f"import redis; redis.Redis.from_url({redis.url!r}).flushall()"], check=True)


def single(redis: EmbeddedRedis, directory: Path, rounds: int, seconds: int) -> None:
    """Requests of one record each."""
    _compare(redis, directory, rounds, seconds, "as the schema has it", padded(list(generate(200, keys=4, seed=1))))


def rewritten(redis: EmbeddedRedis, directory: Path, rounds: int, seconds: int) -> None:
    """Requests of one of the predecessor's records each."""
    bodies = list(generate(200, profile="d2p", keys=4, seed=1))
    _compare(redis, directory, rounds, seconds, "of the predecessor, rewritten", bodies)


def _compare(redis: EmbeddedRedis, directory: Path, rounds: int, seconds: int, title: str, bodies: list[bytes]) -> None:
    with running(redis, directory, list(SERVERS)) as servers, Redis.from_url(redis.url) as client:
        found: dict[str, dict[str, list[Load]]] = {sync: {name: [] for name in servers} for sync in SYNCS}
        for _ in range(rounds):
            for sync, loads in found.items():
                client.config_set("appendfsync", sync)
                for name, server in servers.items():
                    loads[name].append(load(redis, server, "/record/", bodies, seconds, CONNECTIONS))
        for sync, loads in found.items():
            client.config_set("appendfsync", sync)
            rate = statistics.median(one.rate for one in loads["receiver"])
            loads[f"receiver, half of {rate:,.0f}"] = [_at_half(redis, servers["receiver"], bodies, seconds, rate)]
        client.config_set("appendfsync", "always")
    size = statistics.mean(map(len, bodies))
    for sync, loads in found.items():
        rows = [(name, *_row(some, loads["receiver"] if name in SERVERS else [])) for name, some in loads.items()]
        columns = ("requests/s", "p99 ms", "CPU µs each", "Redis'", "receiver ÷ this", "failed")
        table(f"{size:,.0f} bytes, {title}; {CONNECTIONS} connections; appendfsync {sync}", columns, rows)


def _at_half(redis: EmbeddedRedis, server: Server, bodies: list[bytes], seconds: int, rate: float) -> Load:
    """A load of half of the rate. From one request of a client to its next it takes the delay and what the loads before show."""
    delay, wanted = CONNECTIONS / rate * 1000, 2 * CONNECTIONS / rate * 1000
    for _ in range(2):
        found = load(redis, server, "/record/", bodies, seconds, CONNECTIONS, delay)
        delay = max(0, delay + wanted - CONNECTIONS / found.rate * 1000)
    return load(redis, server, "/record/", bodies, seconds, CONNECTIONS, delay)


def _row(some: list[Load], receiver: list[Load]) -> tuple[str, ...]:
    rate, p99 = statistics.median(one.rate for one in some), statistics.median(one.p99_ms for one in some)
    cpu = statistics.median(one.cpu / (one.rate * one.seconds) for one in some) * 1e6
    store = statistics.median(one.redis_cpu / (one.rate * one.seconds) for one in some) * 1e6
    # Of what ran one after the other within a round, which a disturbance hits alike.
    ratios = [ours.rate / other.rate for ours, other in zip(receiver, some, strict=False)]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    return f"{rate:,.0f}", f"{p99:,.1f}", f"{cpu:,.0f}", f"{store:,.0f}", ratio, str(sum(one.failed for one in some))


def padded(lines: list[bytes], size: int = 2500) -> list[bytes]:
    """Records of about `size` bytes."""
    records = [json.loads(line) for line in lines]
    text = "the quick brown fox jumps over the lazy dog " * (size // 40)
    for record, line in zip(records, lines, strict=True):
        record["message"] += " " + text[: max(0, size - len(line) - 1)]
    return [json.dumps(record, separators=(",", ":")).encode() for record in records]


def batches(redis: EmbeddedRedis, directory: Path, rounds: int, seconds: int) -> None:
    """NDJSON bodies."""
    rows: list[tuple[str, ...]] = []
    with running(redis, directory, ["receiver", "without Redis"]) as servers:
        for title, lines in (
            ("867 bytes", list(generate(BATCH, keys=4, seed=1))),
            ("2,500 bytes", padded(list(generate(BATCH, keys=4, seed=1)))),
            ("2,300 bytes, rewritten", list(generate(BATCH, profile="d2p", keys=4, seed=1))),
        ):
            body = b"\n".join(lines)
            for name, server in servers.items():
                some = []
                for _ in range(rounds):
                    some.append(load(redis, server, "/records", [body], seconds, 4))
                wall = statistics.median(len(body) * one.rate / 1e6 for one in some)
                core = statistics.median(len(body) * one.rate * one.seconds / one.cpu / 1e6 for one in some)
                failed = sum(one.failed for one in some)
                rows.append((f"{title}, {name}", f"{wall:,.0f}", f"{core:,.0f}", str(failed)))
    table(f"NDJSON bodies of {BATCH:,} records, 4 connections", ("MB/s", "MB/s per core", "failed"), rows)


def memory(redis: EmbeddedRedis, directory: Path, records: int) -> None:
    """Resident memory of the worker while records go through it."""
    bodies = [b"\n".join(small(1000))]
    rows: list[tuple[str, ...]] = []
    with running(redis, directory, ["receiver"]) as servers:
        server = servers["receiver"]
        sent = 0
        while sent < records:
            found = load(redis, server, "/records", bodies, 10, 8)
            sent += round(found.rate * found.seconds) * 1000
            rows.append((f"{sent:,}", f"{server.resident / 2**20:,.0f}", f"{found.rate * 1000:,.0f}"))
    table("Memory of a worker, batches of 1,000 records", ("MiB", "records/s"), rows)


def small(count: int) -> list[bytes]:
    record = (
        b'{"time":"2026-11-21T10:00:00Z","level":"info","message":"number %d","business-capability":"payments",'
        b'"business-domain":"d","business-service":"s","application-service":"a"}'
    )
    return [record % number for number in range(count)]


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", box=None)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


PARTS = {"single": single, "rewritten": rewritten, "batches": batches}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.receiver", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server (%(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="seconds of load (%(default)s)")
    parser.add_argument("--records", type=int, default=10_000_000, help="records of the memory run (%(default)s)")
    parser.add_argument("--only", action="append", choices=[*PARTS, "memory"], help="may be repeated")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: https://github.com/wg/wrk, or your system's package of that name")
    with tempfile.TemporaryDirectory() as directory, EmbeddedRedis(Path(directory) / "redis") as redis:
        for name in options.only or [*PARTS, "memory"]:
            if name == "memory":
                memory(redis, Path(directory), options.records)
            else:
                PARTS[name](redis, Path(directory), options.rounds, options.seconds)


if __name__ == "__main__":
    main()
