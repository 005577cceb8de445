"""What a second Celery worker brings: `python -m benchmarks.celery_workers`, with the files of deploy/celery.

The same backlog is drained by one worker of one process and by two, from the request to flush to the last acknowledgement.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[1] / "deploy" / "celery"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.celery_workers", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    figures: dict[str, Any] = {"records": options.records, "keys": options.keys}
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as directory:
            seconds, cpu = _drain(Path(directory), workers, options.records, options.keys)
        figures[f"{workers} workers: records/s, CPU s of workers"] = [round(options.records / seconds), round(cpu, 1)]
    print(json.dumps(figures, indent=2))


def _drain(directory: Path, workers: int, records: int, keys: int) -> tuple[float, float]:
    import psutil

    from benchmarks.end_to_end import free_port
    from benchmarks.scale_fill import CHUNK
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.embedded import EmbeddedRedis
    from d2p_pipeline.settings import load

    home = directory / "home" / "dagster"
    home.mkdir(parents=True)
    (home / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
    with EmbeddedRedis(directory / "redis", durable=False) as server, ExitStack() as stack:
        os.environ |= {
            "CELERY_REDIS_URL": server.url.replace("unix://", "redis+socket://"),
            "PYTHONPATH": f"{DEPLOY}:{Path.cwd()}",
            "DAGSTER_HOME": str(home),
            "D2P_REDIS_URL": server.url,
            "D2P_HOME": str(home.parent),
            "D2P_WRITER_FILE_PATH": str(directory / "out"),
            "D2P_FLUSH_INTERVAL": "3600",
            "D2P_BUFFER_SIZE": "1000000000",
            "D2P_FLUSH_BYTES": "1000000000000",
        }
        up = ["d2p_pipeline.cli.main", "up", "--port", str(free_port()), "--dagster-port", str(free_port())]
        _start(stack, directory / "up.log", "Ctrl-C ends all", *up)
        celery = ["celery", "-A", "dagster_celery.app", "worker", "--concurrency", "1", "--loglevel", "INFO"]
        processes = [
            psutil.Process(
                _start(stack, directory / f"{number}.log", "ready.", *celery, "--hostname", f"{number}@%h").pid
            )
            for number in range(workers)
        ]
        buffer, _ = wiring.open_buffer(load())

        def drained(each: int) -> float:
            waiting = sum(totals.rows for _, totals in buffer.totals()) + each * keys
            for number in range(keys):
                subprocess.run([sys.executable, "-m", "benchmarks.scale_fill", f"key {number}", str(each)], check=True)
            buffer.request_flush()
            began = time.monotonic()
            while sum(totals.rows for _, totals in buffer.totals()) < waiting:
                time.sleep(0.2)
            return time.monotonic() - began

        drained(CHUNK)  # workers that have done something are warm
        before = _cpu(processes)
        return drained(records // keys // CHUNK * CHUNK), _cpu(processes) - before


def _cpu(processes: list[Any]) -> float:
    times = [one.cpu_times() for process in processes for one in [process, *process.children(recursive=True)]]
    return sum(found.user + found.system for found in times)


def _start(stack: ExitStack, log: Path, ready: str, *module: str) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    stack.callback(end)
    while ready not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    return process


if __name__ == "__main__":
    main()
