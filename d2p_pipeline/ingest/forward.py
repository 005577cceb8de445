"""The Forward door: what Fluent Bit's and Fluentd's `forward` outputs send, into the buffer by group commit.

It speaks the Forward protocol v1 (https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1) over TCP or TLS:
message, forward, packed forward and compressed packed forward modes, the `chunk` acknowledgement, and the handshake by
shared key, with users if wanted. A chunk is acknowledged when the buffer has all of it. When the buffer takes nothing, the
connection of a chunk is closed without acknowledgement, so that the client sends it again, and one without is not read on.
A chunk that comes again within the window changes nothing. What is no message ends its connection, and only that.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import ssl
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgpack
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from d2p_pipeline.buffer.protocol import BufferFullError, BufferUnavailableError, ForeignValueError
from d2p_pipeline.ingest import fluent
from d2p_pipeline.ingest.commit import GroupCommit, Request
from d2p_pipeline.ingest.compression import CompressionError, decompressed
from d2p_pipeline.ingest.intake import Intake

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
GOODBYE_SECONDS = 2.0
"""How long a connection that is to end waits for its TLS client to end it too."""
LARGE_BYTES = 1 << 20
"""A message beyond this waits for one of `LARGE_MESSAGES` places before it is read on, which bounds the memory."""
LARGE_MESSAGES = 8
INLINE_BYTES = 1 << 15
"""Messages beyond this are converted beside the event loop, so that other connections do not wait for it."""
READ_BYTES = 1 << 16
STOP_SECONDS = 5.0
"""A listener that stops reads no longer than this, and from each connection until it is silent for `GRACE_SECONDS`."""
GRACE_SECONDS = 0.2
_LONGEST_TAG = 1024
_HANDSHAKE_BYTES = 4096
_LOGS = 0
"""The `fluent_signal` of log records; metrics and traces have others."""


class ForwardError(Exception):
    """The peer does not speak the protocol, or not within the limits; its connection ends."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the protocol: its events, packed one after the other, not yet looked into.

    `metadata` is that of a single record's event; `raw` the whole message.
    """

    tag: str
    packed: bytes
    options: Mapping[str, Any]
    metadata: Mapping[str, Any]
    raw: bytes

    @property
    def chunk(self) -> str | None:
        """What the client wants to be acknowledged."""
        chunk = self.options.get("chunk")
        return chunk if isinstance(chunk, str) else None


class Framer:
    """Finds where messages end in a stream of bytes, without building their values."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = bytearray()
        self._begun = 0
        self._unpacker = msgpack.Unpacker(max_buffer_size=limit)

    def feed(self, data: bytes) -> None:
        """Take in what was read. ForwardError when a message grows beyond the limit."""
        self._bytes += data
        if len(self._bytes) > self._limit:
            raise ForwardError(f"a message has more than {self._limit} bytes (max_body_bytes)")
        self._unpacker.feed(data)

    def next(self) -> bytes | None:
        """The next whole message; None: more has to be read. ForwardError for what is no MessagePack."""
        try:
            self._unpacker.skip()
        except msgpack.OutOfData:
            return None
        except ValueError as error:
            raise ForwardError(f"what was sent is no MessagePack: {type(error).__name__}") from error
        end = self._unpacker.tell()
        size, self._begun = end - self._begun, end
        message = bytes(self._bytes[:size])
        del self._bytes[:size]
        return message

    @property
    def pending(self) -> int:
        """Bytes of a message whose end has not been read yet."""
        return len(self._bytes)


def parse(data: bytes) -> Message:
    """One message, in whichever of the four modes. ForwardError if it is none."""
    stream = fluent.unpacker(len(data))
    stream.feed(data)
    try:
        return _parsed(stream, data)
    except (ValueError, msgpack.OutOfData, RecursionError) as error:
        raise ForwardError(f"no message of the Forward protocol: {error}") from error


