"""What becomes of failures: repeated when the reason may pass, else the unit's batches go into recovery.

Dagster's three retry mechanisms are kept apart: a step's retry policy repeats what may pass within seconds; recovery is a
later run over the same batch; a run that was killed is found by its lease, by the buffer sensor.
"""

import errno
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import dagster as dg
from ulid import ULID

from d2p_pipeline.buffer.protocol import Batch, Buffer, BufferUnavailableError, Claim, ClaimLostError
from d2p_pipeline.logs import plain
from d2p_pipeline.orchestration.keys import RECOVERY
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.parquet.errors import PermanentStoreError
from d2p_pipeline.records.transform import TransformError
from d2p_pipeline.settings import Settings

LONGEST_DELAY_MS = 3_600_000
_LAST_FOR_ERROR = 2000
_MOMENT_MS = 10_000
"""Lease of a claim that is only taken to say that a batch has failed."""
_GIVEN_UP_AT_ONCE = 200
_RUNS_LOOKED_AT = 100

_PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""What the file system will say again a second later."""


def is_permanent(error: BaseException) -> bool:
    """Whether somebody has to change something before the same step can succeed."""
    return isinstance(error, PermanentStoreError | TransformError | ClaimLostError) or (
        isinstance(error, OSError) and error.errno in _PERMANENT
    )


@contextmanager
def no_retry_if_permanent() -> Iterator[None]:
    """Let a step fail at once where repeating it would be in vain."""
    try:
        yield
    except (OSError, PermanentStoreError, TransformError, ClaimLostError) as error:
        if is_permanent(error):
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error
        raise


@dg.failure_hook(name="to_recovery", required_resource_keys={"delivery_parts", "memory"})
def to_recovery(context: dg.HookContext) -> None:
    """A unit's step failed for good: its batches wait in recovery, each as a partition of the asset `recovery`."""
    number = re.search(r"\[(\d+)\]$", context.step_key)
    error = context.op_exception
    if number is None:
        return  # nothing is claimed yet
    context.resources.memory.let_go(number[1])
    if isinstance(error, ClaimLostError) or isinstance(error and error.__cause__, ClaimLostError):
        return  # another run has the batch
    parts: DeliveryResource = context.resources.delivery_parts
    for part in parts.unit(int(number[1])).parts:
        put_into_recovery(parts, part.claim, context.op_exception, context.instance, context.log)


def put_into_recovery(
    parts: DeliveryResource,
    claim: Claim,
    error: BaseException | None,
    instance: dg.DagsterInstance,
    log: dg.DagsterLogManager,
) -> None:
    """Put one batch of a run into recovery; where Redis does not answer, the batch's lease ends and the sensor finds it."""
    key, batch_id = claim.batch
    try:
        failed = _fail(parts.buffer, parts.settings, claim, _described(error), log)
        parts.leases.drop(claim.batch)
    except BufferUnavailableError as unavailable:
        log.warning(plain(f"key={key} batch={batch_id} not put into recovery: {unavailable}"))
        return
    if failed:
        instance.add_dynamic_partitions(RECOVERY, [batch_id])
        show(instance, parts.settings, failed)


def give_up(
    buffer: Buffer,
    settings: Settings,
    batches: Iterable[Batch],
    what: str,
    instance: dg.DagsterInstance,
    log: logging.Logger,
) -> None:
    """Put batches into recovery, or count another failure there, whose runs ended without saying what became of them.

    The recovery sensor makes them partitions.
    """
    runs: Sequence[dg.DagsterRun] | None = None
    for batch in islice(batches, _GIVEN_UP_AT_ONCE):
        claim = buffer.claim(batch.ref, f"{settings.redis_lock_instance_name}:{ULID()}", _MOMENT_MS)
        if claim:
            runs = instance.get_runs(limit=_RUNS_LOOKED_AT) if runs is None else runs
            if failed := _fail(buffer, settings, claim, f"{what}; {_last_run(instance, runs, batch)}", log):
                show(instance, settings, failed)


def show(instance: dg.DagsterInstance, settings: Settings, batch: Batch) -> None:
    """Say in the catalogue what waits in a partition of `recovery`, and why."""
    again = next_attempt(batch, settings)
    instance.report_runless_asset_event(
        dg.AssetObservation(
            asset_key=RECOVERY,
            partition=batch.id,
            metadata={
                "key": batch.key,
                "error": batch.error,
                "failures": batch.failures,
                "records": batch.records,
                "bytes": batch.size,
                "oldest_record": dg.MetadataValue.timestamp(batch.first / 1000),
                "failed_at": dg.MetadataValue.timestamp(batch.failed_at / 1000),
                "next_attempt": "when a person asks" if again is None else dg.MetadataValue.timestamp(again / 1000),
            },
        )
    )


def _fail(
    buffer: Buffer, settings: Settings, claim: Claim, reason: str, log: dg.DagsterLogManager | logging.Logger
) -> Batch | None:
    failures = buffer.fail(claim, reason)
    batch = buffer.batch(claim.batch)
    if not failures or batch is None:
        return None
    buffer.retry_at(claim.batch, next_attempt(batch, settings))
    log.error(plain(f"key={batch.key} batch={batch.id} in recovery after failure {failures}: {reason}"))
    return batch


def _last_run(instance: dg.DagsterInstance, runs: Sequence[dg.DagsterRun], batch: Batch) -> str:
    """How the newest run over a batch ended, as far as Dagster knows."""
    for run in runs:
        if f'"{batch.id}"' in json.dumps([run.run_config, run.tags]):
            kinds = {dg.DagsterEventType.ENGINE_EVENT, dg.DagsterEventType.RUN_FAILURE}
            messages = [entry.get_dagster_event().message for entry in instance.all_logs(run.run_id, of_type=kinds)]
            said = " ".join(message for message in messages[-2:] if message)
            return f"the last run, {run.run_id}, is {run.status.value}: {said}"
    return "Dagster does not know the last run any more"


def next_attempt(batch: Batch, settings: Settings) -> int | None:
    """When a batch in recovery is delivered again without being asked (ms); None: when a person asks."""
    if not settings.try_auto_recover or batch.failures > settings.recovery_attempts:
        return None
    delay = int(settings.recovery_delay * 1000) << (batch.failures - 1)
    return batch.failed_at + min(delay, LONGEST_DELAY_MS)


def _described(error: BaseException | None) -> str:
    """An error with its causes, outermost first."""
    texts: list[str] = []
    while error is not None:
        text = str(error.description if isinstance(error, dg.Failure) else error)
        texts.append(text if isinstance(error, dg.Failure) else f"{type(error).__name__}: {text}")
        error = error.__cause__
    return "; ".join(dict.fromkeys(texts))[:_LAST_FOR_ERROR]
