"""Fuzzes whatever decodes bytes of strangers: `make fuzz`, or `python -m d2p_pipeline_tests.fuzz NAME [libFuzzer's options]`.

A decoder may say no in its own words, or accept; any other exception is a defect. libFuzzer keeps the bytes that showed it in
`crash-*`; given that file's name as the last argument it shows it again. What is found becomes a test of its own.
"""

# atheris has no types, and is installed by `make fuzz` alone.
# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportAttributeAccessIssue=false

import asyncio
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import atheris

with atheris.instrument_imports(include=["d2p_pipeline"]):
    from d2p_pipeline.ingest import fluent, forward
    from d2p_pipeline.ingest.bodies import SNIFFED, BodyError, records, splitter
    from d2p_pipeline.ingest.commit import pushes
    from d2p_pipeline.ingest.compression import CompressionError, decompressed
    from d2p_pipeline.ingest.documents import Content, ForeignError, blocks
    from d2p_pipeline.ingest.http import Connection, Service
    from d2p_pipeline.ingest.intake import Intake
    from d2p_pipeline.ingest.messages import Messages
    from d2p_pipeline.ingest.sqs import Message
    from d2p_pipeline.records import chunk
    from d2p_pipeline.records.accept import acceptor
    from d2p_pipeline.records.conceal import conceal
    from d2p_pipeline.records.dead_letter import DeadLetter, Rejected
    from d2p_pipeline.records.key import key_of
    from d2p_pipeline.records.rules import Rules

LIMIT = 1 << 20
SEEDS = [str(Path(__file__).parent / "fixtures" / name) for name in ("fluent", "fuzz", "predecessors")]
RULES = Rules(default_capability="fuzz")
COMPLETION = fluent.Completion(RULES)
INTAKE = Intake(RULES, max_record_bytes=LIMIT)


def body(data: bytes) -> None:
    """A request's body, in pieces as long as its first byte says."""
    step = 16 * (data[0] + 1) if data else 16
    for kind in ("application/json", "application/msgpack"):
        into = splitter(data[:SNIFFED], kind, COMPLETION, "a.b")
        with suppress(BodyError):
            for start in range(1, len(data), step):
                list(into.feed(data[start : start + step]))
            list(into.end())
    with suppress(BodyError):
        list(records(data))


def record(data: bytes) -> None:
    """One record's text."""
    with suppress(Rejected):
        acceptor(RULES).canonical(data)
    conceal(data, RULES)
    key_of(data, RULES.key_fields)


def frames(data: bytes) -> None:
    """A stream of the Forward protocol."""
    framer = forward.Framer(LIMIT)
    with suppress(forward.ForwardError):
        framer.feed(data)
        while (message := framer.next()) is not None:
            forward.parse(message)


def compressed(data: bytes) -> None:
    """A body that says it is compressed."""
    for encoding in ("gzip", "zstd"):
        with suppress(CompressionError):
            decompressed(data, encoding, LIMIT)


def chunks(data: bytes) -> None:
    """An element of a buffer."""
    chunk.raw_size(data)
    with suppress(chunk.ChunkError):
        chunk.decode(data, LIMIT)


def document(data: bytes) -> None:
    """A file for `d2p convert`, or an object in S3."""
    with suppress(ForeignError):
        list(blocks(Content(io.BytesIO(data)), 1 << 12, 1 << 16))


class Objects:
    """The one object there is."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def open(self, bucket: str, key: str, version: str | None, etag: str | None) -> IO[bytes]:
        if not bucket:
            raise LookupError("NoSuchBucket")
        return io.BytesIO(self._content)


def message(data: bytes) -> None:
    """A message of a queue; after a NUL, which SQS does not take, the object that it may tell of."""
    text, _, content = data.partition(b"\0")
    convert = Messages(INTAKE, max_record_bytes=LIMIT, sns=True, objects=Objects(content))
    for request in convert(Message("m", "r", text.decode(errors="replace"))):
        request.pack()
        list(pushes([request], "name", 1, keep_dead_letters=True))


def letter(data: bytes) -> None:
    """An element of a queue of dead letters."""
    found = DeadLetter.read(data)
    assert DeadLetter.from_json(found.to_json()) == found


class Transport:
    """Takes answers, and ends when it is told to."""

    ended = False

    def write(self, data: bytes) -> None:
        assert not self.ended, "an answer after the end"

    def close(self) -> None:
        self.ended = True

    abort = write_eof = close

    def is_closing(self) -> bool:
        return self.ended

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def http(data: bytes) -> None:
    """What a client sends, in two parts."""
    connection = Connection(_service())
    connection.connection_made(cast(Any, Transport()))
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        connection.data_received(part)
    connection.connection_lost(None)


@cache
def _service() -> Service:
    async def made() -> Service:
        return Service(lambda exchange: exchange.answer(200, (), b""), head_seconds=9, body_seconds=9, most=9)

    return asyncio.new_event_loop().run_until_complete(made())


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (body, record, frames, compressed, chunks, document, message, letter, http)
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"name one of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as found:
        atheris.Setup([sys.argv[0], *sys.argv[2:], found, *SEEDS], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
