"""The buffer sensor: every tick seals what is due and asks for runs; `decide` says which.

What dies between two of its lines is taken up by a later tick: a sealed batch nobody asked a run for stays due, and one whose
run never delivered it (died, was lost with its host) is due again when its lease has ended. A tick costs what is due; a slice
of the reconcile pass in each finds what no index knows.
"""

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import dagster as dg
from ulid import ULID

from d2p_pipeline import wiring
from d2p_pipeline.buffer.protocol import FORMAT, Batch, BatchRef, Buffer, BufferFullError, NewerFormatError, Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.orchestration.decide import Share, limits_of, share_runs, why_seal
from d2p_pipeline.orchestration.failures import give_up
from d2p_pipeline.orchestration.flush import flush
from d2p_pipeline.orchestration.keys import partition_of
from d2p_pipeline.settings import Settings, load

TICK_SECONDS = 1
"""Dagster looks at its sensors every 5 s; with an interval as long, it passes over one whose last tick began a moment late."""
DUE_PER_TICK = 10_000
RECONCILE_MS = 5
"""What a tick spends on finding what no index knows."""
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
def parts() -> tuple[Settings, RedisBuffer]:
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
    with _one_at_a_time:
        requests = list(tick(context, buffer, settings))
    yield from requests
    if not requests:
        yield dg.SkipReason("nothing to ask a run for")


def prove_store(context: dg.SensorEvaluationContext, settings: Settings) -> None:
    """Write and delete a file before this process seals its first batch: until that works each tick fails and says why, and
    the records stay where they are. Runs do not pay for it."""
    if context.repository_def is None or settings in _proven:
        return
    parquet = context.repository_def.get_top_level_resources()["parquet"]
    with dg.build_resources({"parquet": parquet}) as resources:
        resources.parquet.check()
    _proven.append(settings)


def tick(context: dg.SensorEvaluationContext, buffer: Buffer, settings: Settings) -> Iterator[dg.RunRequest]:
    """Seal what is due, ask for runs over what is sealed; both only as far as runs may still wait for their start."""
    try:
        adopted = buffer.reconcile(RECONCILE_MS)
        if adopted:
            context.log.info(f"adopted {adopted} buffers or batches that no index knew")
    except BufferFullError as error:
        context.log.warning(f"reconcile postponed: {error}")
    now, limits = buffer.now(), limits_of(settings)
    due = buffer.due(now - limits.age_ms, DUE_PER_TICK)
    if not due and not buffer.due_batches(now, 1):
        return
    queue = _runs(context.instance, _WAITING)
    limits = dataclasses.replace(limits, runs=max(0, limits.runs - len(queue)))
    if limits.runs:  # else buffers grow where they are: one large batch costs less than many small ones
        buffer.seal([Seal(state.key, str(ULID()), why_seal(state, now, limits)) for state in due])
    free = deliverable(context, buffer, unheld(context.instance, buffer, queue))
    hopeless = [batch for batch in free if batch.requests >= settings.run_attempts]
    hopeful = [batch for batch in free if batch.requests < settings.run_attempts]
    what = f"{settings.run_attempts} runs were asked for and none delivered it"
    give_up(buffer, settings, hopeless, what, context.instance, context.log)
    shares = share_runs(hopeful, limits, _waiting_per_key(queue))
    now = buffer.now()
    looks = {batch.ref: now + _look_again(batch) for share in shares for batch in share.batches}
    buffer.postpone(looks, requested=True)
    yield from map(run_request, shares)


def unheld(instance: dg.DagsterInstance, buffer: Buffer, queue: Sequence[dg.DagsterRun]) -> list[Batch]:
    """Due batches that no run works on or is about to: fresh ones, and those whose run came to nothing."""
    batches = buffer.due_batches(buffer.now(), DUE_PER_TICK)
    taken = buffer.claimed([batch.ref for batch in batches]).union(*map(_batches_of, queue))
    # A run that has started claims soon; one whose claim ended is lost, whatever Dagster still believes.
    about_to = set[BatchRef]().union(*map(_batches_of, _runs(instance, _STARTED, START_SECONDS)))
    taken |= {batch.ref for batch in batches if batch.ref in about_to and batch.token < batch.requests}
    later = buffer.now() + LOOK_AGAIN_MS
    buffer.postpone({batch.ref: later for batch in batches if batch.ref in taken})
    return [batch for batch in batches if batch.ref not in taken]


def deliverable(context: dg.SensorEvaluationContext, buffer: Buffer, batches: Sequence[Batch]) -> list[Batch]:
    """The batches this version can deliver; the others wait for their version, and no run is asked for."""
    newer = [batch for batch in batches if batch.format > FORMAT]
    for batch in newer:
        context.log.error(str(NewerFormatError(batch.ref, batch.format)))
    later = buffer.now() + LOOK_AGAIN_LIMIT_MS
    buffer.postpone({batch.ref: later for batch in newer})
    return [batch for batch in batches if batch.format <= FORMAT]


def _look_again(batch: Batch) -> int:
    return min(LOOK_AGAIN_MS << min(batch.requests, 10), LOOK_AGAIN_LIMIT_MS)


_WAITING = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING]
_STARTED = [dg.DagsterRunStatus.STARTED]


def _runs(
    instance: dg.DagsterInstance, statuses: list[dg.DagsterRunStatus], seconds: int | None = None
) -> Sequence[dg.DagsterRun]:
    """Runs that are about to claim. Which batches are claimed says their lease, and better than a run's status."""
    since = datetime.now(UTC) - timedelta(seconds=seconds) if seconds else None
    return instance.get_runs(dg.RunsFilter(job_name=flush.name, statuses=statuses, updated_after=since))


def _batches_of(run: dg.DagsterRun) -> set[BatchRef]:
    ops: Mapping[str, Any] = cast(Mapping[str, Any], run.run_config).get("ops", {})
    batches = ops.get("plan_units", {}).get("config", {}).get("batches", [])
    return {BatchRef(batch["key"], batch["id"]) for batch in batches}


def _waiting_per_key(queue: Iterable[dg.DagsterRun]) -> dict[str, int]:
    """How many waiting runs each key has to itself."""
    keys = ({batch.key for batch in _batches_of(run)} for run in queue)
    return Counter(key for (key, *others) in keys if not others)


def run_request(share: Share) -> dg.RunRequest:
    """A run over batches. Its key names the first batch and the attempt: the same tick twice asks for one run."""
    first = share.batches[0]
    keys = sorted({batch.key for batch in share.batches})
    tags = {
        "d2p/key": partition_of(keys[0])[:TAG_LENGTH] if len(keys) == 1 else f"{len(keys)} keys",
        "d2p/batch": first.id if len(share.batches) == 1 else f"{len(share.batches)} batches from {first.id}",
        "d2p/records": str(sum(batch.records for batch in share.batches)),
        "d2p/bytes": str(sum(batch.size for batch in share.batches)),
        "d2p/sealed_by": ", ".join(sorted({batch.reason for batch in share.batches})),
        "d2p/why": share.why,
        "d2p/attempt": str(first.requests + 1),
        "dagster/priority": str(-share.behind),
    }
    batches = [{"key": batch.key, "id": batch.id} for batch in share.batches]
    return dg.RunRequest(
        run_key=f"{first.id}:{first.requests + 1}",
        run_config={"ops": {"plan_units": {"config": {"batches": batches}}}},
        tags=tags,
    )
