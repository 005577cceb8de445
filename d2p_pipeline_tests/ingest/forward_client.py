"""A listener in this process, and clients that speak the Forward protocol byte by byte."""

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack

from d2p_pipeline.buffer.protocol import Buffer, Seal
from d2p_pipeline.ingest.commit import GroupCommit
from d2p_pipeline.ingest.fluent import Completion
from d2p_pipeline.ingest.forward import Conversion, Credentials, Forward
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.records.rules import Rules

RECORD = {
    "level": "INFO",
    "message": "hello",
    "business_capability": "cap",
    "business_domain": "domain",
    "business_service": "service",
    "application_service": "application",
}
SECONDS = 1_700_000_000


def packed(value: object) -> bytes:
    data = msgpack.packb(value, unicode_errors="surrogateescape")
    assert data is not None
    return data


def event_time(seconds: int = SECONDS, nanoseconds: int = 123_456_789) -> msgpack.ExtType:
    return msgpack.ExtType(0, seconds.to_bytes(4, "big") + nanoseconds.to_bytes(4, "big"))


def entry(number: int, **fields: object) -> list[Any]:
    return [[event_time(), {}], {**RECORD, "message": f"m{number}", **fields}]


def rules(**changes: Any) -> Rules:
    return Rules(**{"key_fields": ("business-capability",), **changes})


def conversion(
    *, pattern: str | None = None, defaults: dict[str, str] | None = None, max_bytes: int = 1 << 22, **changes: Any
) -> Conversion:
    of = rules(**changes)
    intake = Intake(of, max_record_bytes=1 << 20)
    return Conversion(intake, Completion(of, pattern=pattern, defaults=defaults), max_bytes=max_bytes)


@asynccontextmanager
async def listening(
    buffer: Buffer,
    *,
    converting: Conversion | None = None,
    max_bytes: int = 1 << 22,
    max_connections: int = 100,
    message_seconds: float = 60.0,
    credentials: Credentials | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[Forward, int]]:
    """A listener on a port the system chooses."""
    commit = GroupCommit(buffer, window=120, keep_dead_letters=True)
    listener = Forward(
        commit,
        converting or conversion(max_bytes=max_bytes),
        credentials=credentials,
        max_bytes=max_bytes,
        max_connections=max_connections,
        message_seconds=message_seconds,
    )
    port = await listener.start("127.0.0.1", 0, tls)
    try:
        yield listener, port
    finally:
        await listener.stop()
        await commit.close()


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._unpacker = msgpack.Unpacker()

    @classmethod
    async def connect(cls, port: int, tls: ssl.SSLContext | None = None) -> "Client":
        return cls(*await asyncio.open_connection("localhost" if tls else "127.0.0.1", port, ssl=tls))

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send(self, *parts: object) -> None:
        await self.write(packed(list(parts)))

    async def read(self) -> Any:
        """The next value from the listener; None at the connection's end."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return self._unpacker.unpack()
                except msgpack.OutOfData:
                    try:
                        data = await self._reader.read(1 << 16)
                    except ConnectionError:
                        return None
                    if not data:
                        return None
                    self._unpacker.feed(data)

    async def greet(self, shared_key: str, user: str = "", password: str = "", hostname: str = "client") -> list[Any]:
        """The client's side of the handshake; returns the PONG."""
        helo = await self.read()
        assert helo[0] == "HELO"
        nonce, salt, key_salt = helo[1]["nonce"], helo[1]["auth"], b"\xff\x00raw-salt"
        digest = hashlib.sha512(key_salt + f"{hostname}{nonce}{shared_key}".encode()).hexdigest()
        password_digest = hashlib.sha512(f"{salt}{user}{password}".encode()).hexdigest()
        salt_as_text = key_salt.decode("utf-8", "surrogateescape")
        await self.send("PING", hostname, salt_as_text, digest, user, password_digest)
        pong = await self.read()
        if pong and pong[1]:
            expected = hashlib.sha512(key_salt + f"{pong[3]}{nonce}{shared_key}".encode()).hexdigest()
            assert pong[4] == expected
        return pong

    def close(self) -> None:
        self._writer.close()


def stored(buffer: Buffer) -> list[dict[str, Any]]:
    """Every record that waits in a buffer."""
    found: list[dict[str, Any]] = []
    for number, state in enumerate(list(buffer.waiting())):
        for batch in buffer.seal([Seal(state.key, f"look-{number}", "request")]):
            for data in buffer.read(batch.ref, 0, batch.chunks):
                found += [json.loads(line) for line in chunk.decode(data).body.splitlines()]
    return found


def letters(buffer: Buffer) -> list[DeadLetter]:
    keys: Sequence[str] = [key for key, _ in buffer.dead_letter_keys()]
    return [DeadLetter.from_json(letter) for key in keys for letter in buffer.dead_letters(key)]
