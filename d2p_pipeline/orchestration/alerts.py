"""Alerts: what somebody should look at, posted to a webhook; one message per tick, however much happened.

The sensor only reads. A webhook that does not answer harms nothing but the alert: the cursor stays where it was, and the next
tick tries again with all that has happened since. What is alerted: runs that failed, batches that went into recovery,
batches that automatic recovery has given up, and asset checks that turned red.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import dagster as dg
import msgspec
from dagster._core.event_api import RunStatusChangeRecordsFilter
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus as CheckStatus

from d2p_pipeline.buffer.protocol import Buffer
from d2p_pipeline.logs import plain
from d2p_pipeline.orchestration.failures import next_attempt
from d2p_pipeline.orchestration.sensor import parts
from d2p_pipeline.settings import Settings

SENSOR_SECONDS = 15
LOOK_BACK_SECONDS = 3600
"""How far the first tick looks back."""
RUNS_PER_TICK = 500
SHOWN = 5
ERROR_WIDTH = 300
TIMEOUT_SECONDS = 5.0

Kind = Literal["run failed", "batch in recovery", "recovery given up", "check failed"]


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something to alert to."""

    kind: Kind
    what: str
    reason: str = ""
    key: str = ""
    run_id: str = ""


class Cursor(msgspec.Struct, frozen=True):
    """What was looked at: the run storage's cursor, the newest failure of a batch (ms), and the checks that were red."""

    runs: str | None
    batches: int
    red: tuple[str, ...] = ()


@dg.sensor(
    minimum_interval_seconds=SENSOR_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Posts failed runs, batches in recovery and red checks to `alert_webhook_url`.",
)
def alerts(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    settings, buffer = parts()
    if settings.alert_webhook_url is None:
        return dg.SkipReason("no alert_webhook_url is given")
    cursor = _cursor(context.cursor, buffer)
    runs, seen = _failed_runs(context, cursor.runs)
    batches, newest = _batches(buffer, settings, cursor.batches)
    red = dict(_red_checks(context))
    events = [*runs, *batches, *(event for name, event in red.items() if name not in cursor.red)]
    if events and (refused := post(settings.alert_webhook_url.get_secret_value(), message(events))):
        context.log.warning(f"{len(events)} alerts not posted, tried again in the next tick: {refused}")
        return dg.SkipReason(f"alert_webhook_url: {refused}")
    context.update_cursor(msgspec.json.encode(Cursor(runs=seen, batches=newest, red=tuple(red))).decode())
    return dg.SkipReason(f"posted {len(events)} alerts" if events else "nothing to alert to")


def _cursor(text: str | None, buffer: Buffer) -> Cursor:
    try:
        return msgspec.json.decode(text or "", type=Cursor)
    except msgspec.DecodeError:  # the first tick, or one after an update of this software
        return Cursor(runs=None, batches=buffer.now() - LOOK_BACK_SECONDS * 1000)


def _failed_runs(context: dg.SensorEvaluationContext, cursor: str | None) -> tuple[list[Event], str]:
    after = None if cursor else time.time() - LOOK_BACK_SECONDS
    failures = RunStatusChangeRecordsFilter(event_type=dg.DagsterEventType.RUN_FAILURE, after_timestamp=after)
    found = context.instance.fetch_run_status_changes(failures, limit=RUNS_PER_TICK, cursor=cursor, ascending=True)
    events: list[Event] = []
    for record in found.records:
        entry = record.event_log_entry
        run = context.instance.get_run_by_id(entry.run_id)
        if run is None or not _is_ours(context, run):
            continue
        events.append(
            Event(
                "run failed",
                what=f"run {entry.run_id} of {run.job_name}",
                reason=(entry.get_dagster_event().message or "")[:ERROR_WIDTH],
                key=run.tags.get("d2p/key", ""),
                run_id=entry.run_id,
            )
        )
    return events, found.cursor


def _is_ours(context: dg.SensorEvaluationContext, run: dg.DagsterRun) -> bool:
    """Other code locations may share the Dagster instance."""
    here, there = context.code_location_origin, run.remote_job_origin
    return here is None or there is None or here.location_name == there.location_name


def _batches(buffer: Buffer, settings: Settings, since: int) -> tuple[list[Event], int]:
    """Batches that came into recovery after `since`, and those whose last automatic attempt has failed since."""
    events: list[Event] = []
    newest = since
    for batch in buffer.recovering():
        if batch.failed_at <= since:
            continue
        newest = max(newest, batch.failed_at)
        gave_up = batch.failures > 1 and next_attempt(batch, settings) is None
        if gave_up or batch.failures == 1:
            kind: Kind = "recovery given up" if gave_up else "batch in recovery"
            events.append(
                Event(
                    kind,
                    what=f"batch {batch.id} of key {batch.key}, {batch.records:,} records, failed {batch.failures} times",
                    reason=batch.error[:ERROR_WIDTH],
                    key=batch.key,
                )
            )
    return events, newest


def _red_checks(context: dg.SensorEvaluationContext) -> Iterator[tuple[str, Event]]:
    assert context.repository_def
    storage = context.instance.event_log_storage
    evaluated = {CheckStatus.FAILED, CheckStatus.SUCCEEDED}
    for key in context.repository_def.asset_graph.asset_check_keys:
        for result in storage.get_asset_check_execution_history(key, limit=1, status=evaluated):
            if result.status == CheckStatus.FAILED:
                name = f"{key.name} of {key.asset_key.to_user_string()}"
                yield name, Event("check failed", name, _figures(result.evaluation), run_id=result.run_id)


def _figures(evaluation: dg.AssetCheckEvaluation | None) -> str:
    if evaluation is None:
        return ""
    shown = {name: value.value for name, value in evaluation.metadata.items()}
    return f"{evaluation.description or ''} {json.dumps(shown, default=str)}".strip()[:ERROR_WIDTH]


def message(events: Sequence[Event]) -> bytes:
    """JSON: `text` for people, as Slack and those that imitate it read it; `events` with the facts, for programs."""
    lines: list[str] = []
    for kind in dict.fromkeys(event.kind for event in events):
        of_kind = [event for event in events if event.kind == kind]
        lines.append(f"*{kind}*: {len(of_kind):,}")
        lines += [f"• {event.what}: {event.reason}" if event.reason else f"• {event.what}" for event in of_kind[:SHOWN]]
        if len(of_kind) > SHOWN:
            lines.append(f"• and {len(of_kind) - SHOWN:,} more")
    counts: dict[str, int] = {}
    for event in events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    return msgspec.json.encode({"text": "\n".join(map(_shown, lines)), "counts": counts, "events": events[:100]})


def _shown(line: str) -> str:
    """What records brought can neither call people nor link: Slack takes what stands between < and > for that."""
    return plain(line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def post(url: str, body: bytes) -> str:
    """Send a message; returns why it was not taken, or nothing. The URL, which is a secret, is in no reason."""
    import httpx

    try:
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=TIMEOUT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: the webhook did not answer"
    return "" if answer.is_success else f"the webhook answered {answer.status_code}"
