"""The flush job: batches to files and dead letters, exactly once, whatever the batches look like."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
from redis import Redis

from d2p_pipeline import books
from d2p_pipeline.buffer.protocol import BatchRef, Seal, Totals
from d2p_pipeline.ingest.generator import generate
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.keys import partition_of
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.pipeline import Pipeline, line

STRANGE_KEYS = ["a/b", "..", "two words", "a:b", "100%", "日本 🎉", "x" * 500, "a,b", "new\nline", "{}", "a..."]


def materializations(pipeline: Pipeline) -> dict[str, dg.AssetMaterialization]:
    records = pipeline.instance.fetch_materializations(parquet_files.key, limit=100).records
    found = [record.event_log_entry.asset_materialization for record in records]
    return {event.partition: event for event in reversed(found) if event and event.partition}


def test_everything_that_waits_is_flushed_without_configuration(pipeline: Pipeline) -> None:
    pipeline.receive(
        [line("payments", "1"), line("orders", "2"), line("payments", "3", time="2026-11-21T11:30:00+01:00")]
    )
    assert pipeline.flush().success
    assert pipeline.rows(
        'SELECT message, "business-capability", capability, year, month, day, hour FROM files ORDER BY 1'
    ) == [
        ("1", "payments", "payments", 2026, 11, 21, 10),
        ("2", "orders", "orders", 2026, 11, 21, 10),
        ("3", "payments", "payments", 2026, 11, 21, 10),
    ]
    assert list(pipeline.buffer.open_batches()) == []
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(2, 2, 0), "orders": Totals(1, 1, 0)}


def test_files_lie_where_the_event_happened(pipeline: Pipeline) -> None:
    pipeline.receive([line(time="2026-01-02T03:04:05Z"), line(time="2025-12-31T23:59:59-05:00")])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    assert pipeline.flush(batch.ref).success
    assert pipeline.files() == [
        "capability=payments/year=2026/month=01/day=01/hour=04/B1-0.parquet",
        "capability=payments/year=2026/month=01/day=02/hour=03/B1-0.parquet",
    ]


def test_only_the_keys_asked_for_are_flushed(pipeline: Pipeline) -> None:
    pipeline.receive([line("payments", "1"), line("orders", "2")])
    assert pipeline.flush(keys=["orders", "empty"]).success
    assert pipeline.messages() == ["2"]
    assert [state.key for state in pipeline.buffer.waiting()] == ["payments"]


def test_nothing_to_do_is_no_failure(pipeline: Pipeline) -> None:
    assert pipeline.flush().success
    assert pipeline.flush(BatchRef("k", "delivered long ago")).success
    assert pipeline.files() == []


def test_a_delivered_batch_delivered_again_changes_nothing(pipeline: Pipeline) -> None:
    pipeline.receive([line()])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    assert pipeline.flush(batch.ref).success
    [file] = pipeline.files()
    before = (pipeline.root / file).stat().st_mtime_ns
    assert pipeline.flush(batch.ref).success
    assert pipeline.files() == [file]
    assert (pipeline.root / file).stat().st_mtime_ns == before


def test_a_batch_in_another_runs_hands_is_left_to_it(pipeline: Pipeline) -> None:
    pipeline.receive([line()])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    claim = pipeline.buffer.claim(batch.ref, "another run", 60_000)
    assert claim
    assert pipeline.flush(batch.ref).success
    assert pipeline.files() == []
    pipeline.buffer.release(claim)
    assert pipeline.flush(batch.ref).success
    assert len(pipeline.files()) == 1


@pytest.mark.parametrize("key", STRANGE_KEYS)
def test_any_key_is_delivered_under_the_root_and_read_back(pipeline: Pipeline, key: str) -> None:
    pipeline.receive([line(key, "mine")])
    assert pipeline.flush().success
    assert pipeline.rows('SELECT "business-capability", message FROM files') == [(key, "mine")]
    assert [path.name for path in pipeline.root.parent.iterdir()] == ["files"]
    assert list(materializations(pipeline)) == [partition_of(key)]


def test_what_a_foreign_producer_pushed_is_normalized_and_its_bad_lines_are_dead_letters(
    pipeline: Pipeline, redis_client: Redis
) -> None:
    alias = (
        b'{"timestamp":1795224407,"LVL":"warn","msg":"alias","business_capability":"payments","business_domain":"d",'
    )
    alias += b'"business_service":"s","application_service":"a","http_response":200,"shoe-size":42.5}'
    two_lines = line(message="x") + b"\r\n" + line(message="y")
    undecodable = b"\x28\xb5\x2f\xfd broken frame"
    redis_client.rpush(
        "data:{payments}", line(message="plain"), alias, b'{"cut', line(time="soon"), two_lines, undecodable
    )
    assert pipeline.flush().success
    assert pipeline.messages() == ["alias", "plain", "x", "y"]
    [(time, response, extra)] = pipeline.rows(
        """SELECT epoch_ms(time), "http-response", "extra-fields" FROM files WHERE message = 'alias'"""
    )
    assert (time, response, extra) == (1_795_224_407_000, "200", {"shoe-size": "42.5"})
    letters = [DeadLetter.from_json(letter) for letter in pipeline.buffer.dead_letters("payments")]
    assert {letter.raw for letter in letters} == {b'{"cut', line(time="soon"), undecodable}
    assert all(letter.batch and letter.reason and letter.stage == "parse" for letter in letters)
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=7, rows=4, dead_letters=3)}


def test_a_large_batch_is_cut_into_units_and_delivered_in_order(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "100000")
    for number in range(10):
        lines = [line(message=f"{number:02} {index:03}", **{"stack-trace": "x" * 500}) for index in range(100)]
        pipeline.receive(lines, name=f"push {number}")
    result = pipeline.flush()
    assert result.success
    assert len(pipeline.files()) == 10
    ordered = pipeline.rows(
        "SELECT message FROM read_parquet($root)".replace("$root", f"'{pipeline.root}/**/*.parquet'")
    )
    assert [message for (message,) in ordered] == [
        f"{number:02} {index:03}" for number in range(10) for index in range(100)
    ]


def test_small_batches_of_many_keys_share_a_unit_and_keep_their_own_files(pipeline: Pipeline) -> None:
    pipeline.receive([line(f"key {number}", str(number)) for number in range(30)])
    result = pipeline.flush()
    assert result.success
    assert len([event for event in result.all_events if event.is_step_success]) == 7
    assert len(pipeline.files()) == 30
    assert len(materializations(pipeline)) == 30
    assert set(pipeline.instance.get_dynamic_partitions("keys")) == {f"key {number}" for number in range(30)}


def test_the_materialization_tells_what_was_written(pipeline: Pipeline) -> None:
    pipeline.receive(list(generate(200, keys=1, seed=3)))
    [state] = pipeline.buffer.waiting()
    assert pipeline.flush(keys=[state.key]).success
    [event] = materializations(pipeline).values()
    figures = {name: value.value for name, value in event.metadata.items()}
    assert figures["dagster/row_count"] == 200
    assert figures["files"] == len(pipeline.files())
    assert figures["bytes"] == sum((pipeline.root / file).stat().st_size for file in pipeline.files())
    assert figures["dead_letters"] == 0
    assert figures["sealed_by"] == "request"
    assert isinstance(figures["lag_seconds"], float)
    assert "| --- |" in str(figures["preview"])


def test_a_target_that_cannot_be_written_keeps_the_batch_until_it_can(pipeline: Pipeline) -> None:
    pipeline.root.write_text("a file where the directory should be")
    pipeline.receive([line(), line(time="2026-11-22T00:00:00Z")])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    assert not pipeline.flush(batch.ref).success
    [waiting] = pipeline.buffer.recovering()
    assert (waiting.ref, waiting.failures) == (batch.ref, 1)
    assert "FileExistsError" in waiting.error or "NotADirectoryError" in waiting.error
    assert str(pipeline.root) in waiting.error
    assert not pipeline.buffer.is_claimed(batch.ref)
    assert pipeline.instance.get_dynamic_partitions("recovery") == [batch.id]
    pipeline.root.unlink()
    assert pipeline.flush(batch.ref).success
    assert len(pipeline.rows()) == 2


def test_one_unit_that_fails_does_not_hold_up_the_others(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "1")
    pipeline.receive([line("blocked"), line("open")])
    pipeline.root.mkdir()
    (pipeline.root / "capability=blocked").write_text("in the way")
    result = pipeline.flush()
    assert not result.success
    assert [key for (key,) in pipeline.rows('SELECT "business-capability" FROM files')] == ["open"]
    assert [batch.key for batch in pipeline.buffer.recovering()] == ["blocked"]
    assert list(pipeline.buffer.open_batches()) == []


def full_again(pipeline: Pipeline) -> BatchRef:
    """A sealed batch of 1 record of `payments`, and 100 more in the buffer, which makes it due."""
    pipeline.receive([line(message="sealed")], name="first")
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    pipeline.receive([line(message=str(number)) for number in range(100)], name="second")
    return batch.ref


def test_a_run_goes_on_with_what_became_due_of_its_keys(pipeline: Pipeline) -> None:
    ref = full_again(pipeline)
    pipeline.receive([line("other", str(number)) for number in range(100)])
    result = pipeline.flush(ref)
    assert result.success
    assert len(pipeline.messages()) == 101
    assert [state.key for state in pipeline.buffer.waiting()] == ["other"]
    run = pipeline.instance.get_run_by_id(result.run_id)
    assert run
    assert run.tags["d2p/went_on"] == "1 batches"
    assert materializations(pipeline)["payments"].metadata["dagster/row_count"].value == 101
    [due] = pipeline.buffer.due(0, 10)
    assert due.key == "other"


@pytest.mark.parametrize(("setting", "value"), [("RUN_SECONDS", "0"), ("RUN_BYTES", "1")])
def test_a_run_goes_on_only_within_its_bounds(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setenv(f"D2P_{setting}", value)
    assert pipeline.flush(full_again(pipeline)).success
    assert pipeline.messages() == ["sealed"]
    assert [state.key for state in pipeline.buffer.due(0, 10)] == ["payments"]


def test_a_run_that_lingers_delivers_what_becomes_due_while_it_waits(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RUN_LINGER", "3")
    pipeline.receive([line(message="sealed")], name="first")
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])

    def send_when_the_first_is_delivered() -> None:
        while not pipeline.files():
            time.sleep(0.05)
        pipeline.receive([line(message=str(number)) for number in range(100)], name="second")

    with ThreadPoolExecutor() as pool:
        sent = pool.submit(send_when_the_first_is_delivered)
        assert pipeline.flush(batch.ref).success
        sent.result()
    assert len(pipeline.messages()) == 101


def test_what_a_run_goes_on_with_and_cannot_write_waits_in_recovery(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "1")
    ref = full_again(pipeline)
    pipeline.receive([line("blocked")], name="first")
    [blocked] = pipeline.buffer.seal([Seal("blocked", "B2", "age")])
    assert pipeline.flush(blocked.ref).success
    pipeline.receive([line("blocked", str(number), time="2026-11-22T00:00:00Z") for number in range(100)])
    (pipeline.root / "capability=blocked" / "year=2026" / "month=11" / "day=22").write_text("in the way")
    pipeline.receive([line("blocked", "sealed")], name="third")
    assert not pipeline.flush(ref, blocked.ref).success
    assert [batch.key for batch in pipeline.buffer.recovering()] == ["blocked"]
    assert len(pipeline.rows("SELECT * FROM files WHERE capability = 'payments'")) == 101
    assert materializations(pipeline)["payments"].metadata["dagster/row_count"].value == 101


def test_units_prepared_ahead_do_not_hide_a_failure_or_change_the_order(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_UNIT_BYTES", "1")
    monkeypatch.setenv("D2P_UNIT_JOBS", "4")
    pipeline.receive([line(f"key {number:02}") for number in range(12)])
    pipeline.root.mkdir()
    (pipeline.root / "capability=key 03").write_text("in the way")
    result = pipeline.flush()
    assert not result.success
    assert [batch.key for batch in pipeline.buffer.recovering()] == ["key 03"]
    assert len(pipeline.files()) == 11
    read = [
        event.step_key for event in result.all_events if event.is_step_start and "read_records" in str(event.step_key)
    ]
    assert read == [f"read_records[{number:05}]" for number in range(12)]


def test_rejected_records_are_counted_and_not_kept_where_dead_letters_are_switched_off(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("D2P_USE_DLQ", "false")
    redis_client.rpush("data:{payments}", b"bad", line())
    assert pipeline.flush().success
    [logged] = [record.getMessage() for record in caplog.records if "not kept" in record.getMessage()][-1:]
    assert logged.startswith("key=payments 1 records rejected and not kept (use_dlq = false): invalid JSON")
    assert books.differences(pipeline.buffer, books.read(pipeline.buffer)) == {}
    assert list(pipeline.buffer.dead_letter_keys()) == []
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(2, 1, 1)}


def test_a_downstream_asset_receives_a_keys_files(pipeline: Pipeline, tmp_path: Path) -> None:
    import polars as pl

    from d2p_pipeline.definitions import defs

    pipeline.receive([line("payments", "1"), line("payments", "2"), line("orders", "3")])
    assert pipeline.flush().success
    seen: list[int] = []

    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="keys"))
    def rows_per_key(parquet_files: pl.LazyFrame) -> None:
        seen.append(parquet_files.select(pl.len()).collect().item())

    downstream = dg.Definitions.merge(defs, dg.Definitions(assets=[rows_per_key]))
    job = downstream.resolve_implicit_global_asset_job_def()
    assert job.execute_in_process(
        instance=pipeline.instance, partition_key="payments", asset_selection=[dg.AssetKey("rows_per_key")]
    ).success
    assert seen == [2]


def test_a_run_that_is_terminated_within_a_step_ends_and_gives_its_batches_back(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def interrupted(_: DeliveryResource, text: object) -> None:
        asked.append(text)
        signal.raise_signal(signal.SIGINT)  # what Dagster sends a run's process to terminate it

    pipeline.receive([line("payments", "1")])
    with monkeypatch.context() as patch:
        patch.setattr(DeliveryResource, "check", interrupted)
        assert not pipeline.flush().success
    assert len(asked) == 1
    [batch] = pipeline.buffer.open_batches()
    assert not pipeline.buffer.is_claimed(batch.ref)
    assert pipeline.flush(batch.ref).success
    assert pipeline.messages() == ["1"]
