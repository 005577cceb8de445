"""Fluent Bit's `http` output against the receiver as users run it: captured requests, and what its tag adds."""

import json
from pathlib import Path

import pytest

from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.ingest.forward_client import RECORD, SECONDS, event_time, letters, packed, stored
from d2p_pipeline_tests.receiving import RunningReceiver, StartReceiver, client_of

CAPTURES = Path(__file__).parents[1] / "fixtures" / "fluent"
TAG = {"X-Fluent-Tag": "kube.var.log.containers.checkout-7d9c_shop_api-0123abcd.log"}


@pytest.fixture(scope="module")
def fluent_receiver(start_receiver: StartReceiver) -> RunningReceiver:
    return start_receiver(
        key_from_tag="kube.var.log.containers.{application-service}_{business-capability}_{business-service}-*.log",
        fluent_defaults="business-capability=untagged,business-service=s,application-service=a",
    )


def captured(name: str) -> tuple[dict[str, str], bytes]:
    head, _, body = (CAPTURES / name).read_bytes().partition(b"\r\n\r\n")
    lines = [line.partition(": ")[::2] for line in head.decode().split("\r\n")[1:]]
    return {name: value for name, value in lines if name not in ("Host", "Content-Length", "Connection")}, body


@pytest.mark.parametrize("name", sorted(path.name for path in CAPTURES.glob("*.http")))
def test_what_fluent_bit_sent_is_stored(name: str, fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer) -> None:
    headers, body = captured(name)
    answer = fluent_receiver.client.post("/records", headers={**headers, **TAG}, content=body)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 1), answer.text
    [record] = stored(redis_buffer)
    assert record["message"] == "served GET /v1/orders/17 with 200"
    assert (record["application-service"], record["business-capability"]) == ("checkout-7d9c", "shop")
    assert record["args"]["fluent-tag"] == TAG["X-Fluent-Tag"]
    assert record["time"].startswith("2026-11-21T")
    assert record["duration"] == "12.5"
    extra = record["extra-fields"]
    assert extra["bytes"] == "18446744073709551615"
    assert '"app.kubernetes.io/name":"checkout"' in extra["kubernetes"]
    metadata = extra.get("fluent-metadata") or json.dumps(json.loads(extra["--internal--"])["log_metadata"])
    assert json.loads(metadata) == {"source": "dummy", "severity": 9}


def test_without_the_header_json_records_are_taken_as_they_are(
    fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer
) -> None:
    headers, body = captured("http-json.http")
    answer = fluent_receiver.client.post("/records", headers=headers, content=body)
    assert answer.json()["dead_lettered"] == 1
    assert "business-capability: required" in letters(redis_buffer)[0].reason


def test_events_without_a_tag_get_the_defaults(fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer) -> None:
    headers, body = captured("http-msgpack-zstd.http")
    assert fluent_receiver.client.post("/records", headers=headers, content=body).status_code == 202
    assert stored(redis_buffer)[0]["business-capability"] == "untagged"


@pytest.mark.parametrize("content", [json.dumps({**RECORD, "time": SECONDS}).encode(), packed([event_time(), RECORD])])
def test_a_single_record_gets_its_tag_too(
    content: bytes, fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer
) -> None:
    answer = fluent_receiver.client.post("/record/", headers=TAG, content=content)
    assert answer.status_code == 201, answer.text
    assert stored(redis_buffer)[0]["args"] == {"fluent-tag": TAG["X-Fluent-Tag"]}


def test_a_large_body_gets_its_tag_too(fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer) -> None:
    line = json.dumps({"level": "INFO", "message": "x" * 1000, "time": SECONDS, "business_domain": "d"}).encode()
    content = b"\n".join([line] * 5000)
    with client_of(fluent_receiver.url) as client:
        answer = client.post("/records", headers=TAG, content=content)
    assert answer.json()["accepted"] == 5000, answer.text
    records = stored(redis_buffer)
    assert {record["business-capability"] for record in records} == {"shop"}


def test_what_is_no_object_is_refused_as_ever(fluent_receiver: RunningReceiver, redis_buffer: RedisBuffer) -> None:
    answer = fluent_receiver.client.post("/records", headers=TAG, content=b'{"broken\n7\n{"level":1}')
    assert answer.json()["dead_lettered"] == 3
    kept = letters(redis_buffer)
    assert {letter.raw for letter in kept if letter.reason.startswith(("invalid", "no record"))} == {b'{"broken', b"7"}
