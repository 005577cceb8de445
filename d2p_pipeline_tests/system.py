"""The whole system as users start it, `d2p up` with real processes, seen and steered through HTTP and GraphQL."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


class System:
    """A running `d2p up`."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self.root = Path(settings.get("writer_file_path", directory / "out"))
        self.port, self.dagster_port = free_port(), free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("D2P_", "DAGSTER_"))}
        environment |= {f"D2P_{name.upper()}": value for name, value in settings.items()}
        command = [sys.executable, "-m", "d2p_pipeline.cli.main", "up", "--port", str(self.port)]
        self.log = directory / f"up-{self.port}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--dagster-port", str(self.dagster_port)],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> "System":
        until(lambda: "Ctrl-C ends all" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def post(self, *lines: bytes) -> None:
        answer = httpx.post(f"http://127.0.0.1:{self.port}/records", content=b"\n".join(lines))
        assert answer.json()["accepted"] == len(lines)

    def messages(self) -> list[str]:
        if not list(self.root.rglob("[!.]*.parquet")):
            return []
        rows = duckdb.connect().execute(f"SELECT message FROM read_parquet('{self.root}/**/*.parquet')").fetchall()
        return sorted(message for (message,) in rows)

    def graphql(self, query: str) -> Any:
        answer = httpx.post(f"http://127.0.0.1:{self.dagster_port}/graphql", json={"query": query}, timeout=60)
        return answer.json()["data"]

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)


Start = Callable[..., System]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(name: str = "system", **settings: str) -> System:
            directory = tmp_path / name
            directory.mkdir(exist_ok=True)
            system = System(directory, **settings)
            stack.callback(system.stop)
            return system

        yield start


def block(system: System, key: str) -> Path:
    """Puts a file where the key's directory should be."""
    blocked = system.root / f"capability={key}"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    return blocked


def partitions_in_recovery(system: System) -> list[str]:
    query = '{assetNodes(assetKeys: {path: "recovery"}) {partitionKeys}}'
    [node] = system.graphql(query)["assetNodes"]
    return node["partitionKeys"]
