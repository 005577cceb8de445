"""The `flush` job: sealed batches to Parquet files, unit after unit, acknowledged one by one.

Batches come from the buffer sensor as run configuration. From the launchpad, `keys` seals those buffers now, and no
configuration at all seals everything that waits. Values between the ops stay in memory, so all run in one process; each
unit's ops run before the next unit's (by priority), so memory holds one unit. A step that fails is repeated if its reason
may pass; after that the hook `to_recovery` puts the unit's batches into recovery, and the other units go on.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from pydantic import Field
from ulid import ULID

from d2p_pipeline.buffer.protocol import BatchRef, Buffer, Reason, Seal
from d2p_pipeline.delivery import Announced, Delivered, Rows, Text, Unit, Written
from d2p_pipeline.logs import plain
from d2p_pipeline.orchestration.assets import report_deliveries
from d2p_pipeline.orchestration.decide import limits_of, why_seal
from d2p_pipeline.orchestration.deliver import deliver
from d2p_pipeline.orchestration.failures import no_retry_if_permanent, to_recovery
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.records.dead_letter import reasons
from d2p_pipeline.settings import load


class BatchConfig(dg.Config):
    """A sealed batch."""

    key: str
    id: str


class FlushConfig(dg.Config):
    """What to deliver."""

    batches: list[BatchConfig] = Field(default=[], description="Sealed batches; the buffer sensor fills this in.")
    keys: list[str] = Field(
        default=[], description="Seal these buffers now. With no batches and no keys: all that wait."
    )
    reason: Literal["request", "schedule"] = Field(default="request", description="Why buffers are sealed here.")


@dg.op(out=dg.DynamicOut(Unit, io_manager_key="memory"), tags={"dagster/priority": "1"})
def plan_units(
    context: dg.OpExecutionContext, config: FlushConfig, delivery_parts: DeliveryResource
) -> Iterator[dg.DynamicOutput[Unit]]:
    """Seal what is asked for, claim the batches and cut them into units."""
    refs = [BatchRef(batch.key, batch.id) for batch in config.batches]
    if refs:
        keys = list(dict.fromkeys(ref.key for ref in refs))
        delivery_parts.leases.attend(keys, delivery_parts.settings.run_seconds)
    else:
        refs = seal_now(delivery_parts.buffer, config.keys, config.reason)
    planned = delivery_parts.plan(refs)
    for error in planned.refused.values():
        context.log.error(plain(error))
    for ref in planned.skipped:
        context.log.info(plain(f"key={ref.key} batch={ref.id} skipped: delivered already, or another run holds it"))
    context.log.info(f"{len(refs)} batches, {len(planned.units)} units")
    for number, unit in enumerate(planned.units):
        yield dg.DynamicOutput(unit, mapping_key=f"{number:05}")  # Dagster runs them in the order of their names


def seal_now(buffer: Buffer, keys: list[str], reason: Reason) -> list[BatchRef]:
    """Seal buffers without waiting for the sensor; the batches belong to this run at once."""
    found = keys or [state.key for state in buffer.waiting()]
    return [batch.ref for batch in buffer.seal([Seal(key, str(ULID()), reason) for key in found])]


@dg.op(out=dg.Out(Text, io_manager_key="memory"), tags={"dagster/priority": "2"})
def read_records(unit: Unit, delivery_parts: DeliveryResource) -> Text:
    """Read the unit's chunks."""
    return delivery_parts.read(unit)


@dg.op(out=dg.Out(Rows, io_manager_key="memory"), tags={"dagster/priority": "3"})
def validate_records(context: dg.OpExecutionContext, text: Text, delivery_parts: DeliveryResource) -> Rows:
    """Chunks to typed rows; what is no valid record becomes a dead letter."""
    with no_retry_if_permanent():
        rows = delivery_parts.check(text)
    for part, letters in zip(rows.unit.parts, rows.dead_letters, strict=True):
        if letters:
            key, batch = part.claim.batch
            kept = "" if delivery_parts.settings.use_dlq else " and not kept (use_dlq = false)"
            found = "; ".join(f"{count} × {reason}" for reason, count in reasons(letters).most_common(10))
            what = f"key={key} batch={batch} unit={part.number} {len(letters)} records rejected{kept}: {found}"
            context.log.warning(plain(what))
    return rows


@dg.op(out=dg.Out(Announced, io_manager_key="parquet"), tags={"dagster/priority": "4"})
def build_parquet(rows: Rows, delivery_parts: DeliveryResource) -> Announced:
    """Rows to Parquet, one file per capability and hour, announced; the IO manager writes them."""
    with no_retry_if_permanent():
        return delivery_parts.build(rows)


