"""Dagster's storage in a real PostgreSQL, configured as `d2p up` does it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from d2p_pipeline.cli.supervise import dagster_home
from d2p_pipeline.orchestration.housekeeping import prune, shown_runs
from d2p_pipeline.orchestration.postgres import with_driver
from d2p_pipeline_tests.pipeline import Pipeline, line

needs_postgres = pytest.mark.skipif(
    not (shutil.which("initdb") and shutil.which("postgres")), reason="no PostgreSQL server on PATH"
)


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A server on a Unix socket in a directory of its own; PostgreSQL refuses to run as root."""
    user = "nobody" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        if user:
            shutil.chown(directory, user)
        data = Path(directory) / "data"
        quiet = {"user": user, "cwd": directory, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["initdb", "-D", data, "-U", "d2p", "-A", "trust", "--no-sync"], check=True, **quiet)
        options = f"-c listen_addresses= -c fsync=off -k {directory}"
        subprocess.run(
            ["pg_ctl", "-D", data, "-w", "-l", f"{directory}/log", "-o", options, "start"], check=True, **quiet
        )
        try:
            yield f"postgresql://d2p@/postgres?host={directory}"
        finally:
            subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, **quiet)


@needs_postgres
def test_a_flush_is_stored_in_postgresql_and_pruned_from_it(
    pipeline: Pipeline, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_DAGSTER_POSTGRES_URL", postgres_url)
    home = dagster_home(tmp_path, postgres=True)
    with dg.DagsterInstance.from_config(str(home)) as pipeline.instance:
        delivered: list[str] = []
        for number in range(2):
            pipeline.receive([line("payments", str(number))], name=str(number))
            result = pipeline.flush()
            assert result.success
            delivered.append(result.run_id)
        assert prune(
            pipeline.instance,
            shown_runs(pipeline.instance),
            before=datetime.now(UTC),
            failed_before=datetime.now(UTC),
            most=1000,
        ).deleted
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert [run.run_id for run in instance.get_runs()] == delivered[1:]
        assert instance.get_dynamic_partitions("keys") == ["payments"]
        assert len(instance.all_logs(delivered[1], of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)) == 1
    assert not list(home.rglob("*.db"))


def test_urls_name_the_driver_that_is_installed() -> None:
    for written in ("postgresql://u@h/d", "postgres://u@h/d", "postgresql+psycopg2://u@h/d"):
        assert with_driver(written) == "postgresql+psycopg2://u@h/d"


def test_a_dagster_yaml_of_ones_own_is_kept(tmp_path: Path) -> None:
    configuration = dagster_home(tmp_path) / "dagster.yaml"
    shipped = configuration.read_text()
    dagster_home(tmp_path, postgres=True)
    assert configuration.read_text() != shipped
    dagster_home(tmp_path)
    assert configuration.read_text() == shipped
    configuration.write_text("telemetry:\n  enabled: false\n")
    dagster_home(tmp_path, postgres=True)
    assert configuration.read_text() == "telemetry:\n  enabled: false\n"
