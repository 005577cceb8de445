"""Hostile input: the receiver survives, answers 4xx or hangs up, stores nothing, and serves its other clients meanwhile."""

import gzip
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import msgpack
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from d2p_pipeline_tests.receiving import RunningReceiver, StartReceiver

GOOD: dict[str, Any] = {
    "time": "2026-11-21T10:00:00Z",
    "level": "info",
    "message": "hello",
    "business-capability": "payments",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}
LINE = json.dumps(GOOD).encode()
MIB = 1 << 20
SECONDS = 60


@pytest.fixture(scope="module")
def guarded(start_receiver: StartReceiver) -> RunningReceiver:
    return start_receiver(
        max_body_bytes=str(9 * MIB),
        max_record_bytes=str(MIB),
        header_timeout="1",
        body_timeout="1",
        max_connections="400",
    )


def nothing_stored(client: Redis) -> bool:
    return not client.keys("data:*") and not client.keys("dlq:*")


@contextmanager
def another_client(receiver: RunningReceiver) -> Iterator[None]:
    """Posts records all the while; every one of them has to be stored."""
    ended = threading.Event()
    statuses: list[int] = []

    def post() -> None:
        with httpx.Client(base_url=receiver.url, timeout=SECONDS, verify=False) as client:
            while not ended.is_set() or not statuses:
                record = {**GOOD, "business-capability": "the other client"}
                statuses.append(client.post("/record/", json=record).status_code)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(SECONDS)
    assert set(statuses) == {201}


def connect(receiver: RunningReceiver) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(receiver.url.rsplit(":", 1)[1])), timeout=SECONDS)


def everything_from(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def nested(depth: int) -> bytes:
    return LINE[:-1] + b',"deep":' + b"[" * depth + b"]" * depth + b"}"


def of_many_keys(count: int) -> bytes:
    return b"\n".join(LINE.replace(b"payments", b"key %d" % number) for number in range(count))


Body = tuple[str, Callable[[], bytes], dict[str, str], int]
HOSTILE: list[Body] = [
    ("a gzip bomb", lambda: gzip.compress(bytes(100 * MIB)), {"content-encoding": "gzip"}, 413),
    ("a zstd bomb", lambda: zstandard.compress(bytes(500 * MIB)), {"content-encoding": "zstd"}, 413),
    ("100,000 keys", lambda: of_many_keys(100_000)[: 8 * MIB], {}, 413),
    ("millions of malformed lines", lambda: b"x\n" * (4 * MIB), {}, 413),
    ("an array nested without end", lambda: b"[" * (8 * MIB), {}, 400),
    ("a short array nested without end", lambda: b"[" * 100_000, {}, 400),
    ("logs nested without end", lambda: b'{"logs":[' + b"[" * MIB, {}, 202),
    ("an array of millions of nothings", lambda: b"[" + b"0," * (4 * MIB) + b"0,0]", {}, 400),
    ("a broken array", lambda: b"[" + b",".join([LINE] * 10_000), {}, 400),
    ("MessagePack that lies", lambda: b"\xdd\xff\xff\xff\xff", {"content-type": "application/msgpack"}, 400),
    ("nested lies", lambda: b"\xdd\x7f\xff\xff\xff" * 300_000, {"content-type": "application/msgpack"}, 400),
    ("no gzip", lambda: b"x" * MIB, {"content-encoding": "gzip"}, 400),
    ("brotli", lambda: b"x", {"content-encoding": "br"}, 415),
]


@pytest.mark.parametrize(
    ("body", "headers", "status"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_a_hostile_body_is_refused_and_others_are_served(
    guarded: RunningReceiver, redis_client: Redis, body: Callable[[], bytes], headers: dict[str, str], status: int
) -> None:
    with another_client(guarded):
        answer = httpx.post(f"{guarded.url}/records", content=body(), headers=headers, timeout=SECONDS, verify=False)
    assert answer.status_code == status, answer.text
    assert not redis_client.keys("data:{payments}")
    if status != 202:
        assert not redis_client.keys("dlq:*")


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (nested(100_000), 400),
        (nested(50), 201),
        (LINE.replace(b"hello", b"\xff\xfe"), 400),
        (LINE.replace(b"hello", b"\\ud800"), 400),
        (LINE.replace(b'"hello"', b"[" + b",".join([b"0.1"] * 200_000) + b"]"), 201),
        (b'{"' + b"a" * 900_000 + b'":1}', 400),
        (LINE[:-1] + b"," + b",".join(b'"f%d":%d' % (n, n) for n in range(60_000)) + b"}", 201),
        (b"\x00" * 1000, 400),
        (msgpack.packb({**GOOD, "deep": None}, use_bin_type=True), 201),
    ],
    ids=["too deep", "deep", "no UTF-8", "half a pair", "numbers", "long name", "many fields", "NUL", "MessagePack"],
)
def test_a_hostile_record_is_stored_or_refused(
    guarded: RunningReceiver, redis_client: Redis, record: bytes, status: int
) -> None:
    with another_client(guarded):
        answer = httpx.post(f"{guarded.url}/record/", content=record, timeout=SECONDS, verify=False)
    assert answer.status_code == status, answer.text[:300]
    assert bool(redis_client.keys("data:{payments}")) == (status == 201)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /record/ HTTP/1.1\r\nHost: x\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(5000)) + b"\r\n",
        b"POST /record/ HTTP/1.1\r\nHost: x\r\nlong: " + b"x" * MIB + b"\r\n\r\n",
        b"POST /" + b"x" * MIB + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /record/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /record/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /record/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"POST /record/ HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"nonsense\r\n\r\n",
        bytes(range(256)) * 10,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    ],
    ids=[
        "5,000 headers",
        "a long header",
        "a long path",
        "length",
        "two lengths",
        "chunks",
        "huge",
        "text",
        "bytes",
        "TLS",
    ],
)
def test_a_hostile_head_is_refused_or_hung_up_on(guarded: RunningReceiver, redis_client: Redis, head: bytes) -> None:
    with another_client(guarded), connect(guarded) as connection:
        with suppress(OSError):  # it may be hung up already
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
        answer = everything_from(connection)
    assert answer[:10] in (b"", b"HTTP/1.1 4"), answer
    assert not redis_client.keys("data:{payments}")


