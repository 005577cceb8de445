"""Files and standard input become Parquet, on all cores, without Redis and Dagster.

    cut       this process reads the inputs and cuts them into blocks (documents.py)
    name      a block's batch id is the hash of its content, its unit how many equal blocks came before it in this run
    convert   workers parse, validate, encode and write, with the same functions as a Dagster run

Blocks never span inputs, and names come from content, so that converting an input again, alone or among others, overwrites
its own files. A worker has one block at a time and one more is cut, so `memory_needed` is enough for inputs of any size.
Workers are processes, forked from one that has imported everything: a library takes only its own worker down, and what is
decided in Python, record by record, has all cores too. A worker that is told nothing more, whatever became of this process,
ends after its block: no file is left partial.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import xxhash

from d2p_pipeline.ingest.documents import ZSTD_MAGICS, Block, Break, Content, ForeignError, Readable, blocks, too_long
from d2p_pipeline.parquet.errors import StoreError

# What parses and encodes is imported where blocks are converted: its import costs more than a small input.
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from d2p_pipeline.parquet.encode import Encoding
    from d2p_pipeline.parquet.store import Store
    from d2p_pipeline.records.rules import Rules
    from d2p_pipeline.records.shape import Shapes

STDIN = "-"
DEAD_LETTERS = "_dead_letters"
"""Directory for dead letters below the root; readers of Parquet pass over names that begin with `_`."""


@dataclass(frozen=True)
class Plan:
    """How blocks are converted. Goes to the workers."""

    rules: "Rules"
    encoding: "Encoding"
    store: "Store"
    by_ingest_time: bool = False
    """Rows lie in the hour their input was last modified, or was read if it is no file; else in that of their `time`."""
    use_hash: bool = False
    keep_dead_letters: bool = True
    max_record_bytes: int = 16 << 20


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
    workers: "Workers | None" = None,
) -> Summary:
    """Convert the named inputs (`-` is standard input). `on_progress` is told how many more bytes of them are done.
    `workers`, at least `jobs`, are started here if there are none yet and more than one block is to be converted.

    What is wrong with an input is in the summary, and so is what ended the run early; the files of the others are there.
    """
    summary = Summary(inputs=len(names))
    began = time.monotonic()
    tasks = _tasks(names, plan, block_bytes, summary, ranges=jobs > 1)
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
    return min(max(memory_limit // 56, 1 << 20), 32 << 20)


def memory_needed(jobs: int, block_bytes: int) -> int:
    """Bytes that this process and `jobs` workers take at most, where no record is longer than a block. Measured."""
    return (100 << 20) + 4 * block_bytes + jobs * ((72 << 20) + 6 * block_bytes)


class WorkerDiedError(Exception):
    """A worker ended that should not have: killed, or by an error that it printed."""

    def __init__(self, name: str, status: int) -> None:
        cause = f"signal {-status}, perhaps for want of memory" if status < 0 else f"exit code {status}"
        super().__init__(f"the worker that converted a part of {name} ended with {cause}")


class _ChangedError(Exception):
    """An input is not what it was a moment ago."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A block to convert. Its text, `size` bytes, lies at `offset` of the input's file, or is handed over beside the task.

    `received_at` is in ms since the epoch; `taken` are the bytes of the input it was made of, compressed ones maybe.
    """

    name: str
    offset: int | None
    size: int
    breaks: tuple[Break, ...]
    digest: str
    unit: int
    received_at: int
    taken: int

    @property
    def batch(self) -> str:
        # The letter tells it from the ids of sealed batches, which begin with a digit.
        return f"x{self.digest}"


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a block."""

    records: int
    rows: int
    dropped: int
    reasons: Counter[str]
    files: int
    size: int


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why nothing became of a block. `fatal`: nor would anything become of the others."""

    reason: str
    fatal: bool


_Text = bytes | memoryview
_Work = tuple[_Task, _Text]
_Result = tuple[_Task, _Outcome | _Failure]


def _account(summary: Summary, task: _Task, result: _Outcome | _Failure) -> None:
    if isinstance(result, _Outcome):
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


def _tasks(names: Sequence[str], plan: Plan, block_bytes: int, summary: Summary, *, ranges: bool) -> Iterator[_Work]:
    """Every block of every input, in order; without its text where `ranges` is set and the range tells enough."""
    seen: Counter[str] = Counter()
    for name in names:
        try:
            with _opened(name) as file:
                content = Content(file)
                status = os.fstat(file.fileno())
                is_file = stat.S_ISREG(status.st_mode)
                received_at = status.st_mtime_ns // 1_000_000 if is_file else time.time_ns() // 1_000_000
                taken = 0
                for block in blocks(content, block_bytes, plan.max_record_bytes):
                    digest = _digest(block)
                    by_range = ranges and is_file and not content.compressed and block.offset is not None
                    task = _Task(
                        name=name,
                        offset=block.offset if by_range else None,
                        size=len(block.text),
                        breaks=block.breaks,
                        digest=digest,
                        unit=seen[digest],
                        received_at=received_at,
                        taken=content.taken - taken,
                    )
                    seen[digest] += 1
                    taken = content.taken
                    yield task, b"" if by_range else block.text
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


def _digest(block: Block) -> str:
    content = xxhash.xxh3_128(block.text)
    for broken in block.breaks:
        content.update(broken.raw)
    return content.hexdigest()


# --- handing out


def _results(tasks: Iterator[_Work], plan: Plan, jobs: int, workers: "Workers | None") -> Generator[_Result]:
    """The result of every task, as they come; in this process if there is one job or one task only."""
    first = list(islice(tasks, 2 if jobs > 1 else 0))
    work = chain(first, tasks)
    if len(first) > 1:
        return _from_workers(work, plan, jobs, workers or Workers(jobs))
    return _from_here(work, plan)


def _from_here(work: Iterator[_Work], plan: Plan) -> Generator[_Result]:
    _get_ready()
    told: deque[_Task] = deque()
    with _Converter(plan) as converter:
        for task, text in work:
            told.append(task)
            if result := converter.convert(task, text):
                yield told.popleft(), result
        while result := converter.settle():
            yield told.popleft(), result


def _from_workers(work: Iterator[_Work], plan: Plan, jobs: int, workers: "Workers") -> Generator[_Result]:
    told: list[_Worker] = []
    with workers:
        for task, text in work:
            # A task that is only named lies ready while the one before it is done; a text would keep this process waiting.
            most = 1 if task.offset is None else 2
            if len(told) < jobs and all(worker.asked for worker in told):
                told.append(workers.one(plan))
            while (least := min(told, key=lambda worker: worker.asked)).asked >= most:
                yield from workers.answers(told)
            least.convert(task, text)
        while unsettled := [worker for worker in told if worker.tasks]:
            for worker in unsettled:
                if not worker.asked:
                    worker.settle()
            yield from workers.answers(told)


class Workers:
    """Processes that convert. The first one loads what all of them need, while its caller is busy otherwise; then it forks."""

    def __init__(self, count: int) -> None:
        ours, theirs = zip(*(Pipe() for _ in range(count)), strict=True)
        descriptors = [connection.fileno() for connection in theirs]
        self._connections: list[Connection] = [*ours]
        self._unused = deque(self._connections)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import {__name__} as convert; convert.work({descriptors})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"POLARS_MAX_THREADS": "1"},
            pass_fds=descriptors,
            # Not that of the terminal: Ctrl-C lets them end their blocks.
            process_group=0,
        )
        for connection in theirs:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def one(self, plan: Plan) -> "_Worker":
        """A worker that has nothing to do yet."""
        return _Worker(self._unused.popleft(), plan)

    def answers(self, told: Sequence["_Worker"]) -> Iterator[_Result]:
        """Wait until at least one worker answers. WorkerDiedError if it is not there any more."""
        busy = [worker for worker in told if worker.asked]
        ready = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection not in ready:
                continue
            try:
                result = worker.answer()
            except (EOFError, ConnectionError):
                raise WorkerDiedError(worker.tasks[-1].name, self.end()) from None
            if result:
                yield result

    def end(self) -> int:
        """Wait for the end of their blocks and of themselves. The exit code, or minus the signal, of one that failed."""
        for connection in self._connections:
            connection.close()
        code = self._process.wait()
        return code - _SIGNALLED if code > _SIGNALLED // 2 else code


# What is added to the number of a signal, which is negative, to make an exit code of it.
_SIGNALLED = 256


class _Worker:
    """A process that converts one block after the other; what it answers is the result of an earlier one, or None."""

    def __init__(self, connection: Connection, plan: Plan) -> None:
        self.connection = connection
        self.asked = 0
        """Answers to come."""
        self.tasks: deque[_Task] = deque()
        """What it was told to convert and has no result of yet."""
        self._tell(plan)

    def convert(self, task: _Task, text: _Text) -> None:
        """Hand it a block."""
        self.asked += 1
        self.tasks.append(task)
        self._tell(task, text if task.offset is None else None)

    def settle(self) -> None:
        """Ask for the next result."""
        self.asked += 1
        self._tell(None)

    def answer(self) -> _Result | None:
        """What it answers, once its connection has something. EOFError or ConnectionError if it is gone."""
        result = self.connection.recv()
        self.asked -= 1
        return (self.tasks.popleft(), result) if result else None

    def _tell(self, message: Plan | _Task | None, text: _Text | None = None) -> None:
        # A worker that is gone is noticed where its answer is waited for.
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)
            if text is not None:
                self.connection.send_bytes(text)


def work(descriptors: Sequence[int]) -> None:
    """What the first process of `Workers` does: load everything, then fork a worker for each of the descriptors."""
    _get_ready()
    gc.freeze()  # what is there now stays: it need neither be looked through, nor copied for that
    connections = [Connection(descriptor) for descriptor in descriptors]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(own, connections)) for own in connections]
    for worker in workers:
        worker.start()
    for connection in connections:
        connection.close()
    for worker in workers:
        worker.join()
    codes = [worker.exitcode or 0 for worker in workers]
    # At once, as forked processes end: somebody waits for it, and there is nothing to clean up.
    os._exit(next((code % _SIGNALLED for code in codes if code), 0))


def _work(own: Connection, connections: Sequence[Connection]) -> None:
    """Convert until nobody is there any more to tell what. Errors that are no result end the process."""
    for other in connections:
        if other is not own:
            other.close()
    with contextlib.suppress(EOFError, ConnectionError), _Converter(own.recv()) as converter:
        while True:
            task = own.recv()
            if task is None:
                own.send(converter.settle())
            else:
                text = own.recv_bytes() if task.offset is None else b""
                own.send(converter.convert(task, text))


def _get_ready() -> None:
    """Import what `_convert` does, and keep memory that was freed for the next block: giving it back and getting it anew takes
    a tenth of the time."""
    gc.disable()  # nothing of what is imported is garbage
    ours = ("records.parse", "records.validate", "records.transform", "records.sign", "parquet.files")
    for name in (*(f"d2p_pipeline.{name}" for name in ours), "pyarrow.parquet"):
        importlib.import_module(name)
    gc.enable()

    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


# --- converting


class _Converter:
    """Converts block after block. While one is converted the files of some before become durable, which is waiting."""

    def __init__(self, plan: Plan) -> None:
        from d2p_pipeline.records.shape import Shapes

        self._plan = plan
        self._writers = ThreadPoolExecutor(_WRITERS)
        self._unsettled: deque[tuple[_Outcome | _Failure, list[Future[None]]]] = deque()
        self._unsettled_size = 0
        self._shapes = Shapes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writers.shutdown()

    def convert(self, task: _Task, text: _Text) -> _Outcome | _Failure | None:
        """Convert a block; the result is that of an earlier one, the first whose files were not known to be durable."""
        from d2p_pipeline.records.transform import TransformError

        writes: list[Future[None]] = []
        try:
            result = _convert(task, text, self._plan, self._shapes, lambda *file: writes.append(self._write(*file)))
        except _ChangedError as error:
            result = _Failure(str(error), fatal=False)
        except TransformError as error:
            result = _Failure(str(error), fatal=True)
        self._unsettled.append((result, writes))
        self._unsettled_size += _size(result)
        return self.settle() if self._unsettled_size >= _UNSETTLED else None

    def settle(self) -> _Outcome | _Failure | None:
        """The result of the next block, when its files are durable; None if that is known of all."""
        if not self._unsettled:
            return None
        result, writes = self._unsettled.popleft()
        self._unsettled_size -= _size(result)
        try:
            for write in writes:
                write.result()
        except StoreError as error:
            return _Failure(str(error), fatal=True)
        except OSError as error:
            return _Failure(f"cannot write {error.filename}: {error.strerror}", fatal=True)
        return result

    def _write(self, path: str, data: "Buffer") -> Future[None]:
        return self._writers.submit(self._plan.store.write, path, data)


def _size(result: _Outcome | _Failure) -> int:
    """A failure is as large as anything, so that it becomes known soon."""
    return result.size if isinstance(result, _Outcome) else _UNSETTLED


# Bytes of files that become durable while further blocks are converted: a disk takes longer for one than for another.
_UNSETTLED = 24 << 20

# Files written at a time: a file costs little but waiting for the disk, and disks wait for several at once.
_WRITERS = 8


def _convert(
    task: _Task, text: _Text, plan: Plan, shapes: "Shapes", write: Callable[[str, "Buffer"], None]
) -> _Outcome:
    """What becomes of a block; `write` is called for each of its files."""
    from d2p_pipeline.parquet.files import encoded_files
    from d2p_pipeline.records.conceal import conceal
    from d2p_pipeline.records.dead_letter import DeadLetter
    from d2p_pipeline.records.parse import parse
    from d2p_pipeline.records.sign import sign
    from d2p_pipeline.records.transform import transform
    from d2p_pipeline.records.validate import validate

    def rejected(raw: bytes, reason: str, stage: Literal["parse", "validate"] = "parse") -> DeadLetter:
        raw = conceal(raw, plan.rules)
        return DeadLetter(reason=reason, stage=stage, received_at=task.received_at, raw=raw, batch=task.batch)

    lines, long = _within(bytes(text) if task.offset is None else _read(task), plan.max_record_bytes)
    parsed = parse([_plain(lines)], plan.rules, task.received_at, task.batch, shapes=shapes)
    verdict = validate(parsed.table, plan.rules)
    letters = [
        *(rejected(raw, too_long(len(raw), plan.max_record_bytes)) for raw in long),
        *parsed.rejects,
        *(rejected(parsed.raw(row), reason, "validate") for row, reason in verdict.bad),
        *(rejected(broken.raw, broken.reason) for broken in task.breaks),
    ]
    records = parsed.lines + len(long) + len(task.breaks)
    good = verdict.good
    # The text is as large as the rows, and has served.
    del lines, parsed, verdict
    table = sign(transform(good, plan.rules), plan.rules)
    count = size = 0
    for file in encoded_files(
        table,
        plan.rules,
        plan.encoding,
        batch=task.batch,
        unit=task.unit,
        ingested_at=task.received_at if plan.by_ingest_time else None,
        use_hash=plan.use_hash,
    ):
        write(file.path, file.data)
        count += 1
        size += file.data.size
    if letters and plan.keep_dead_letters:
        lines = b"".join(letter.to_json() + b"\n" for letter in letters)
        write(f"{DEAD_LETTERS}/{task.batch}-{task.unit}.ndjson", lines)
    reasons = Counter(_kind(letter.reason) for letter in letters)
    return _Outcome(records, table.num_rows, good.num_rows - table.num_rows, reasons, count, size)


def _read(task: _Task) -> bytes:
    """The text of a block that lies in a file; the hash tells whether it is still what was cut."""
    try:
        with Path(task.name).open("rb", buffering=0) as file:
            file.seek(task.offset or 0)
            text = file.read(task.size)
    except OSError as error:
        raise _ChangedError(f"it cannot be read any more: {error.strerror}") from error
    if xxhash.xxh3_128_hexdigest(text) != task.digest:
        raise _ChangedError(f"it changed while it was converted, after byte {task.offset}")
    return text


def _within(text: bytes, limit: int) -> tuple[bytes, list[bytes]]:
    """The lines of at most `limit` bytes, and the others."""
    start = 0
    while start + limit < len(text) and (start := text.rfind(b"\n", start, start + limit + 1) + 1):
        continue
    if start or len(text) <= limit:  # newlines all along
        return text, []
    lines = text.split(b"\n")
    long = [line for line in lines if len(line) > limit]
    return b"\n".join(line for line in lines if len(line) <= limit) if long else text, long


def _plain(text: bytes) -> bytes:
    """Text that `parse` takes for nothing but text: a chunk that begins like zstd would be decompressed."""
    return b"\n" + text if text.startswith(ZSTD_MAGICS) else text


# What differs from record to record: values, places and sizes.
_PARTICULAR = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<=\bbyte )\d+|\b\d+(?= bytes)""")


def _kind(reason: str) -> str:
    return _PARTICULAR.sub("…", reason)
