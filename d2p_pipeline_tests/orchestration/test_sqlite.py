"""Dagster's storage in SQLite, as `d2p up` configures it: connections stay open, and nobody notices."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

import dagster as dg
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.runs import SqliteRunStorage

from d2p_pipeline.cli.supervise import dagster_home
from d2p_pipeline.orchestration import sqlite
from d2p_pipeline_tests.faults.struck_run import FORKS
from d2p_pipeline_tests.pipeline import Pipeline, line


def test_a_flush_is_stored_over_connections_that_stay_open(pipeline: Pipeline, tmp_path: Path) -> None:
    home = dagster_home(tmp_path)
    sqlite._engine_of_process.cache_clear()
    with dg.DagsterInstance.from_config(str(home)) as pipeline.instance:
        pipeline.receive([line("payments")])
        delivered = pipeline.flush()
        assert delivered.success
    opened = sqlite._engine_of_process.cache_info()
    assert opened.misses <= 4 < opened.hits  # runs, schedules, the index, the run's events
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert [run.run_id for run in instance.get_runs()] == [delivered.run_id]
        assert instance.get_dynamic_partitions("keys") == ["payments"]


def test_only_the_events_of_a_run_may_be_lost_with_the_power(tmp_path: Path) -> None:
    home = str(dagster_home(tmp_path))
    with dg.DagsterInstance.from_config(home) as instance:
        events, run_id = instance.event_log_storage, "7d2ad4ea-54fd-4b5c-8cd0-6a1a3a2a1c4e"
        instance.report_engine_event("first", run_id=run_id, job_name="flush")
        assert isinstance(events, SqliteEventLogStorage)
        runs = instance.run_storage
        assert isinstance(runs, SqliteRunStorage)
        open_ones = (events.run_connection(run_id), events.index_connection(), runs.connect())
        syncs: list[int] = []
        for one in open_ones:
            with one as connection:
                syncs.append(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())
    normal, full = 1, 2
    assert syncs == [normal, full, full]


def test_whoever_watches_a_run_is_told_of_each_event_while_it_goes_on(tmp_path: Path) -> None:
    home = str(dagster_home(tmp_path))
    with dg.DagsterInstance.from_config(home) as runs, dg.DagsterInstance.from_config(home) as webserver:
        run_id = "7d2ad4ea-54fd-4b5c-8cd0-6a1a3a2a1c4e"
        runs.report_engine_event("first", run_id=run_id, job_name="flush")
        seen: Queue[str] = Queue()
        webserver.watch_event_logs(run_id, None, lambda entry, _: seen.put(entry.message))
        for message in ("second", "third"):
            runs.report_engine_event(message, run_id=run_id, job_name="flush")
            while seen.get(timeout=60) != message:
                pass


def _partitions(home: str) -> tuple[list[str], int]:
    with dg.DagsterInstance.from_config(home) as instance:
        return list(instance.get_dynamic_partitions("keys")), sqlite._engine_of_process.cache_info().misses


def _open_and_fork(home: str) -> tuple[int, list[str], int]:
    """Connections opened here; what a fork finds, and connections opened there."""
    with dg.DagsterInstance.from_config(home) as instance:
        instance.add_dynamic_partitions("keys", ["a"])
        opened = sqlite._engine_of_process.cache_info().misses
        with ProcessPoolExecutor(1, get_context("fork")) as fork:
            return opened, *fork.submit(_partitions, home).result()


def test_a_fork_opens_connections_of_its_own(tmp_path: Path) -> None:
    # In a process of one thread: a fork of this one could wait for ever for a lock that another thread had.
    with ProcessPoolExecutor(1, FORKS) as process:
        opened, found, opened_in_fork = process.submit(_open_and_fork, str(dagster_home(tmp_path))).result()
    assert found == ["a"]
    assert opened_in_fork > opened