def _parsed(stream: msgpack.Unpacker, data: bytes) -> Message:
    size = stream.read_array_header()
    tag = stream.unpack() if size >= 2 else None
    if not isinstance(tag, str):
        raise ForwardError("a message should be an array that begins with the tag")
    tag = tag.encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:_LONGEST_TAG]
    first = data[stream.tell()]
    read = 2
    if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):  # an array: Forward mode
        entries = stream.read_array_header()
        begin = stream.tell()
        for _ in range(entries):
            stream.skip()
        packed = data[begin : stream.tell()]
    elif 0xA0 <= first <= 0xBF or 0xC4 <= first <= 0xC6 or 0xD9 <= first <= 0xDB:  # text or binary: PackedForward
        packed = _bytes(stream.unpack())
    elif size >= 3:  # Message mode
        read = 3
        begin = stream.tell()
        stream.skip()
        stream.skip()
        packed = _PAIR + data[begin : stream.tell()]
    else:
        raise ForwardError("a message should have entries, or a time and a record")
    options = stream.unpack() if size > read else None
    options = options if isinstance(options, dict) else {}
    metadata = options.get("metadata")
    return Message(tag, packed, options, metadata if read == 3 and isinstance(metadata, dict) else {}, data)


_PAIR = b"\x92"
"""The head of an array of two."""


def _bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


class Conversion:
    """Messages into requests for the buffer."""

    def __init__(self, intake: Intake, completion: fluent.Completion, *, max_bytes: int) -> None:
        self._intake = intake
        self._completion = completion
        self._max_bytes = max_bytes

    def request(self, message: Message) -> tuple[Request, int, int]:
        """What the buffer is to have of a message, and how many records and dead letters that is."""
        received_at = time.time_ns() // 1_000_000
        request = Request(id=_push_id(message))
        signal = message.options.get("fluent_signal", _LOGS)
        if signal != _LOGS:
            reason = f"Fluent Bit's metrics and traces are no records (fluent_signal {signal}); send only logs here"
            self._intake.refuse(message.raw, reason, request, received_at)
        else:
            try:
                packed = self._expanded(message)
            except CompressionError as error:
                self._intake.refuse(message.raw, f"Fluent chunk {message.chunk or ''}: {error}", request, received_at)
            else:
                self._take(packed, message, request, received_at)
        request.size = len(message.raw)
        return request, sum(map(len, request.lines.values())), sum(map(len, request.dead_letters.values()))

    def _expanded(self, message: Message) -> bytes:
        compressed = message.options.get("compressed")
        if compressed in (None, "text"):
            return message.packed
        return decompressed(message.packed, str(compressed), self._max_bytes)

    def _take(self, packed: bytes, message: Message, request: Request, received_at: int) -> None:
        for event in fluent.events(packed):
            if isinstance(event, fluent.Misfit):
                self._intake.refuse(event.raw, event.reason, request, received_at)
                continue
            if message.metadata:
                event.metadata = message.metadata
            record = self._completion.complete(event, message.tag)
            try:
                line = fluent.to_json(record)
            except RecursionError:
                self._intake.refuse(event.raw, "nested too deep to be read", request, received_at)
            else:
                self._intake.take(line, request, received_at)


def _push_id(message: Message) -> str:
    """A chunk's name in the buffer. Fluent Bit's chunk ids are hashes of the records, without the tag."""
    if message.chunk is None:
        return ""
    return "fluent-" + hashlib.sha256(f"{message.tag}\0{message.chunk}".encode(errors="replace")).hexdigest()[:40]


# --- the listener


@dataclass
class Counts:
    """What came through this door since it opened."""

    connections: int = 0
    messages: int = 0
    records: int = 0
    dead_letters: int = 0
    acknowledged: int = 0
    refused: int = 0
    """Chunks left unacknowledged because the buffer took nothing."""
    broken: int = 0
    """Connections ended because of what their peer sent, or failed to send."""
    connected: int = 0
    """Connections now."""


@dataclass(frozen=True)
class Credentials:
    """What a client has to prove to know: the shared key and, if there are users, one user's password."""

    shared_key: str
    users: Mapping[str, str] = field(default_factory=dict[str, str])
    hostname: str = "d2p"


