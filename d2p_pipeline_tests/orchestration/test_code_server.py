"""The process that runs are forked from: it holds nothing that a fork would share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dagster._grpc.server import DagsterApiServer

LOOK = """
import json, sys, threading
from pathlib import Path
import d2p_pipeline.orchestration.preloaded
process = Path("/proc/self")
print(json.dumps({
    "imported": [name for name in ("dagster._daemon.controller", "polars", "pyarrow.parquet") if name in sys.modules],
    "open": [str(file.readlink()) for file in process.joinpath("fd").iterdir() if file.is_symlink() and int(file.name) > 2],
    "threads": threading.active_count(),
    "native": sorted({thread.joinpath("comm").read_text().strip() for thread in process.joinpath("task").iterdir()}),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_runs_are_forked_from_has_imports_and_neither_threads_nor_connections() -> None:
    said = json.loads(subprocess.run([sys.executable, "-c", LOOK], check=True, capture_output=True, text=True).stdout)
    assert len(said["imported"]) == 3
    assert [name for name in said["open"] if "socket:" in name or name.endswith((".db", ".sock"))] == []
    assert said["threads"] == 1
    native = {name for name in said["native"] if not name.startswith("python")}
    # jemalloc knows of forks; Polars' thread tidies what was spilled to disk, which nothing has been.
    assert native <= {"jemalloc_bg_thd", "polars-ooc-clea"}


def test_dagster_still_starts_runs_where_the_code_server_says() -> None:
    assert "_mp_ctx" in DagsterApiServer.StartRun.__code__.co_names


def test_storage_that_cannot_be_used_is_named_with_its_settings(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("no directory")
    (tmp_path / "dagster.yaml").write_text(f"storage: {{sqlite: {{base_dir: {tmp_path / 'storage'}}}}}")
    command = [sys.executable, "-m", "d2p_pipeline.orchestration.code_server", "--socket", str(tmp_path / "socket")]
    ended = subprocess.run(command, env=os.environ | {"DAGSTER_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode
    assert str(tmp_path / "storage") in ended.stderr
    assert "look at dagster_postgres_url" in ended.stderr
