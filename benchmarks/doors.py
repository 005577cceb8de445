"""Measure the doors beside HTTP: `python -m benchmarks.doors`.

`d2p forward` takes chunks of 1,000 records, each acknowledged, from this process; `d2p sqs` empties a queue of moto's server,
filled before, with messages of 200 records. One process each, an embedded Redis with `appendfsync always`, everything on this
machine. Rates per core divide by the CPU time of the door alone.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from botocore.session import Session

from benchmarks.receiver import cpu_of, table
from d2p_pipeline.buffer.connect import connect
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest import forward_sender, sqs_sender
from d2p_pipeline.ingest.generator import generate

AWS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def running(*command: str, **environment: str) -> Iterator[int]:
    """A process, its id."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=os.environ | environment, stderr=subprocess.DEVNULL
    ) as it:
        try:
            yield it.pid
        finally:
            it.terminate()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")


class Meter:
    """Records that Redis has, and the seconds and CPU seconds of a door since it was made."""

    def __init__(self, redis_url: str, pid: int) -> None:
        self._buffer = RedisBuffer(connect(redis_url), Names(), full_records=1 << 62, full_bytes=1 << 62)
        self._pid = pid
        self._before = self.accepted, time.monotonic(), cpu_of(pid)

    @property
    def accepted(self) -> int:
        return sum(totals.accepted for _, totals in self._buffer.totals())

    def row(self, door: str, size: float) -> tuple[str, ...]:
        records, wall, cpu = (
            now - then
            for now, then in zip((self.accepted, time.monotonic(), cpu_of(self._pid)), self._before, strict=True)
        )
        of_all = f"{records / wall:,.0f}", f"{records * size / wall / 1e6:,.0f}"
        return door, *of_all, f"{cpu / records * 1e6:,.0f}", f"{records * size / cpu / 1e6:,.0f}"


def forward(directory: Path, lines: list[bytes], size: float) -> tuple[str, ...]:
    port = free_port()
    with EmbeddedRedis(directory / "forward") as redis:
        settings = {"D2P_REDIS_URL": redis.url, "D2P_HOME": str(directory)}
        with running("d2p_pipeline.cli.main", "forward", "--port", str(port), **settings) as pid:
            wait_for(port)
            meter = Meter(redis.url, pid)
            forward_sender.send(lines, f"127.0.0.1:{port}", batch=1000)
            return meter.row("d2p forward, chunks of 1,000", size)


def sqs(directory: Path, lines: list[bytes], size: float) -> tuple[str, ...]:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with EmbeddedRedis(directory / "sqs") as redis, running("moto.server", "--port", str(port)):
        wait_for(port)
        client = Session().create_client("sqs", endpoint_url=endpoint)
        queue = client.create_queue(QueueName="records")["QueueUrl"]
        sqs_sender.send(lines, client, queue, batch=200)
        settings = {"D2P_REDIS_URL": redis.url, "D2P_HOME": str(directory)}
        settings |= {"D2P_SQS_QUEUE_URL": queue, "D2P_SQS_ENDPOINT": endpoint, "D2P_SQS_WAIT": "1"}
        with running("d2p_pipeline.cli.main", "sqs", **settings) as pid:
            meter = Meter(redis.url, pid)
            while not meter.accepted:  # its start is not its speed
                time.sleep(0.01)
            meter = Meter(redis.url, pid)
            while meter.accepted < len(lines):
                time.sleep(0.02)
            return meter.row("d2p sqs, messages of 200", size)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.doors", description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="records through each door (%(default)s)")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("D2P_")]:
        del os.environ[name]
    os.environ.update(AWS)
    lines = list(generate(options.records, keys=4, seed=1))
    size = sum(map(len, lines)) / len(lines)
    with tempfile.TemporaryDirectory() as directory:
        rows = [door(Path(directory), lines, size) for door in (forward, sqs)]
    table(f"Records of {size:,.0f} bytes", ("records/s", "MB/s", "CPU µs each", "MB/s per core"), rows)


if __name__ == "__main__":
    main()
