"""A Redis master killed in the middle of a run: its replica takes over, what was replicated is delivered, once.

What a master had not yet replicated is lost with it; docs/scaling.md says how to rule that out.
"""

import signal
import time
from pathlib import Path

import pytest
from redis import Redis
from redis.cluster import RedisCluster

from d2p_pipeline.buffer.connect import check, connect
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Announcement, BatchRef, Claim, Push, Seal, Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.faults.struck_run import StruckRun
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.redis_servers import RedisServers, replicated, until

POINTS = ["after:plan:1", "before:acknowledge:1", "after:acknowledge:1"]
"""Two units: something is left to do after each point."""


def sealed(buffer: RedisBuffer, key: str) -> BatchRef:
    """A batch of two units."""
    buffer.push([Push(key, f"{key} {number}", 60, line(key, f"{key} {number}"), 1, 300) for number in range(2)])
    [batch] = buffer.seal([Seal(key, f"B-{key.replace(' ', '-')}", "age")])
    return batch.ref


def messages(root: Path) -> list[str]:
    import duckdb

    if not list(root.rglob("*.parquet")):
        return []
    rows = duckdb.connect().execute(f"SELECT message FROM read_parquet('{root}/**/*.parquet')").fetchall()
    return sorted(message for (message,) in rows)


def deliver_what_is_left(buffer: RedisBuffer, ref: BatchRef, log: Path, settings: dict[str, str]) -> None:
    """What the sensor does about a run that came to nothing: another one, when its lease has ended."""
    deadline = time.monotonic() + 120
    while (batch := buffer.batch(ref)) and batch.state != "done":
        assert time.monotonic() < deadline
        if not buffer.is_claimed(ref):
            StruckRun(log, [ref], settings=settings).wait()


STEPS = ["push", "seal", "claim", "announce", "acknowledge"]


def take(step: str, buffer: RedisBuffer, key: str) -> None:
    """One step of a delivery; taken twice, it has to be as if taken once."""
    ref = BatchRef(key, f"C-{key.replace(' ', '-')}")
    claim = Claim(ref, "owner", 1)
    if step == "push":
        buffer.push([Push(key, "P", 60, line(key, key), 1, 300)])
    elif step == "seal":
        assert [batch.records for batch in buffer.seal([Seal(key, ref.id, "age")])] == [1]
    elif step == "claim":
        assert buffer.claim(ref, claim.owner, 60_000) == claim
    elif step == "announce":
        assert buffer.announce([Announcement(claim, 0, {"path": "md5"})]) == [[]]
    else:
        assert buffer.acknowledge(claim, 0, units=1, rows=1) in ("complete", "repeated")


def test_a_cluster_whose_masters_die_in_the_middle_of_runs_delivers_everything_once(
    redis_servers: RedisServers, tmp_path: Path
) -> None:
    ports = redis_servers.cluster(replicas=True)
    masters = ports[:3]
    url = f"redis+cluster://127.0.0.1:{ports[0]}"
    client = connect(url)
    assert isinstance(client, RedisCluster)
    buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000)
    root = tmp_path / "files"
    settings = {"writer_file_path": str(root), "unit_bytes": "1", "redis_lock_ttl": "1"}
    # Of each master, a key for a run, and one for each step that the master dies after.
    keys: dict[int, str] = {}
    others: dict[int, list[str]] = {}
    for number in range(1000):
        node = client.get_node_from_key(f"{{key {number}}}")
        assert node
        if keys.setdefault(int(node.port), f"key {number}") != f"key {number}":
            others.setdefault(int(node.port), []).append(f"key {number}")
    # Any node that still lives lets a client in.
    for point, master in zip(POINTS, masters, strict=True):
        settings["redis_url"] = f"redis+cluster://127.0.0.1:{ports[3]}"
        ref = sealed(buffer, keys[master])
        run = StruckRun(tmp_path / "log", [ref], point, signal.SIGSTOP, settings)
        halted = list(zip(others[master], range(len(STEPS)), strict=False))
        for key, last in halted:
            for step in STEPS[: last + 1]:
                take(step, buffer, key)
        run.wait_until_paused()
        replicated(master)
        redis_servers.kill(master)
        run.resume()
        run.wait()
        until(lambda ref=ref: buffer.batch(ref), Exception)
        redis_servers.wait_for_cluster()
        for key, last in halted:
            for step in STEPS[last:]:  # the last one again, as nobody knows whether it was answered
                take(step, buffer, key)
        deliver_what_is_left(buffer, ref, tmp_path / "log", settings)
        # A late second arrival of a step changes nothing on the new master either.
        assert buffer.seal([Seal(ref.key, ref.id, "age")])[0].state == "done"
    assert messages(root) == sorted(f"{key} {number}" for key in keys.values() for number in range(2))
    once = {key: Totals(accepted=1, rows=1, dead_letters=0) for some in others.values() for key in some[: len(STEPS)]}
    assert dict(buffer.totals()) == once | {key: Totals(accepted=2, rows=2, dead_letters=0) for key in keys.values()}


@pytest.mark.parametrize("point", ["after:plan:1", "before:acknowledge:1"])
def test_a_sentinel_group_whose_master_dies_in_the_middle_of_runs_and_after_each_step_delivers_everything_once(
    redis_servers: RedisServers, tmp_path: Path, point: str
) -> None:
    master = redis_servers.start()
    replica = redis_servers.start("--replicaof", "127.0.0.1", str(master))
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master} 1\nsentinel down-after-milliseconds mymaster 1000\n"
    )
    sentinel = redis_servers.start(program=(str(configuration), "--sentinel"))
    replicated(master)
    with Redis(port=sentinel) as asked:
        until(lambda: asked.sentinel_slaves("mymaster"))
    url = f"redis+sentinel://127.0.0.1:{sentinel}/mymaster/0"
    client = connect(url)
    assert any("may lack the last writes" in warning for warning in check(client, url))
    buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000)
    root = tmp_path / "files"
    settings = {"redis_url": url, "writer_file_path": str(root), "unit_bytes": "1", "redis_lock_ttl": "1"}
    ref = sealed(buffer, "payments")
    run = StruckRun(tmp_path / "log", [ref], point, signal.SIGSTOP, settings)
    halted = [(f"halted after {step}", last) for last, step in enumerate(STEPS)]
    for key, last in halted:
        for step in STEPS[: last + 1]:
            take(step, buffer, key)
    run.wait_until_paused()
    replicated(master)
    redis_servers.kill(master)
    run.resume()
    run.wait()
    until(lambda: Redis(port=replica).info("replication")["role"] == "master")  # pyright: ignore[reportIndexIssue]
    until(lambda: buffer.batch(ref), Exception)
    for key, last in halted:
        for step in STEPS[last:]:  # the last one again, as nobody knows whether it was answered
            take(step, buffer, key)
    deliver_what_is_left(buffer, ref, tmp_path / "log", settings)
    assert messages(root) == ["payments 0", "payments 1"]
    once = {key: Totals(accepted=1, rows=1, dead_letters=0) for key, _ in halted}
    assert dict(buffer.totals()) == once | {"payments": Totals(accepted=2, rows=2, dead_letters=0)}
