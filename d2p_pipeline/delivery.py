"""From a sealed batch to files and dead letters: what a run does, step by step, without knowing what runs it.

    plan         claim the batches and cut them into units, bounded in bytes
    read         a unit's chunks from the buffer
    validate     chunks to typed rows; what is no valid record becomes a dead letter; the user's function, the HMAC
    build        rows to Parquet, one file per partition
    announce     the buffer keeps what is about to be written, and tells what earlier attempts may have written instead
    (write)      those are removed, the files become durable: `parquet.store`
    acknowledge  dead letters stored, unit marked, batch removed when complete: one atomic step

A process may die between any two of them: the next attempt reads the same chunks and writes the same files under the same
names, or, where settings or software changed meanwhile, removes what the earlier one wrote. Only `acknowledge` ends a unit,
and only after `write`. An attempt that lost its claim meanwhile removes what it wrote and its successor did not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import pyarrow as pa

from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.protocol import (
    Announcement,
    Batch,
    BatchRef,
    Buffer,
    Claim,
    ClaimLostError,
    NewerFormatError,
)
from d2p_pipeline.parquet.encode import Encoding
from d2p_pipeline.parquet.files import encoded_files
from d2p_pipeline.parquet.layout import md5_of, with_token
from d2p_pipeline.records import chunk
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.dead_letter import DeadLetter, log_unkept, reasons
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.sign import sign
from d2p_pipeline.records.transform import transform
from d2p_pipeline.records.validate import validate

_PAGE = 256
"""Chunks looked at per round trip while a batch is cut into units."""


class Part(msgspec.Struct, frozen=True):
    """One unit of one batch: the chunks from `start` to `stop` (exclusive), unit `number` of `units`."""

    claim: Claim
    number: int
    units: int
    start: int
    stop: int
    size: int
    first: int
    """When the batch's oldest record came, in ms."""
    sealed_at: int
    reason: str


@dataclass(frozen=True)
class Unit:
    """What one pass converts: a large batch's part, or several small batches together."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Planned:
    """What a run has to do, and the batches there is nothing to do for: delivered already, or in another run's hands; and
    those that only a later version can deliver."""

    units: list[Unit]
    skipped: list[BatchRef]
    refused: dict[BatchRef, NewerFormatError]


@dataclass(frozen=True)
class Text:
    """A unit's chunks, per part."""

    unit: Unit
    chunks: list[list[bytes]]


@dataclass(frozen=True)
class Rows:
    """What is written of a unit, its dead letters, and how many valid rows the user's function dropped, per part."""

    unit: Unit
    tables: list[pa.Table]
    dead_letters: list[list[DeadLetter]]
    dropped: list[int]


@dataclass(frozen=True)
class ParquetFile:
    """An encoded file and where it belongs, relative to the root."""

    part: Part
    path: str
    rows: int
    data: pa.Buffer


@dataclass(frozen=True)
class Announced:
    """Files to write, after the files of earlier attempts (paths) that are none of them are removed."""

    files: list[ParquetFile]
    strays: list[str]


@dataclass(frozen=True)
class Written:
    """A file that is durable."""

    part: Part
    path: str
    rows: int
    size: int


@dataclass(frozen=True)
class Delivered:
    """An acknowledged part."""

    part: Part
    files: list[Written]
    rows: int
    reasons: Mapping[str, int]
    """Rejected records by reason."""
    preview: list[dict[str, str]]
    """Of the first rows what is not empty, as text, cut."""


def plan(buffer: Buffer, leases: Leases, refs: Iterable[BatchRef], unit_bytes: int) -> Planned:
    """Claim batches and cut them into units of about `unit_bytes` raw bytes."""
    parts: list[Part] = []
    skipped: list[BatchRef] = []
    refused: dict[BatchRef, NewerFormatError] = {}
    for ref in refs:
        try:
            claim = leases.take(ref)
        except NewerFormatError as error:
            refused[ref] = error
            continue
        batch = buffer.batch(ref) if claim else None
        if claim is None or batch is None:
            skipped.append(ref)
        else:
            parts.extend(_parts(buffer, claim, batch, unit_bytes))
    return Planned(list(_units(parts, unit_bytes)), skipped, refused)


