"""The buffer sensor: what it seals, which runs it asks for, and what it does about runs that came to nothing."""

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.sensor import MIN_INTERVAL_LOOP_TIME
from redis import Redis

from d2p_pipeline.buffer.protocol import BatchRef, Seal
from d2p_pipeline.orchestration import sensor
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline_tests.pipeline import Pipeline, line


def tick(pipeline: Pipeline) -> list[dg.RunRequest]:
    context = dg.build_sensor_context(instance=pipeline.instance)
    data = buffer_sensor.evaluate_tick(context)
    return list(data.run_requests or [])


def batches(request: dg.RunRequest) -> list[BatchRef]:
    config = request.run_config["ops"]["plan_units"]["config"]["batches"]
    return [BatchRef(batch["key"], batch["id"]) for batch in config]


def full(pipeline: Pipeline, key: str, name: str = "push") -> None:
    pipeline.receive([line(key, str(number)) for number in range(100)], name=f"{name} {key}")


def let_time_pass(pipeline: Pipeline, redis_client: Redis) -> None:
    """Every batch's next look is due."""
    for member, _ in redis_client.zscan_iter("batches"):
        redis_client.zadd("batches", {member: 0})


def test_no_look_of_the_daemon_at_its_sensors_is_passed_over() -> None:
    assert buffer_sensor.minimum_interval_seconds
    assert buffer_sensor.minimum_interval_seconds < MIN_INTERVAL_LOOP_TIME


def test_a_young_and_small_buffer_waits(pipeline: Pipeline) -> None:
    pipeline.receive([line()])
    assert tick(pipeline) == []
    assert [state.records for state in pipeline.buffer.waiting()] == [1]


def test_a_full_buffer_is_sealed_and_its_run_is_tagged_with_key_and_batch(pipeline: Pipeline) -> None:
    full(pipeline, "payments")
    [request] = tick(pipeline)
    [ref] = batches(request)
    assert (ref.key, request.tags["d2p/key"], request.tags["d2p/batch"]) == ("payments", "payments", ref.id)
    assert (request.tags["d2p/why"], request.tags["d2p/sealed_by"]) == ("few keys due", "size")
    batch = pipeline.buffer.batch(ref)
    assert batch
    assert (batch.reason, batch.records, batch.requests) == ("size", 100, 1)
    assert tick(pipeline) == []


def test_an_old_buffer_is_sealed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_FLUSH_INTERVAL", "0.001")
    sensor.parts.cache_clear()
    pipeline.receive([line()])
    [request] = tick(pipeline)
    [ref] = batches(request)
    batch = pipeline.buffer.batch(ref)
    assert batch
    assert batch.reason == "age"


def test_a_buffer_asked_for_is_sealed(pipeline: Pipeline) -> None:
    pipeline.receive([line("a"), line("b")])
    pipeline.buffer.request_flush(["b"])
    [request] = tick(pipeline)
    assert [ref.key for ref in batches(request)] == ["b"]


def test_a_foreign_producers_buffer_is_found_without_any_index(pipeline: Pipeline, redis_client: Redis) -> None:
    redis_client.rpush("data:{payments}", *[line(message=str(number)) for number in range(100)])
    [request] = tick(pipeline)
    assert pipeline.flush(*batches(request)).success
    assert len(pipeline.rows()) == 100


def test_a_batch_that_nobody_asked_a_run_for_gets_one(pipeline: Pipeline, redis_client: Redis) -> None:
    """The tick died between the seal and its answer; the index died with it."""
    full(pipeline, "payments")
    [request] = tick(pipeline)
    redis_client.delete("batches")
    [again] = tick(pipeline)
    assert batches(again) == batches(request)
    assert again.run_key != request.run_key


def test_a_run_that_came_to_nothing_is_asked_for_again_later_and_later(pipeline: Pipeline, redis_client: Redis) -> None:
    full(pipeline, "payments")
    [first] = tick(pipeline)
    looks: list[float] = []
    requests = [first]
    for _ in range(3):
        [(_, look)] = redis_client.zscan_iter("batches")
        looks.append(look - pipeline.buffer.now())
        let_time_pass(pipeline, redis_client)
        requests += tick(pipeline)
    assert len({request.run_key for request in requests}) == 4
    assert looks[0] < looks[1] < looks[2]


