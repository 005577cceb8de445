"""A delivery repeated under other settings than those of the attempt that died: its files are gone, each record is in one."""

import os
import signal
from pathlib import Path

import pytest
from redis import Redis

from d2p_pipeline.buffer.protocol import Batch, Seal, Totals
from d2p_pipeline.parquet.verify import verify
from d2p_pipeline_tests.faults.struck_run import StruckRun
from d2p_pipeline_tests.pipeline import Pipeline, line

BY_EVENT, BY_INGEST = {"partition_time": "event"}, {"partition_time": "ingest"}
HASHED, HASHED_SNAKE = {"use_hash": "true"}, {"use_hash": "true", "column_names": "snake"}


def sealed(pipeline: Pipeline) -> Batch:
    pipeline.receive([line(message=str(hour), time=f"2025-11-21T{hour}:00:00Z") for hour in (10, 11)])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    return batch


def killed(pipeline: Pipeline, settings: dict[str, str], batch: Batch, point: str) -> None:
    """An attempt that dies at a point, and whose lease then ends."""
    died = StruckRun(pipeline.root.parent / "log", [batch.ref], point, settings=settings)
    assert died.wait() == -signal.SIGKILL, died.output()
    end_lease(batch)


def paused(pipeline: Pipeline, settings: dict[str, str], batch: Batch, point: str) -> StruckRun:
    """An attempt that stops at a point for longer than its lease."""
    run = StruckRun(pipeline.root.parent / "log", [batch.ref], point, signal.SIGSTOP, settings)
    run.wait_until_paused()
    end_lease(batch)
    return run


def end_lease(batch: Batch) -> None:
    """What time would do."""
    with Redis.from_url(os.environ["D2P_REDIS_URL"]) as client:
        client.delete(f"lock:{{{batch.key}}}:{batch.id}")


def deliver(pipeline: Pipeline, settings: dict[str, str], batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"D2P_{name.upper()}", value)
        assert pipeline.flush(batch.ref).success


def each_record_is_there_once(pipeline: Pipeline) -> bool:
    books = dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=2, rows=2, dead_letters=0)}
    return books and pipeline.messages() == ["10", "11"] and list(pipeline.buffer.open_batches()) == []


@pytest.mark.parametrize("point", ["after:announce:1", "after:rename:1", "after:write:2", "before:acknowledge:1"])
@pytest.mark.parametrize(("first", "second"), [(BY_EVENT, BY_INGEST), (HASHED, HASHED_SNAKE)])
def test_what_a_killed_attempt_wrote_under_other_settings_is_removed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, first: dict[str, str], second: dict[str, str], point: str
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, first, batch, point)
    deliver(pipeline, second, batch, monkeypatch)
    assert each_record_is_there_once(pipeline)


@pytest.mark.parametrize("point", ["after:announce:1", "before:remove:1", "after:remove:1", "after:write:1"])
def test_an_attempt_that_dies_while_it_removes_leaves_the_rest_to_the_next(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "before:acknowledge:1")
    killed(pipeline, HASHED, batch, point)
    deliver(pipeline, BY_INGEST, batch, monkeypatch)
    assert each_record_is_there_once(pipeline)


def test_an_attempt_that_wakes_up_to_remove_does_not_remove_what_was_delivered(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "before:acknowledge:1")
    late = paused(pipeline, HASHED, batch, "before:remove:1")
    deliver(pipeline, BY_EVENT, batch, monkeypatch)
    late.resume()
    late.wait()
    assert each_record_is_there_once(pipeline)


def test_the_first_settings_again_give_files_of_other_names(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "before:acknowledge:1")
    killed(pipeline, HASHED, batch, "before:acknowledge:1")
    deliver(pipeline, BY_EVENT, batch, monkeypatch)
    assert [Path(file).name for file in pipeline.files()] == ["B1-0.3.parquet", "B1-0.3.parquet"]
    assert all(not verify(pipeline.root / file).problems for file in pipeline.files())
    assert each_record_is_there_once(pipeline)


def test_a_unit_without_rows_under_the_new_settings_leaves_no_file(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "before:acknowledge:1")
    assert len(pipeline.files()) == 2
    monkeypatch.setenv("D2P_TRANSFORM", "d2p_pipeline_tests.records.transforms:without_rows")
    deliver(pipeline, {}, batch, monkeypatch)
    assert pipeline.files() == []
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=2, rows=0, dead_letters=2)}


LATE = ["after:build:1", "after:announce:1", "before:rename:2", "before:acknowledge:1"]


@pytest.mark.parametrize("point", LATE)
def test_an_attempt_that_wakes_up_does_not_overwrite_other_content_of_the_same_name(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    batch = sealed(pipeline)
    late = paused(pipeline, {"mask_fields": "message"}, batch, point)
    deliver(pipeline, {}, batch, monkeypatch)
    late.resume()
    late.wait()
    assert each_record_is_there_once(pipeline)


@pytest.mark.parametrize("point", LATE)
def test_an_attempt_that_wakes_up_after_the_delivery_leaves_nothing_of_its_own(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    batch = sealed(pipeline)
    late = paused(pipeline, BY_EVENT, batch, point)
    deliver(pipeline, BY_INGEST, batch, monkeypatch)
    late.resume()
    late.wait()
    assert each_record_is_there_once(pipeline)


def test_an_attempt_that_wakes_up_before_its_successor_writes_leaves_nothing_either(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    late = paused(pipeline, BY_EVENT, batch, "after:announce:1")
    killed(pipeline, BY_INGEST, batch, "after:announce:1")
    late.resume()
    late.wait()
    assert pipeline.files() == []
    deliver(pipeline, BY_INGEST, batch, monkeypatch)
    assert each_record_is_there_once(pipeline)


def test_a_stray_that_cannot_be_removed_keeps_the_batch_in_recovery(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "before:acknowledge:1")
    [stray, _] = [pipeline.root / file for file in pipeline.files()]
    stray.unlink()
    (stray / "somebody's").mkdir(parents=True)
    monkeypatch.setenv("D2P_WRITE_RETRY_DELAY", "0.01")
    with monkeypatch.context() as patch:
        patch.setenv("D2P_PARTITION_TIME", "ingest")
        assert not pipeline.flush(batch.ref).success
    [waiting] = pipeline.buffer.recovering()
    assert str(stray) in waiting.error
    (stray / "somebody's").rmdir()
    stray.rmdir()
    deliver(pipeline, BY_INGEST, batch, monkeypatch)
    assert each_record_is_there_once(pipeline)


def test_files_are_named_in_redis_for_a_week_only_where_attempts_differed(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sealed(pipeline)
    killed(pipeline, BY_EVENT, batch, "after:announce:1")
    deliver(pipeline, BY_INGEST, batch, monkeypatch)
    assert 3600 < redis_client.ttl("batch-meta:{payments}:B1") <= 7 * 24 * 3600
    pipeline.receive([line()], "second")
    [other] = pipeline.buffer.seal([Seal("payments", "B2", "age")])
    deliver(pipeline, {}, other, monkeypatch)
    assert 0 < redis_client.ttl("batch-meta:{payments}:B2") <= 3600
