"""Housekeeping: Dagster keeps every run for ever, and with SQLite a file for each; this job deletes old ones, hourly.

Kept are failed runs for longer than successful ones, the run of every key's newest delivery and of every check's newest
result, so that the catalogue goes on showing them. Ticks are deleted by Dagster itself, by `retention` in dagster.yaml.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import dagster as dg
from dagster import DagsterEventType as EventType
from dagster import DagsterRunStatus
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage
from sqlalchemy import func, select

from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.settings import load

AT_ONCE = 20_000
"""Runs deleted by one run of the job at most."""
_PAGE = 500

_ENDED_WELL = [DagsterRunStatus.SUCCESS, DagsterRunStatus.CANCELED]


@dataclass(frozen=True)
class Pruned:
    """How many runs were deleted, and how many old ones stay because the catalogue shows them."""

    deleted: int
    kept: int


def prune(
    instance: dg.DagsterInstance,
    shown: set[str],
    *,
    before: datetime,
    failed_before: datetime,
    most: int,
) -> Pruned:
    """Delete runs that ended well before a time, or are not among the newest `most`, and failed ones before another time.

    Runs in `shown` stay.
    """
    old = set(instance.get_run_ids(dg.RunsFilter(statuses=_ENDED_WELL, updated_before=before)))
    newest = instance.get_run_ids(dg.RunsFilter(statuses=_ENDED_WELL), limit=most)
    if len(newest) == most:
        old.update(instance.get_run_ids(dg.RunsFilter(statuses=_ENDED_WELL), cursor=newest[-1]))
    failed = dg.RunsFilter(statuses=[DagsterRunStatus.FAILURE], updated_before=failed_before)
    old.update(instance.get_run_ids(failed))
    deletable = list(islice((run_id for run_id in old if run_id not in shown), AT_ONCE))
    for run_id in deletable:
        delete(instance, run_id)
    return Pruned(len(deletable), len(old & shown))


def delete(instance: dg.DagsterInstance, run_id: str) -> None:
    """Delete a run with its events, results of checks, and files, of which Dagster itself leaves the largest."""
    instance.delete_run(run_id)
    storage = instance.event_log_storage
    if isinstance(storage, SqlEventLogStorage):
        with storage.index_connection() as connection:
            connection.execute(AssetCheckExecutionsTable.delete().where(AssetCheckExecutionsTable.c.run_id == run_id))
    if isinstance(storage, SqliteEventLogStorage):
        shard = Path(storage.path_for_shard(run_id))
        for suffix in ("", "-wal", "-shm"):
            shard.with_name(shard.name + suffix).unlink(missing_ok=True)
    with suppress(NotImplementedError):
        instance.compute_log_manager.delete_logs(prefix=[run_id])


def shown_runs(instance: dg.DagsterInstance) -> set[str]:
    """Runs of every key's newest delivery, of every asset's newest materialization, and of every check's newest result."""
    storage = instance.event_log_storage
    ids = iter(storage.get_latest_storage_id_by_partition(parquet_files.key, EventType.ASSET_MATERIALIZATION).values())
    found: set[str] = set()
    while page := list(islice(ids, _PAGE)):
        records = dg.AssetRecordsFilter(asset_key=parquet_files.key, storage_ids=page)
        found.update(record.run_id for record in instance.fetch_materializations(records, limit=_PAGE).records)
    newest = (instance.get_latest_materialization_event(asset_key) for asset_key in instance.get_asset_keys())
    found.update(event.run_id for event in newest if event)
    if isinstance(storage, SqlEventLogStorage):
        with storage.index_connection() as connection:
            found.update(run_id for (run_id,) in connection.execute(_NEWEST_RESULTS))
    return found


_results = AssetCheckExecutionsTable.c
_NEWEST_RESULTS = select(_results.run_id).where(
    _results.id.in_(
        select(func.max(_results.id))
        .where(_results.execution_status != AssetCheckExecutionRecordStatus.PLANNED.value)
        .group_by(_results.asset_key, _results.check_name)
    )
)


@dg.op
def delete_old_runs(context: dg.OpExecutionContext) -> None:
    """Delete what `keep_runs_days`, `keep_runs` and `keep_failed_runs_days` say."""
    settings, now = load(), datetime.now(UTC)
    pruned = prune(
        context.instance,
        shown_runs(context.instance),
        before=now - timedelta(days=settings.keep_runs_days),
        failed_before=now - timedelta(days=settings.keep_failed_runs_days),
        most=settings.keep_runs,
    )
    context.add_output_metadata({"deleted": pruned.deleted, "kept_because_shown": pruned.kept})
    context.log.info(f"deleted {pruned.deleted} runs, kept {pruned.kept} old ones that the catalogue shows")


@dg.job(executor_def=dg.in_process_executor, description="Deletes old runs from Dagster's storage.")
def housekeeping() -> None:
    delete_old_runs()


hourly_housekeeping = dg.ScheduleDefinition(
    name="hourly_housekeeping",
    job=housekeeping,
    cron_schedule="7 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Deletes runs older than `keep_runs_days`, failed ones older than `keep_failed_runs_days`.",
)
