"""Runs lost with their host: Dagster's default launcher does not notice them, and would keep their places in the queue taken.

While a run works, its process says in Redis that it lives. One that has stopped saying so is failed in Dagster, by the recovery
sensor; its batches are taken up by their leases, like those of any run that came to nothing.
"""

import logging

import dagster as dg

from d2p_pipeline.buffer.protocol import Buffer

KEPT_MS = 24 * 3600 * 1000
"""How long a run that this Dagster instance does not know is left to the instance that does."""

_suspects: dict[str, tuple[int, int]] = {}
"""Of this process: silent runs, until when they said that they live, and when that was noticed."""


def fail_lost_runs(instance: dg.DagsterInstance, buffer: Buffer, lease_ms: int, log: logging.Logger) -> None:
    """Fail runs that have not said for two leases that they live; the second one is looked at from here, so that a time in which
    Redis did not answer makes nobody lost."""
    now = buffer.now()
    silent = buffer.silent(now)
    for run_id in _suspects.keys() - silent:
        del _suspects[run_id]
    for run_id, until in silent.items():
        suspected = _suspects.get(run_id)
        if suspected is None or suspected[0] != until:
            _suspects[run_id] = (until, now)
        elif now - suspected[1] >= lease_ms:
            _end(instance, buffer, run_id, until, now, log)


def _end(instance: dg.DagsterInstance, buffer: Buffer, run_id: str, until: int, now: int, log: logging.Logger) -> None:
    run = instance.get_run_by_id(run_id)
    if run and not run.is_finished:
        what = f"Its process has given no sign of life for {(now - until) / 1000:.0f} s: it was lost, perhaps with its host."
        instance.report_run_failed(run, what)
        log.error(f"run {run_id} of {run.job_name} failed: {what}")
    if run or now - until > KEPT_MS:
        buffer.ends(run_id)
