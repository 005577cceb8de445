"""The whole system under load: `python -m benchmarks.end_to_end [KEYS …]`; `d2p up` as users start it, on this machine's cores.

    waiting     what Redis takes for each record that waits, before anything is sealed (with --waiting: this alone)
    saturate    producers post as fast as they are let, `max_buffer_bytes` holds them back: what is delivered is sustained
    half        half of that rate: how long from the request to a file that can be read, and what each process takes
    flood       ten times the sustained rate is offered for a minute; how it ends, and how long until nothing waits

At the end the books are balanced by number: every record of a request that was answered 202 is in one row, those of refused
requests in none. Producers share the cores with what they load. Requests have 500 records of one key.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

PER_REQUEST = 500
HELD_BACK = 256 << 20
"""Raw bytes that may wait: `max_buffer_bytes`."""
SECONDS = 30.0
FLOOD_SECONDS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("keys", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument("--flood", type=int, default=100, help="the size that is flooded (%(default)s)")
    parser.add_argument("--waiting", action="store_true", help="only what Redis takes for each record that waits")
    options = parser.parse_args()
    for keys in options.keys:
        print(json.dumps(_bytes_waiting(keys), indent=2), flush=True)
        if options.waiting:
            continue
        with tempfile.TemporaryDirectory() as directory, _system(Path(directory)) as system:
            print(json.dumps(_measured(system, keys, flood=keys == options.flood), indent=2), flush=True)


@dataclass
class System:
    """A running `d2p up`."""

    directory: Path
    port: int
    process: psutil.Process
    peaks: Counter[str] = field(default_factory=Counter[str])

    def buffer(self) -> Any:
        from d2p_pipeline.buffer.connect import connect
        from d2p_pipeline.buffer.names import Names
        from d2p_pipeline.buffer.redis import RedisBuffer

        client = connect(f"unix://{self.directory}/.d2p/redis/redis.sock")
        return RedisBuffer(client, Names(), full_records=1, full_bytes=1)

    def watch(self, ended: threading.Event) -> None:
        """Note the largest resident size of each kind of process."""
        while not ended.wait(0.5):
            for process in self.process.children(recursive=True):
                try:
                    self.peaks[_kind(process)] = max(self.peaks[_kind(process)], process.memory_info().rss)
                except psutil.Error:
                    continue


def _kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if "forkserver" in command:
        parent = process.parent()
        return "run" if parent and "forkserver" in " ".join(parent.cmdline()) else "template of runs"
    kinds = {"redis-server": "Redis", "cli.main receive": "receiver", "orchestration.code_server": "code server"}
    kinds |= {"dagster_webserver": "webserver", "dagster._daemon": "daemon"}
    return next((kind for sign, kind in kinds.items() if sign in command), "other")


@contextmanager
def _system(directory: Path) -> Iterator[System]:
    ports = [free_port(), free_port()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("D2P_", "DAGSTER_"))}
    command = [sys.executable, "-m", "d2p_pipeline.cli.main", "up", "--port", str(ports[0])]
    log = directory / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--dagster-port", str(ports[1])],
            cwd=directory,
            env=environment | {"D2P_MAX_BUFFER_BYTES": str(HELD_BACK)},
            stdout=output,
            stderr=output,
        )
    try:
        while b"Ctrl-C ends all" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield System(directory, ports[0], psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(120)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


@dataclass
class Load:
    """Posts requests over some connections, at most `rate` records a second; keeps what became of each."""

    port: int
    keys: int
    first: int
    seconds: float
    rate: float | None
    connections: int
    requests: int | None = None
    """At most so many."""
    statuses: dict[int, int] = field(default_factory=dict[int, int])
    began: float = 0.0

    def run(self) -> "Load":
        self.began = time.monotonic()
        template = _template()
        threads = [threading.Thread(target=self._post, args=(place, template)) for place in range(self.connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _post(self, place: int, template: bytes) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        turn = 0
        while (elapsed := time.monotonic() - self.began) < self.seconds:
            number = self.first + place + turn * self.connections
            if self.requests is not None and number - self.first >= self.requests:
                return
            due = (number - self.first) * PER_REQUEST / self.rate if self.rate else 0.0
            if due > elapsed:
                time.sleep(min(due - elapsed, self.seconds - elapsed))
                continue
            turn += 1
            key = number % self.keys
            body = template.replace(b"NNNNNNNN", b"%08d" % number).replace(b"KKKKKKKK", b"key %04d" % key)
            body = body.replace(b"TTTTTTTT", datetime.now(UTC).isoformat().encode())
            try:
                connection.request("POST", "/records", body, {"Content-Type": "application/x-ndjson"})
                answer = connection.getresponse()
                answer.read()
                self.statuses[number] = answer.status
                if answer.status != 202 and self.rate is None:
                    time.sleep(0.2)
            except (OSError, HTTPException):
                self.statuses[number] = 0
                connection.close()


def _template() -> bytes:
    from d2p_pipeline.ingest.generator import generate

    lines: list[bytes] = []
    for place, line in enumerate(generate(PER_REQUEST, profile="canonical", keys=1, seed=1)):
        record = json.loads(line)
        record |= {
            "message": f"NNNNNNNN-{place} {record['message']}",
            "time": "TTTTTTTT",
            "business-capability": "KKKKKKKK",
        }
        lines.append(json.dumps(record, separators=(",", ":")).encode())
    return b"\n".join(lines)


def _bytes_waiting(keys: int) -> dict[str, Any]:
    """A receiver alone, so that nothing is sealed; two requests for each key, forty at least. Redis's own count of what it uses,
    and the sizes of the lists alone."""
    from redis import Redis

    from d2p_pipeline.buffer.embedded import EmbeddedRedis

    port, requests = free_port(), max(40, 2 * keys)
    with tempfile.TemporaryDirectory() as directory, EmbeddedRedis(Path(directory)) as server:
        command = [sys.executable, "-m", "d2p_pipeline.cli.main", "receive", "--port", str(port)]
        receiver = subprocess.Popen(command, cwd=directory, env=os.environ | {"D2P_REDIS_URL": server.url})
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert receiver.poll() is None
                time.sleep(0.1)
            client: Any = Redis.from_url(server.url)
            base = client.info("memory")["used_memory"]
            load = Load(port, keys, 0, 600.0, None, 4, requests=requests).run()
            assert set(load.statuses.values()) == {202}, Counter(load.statuses.values())
            used = client.info("memory")["used_memory"] - base
            lists = sum(client.memory_usage(name, samples=0) for name in client.scan_iter("data:*", count=1000))
        finally:
            receiver.terminate()
            receiver.wait(60)
    records = requests * PER_REQUEST
    return {
        "keys": keys,
        "records waiting": records,
        "Redis bytes for each of them": round(used / records, 1),
        "of these in lists": round(lists / records, 1),
    }


def _measured(system: System, keys: int, *, flood: bool) -> dict[str, Any]:
    ended = threading.Event()
    watch = threading.Thread(target=system.watch, args=(ended,))
    watch.start()
    buffer = system.buffer()
    loads: list[Load] = []

    def load(seconds: float, rate: float | None, connections: int) -> Load:
        first = max((number + 1 for some in loads for number in some.statuses), default=0)
        loads.append(Load(system.port, keys, first, seconds, rate, connections))
        return loads[-1].run()

    figures: dict[str, Any] = {"keys": keys, "load average of the machine": round(os.getloadavg()[0], 1)}
    # The first third fills what waits; then as much comes as is delivered.
    load(SECONDS / 3, None, 4)
    before, began = _rows(buffer), time.monotonic()
    load(SECONDS, None, 4)
    sustained = (_rows(buffer) - before) / (time.monotonic() - began)
    figures["sustained, records/s"] = round(sustained)
    figures["waiting then"] = _waiting(buffer)
    _settle(buffer)
    half = load(SECONDS, sustained / 2, 4)
    figures["at half of it: lag p50, p95, p99, most (s)"] = _lags(system, half, buffer)
    if flood:
        found = load(FLOOD_SECONDS, sustained * 10, 32)
        answers = Counter(found.statuses.values())
        figures["flood: records/s offered"] = round(len(found.statuses) * PER_REQUEST / FLOOD_SECONDS)
        figures["flood: answers by status"] = dict(answers)
        figures["flood: waiting at its end"] = _waiting(buffer)
        began = time.monotonic()
        _settle(buffer)
        figures["flood: until nothing waits, s"] = round(time.monotonic() - began, 1)
        figures["after it: lag p50, p95, p99, most (s)"] = _lags(system, load(10, sustained / 2, 4), buffer)
    figures["peak MB"] = {kind: round(size / 1e6) for kind, size in system.peaks.most_common()}
    ended.set()
    watch.join()
    figures["books"] = _books(system.directory / "out", loads)
    return figures


def _rows(buffer: Any) -> int:
    return sum(totals.rows for _, totals in buffer.totals())


def _waiting(buffer: Any) -> int:
    return sum(totals.accepted - totals.rows - totals.dead_letters for _, totals in buffer.totals())


def _settle(buffer: Any) -> None:
    while _waiting(buffer):
        time.sleep(0.5)


def _lags(system: System, load: Load, buffer: Any) -> list[float]:
    """From the moment a request was made to the moment its file had its name."""
    import duckdb

    _settle(buffer)
    root, last = system.directory / "out", max(load.statuses)
    rows = duckdb.connect().execute(
        f"""SELECT filename, epoch("time") FROM read_parquet('{root}/**/*.parquet', filename = true)
        WHERE CAST(substr(message, 1, 8) AS BIGINT) BETWEEN {load.first} AND {last}"""
    )
    there: dict[str, float] = {}
    lags: list[float] = []
    while page := rows.fetchmany(100_000):
        for name, sent in page:
            if name not in there:
                there[name] = Path(name).stat().st_ctime
            lags.append(there[name] - sent)
    lags.sort()
    return [round(lags[min(len(lags) - 1, int(len(lags) * part))], 1) for part in (0.5, 0.95, 0.99, 1.0)]


def _books(root: Path, loads: list[Load]) -> dict[str, int]:
    """Of all records: acknowledged and there once; and what must not be."""
    import duckdb

    found = duckdb.connect().execute(
        f"""SELECT CAST(substr(message, 1, 8) AS BIGINT) AS request, count(*), count(DISTINCT message)
        FROM read_parquet('{root}/**/*.parquet') GROUP BY request"""
    )
    there = {request: (rows, different) for request, rows, different in found.fetchall()}
    books: dict[str, int] = defaultdict(int)
    for load in loads:
        for number, status in load.statuses.items():
            rows, different = there.get(number, (0, 0))
            if status == 202:
                books["acknowledged"] += PER_REQUEST
                books["lost"] += PER_REQUEST - different
            elif status:
                books["refused"] += PER_REQUEST
                books["refused but there"] += rows
            else:
                books["not answered"] += PER_REQUEST
            books["doubled"] += rows - different
    assert not (books["lost"] or books["doubled"] or books["refused but there"]), dict(books)
    return dict(books)


if __name__ == "__main__":
    main()
