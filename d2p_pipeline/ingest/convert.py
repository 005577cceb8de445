"""Files and standard input become Parquet, on all cores, without Redis and Dagster.

    cut       this process finds where the inputs' blocks begin and end (documents.py)
    name      a block's batch id is the hash of its content, its unit how many equal blocks came before it in this run
    convert   workers (workers.py) read, parse, validate, encode and write (task.py), with the functions of a Dagster run

Blocks never span inputs, and names come from content, so that converting an input again, alone or among others, overwrites
its own files. A worker has one block at a time and one more is cut, so `memory_needed` is enough for inputs of any size.
"""

import contextlib
import io
import os
import stat
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from d2p_pipeline.ingest.documents import Content, ForeignError, Range, Readable, blocks, ranges
from d2p_pipeline.ingest.task import Converter, Failure, Outcome, Plan, Result, Task, Text, get_ready, keep_memory
from d2p_pipeline.ingest.workers import Worker, WorkerDiedError, Workers

STDIN = "-"


@dataclass
class Summary:
    """What became of the inputs: records = rows + dead letters + dropped. bytes_in are counted after decompression."""

    inputs: int = 0
    empty: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Inputs that could not be read, or not to their end, and why."""
    stopped: str | None = None
    """Why the run ended before its inputs did."""
    records: int = 0
    rows: int = 0
    dropped: int = 0
    """Good records that the user's function left out."""
    reasons: Counter[str] = field(default_factory=Counter[str])
    """Dead letters by reason, without the values that differ from record to record."""
    files: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    @property
    def dead_letters(self) -> int:
        return self.reasons.total()


def convert(
    names: Sequence[str],
    plan: Plan,
    *,
    jobs: int = 1,
    block_bytes: int = 16 << 20,
    on_progress: Callable[[int], None] = lambda taken: None,
    workers: Workers | None = None,
) -> Summary:
    """Convert the named inputs (`-` is standard input). `on_progress` is told how many more bytes of them are done.
    `workers` are at least `jobs`; without them some are started if `jobs` are more than one, and so are the blocks.

    What is wrong with an input is in the summary, and so is what ended the run early; the files of the others are there.
    """
    summary = Summary(inputs=len(names))
    began = time.monotonic()
    tasks = _tasks(names, plan, block_bytes, summary)
    keep_memory()
    try:
        with contextlib.closing(_results(tasks, plan, jobs, workers)) as results:
            for task, result in results:
                _account(summary, task, result)
                on_progress(task.taken)
    except WorkerDiedError as error:
        summary.stopped = str(error)
    summary.seconds = time.monotonic() - began
    return summary


def block_for(memory_limit: int) -> int:
    """Bytes of a block. They depend on the limit alone: so do the files, whatever the number of jobs."""
    return min(max(memory_limit // 64, 1 << 20), 32 << 20)


def memory_needed(jobs: int, block_bytes: int) -> int:
    """Bytes that this process and `jobs` workers take at most, where no record is longer than a block. Measured."""
    return (100 << 20) + 4 * block_bytes + jobs * ((72 << 20) + 6 * block_bytes)


_Work = tuple[Task, Text]


def _account(summary: Summary, task: Task, result: Outcome | Failure) -> None:
    if isinstance(result, Outcome):
        summary.records += result.records
        summary.rows += result.rows
        summary.dropped += result.dropped
        for reason, count in result.reasons.items():
            known = reason in summary.reasons or len(summary.reasons) < _MOST_REASONS
            summary.reasons[reason if known else "other reasons"] += count
        summary.files += result.files
        summary.bytes_in += task.size
        summary.bytes_out += result.size
    elif result.fatal:
        summary.stopped = summary.stopped or result.reason
    else:
        summary.failed.setdefault(task.name, result.reason)


# Different reasons that are counted; were they endless, so would be the memory.
_MOST_REASONS = 1000


# --- cutting

# Names that mean something else to another process.
_OWN = (STDIN, "/dev/stdin", "/dev/fd/", "/proc/")


def _tasks(names: Sequence[str], plan: Plan, block_bytes: int, summary: Summary) -> Iterator[_Work]:
    """Every block of every input, in order; without its text where its range tells enough."""
    for name in names:
        try:
            with _opened(name) as file:
                content = Content(file)
                status = os.fstat(file.fileno())
                is_file = stat.S_ISREG(status.st_mode)
                received_at = status.st_mtime_ns // 1_000_000 if is_file else time.time_ns() // 1_000_000
                taken = 0
                cut = ranges if is_file and not name.startswith(_OWN) and not content.compressed else blocks
                for block in cut(content, block_bytes, plan.max_record_bytes):
                    range_ = block if isinstance(block, Range) else None
                    task = Task(name, range_, block.size, block.breaks, received_at, content.taken - taken)
                    taken = content.taken
                    yield task, b"" if isinstance(block, Range) else block.text
                    if summary.stopped:
                        return
                summary.empty += content.offset == 0
                if content.damage:
                    summary.failed[name] = content.damage
        except ForeignError as error:
            summary.failed[name] = str(error)
        except OSError as error:
            summary.failed[name] = f"it cannot be read: {error.strerror}"


def _opened(name: str) -> contextlib.AbstractContextManager[Readable]:
    if name == STDIN:
        return contextlib.nullcontext(io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)))
    return Path(name).open("rb", buffering=0)


# --- handing out


def _results(tasks: Iterator[_Work], plan: Plan, jobs: int, workers: Workers | None) -> Generator[Result]:
    """The result of every task, as they come; in this process if there is nobody else, or one task only."""
    if workers is None and jobs > 1:
        first = list(islice(tasks, 2))
        tasks = chain(first, tasks)
        workers = Workers(jobs) if len(first) > 1 else None
    return _from_workers(tasks, plan, jobs, workers) if workers else _from_here(tasks, plan)


def _from_here(work: Iterator[_Work], plan: Plan) -> Generator[Result]:
    get_ready()
    told: deque[Task] = deque()
    seen: Counter[str] = Counter()

    def number(batch: str) -> Callable[[], int]:
        seen[batch] += 1
        return lambda: seen[batch] - 1

    with Converter(plan) as converter:
        for task, text in work:
            told.append(task)
            if result := converter.convert(task, text, number):
                yield told.popleft(), result
        while result := converter.settle():
            yield told.popleft(), result


def _from_workers(work: Iterator[_Work], plan: Plan, jobs: int, workers: Workers) -> Generator[Result]:
    told: list[Worker] = []
    with workers:
        for task, text in work:
            if len(told) < jobs and all(worker.asked for worker in told):
                told.append(workers.one(plan))
            while all(worker.asked for worker in told):
                yield from workers.answers(told)
            workers.convert(next(worker for worker in told if not worker.asked), task, text)
        while unsettled := [worker for worker in told if worker.tasks]:
            for worker in unsettled:
                if not worker.asked:
                    worker.settle()
            yield from workers.answers(told)
