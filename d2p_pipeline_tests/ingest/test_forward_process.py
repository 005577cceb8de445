"""The Forward listener as users run it: the command, loaded by the generator, stopped and killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.cli.app import app
from d2p_pipeline.ingest import forward_sender, generator
from d2p_pipeline.ingest.delivering import Sent, Undelivered
from d2p_pipeline_tests.certificates import Certificates
from d2p_pipeline_tests.ingest.forward_client import letters, stored

DEADLINE = 90.0
Start = Callable[..., "RunningListener"]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


class RunningListener:
    """The command on a loopback port."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        self.settings = {"D2P_FORWARD_PORT": str(free_port())}
        self.settings |= {f"D2P_{name.upper()}": value for name, value in settings.items()}
        self.address = f"127.0.0.1:{self.settings['D2P_FORWARD_PORT']}"
        self.log = directory / "forward.log"
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("D2P_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "d2p_pipeline.cli.main", "forward"],
                env={**environment, **self.settings},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                socket.create_connection(("127.0.0.1", int(self.settings["D2P_FORWARD_PORT"])), timeout=5).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"the listener did not come up: {self.log.read_text()}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@pytest.fixture
def start(redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[Start]:
    running: list[RunningListener] = []

    def begin(**settings: str) -> RunningListener:
        running.append(RunningListener(tmp_path, {"redis_url": redis_server.url, **settings}))
        return running[-1]

    yield begin
    for listener in running:
        listener.end()


def test_generated_records_go_through_the_listener_of_the_settings_good_ones_and_bad(
    start: Start, redis_buffer: RedisBuffer, tmp_path: Path
) -> None:
    certificates = Certificates.make(tmp_path)
    listener = start(
        forward_shared_key="the key",
        forward_users="agent:secret,other:x",
        tls_cert=str(certificates.certificate),
        tls_key=str(certificates.key),
        forward_address="localhost",
    )
    arguments = ["generate", "1000", "--bad-ratio", "0.1", "--target", "forward", "--batch", "100"]
    result = CliRunner().invoke(app, arguments, env=listener.settings)
    assert (result.exit_code, result.stdout) == (0, "1000 acknowledged in 10 chunks, 0 retries\n"), result.output
    good, bad = len(stored(redis_buffer)), len(letters(redis_buffer))
    assert good + bad == 1000
    assert 900 < good < 950  # those spoiled by their time alone have that of their event
    assert listener.end() == 0
    assert f"records={good}, dead_letters={bad}, acknowledged=10" in listener.log.read_text()


def test_a_client_without_the_secret_is_told_so(start: Start, redis_buffer: RedisBuffer) -> None:
    listener = start(forward_shared_key="the key")
    with pytest.raises(Undelivered, match="shared key mismatch"):
        forward_sender.send([b"{}"], listener.address, shared_key="another")
    assert letters(redis_buffer) == []


def test_a_listener_killed_again_and_again_loses_and_doubles_nothing(start: Start, redis_buffer: RedisBuffer) -> None:
    listener = start()
    lines = list(generator.generate(6000))
    outcome: list[Sent] = []

    def send() -> None:
        paced = generator.paced(lines, 1500)
        outcome.append(forward_sender.send(paced, listener.address, batch=20, connections=3, patience=DEADLINE))

    sender = threading.Thread(target=send)
    sender.start()
    kills = 0
    before = redis_records(redis_buffer)
    while sender.is_alive() and kills < 4:
        while sender.is_alive() and redis_records(redis_buffer) < before + 200:
            time.sleep(0.005)
        listener.end(signal.SIGKILL)
        listener.start()
        before = redis_records(redis_buffer)
        kills += 1
    sender.join(DEADLINE)
    assert kills >= 2
    [sent] = outcome
    assert sent.accepted == 6000
    ids = [record["message-id"] for record in stored(redis_buffer)]
    assert len(ids) == len(set(ids)) == 6000
    assert letters(redis_buffer) == []


def redis_records(buffer: RedisBuffer) -> int:
    return sum(state.records for state in buffer.waiting())


def test_the_listener_shows_what_it_counts(start: Start, redis_buffer: RedisBuffer) -> None:
    port = free_port()
    listener = start(metrics_port=str(port))
    forward_sender.send(generator.generate(50), listener.address, batch=25)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", verify=False).text
    assert "d2p_forward_records_total 50.0" in text
    assert "d2p_forward_acknowledged_total 2.0" in text


@pytest.mark.parametrize("command", ["forward", "receive"])
def test_a_port_in_use_ends_the_command_with_exit_code_1(redis_server: EmbeddedRedis, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = [sys.executable, "-m", "d2p_pipeline.cli.main", command, "--port", port]
        result = subprocess.run(line, env={**os.environ, "D2P_REDIS_URL": redis_server.url}, capture_output=True)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}".encode() in result.stderr
