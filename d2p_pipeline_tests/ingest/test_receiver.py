"""The receiver's promises: 2xx means that Redis has the records, anything else that it has none of them."""

import asyncio
import gzip
import json
import signal
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import msgpack
import pytest
import zstandard
from redis import Redis

from d2p_pipeline import books
from d2p_pipeline.buffer.protocol import Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest.commit import SMALL_BYTES, GroupCommit, Request
from d2p_pipeline.ingest.generator import generate
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.receiving import RunningReceiver, StartReceiver, client_of
from d2p_pipeline_tests.system import until

GOOD: dict[str, Any] = {
    "time": "2026-11-21T10:00:00Z",
    "level": "info",
    "message": "hello",
    "business-capability": "payments",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}
TOTAL_TIMEOUT = 30


def record(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def stored(client: Redis, key: str = "payments") -> list[dict[str, Any]]:
    """The records that wait under a key."""
    chunks = [chunk.decode(cast(bytes, element)) for element in client.lrange(f"data:{{{key}}}", 0, -1)]
    assert all(found.canonical for found in chunks)
    return [json.loads(line) for found in chunks for line in found.body.splitlines()]


def connected(receiver: RunningReceiver) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(receiver.url.rsplit(":", 1)[1])), timeout=TOTAL_TIMEOUT)


def nothing_stored(client: Redis) -> bool:
    return not [name for name in client.scan_iter() if name != b"d2p:ready"]


