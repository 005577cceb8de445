"""Every way to reach Redis by URL, and the start-up checks, against real servers."""

import asyncio
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from d2p_pipeline.buffer.connect import RedisRefusedError, check, connect, line, without_password
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import (
    BatchRef,
    BufferUnavailableError,
    ForeignValueError,
    PartlyStoredError,
    Push,
    Seal,
)
from d2p_pipeline.buffer.redis import Client, RedisBuffer
from d2p_pipeline.buffer.server import Call
from d2p_pipeline.records import chunk
from d2p_pipeline_tests.receiving import RunningReceiver
from d2p_pipeline_tests.redis_servers import RedisServers, Start, until

RECORD: dict[str, Any] = {
    "time": "2026-11-21T10:00:00Z",
    "level": "info",
    "message": "hello",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}


@pytest.fixture
def start(redis_servers: RedisServers) -> Start:
    return redis_servers.start


def assert_delivers(client: Client) -> None:
    buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000)
    keys = [f"key {number}" for number in range(20)]
    buffer.push([Push(key, "1", 60, b"chunk", 1, 5) for key in keys])
    assert sorted(state.key for state in buffer.waiting()) == sorted(keys)
    assert len(buffer.seal([Seal(key, f"B-{key}", "age") for key in keys])) == 20
    for key in keys:
        claim = buffer.claim(BatchRef(key, f"B-{key}"), "run", 60_000)
        assert claim
        assert buffer.plan(claim.batch, [(0, 1)])
        assert buffer.read(claim.batch, 0, 1) == [b"chunk"]
        assert buffer.acknowledge(claim, 0, units=1, rows=1) == "complete"
    assert list(buffer.open_batches()) == []
    buffer.reconcile(0)
    assert {totals.rows for _, totals in buffer.totals()} == {1}


async def assert_takes_what_an_event_loop_pushes(client: Client, url: str) -> None:
    """Also after the connection was cut and the server forgot its scripts."""
    buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000, line=line(url))
    for number in range(4):
        await buffer.push_async(
            [Push("key", f"{number}", 60, b"chunk", 1, 5), Push("other", f"{number}", 60, b"x", 1, 5)]
        )
        if number == 1:
            client.script_flush()
        if number == 2 and isinstance(client, Redis):
            client.client_kill_filter(_type="normal", skipme=True)
    assert {state.key: state.records for state in buffer.waiting()} == {"key": 4, "other": 4}
    assert {state.key for state in buffer.due(buffer.now() + 1, 10)} == {"key", "other"}
    client.set("data:{key}", "another program's")
    with pytest.raises(ForeignValueError):
        await buffer.push_async([Push("key", "5", 60, b"chunk", 1, 5)])
    await buffer.end_async()


def test_one_server_with_user_password_and_database(start: Start) -> None:
    port = start("--requirepass", "secret")
    url = f"redis://default:secret@127.0.0.1:{port}/3"
    until(lambda: Redis.from_url(url).ping())
    client = connect(url)
    assert_delivers(client)
    assert isinstance(client, Redis)
    assert client.connection_pool.connection_kwargs["db"] == 3
    client.flushdb()
    asyncio.run(assert_takes_what_an_event_loop_pushes(client, url))

    async def ask() -> None:
        way = line(url)
        assert way
        assert await way.ask(Call("push", ["1", "2", "3", "4", "5"], [60, 1, 5, b"chunk", 0, 0])) == [[1, 5, 1]]
        with pytest.raises(ResponseError):
            await way.ask(Call("push", ["1", "1", "3", "4", "6"], [60, 1, 5, b"chunk", 0, 0]))
        assert await way.ask(Call("push", ["1", "2", "3", "4", "6"], [60, 1, 5, b"chunk", 0, 0])) == [[2, 10, 0]]
        await way.close()

    asyncio.run(ask())


