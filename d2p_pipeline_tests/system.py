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


def until(condition: Callable[[], Any], seconds: float = 300, longest_pause: float = 0.5) -> Any:
    """Wait for a condition, looking ever less often: who looks takes processor time from what is looked at."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(pause)
        pause = min(pause * 1.3, longest_pause)
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

    def graphql(self, query: str, **variables: Any) -> Any:
        answer = httpx.post(
            f"http://127.0.0.1:{self.dagster_port}/graphql",
            json={"query": query, "variables": variables},
            timeout=60,
        ).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def launch(self, job: str, config: dict[str, Any] | None = None, tags: dict[str, str] | None = None) -> str:
        """What the launchpad does; returns the run's id."""
        mutation = """mutation($params: ExecutionParams!) {launchRun(executionParams: $params) {
            __typename ... on LaunchRunSuccess {run {runId}}
            ... on RunConfigValidationInvalid {errors {message}} ... on PythonError {message}}}"""
        selector = {"repositoryLocationName": "d2p", "repositoryName": "__repository__", "jobName": job}
        params = {
            "selector": selector,
            "runConfigData": config or {},
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]},
        }
        answer = self.graphql(mutation, params=params)["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def status(self, run: str) -> str:
        return self.graphql("query($run: ID!) {runOrError(runId: $run) {... on Run {status}}}", run=run)["runOrError"][
            "status"
        ]

    def backfill(self, partitions: list[str]) -> str:
        """What "Materialize" does with chosen partitions of `recovery`; returns the backfill's id."""
        mutation = """mutation($params: LaunchBackfillParams!) {launchPartitionBackfill(backfillParams: $params) {
            __typename ... on LaunchBackfillSuccess {backfillId} ... on PythonError {message}}}"""
        params = {"assetSelection": [{"path": "recovery"}], "partitionNames": partitions, "fromFailure": False}
        answer = self.graphql(mutation, params=params)["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        return answer["backfillId"]

    def backfill_status(self, backfill: str) -> str:
        query = "query($id: String!) {partitionBackfillOrError(backfillId: $id) {... on PartitionBackfill {status}}}"
        return self.graphql(query, id=backfill)["partitionBackfillOrError"]["status"]

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
    query = '{assetNodes(assetKeys: [{path: ["recovery"]}]) {partitionKeys}}'
    [node] = system.graphql(query)["assetNodes"]
    return node["partitionKeys"]
