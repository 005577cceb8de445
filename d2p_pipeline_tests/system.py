"""The whole system as users start it, `d2p up` with real processes, seen and steered through HTTP and GraphQL."""

import os
import re
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
        self._environment = environment | {f"D2P_{name.upper()}": value for name, value in settings.items()}
        self.log = directory / f"up-{self.port}.log"
        self.client = httpx.Client(timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
        self.start()

    def start(self) -> None:
        """Start the process; again when it has ended."""
        command = [sys.executable, "-m", "d2p_pipeline.cli.main", "up", "--port", str(self.port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--dagster-port", str(self.dagster_port)],
                cwd=self.directory,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> "System":
        until(lambda: "Ctrl-C ends all" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def post(self, *lines: bytes) -> None:
        answer = self.client.post(f"http://127.0.0.1:{self.port}/records", content=b"\n".join(lines))
        assert answer.json()["accepted"] == len(lines)

    def messages(self, *, besides: str = "") -> list[str]:
        """All that are in files, those of one key left out."""
        files = f"read_parquet('{self.root}/capability=*/**/*.parquet')"
        rows = self.query(f'SELECT message FROM {files} WHERE "business-capability" != ?', besides)
        return sorted(message for (message,) in rows)

    def rows(self, key: str) -> tuple[int, int]:
        """A key's rows in files, and how many messages differ."""
        files = f"read_parquet('{self.root}/capability={key}/**/*.parquet')"
        [found] = self.query(f"SELECT count(*), count(DISTINCT message) FROM {files}") or [(0, 0)]
        return found

    def query(self, query: str, *parameters: str) -> list[tuple[Any, ...]]:
        """Nothing as long as there are no files."""
        try:
            return duckdb.connect().execute(query, parameters).fetchall()
        except duckdb.IOException as error:
            if "No files found" not in str(error):
                raise
            return []

    def graphql(self, query: str, **variables: Any) -> Any:
        answer = self.client.post(
            f"http://127.0.0.1:{self.dagster_port}/graphql", json={"query": query, "variables": variables}
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

    def process_of(self, run: str) -> int | None:
        """The process that executes a run, once it has said so."""
        query = """query($run: ID!) {runOrError(runId: $run) {... on Run {eventConnection {events {
            ... on MessageEvent {message}}}}}}"""
        events = self.graphql(query, run=run)["runOrError"]["eventConnection"]["events"]
        found = (re.search(r"\(pid: (\d+)\)", event.get("message", "")) for event in events)
        return next((int(match[1]) for match in found if match), None)

    def runs_of(self, key: str) -> list[str]:
        """Runs for one key, the newest first."""
        query = "query($tags: [ExecutionTag!]) {runsOrError(filter: {tags: $tags}) {... on Runs {results {runId}}}}"
        runs = self.graphql(query, tags=[{"key": "d2p/key", "value": key}])["runsOrError"]["results"]
        return [run["runId"] for run in runs]

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
        self.client.close()
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


def peak_mb(process: int) -> int:
    """The most memory a process has had; 0 when it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) // 1024 if found else 0


def partitions_in_recovery(system: System) -> list[str]:
    query = '{assetNodes(assetKeys: [{path: ["recovery"]}]) {partitionKeys}}'
    [node] = system.graphql(query)["assetNodes"]
    return node["partitionKeys"]
