"""Alerts, received by a real HTTP server: one message per tick with all that happened, none twice, none lost."""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test
from redis import Redis

from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline.orchestration import sensor
from d2p_pipeline.orchestration.alerts import Event, alerts, message
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.webhook import Webhook


@pytest.fixture
def webhook(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with Webhook() as found:
        monkeypatch.setenv("D2P_ALERT_WEBHOOK_URL", found.url)
        sensor.parts.cache_clear()
        yield found


class Ticks:
    """The sensor with its cursor, as the daemon keeps it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._cursor: str | None = None

    def tick(self) -> str:
        from d2p_pipeline.definitions import defs

        context = dg.build_sensor_context(
            instance=self._pipeline.instance, cursor=self._cursor, repository_def=defs.get_repository_def()
        )
        data = alerts.evaluate_tick(context)
        self._cursor = data.cursor
        return data.skip_message or ""


def break_one(pipeline: Pipeline, key: str, reason: str = "no space left") -> None:
    pipeline.receive([line(key)], name=key)
    [batch] = pipeline.buffer.seal([Seal(key, f"B-{key}", "age")])
    fail_again(pipeline, key, reason)
    assert batch


def fail_again(pipeline: Pipeline, key: str, reason: str = "no space left") -> None:
    from d2p_pipeline.buffer.protocol import BatchRef

    claim = pipeline.buffer.claim(BatchRef(key, f"B-{key}"), f"run {pipeline.buffer.now()}", 60_000)
    assert claim
    assert pipeline.buffer.fail(claim, reason)


def kinds(messages: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [sent["counts"] for sent in messages]


def test_a_failed_delivery_is_posted_once_with_run_batch_and_reason(pipeline: Pipeline, webhook: Webhook) -> None:
    ticks = Ticks(pipeline)
    assert ticks.tick() == "nothing to alert to"
    pipeline.root.mkdir()
    (pipeline.root / "capability=payments").write_text("in the way")
    pipeline.receive([line("payments")])
    failed = pipeline.flush()
    ticks.tick()
    [sent] = webhook.take()
    assert sent["counts"] == {"run failed": 1, "batch in recovery": 1}
    run, batch = sent["events"]
    assert run["run_id"] == failed.run_id
    assert (batch["key"], "FileExistsError" in batch["reason"]) == ("payments", True)
    assert failed.run_id in sent["text"]
    assert "of key payments, 1 records, failed 1 times" in sent["text"]
    ticks.tick()
    assert webhook.take() == []


def test_what_happens_between_two_ticks_is_one_message(pipeline: Pipeline, webhook: Webhook) -> None:
    ticks = Ticks(pipeline)
    for number in range(30):
        break_one(pipeline, f"k{number}")
        pipeline.instance.report_run_failed(create_run_for_test(pipeline.instance, job_name="flush"))
    ticks.tick()
    [sent] = webhook.take()
    assert sent["counts"] == {"run failed": 30, "batch in recovery": 30}
    assert len(sent["events"]) == 60
    assert sent["text"].count("\n") < 20


@pytest.mark.parametrize("status", [500, 404])
def test_a_webhook_that_refuses_gets_everything_when_it_is_back(
    pipeline: Pipeline, webhook: Webhook, status: int
) -> None:
    ticks = Ticks(pipeline)
    ticks.tick()
    webhook.status = status
    break_one(pipeline, "a")
    said = ticks.tick()
    assert f"the webhook answered {status}" in said
    break_one(pipeline, "b")
    webhook.status = 200
    ticks.tick()
    assert kinds(webhook.take()) == [{"batch in recovery": 2}]


def test_a_webhook_that_is_gone_fails_no_tick_and_its_url_is_said_nowhere(pipeline: Pipeline, webhook: Webhook) -> None:
    ticks = Ticks(pipeline)
    webhook.close()
    break_one(pipeline, "a")
    said = ticks.tick()
    assert "did not answer" in said
    assert "a-secret" not in said


def test_automatic_recovery_that_gives_up_says_so(
    pipeline: Pipeline, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_RECOVERY_ATTEMPTS", "2")
    sensor.parts.cache_clear()
    ticks = Ticks(pipeline)
    break_one(pipeline, "a")
    for _ in range(2):
        ticks.tick()
        fail_again(pipeline, "a")
    ticks.tick()
    assert kinds(webhook.take()) == [{"batch in recovery": 1}, {"recovery given up": 1}]


def test_a_check_that_turns_red_is_posted_once_until_it_was_green(
    pipeline: Pipeline, webhook: Webhook, redis_client: Redis
) -> None:
    from d2p_pipeline.definitions import defs

    ticks = Ticks(pipeline)
    pipeline.receive([line("a")])
    assert pipeline.flush().success

    def check(lost: int) -> None:
        redis_client.hincrby("totals:{a}", "accepted", lost)
        assert defs.resolve_job_def("inspect").execute_in_process(instance=pipeline.instance).success
        ticks.tick()

    check(0)
    assert webhook.take() == []
    check(3)
    [sent] = webhook.take()
    assert sent["counts"] == {"check failed": 1}
    assert sent["text"].startswith("*check failed*: 1\n• books_balance of parquet_files: ")
    check(0)
    assert webhook.take() == []
    check(-3)
    check(3)
    assert kinds(webhook.take()) == [{"check failed": 1}]


def test_without_a_webhook_nothing_is_done(pipeline: Pipeline) -> None:
    assert Ticks(pipeline).tick() == "no alert_webhook_url is given"


def test_a_message_is_what_slack_takes() -> None:
    sent = json.loads(message([Event("run failed", "run 1 of flush", "disk full")]))
    assert sent["text"] == "*run failed*: 1\n• run 1 of flush: disk full"