def test_one_record(receiver: RunningReceiver, redis_client: Redis) -> None:
    answer = receiver.client.post("/record/", json=record(level="warn"))
    assert answer.status_code == 201
    assert set(answer.json()) == {"timestamp", "elapsed"}
    assert float(answer.json()["elapsed"].removesuffix("ms")) > 0
    assert stored(redis_client) == [record(level="warn")]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (json.dumps(record(time=None)), "time"),
        (json.dumps({"level": "info"}), "business-capability"),
        ('{"level": "info"', "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("", "JSON"),
        ("{} {}", "JSON"),
        (json.dumps(record(message="x" * 100_001)), "max_record_bytes"),
    ],
)
def test_a_record_that_is_none_is_refused_with_the_reason(
    receiver: RunningReceiver, redis_client: Redis, body: str, reason: str
) -> None:
    answer = receiver.client.post("/record/", content=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert nothing_stored(redis_client)


def test_wrong_types_are_no_errors(receiver: RunningReceiver, redis_client: Redis) -> None:
    answer = receiver.client.post("/record/", json=record(level=3, http_response=200, audit="true"))
    assert answer.status_code == 201
    assert stored(redis_client) == [record(level="3", **{"http-response": "200", "audit": True})]


@pytest.mark.parametrize(
    "body",
    [
        "\n".join(json.dumps(record(message=str(number))) for number in range(3)),
        "\r\n\r\n".join(json.dumps(record(message=str(number))) for number in range(3)) + "\r\n",
        json.dumps([record(message=str(number)) for number in range(3)], indent=2),
        json.dumps({"logs": [record(message=str(number)) for number in range(3)]}, indent=1),
        "\ufeff" + json.dumps({"logs": [record(message=str(number)) for number in range(3)]}),
    ],
    ids=["ndjson", "crlf", "array", "logs", "bom"],
)
def test_batches_in_every_form(receiver: RunningReceiver, redis_client: Redis, body: str) -> None:
    answer = receiver.client.post("/records", content=body.encode())
    assert answer.status_code == 202
    assert answer.json()["accepted"] == 3
    assert [found["message"] for found in stored(redis_client)] == ["0", "1", "2"]


def test_one_indented_object_is_a_batch_of_one(receiver: RunningReceiver, redis_client: Redis) -> None:
    assert receiver.client.post("/records", content=json.dumps(GOOD, indent=4)).json()["accepted"] == 1
    assert stored(redis_client) == [GOOD]


def test_an_empty_batch_is_accepted(receiver: RunningReceiver, redis_client: Redis) -> None:
    assert receiver.client.post("/records", content="\n\n").json()["accepted"] == 0
    assert nothing_stored(redis_client)


def test_rejected_records_are_counted_and_logged_where_dead_letters_are_switched_off(
    start_receiver: StartReceiver, redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    running = start_receiver(use_dlq="false")
    redis_client.flushall()
    lines = [json.dumps(GOOD), json.dumps(record(time="yesterday"))]
    assert running.client.post("/records", content="\n".join(lines)).json()["dead_lettered"] == 1
    assert "key=payments 1 records rejected and not kept (use_dlq = false): time" in running.log.read_text()
    assert redis_buffer.dead_letters("payments") == []
    assert dict(redis_buffer.totals()) == {"payments": Totals(2, 0, 1)}
    assert books.differences(redis_buffer, books.read(redis_buffer)) == {}


def test_malformed_lines_of_a_batch_become_dead_letters_and_the_others_are_accepted(
    receiver: RunningReceiver, redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    lines = [json.dumps(GOOD), '{"cut": "of', json.dumps(record(time="yesterday")), json.dumps(GOOD)]
    answer = receiver.client.post("/records", content="\n".join(lines))
    assert answer.status_code == 202
    body = answer.json()
    assert (body["accepted"], body["dead_lettered"]) == (2, 2)
    assert [error["line"] for error in body["errors"]] == [2, 3]
    assert "yesterday" in body["errors"][1]["reason"]
    assert len(stored(redis_client)) == 2
    [unreadable] = [DeadLetter.from_json(letter) for letter in redis_buffer.dead_letters("undefined")]
    [untimely] = [DeadLetter.from_json(letter) for letter in redis_buffer.dead_letters("payments")]
    assert (unreadable.raw.decode(), untimely.raw.decode()) == (lines[1], lines[2])
    assert unreadable.stage == untimely.stage == "receive"
    totals = dict(redis_buffer.totals())
    assert (totals["payments"].accepted, totals["payments"].dead_letters) == (3, 1)


def test_a_broken_array_is_refused_whole(receiver: RunningReceiver, redis_client: Redis) -> None:
    answer = receiver.client.post("/records", content=json.dumps([GOOD, GOOD])[:-10])
    assert answer.status_code == 400
    assert nothing_stored(redis_client)


def test_errors_beyond_twenty_are_counted_not_listed(receiver: RunningReceiver, redis_client: Redis) -> None:
    body = receiver.client.post("/records", content="x\n" * 50).json()
    assert (body["dead_lettered"], len(body["errors"])) == (50, 20)


def test_keys_of_every_kind_have_their_own_buffer(
    receiver: RunningReceiver, redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    keys = ["a/b", "..", "two words", "a:b", "100%", "日本 🎉", "x" * 500, "a,b", "new\nline", "{}"]
    lines = [json.dumps(record(**{"business-capability": key})) for key in keys]
    assert receiver.client.post("/records", content="\n".join(lines)).json()["accepted"] == len(keys)
    assert {state.key for state in redis_buffer.waiting()} == set(keys)


def test_an_oversized_body_is_refused_before_it_is_read(receiver: RunningReceiver, redis_client: Redis) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    answer = receiver.client.post("/records", content=line * (1_000_000 // len(line) + 1))
    assert answer.status_code == 413
    assert "max_body_bytes (1000000)" in answer.json()["error"]
    chunked = receiver.client.post("/records", content=(line for _ in range(1_000_000 // len(line) + 1)))
    assert chunked.status_code == 413
    assert nothing_stored(redis_client)


@pytest.mark.parametrize(
    "headers", [b"Content-Length: 10000000000", b"Content-Length: 1000001\r\nExpect: 100-continue"]
)
def test_a_body_declared_too_large_is_not_waited_for(receiver: RunningReceiver, headers: bytes) -> None:
    with connected(receiver) as client:
        client.sendall(b"POST /records HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % headers)
        assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/record/", 405),
        ("POST", "/healthcheck/", 405),
        ("POST", "/record", 201),
        ("GET", "/healthcheck", 200),
        ("GET", "/ready/", 200),
    ],
)
def test_paths_and_methods(receiver: RunningReceiver, redis_client: Redis, method: str, path: str, status: int) -> None:
    answer = receiver.client.request(method, path, json=GOOD if method == "POST" else None)
    assert answer.status_code == status
    if status == 405:
        assert answer.headers["allow"] == ("GET, HEAD" if method == "POST" else "POST")


def test_a_compressed_body_is_refused_not_misread(receiver: RunningReceiver, redis_client: Redis) -> None:
    answer = receiver.client.post("/records", content=b"x", headers={"content-encoding": "br"})
    assert answer.status_code == 415
    assert nothing_stored(redis_client)


def test_identity_is_no_compression(receiver: RunningReceiver, redis_client: Redis) -> None:
    assert receiver.client.post("/record/", json=GOOD, headers={"content-encoding": "Identity"}).status_code == 201


@pytest.mark.parametrize("path", ["/record/", "/records"])
@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
def test_compressed_bodies(
    receiver: RunningReceiver, redis_client: Redis, path: str, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    body = compress(json.dumps(GOOD).encode())
    answer = receiver.client.post(path, content=body, headers={"content-encoding": encoding})
    assert answer.is_success
    assert stored(redis_client) == [GOOD]
    cut_off = receiver.client.post(path, content=body[:-5], headers={"content-encoding": encoding})
    assert cut_off.status_code == 400
    assert encoding in cut_off.json()["error"]
    assert len(stored(redis_client)) == 1


@pytest.mark.parametrize("content_type", ["application/msgpack", "application/json", ""])
def test_messagepack_maps_and_fluent_events(receiver: RunningReceiver, redis_client: Redis, content_type: str) -> None:
    without_time = {name: value for name, value in GOOD.items() if name != "time"}
    moment = msgpack.ExtType(0, struct.pack(">II", 1_764_000_000, 5))
    values = [GOOD, [moment, without_time], [[moment, {}], without_time], "no record"]
    body = b"".join(msgpack.packb(value) or b"" for value in values)
    answer = receiver.client.post("/records", content=body, headers={"content-type": content_type})
    assert (answer.json()["accepted"], answer.json()["dead_lettered"]) == (3, 1)
    times = [found["time"] for found in stored(redis_client)]
    assert times == [GOOD["time"], *["2025-11-24T16:00:00.000000005Z"] * 2]
    assert receiver.client.post("/record/", content=msgpack.packb(GOOD)).status_code == 201
    assert receiver.client.post("/record/", content=body).status_code == 400
    assert receiver.client.post("/records", content=body[:-1]).status_code == 400
    assert len(stored(redis_client)) == 4


@pytest.mark.parametrize("form", ["lines", "chunked lines", "array", "logs", "msgpack", "gzip", "zstd"])
def test_large_bodies_in_every_form_are_stored_in_order(
    large_receiver: RunningReceiver, redis_client: Redis, form: str
) -> None:
    records = [record(message=f"{number} {'x' * 200}") for number in range(5000)]
    lines = b"\n".join(json.dumps(one).encode() for one in records)
    body: dict[str, Any] = {
        "lines": lines,
        "chunked lines": (lines[start : start + 10_000] for start in range(0, len(lines), 10_000)),
        "array": json.dumps(records).encode(),
        "logs": json.dumps({"logs": records}).encode(),
        "msgpack": b"".join(msgpack.packb(one) or b"" for one in records),
        "gzip": gzip.compress(lines),
        "zstd": zstandard.compress(lines),
    }
    headers = {"content-encoding": form} if form in ("gzip", "zstd") else {}
    answer = large_receiver.client.post("/records", content=body[form], headers=headers)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 5000)
    assert stored(redis_client) == records


@pytest.fixture(scope="module")
def large_receiver(start_receiver: StartReceiver) -> RunningReceiver:
    return start_receiver(workers="2")


@pytest.mark.parametrize("records", [1, 3, 4000])
def test_a_repeated_request_under_the_same_idempotency_key_stores_nothing(
    large_receiver: RunningReceiver, redis_client: Redis, redis_buffer: RedisBuffer, records: int
) -> None:
    lines = [json.dumps(record(message=f"{number} {'x' * 300}")) for number in range(records)]
    body = "\n".join([*lines, '{"cut": "of'] if records > 1 else lines)
    path = "/records" if records > 1 else "/record/"
    answers = []
    for _ in range(4):  # over new connections, so that both workers have their turn
        with client_of(large_receiver.url) as client:
            answers.append(client.post(path, content=body, headers={"idempotency-key": "a"}))
    assert {answer.status_code for answer in answers} == {201 if records == 1 else 202}
    assert len({answer.json().get("accepted") for answer in answers}) == 1
    assert len(stored(redis_client)) == records
    assert len(redis_buffer.dead_letters("undefined")) == (records > 1)
    large_receiver.client.post(path, content=body, headers={"idempotency-key": "b"})
    assert len(stored(redis_client)) == 2 * records


def test_an_idempotency_key_with_another_body_loses_nothing(receiver: RunningReceiver, redis_client: Redis) -> None:
    for message in ("one", "other"):
        receiver.client.post("/record/", json=record(message=message), headers={"idempotency-key": "always the same"})
    assert [found["message"] for found in stored(redis_client)] == ["one", "other"]
    long = receiver.client.post("/record/", json=GOOD, headers={"idempotency-key": "x" * 256})
    assert long.status_code == 400


def test_flush_makes_keys_due(receiver: RunningReceiver, redis_client: Redis, redis_buffer: RedisBuffer) -> None:
    for key in ("a", "b"):
        receiver.client.post("/record/", json=record(**{"business-capability": key}))
    assert redis_buffer.due(0, 10) == []
    answer = receiver.client.post("/flush/", json={"keys": ["a", "empty"]})
    assert (answer.status_code, answer.json()["keys"]) == (202, ["a"])
    assert [state.key for state in redis_buffer.due(0, 10)] == ["a"]
    assert sorted(receiver.client.post("/flush/").json()["keys"]) == ["a", "b"]
    assert receiver.client.post("/flush/", content=b'{"key": "a"}').status_code == 400


def test_a_full_redis_is_503_with_retry_after_and_nothing_stored(
    receiver: RunningReceiver, redis_client: Redis
) -> None:
    redis_client.config_set("maxmemory", 1)
    for path in ("/record/", "/records"):
        answer = receiver.client.post(path, json=GOOD)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
    assert receiver.client.get("/ready").status_code == 503
    assert receiver.client.get("/healthcheck/").status_code == 200
    assert nothing_stored(redis_client)
    redis_client.config_set("maxmemory", 0)
    assert receiver.client.get("/ready").status_code == 200
    assert receiver.client.post("/record/", json=GOOD).status_code == 201


def test_tokens(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver(tokens="first second")
    assert receiver.client.post("/record/", json=GOOD).status_code == 401
    wrong = {"authorization": "Bearer third"}
    assert receiver.client.post("/record/", json=GOOD, headers=wrong).status_code == 401
    assert nothing_stored(redis_client)
    for token in ("first", "second"):
        right = {"authorization": f"Bearer {token}"}
        assert receiver.client.post("/record/", json=GOOD, headers=right).status_code == 201
    assert receiver.client.get("/healthcheck/").status_code == 200


def test_where_another_programs_value_has_a_keys_name_only_its_records_are_refused(
    receiver: RunningReceiver, redis_client: Redis
) -> None:
    redis_client.set("data:{taken}", "theirs")
    taken = record(**{"business-capability": "taken"})
    both = "\n".join(map(json.dumps, (record(), taken)))
    answer = receiver.client.post("/records", content=both)
    assert answer.status_code == 500
    assert "data:{taken} is a string" in answer.json()["error"]
    assert not redis_client.keys("data:{payments}")

    def post(number: int) -> int:
        return httpx.post(f"{receiver.url}/record/", json=taken if number % 2 else record(), verify=False).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(post, range(32))) == [201, 500] * 16
    assert len(stored(redis_client)) == 16


def test_many_clients_at_once_lose_and_double_nothing(receiver: RunningReceiver, redis_client: Redis) -> None:
    numbers = range(400)

    def post(number: int) -> int:
        return receiver.client.post("/record/", json=record(message=str(number))).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(post, numbers)) == {201}
    assert sorted(int(found["message"]) for found in stored(redis_client)) == list(numbers)
    assert redis_client.llen("data:{payments}") < len(numbers)  # requests that waited together share a chunk


def test_commits_wait_for_nobody_else_who_needs_a_thread(redis_buffer: RedisBuffer) -> None:
    """Bodies, probes and metrics have those of the event loop."""

    async def store() -> None:
        ending = threading.Event()
        others = [asyncio.get_running_loop().run_in_executor(None, ending.wait) for _ in range(100)]
        commit = GroupCommit(redis_buffer, window=60, keep_dead_letters=True)
        try:
            async with asyncio.timeout(TOTAL_TIMEOUT):
                await commit.store(Request(lines={"small": [b"{}"]}, size=2))
                await commit.store(Request(lines={"large": [b"{}"]}, size=SMALL_BYTES + 1))
                await commit.close()
        finally:
            ending.set()
            await asyncio.gather(*others)

    asyncio.run(store())
    assert {state.key for state in redis_buffer.due(redis_buffer.now() + 1, 10)} == {"small", "large"}


def test_who_cannot_be_told_of_a_commit_keeps_no_other_waiting(
    redis_buffer: RedisBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    def defective(error: Exception | None) -> None:
        raise ZeroDivisionError

    async def store() -> None:
        commit = GroupCommit(redis_buffer, window=60, keep_dead_letters=True)
        commit.submit(Request(lines={"first": [b"{}"]}, size=2), defective)
        async with asyncio.timeout(TOTAL_TIMEOUT):
            await commit.store(Request(lines={"beside": [b"{}"]}, size=2))
            await commit.store(Request(lines={"after": [b"{}"]}, size=2))
            await commit.close()

    asyncio.run(store())
    assert {state.key for state in redis_buffer.due(redis_buffer.now() + 1, 10)} == {"first", "beside", "after"}
    assert "ZeroDivisionError" in caplog.text


def test_a_large_batch_goes_into_chunks_of_bounded_size(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    lines = list(generate(4000, keys=1, seed=1))
    assert receiver.client.post("/records", content=b"\n".join(lines)).json()["accepted"] == 4000
    [name] = redis_client.keys("data:*")
    sizes = [chunk.raw_size(cast(bytes, element)) for element in redis_client.lrange(name, 0, -1)]
    assert len(sizes) > 2
    assert max(sizes) <= 1 << 20


def test_sigterm_finishes_what_is_in_flight_and_exits_0(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    accepted: list[int] = []
    stopping = threading.Event()

    def post(start: int) -> None:
        with client_of(receiver.url) as client:
            for number in range(start, start + 100_000):
                try:
                    if client.post("/record/", json=record(message=str(number))).status_code == 201:
                        accepted.append(number)
                except httpx.TransportError:
                    return
                if len(accepted) > 200:
                    stopping.set()

    threads = [threading.Thread(target=post, args=(worker * 1_000_000,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    assert stopping.wait(60)
    assert receiver.stop(signal.SIGTERM) == 0
    for thread in threads:
        thread.join(60)
    found = [int(found["message"]) for found in stored(redis_client)]
    assert len(found) == len(set(found))
    assert set(accepted) <= set(found)


def test_while_the_last_requests_are_finished_nobody_new_is_let_in(
    start_receiver: StartReceiver, redis_client: Redis
) -> None:
    receiver = start_receiver(workers="2")
    body = json.dumps(GOOD).encode()

    def is_turned_away() -> bool:
        try:
            connected(receiver).close()
        except ConnectionRefusedError:
            return True
        return False

    with connected(receiver) as client:
        client.sendall(
            b"POST /record/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        receiver.process.terminate()
        until(is_turned_away)
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 201")
    assert receiver.stop() == 0
    assert stored(redis_client) == [GOOD]


def test_a_receiver_does_not_start_on_a_redis_that_could_lose_data(
    start_receiver: StartReceiver, redis_client: Redis
) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(AssertionError, match="allkeys-lru"):
            start_receiver()
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


def test_wrong_settings_end_it_with_exit_code_2_and_all_problems(start_receiver: StartReceiver, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)workers.*redis_url|redis_url.*workers"):
        start_receiver(workers="none", redis_url="http://nowhere")
