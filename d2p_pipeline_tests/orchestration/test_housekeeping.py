"""Housekeeping: old runs leave nothing behind, and nothing the catalogue shows goes with them."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test

from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.housekeeping import prune
from d2p_pipeline_tests.pipeline import Pipeline, line


@pytest.fixture
def stored(pipeline: Pipeline, tmp_path: Path) -> Iterator[Pipeline]:
    """With Dagster's own storage on disk, as `d2p up` has it."""
    home = tmp_path / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home), overrides={"telemetry": {"enabled": False}}) as instance:
        pipeline.instance = instance
        yield pipeline


def deliver(pipeline: Pipeline, key: str, message: str = "m") -> str:
    pipeline.receive([line(key, message)], name=message)
    result = pipeline.flush()
    assert result.success
    return result.run_id


def files_naming(root: Path, run_id: str) -> list[Path]:
    return [path for path in root.rglob("*") if run_id in path.name]


def runs(pipeline: Pipeline) -> set[str]:
    return {run.run_id for run in pipeline.instance.get_runs()}


def prune_all(pipeline: Pipeline, *, keep_days: float = 0, keep_failed_days: float = 0, most: int = 1000) -> str:
    """Run the job as its schedule does, with other settings; returns its run id."""
    from d2p_pipeline.definitions import defs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2P_KEEP_RUNS_DAYS", str(keep_days or 1e-9))
        patch.setenv("D2P_KEEP_FAILED_RUNS_DAYS", str(keep_failed_days or 1e-9))
        patch.setenv("D2P_KEEP_RUNS", str(most))
        result = defs.resolve_job_def("housekeeping").execute_in_process(instance=pipeline.instance)
    assert result.success
    return result.run_id


def test_an_old_run_goes_with_its_events_and_files(stored: Pipeline, tmp_path: Path) -> None:
    first, second = deliver(stored, "a", "1"), deliver(stored, "a", "2")
    assert files_naming(tmp_path, first)
    cleaner = prune_all(stored)
    assert runs(stored) == {second, cleaner}  # the newest delivery of a key stays
    assert files_naming(tmp_path, first) == []
    assert stored.messages() == ["1", "2"]


def test_every_keys_newest_delivery_stays_in_the_catalogue(stored: Pipeline) -> None:
    kept = {deliver(stored, "a"), deliver(stored, "b"), deliver(stored, "c")}
    again = deliver(stored, "a", "again")
    prune_all(stored)
    [first] = kept - runs(stored)
    assert again in runs(stored)
    latest = stored.instance.fetch_materializations(parquet_files.key, limit=10).records
    assert {record.partition_key for record in latest} == {"a", "b", "c"}
    assert first not in {record.run_id for record in latest}


def test_failed_runs_stay_longer(stored: Pipeline) -> None:
    failed = create_run_for_test(stored.instance, job_name="flush", status=dg.DagsterRunStatus.FAILURE)
    done = create_run_for_test(stored.instance, job_name="flush", status=dg.DagsterRunStatus.SUCCESS)
    going = create_run_for_test(stored.instance, job_name="flush", status=dg.DagsterRunStatus.STARTED)
    prune_all(stored, keep_failed_days=1)
    assert runs(stored) >= {failed.run_id, going.run_id}
    assert done.run_id not in runs(stored)
    prune_all(stored)
    assert failed.run_id not in runs(stored)
    assert going.run_id in runs(stored)


def test_only_the_newest_are_kept_however_young(stored: Pipeline) -> None:
    done = [
        create_run_for_test(stored.instance, job_name="flush", status=dg.DagsterRunStatus.SUCCESS).run_id
        for _ in range(5)
    ]
    future = datetime.now(UTC) - timedelta(days=1)
    assert prune(stored.instance, set(), before=future, failed_before=future, most=2).deleted == 3
    assert runs(stored) == set(done[3:])
