"""Runs as Celery tasks, with the files of deploy/celery: two workers, one run killed, one stuck, one terminated; nothing lost."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.system import System, until

pytest.importorskip("dagster_celery", reason="the extra celery is not installed")

pytestmark = pytest.mark.timeout(600)

DEPLOY = Path(__file__).parents[2] / "deploy" / "celery"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    gate = tmp_path / "gate" / "closed"
    gate.parent.mkdir()
    gate.touch()
    return gate


@pytest.fixture
def workers() -> list["subprocess.Popen[bytes]"]:
    """Filled by `system`."""
    return []


@pytest.fixture
def system(
    tmp_path: Path, gate: Path, workers: list["subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> Iterator[System]:
    """`d2p up` with Celery's launcher, and two workers of two processes each."""
    with EmbeddedRedis(tmp_path / "redis", durable=False) as server:
        home = tmp_path / "home" / "dagster"
        home.mkdir(parents=True)
        (home / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
        for name, value in {
            "CELERY_REDIS_URL": server.url.replace("unix://", "redis+socket://"),
            "GATE": str(gate),
            "PYTHONPATH": str(DEPLOY),
            "DAGSTER_HOME": str(home),
        }.items():
            monkeypatch.setenv(name, value)
        settings = {
            "redis_url": server.url,
            "home": str(home.parent),
            "writer_file_path": str(tmp_path / "out"),
            "buffer_size": "2",
            "redis_lock_ttl": "2",
            "transform": "d2p_pipeline_tests.e2e.gate:pass_gate",
        }
        system = System(tmp_path, **settings)
        environment = os.environ | {f"D2P_{name.upper()}": value for name, value in settings.items()}
        workers += [start_worker(name, tmp_path, environment) for name in ("one", "two")]
        try:
            yield system.wait()
        finally:
            gate.unlink(missing_ok=True)
            system.stop()
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def start_worker(name: str, directory: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "celery", "-A", "dagster_celery.app", "worker", "--concurrency", "2"]
    command += ["--hostname", f"{name}@%h", "--loglevel", "INFO"]
    with (directory / f"worker-{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True)


def arrived(gate: Path) -> dict[str, int]:
    """Which process has which key."""
    return {key: int(process) for key, _, process in (path.name.rpartition("-") for path in gate.parent.glob("k*-*"))}


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().split()[3])


def runs_of(system: System, key: str) -> list[dict[str, str]]:
    """Newest first."""
    runs = f'runsOrError(filter: {{tags: [{{key: "d2p/key", value: "{key}"}}]}})'
    found = system.graphql(f"{{{runs} {{... on Runs {{results {{runId status}}}}}}}}")
    return found["runsOrError"]["results"]


def test_what_a_killed_a_stuck_and_a_terminated_run_and_a_killed_worker_held_is_delivered_once_by_others(
    system: System, workers: list["subprocess.Popen[bytes]"], gate: Path, tmp_path: Path
) -> None:
    keys = [f"k-{number}" for number in range(4)]
    for key in keys:
        system.post(line(key, f"{key} 1"), line(key, f"{key} 2"))
    # Four runs at once, in the processes of two workers.
    held = until(lambda: (found := arrived(gate)).keys() == set(keys) and found)
    assert len(set(held.values())) == 4
    killed, stuck = (key for key in keys if parent_of(held[key]) == workers[0].pid)
    terminated, lost = (key for key in keys if parent_of(held[key]) == workers[1].pid)
    os.kill(held[killed], signal.SIGKILL)
    os.kill(held[stuck], signal.SIGSTOP)
    run = runs_of(system, terminated)[0]["runId"]
    answer = system.graphql(f'mutation {{terminateRun(runId: "{run}") {{__typename}}}}')
    assert answer["terminateRun"]["__typename"] == "TerminateRunSuccess"
    until(lambda: runs_of(system, terminated)[-1]["status"] in ("CANCELED", "FAILURE"))
    assert runs_of(system, lost)[-1]["status"] == "STARTED"
    os.killpg(workers[1].pid, signal.SIGKILL)  # all of it, as when its host is gone
    gate.unlink()
    messages = sorted(f"{key} {number}" for key in keys for number in (1, 2))
    until(lambda: system.messages() == messages)
    os.kill(held[stuck], signal.SIGCONT)  # it comes too late, and may change nothing
    with Redis.from_url(f"unix://{tmp_path / 'redis' / 'redis.sock'}") as client:
        until(lambda: not client.zcard("batches"))
        rows = [int(client.hget(f"totals:{{{key}}}", "rows") or 0) for key in keys]
    assert rows == [2, 2, 2, 2]
    assert system.messages() == messages
