"""Failed deliveries: repeated when that may help, kept in recovery with their error, delivered by whoever repairs the cause."""

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.test_utils import create_run_for_test

from d2p_pipeline.buffer.protocol import Batch, Seal, Totals
from d2p_pipeline.orchestration import sensor
from d2p_pipeline.orchestration.failures import is_permanent
from d2p_pipeline.orchestration.recovery import recovery, recovery_sensor
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.system import until


def fail(pipeline: Pipeline, *keys: str) -> list[Batch]:
    """Batches whose flush failed because of what lies in their way."""
    pipeline.root.mkdir(exist_ok=True)
    for key in keys:
        block(pipeline, key)
        pipeline.receive([line(key, f"from {key}")], name=f"push {key}")
        [batch] = pipeline.buffer.seal([Seal(key, f"B-{key}", "age")])
        assert not pipeline.flush(batch.ref).success
    return list(pipeline.buffer.recovering())


def block(pipeline: Pipeline, key: str) -> None:
    (pipeline.root / f"capability={key}").write_text("in the way")


def repair(pipeline: Pipeline, *keys: str) -> None:
    for key in keys:
        (pipeline.root / f"capability={key}").unlink()


def recover(pipeline: Pipeline, *batches: Batch) -> dg.ExecuteInProcessResult:
    from d2p_pipeline.definitions import defs

    ids = sorted(batch.id for batch in batches)
    job = defs.resolve_job_def("recover")
    if len(ids) == 1:
        return job.execute_in_process(instance=pipeline.instance, partition_key=ids[0], raise_on_error=False)
    tags = {"dagster/asset_partition_range_start": ids[0], "dagster/asset_partition_range_end": ids[-1]}
    return job.execute_in_process(instance=pipeline.instance, tags=tags, raise_on_error=False)


def tick(pipeline: Pipeline) -> list[dg.RunRequest]:
    """Evaluate the sensor, and apply the partition changes as the daemon does."""
    result = recovery_sensor(dg.build_sensor_context(instance=pipeline.instance))
    if not isinstance(result, dg.SensorResult):
        return []
    for request in result.dynamic_partitions_requests or []:
        if isinstance(request, dg.AddDynamicPartitionsRequest):
            pipeline.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        else:
            for partition in request.partition_keys:
                pipeline.instance.delete_dynamic_partition(request.partitions_def_name, partition)
    return list(result.run_requests or [])


def partitions(pipeline: Pipeline) -> list[str]:
    return sorted(pipeline.instance.get_dynamic_partitions("recovery"))


def observations(pipeline: Pipeline) -> list[dg.AssetObservation]:
    """What the catalogue says of batches in recovery, the newest first."""
    records = pipeline.instance.fetch_observations(recovery.key, limit=10).records
    return [record.asset_observation for record in records if record.asset_observation]


def test_a_failed_batch_is_delivered_from_recovery_after_the_repair(pipeline: Pipeline) -> None:
    [batch] = fail(pipeline, "a")
    assert partitions(pipeline) == ["B-a"]
    [seen] = observations(pipeline)
    assert (seen.partition, seen.metadata["key"].value, seen.metadata["failures"].value) == ("B-a", "a", 1)
    assert "capability=a" in str(seen.metadata["error"].value)
    assert not recover(pipeline, batch).success
    assert [found.failures for found in pipeline.buffer.recovering()] == [2]
    pipeline.receive([line("a", "meanwhile")], name="meanwhile")
    repair(pipeline, "a")
    assert recover(pipeline, batch).success
    assert pipeline.messages() == ["from a"]
    assert pipeline.flush().success
    assert pipeline.messages() == ["from a", "meanwhile"]
    assert dict(pipeline.buffer.totals()) == {"a": Totals(2, 2, 0)}
    tick(pipeline)
    assert partitions(pipeline) == []


def test_a_backfill_delivers_what_it_can_and_keeps_the_rest(pipeline: Pipeline) -> None:
    batches = fail(pipeline, "a", "b", "c")
    repair(pipeline, "a", "c")
    result = recover(pipeline, *batches)
    assert not result.success
    assert pipeline.messages() == ["from a", "from c"]
    [left] = pipeline.buffer.recovering()
    assert (left.id, left.failures) == ("B-b", 2)
    tick(pipeline)
    assert partitions(pipeline) == ["B-b"]
    repair(pipeline, "b")
    assert recover(pipeline, left).success
    assert pipeline.messages() == ["from a", "from b", "from c"]


