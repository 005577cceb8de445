"""A run killed with SIGKILL between any two steps, and repeated: same files, no duplicates, dead letters once."""

import hashlib
import signal
import time
from pathlib import Path

import dagster as dg
import pytest
from redis import Redis

from d2p_pipeline.buffer.protocol import Batch, BatchRef, Seal, Totals
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline_tests.faults.struck_run import StruckRun
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.system import until

POINTS = [
    "before:plan:1",
    "after:plan:1",
    "after:read:1",
    "after:check:1",
    "after:build:1",
    "before:rename:1",
    "after:rename:1",
    "after:write:1",
    "after:write:2",
    "before:acknowledge:1",
    "after:acknowledge:1",
    "after:check:2",
    "after:rename:3",
    "before:acknowledge:2",
    "after:acknowledge:2",
]


def sealed(pipeline: Pipeline, redis_client: Redis) -> Batch:
    """Two units; two partitions and one bad line in each."""
    for unit in range(2):
        lines = [line(message=f"{unit} {hour}", time=f"2026-11-21T{hour}:00:00Z") for hour in (10, 11)]
        redis_client.rpush("data:{payments}", b"\n".join([*lines, f"bad {unit}".encode()]))
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    return batch


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.parquet")
    }


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_repeated_gives_what_an_undisturbed_run_gives(
    pipeline: Pipeline,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    point: str,
) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "500")
    monkeypatch.setenv("D2P_REDIS_LOCK_TTL", "0.5")
    batch = sealed(pipeline, redis_client)
    died = StruckRun(tmp_path / "log", [batch.ref], point)
    assert died.wait() == -signal.SIGKILL, died.output()
    written_before = contents(pipeline.root) if pipeline.root.exists() else {}
    until(lambda: not pipeline.buffer.is_claimed(batch.ref))  # the dead run's lease ends by itself
    assert pipeline.flush(batch.ref).success
    after = contents(pipeline.root)
    assert {path: after[path] for path in written_before} == written_before
    assert sorted(after) == [
        f"capability=payments/year=2026/month=11/day=21/hour={hour}/B1-{unit}.parquet"
        for hour in (10, 11)
        for unit in (0, 1)
    ]
    assert [path.name for path in pipeline.root.rglob(".*")] == []
    assert pipeline.messages() == ["0 10", "0 11", "1 10", "1 11"]
    assert len(pipeline.buffer.dead_letters("payments")) == 2
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=6, rows=4, dead_letters=2)}
    assert list(pipeline.buffer.open_batches()) == []


@pytest.mark.parametrize("point", ["after:plan:1", "after:build:1", "before:acknowledge:1", "after:acknowledge:1"])
def test_a_run_paused_past_its_lease_wakes_up_to_find_its_work_done(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "500")
    monkeypatch.setenv("D2P_REDIS_LOCK_TTL", "0.5")
    batch = sealed(pipeline, redis_client)
    paused = StruckRun(tmp_path / "log", [batch.ref], point, signal.SIGSTOP)
    paused.wait_until_paused()
    until(lambda: not pipeline.buffer.is_claimed(batch.ref))
    assert pipeline.flush(batch.ref).success
    before = contents(pipeline.root)
    paused.resume()
    paused.wait()
    assert contents(pipeline.root) == before
    assert [path.name for path in pipeline.root.rglob(".*")] == []
    assert pipeline.messages() == ["0 10", "0 11", "1 10", "1 11"]
    assert len(pipeline.buffer.dead_letters("payments")) == 2
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=6, rows=4, dead_letters=2)}


@pytest.mark.parametrize(
    "point",
    ["before:seal:1", "after:seal:1", "after:plan:2", "after:rename:3", "before:acknowledge:2", "after:acknowledge:2"],
)
def test_what_a_run_was_going_on_with_when_it_was_killed_is_taken_up_by_the_sensor(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    monkeypatch.setenv("D2P_REDIS_LOCK_TTL", "0.5")
    lines = [line(message=f"sealed {hour}", time=f"2026-11-21T{hour}:00:00Z") for hour in (10, 11)]
    pipeline.receive(lines, name="first")
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    pipeline.receive([line(message=str(number)) for number in range(100)], name="second")
    died = StruckRun(tmp_path / "log", [batch.ref], point)
    assert died.wait() == -signal.SIGKILL, died.output()
    deadline = time.monotonic() + 60
    while dict(pipeline.buffer.totals())["payments"].rows < 102 and time.monotonic() < deadline:
        requests = buffer_sensor.evaluate_tick(dg.build_sensor_context(instance=pipeline.instance)).run_requests or []
        for request in requests:
            config = request.run_config["ops"]["plan_units"]["config"]
            assert pipeline.flush(*(BatchRef(found["key"], found["id"]) for found in config["batches"])).success
        time.sleep(0.2)
    assert pipeline.messages() == sorted([*map(str, range(100)), "sealed 10", "sealed 11"])
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=102, rows=102, dead_letters=0)}
    assert list(pipeline.buffer.open_batches()) == []
