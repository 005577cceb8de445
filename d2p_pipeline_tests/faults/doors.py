"""The processes that take records in, each the real command: receivers, the Forward listener, the poller of a queue."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from d2p_pipeline.buffer.embedded import end_with_parent


class Door:
    """A command in a process group of its own, so that a signal reaches its workers too; `port` is where it listens, if it
    does. `environment`: beside the settings."""

    def __init__(
        self,
        command: str,
        directory: Path,
        settings: Mapping[str, str],
        environment: Mapping[str, str],
        *,
        listens: bool = True,
    ) -> None:
        self.port = _free_port() if listens else 0
        self.log = directory / f"{command}-{self.port}.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("D2P_")}
        given = {f"D2P_{name.upper()}": value for name, value in settings.items()}
        self._environment = inherited | given | {**environment, "PYTHONFAULTHANDLER": "1"}
        self._command = [sys.executable, "-m", "d2p_pipeline.cli.main", command]
        self._command += ["--port", str(self.port)] if listens else []
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def wait(self, seconds: float = 60) -> None:
        """Until it listens."""
        deadline = time.monotonic() + seconds
        while self.port:
            assert self.process.poll() is None, self.last_words()
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, f"it did not come up: {self.last_words()}"
                time.sleep(0.02)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it may have ended by itself
            self.signal(signal.SIGKILL)
        self.process.wait(60)

    def end(self, seconds: float = 10) -> int | None:
        """Ask it to end; its exit code, or None when it had to be killed."""
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]
