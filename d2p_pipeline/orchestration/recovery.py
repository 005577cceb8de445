"""Recovery: batches whose delivery failed, each a partition of an asset, delivered again by backfill or by themselves.

Materializing a partition of `recovery`, from the UI, the command line or the Python API, delivers that batch. The sensor adds
the partitions of batches that came into recovery while Dagster was not looking, asks for automatic attempts when they are
due, and removes partitions whose batch is delivered. It never removes one under a run: Dagster would fail that run.
"""

import time

import dagster as dg
from dagster import DagsterRunStatus

from d2p_pipeline.buffer.protocol import Batch
from d2p_pipeline.delivery import Delivered
from d2p_pipeline.orchestration.assets import report_deliveries
from d2p_pipeline.orchestration.failures import put_into_recovery
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.keys import RECOVERY, partition_of
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.sensor import parts as parts_of_process

RUN_PARTITIONS = 25
"""Partitions that one run of a backfill delivers: a run costs seconds before it does anything."""
REQUESTS_PER_TICK = 50
SENSOR_SECONDS = 15
TAG_LENGTH = 200

partitions = dg.DynamicPartitionsDefinition(name=RECOVERY)


@dg.asset(
    partitions_def=partitions,
    backfill_policy=dg.BackfillPolicy.multi_run(RUN_PARTITIONS),
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
        done, error = _deliver(delivery_parts, parquet, batch, context)
        delivered += done
        rows = sum(part.rows for part in done)
        context.add_asset_metadata({"dagster/row_count": rows, "key": batch.key}, partition_key=batch.id)
        if error:
            failures[batch.id] = error
    report_deliveries(context, delivered, now=buffer.now(), took=time.time() - started)
    if failures:
        shown = "; ".join(f"batch {batch_id}: {error}" for batch_id, error in list(failures.items())[:5])
        raise dg.Failure(f"{len(failures)} of {len(batches)} batches stay in recovery: {shown}", allow_retries=False)
    return dg.MaterializeResult()


def _deliver(
    parts: DeliveryResource, parquet: ParquetIOManager, batch: Batch, context: dg.AssetExecutionContext
) -> tuple[list[Delivered], Exception | None]:
    """Deliver what is left of one batch; whatever goes wrong is kept with the batch, which stays in recovery."""
    delivered: list[Delivered] = []
    units, skipped = parts.plan([batch.ref])
    if skipped:
        context.log.info(f"key={batch.key} batch={batch.id} skipped: delivered already, or another run holds it")
    for unit in units:
        try:
            rows = parts.check(parts.read(unit))
            delivered += parts.acknowledge(rows, parquet.write(parts.build(rows)))
        except Exception as error:  # noqa: BLE001  # nothing about one batch may hold up the others
            put_into_recovery(parts, unit.parts[0].claim, error, context.instance, context.log)
            return delivered, error
    return delivered, None


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
    waiting = {batch.id: batch for batch in buffer.recovering()}
    known = set(context.instance.get_dynamic_partitions(RECOVERY))
    in_flight = _partitions_in_flight(context.instance) if known or waiting else set()
    changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if missing := sorted(waiting.keys() - known):
        changes.append(partitions.build_add_request(missing))
    # What a run is about to deliver, or a claim holds, may come back.
    held = {batch.id for batch in buffer.open_batches()} if known - waiting.keys() else set()
    if delivered := sorted(known - waiting.keys() - in_flight - held):
        changes.append(partitions.build_delete_request(delivered))
    due = [batch for batch in buffer.recovering(buffer.now()) if batch.id not in in_flight][:REQUESTS_PER_TICK]
    if not due and not changes:
        return dg.SkipReason(f"{len(waiting)} batches in recovery, none due")
    return dg.SensorResult(run_requests=[_request(batch) for batch in due], dynamic_partitions_requests=changes)


def _request(batch: Batch) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=f"recover:{batch.id}:{batch.failures}",
        partition_key=batch.id,
        tags={
            "d2p/key": partition_of(batch.key)[:TAG_LENGTH],
            "d2p/batch": batch.id,
            "d2p/attempt": str(batch.failures + 1),
        },
    )


def _partitions_in_flight(instance: dg.DagsterInstance) -> set[str]:
    """Partitions that runs not yet finished will materialize; a range of them is read as all."""
    tags = [run.tags for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))]
    if any("dagster/asset_partition_range_start" in some for some in tags):
        return set(instance.get_dynamic_partitions(RECOVERY))
    return {some["dagster/partition"] for some in tags if "dagster/partition" in some}


_UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