def test_a_partition_delivered_already_is_no_failure(pipeline: Pipeline) -> None:
    [batch] = fail(pipeline, "a")
    repair(pipeline, "a")
    for _ in range(2):
        assert recover(pipeline, batch).success
    assert pipeline.messages() == ["from a"]
    records = pipeline.instance.fetch_materializations(recovery.key, limit=10).records
    assert len(records) == 2


def test_what_recovers_by_itself_is_asked_for_later_and_later_and_then_waits_for_a_person(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RECOVERY_DELAY", "0.001")
    monkeypatch.setenv("D2P_RECOVERY_ATTEMPTS", "2")
    sensor.parts.cache_clear()
    [batch] = fail(pipeline, "a")
    run_keys: list[str | None] = []
    while len(run_keys) < 2:
        for request in tick(pipeline):
            assert request.partition_key == batch.id
            run_keys.append(request.run_key)
            assert not recover(pipeline, batch).success
    assert len(set(run_keys)) == 2
    assert list(pipeline.buffer.recovering(pipeline.buffer.now() + 10**9)) == []
    assert [found.failures for found in pipeline.buffer.recovering()] == [3]


def test_what_a_process_failed_before_it_died_recovers_by_itself_too(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RECOVERY_DELAY", "0.001")
    sensor.parts.cache_clear()
    [batch] = failed_in_between(pipeline, 1)
    pipeline.buffer.retry_at(batch.ref, None)  # as a failure leaves it
    [request] = until(lambda: tick(pipeline))
    assert request.partition_key == batch.id


def test_nothing_recovers_by_itself_where_that_is_switched_off(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_TRY_AUTO_RECOVER", "false")
    fail(pipeline, "a")
    assert tick(pipeline) == []
    assert list(pipeline.buffer.recovering(pipeline.buffer.now() + 10**9)) == []


def test_partitions_follow_what_is_in_recovery(pipeline: Pipeline) -> None:
    [batch] = fail(pipeline, "a")
    pipeline.instance.delete_dynamic_partition("recovery", batch.id)  # Dagster's storage was lost
    tick(pipeline)
    assert partitions(pipeline) == [batch.id]
    assert [seen.partition for seen in observations(pipeline)] == [batch.id] * 2
    repair(pipeline, "a")
    assert recover(pipeline, batch).success
    run = create_run_for_test(
        pipeline.instance, job_name="recover", status=dg.DagsterRunStatus.STARTED, tags={"dagster/partition": batch.id}
    )
    tick(pipeline)
    assert partitions(pipeline) == [batch.id]  # a run would fail if its partition went
    pipeline.instance.delete_run(run.run_id)
    tick(pipeline)
    assert partitions(pipeline) == []


def test_partitions_come_and_go_a_bounded_number_at_a_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2p_pipeline.orchestration.recovery.CHANGES_PER_TICK", 1)
    batches = [batch.id for batch in fail(pipeline, "a", "b")]
    for batch_id in batches:
        pipeline.instance.delete_dynamic_partition("recovery", batch_id)
    tick(pipeline)
    assert len(partitions(pipeline)) == 1
    tick(pipeline)
    assert partitions(pipeline) == sorted(batches)


def test_an_error_that_lasts_is_not_repeated_within_the_run(pipeline: Pipeline) -> None:
    pipeline.root.mkdir()
    block(pipeline, "a")
    pipeline.receive([line("a")])
    result = pipeline.flush()
    assert not result.success
    assert not [event for event in result.all_events if event.event_type_value == "STEP_RESTARTED"]


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (PermissionError(13, "denied"), True),
        (NotADirectoryError(20, "no directory"), True),
        (OSError(30, "read-only file system"), True),
        (OSError(28, "no space left on device"), False),
        (OSError(5, "input/output error"), False),
        (TimeoutError(110, "timed out"), False),
    ],
)
def test_errors_that_last_are_told_from_those_that_may_pass(error: OSError, lasts: bool) -> None:
    assert is_permanent(error) is lasts


def failed_in_between(pipeline: Pipeline, number: int) -> list[Batch]:
    """Batches whose runs failed without a word to Dagster."""
    for index in range(number):
        pipeline.receive([line(f"k{index}", f"from k{index}")], name=str(index))
        [batch] = pipeline.buffer.seal([Seal(f"k{index}", f"B{index:03}", "age")])
        claim = pipeline.buffer.claim(batch.ref, "run", 60_000)
        assert claim
        pipeline.buffer.fail(claim, "disk full")
        pipeline.buffer.retry_at(batch.ref, 1)
    return list(pipeline.buffer.recovering())


def launch(pipeline: Pipeline, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
    from d2p_pipeline.definitions import defs

    return defs.resolve_job_def("recover").execute_in_process(
        instance=pipeline.instance, partition_key=request.partition_key, tags=request.tags, raise_on_error=False
    )


def test_many_batches_in_recovery_share_few_runs_and_each_is_delivered_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RECOVERY_RUN_BATCHES", "25")
    sensor.parts.cache_clear()
    batches = failed_in_between(pipeline, 60)
    pipeline.buffer.retry_at(batches[30].ref, None)  # this one waits for a person
    requests = tick(pipeline)
    assert len(partitions(pipeline)) == 60
    assert [request.tags["d2p/batch"].split()[0] for request in requests] == ["25", "5", "25", "4"]
    assert tick(pipeline) == []  # not asked for twice
    for request in requests:
        assert launch(pipeline, request).success
    assert len(pipeline.messages()) == 59
    assert [batch.id for batch in pipeline.buffer.recovering()] == [batches[30].id]
    tick(pipeline)
    assert partitions(pipeline) == [batches[30].id]


def test_partitions_stay_while_a_backfill_is_under_way(pipeline: Pipeline) -> None:
    batches = fail(pipeline, "a", "b")
    repair(pipeline, "a", "b")
    pipeline.instance.add_backfill(backfill_of(pipeline, batches))
    assert recover(pipeline, *batches).success
    tick(pipeline)
    assert partitions(pipeline) == [batch.id for batch in batches]  # Dagster fails a backfill whose partitions go
    [backfill] = pipeline.instance.get_backfills()
    pipeline.instance.update_backfill(backfill.with_status(BulkActionStatus.COMPLETED_SUCCESS))
    tick(pipeline)
    assert partitions(pipeline) == []


def backfill_of(pipeline: Pipeline, batches: list[Batch]) -> PartitionBackfill:
    from d2p_pipeline.definitions import defs

    return PartitionBackfill.from_asset_partitions(
        backfill_id="backfill",
        asset_graph=defs.get_repository_def().asset_graph,
        partition_names=[batch.id for batch in batches],
        asset_selection=[recovery.key],
        backfill_timestamp=0.0,
        tags={},
        dynamic_partitions_store=pipeline.instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )


def test_runs_that_give_no_sign_of_life_are_failed_and_others_are_not(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_REDIS_LOCK_TTL", "0.001")
    sensor.parts.cache_clear()
    started = dg.DagsterRunStatus.STARTED
    lost, living, ended = (create_run_for_test(pipeline.instance, job_name="recover", status=started) for _ in range(3))
    silent = create_run_for_test(pipeline.instance, job_name="user_job", status=started)  # never says anything
    for run_id in (lost.run_id, ended.run_id, "of another instance"):
        pipeline.buffer.lives(run_id, pipeline.buffer.now() - 1)
    pipeline.instance.report_run_canceled(ended)
    [batch] = failed_in_between(pipeline, 1)
    pipeline.buffer.lives(living.run_id, pipeline.buffer.now() - 1)
    tick(pipeline)
    statuses = {run.run_id: run.status for run in pipeline.instance.get_runs()}
    assert statuses[lost.run_id] == started  # Redis may have been away

    def is_failed() -> bool:
        pipeline.buffer.lives(living.run_id, pipeline.buffer.now() - 1)
        tick(pipeline)
        [run] = pipeline.instance.get_runs(dg.RunsFilter([lost.run_id]))
        return run.status == dg.DagsterRunStatus.FAILURE

    until(is_failed)
    assert [run.run_id for run in pipeline.instance.get_runs(dg.RunsFilter(statuses=[started]))] == [
        silent.run_id,
        living.run_id,
    ]
    assert pipeline.buffer.silent(pipeline.buffer.now()).keys() == {"of another instance", living.run_id}
    assert batch.id in partitions(pipeline)


def test_a_recovery_whose_runs_are_killed_is_counted_and_at_last_waits_for_a_person(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RECOVERY_DELAY", "0.001")
    monkeypatch.setenv("D2P_RECOVERY_ATTEMPTS", "2")
    sensor.parts.cache_clear()
    [batch] = failed_in_between(pipeline, 1)
    run_keys: set[str | None] = set()
    for failures in (1, 2):
        [request] = until(lambda: tick(pipeline))
        run_keys.add(request.run_key)
        claim = pipeline.buffer.claim(batch.ref, "a run that is killed", 1)
        assert claim
        until(lambda: not pipeline.buffer.is_claimed(batch.ref))
        pipeline.buffer.retry_at(batch.ref, 1)
        tick(pipeline)
        [found] = pipeline.buffer.recovering()
        assert found.failures == failures + 1
    assert len(run_keys) == 2
    assert "ended without delivering it" in found.error
    assert list(pipeline.buffer.recovering(pipeline.buffer.now() + 10**9)) == []
