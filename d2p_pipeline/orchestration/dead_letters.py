"""Dead letters in the UI: an asset that counts them, jobs that replay, discard and spill them.

The work is in `d2p_pipeline.dead_letters`; here are its typed configuration and what the catalogue shows.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import Field

from d2p_pipeline import wiring
from d2p_pipeline.dead_letters import DeadLetters, Group, MendError, Outcome, Selection, mending
from d2p_pipeline.logs import plain
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.sensor import parts
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.rules import Rules

REASONS_SHOWN = 50
SAMPLES_SHOWN = 10
_SAMPLE_WIDTH = 500

Groups = Mapping[tuple[str, str, str], Group]
"""Letters by key, stage and reason."""


class SelectionConfig(dg.Config):
    """Which dead letters; without anything, all."""

    keys: list[str] = Field(default=[], description="Of these keys; none: of all.")
    reason: str = Field(default="", description="Whose reason contains this text.")
    stage: str = Field(default="", description="Rejected at this stage: receive, parse or validate.")
    since: str = Field(
        default="", description="Received since then: 2026-11-21, or 2026-11-21T10:30:00+01:00; without offset UTC."
    )
    until: str = Field(default="", description="Received until then.")

    def selection(self) -> Selection:
        try:
            return Selection.of(self.keys, self.reason, self.stage, self.since, self.until)
        except ValueError as error:
            raise dg.Failure(str(error), allow_retries=False) from error


class DiscardConfig(SelectionConfig):
    """Which dead letters to discard."""

    dry_run: bool = Field(default=False, description="Only say what would happen.")


class ReplayConfig(DiscardConfig):
    """Which dead letters to replay, and what to mend before."""

    set_fields: dict[str, str] = Field(default={}, description="Fields set in every record first.")
    transform: str = Field(
        default="", description="module:function, given each letter after that; returns the record to send, or None."
    )


def open_letters(delivery_parts: DeliveryResource, parquet: ParquetIOManager) -> DeadLetters:
    """The dead letters, with the files in the store that the Parquet files go to."""
    return wiring.dead_letters(delivery_parts.settings, delivery_parts.buffer, lambda: parquet.store)


@dg.asset(
    group_name="delivery",
    kinds={"redis"},
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=1), warn_window=timedelta(minutes=30)),
    description="Rejected records that wait for somebody, in Redis and in files: counts by key, stage and reason, and samples.",
)
def dead_letters(
    config: SelectionConfig, delivery_parts: DeliveryResource, parquet: dg.ResourceParam[ParquetIOManager]
) -> dg.MaterializeResult:
    """Count the letters. Hidden fields were hidden before they were stored; those hidden since are hidden here."""
    groups = open_letters(delivery_parts, parquet).count(config.selection())
    return dg.MaterializeResult(
        metadata={
            "dead_letters": sum(group.letters for group in groups.values()),
            "keys": len({key for key, _, _ in groups}),
            "reasons": _reasons(groups),
            "samples": _samples(groups, wiring.rules(delivery_parts.settings)),
        }
    )


def _reasons(groups: Groups) -> dg.TableMetadataValue:
    return _table(
        {
            "key": key,
            "stage": stage,
            "reason": reason,
            "letters": group.letters,
            "first": _moment(group.first),
            "last": _moment(group.last),
        }
        for (key, stage, reason), group in list(groups.items())[:REASONS_SHOWN]
    )


def _samples(groups: Groups, rules: Rules) -> dg.TableMetadataValue:
    """The oldest letter of each of the largest groups."""
    return _table(
        {
            "key": key,
            "reason": group.sample.reason,
            "rejected before": "; ".join(group.sample.history),
            "received": _moment(group.sample.received_at),
            "record": conceal(group.sample.raw, rules)[:_SAMPLE_WIDTH].decode(errors="replace"),
        }
        for (key, _, _), group in list(groups.items())[:SAMPLES_SHOWN]
        if group.sample
    )


def _table(rows: Iterable[dict[str, str | int]]) -> dg.TableMetadataValue:
    records = [dg.TableRecord(row) for row in rows]
    columns = records[0].data if records else {"key": ""}
    return dg.MetadataValue.table(
        records,
        schema=dg.TableSchema(
            [dg.TableColumn(name, "int" if isinstance(value, int) else "string") for name, value in columns.items()]
        ),
    )


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


@dg.op
def replay_letters(
    context: dg.OpExecutionContext,
    config: ReplayConfig,
    delivery_parts: DeliveryResource,
    parquet: dg.ResourceParam[ParquetIOManager],
) -> None:
    """Send the records again; those rejected again stay, with their history."""
    letters = open_letters(delivery_parts, parquet)
    canonical = wiring.canonical(delivery_parts.settings)
    try:
        mend = mending(config.set_fields, config.transform)
        outcome = letters.replay(canonical, config.selection(), mend, dry_run=config.dry_run)
    except MendError as error:
        raise dg.Failure(f"transform: {error}", allow_retries=False) from error
    _tell(context, outcome, config.dry_run)


@dg.op
def discard_letters(
    context: dg.OpExecutionContext,
    config: DiscardConfig,
    delivery_parts: DeliveryResource,
    parquet: dg.ResourceParam[ParquetIOManager],
) -> None:
    """Throw the letters away for good."""
    outcome = open_letters(delivery_parts, parquet).discard(config.selection(), dry_run=config.dry_run)
    _tell(context, outcome, config.dry_run)


@dg.op
def spill_letters(
    context: dg.OpExecutionContext, delivery_parts: DeliveryResource, parquet: dg.ResourceParam[ParquetIOManager]
) -> None:
    """Move the oldest letters of oversized queues to files."""
    moved = open_letters(delivery_parts, parquet).spill(wiring.spill_limits(delivery_parts.settings))
    context.add_output_metadata({"letters": sum(moved.values()), "keys": len(moved)})
    for key, count in moved.items():
        context.log.info(plain(f"key={key} {count} dead letters moved to files"))


def _tell(context: dg.OpExecutionContext, outcome: Outcome, dry_run: bool) -> None:
    figures = {
        "selected": outcome.selected,
        "replayed": outcome.replayed,
        "discarded": outcome.discarded,
        "left": outcome.left,
        "rejected_again": outcome.rejected_again.total(),
    }
    context.add_output_metadata({**figures, "dry_run": dry_run})
    context.log.info(f"{'would be: ' if dry_run else ''}{figures}")
    for reason, count in outcome.rejected_again.most_common(10):
        context.log.warning(plain(f"{count} rejected again: {reason}"))


@dg.job(
    executor_def=dg.in_process_executor,
    description="Sends dead letters again, on the way every record takes. Choose them and what to set in them in the launchpad.",
)
def replay_dead_letters() -> None:
    replay_letters()


@dg.job(
    executor_def=dg.in_process_executor,
    description="Throws dead letters away for good; they stay counted as discarded. Choose them in the launchpad.",
)
def discard_dead_letters() -> None:
    discard_letters()


@dg.job(
    executor_def=dg.in_process_executor,
    description="Moves the oldest letters of queues beyond dlq_max_records or dlq_max_bytes to files under _dead_letters/.",
)
def spill_dead_letters() -> None:
    spill_letters()


@dg.schedule(
    job=spill_dead_letters,
    cron_schedule="*/15 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Keeps the dead letters in Redis within dlq_max_records and dlq_max_bytes; ends replays that died.",
)
def spilling() -> dg.RunRequest | dg.SkipReason:
    settings, buffer = parts()
    if settings.redis_skip_flush:
        return dg.SkipReason("this instance only receives (redis_skip_flush)")
    keys = wiring.dead_letters(settings, buffer).to_spill(wiring.spill_limits(settings))
    return dg.RunRequest() if keys else dg.SkipReason("no queue of dead letters is too large")