def test_a_batch_whose_runs_keep_dying_goes_into_recovery_with_what_is_known_of_the_last(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RUN_ATTEMPTS", "2")
    sensor.parts.cache_clear()
    full(pipeline, "payments")
    for attempt in range(2):
        [request] = tick(pipeline)
        run = create_run_for_test(pipeline.instance, job_name="flush", run_config=request.run_config)
        pipeline.instance.report_engine_event(f"terminated with exit code -9, attempt {attempt}", run)
        pipeline.instance.report_run_failed(run)
        let_time_pass(pipeline, redis_client)
    assert tick(pipeline) == []
    [batch] = pipeline.buffer.recovering()
    assert batch.error.startswith("2 runs were asked for and none delivered it; the last run, ")
    assert "is FAILURE: terminated with exit code -9, attempt 1" in batch.error
    assert pipeline.flush(batch.ref).success  # nothing is lost by it
    assert len(pipeline.rows()) == 100


def test_a_batch_is_not_asked_for_again_while_a_run_holds_or_awaits_it(pipeline: Pipeline, redis_client: Redis) -> None:
    full(pipeline, "payments")
    [request] = tick(pipeline)
    [ref] = batches(request)
    let_time_pass(pipeline, redis_client)
    claim = pipeline.buffer.claim(ref, "run", 60_000)
    assert claim
    assert tick(pipeline) == []
    pipeline.buffer.release(claim)
    create_run_for_test(
        pipeline.instance, job_name="flush", run_config=request.run_config, status=dg.DagsterRunStatus.STARTING
    )
    let_time_pass(pipeline, redis_client)
    assert tick(pipeline) == []


def test_two_daemons_on_one_redis_share_the_work_and_double_nothing(pipeline: Pipeline) -> None:
    for key in ("a", "b", "c"):
        full(pipeline, key)
    first = tick(pipeline)
    with dg.DagsterInstance.ephemeral() as other:
        second = list(buffer_sensor.evaluate_tick(dg.build_sensor_context(instance=other)).run_requests or [])
    assert [key for request in first for key, _ in batches(request)] == ["a", "b", "c"]
    assert second == []
    for request in [*first, *first]:  # both daemons launch, as after a tick that was repeated
        assert pipeline.flush(*batches(request)).success
    assert len(pipeline.rows()) == 300
    assert len(pipeline.files()) == 3


def test_many_due_keys_share_few_runs(pipeline: Pipeline) -> None:
    for number in range(40):
        full(pipeline, f"key {number}")
    requests = tick(pipeline)
    assert len(requests) == 1
    assert len(batches(requests[0])) == 40
    assert (requests[0].tags["d2p/key"], requests[0].tags["d2p/why"]) == ("40 keys", "shared")


def test_a_hot_key_has_its_own_run_and_floods_stand_back(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "20000")
    monkeypatch.setenv("D2P_RUN_BYTES", "40000")
    sensor.parts.cache_clear()
    for round in range(3):
        full(pipeline, "flood", f"round {round}")
        pipeline.buffer.seal([Seal("flood", f"F{round}", "size")])
    for number in range(5):
        pipeline.receive([line(f"key {number}")])
    pipeline.buffer.request_flush()
    requests = tick(pipeline)
    assert [(request.tags["d2p/why"], request.tags["dagster/priority"]) for request in requests] == [
        ("hot key", "0"),
        ("shared", "0"),
        ("hot key", "-1"),
    ]
    assert {ref.key for ref in batches(requests[1])} == {f"key {number}" for number in range(5)}


def test_while_enough_runs_wait_for_their_start_buffers_grow(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_MAX_RUNS_PER_TICK", "1")
    sensor.parts.cache_clear()
    full(pipeline, "payments")
    [request] = tick(pipeline)
    run = create_run_for_test(
        pipeline.instance, job_name="flush", run_config=request.run_config, status=dg.DagsterRunStatus.STARTING
    )
    full(pipeline, "payments", "more")
    full(pipeline, "payments", "still more")
    assert tick(pipeline) == []
    assert [state.records for state in pipeline.buffer.waiting()] == [200]
    pipeline.instance.delete_run(run.run_id)
    [request] = tick(pipeline)
    assert pipeline.flush(*batches(request)).success
    assert len(pipeline.rows()) == 200


def test_a_key_that_a_run_attends_is_left_to_it(pipeline: Pipeline) -> None:
    full(pipeline, "attended")
    full(pipeline, "other")
    pipeline.buffer.attend(["attended"], pipeline.buffer.now() + 60_000)
    [request] = tick(pipeline)
    assert [ref.key for ref in batches(request)] == ["other"]
    pipeline.buffer.leave(["attended"])
    [request] = tick(pipeline)
    assert [ref.key for ref in batches(request)] == ["attended"]


def test_a_batch_that_a_run_sealed_and_holds_is_left_to_it(pipeline: Pipeline) -> None:
    """A run that goes on, or one from the launchpad, seals by itself: nobody has asked a run for its batch."""
    full(pipeline, "payments")
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "size")])
    claim = pipeline.buffer.claim(batch.ref, "run", 60_000)
    assert claim
    assert tick(pipeline) == []


def test_a_receive_only_instance_seals_nothing(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_REDIS_SKIP_FLUSH", "true")
    sensor.parts.cache_clear()
    full(pipeline, "payments")
    assert tick(pipeline) == []
    assert len(list(pipeline.buffer.waiting())) == 1


def test_a_full_redis_does_not_stop_the_sensor(pipeline: Pipeline, redis_client: Redis) -> None:
    full(pipeline, "payments")
    redis_client.config_set("maxmemory", 1)
    [request] = tick(pipeline)
    assert pipeline.flush(*batches(request)).success
    redis_client.config_set("maxmemory", 0)
    assert len(pipeline.rows()) == 100