def _parts(buffer: Buffer, claim: Claim, batch: Batch, unit_bytes: int) -> Iterator[Part]:
    if batch.counted and batch.size <= unit_bytes and batch.plan is None:
        sizes = {(0, batch.chunks): batch.size}
    else:
        sizes = _cut(buffer, batch, unit_bytes)
    ranges = buffer.plan(batch.ref, list(sizes)) or ()
    for number, (start, stop) in enumerate(ranges):
        if number not in batch.units_done:
            size = sizes.get((start, stop), unit_bytes)
            yield Part(claim, number, len(ranges), start, stop, size, batch.first, batch.sealed_at, batch.reason)


def _cut(buffer: Buffer, batch: Batch, unit_bytes: int) -> dict[tuple[int, int], int]:
    """Half-open ranges of chunks with their raw bytes."""
    cuts: dict[tuple[int, int], int] = {}
    start = size = 0
    for page in range(0, batch.chunks, _PAGE):
        for index, element in enumerate(buffer.read(batch.ref, page, min(page + _PAGE, batch.chunks)), page):
            more = chunk.raw_size(element)
            if index > start and size + more > unit_bytes:
                cuts[start, index] = size
                start, size = index, 0
            size += more
    cuts[start, batch.chunks] = size
    return cuts


def _units(parts: Sequence[Part], unit_bytes: int) -> Iterator[Unit]:
    together: list[Part] = []
    size = 0
    for part in parts:
        if together and size + part.size > unit_bytes:
            yield Unit(tuple(together))
            together, size = [], 0
        together.append(part)
        size += part.size
    if together:
        yield Unit(tuple(together))


def read(buffer: Buffer, unit: Unit) -> Text:
    """The unit's chunks."""
    return Text(unit, [buffer.read(part.claim.batch, part.start, part.stop) for part in unit.parts])


def check(text: Text, rules: Rules) -> Rows:
    """Parse and validate, then transform and sign. All parts are validated at once: pandera costs the same for one row and
    for many. They are transformed one by one, so that a part's files do not depend on its neighbours.

    TransformError when the user's function fails.
    """
    parsed = [
        parse(chunks, rules, received_at=part.first, batch=part.claim.batch.id)
        for part, chunks in zip(text.unit.parts, text.chunks, strict=True)
    ]
    # The columns of dynamic records may differ from part to part, and they are validated already.
    is_log = rules.record_type == "log"
    reasons = dict(validate(pa.concat_tables([part.table for part in parsed]), rules).bad) if is_log else {}
    tables: list[pa.Table] = []
    dead_letters: list[list[DeadLetter]] = []
    dropped: list[int] = []
    offset = 0
    for part, records in zip(text.unit.parts, parsed, strict=True):
        height = records.table.num_rows
        bad = (
            {row - offset: reasons[row] for row in range(offset, offset + height) if row in reasons} if reasons else {}
        )
        offset += height
        letters = [*records.rejects, *(_rejected(records.raw(row), reason, part, rules) for row, reason in bad.items())]
        dead_letters.append(letters)
        valid = _without(records.table, bad)
        kept = transform(valid, rules)
        dropped.append(valid.num_rows - kept.num_rows)
        tables.append(sign(kept, rules))
    return Rows(text.unit, tables, dead_letters, dropped)


def _rejected(raw: bytes, reason: str, part: Part, rules: Rules) -> DeadLetter:
    raw = conceal(raw, rules)
    return DeadLetter(reason=reason, stage="validate", received_at=part.first, raw=raw, batch=part.claim.batch.id)


def _without(table: pa.Table, rows: Mapping[int, str]) -> pa.Table:
    if not rows:
        return table
    return table.take(pa.array([row for row in range(table.num_rows) if row not in rows]))


def build(rows: Rows, rules: Rules, encoding: Encoding, *, partition_time: str, use_hash: bool) -> list[ParquetFile]:
    """Encode each part's rows, one file per capability and hour. The same part gives the same paths and bytes."""
    return [
        ParquetFile(part, file.path, file.rows, file.data)
        for part, table in zip(rows.unit.parts, rows.tables, strict=True)
        for file in encoded_files(
            table,
            rules,
            encoding,
            batch=part.claim.batch.id,
            unit=part.number,
            key=part.claim.batch.key,
            ingested_at=part.first if partition_time == "ingest" else None,
            use_hash=use_hash,
        )
    ]


