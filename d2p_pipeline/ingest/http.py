"""HTTP/1.1 on a socket: llhttp (the parser of Node.js, by httptools) finds the requests, a handler answers each `Exchange`.

The handler is called once a request is whole, if its body is small, else once its head is; it answers at once or later. Of
one connection the handler has one exchange at a time, so that answers keep the order of pipelined requests. What is
read ahead is bounded: a connection is not read while a request waits behind another, a body is not taken from it, or the
client does not take its answers, and then the next is not handed over either. There is no task, future or timer per request.

What RFC 9112 lets a server do is done where it makes a difference to clients: a request to change to another protocol is
answered as if it had not asked. What two programs could read in two ways is refused.
"""

import asyncio
import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from socket import socket
from typing import NoReturn, cast

import httptools

log = logging.getLogger(__name__)

HEAD_BYTES = 64 << 10
"""Longest request head, trailers included."""
HEADERS = 100
"""Most headers of a request."""
SMALL_BYTES = 64 << 10
"""A body of a known length up to this is there as a whole when the handler is called; of a larger one so much is read ahead."""
SWEEP_SECONDS = 0.25
"""How often connections are looked at that may have been silent for too long."""
LINGER_SECONDS = 2.0
"""How long a connection that is to end waits for the client: to read why it ends, or with TLS to say that it ends too."""
_NEVER = float("inf")

Headers = tuple[tuple[str, str], ...]


class ClientGoneError(ConnectionError):
    """The client went away before all of its request was there."""