@dg.op(out=dg.Out(list, io_manager_key="memory"), tags={"dagster/priority": "5"})
def acknowledge(
    rows: Rows, files: list, delivery_parts: DeliveryResource, parquet: dg.ResourceParam[ParquetIOManager]
) -> list[Delivered]:
    """The files are durable: store the dead letters and mark the unit, in one step."""
    with no_retry_if_permanent():
        return delivery_parts.acknowledge(rows, cast(list[Written], files), parquet.remove)


@dataclass(frozen=True)
class Deliveries:
    """What a run delivered, and what it could not: batches of a later version, and those it went on with that failed."""

    done: list[Delivered]
    failed: dict[BatchRef, Exception]


@dg.op(out=dg.Out(Deliveries, io_manager_key="memory"))
def go_on(
    context: dg.OpExecutionContext,
    units: list[list[Delivered]],
    delivery_parts: DeliveryResource,
    parquet: dg.ResourceParam[ParquetIOManager],
) -> Deliveries:
    """Deliver what became due of the run's keys meanwhile: a busy key need not pay the start of a run for each batch."""
    done = [part for unit in units for part in unit]
    failed = dict(delivery_parts.refused)
    batches, due = 0, became_due(context, delivery_parts)
    while sum(part.part.size for part in done) < delivery_parts.settings.run_bytes and (refs := next(due, None)):
        more, reasons = deliver(delivery_parts, parquet, refs, context)
        done += more
        failed |= reasons
        batches += len(refs)
    if batches:
        context.instance.add_run_tags(context.run_id, {"d2p/went_on": f"{batches} batches"})
    return Deliveries(done, failed)


def became_due(context: dg.OpExecutionContext, parts: DeliveryResource) -> Iterator[list[BatchRef]]:
    """Seal what is due of the keys this run attends, again and again, until nothing is or its time is over.

    A run that dies after the seal leaves a batch like any other: the sensor finds that nobody holds it.
    """
    settings, idle = parts.settings, 0.0
    limits = limits_of(settings)
    while parts.leases.keys and parts.age < settings.run_seconds:
        now = parts.buffer.now()
        due = parts.buffer.due_among(parts.leases.keys, now - limits.age_ms)
        seals = [Seal(state.key, str(ULID()), why_seal(state, now, limits)) for state in due]
        if batches := parts.buffer.seal(seals, look_in=int(settings.redis_lock_ttl * 1000)):
            idle = 0.0
            yield [batch.ref for batch in batches]
        elif idle < settings.run_linger and not context.instance.get_runs_count(_QUEUED):
            time.sleep(LOOK_SECONDS)
            idle += LOOK_SECONDS
        else:
            return


LOOK_SECONDS = 1.0
"""How often a run that lingers looks for due work."""
_QUEUED = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED])


@dg.op(out=dg.Out(dg.Nothing, io_manager_key="memory"))
def report(context: dg.OpExecutionContext, deliveries: Deliveries, delivery_parts: DeliveryResource) -> None:
    """One materialization per key."""
    took = time.time() - (context.instance.get_run_stats(context.run_id).start_time or time.time())
    report_deliveries(context, deliveries.done, now=delivery_parts.buffer.now(), took=took)
    if deliveries.failed:
        shown = "; ".join(f"batch {ref.id}: {error}" for ref, error in list(deliveries.failed.items())[:5])
        raise dg.Failure(f"{len(deliveries.failed)} batches are not delivered: {shown}", allow_retries=False)


class RetryPolicy(dg.RetryPolicy):
    """Dagster's, but for a run that somebody terminates within a step: Dagster takes that for a failure of the step, repeats it
    and goes on with the run as if nobody had asked."""

    def calculate_delay(self, attempt_num: int) -> float:
        error = sys.exc_info()[1]
        if isinstance(error, DagsterExecutionInterruptedError):
            raise error
        return super().calculate_delay(attempt_num)


def retry_policy() -> dg.RetryPolicy:
    """How a failed step is repeated, as the settings say."""
    settings = load()
    return RetryPolicy(
        max_retries=settings.write_retries,
        delay=settings.write_retry_delay,
        backoff=dg.Backoff.EXPONENTIAL,
        jitter=dg.Jitter.PLUS_MINUS,
    )


@dg.job(
    executor_def=dg.in_process_executor,
    op_retry_policy=retry_policy(),
    hooks={to_recovery},
    description="Sealed batches to Parquet files. Launch it without configuration to flush everything that waits.",
)
def flush() -> None:
    def deliver_unit(unit: Unit) -> list[Delivered]:
        rows = validate_records(read_records(unit))
        return acknowledge(rows, build_parquet(rows))

    report(go_on(plan_units().map(deliver_unit).collect()))