class Forward:
    """The listener over one group commit."""

    def __init__(
        self,
        commit: GroupCommit,
        conversion: Conversion,
        *,
        credentials: Credentials | None = None,
        max_bytes: int = 64 << 20,
        max_connections: int = 1024,
        message_seconds: float = 60.0,
    ) -> None:
        self.counts = Counts()
        self._commit = commit
        self._conversion = conversion
        self._credentials = credentials
        self._max_bytes = max_bytes
        self._max_connections = max_connections
        self._message_seconds = message_seconds
        self._large = asyncio.Semaphore(LARGE_MESSAGES)
        self._stopping = asyncio.Event()
        self._last_read = 0.0
        self._thread = ThreadPoolExecutor(1, "d2p-forward")
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, address: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port, which the system chooses when `port` is 0."""
        timeouts = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": GOODBYE_SECONDS} if tls else {}
        self._server = await asyncio.start_server(
            self._connected, address, port, ssl=tls, limit=READ_BYTES, backlog=1024, **timeouts
        )
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop accepting, store and acknowledge every message that is complete, close all connections."""
        self._last_read = asyncio.get_running_loop().time() + STOP_SECONDS
        self._stopping.set()
        if self._server:
            self._server.close()
        if self._connections:
            await asyncio.wait(self._connections)
        self._thread.shutdown()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        peer = _peer(writer)
        if len(self._connections) >= self._max_connections or self._stopping.is_set():
            log.warning("%s: not served, there are %d connections already", peer, len(self._connections))
            writer.transport.abort()
            return
        self._connections.add(task)
        self.counts.connections += 1
        self.counts.connected += 1
        try:
            await self._serve(reader, writer)
        except (ForwardError, TimeoutError) as error:
            self.counts.broken += 1
            log.warning("%s: connection closed: %s", peer, str(error) or "it was too slow")
        except OSError as error:
            log.info("%s: connection lost: %s", peer, error)
        except (BufferFullError, BufferUnavailableError, ForeignValueError) as error:
            self.counts.refused += 1
            log.warning("%s: connection closed, its chunk is not acknowledged: %s", peer, error)
        finally:
            self._connections.discard(task)
            self.counts.connected -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await asyncio.wait_for(writer.wait_closed(), HANDSHAKE_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            if self._credentials:
                async with asyncio.timeout(HANDSHAKE_SECONDS):
                    if not await _greet(reader, writer, self._credentials):
                        return
            framer = Framer(self._max_bytes)
            while data := await self._read(reader, stopping):
                framer.feed(data)
                await self._store_whole(framer, writer)
                if framer.pending:
                    await self._finish(framer, reader, writer, stopping)
        finally:
            stopping.cancel()

    async def _read(self, reader: asyncio.StreamReader, stopping: "asyncio.Future[Any]") -> bytes:
        """What comes next; empty at the connection's end, and when the listener stops."""
        reading = asyncio.ensure_future(reader.read(READ_BYTES))
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and asyncio.get_running_loop().time() < self._last_read:
                await asyncio.wait((reading,), timeout=GRACE_SECONDS)  # what the client had sent before
            return reading.result() if reading.done() else b""
        finally:
            reading.cancel()

    async def _finish(
        self,
        framer: Framer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        stopping: "asyncio.Future[Any]",
    ) -> None:
        """Read on until nothing is left of a message that has begun."""
        async with contextlib.AsyncExitStack() as stack:
            large = False
            deadline = asyncio.get_running_loop().time() + self._message_seconds
            while framer.pending:
                if framer.pending > LARGE_BYTES and not large:
                    await stack.enter_async_context(self._large)
                    large = True
                    deadline = asyncio.get_running_loop().time() + self._message_seconds
                async with asyncio.timeout_at(deadline):
                    data = await self._read(reader, stopping)
                if not data:
                    if not self._stopping.is_set():
                        raise ForwardError("the connection ended within a message")
                    return
                framer.feed(data)
                if await self._store_whole(framer, writer):
                    deadline = asyncio.get_running_loop().time() + self._message_seconds

    async def _store_whole(self, framer: Framer, writer: asyncio.StreamWriter) -> int:
        """Store and acknowledge the messages that are complete; returns how many."""
        stored = 0
        while (data := framer.next()) is not None:
            await self._store(data, writer)
            stored += 1
        return stored

    async def _store(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        message = parse(data)
        if len(data) > INLINE_BYTES or "compressed" in message.options:
            loop = asyncio.get_running_loop()
            converted = await loop.run_in_executor(self._thread, self._conversion.request, message)
        else:
            converted = self._conversion.request(message)
        request, records, dead_letters = converted
        self.counts.messages += 1
        if records or dead_letters:
            await self._commit_request(request, patient=message.chunk is None)
        self.counts.records += records
        self.counts.dead_letters += dead_letters
        if message.chunk is not None:
            writer.write(_acknowledgement(message.chunk))
            await writer.drain()
            self.counts.acknowledged += 1

    async def _commit_request(self, request: Request, *, patient: bool) -> None:
        """Store; what nobody would send again is tried until the buffer takes it, or the listener stops."""
        if not patient:
            await self._commit.store(request)
            return
        attempts = AsyncRetrying(
            retry=retry_if_exception_type((BufferFullError, BufferUnavailableError)),
            wait=wait_exponential_jitter(multiplier=0.2, max=10, jitter=0.5),
            stop=lambda _: self._stopping.is_set(),
            sleep=self._pause,
            reraise=True,
        )
        await attempts(self._commit.store, request)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


def _acknowledgement(chunk: str) -> bytes:
    return _packed({"ack": chunk})


def _packed(value: object) -> bytes:
    packed = msgpack.packb(value, unicode_errors="surrogateescape")
    assert packed is not None  # it is for packers that keep a buffer
    return packed


def _peer(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a client"


# --- the handshake


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, known: Credentials) -> bool:
    """HELO, PING and PONG; ForwardError when the client does not prove that it knows the secrets.

    False: it went away without a word, as probes do, and Fluentd's heartbeats.
    """
    nonce = secrets.token_hex(16)
    salt = secrets.token_hex(16) if known.users else ""
    # In one write: Fluent Bit expects each message of the handshake in one piece.
    writer.write(_packed(["HELO", {"nonce": nonce, "auth": salt, "keepalive": True}]))
    framer = Framer(_HANDSHAKE_BYTES)
    while (data := framer.next()) is None:
        received = await reader.read(_HANDSHAKE_BYTES)
        if not received and not framer.pending:
            return False
        if not received:
            raise ForwardError("the connection ended within the handshake")
        framer.feed(received)
    if framer.pending:
        raise ForwardError("the client sent records before it was let in")
    match msgpack.unpackb(data, raw=True, strict_map_key=False):
        case [b"PING", bytes(hostname), bytes(key_salt), bytes(digest), bytes(user), bytes(password_digest)]:
            pass
        case _:
            raise ForwardError("the client does not answer the handshake with a PING; it needs the shared key")
    reason = _refusal(known, nonce, salt, hostname, key_salt, digest, user, password_digest)
    proof = "" if reason else _digest(key_salt, known.hostname, nonce, known.shared_key)
    writer.write(_packed(["PONG", not reason, reason, "" if reason else known.hostname, proof]))
    await writer.drain()
    if reason:
        raise ForwardError(f"the client {hostname.decode(errors='replace')!r} is not let in: {reason}")
    return True


def _refusal(
    known: Credentials,
    nonce: str,
    salt: str,
    hostname: bytes,
    key_salt: bytes,
    digest: bytes,
    user: bytes,
    password_digest: bytes,
) -> str:
    """Why a client is not let in; empty if it is."""
    if not hmac.compare_digest(digest, _digest(key_salt, hostname, nonce, known.shared_key).encode()):
        return "shared key mismatch"
    if not known.users:
        return ""
    password = known.users.get(user.decode(errors="replace"))
    expected = _digest(salt, user, password if password is not None else secrets.token_hex(16))
    return (
        "" if hmac.compare_digest(password_digest, expected.encode()) and password is not None else "user or password"
    )


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha512(b"".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()
