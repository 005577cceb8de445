"""The flush job on a real Redis and a real directory, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.protocol import BatchRef, Push
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest.commit import Request, pushes
from d2p_pipeline.records.normalize import Normalizer
from d2p_pipeline.records.rules import Rules

if TYPE_CHECKING:
    import dagster as dg
    from sqlalchemy import Engine


def line(key: str = "payments", message: str = "m", time: str = "2026-11-21T10:30:00Z", **fields: Any) -> bytes:
    record = {
        "time": time,
        "level": "info",
        "message": message,
        "business-capability": key,
        "business-domain": "d",
        "business-service": "s",
        "application-service": "a",
        **fields,
    }
    return json.dumps(record).encode()


@dataclass
class Pipeline:
    """What a test pushes, runs and reads back."""

    buffer: RedisBuffer
    root: Path
    instance: dg.DagsterInstance

    def receive(self, lines: Sequence[bytes], name: str = "push") -> None:
        """What the receiver does with good lines."""
        normalizer, request = Normalizer(Rules()), Request()
        for line in lines:
            canonical = normalizer.canonical(line)
            request.lines.setdefault(canonical.key, []).append(canonical.line)
        self.push(list(pushes([request], name, 60, keep_dead_letters=True)))

    def push(self, some: Sequence[Push]) -> None:
        self.buffer.push(some)

    def flush(self, *refs: BatchRef, **config: Any) -> dg.ExecuteInProcessResult:
        from d2p_pipeline.definitions import defs

        if refs:
            config["batches"] = [{"key": ref.key, "id": ref.id} for ref in refs]
        return defs.resolve_job_def("flush").execute_in_process(
            instance=self.instance,
            run_config={"ops": {"plan_units": {"config": config}}} if config else None,
            raise_on_error=False,
        )

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.parquet"))

    def rows(self, query: str = "SELECT * FROM files") -> list[tuple[Any, ...]]:
        """DuckDB over all files, as the view `files`."""
        if not self.files():
            return []
        import duckdb

        connection = duckdb.connect()
        options = "hive_partitioning = true, union_by_name = true"
        connection.execute(f"CREATE VIEW files AS SELECT * FROM read_parquet('{self.root}/**/*.parquet', {options})")
        return connection.execute(query).fetchall()

    def messages(self) -> list[str]:
        return sorted(message for (message,) in self.rows("SELECT message FROM files"))


def _engine_of_one_connection(url: str, **_: Any) -> Engine:
    import sqlalchemy
    from sqlalchemy.pool import StaticPool

    return sqlalchemy.create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})


@pytest.fixture
def pipeline(
    redis_buffer: RedisBuffer, redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pipeline]:
    import dagster as dg

    from d2p_pipeline.orchestration import sensor

    root = tmp_path / "files"
    settings = {"REDIS_URL": redis_server.url, "WRITER_FILE_PATH": str(root), "BUFFER_SIZE": "100"}
    for name, value in settings.items():
        monkeypatch.setenv(f"D2P_{name}", value)
    for storage in ("event_log", "runs"):
        in_memory = f"dagster._core.storage.{storage}.in_memory"
        # Nobody migrates what is in memory, and Alembic takes longer than all else; next comes a connection per statement.
        monkeypatch.setattr(f"{in_memory}.stamp_alembic_rev", lambda config, connection: None)
        monkeypatch.setattr(f"{in_memory}.create_engine", _engine_of_one_connection)
    # The job has read its setting already.
    monkeypatch.setattr(dg.RetryPolicy, "calculate_delay", lambda policy, attempt: 0.05)
    sensor.parts.cache_clear()
    with dg.DagsterInstance.ephemeral() as instance:
        yield Pipeline(redis_buffer, root, instance)
    sensor.parts.cache_clear()
