"""How DAGSTER_HOME grows under a week of flushing, with and without housekeeping: `python -m benchmarks.history`.

A simulated day is a number of real runs of the job `flush`, each over one record, on Dagster's own storage (SQLite). After
each day housekeeping runs as it would after a real one: whatever is older than the two newest days goes.
"""

import argparse
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

DAYS = 7
KEYS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-per-day", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for keep_days in (None, 2):
            home = Path(directory) / f"keep-{keep_days}"
            sizes = week(home, arguments.runs_per_day, keep_days)
            runs = arguments.runs_per_day * DAYS
            growth = (sizes[-1] - sizes[2]) / (arguments.runs_per_day * (DAYS - 2)) * 1000
            name = "no housekeeping" if keep_days is None else f"housekeeping, {keep_days} days kept"
            print(f"{name}: after each day {', '.join(f'{size / 1e6:.1f}' for size in sizes[1:])} MB")
            print(f"  after {runs} runs {_files(home)} files; days 3 to {DAYS}: {growth / 1e6:+.1f} MB per 1,000 runs")


def week(home: Path, runs_per_day: int, keep_days: int | None) -> list[int]:
    """Bytes under DAGSTER_HOME at the start and after each day."""
    import dagster as dg

    from d2p_pipeline.buffer.embedded import EmbeddedRedis
    from d2p_pipeline.cli.supervise import dagster_home
    from d2p_pipeline.ingest.generator import generate
    from d2p_pipeline.orchestration.housekeeping import prune, shown_runs

    dagster = dagster_home(home)
    with (
        EmbeddedRedis(home / "redis", durable=False) as redis,
        dg.DagsterInstance.from_config(str(dagster)) as instance,
    ):
        os.environ.update({"D2P_REDIS_URL": redis.url, "D2P_WRITER_FILE_PATH": str(home / "out")})
        sizes, starts = [_bytes(dagster)], list[datetime]()
        for day in range(DAYS):
            starts.append(datetime.now(UTC))
            for line in generate(runs_per_day, seed=day, keys=KEYS):
                flush_one(instance, redis.url, line)
            if keep_days is not None and day >= keep_days:
                before = starts[day - keep_days + 1]
                prune(instance, shown_runs(instance), before=before, failed_before=before, most=1_000_000)
            sizes.append(_bytes(dagster))
    return sizes


def flush_one(instance: object, redis_url: str, line: bytes) -> None:
    """One record, one run."""
    from redis import Redis

    from d2p_pipeline.definitions import defs
    from d2p_pipeline.ingest.generator import capability_of

    with Redis.from_url(redis_url) as client:
        client.rpush(f"data:{{{capability_of(line)}}}", line)
    result = defs.resolve_job_def("flush").execute_in_process(instance=instance)  # pyright: ignore[reportArgumentType]
    assert result.success


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _files(home: Path) -> int:
    return sum(path.is_file() for path in (home / "dagster").rglob("*"))


if __name__ == "__main__":
    main()
