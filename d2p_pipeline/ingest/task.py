"""One block of text becomes files: what `d2p convert` hands to its workers, and what they do with it.

Parsed, validated, encoded and written with the same functions as in a Dagster run. What that takes is imported by `get_ready`
and not by this module: a process that only cuts inputs, or waits for others to get ready, does without.
"""

import contextlib
import ctypes
import importlib
import re
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import xxhash

from d2p_pipeline.ingest.documents import ZSTD_MAGICS, Break, Range, ending, too_long
from d2p_pipeline.parquet.errors import StoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from d2p_pipeline.parquet.encode import Encoding
    from d2p_pipeline.parquet.store import Store
    from d2p_pipeline.records.rules import Rules
    from d2p_pipeline.records.shape import Shapes

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


@dataclass(frozen=True, slots=True)
class Task:
    """A block to convert. Its text, `size` bytes, is a range of the input's file, or is handed over beside the task.

    `received_at` is in ms since the epoch; `taken` are the bytes of the input it was made of, compressed ones maybe.
    """

    name: str
    range: Range | None
    size: int
    breaks: tuple[Break, ...]
    received_at: int
    taken: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a block."""

    records: int
    rows: int
    dropped: int
    reasons: Counter[str]
    files: int
    size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why nothing became of a block. `fatal`: nor would anything become of the others."""

    reason: str
    fatal: bool


Text = bytes | memoryview
Number = Callable[[str], Callable[[], int]]
"""Asks for a block's number among those of the same hash, and returns what waits for the answer."""
Result = tuple[Task, Outcome | Failure]


class ChangedError(Exception):
    """An input is not what it was a moment ago."""


def get_ready() -> None:
    """Import what `_convert` does, so that it takes its time now."""
    ours = ("records.parse", "records.validate", "records.transform", "records.sign", "parquet.files")
    for name in (*(f"d2p_pipeline.{name}" for name in ours), "pyarrow.parquet"):
        importlib.import_module(name)

    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    keep_memory()


def keep_memory() -> None:
    """Keep what one block frees for the next one: giving memory back and getting it anew takes a tenth of the time."""
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Converter:
    """Converts block after block. While one is converted the files of some before become durable, which is waiting."""

    def __init__(self, plan: Plan) -> None:
        from d2p_pipeline.records.shape import Shapes

        self._plan = plan
        self._writers = ThreadPoolExecutor(_WRITERS)
        self._unsettled: deque[tuple[Outcome | Failure, list[Future[None]]]] = deque()
        self._unsettled_size = 0
        self._shapes = Shapes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writers.shutdown()

    def convert(self, task: Task, text: Text, number: Number) -> Outcome | Failure | None:
        """Convert a block; the result is that of an earlier one, the first whose files were not known to be durable."""
        from d2p_pipeline.records.transform import TransformError

        writes: list[Future[None]] = []
        try:
            result = _convert(
                task, text, number, self._plan, self._shapes, lambda *file: writes.append(self._write(*file))
            )
        except ChangedError as error:
            result = Failure(str(error), fatal=False)
        except TransformError as error:
            result = Failure(str(error), fatal=True)
        self._unsettled.append((result, writes))
        self._unsettled_size += _size(result)
        return self.settle() if self._unsettled_size >= _UNSETTLED else None

    def settle(self) -> Outcome | Failure | None:
        """The result of the next block, when its files are durable; None if that is known of all."""
        if not self._unsettled:
            return None
        result, writes = self._unsettled.popleft()
        self._unsettled_size -= _size(result)
        try:
            for write in writes:
                write.result()
        except StoreError as error:
            return Failure(str(error), fatal=True)
        except OSError as error:
            return Failure(f"cannot write {error.filename}: {error.strerror}", fatal=True)
        return result

    def _write(self, path: str, data: "Buffer") -> Future[None]:
        return self._writers.submit(self._plan.store.write, path, data)


def _size(result: Outcome | Failure) -> int:
    """A failure is as large as anything, so that it becomes known soon."""
    return result.size if isinstance(result, Outcome) else _UNSETTLED


# Bytes of files that become durable while further blocks are converted: a disk takes longer for one than for another.
_UNSETTLED = 24 << 20

# Files written at a time: a file costs little but waiting for the disk, and disks wait for several at once.
_WRITERS = 8


def _convert(
    task: Task, text: Text, number: Number, plan: Plan, shapes: "Shapes", write: Callable[[str, "Buffer"], None]
) -> Outcome:
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
        return DeadLetter(reason=reason, stage=stage, received_at=task.received_at, raw=raw, batch=batch)

    text = _read(task.name, task.range) if task.range else bytes(text)
    digest = xxhash.xxh3_128(text)
    for broken in task.breaks:
        digest.update(broken.raw)
    # The letter tells it from the ids of sealed batches, which begin with a digit.
    batch = f"x{digest.hexdigest()}"
    numbered = number(batch)
    lines, long = _within(text, plan.max_record_bytes)
    parsed = parse([_plain(lines)], plan.rules, task.received_at, batch, shapes=shapes)
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
    del text, lines, parsed, verdict
    # Before anything may end this early: who was asked answers.
    unit = numbered()
    table = sign(transform(good, plan.rules), plan.rules)
    count = size = 0
    for file in encoded_files(
        table,
        plan.rules,
        plan.encoding,
        batch=batch,
        unit=unit,
        ingested_at=task.received_at if plan.by_ingest_time else None,
        use_hash=plan.use_hash,
    ):
        write(file.path, file.data)
        count += 1
        size += file.data.size
    reasons = Counter(_kind(letter.reason) for letter in letters)
    if letters and plan.keep_dead_letters:
        lines = bytearray()
        letters.reverse()
        while letters:  # they may be more than all else: none is held twice
            lines += letters.pop().to_json() + b"\n"
        write(f"{DEAD_LETTERS}/{batch}-{unit}.ndjson", lines)
    return Outcome(records, table.num_rows, good.num_rows - table.num_rows, reasons, count, size)


def _read(name: str, range_: Range) -> bytes:
    """The text of a block that lies in a file; its end tells whether that is still what was cut."""
    try:
        with Path(name).open("rb", buffering=0) as file:
            file.seek(range_.offset)
            text = file.read(range_.size)
    except OSError as error:
        raise ChangedError(f"it cannot be read any more: {error.strerror}") from error
    if len(text) != range_.size or ending(text) != range_.ending:
        raise ChangedError(f"it changed while it was converted, after byte {range_.offset}")
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
