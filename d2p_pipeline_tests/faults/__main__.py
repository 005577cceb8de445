"""Schedules of faults one after the other: `python -m d2p_pipeline_tests.faults FIRST COUNT`. A line of JSON for each, and the
totals at the end; `--jobs` of them at a time. With `--real` each is a minute of the whole system instead; with `--hours` the
first alone, for so long, and a report.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import msgspec

from d2p_pipeline_tests.faults.books import Books
from d2p_pipeline_tests.faults.schedule import schedule
from d2p_pipeline_tests.faults.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m d2p_pipeline_tests.faults", description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=1, help="seed of the first schedule (default: 1)")
    parser.add_argument("count", type=int, nargs="?", default=200, help="how many schedules (default: 200)")
    parser.add_argument("--real", action="store_true", help="d2p up as a whole, a minute for each seed")
    parser.add_argument("--hours", type=float, help="d2p up as a whole under load for so long, and a report")
    parser.add_argument("--report", type=Path, default=Path("out/soak"), help="directory for it (default: out/soak)")
    parser.add_argument("--jobs", type=int, default=2, help="schedules at a time (default: 2)")
    parser.add_argument("--every", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hours:
        return soak(options.first, options.hours * 3600, options.report)
    if options.real:
        return sum(soak(seed, REAL_SECONDS) for seed in range(options.first, options.first + options.count)) > 0
    if options.jobs > 1:
        return in_parallel(options.first, options.count, options.jobs)
    return one_by_one(range(options.first, options.first + options.count, options.every))


REAL_SECONDS = 60


def soak(seed: int, seconds: float, report: Path | None = None) -> int:
    """The whole system; 1 where its books do not balance."""
    from d2p_pipeline_tests.faults import real

    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
        course = real.run(seed, seconds, Path(directory), partial(print, file=sys.stderr, flush=True))
    print(msgspec.json.encode(course.books).decode(), flush=True)
    if report:
        from d2p_pipeline_tests.faults.report import write

        print(write(course, report))
    return not course.books.balance


def one_by_one(seeds: range) -> int:
    """Schedules in this process; worlds are kept from one to the next."""
    failed, worlds = 0, dict[str, World]()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as directory:
        try:
            for seed in seeds:
                failed += not run(seed, worlds, Path(directory))
        finally:
            for world in worlds.values():
                world.close()
    return failed > 0


def run(seed: int, worlds: dict[str, World], directory: Path) -> bool:
    """Whether the books of a schedule balance."""
    course = schedule(seed)
    if course.server not in worlds:
        place = directory / f"{course.server}-{seed}"
        place.mkdir()
        worlds[course.server] = World(place, course.server)
    world = worlds[course.server]
    try:
        books = world.run(course)
    except Exception:  # noqa: BLE001  # the other schedules are to run
        print(f"seed {seed}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        worlds.pop(course.server).close()
    else:
        print(msgspec.json.encode(books).decode(), flush=True)
        if books.balance:
            return True
    log = world.directory / f"runs-{seed}.log"
    print(log.read_text(errors="replace")[-20000:] if log.exists() else "", file=sys.stderr, flush=True)
    return False


def in_parallel(first: int, count: int, jobs: int) -> int:
    """Every `jobs`-th schedule in a process of its own."""
    command = [sys.executable, "-m", "d2p_pipeline_tests.faults", "--jobs", "1", "--every", str(jobs)]
    workers = [
        subprocess.Popen([*command, str(first + job), str(count - job)], stdout=subprocess.PIPE, text=True)
        for job in range(min(jobs, count))
    ]
    found: list[Books] = []
    writing = threading.Lock()

    def listen(worker: "subprocess.Popen[str]") -> None:
        assert worker.stdout
        for line in worker.stdout:
            with writing:
                found.append(Books(**msgspec.json.decode(line)))
                print(line, end="", flush=True)

    readers = [threading.Thread(target=listen, args=(worker,)) for worker in workers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    codes = [worker.wait() for worker in workers]
    print(totals(found, count))
    return any(codes) or len(found) != count


def totals(found: list[Books], count: int) -> str:
    """All schedules together."""
    struck = sum((Counter(books.struck) for books in found), Counter[str]())
    numbers = {
        "schedules": count,
        "balanced": sum(books.balance for books in found),
        **{
            name: sum(getattr(books, name) for books in found)
            for name in ("accepted", "refused", "unknown", "rows", "dead_letters", "runs")
        },
        **{
            name: sum(len(getattr(books, name)) for books in found)
            for name in ("lost", "doubled", "refused_but_there", "invented", "out_of_order")
        },
        "faults": struck.total(),
        "struck": dict(sorted(struck.items())),
        "seconds": round(sum(books.seconds for books in found)),
    }
    return msgspec.json.encode({"totals": numbers}).decode()


if __name__ == "__main__":
    sys.exit(main())
