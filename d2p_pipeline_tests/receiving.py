"""A receiver as users run it: the real command on a loopback port."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from d2p_pipeline.buffer.embedded import EmbeddedRedis

StartReceiver = Callable[..., "RunningReceiver"]


def client_of(url: str) -> httpx.Client:
    """For certificates, which tests of TLS name themselves, a client would read all that the machine trusts: 20 ms."""
    return httpx.Client(base_url=url, timeout=30, verify=False)


class RunningReceiver:
    """A receiver process and a client for it."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
        self.log = directory / f"receiver-{port}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("D2P_")}
        self._environment = environment | {f"D2P_{name.upper()}": value for name, value in settings.items()}
        self._command = [sys.executable, "-m", "d2p_pipeline.cli.main", "receive", "--port", str(port)]
        self.process = self.start()
        scheme = "https" if "tls_cert" in settings else "http"
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.client = client_of(self.url)
        self._wait()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process; again when it has ended."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=self.log.parent, stdout=log, stderr=log
            )
        return self.process

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.url.startswith("https"):  # whom it lets in is the test's affair
                    socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), 30).close()
                else:
                    self.client.get("/healthcheck/")
                return
            except (httpx.TransportError, ConnectionError):
                time.sleep(0.02)
        raise AssertionError(f"the receiver did not come up: {self.log.read_text()}")

    def strike(self, number: int) -> None:
        """Send a signal to it and its workers, all at once."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for process in (self.process.pid, *map(int, children)):
            os.kill(process, number)

    def kill(self) -> None:
        """End it and its workers by SIGKILL."""
        self.strike(signal.SIGKILL)
        self.client.close()
        self.process.wait(60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.client.close()
        return self.process.wait(60)


@pytest.fixture(scope="session")
def start_receiver(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartReceiver]:
    """Starts receivers on the test's Redis; settings as keyword arguments."""
    with ExitStack() as stack:

        def start(**settings: str) -> RunningReceiver:
            directory = tmp_path_factory.mktemp("receiver")
            receiver = RunningReceiver(directory, {"redis_url": redis_server.url, **settings})
            stack.callback(receiver.stop)
            return receiver

        yield start


@pytest.fixture(scope="session")
def receiver(start_receiver: StartReceiver) -> RunningReceiver:
    return start_receiver(max_body_bytes="1000000", max_record_bytes="100000")
