"""Runs the processes of `d2p up` and ends them: receiver, Dagster's code server, webserver and daemon.

Each writes to a log file of its own. One that ends by itself is started again, with a growing pause. On Linux a child also
ends with its parent, however that dies: a Dagster daemon that nobody supervises would go on launching runs.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from d2p_pipeline.buffer.embedded import end_with_parent, socket_path

if TYPE_CHECKING:
    from d2p_pipeline.settings import Settings

LOCATION = "d2p"
_CODE = ("-m", "d2p_pipeline.definitions", "--location-name", LOCATION)
PAUSE_SECONDS = 1.0
PAUSE_LIMIT_SECONDS = 30.0
STOP_SECONDS = 40.0
START_SECONDS = 120.0
POLL_SECONDS = 0.2


class StartError(Exception):
    """A process did not come up."""


@dataclass
class Child:
    """A supervised process."""

    name: str
    command: Sequence[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    pause: float = PAUSE_SECONDS
    start_at: float = 0.0

    def start(self) -> None:
        with self.log.open("ab") as log:
            # Its own session: Ctrl-C in the terminal reaches the supervisor alone, which ends the others in order.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def tail(self) -> str:
        """The end of its log, for whoever has to find out why it died."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


@dataclass
class Supervisor:
    """Children in the order they start; they stop in the opposite one, unless stopped singly before."""

    say: Callable[[str], None]
    children: dict[str, Child] = field(default_factory=dict[str, Child])

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        self.children[name] = child = Child(name, command, log)
        child.start()

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for a condition; raises StartError when a child dies or time runs out first."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            for child in self.children.values():
                if child.process and child.process.poll() is not None:
                    raise StartError(f"{child.name} ended with exit code {child.process.returncode}:\n{child.tail()}")
            if time.monotonic() > deadline:
                raise StartError(f"{what} did not come up within {START_SECONDS:.0f} s; see the logs")
            time.sleep(POLL_SECONDS)

    def tend(self) -> None:
        """Start again what ended by itself; to be called every now and then."""
        now = time.monotonic()
        for child in self.children.values():
            if child.process is None and child.start_at and now >= child.start_at:
                child.start_at = 0.0
                child.start()
            elif child.process and child.process.poll() is not None:
                self.say(
                    f"{child.name} ended with exit code {child.process.returncode}; starting it again (log: {child.log})"
                )
                child.process, child.start_at = None, now + child.pause
                child.pause = min(child.pause * 2, PAUSE_LIMIT_SECONDS)

    def stop(self, name: str) -> None:
        child = self.children.pop(name, None)
        if child:
            child.stop()

    def stop_all(self) -> None:
        for name in reversed(list(self.children)):
            self.stop(name)


@contextlib.contextmanager
def running(settings: "Settings", say: Callable[[str], None]) -> Iterator[Supervisor]:
    """Receiver and Dagster, up and answering; the settings and the Redis are in the environment already."""
    home = settings.home.absolute()
    postgres = settings.dagster_postgres_url is not None
    if postgres and find_spec("dagster_postgres") is None:
        raise StartError("dagster_postgres_url needs the extra postgres: pip install 'd2p-pipeline[postgres]'")
    os.environ["DAGSTER_HOME"] = str(dagster_home(home, postgres=postgres))
    logs = home / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    supervisor = Supervisor(say)
    with contextlib.ExitStack() as stack:
        stack.callback(supervisor.stop_all)
        socket = socket_path(home / "code.sock")
        socket.unlink(missing_ok=True)
        workspace = _write_workspace(home, socket)
        supervisor.start("receiver", _python("d2p_pipeline.cli.main", "receive"), logs / "receiver.log")
        if settings.forward_port is not None:
            supervisor.start("forward listener", _python("d2p_pipeline.cli.main", "forward"), logs / "forward.log")
        supervisor.start(
            "code server",
            _python("d2p_pipeline.orchestration.code_server", "--socket", str(socket), *_CODE),
            logs / "code-server.log",
        )
        supervisor.wait_until(lambda: _listens(settings.address, settings.port), "the receiver")
        if (forward_port := settings.forward_port) is not None:
            supervisor.wait_until(lambda: _listens(settings.forward_address, forward_port), "the Forward listener")
        supervisor.wait_until(socket.exists, "Dagster's code server")
        address = ["-h", "127.0.0.1", "-p", str(settings.dagster_port), "-w", workspace]
        supervisor.start("webserver", _python("dagster_webserver", *address), logs / "webserver.log")
        supervisor.start("daemon", _python("dagster._daemon", "run", "-w", workspace), logs / "daemon.log")
        supervisor.wait_until(lambda: _listens("127.0.0.1", settings.dagster_port), "Dagster's webserver")
        yield supervisor


def dagster_home(home: Path, *, postgres: bool = False) -> Path:
    """The Dagster instance's directory under `home`, with the project's dagster.yaml unless it has one of its own."""
    directory = home / "dagster"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # events show what records hold
    configuration = directory / "dagster.yaml"
    ours = (files("d2p_pipeline.orchestration") / "dagster.yaml").read_text()
    first_line = ours.partition("\n")[0]
    if not configuration.exists() or configuration.read_text().startswith(first_line):
        configuration.write_text(ours + (_POSTGRES if postgres else _SQLITE.format(json.dumps(str(directory)))))
    return directory


_SQLITE = """storage:
  custom:
    module: d2p_pipeline.orchestration.sqlite
    class: KeptSqliteStorage
    config:
      base_dir: {}
"""
_POSTGRES = """storage:
  custom:
    module: d2p_pipeline.orchestration.postgres
    class: PooledPostgresStorage
    config:
      postgres_url:
        env: D2P_DAGSTER_POSTGRES_URL
"""


def _write_workspace(home: Path, socket: Path) -> str:
    """A workspace of one code server. Dagster knows sensors by where they come from, so the place stays the same."""
    workspace = home / "workspace.yaml"
    entry = {"grpc_server": {"socket": str(socket), "location_name": LOCATION}}
    workspace.write_text(json.dumps({"load_from": [entry]}))  # JSON is YAML
    return str(workspace)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _listens(address: str, port: int) -> bool:
    host = "127.0.0.1" if address in ("0.0.0.0", "") else "::1" if address == "::" else address
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


class Stop:
    """SIGINT and SIGTERM as a flag; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
