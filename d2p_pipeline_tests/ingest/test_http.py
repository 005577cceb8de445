"""HTTP on a socket: however the bytes come, requests are found and answered in order, and what is none ends its connection."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from d2p_pipeline.ingest.http import HEADERS, SMALL_BYTES, SWEEP_SECONDS, ClientGoneError, Exchange, Service

TOTAL_SECONDS = 30
LONG = 1 << 20


class Echo:
    """Answers with method, path and body; `/early` before the body is there, `/later` when it is told to."""

    def __init__(self) -> None:
        self.requests = 0
        self.later = asyncio.Event()
        self.gone = asyncio.Event()
        self.service: Service
        self.stall: Callable[[Service], None]
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, exchange: Exchange) -> None:
        if exchange.path == "/defect":
            raise RuntimeError("a defect")
        self.requests += 1
        if exchange.path == "/stall":
            self.stall(self.service)
        if exchange.path == "/early":
            exchange.answer(401, (), b"")
        elif exchange.path == "/long":
            exchange.answer(200, (), bytes(LONG))
        elif exchange.complete and exchange.path != "/later":
            self._answer(exchange, exchange.take())
        else:
            task = asyncio.create_task(self._read(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, exchange: Exchange) -> None:
        body = b""
        try:
            while piece := await exchange.read():
                body += piece
        except ClientGoneError:
            self.gone.set()
            return
        if exchange.path == "/later":
            await self.later.wait()
        self._answer(exchange, body)

    def _answer(self, exchange: Exchange, body: bytes) -> None:
        exchange.answer(200, (), b"<%b %b %b>" % (exchange.method.encode(), exchange.path.encode(), body))


Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Echo], Awaitable[None]]


def served(client: Client, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    """Run a client against the echo."""

    async def run() -> None:
        echo = Echo()
        service = Service(echo.handle, head_seconds=TOTAL_SECONDS, body_seconds=TOTAL_SECONDS, most=10)
        echo.service = service
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            listener.setblocking(False)
            accepting = asyncio.create_task(service.accept(listener, None))
            async with asyncio.timeout(TOTAL_SECONDS):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await client(reader, writer, echo)
                writer.close()
            accepting.cancel()
            await service.drain(1)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


def exchanged(sent: bytes) -> bytes:
    """What comes back until the connection ends."""
    received = b""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        nonlocal received
        writer.write(sent)
        received = await reader.read()

    served(client)
    return received


def post(path: str, body: bytes, *headers: str) -> bytes:
    return (
        "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]).encode()
        + body
    )


LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = (
    b"POST /chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: t\r\n\r\n"
)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=12))
def test_requests_are_found_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    requests = post("/one", b"first") + CHUNKED + post("/empty", b"") + post("/two", b"x" * 200) + LAST
    received = b""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        nonlocal received
        begin = 0
        for end in (*sorted(set(cuts)), len(requests)):
            writer.write(requests[begin:end])
            await writer.drain()
            await asyncio.sleep(0)
            begin = end
        received = await reader.read()

    served(client)
    bodies = [part.split(b">")[0] for part in received.split(b"<")[1:]]
    assert bodies == [
        b"POST /one first",
        b"POST /chunked abcde",
        b"POST /empty ",
        b"POST /two " + b"x" * 200,
        b"GET /last ",
    ]


def test_a_large_body_comes_whole_though_it_is_read_in_pieces() -> None:
    body = bytes(range(256)) * (SMALL_BYTES // 32)
    assert b"<POST /large %b>" % body in exchanged(post("/large", body) + LAST)


def test_the_answer_to_an_early_request_comes_first() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        writer.write(post("/later", b"1") + post("/soon", b"2") * 1000 + LAST)
        echo.later.set()
        received = await reader.read()
        assert received.count(b"<POST /soon 2>") == 1000
        assert received.index(b"/later") < received.index(b"/soon") < received.index(b"/last")

    served(client)


def test_a_body_that_nobody_reads_is_passed_over() -> None:
    received = exchanged(post("/early", b"x" * 10 * SMALL_BYTES) + post("/next", b"y") + LAST)
    assert received.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert b"<POST /next y>" in received


def test_a_client_that_asks_before_it_sends_is_told_to() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        writer.write(post("/asked", b"hello", "Expect: 100-continue", "Connection: close")[:-5])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        assert (await reader.read()).endswith(b"<POST /asked hello>")

    served(client)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
    ids=["1.0", "close"],
)
def test_what_is_to_end_is_answered_and_says_so(request_: bytes) -> None:
    head, _, body = exchanged(request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nconnection: close\r\n" in head
    assert body == b"<GET / >"


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: x")


@pytest.mark.parametrize("cut", [0, -3, -5, -8])
def test_a_client_that_asks_for_another_protocol_is_served_in_this_one(cut: int) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        sent = post("/", b"hello", *UPGRADE)
        writer.write(sent[:cut])
        await asyncio.sleep(0)
        writer.write(sent[cut:] + post("/next", b"", *UPGRADE) + LAST)
        assert [part.split(b">")[0] for part in (await reader.read()).split(b"<")[1:]] == [
            b"POST / hello",
            b"POST /next ",
            b"GET /last ",
        ]

    served(client)


def test_a_target_may_be_a_whole_url() -> None:
    assert exchanged(LAST.replace(b"/last", b"http://x:80/a?b=c")).endswith(b"<GET /a >")


def test_head_tells_the_length_and_sends_no_body() -> None:
    head, _, body = exchanged(LAST.replace(b"GET", b"HEAD")).partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: 13\r\n" in head
    assert body == b""


def test_a_body_that_was_not_asked_for_ends_the_connection() -> None:
    """Whether what comes next is that body or a request, nobody could tell."""
    received = exchanged(post("/early", b"x" * 20, "Expect: 100-continue")[:-20] + LAST)
    assert received.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in received
    assert received.count(b"HTTP/1.1") == 1


def test_nothing_is_answered_after_the_end(caplog: pytest.LogCaptureFixture) -> None:
    request = CHUNKED.replace(b"/chunked", b"/early").replace(b"Host: x", b"Host: x\r\nConnection: close")
    received = exchanged(request.replace(b"abc", b"abcd"))
    assert received.startswith(b"HTTP/1.1 401")
    assert received.count(b"HTTP/1.1") == 1
    assert not caplog.records


def test_who_does_not_read_is_not_answered_on() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" * 100 + LAST)
        while not echo.requests:
            await asyncio.sleep(0)
        assert echo.requests < 50
        received = 0
        while piece := await reader.read(LONG):
            received += len(piece)
        assert received > 100 * LONG
        assert echo.requests == 101

    served(client)


def headers(count: int) -> bytes:
    return LAST[:-2] + b"".join(b"h: %d\r\n" % number for number in range(count - 2)) + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (headers(HEADERS), b"200"),
        (headers(HEADERS + 1), b"431"),
        (LAST[:-2] + b"long: " + b"x" * (1 << 20), b"431"),
        (b"\r\n" * (1 << 20), b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * (1 << 20), b"400"),
        (CHUNKED[:-2] + b"long: " + b"x" * (1 << 20), b"400"),
        (CHUNKED[:-2] + b"h: v\r\n" * HEADERS + b"\r\n", b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", b"400"),
        (CHUNKED.replace(b": chunked", b": gzip, chunked"), b"501"),
        (CHUNKED.replace(b": chunked", b":\r\n chunked"), b"400"),
        (CHUNKED.replace(b"3\r\nabc", b"3\r\nabcd"), b"400"),
        (CHUNKED.replace(b"\r\n", b"\n"), b"400"),
        (LAST.replace(b"Connection", b"Connection "), b"400"),
        (LAST.replace(b"Host: x\r\n", b""), b"400"),
        (LAST.replace(b"Host: x", b"Host: x\r\nHost: x"), b"400"),
        (LAST.replace(b"GET /last", b"CONNECT x:80"), b"501"),
    ],
    ids=[
        "100",
        "101",
        "header",
        "newlines",
        "extension",
        "trailer",
        "trailers",
        "two framings",
        "two lengths",
        "coding",
        "fold",
        "chunk",
        "LF",
        "space",
        "no host",
        "two hosts",
        "tunnel",
    ],
)
def test_what_has_no_end_or_could_be_read_in_two_ways_is_refused(sent: bytes, status: bytes) -> None:
    assert exchanged(sent)[:12] == b"HTTP/1.1 " + status


def test_requests_before_a_broken_one_are_answered() -> None:
    received = exchanged(post("/good", b"1") + b"nonsense\r\n\r\n" + post("/after", b"2"))
    assert received.index(b"<POST /good 1>") < received.index(b"HTTP/1.1 400")
    assert b"/after" not in received


def test_a_handler_that_fails_costs_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    assert exchanged(post("/defect", b"1")).startswith(b"HTTP/1.1 500")
    assert "a defect" in caplog.text


def test_who_sent_a_request_while_the_process_stood_still_is_answered() -> None:
    """uvloop, which receivers use, looks at the time before it reads what has come meanwhile."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        with socket.create_connection(writer.get_extra_info("peername")) as other:
            while len(echo.service.connections) < 2:
                await asyncio.sleep(0)

            def stall(service: Service) -> None:
                for connection in service.connections:
                    connection.deadline = service.loop.time() + SWEEP_SECONDS / 2  # not that of the sweep before
                other.sendall(post("/two", b"in time"))
                time.sleep(2 * SWEEP_SECONDS)  # as long as the process stands still

            echo.stall = stall
            writer.write(post("/stall", b""))
            await reader.readuntil(b">")
            other.setblocking(False)
            assert b"<POST /two in time>" in await asyncio.get_running_loop().sock_recv(other, 1000)

    served(client, uvloop.new_event_loop)


def test_a_client_that_leaves_amid_its_body_is_noticed() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        writer.write(post("/large", b"x" * 10 * SMALL_BYTES)[:-1])
        await writer.drain()
        writer.close()
        await echo.gone.wait()

    served(client)


def test_a_client_that_has_sent_all_and_says_so_gets_its_answer() -> None:
    received = b""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        nonlocal received
        writer.write(post("/later", b"all of it"))
        writer.write_eof()
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.2, echo.later.set)
        received = await reader.read()

    served(client)
    assert b"<POST /later all of it>" in received


def test_a_client_that_sends_no_more_amid_a_request_is_gone() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, echo: Echo) -> None:
        writer.write(b"POST /one HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
        writer.write_eof()
        assert await reader.read() == b""

    served(client)