def test_a_reply_that_came_too_late_is_not_taken_for_the_next_one(start: Start) -> None:
    url = f"redis://127.0.0.1:{start()}"
    until(lambda: Redis.from_url(url).ping())
    client = connect(url)
    assert isinstance(client, Redis)
    assert_delivers(client)  # what sends a script that the server does not know yet

    async def ask() -> None:
        way = line(url, timeout=1)
        assert way
        assert await way.ask(Call("push", ["1", "2", "3", "4", "5"], [60, 1, 5, b"chunk", 0, 0])) == [[1, 5, 1]]
        client.client_pause(60_000, all=False)
        with pytest.raises(TimeoutError):
            await way.ask(Call("push", ["1", "2", "3", "4", "6"], [60, 1, 5, b"chunk", 0, 0]))
        client.client_unpause()
        assert await way.ask(Call("push", ["11", "12", "13", "14", "15"], [60, 1, 7, b"another", 0, 0])) == [[1, 7, 1]]
        await way.close()

    asyncio.run(ask())


def assert_a_receiver_stores_once(cluster: RedisCluster, url: str, some_node: Redis, directory: Path) -> None:
    """Also what is repeated after a key was refused or a node was full, and by then may have been stored in part."""
    keys = [f"key {number}" for number in range(30)]
    body = "\n".join(json.dumps({**RECORD, "business-capability": key}) for key in keys)
    receiver = RunningReceiver(directory, {"redis_url": url})
    try:
        post, named = receiver.client.post, {"idempotency-key": "one"}
        assert {post("/record/", content=line).status_code for line in body.splitlines()} == {201}
        assert post("/records", content=body).json()["accepted"] == 30
        cluster.set("data:{taken}", "another program's")
        taken = json.dumps({**RECORD, "business-capability": "taken"})
        with ThreadPoolExecutor(8) as pool:  # they share commits
            lines = [taken if number % 2 else body.splitlines()[number // 2] for number in range(60)]
            found = pool.map(lambda line: post("/record/", content=line).status_code, lines)
            assert list(found) == [201, 500] * 30
        answer = post("/records", content=f"{body}\n{taken}", headers=named)
        assert (answer.status_code, "data:{taken} is a string" in answer.text) == (500, True)
        cluster.delete("data:{taken}")
        answer = post("/records", content=f"{body}\n{taken}", headers=named)
        assert answer.json()["accepted"] == 31
        some_node.config_set("maxmemory", 1)
        assert post("/records", content=body, headers=named).status_code == 503
        some_node.config_set("maxmemory", 0)
        for _ in range(2):
            assert post("/records", content=body, headers=named).json()["accepted"] == 30
    finally:
        assert receiver.stop() == 0
    for key, times in [*((key, 5) for key in keys), ("taken", 1)]:
        chunks = cluster.lrange(f"data:{{{key}}}", 0, -1)
        lines = [line for found in chunks for line in chunk.decode(cast(bytes, found)).body.splitlines()]
        assert [json.loads(line)["business-capability"] for line in lines] == [key] * times


def test_a_cluster_of_three_masters(redis_servers: RedisServers, tmp_path: Path) -> None:
    ports = redis_servers.cluster()
    url = f"redis+cluster://127.0.0.1:{ports[1]}"
    client = connect(url)
    assert "append-only persistence is off" in check(client, url)[0]
    assert_delivers(client)
    buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000)
    pushes = [Push(f"again {number}", "1", 60, b"chunk", 1, 5) for number in range(30)]
    with Redis(port=ports[0]) as full:
        full.config_set("maxmemory", 1)
        with pytest.raises(BufferUnavailableError, match="others may not be"):
            buffer.push(pushes)  # nobody may say that nothing was stored
        full.config_set("maxmemory", 0)
    buffer.push(pushes)
    assert [state.records for state in buffer.waiting()] == [1] * 30
    client.flushall()
    client.set("data:{again 0}", "another program's")
    with pytest.raises(PartlyStoredError, match=r"again 0\} is a string, .*; what has other keys was stored"):
        buffer.push(pushes)
    assert {state.key for state in buffer.due(buffer.now() + 1, 100)} == {push.key for push in pushes[1:]}
    client.flushall()
    assert isinstance(client, RedisCluster)
    client.get_redis_connection(client.get_primaries()[0]).script_flush()
    buffer.push(pushes)
    assert {state.key for state in buffer.due(buffer.now() + 1, 100)} == {push.key for push in pushes}
    client.flushall()
    asyncio.run(assert_takes_what_an_event_loop_pushes(client, url))
    client.flushall()
    assert isinstance(client, RedisCluster)
    with Redis(port=ports[0]) as node:
        assert_a_receiver_stores_once(client, url, node, tmp_path)


def test_a_sentinel_group(start: Start, tmp_path: Path) -> None:
    master = start()
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(f"sentinel monitor mymaster 127.0.0.1 {master} 1\n")
    sentinel = start(program=(str(configuration), "--sentinel"))
    url = f"redis+sentinel://127.0.0.1:{sentinel}/mymaster/0"
    client = connect(url)
    until(lambda: check(client, url), RedisRefusedError)
    assert_delivers(client)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost", "Redis URL must specify one of the following schemes"),
        (
            "redis+sentinel://localhost/mymaster",
            "a Sentinel URL reads redis.sentinel://host:port,host:port/master-name/db",
        ),
        ("redis+cluster://127.0.0.1:1", "Redis Cluster cannot be connected"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(url: str, message: str) -> None:
    with pytest.raises(RedisRefusedError, match=message):
        connect(url)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    url = "redis://user:secret@127.0.0.1:1"
    client = connect(url, timeout=0.1)
    client.set_retry(None)  # pyright: ignore[reportArgumentType]  # no retry: the test need not wait
    with pytest.raises(RedisRefusedError, match="does not answer") as caught:
        check(client, url)
    assert "secret" not in str(caught.value)
    assert without_password(url) == "redis://user:********@127.0.0.1:1"
    assert without_password("unix:///run/redis.sock") == "unix:///run/redis.sock"
    assert without_password("unix://user:secret@/run/redis.sock") == "unix://user:********@/run/redis.sock"
    assert without_password("redis://h:1/0?password=secret&ssl_password=s&protocol=3") == (
        "redis://h:1/0?password=********&ssl_password=********&protocol=3"
    )


def test_a_server_that_may_evict_is_refused(redis_client: Redis, redis_server: EmbeddedRedis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(RedisRefusedError, match=r"allkeys-lru.*CONFIG SET maxmemory-policy noeviction"):
            check(redis_client, redis_server.url)
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


def test_what_the_persistence_can_lose_is_said(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, Redis.from_url(server.url) as client:
        assert check(client, server.url) == []
        client.config_set("appendfsync", "everysec")
        assert "last second" in check(client, server.url)[0]
        client.config_set("appendonly", "no")
        assert "append-only persistence is off" in check(client, server.url)[0]


def test_the_embedded_server_keeps_its_data_over_a_kill_and_a_restart(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path).start()
    push = Push("k", "1", 60, b"chunk", 1, 5)
    RedisBuffer(connect(server.url), Names(), full_records=10, full_bytes=1000).push([push])
    assert server.process
    os.kill(server.process.pid, 9)
    server.process.wait()
    server.stop()
    with EmbeddedRedis(tmp_path) as server:
        buffer = RedisBuffer(connect(server.url), Names(), full_records=10, full_bytes=1000)
        assert [state.key for state in buffer.waiting()] == ["k"]


def test_a_second_process_uses_the_first_ones_embedded_server(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, durable=False) as first:
        second = EmbeddedRedis(tmp_path).start()
        assert (first.is_owner, second.is_owner) == (True, False)
        second.stop()
        assert connect(first.url).ping()


def test_a_directory_too_deep_for_a_socket_works_as_well(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / ("deep" * 40), durable=False) as server:
        assert connect(server.url).ping()


@pytest.mark.parametrize("name", ["with a space", "100%", "d" * 120])
def test_an_embedded_server_runs_in_any_directory(tmp_path: Path, name: str) -> None:
    with EmbeddedRedis(tmp_path / name, durable=False) as server:
        assert not re.search(r"[\s%]", server.url)
        assert Redis.from_url(server.url).ping()
