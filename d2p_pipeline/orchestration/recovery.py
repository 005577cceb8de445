"""Recovery: batches whose delivery failed, each a partition of an asset, delivered again by backfill or by themselves.

Materializing a partition of `recovery`, from the UI, the command line or the Python API, delivers that batch. The sensor adds
the partitions of batches that came into recovery while Dagster was not looking, asks for automatic attempts when they are
due, and removes partitions whose batch is delivered. It never removes one under a run or a backfill: Dagster would fail it.
Before that it fails runs that were lost with their host.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice

import dagster as dg
from dagster import DagsterRunStatus
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from d2p_pipeline.buffer.protocol import FORMAT, Batch
from d2p_pipeline.delivery import Delivered
from d2p_pipeline.orchestration.assets import report_deliveries
from d2p_pipeline.orchestration.deliver import deliver
from d2p_pipeline.orchestration.failures import give_up, next_attempt, show
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.keys import RECOVERY, partition_of
from d2p_pipeline.orchestration.lost_runs import fail_lost_runs
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.sensor import parts as parts_of_process
from d2p_pipeline.settings import load

RUNS_PER_TICK = 10
SENSOR_SECONDS = 15
SHOWN_PER_TICK = 200
"""Of more batches that came into recovery unseen, `d2p status` alone says what they are."""
CHANGES_PER_TICK = 5000
"""Partitions added, and as many taken away: the daemon asks its storage about each, and must be through within the tick."""
LOOK_AGAIN_MS = 60_000
"""When a batch is looked at again after a run was asked for."""
TAG_LENGTH = 200

partitions = dg.DynamicPartitionsDefinition(name=RECOVERY)


@dg.asset(
    partitions_def=partitions,
    backfill_policy=dg.BackfillPolicy.multi_run(load().recovery_run_batches),
    group_name="delivery",
    kinds={"redis"},
    description=(
        "Batches whose delivery failed after all retries, one partition per batch. Materialize partitions to deliver them "
        "again; a partition disappears when its batch is delivered."
    ),
)
def recovery(
    context: dg.AssetExecutionContext, delivery_parts: DeliveryResource, parquet: dg.ResourceParam[ParquetIOManager]
) -> dg.MaterializeResult:
    """Deliver batches again, one by one; one that fails does not hold up the others."""
    started, buffer = time.time(), delivery_parts.buffer
    wanted = set(context.partition_keys)
    batches = [batch for batch in (*buffer.recovering(), *buffer.open_batches()) if batch.id in wanted]
    delivered: list[Delivered] = []
    failures: dict[str, Exception] = {}
    for batch in batches:
        done, failed = deliver(delivery_parts, parquet, [batch.ref], context)
        delivered += done
        rows = sum(part.rows for part in done)
        context.add_asset_metadata({"dagster/row_count": rows, "key": batch.key}, partition_key=batch.id)
        failures |= {ref.id: error for ref, error in failed.items()}
    report_deliveries(context, delivered, now=buffer.now(), took=time.time() - started)
    if failures:
        shown = "; ".join(f"batch {batch_id}: {error}" for batch_id, error in list(failures.items())[:5])
        raise dg.Failure(f"{len(failures)} of {len(batches)} batches stay in recovery: {shown}", allow_retries=False)
    return dg.MaterializeResult()


recover = dg.define_asset_job(
    "recover",
    selection=[recovery],
    executor_def=dg.in_process_executor,
    description="Delivers batches in recovery; the recovery sensor runs it, and so may you.",
)


@dg.sensor(
    jobs=[recover],
    minimum_interval_seconds=SENSOR_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps the partitions of `recovery` true, and delivers batches in recovery again when they are due.",
)
def recovery_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    settings, buffer = parts_of_process()
    if settings.redis_skip_flush:
        return dg.SkipReason("this instance only receives (redis_skip_flush)")
    instance = context.instance
    fail_lost_runs(instance, buffer, int(settings.redis_lock_ttl * 1000), context.log)
    known = instance.get_dynamic_partitions(
        RECOVERY
    )  # before `waiting`: what fails in between is not taken for delivered
    waiting = {batch.id for batch in buffer.recovering()}
    held = _held(instance, known)
    free = [
        batch
        for batch in buffer.recovering(buffer.now())
        if batch.format <= FORMAT and batch.id not in held and not buffer.is_claimed(batch.ref)
    ]
    lost = [batch for batch in free if batch.token > batch.failed_token]
    give_up(
        buffer, settings, lost, "the run that held it in recovery ended without delivering it", instance, context.log
    )
    due = {batch.id: batch for batch in free if batch.token == batch.failed_token}
    missing = sorted(waiting.difference(known))[:CHANGES_PER_TICK]
    # What a run is about to deliver, or a claim holds, may come back.
    still_open = set() if waiting.issuperset(known) else {batch.id for batch in buffer.open_batches()}
    staying = waiting | held | still_open
    delivered = [batch_id for batch_id in known if batch_id not in staying][:CHANGES_PER_TICK]
    changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if missing:
        changes.append(partitions.build_add_request(missing))
        unseen = set(missing)
        news = [batch for batch in buffer.recovering() if batch.id in unseen]
        for batch in news:
            # The process that put it there may have died before it said when to try again.
            if (again := next_attempt(batch, settings)) is not None:
                buffer.retry_at(batch.ref, again)
        for batch in news[:SHOWN_PER_TICK]:
            show(instance, settings, batch)
    if delivered:
        changes.append(partitions.build_delete_request(delivered))
    requests: list[dg.RunRequest] = []
    for group in islice(_groups([*known, *missing], due, settings.recovery_run_batches), RUNS_PER_TICK):
        for batch in group:
            buffer.retry_at(batch.ref, buffer.now() + LOOK_AGAIN_MS, requested=True)
        requests.append(_request(group))
    if not requests and not changes:
        return dg.SkipReason(f"{len(waiting)} batches in recovery, none due")
    return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=changes)


def _groups(order: Sequence[str], due: Mapping[str, Batch], most: int) -> Iterator[list[Batch]]:
    """Due batches whose partitions follow each other: a run takes one partition, or a range of them."""
    for is_due, ids in groupby(order, key=due.__contains__):
        while is_due and (group := [due[batch_id] for batch_id in islice(ids, most)]):
            yield group


def _request(group: Sequence[Batch]) -> dg.RunRequest:
    first, last = group[0], group[-1]
    keys = {batch.key for batch in group}
    tags = {
        "d2p/key": partition_of(first.key)[:TAG_LENGTH] if len(keys) == 1 else f"{len(keys)} keys",
        "d2p/batch": first.id if len(group) == 1 else f"{len(group)} batches from {first.id}",
        "d2p/attempt": str(first.failures + 1),
        "d2p/recovery": "automatic",
    }
    if len(group) > 1:
        tags |= {ASSET_PARTITION_RANGE_START_TAG: first.id, ASSET_PARTITION_RANGE_END_TAG: last.id}
    return dg.RunRequest(
        run_key=f"recover:{first.id}:{first.requests + 1}",
        partition_key=first.id if len(group) == 1 else None,
        tags=tags,
    )


def _held(instance: dg.DagsterInstance, known: Sequence[str]) -> set[str]:
    """Partitions that unfinished runs and backfills are to materialize. Taking one away would fail the run or the backfill."""
    if any(map(_is_ours, instance.get_backfills(BulkActionsFilter(statuses=_UNFINISHED_BACKFILL)))):
        return set(known)
    held: set[str] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        first, last = (run.tags.get(tag) for tag in (ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG))
        if first in known and last in known:
            held.update(known[known.index(first) : known.index(last) + 1])
        elif "dagster/partition" in run.tags:
            held.add(run.tags["dagster/partition"])
    return held


def _is_ours(backfill: PartitionBackfill) -> bool:
    if backfill.is_asset_backfill:
        return recovery.key in (backfill.asset_selection or [])
    return backfill.job_name == recover.name


_UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
_UNFINISHED_BACKFILL = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
