"""Dead letters and books in Dagster: counted, replayed and discarded by jobs, checks that turn red when they should."""

from typing import Any

import dagster as dg
from redis import Redis

from d2p_pipeline.books import differences, read
from d2p_pipeline.buffer.protocol import Push, Seal, Totals
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


def test_the_asset_counts_letters_by_reason(pipeline: Pipeline, redis_client: Redis) -> None:
    rejected(pipeline, redis_client)
    [materialization] = run(pipeline, "inspect").asset_materializations_for_node("dead_letters")
    assert materialization.metadata["dead_letters"].value == 3
    table = materialization.metadata["reasons"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = [record.data for record in table.records]
    assert [(row["key"], row["stage"], row["letters"]) for row in rows] == [
        ("payments", "parse", 2),
        ("payments", "parse", 1),
    ]
    assert "no JSON" in str(materialization.metadata["samples"].value)


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
    assert checks(pipeline) == {"books_balance": True, "oldest_record": True}


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
    assert differences(pipeline.buffer, read(pipeline.buffer)) == {}
    assert checks(pipeline)["books_balance"]


def test_a_lost_record_turns_the_check_red(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.push([Push("payments", "1", 60, line(), 5, 100)])
    redis_client.hincrby("totals:{payments}", "accepted", 1)
    assert differences(pipeline.buffer, read(pipeline.buffer)) == {"payments": 1}
    assert not checks(pipeline)["books_balance"]


def test_a_record_that_waits_too_long_turns_the_check_red(pipeline: Pipeline, redis_client: Redis) -> None:
    pipeline.receive([line()])
    assert checks(pipeline)["oldest_record"]
    redis_client.hset("stats:{payments}", "first", pipeline.buffer.now() - 3_600_000)
    assert not checks(pipeline)["oldest_record"]