def test_ten_gigabytes_declared_cost_nothing(guarded: RunningReceiver, redis_client: Redis) -> None:
    with connect(guarded) as connection:
        connection.sendall(b"POST /records HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        assert everything_from(connection).startswith(b"HTTP/1.1 413")
    assert nothing_stored(redis_client)


def test_slow_heads_and_slow_bodies_end_and_others_are_served(guarded: RunningReceiver, redis_client: Redis) -> None:
    heads = [connect(guarded) for _ in range(100)]
    bodies = [connect(guarded) for _ in range(100)]
    with another_client(guarded):
        for connection in heads:
            connection.sendall(b"POST /record/ HTTP/1.1\r\nHost: x\r\nSlow:")
        for connection in bodies:
            connection.sendall(b"POST /records HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert {everything_from(connection)[:12] for connection in bodies} == {b"HTTP/1.1 408"}
        assert {everything_from(connection)[:10] for connection in heads} <= {b"", b"HTTP/1.1 4"}
    for connection in (*heads, *bodies):
        connection.close()
    assert not redis_client.keys("data:{payments}")


def test_a_body_that_drips_ends_though_it_never_pauses(guarded: RunningReceiver, redis_client: Redis) -> None:
    with connect(guarded) as connection:
        connection.sendall(b"POST /records HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.settimeout(0.05)
        answer = b""
        with suppress(ConnectionError):
            while not answer:
                connection.sendall(b"1\r\nx\r\n")
                with suppress(TimeoutError):
                    answer = connection.recv(12)
    assert answer in (b"", b"HTTP/1.1 408")
    assert nothing_stored(redis_client)


def test_connections_beyond_the_limit_wait_and_are_served(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver(max_connections="4", header_timeout="1")
    idle = [connect(receiver) for _ in range(20)]
    assert httpx.post(f"{receiver.url}/record/", json=GOOD, timeout=SECONDS, verify=False).status_code == 201
    for connection in idle:
        connection.close()


def test_bodies_beyond_what_memory_may_hold_are_asked_to_come_again(
    start_receiver: StartReceiver, redis_client: Redis
) -> None:
    receiver = start_receiver(max_held_bytes=str(MIB))
    lines = b"\n".join([LINE] * 8000)
    answer = receiver.client.post("/records", content=lines)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "max_held_bytes" in answer.json()["error"]
    assert nothing_stored(redis_client)
    assert receiver.client.post("/records", content=lines[:100_000]).status_code == 202


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=400),
    headers=st.sampled_from([{}, {"content-encoding": "gzip"}, {"content-encoding": "zstd"}]),
)
def test_any_bytes_get_an_answer(guarded: RunningReceiver, body: bytes, headers: dict[str, str]) -> None:
    for path in ("/record/", "/records", "/flush/"):
        status = guarded.client.post(path, content=body, headers=headers).status_code
        assert status < 500


def test_garbage_over_many_connections_ends_nothing(guarded: RunningReceiver, redis_client: Redis) -> None:
    generator = random.Random(1)
    with another_client(guarded):
        for _ in range(100):
            with connect(guarded) as connection:
                start = b"POST /records HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(start[: generator.randrange(len(start))] + generator.randbytes(200))
    assert guarded.process.poll() is None
    assert guarded.client.get("/healthcheck/").status_code == 200
