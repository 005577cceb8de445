"""What an earlier version left in Redis is delivered by this one; what a later one left is refused, and stays.

The fixture `upgrades/format-1.json` was written by version 0.1.0: a buffer of the receiver's chunks and of a foreign producer's
lines, a sealed batch, a batch of which one unit was delivered by a run that died, and a batch in recovery.
"""

import base64
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
from redis import Redis

from d2p_pipeline.buffer.protocol import NewerFormatError, Seal
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.receiving import StartReceiver

FIXTURE = Path(__file__).parents[1] / "fixtures/upgrades/format-1.json"


def dump(client: Redis) -> dict[str, Any]:
    """Every key with its type and content; how the fixtures were made."""
    redis, found = cast(Any, client), {}
    for name in sorted(redis.scan_iter()):
        match redis.type(name):
            case b"list":
                content = [_text(value) for value in redis.lrange(name, 0, -1)]
            case b"hash":
                content = {_text(field): _text(value) for field, value in sorted(redis.hgetall(name).items())}
            case b"zset":
                content = {_text(member): score for member, score in redis.zrange(name, 0, -1, withscores=True)}
            case _:
                continue  # leases and remembered pushes have ended by the time of an upgrade
        found[_text(name)] = content
    return found


def load(client: Redis, content: Mapping[str, Any]) -> None:
    redis = cast(Any, client)
    for name, value in content.items():
        if isinstance(value, list):
            redis.rpush(_bytes(name), *map(_bytes, value))
        elif all(isinstance(score, float) for score in value.values()):
            redis.zadd(_bytes(name), {_bytes(member): score for member, score in value.items()})
        else:
            redis.hset(_bytes(name), mapping={_bytes(field): _bytes(one) for field, one in value.items()})


def _text(value: bytes) -> str:
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    kind, _, rest = text.partition("base64:")
    return base64.b64decode(rest) if not kind and rest else text.encode()


def write_fixture(pipeline: Pipeline, client: Redis) -> dict[str, Any]:
    """What the fixture holds, made by the version that runs."""
    pipeline.receive([line(message="delivered before"), line(message="of the second unit")], "1")
    client.rpush("data:{payments}", line(message="also of the second unit"), b"no record")
    batches = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    claim = pipeline.buffer.claim(batches[0].ref, "died", 60_000)
    assert claim
    pipeline.buffer.plan(batches[0].ref, [(0, 1), (1, 3)])
    pipeline.buffer.acknowledge(claim, 0, units=2, rows=2)
    pipeline.receive([line("orders", "failed")], "2")
    [failed] = pipeline.buffer.seal([Seal("orders", "B2", "size")])
    claim = pipeline.buffer.claim(failed.ref, "failed", 60_000)
    assert claim
    pipeline.buffer.fail(claim, "disk full")
    pipeline.receive([line("orders", "sealed")], "3")
    pipeline.buffer.seal([Seal("orders", "B3", "request")])
    pipeline.receive([line("orders", "buffered"), line("a b", "buffered too")], "4")
    client.rpush("data:{orders}", line("orders", "foreign"))
    return dump(client)


def test_what_version_0_1_left_in_redis_is_delivered(pipeline: Pipeline, redis_client: Redis) -> None:
    load(redis_client, json.loads(FIXTURE.read_text()))
    open_batches = [batch.ref for batch in pipeline.buffer.open_batches()]
    recovering = [batch.ref for batch in pipeline.buffer.recovering()]
    assert pipeline.flush(*open_batches, *recovering).success
    assert pipeline.flush().success
    expected = ["also of the second unit", "buffered", "buffered too", "failed", "foreign", "sealed"]
    assert pipeline.messages() == expected  # what the first unit wrote is not in this directory
    [letter] = pipeline.buffer.dead_letters("payments")
    assert DeadLetter.from_json(letter).raw == b"no record"
    totals = dict(pipeline.buffer.totals())
    assert {key: (one.accepted, one.rows, one.dead_letters) for key, one in totals.items()} == {
        "payments": (4, 3, 1),
        "orders": (4, 4, 0),
        "a b": (1, 1, 0),
    }


def test_this_version_writes_what_the_fixture_says(pipeline: Pipeline, redis_client: Redis) -> None:
    """Names and fields are a contract: who changes them changes the format number and adds a fixture."""
    written, stored = write_fixture(pipeline, redis_client), json.loads(FIXTURE.read_text())
    assert written.keys() == stored.keys()
    for name in stored:
        if isinstance(stored[name], dict) and name.partition(":")[0] not in ("keys", "batches", "recovery"):
            fields = {
                field for field, value in stored[name].items() if not (name.startswith("totals:") and value == "0")
            }
            assert fields <= written[name].keys()  # a count of nothing need not be there
    assert written["batch-meta:{orders}:B3"]["format"] == "1"


def test_a_batch_of_a_later_format_is_refused_and_stays(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.receive([line()])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    redis_client.hset("batch-meta:{payments}:B1", "format", 2)
    with pytest.raises(NewerFormatError, match=r"B1 of key 'payments'.*format 2.*knows up to 1.*upgrade"):
        pipeline.buffer.claim(batch.ref, "run", 1000)
    pipeline.receive([line("orders", "of this version")], "2")
    [other] = pipeline.buffer.seal([Seal("orders", "B2", "age")])
    assert not pipeline.flush(batch.ref, other.ref).success
    assert pipeline.messages() == ["of this version"]  # it holds up no other batch of its run
    assert (
        list(buffer_sensor.evaluate_tick(dg.build_sensor_context(instance=pipeline.instance)).run_requests or []) == []
    )
    redis_client.hset("batch-meta:{payments}:B1", "format", 1)
    assert pipeline.flush(batch.ref).success
    assert pipeline.messages() == ["m", "of this version"]


def test_receivers_replaced_one_after_the_other_lose_nothing(pipeline: Pipeline, start_receiver: StartReceiver) -> None:
    old, accepted = start_receiver(), list[str]()
    for number in range(60):
        if number == 20:
            new = start_receiver()
        receiver = old if number < 40 else new  # pyright: ignore[reportPossiblyUnboundVariable]
        answer = receiver.client.post("/records", content=line(message=f"{number:02}"))
        assert answer.status_code == 202
        accepted.append(f"{number:02}")
        if number == 39:
            assert old.stop(signal.SIGTERM) == 0
    assert pipeline.flush().success
    assert pipeline.messages() == accepted