class Exchange:
    """One request, to be answered once. Names of headers are in lower case."""

    __slots__ = (
        "_answered", "_awaited", "_connection", "_pieces", "arrived", "begun", "complete", "expects", "headers", "keep_alive",
        "length", "lost", "method", "path", "waiting",
    )  # fmt: skip

    def __init__(self, connection: "Connection", method: str, path: str, headers: dict[str, str]) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        length = headers.get("content-length")
        self.length = int(length) if length is not None else None
        """Bytes of the body, if the client told."""
        self.arrived = 0.0
        """When its head was there, by the event loop's clock, which uvloop itself cuts to milliseconds."""
        self.begun = False
        """Whether it is the handler's turn, or will be when the requests before it are answered."""
        self.complete = False
        """Whether the whole body is there."""
        self.keep_alive = True
        self.lost = False
        self.waiting = 0
        """Bytes of the body that were not read yet."""
        self._answered = False
        self._awaited: asyncio.Future[None] | None = None
        self._connection = connection
        self.expects = "expect" in headers and headers["expect"].lower() == "100-continue"
        """Whether the client waits to be asked for the body."""
        self._pieces: list[bytes] = []

    @property
    def is_small(self) -> bool:
        """Whether the handler gets it when it is whole."""
        return (self.length or 0) <= SMALL_BYTES and not (self.expects or "transfer-encoding" in self.headers)

    def take(self) -> bytes:
        """What there is of the body and was not read yet."""
        pieces = self._pieces
        if len(pieces) == 1:
            body = pieces[0]
            pieces.clear()
        else:
            body, self._pieces = b"".join(pieces), []
        self.waiting = 0
        return body

    async def read(self) -> bytes:
        """The next bytes of the body; none when it ends. ClientGoneError."""
        if self.expects and not self._pieces and not self.complete:
            self._connection.invite()
        self.expects = False
        while not self._pieces and not self.complete:
            if self.lost:
                raise ClientGoneError
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        body = self.take()
        self._connection.regulate()
        return body

    def came(self, piece: bytes) -> None:
        """More of the body arrived."""
        if not self._answered:
            self._pieces.append(piece)
            self.waiting += len(piece)
            self.wake()

    def wake(self) -> None:
        """Something happened that a reader waits for."""
        if self._awaited and not self._awaited.done():
            self._awaited.set_result(None)

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer it; goes nowhere if the client is gone. With the header `connection: close` the connection ends."""
        assert not self._answered
        self._answered = True
        self._pieces.clear()
        self.waiting = 0
        if ("connection", "close") in headers:
            self.keep_alive = False
        self._connection.answered(self, status, headers, body)


class Connection(asyncio.Protocol):
    """One client's requests, one after the other."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._parser = httptools.HttpRequestParser(self)
        self._upgrades = False
        """Whether the request asks for another protocol: the parser gives up after its head."""
        self._transport: asyncio.Transport
        self._deaf = False
        """Whether what comes in is thrown away: no request is answered any more, or what comes is none."""
        self._refusal = 0
        """What is answered after all other requests, as the next one cannot be read."""
        self._unframed = 0
        """Bytes that came since anything came that was a body's."""
        self._url = b""
        self._head = self._lines = 0
        """Bytes and lines of the current head."""
        self._headers: dict[str, str] = {}
        self._open: Exchange | None = None
        """The request whose head is there and whose body is not."""
        self._queue: deque[Exchange] = deque()
        self._current: Exchange | None = None
        """The request that is the handler's."""
        self._handing_over = False
        self._paused = self._clogged = self._ending = False
        self.deadline = _NEVER
        """When it is `overdue`, by the event loop's clock."""

    # --- the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are like it, but no subclass
        self._service.connections.add(self)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        self._queue.clear()
        for exchange in filter(None, (self._current, self._open)):
            exchange.lost = True
            exchange.wake()
        self._service.closed(self)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unframed += len(data)
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserCallbackError:
            if not self._refusal:
                log.exception("a request could not be taken in")
            self._refuse(self._refusal or 500)
        except httptools.HttpParserError:
            self._refuse(400)
        if self._unframed > HEAD_BYTES and not self._deaf:
            self._refuse(431 if self._open is None else 400)
        if self._open and not self._open.begun:
            self.deadline = self._open.arrived + self._service.body_seconds
        self.regulate()

    def _parse(self, data: bytes) -> bytes:
        """Take in what came; returns what is to be parsed again."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrades = False
            lines = (f"{name}: {value}\r\n" for name, value in self._headers.items() if name != "upgrade")
            first = (self._parser.get_method(), self._url, self._parser.get_http_version().encode())
            head = b"%b %b HTTP/%b\r\n%b\r\n" % (*first, "".join(lines).encode("latin-1"))
            self._parser = httptools.HttpRequestParser(self)
            return head + data[upgrade.args[0] :]
        return b""

    def eof_received(self) -> bool:
        """The client sends no more. What it sent whole is answered first; TLS has no such half of a connection."""
        self._ending = True
        is_waiting = self._current is not None or bool(self._queue)
        return is_waiting and self._open is None and self._transport.get_extra_info("ssl_object") is None

    def pause_writing(self) -> None:
        self._clogged = True
        self.regulate()

    def resume_writing(self) -> None:
        self._clogged = False
        self._hand_over()
        self.regulate()

    def regulate(self) -> None:
        """Read on, or not, as long as there is enough to do."""
        backlog = self._current.waiting if self._current else 0
        pause = bool(self._queue) or self._clogged or backlog > SMALL_BYTES
        if pause != self._paused and not self._transport.is_closing():
            self._paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # --- what the parser finds

    def on_message_begin(self) -> None:
        self._url = b""
        self._head = self._lines = self._unframed = 0
        self._headers = {}
        if self._current is None:
            self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._grown(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        self._grown(len(name) + len(value))
        if self._open is None:  # else it is a trailer
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            if key == "host" and key in self._headers:
                self._cannot_take(400, "there are two hosts")
            self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def _grown(self, size: int) -> None:
        self._head += size
        if self._head > HEAD_BYTES or self._lines > HEADERS:
            self._cannot_take(431, "the head is too long")

    def _cannot_take(self, status: int, why: str) -> NoReturn:
        self._refusal = status
        raise ValueError(why)

    def on_headers_complete(self) -> None:
        method, version, headers = (
            self._parser.get_method().decode("latin-1"),
            self._parser.get_http_version(),
            self._headers,
        )
        if version == "1.1" and "host" not in headers:
            self._cannot_take(400, "there is no host")
        if headers.get("transfer-encoding", "chunked").lower() != "chunked" or method == "CONNECT":
            self._cannot_take(501, "neither codings but chunked nor tunnels")
        if self._parser.should_upgrade():
            self._upgrades = True
            return
        path = self._url.partition(b"?")[0].decode("latin-1")
        if "://" in path:  # the absolute form, as for a proxy
            path = "/" + path.partition("://")[2].partition("/")[2]
        exchange = Exchange(self, method, path, headers)
        exchange.arrived = time.monotonic()
        exchange.keep_alive = self._parser.should_keep_alive() and version == "1.1"
        self._open = exchange
        self._unframed = 0
        if not exchange.is_small:
            self._begin(exchange)

    def on_body(self, body: bytes) -> None:
        assert self._open
        self._unframed = 0
        self._open.came(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            return
        exchange, self._open = self._open, None
        assert exchange
        exchange.complete = True
        exchange.wake()
        if not exchange.begun:
            self._begin(exchange)
        elif self._current is None and not self._queue:  # it was answered before
            self._wait_for_head()

    # --- turns

    def _wait_for_head(self) -> None:
        self.deadline = self._service.loop.time() + self._service.head_seconds

    def _begin(self, exchange: Exchange) -> None:
        if self._deaf:
            return
        exchange.begun = True
        self._queue.append(exchange)
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the handler the next request, if it is its turn."""
        if self._handing_over:  # it was answered at once
            return
        self._handing_over = True
        while self._queue and self._current is None and not self._clogged:
            self._current = self._queue.popleft()
            self.deadline = _NEVER
            try:
                self._service.handler(self._current)
            except Exception:
                log.exception("the handler failed")
                self._current.answer(500, (("connection", "close"),), b"")
        self._handing_over = False
        if self._refusal and self._current is None and not self._queue:
            self._write(self._refusal, (("connection", "close"),), b"")
            self._end()

    def invite(self) -> None:
        """Tell a client that asked that its body is welcome."""
        self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def answered(self, exchange: Exchange, status: int, headers: Headers, body: bytes) -> None:
        """Send the answer to the current request and go on with the next."""
        if exchange is not self._current or self._transport.is_closing():
            return
        self._current = None
        uninvited = exchange.expects and not exchange.complete  # nobody knows whether its body comes
        last = uninvited or not exchange.keep_alive or (self._ending and not self._queue and not self._refusal)
        if last and ("connection", "close") not in headers:
            headers = (*headers, ("connection", "close"))
        self._write(status, headers, body, with_body=exchange.method != "HEAD")
        if last:
            self._end()
            return
        self._wait_for_head()
        self._hand_over()
        self.regulate()

    def _write(self, status: int, headers: Headers, body: bytes, *, with_body: bool = True) -> None:
        start, sent = _start(status, headers), body if with_body else b""
        self._transport.write(b"%b%d\r\n%b%b" % (start, len(body), self._service.date, sent))

    def _refuse(self, status: int) -> None:
        """Nothing that comes is read any more; the requests that were read are answered, and then this one."""
        if self._deaf:  # it has ended
            return
        self._service.on_refusal(status)
        self._deaf = True
        if self._open:  # its body cannot be read to its end
            self._open.lost = True
            self._open.wake()
            if self._open is self._current:
                self._current = None
            elif self._open.begun:
                self._queue.remove(self._open)
            self._open = None
        self._refusal = status
        self._hand_over()

    def _end(self) -> None:
        """End the connection, the answers being sent before."""
        self._queue.clear()
        self._refusal = 0
        unread = self._open is not None or self._deaf
        self._deaf = True
        if unread and self._transport.can_write_eof():
            # Closed at once, it would be reset by what still comes, and the answer lost.
            self._transport.write_eof()
            self.deadline = self._service.loop.time() + LINGER_SECONDS
            self.regulate()
        else:
            self._transport.close()

    def overdue(self) -> None:
        """What was to come did not: a body too slow is the handler's affair, all else ends."""
        self.deadline = _NEVER
        if self._open and not self._open.begun and not self._deaf:
            self._begin(self._open)
        else:
            self._transport.abort()

    def finish(self) -> None:
        """End as soon as the requests that have begun are answered."""
        self._ending = True
        if self._current is None and self._open is None and not self._queue:
            self._transport.close()


