"""Dagster's storage in PostgreSQL, with connections kept open; dagster.yaml names it where `dagster_postgres_url` is given.

Dagster opens a connection for every event otherwise, except in its webserver. Needs the extra `postgres`.
"""

import re
from collections.abc import Mapping
from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import pg_url_from_config

STATEMENT_TIMEOUT_MS = 300_000
RECYCLE_SECONDS = 3600
MOST_CONNECTIONS = 10
"""Beyond the one kept open, per process and storage (runs, events, schedules)."""


class PooledPostgresStorage(DagsterPostgresStorage):
    """As Dagster's own, and configured alike: `postgres_url` or `postgres_db`."""

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "PooledPostgresStorage":
        storage = cls(
            postgres_url=with_driver(pg_url_from_config(config_value)),
            should_autocreate_tables=config_value.get("should_autocreate_tables", True),
            inst_data=inst_data,
        )
        for part in (storage._run_storage, storage._event_log_storage, storage._schedule_storage):
            part.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MOST_CONNECTIONS)
        return storage


def with_driver(url: str) -> str:
    """SQLAlchemy 2.1 reads `postgresql://` as psycopg 3; what dagster-postgres brings is psycopg2."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)
