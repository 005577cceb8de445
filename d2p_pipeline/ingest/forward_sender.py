"""Delivers lines to a Forward listener as Fluent Bit would: compressed chunks, each sent again until it is acknowledged."""

import gzip
import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import msgpack
import msgspec

from d2p_pipeline.ingest.delivering import Answer, Refused, Sent, batches, deliver

TAG = "d2p.generate"
_ANSWER_SECONDS = 60.0


def send(
    lines: Iterable[bytes],
    address: str,
    *,
    batch: int = 500,
    connections: int = 4,
    shared_key: str | None = None,
    user: str = "",
    tls: ssl.SSLContext | None = None,
    patience: float = 60.0,
    on_progress: Callable[[int], object] = lambda records: None,
) -> Sent:
    """Send `lines` to `address` (`host:port`), `batch` records a chunk, over `connections` at a time.

    `user` reads `name:password`. The acknowledgement does not tell good records from bad: all count as accepted. Raises
    Undelivered as `deliver` does, and ValueError for an address that is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address} is no address: give host:port, for example 127.0.0.1:24224")
    with ExitStack() as stack:
        clients = [_Client(host, int(port), shared_key, user, tls) for _ in range(connections)]
        for client in clients:
            stack.callback(client.close)
        return deliver(
            batches(lines, batch),
            address,
            [client.post for client in clients],
            transient=(OSError,),
            patience=patience,
            on_progress=on_progress,
        )


class _Client:
    """One connection, opened when it is needed and after it broke."""

    def __init__(self, host: str, port: int, shared_key: str | None, user: str, tls: ssl.SSLContext | None) -> None:
        self._host, self._port = host, port
        self._shared_key = shared_key
        self._user, _, self._password = user.partition(":")
        self._tls = tls
        self._socket: socket.socket | None = None
        self._unpacker = msgpack.Unpacker()

    def post(self, lines: list[bytes], name: str) -> Answer:
        now = time.time_ns()
        moment = msgpack.ExtType(0, b"".join(n.to_bytes(4, "big") for n in divmod(now, 1_000_000_000)))
        entries = b"".join(_packed([[moment, {}], _value(line)]) for line in lines)
        options = {"chunk": name, "size": len(lines), "compressed": "gzip"}
        message = _packed([TAG, gzip.compress(entries, 1), options])
        try:
            connection = self._socket or self._connect()
            connection.sendall(message)
            acknowledged = self._read(connection)
        except OSError:
            self.close()
            raise
        if acknowledged != {"ack": name}:
            self.close()
            raise Refused(f"it answered {acknowledged!r}, not the acknowledgement of {name}")
        return Answer(len(lines))

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    def _connect(self) -> socket.socket:
        plain = socket.create_connection((self._host, self._port), timeout=_ANSWER_SECONDS)
        self._socket = self._tls.wrap_socket(plain, server_hostname=self._host) if self._tls else plain
        self._unpacker = msgpack.Unpacker()
        if self._shared_key is not None:
            self._greet(self._socket, self._shared_key)
        return self._socket

    def _greet(self, connection: socket.socket, shared_key: str) -> None:
        match self._read(connection):
            case ["HELO", {"nonce": str(nonce), "auth": str(salt)}]:
                pass
            case other:
                raise Refused(f"it answered {other!r}, not HELO")
        hostname, key_salt = socket.gethostname(), hashlib.sha256(nonce.encode()).hexdigest()[:16]
        digest = hashlib.sha512(f"{key_salt}{hostname}{nonce}{shared_key}".encode()).hexdigest()
        password = hashlib.sha512(f"{salt}{self._user}{self._password}".encode()).hexdigest()
        connection.sendall(_packed(["PING", hostname, key_salt, digest, self._user, password]))
        match self._read(connection):
            case ["PONG", True, *_]:
                return
            case ["PONG", False, reason, *_]:
                raise Refused(f"it does not let this client in: {reason}")
            case other:
                raise Refused(f"it answered {other!r}, not PONG")

    def _read(self, connection: socket.socket) -> object:
        while True:
            try:
                return self._unpacker.unpack()
            except msgpack.OutOfData:
                data = connection.recv(1 << 16)
                if not data:
                    raise ConnectionResetError(
                        "the listener closed the connection without an acknowledgement"
                    ) from None
                self._unpacker.feed(data)


def _value(line: bytes) -> object:
    """What a line holds; one that is no JSON goes as text, which is no record."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return line


def _packed(value: object) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed
