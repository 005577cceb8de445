"""Oversized queues of dead letters move to files beside the data, so that Redis stays small.

A file has a queue's oldest letters, as zstd-compressed lines of what the queue held: `_dead_letters/capability=<key>/<name>.
ndjson.zst`. It is named after its content and made durable first; then one step lets go of exactly these letters and makes
the file known. A process that dies in between leaves a file that the next attempt overwrites with the same bytes. What is
replayed or discarded later is marked in Redis, bit by bit; a file all of whose letters are gone is removed.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard

from d2p_pipeline.buffer.letters import LetterQueues, LettersMovedError, SpilledFile
from d2p_pipeline.parquet.layout import capability_prefix
from d2p_pipeline.parquet.store import Store
from d2p_pipeline.records.dead_letter import DeadLetter

DIRECTORY = "_dead_letters"
FILE_LETTERS = 5000
FILE_BYTES = 8 << 20
"""Bytes of letters in one file, unless a single letter has more; bounds the memory of whoever writes or reads it."""
_READ = 250
"""Letters per round trip."""


@dataclass(frozen=True)
class Limits:
    """What a key's queue may hold."""

    letters: int
    size: int


def is_oversized(queues: LetterQueues, key: str, length: int, limits: Limits) -> bool:
    return length > limits.letters or (length > 0 and queues.size(key) > limits.size)


def spill(queues: LetterQueues, store: Store, key: str, limits: Limits) -> list[SpilledFile]:
    """Move a key's oldest letters to files until its queue is within the limits.

    LettersMovedError when somebody else works on them; what was moved until then is moved.
    """
    spilled: list[SpilledFile] = []
    found = queues.letters(key)
    version, length = found.version, found.length
    if found.intent:
        raise LettersMovedError(key)
    while is_oversized(queues, key, length, limits):
        page = _oldest(queues, key, min(FILE_LETTERS, limits.letters))
        if not page:
            break
        file = _file(page, version)
        lines = b"".join(line for data in page for line in (_line(data), b"\n"))
        store.write(path(key, file.name), zstandard.ZstdCompressor().compress(lines))
        queues.spill(key, version, file)
        spilled.append(file)
        version, length = version + 1, length - len(page)
    return spilled


def lines(store: Store, key: str, file: SpilledFile) -> Iterator[bytes]:
    """A file's letters in their places, those that are gone included. Raises OSError or StoreError."""
    content = io.BytesIO(store.read(path(key, file.name)))
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        for line in io.BufferedReader(reader):
            yield line.rstrip(b"\n")


def remove_emptied(queues: LetterQueues, store: Store, key: str) -> None:
    """Remove the key's files all of whose letters are gone."""
    for file in queues.letters(key).files:
        if not file.left:
            store.remove(path(key, file.name))
            queues.forget(key, file)


def path(key: str, name: str) -> str:
    """Where a file lies, relative to the store's root."""
    return f"{DIRECTORY}/{capability_prefix(key)}/{name}.ndjson.zst"


def _oldest(queues: LetterQueues, key: str, most: int) -> list[bytes]:
    """What goes into the next file. Depends on nothing but the queue's beginning and `most`."""
    page: list[bytes] = []
    size = 0
    while len(page) < most:
        more = queues.read(key, len(page), min(len(page) + _READ, most))
        if not more:
            break
        for data in more:
            if page and size + len(data) > FILE_BYTES:
                return page
            page.append(data)
            size += len(data)
    return page


def _file(page: list[bytes], order: int) -> SpilledFile:
    times = [DeadLetter.read(data).received_at for data in page]
    digest = hashlib.sha256(b"\n".join(page)).hexdigest()[:32]
    name = f"{times[0]:013d}-{digest}"
    size = sum(map(len, page))
    return SpilledFile(name=name, letters=len(page), size=size, first=min(times), last=max(times), order=order)


def _line(data: bytes) -> bytes:
    """Letters are one line each; what another program wrote need not be."""
    return DeadLetter.read(data).to_json() if b"\n" in data else data
