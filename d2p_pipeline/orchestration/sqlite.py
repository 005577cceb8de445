"""Dagster's storage in SQLite, with connections kept open; the dagster.yaml that `d2p up` writes names it.

Dagster opens an engine and a connection for every statement otherwise, and SQLite writes its log back at each close: most of
what a short run costs. What a run says of itself is not synced to the disk event by event, which took as long as all else in a
long run: a power failure may take a run's last events, and never a run, its status, or a materialization.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dagster._core.events.log import EventLogEntry
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME
from dagster._core.storage.runs import SqliteRunStorage
from dagster._core.storage.schedules import SqliteScheduleStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from sqlalchemy import Connection, Engine, create_engine, event

FILES_KEPT = 16
"""Databases a process keeps open: runs, schedules, the index of events, and the events of a few runs."""


class KeptSqliteStorage(DagsterSqliteStorage):
    """As Dagster's own, and configured alike: `base_dir`."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)  # creates what is missing
        self._run_storage = _Runs(self._run_storage._conn_string)
        self._schedule_storage = _Schedules(self._schedule_storage._conn_string)
        self._event_log_storage = _Events(self._event_log_storage._base_dir)

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "KeptSqliteStorage":
        return cls.from_local(inst_data=inst_data, **config_value)


class _Runs(SqliteRunStorage):
    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with _engine(self._conn_string).begin() as connection:
            yield connection


class _Schedules(SqliteScheduleStorage):
    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with _engine(self._conn_string).begin() as connection:
            yield connection


class _Events(SqliteEventLogStorage):
    def has_table(self, table_name: str) -> bool:
        with _engine(self.conn_string_for_shard(INDEX_SHARD_NAME)).connect() as connection:
            return connection.dialect.has_table(connection, table_name)

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            engine = _engine(self.conn_string_for_shard(shard), syncs=shard == INDEX_SHARD_NAME)
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.begin() as connection:
                yield connection

    def store_event(self, event: EventLogEntry) -> None:
        super().store_event(event)
        # Whoever watches a run in the UI is told when its file changes, not when the file's write-ahead log does.
        os.utime(self.path_for_shard(event.run_id))


def _engine(url: str, *, syncs: bool = True) -> Engine:
    return _engine_of_process(os.getpid(), url, syncs)


@lru_cache(maxsize=FILES_KEPT)
def _engine_of_process(process: int, url: str, syncs: bool) -> Engine:
    """`process`: a fork must not use its parent's connections."""
    del process
    timeout = {"timeout": SQLITE_BUSY_TIMEOUT_SECONDS}
    # Each use of a connection commits or rolls back itself.
    engine = create_engine(url, max_overflow=-1, pool_reset_on_return=None, connect_args=timeout)
    if not syncs:
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = NORMAL"))
    return engine
