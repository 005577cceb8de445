"""The buffer sensor: every tick seals what is due and asks for runs; `decide` says which.

What dies between two of its lines is taken up by a later tick: a sealed batch nobody asked a run for stays due, and one whose
run never delivered it (died, was lost with its host) is due again when its lease has ended. A tick costs what is due; a slice
of the reconcile pass in each finds what no index knows.
"""

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import dagster as dg
from ulid import ULID

from d2p_pipeline import wiring
from d2p_pipeline.buffer.protocol import Batch, BatchRef, Buffer, BufferFullError, Seal
from d2p_pipeline.orchestration.decide import Limits, share_runs, why_seal
from d2p_pipeline.orchestration.failures import give_up
from d2p_pipeline.orchestration.flush import flush
from d2p_pipeline.orchestration.keys import partition_of
from d2p_pipeline.settings import Settings, load

TICK_SECONDS = 5
DUE_PER_TICK = 10_000
RECONCILE_STEPS = 5
"""Pages of a thousand names looked at per tick."""
LOOK_AGAIN_MS = 20_000
"""When a batch is looked at again after a run was asked for; doubles with each run asked for in vain."""
LOOK_AGAIN_LIMIT_MS = 300_000
START_SECONDS = 120
"""A started run claims its batches within this time, or it is taken for dead."""
TAG_LENGTH = 200

_one_at_a_time = threading.Lock()
_proven: list[Settings] = []
"""Settings of this process that files have been written with."""


@functools.cache
def parts() -> tuple[Settings, Buffer]:
    """Settings and buffer of this process; the code server keeps them from tick to tick."""
    settings = load()
    buffer, _ = wiring.open_buffer(settings)
    return settings, buffer


@dg.sensor(
    job=flush,
    minimum_interval_seconds=TICK_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Seals buffers that are full, old or asked for, and runs `flush` over them.",
)
def buffer_sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    settings, buffer = parts()
    if settings.redis_skip_flush:
        yield dg.SkipReason("this instance only receives (redis_skip_flush)")
        return
    prove_store(context, settings)
    limits = Limits(
        records=settings.buffer_size,
        size=settings.flush_bytes,
        age_ms=int(settings.flush_interval * 1000),
        run_bytes=settings.run_bytes,
        runs=settings.max_runs_per_tick,
    )
    with _one_at_a_time:
        sealed = seal_due(context, buffer, limits)
        batches = list(undelivered(buffer, context.instance))
        hopeless = [batch for batch in batches if batch.requests >= settings.run_attempts]
        what = f"{settings.run_attempts} runs were asked for and none delivered it"
        give_up(buffer, settings, hopeless, what, context.instance, context.log)
        groups = share_runs([batch for batch in batches if batch.requests < settings.run_attempts], limits)
        for group in groups:
            for batch in group:
                wait = min(LOOK_AGAIN_MS << min(batch.requests, 10), LOOK_AGAIN_LIMIT_MS)
                buffer.postpone(batch.ref, buffer.now() + wait, requested=True)
            yield run_request(group)
        if not groups:
            yield dg.SkipReason(f"nothing due; sealed {sealed}")


def prove_store(context: dg.SensorEvaluationContext, settings: Settings) -> None:
    """Write and delete a file before this process seals its first batch: until that works each tick fails and says why, and
    the records stay where they are. Runs do not pay for it."""
    if context.repository_def is None or settings in _proven:
        return
    parquet = context.repository_def.get_top_level_resources()["parquet"]
    with dg.build_resources({"parquet": parquet}) as resources:
        resources.parquet.check()
    _proven.append(settings)


def seal_due(context: dg.SensorEvaluationContext, buffer: Buffer, limits: Limits) -> int:
    """Seal every due buffer; returns how many became batches."""
    try:
        adopted = buffer.reconcile(RECONCILE_STEPS)
        if adopted:
            context.log.info(f"adopted {adopted} buffers or batches that no index knew")
    except BufferFullError as error:
        context.log.warning(f"reconcile postponed: {error}")
    now = buffer.now()
    due = buffer.due(now - limits.age_ms, DUE_PER_TICK)
    return len(buffer.seal([Seal(state.key, str(ULID()), why_seal(state, now, limits)) for state in due]))


def undelivered(buffer: Buffer, instance: dg.DagsterInstance) -> Iterator[Batch]:
    """Due batches that no run works on: fresh ones, and those whose run came to nothing."""
    in_flight: set[BatchRef] | None = None
    for batch in buffer.due_batches(buffer.now(), DUE_PER_TICK):
        if batch.requests:
            if in_flight is None:
                in_flight = set(batches_in_flight(instance))
            if batch.ref in in_flight or buffer.is_claimed(batch.ref):
                buffer.postpone(batch.ref, buffer.now() + LOOK_AGAIN_MS)
                continue
        yield batch


def batches_in_flight(instance: dg.DagsterInstance) -> Iterator[BatchRef]:
    """Batches of runs that are about to claim them. A run that claims holds a lease, which says more than its status."""
    waiting = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING]
    yield from _batches_of(instance.get_runs(dg.RunsFilter(job_name=flush.name, statuses=waiting)))
    young = dg.RunsFilter(
        job_name=flush.name,
        statuses=[dg.DagsterRunStatus.STARTED],
        updated_after=datetime.now(UTC) - timedelta(seconds=START_SECONDS),
    )
    yield from _batches_of(instance.get_runs(young))


def _batches_of(runs: Iterable[dg.DagsterRun]) -> Iterator[BatchRef]:
    for run in runs:
        ops: Mapping[str, Any] = cast(Mapping[str, Any], run.run_config).get("ops", {})
        for batch in ops.get("plan_units", {}).get("config", {}).get("batches", []):
            yield BatchRef(batch["key"], batch["id"])


def run_request(group: Sequence[Batch]) -> dg.RunRequest:
    """A run over batches. Its key names the first batch and the attempt: the same tick twice asks for one run."""
    first = group[0]
    keys = sorted({batch.key for batch in group})
    tags = {
        "d2p/key": partition_of(keys[0])[:TAG_LENGTH] if len(keys) == 1 else f"{len(keys)} keys",
        "d2p/batch": first.id if len(group) == 1 else f"{len(group)} batches from {first.id}",
        "d2p/records": str(sum(batch.records for batch in group)),
        "d2p/attempt": str(first.requests + 1),
    }
    batches = [{"key": batch.key, "id": batch.id} for batch in group]
    return dg.RunRequest(
        run_key=f"{first.id}:{first.requests + 1}",
        run_config={"ops": {"plan_units": {"config": {"batches": batches}}}},
        tags=tags,
    )
