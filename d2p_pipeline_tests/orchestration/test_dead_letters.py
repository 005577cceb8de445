"""Dead letters and books in Dagster: counted, replayed and discarded by jobs, checks that turn red when they should."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pytest
from redis import Redis

from d2p_pipeline import books
from d2p_pipeline.buffer.protocol import Push, Seal, Totals
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.fixtures.s3 import REGION, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import Pipeline, line


def run(pipeline: Pipeline, job: str, op: str = "", **config: Any) -> dg.ExecuteInProcessResult:
    from d2p_pipeline.definitions import defs

    run_config = {"ops": {op: {"config": config}}} if op else None
    return defs.resolve_job_def(job).execute_in_process(instance=pipeline.instance, run_config=run_config)


def checks(pipeline: Pipeline) -> dict[str, bool]:
    return {found.check_name: found.passed for found in run(pipeline, "inspect").get_asset_check_evaluations()}


def rejected(pipeline: Pipeline, redis_client: Redis) -> None:
    redis_client.rpush("data:{payments}", line(), line(time="soon"), line(time="soon"), b"no JSON")
    assert pipeline.flush().success


def counted(pipeline: Pipeline, **config: Any) -> Mapping[str, dg.MetadataValue]:
    """What the asset shows."""
    from d2p_pipeline.definitions import defs

    run_config = {"ops": {"dead_letters": {"config": config}}}
    result = defs.resolve_job_def("inspect").execute_in_process(instance=pipeline.instance, run_config=run_config)
    [materialization] = result.asset_materializations_for_node("dead_letters")
    return materialization.metadata


def rows(table: dg.MetadataValue) -> list[Mapping[str, Any]]:
    assert isinstance(table, dg.TableMetadataValue)
    assert [column.name for column in table.schema.columns] == list(table.records[0].data)
    return [record.data for record in table.records]


def test_the_asset_shows_counts_times_and_samples_by_reason(pipeline: Pipeline, redis_client: Redis) -> None:
    rejected(pipeline, redis_client)
    shown = counted(pipeline)
    assert shown["dead_letters"].value == 3
    first, second = rows(shown["reasons"])
    assert (first["key"], first["stage"], first["letters"]) == ("payments", "parse", 2)
    assert first["first"] <= first["last"]
    assert first["first"].startswith("20")
    assert second["letters"] == 1
    assert [sample["record"] for sample in rows(shown["samples"])] == [line(time="soon").decode(), "no JSON"]


def test_the_asset_counts_what_is_chosen_wherever_it_lies(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected(pipeline, redis_client)
    monkeypatch.setenv("D2P_DLQ_MAX_RECORDS", "2")
    run(pipeline, "spill_dead_letters")
    assert redis_client.llen("dlq:{payments}") == 1
    assert counted(pipeline)["dead_letters"].value == 3
    assert counted(pipeline, reason="JSON")["dead_letters"].value == 1
    assert counted(pipeline, keys=["orders"])["dead_letters"].value == 0
    assert counted(pipeline, since="2026-01-01", until="2026-01-02")["dead_letters"].value == 0
    assert counted(pipeline, since="2026-01-01")["dead_letters"].value == 3


def test_hidden_fields_stay_hidden_in_letters_wherever_they_are_shown(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_MASK_FIELDS", "user-id")
    secret = {"user-id": "secret"}
    redis_client.rpush("data:{payments}", line(time="soon", **secret), line(level=None, **secret)[:-1])
    assert pipeline.flush().success
    # And one from before the field was hidden.
    redis_client.rpush(
        "dlq:{payments}", DeadLetter(reason="r", stage="parse", received_at=0, raw=line(**secret)).to_json()
    )
    run(pipeline, "replay_dead_letters", "replay_letters", set_fields={"time": "later"})
    shown = counted(pipeline)
    assert shown["dead_letters"].value == 3
    assert "secret" not in str(shown)
    run(pipeline, "replay_dead_letters", "replay_letters", set_fields={"time": "2026-11-21T10:00:00Z"})
    assert pipeline.flush().success
    assert pipeline.rows('SELECT DISTINCT "user-id" FROM files') == [("*",)]


@pytest.mark.parametrize("config", [{"stage": "parsing"}, {"since": "yesterday"}, {"transform": "no_such_module:f"}])
def test_a_wrong_choice_fails_the_job_and_says_why(
    pipeline: Pipeline, redis_client: Redis, config: dict[str, str]
) -> None:
    rejected(pipeline, redis_client)
    with pytest.raises(dg.Failure, match=next(iter(config))):
        run(pipeline, "replay_dead_letters", "replay_letters", **config)
    assert len(pipeline.buffer.dead_letters("payments")) == 3


def test_letters_are_mended_by_the_users_function(pipeline: Pipeline, redis_client: Redis) -> None:
    redis_client.rpush("data:{payments}", b"level=info no JSON")
    assert pipeline.flush().success
    mend = "d2p_pipeline_tests.records.transforms:mended"
    run(pipeline, "replay_dead_letters", "replay_letters", transform=mend)
    assert pipeline.flush().success
    assert pipeline.messages() == ["no JSON"]


def test_the_schedule_spills_only_when_a_queue_is_too_large(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2p_pipeline.definitions import defs
    from d2p_pipeline.orchestration import sensor

    schedule = defs.resolve_schedule_def("spilling")
    rejected(pipeline, redis_client)
    with dg.build_schedule_context(instance=pipeline.instance) as context:
        assert not schedule.evaluate_tick(context).run_requests
        monkeypatch.setenv("D2P_DLQ_MAX_RECORDS", "2")
        sensor.parts.cache_clear()
        assert schedule.evaluate_tick(context).run_requests
        run(pipeline, "spill_dead_letters")
        assert not schedule.evaluate_tick(context).run_requests


@pytest.mark.usefixtures("aws_environment")
def test_letters_are_spilled_to_the_bucket_and_replayed_from_there(
    pipeline: Pipeline, redis_client: Redis, s3_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_service.bucket()
    target = {"WRITER_TYPE": "aws-s3", "S3_BUCKET_NAME": bucket, "S3_ENDPOINT": s3_service.url, "S3_REGION": REGION}
    for name, value in {**target, "DLQ_MAX_RECORDS": "1"}.items():
        monkeypatch.setenv(f"D2P_{name}", value)
    rejected(pipeline, redis_client)
    run(pipeline, "spill_dead_letters")
    assert len(spilled := [key for key in s3_service.keys(bucket) if key.endswith(".zst")]) == 2
    assert all(key.startswith("_dead_letters/capability=payments/") for key in spilled)
    assert counted(pipeline)["dead_letters"].value == 3
    run(pipeline, "replay_dead_letters", "replay_letters", set_fields={"time": "2026-11-21T10:00:00Z"})
    run(pipeline, "discard_dead_letters", "discard_letters")
    assert not [key for key in s3_service.keys(bucket) if key.endswith(".zst")]
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=4, rows=1, dead_letters=0, discarded=1)}


def test_letters_are_replayed_and_discarded_by_jobs(pipeline: Pipeline, redis_client: Redis) -> None:
    rejected(pipeline, redis_client)
    fix = {"time": "2026-11-21T10:00:00Z"}
    run(pipeline, "replay_dead_letters", "replay_letters", set_fields=fix, dry_run=True)
    assert dict(pipeline.buffer.dead_letter_keys()) == {"payments": 3}
    run(pipeline, "replay_dead_letters", "replay_letters", set_fields=fix)
    assert dict(pipeline.buffer.dead_letter_keys()) == {"payments": 1}
    run(pipeline, "discard_dead_letters", "discard_letters", reason="JSON")
    assert pipeline.flush().success
    assert len(pipeline.rows()) == 3
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=4, rows=3, dead_letters=0, discarded=1)}
    assert checks(pipeline) == {"books_balance": True, "oldest_record": True, "reject_share": False}


def test_the_books_balance_in_every_state(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.receive([line("a"), line("b")], "one")
    [batch] = pipeline.buffer.seal([Seal("a", "B1", "age")])
    claim = pipeline.buffer.claim(batch.ref, "run", 60_000)
    assert claim
    pipeline.buffer.fail(claim, "disk full")
    pipeline.receive([line("a")], "two")
    pipeline.buffer.seal([Seal("a", "B2", "age")])
    pipeline.receive([line("a")], "three")
    redis_client.rpush("data:{a}", line("a"))
    assert books.differences(pipeline.buffer, books.read(pipeline.buffer)) == {}
    assert checks(pipeline)["books_balance"]


def test_a_lost_record_turns_the_check_red(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.push([Push("payments", "1", 60, line(), 5, 100)])
    redis_client.hincrby("totals:{payments}", "accepted", 1)
    assert not checks(pipeline)["books_balance"]


def test_a_record_that_waits_too_long_turns_the_check_red(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.receive([line()])
    assert checks(pipeline)["oldest_record"]
    redis_client.hset("stats:{payments}", "first", pipeline.buffer.now() - 3_600_000)
    assert not checks(pipeline)["oldest_record"]


def test_too_many_rejected_records_turn_the_check_red_until_the_window_is_over(
    pipeline: Pipeline, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis_client.rpush("data:{payments}", *[line()] * 19, b"no JSON")
    assert pipeline.flush().success
    assert checks(pipeline)["reject_share"]  # one of twenty is the limit
    redis_client.rpush("data:{payments}", *[line()] * 18, b"no JSON", b"no JSON")
    assert pipeline.flush().success
    assert not checks(pipeline)["reject_share"]
    hour_ago = pipeline.buffer.now() - 3_700_000
    redis_client.set("looks:{payments}", f"[[{hour_ago},37,3]]")
    assert checks(pipeline)["reject_share"]


def test_a_key_with_many_rejects_turns_the_check_red_beside_a_large_one(
    pipeline: Pipeline, redis_client: Redis
) -> None:
    redis_client.hset("totals:{large}", mapping={"accepted": 100_000, "rows": 100_000})
    redis_client.hset("totals:{small}", mapping={"accepted": 99, "rows": 79, "dead_letters": 20, "rejected": 20})
    assert checks(pipeline)["reject_share"]  # too few to judge it by itself
    redis_client.hset("totals:{small}", mapping={"accepted": 100, "rows": 80})
    assert not checks(pipeline)["reject_share"]