def announce(buffer: Buffer, unit: Unit, files: list[ParquetFile]) -> Announced:
    """Say what is about to be written. Raises ClaimLostError when another run took a batch since: nothing may be written."""
    found = _announced(buffer, unit.parts, files)
    # An earlier attempt that is only paused may yet write other content under these names, or remove them.
    contested = [part for part, strays in found.items() if strays is None]
    if contested:
        files = [
            replace(file, path=with_token(file.path, file.part.claim.token)) if file.part in contested else file
            for file in files
        ]
        found |= _announced(buffer, contested, files, own=True)
    return Announced(files, [stray for strays in found.values() for stray in strays or ()])


def _announced(
    buffer: Buffer, parts: Sequence[Part], files: list[ParquetFile], *, own: bool = False
) -> dict[Part, list[str] | None]:
    contents: dict[Part, dict[str, str]] = {part: {} for part in parts}
    for file in files:
        if file.part in contents:
            contents[file.part][file.path] = md5_of(file.data)
    announcements = [Announcement(part.claim, part.number, content, own) for part, content in contents.items()]
    return dict(zip(parts, buffer.announce(announcements), strict=True))


def acknowledge(
    buffer: Buffer,
    leases: Leases,
    rows: Rows,
    written: Sequence[Written],
    remove: Callable[[str], None],
    *,
    keep_dead_letters: bool,
) -> list[Delivered]:
    """End the unit; call only when `written` is durable. Raises ClaimLostError when another run took a batch since, after
    `remove` took away what was written of it and is none of that run's files.
    """
    delivered: list[Delivered] = []
    lost: ClaimLostError | None = None
    for part, table, letters, dropped in zip(
        rows.unit.parts, rows.tables, rows.dead_letters, rows.dropped, strict=True
    ):
        files = [file for file in written if file.part == part]
        try:
            answer = buffer.acknowledge(
                part.claim,
                part.number,
                units=part.units,
                rows=table.num_rows,
                rejected=len(letters) + dropped,
                dead_letters=_stored(part, letters) if keep_dead_letters else [],
                files=[file.size for file in files],
            )
        except ClaimLostError as error:
            lost = error
            _retract(buffer, part, files, remove)
            continue
        if answer == "repeated":  # by this run, whose reply was lost; or by another one
            _retract(buffer, part, files, remove)
        elif answer == "complete":
            leases.drop(part.claim.batch)
        if not keep_dead_letters:
            log_unkept(part.claim.batch.key, letters)
        rejected = {**reasons(letters), **({DROPPED: dropped} if dropped else {})}
        delivered.append(Delivered(part, files, table.num_rows, rejected, _preview(table)))
    if lost:
        raise lost
    return delivered


def _preview(table: pa.Table) -> list[dict[str, str]]:
    rows = table.slice(0, PREVIEW_ROWS).to_pylist()
    return [{name: _short(value) for name, value in row.items() if value not in (None, [], {})} for row in rows]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= PREVIEW_WIDTH else text[: PREVIEW_WIDTH - 1] + "…"


def _retract(buffer: Buffer, part: Part, files: Sequence[Written], remove: Callable[[str], None]) -> None:
    """Remove files that another attempt's announcement does not name; it looked for them before they were there."""
    wanted = buffer.announced(part.claim.batch, part.number)
    for file in files:
        if wanted is not None and file.path not in wanted:
            remove(file.path)


PREVIEW_ROWS = 3
PREVIEW_WIDTH = 60
DROPPED = "dropped by transform"
"""The reason of rows that the user's function left out: counted as rejected, and kept nowhere."""


def _stored(part: Part, letters: Sequence[DeadLetter]) -> list[bytes]:
    """Letters as they are kept, each with an id that is the same in every attempt."""
    name = f"{part.claim.batch.id}-{part.number}"
    return [msgspec.structs.replace(letter, id=f"{name}-{number}").to_json() for number, letter in enumerate(letters)]