class Service:
    """All connections of a process, at most `most` at a time; further ones wait to be accepted.

    `on_refusal` is told the status that answers what never became a request.
    """

    def __init__(
        self,
        handler: Callable[[Exchange], None],
        *,
        head_seconds: float,
        body_seconds: float,
        most: int,
        on_refusal: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.handler = handler
        self.on_refusal = on_refusal
        self.head_seconds = head_seconds
        self.body_seconds = body_seconds
        self.connections: set[Connection] = set()
        self.loop = asyncio.get_running_loop()
        self.date = b""
        self._free = asyncio.Semaphore(most)
        self._none = asyncio.Event()
        self._greeting: set[asyncio.Task[None]] = set()
        self._swept = self.loop.time()
        self._sweep()

    async def accept(self, listener: socket, tls: ssl.SSLContext | None) -> None:
        """Take connections in until it is cancelled."""
        while True:
            await self._free.acquire()
            try:
                client, _ = await self.loop.sock_accept(listener)
            except OSError:  # it went away again, or there are too many open files
                self._free.release()
                await asyncio.sleep(0.01)
                continue
            except asyncio.CancelledError:
                self._free.release()
                raise
            task = self.loop.create_task(self._greet(client, tls))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, client: socket, tls: ssl.SSLContext | None) -> None:
        timeouts = {"ssl_handshake_timeout": self.head_seconds, "ssl_shutdown_timeout": LINGER_SECONDS} if tls else {}
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self), client, ssl=tls, **timeouts)
        except (OSError, TimeoutError):  # ssl.SSLError is an OSError: no TLS, or no certificate that counts
            client.close()
            self._free.release()

    def closed(self, connection: Connection) -> None:
        """A connection is no more."""
        self.connections.discard(connection)
        self._free.release()
        if not self.connections:
            self._none.set()

    async def drain(self, seconds: float) -> None:
        """Answer what has begun, take nothing new, and end all connections, after `seconds` in any case."""
        if not self.connections:
            return
        self._none.clear()
        for connection in list(self.connections):
            connection.finish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    def _sweep(self) -> None:
        self.date = f"date: {formatdate(time.time(), usegmt=True)}\r\n\r\n".encode()
        for connection in list(self.connections):
            # Since the last sweep what clients had sent was read, however long this process stood still in between.
            if connection.deadline <= self._swept:
                connection.overdue()
        self._swept = self.loop.time()
        self.loop.call_later(SWEEP_SECONDS, self._sweep)


@lru_cache(maxsize=256)
def _start(status: int, headers: Headers) -> bytes:
    """An answer's head up to the number of its bytes."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\ncontent-length: ").encode("latin-1")
