"""The Forward door: every mode, acknowledgement after storage, who is let in, and peers that mean harm."""

import asyncio
import contextlib
import gzip
import socket
import ssl
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from d2p_pipeline.buffer.memory import MemoryBuffer
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest import forward
from d2p_pipeline.ingest.forward import Credentials, ForwardError, Framer, parse
from d2p_pipeline_tests.certificates import Certificates
from d2p_pipeline_tests.ingest.forward_client import (
    RECORD,
    SECONDS,
    Client,
    conversion,
    entry,
    event_time,
    letters,
    listening,
    packed,
    stored,
)

CAPTURES = Path(__file__).parents[1] / "fixtures" / "fluent"
DEFAULTS = {"level": "info", "application-service": "api", "business-capability": "shop", "business-service": "web"}


def memory() -> MemoryBuffer:
    return MemoryBuffer(full_records=100, full_bytes=1 << 20)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def messages(records: list[dict[str, Any]]) -> list[str]:
    return sorted(record["message"] for record in records)


# --- modes

_ENTRIES = [entry(1), entry(2)]
_PACKED = packed(_ENTRIES[0]) + packed(_ENTRIES[1])
_FRAME = zstandard.ZstdCompressor().compress(_PACKED)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([_ENTRIES, {"chunk": "c", "size": 2}], id="forward"),
        pytest.param([_PACKED, {"chunk": "c"}], id="packed"),
        pytest.param([_PACKED, {"chunk": "c", "compressed": "text"}], id="packed text"),
        pytest.param([_PACKED.decode("utf-8", "surrogateescape"), {"chunk": "c"}], id="packed in a string"),
        pytest.param([gzip.compress(_PACKED), {"chunk": "c", "compressed": "gzip"}], id="gzip"),
        pytest.param(
            [gzip.compress(packed(entry(1))) + gzip.compress(packed(entry(2))), {"chunk": "c", "compressed": "gzip"}],
            id="two gzip members",
        ),
        pytest.param([_FRAME, {"chunk": "c", "compressed": "zstd"}], id="zstd"),
    ],
)
def test_every_mode_of_many_records_is_stored_then_acknowledged(parts: list[Any]) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (_, port):
            client = await Client.connect(port)
            await client.send("app.shop", *parts)
            assert await client.read() == {"ack": "c"}
        records = stored(buffer)
        assert messages(records) == ["m1", "m2"]
        assert {record["args"]["fluent-tag"] for record in records} == {"app.shop"}
        assert {record["time"] for record in records} == {"2023-11-14T22:13:20.123456789Z"}

    run(test())


def test_single_records_are_stored_with_the_metadata_of_their_options() -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (listener, port):
            client = await Client.connect(port)
            await client.send("t", SECONDS, {**RECORD, "message": "m1"})
            await client.send("t", event_time(), {**RECORD, "message": "m2"}, {"chunk": "c", "metadata": {"m": 1}})
            assert await client.read() == {"ack": "c"}
            assert listener.counts.records == 2
        records = stored(buffer)
        assert messages(records) == ["m1", "m2"]
        assert [record.get("extra-fields") for record in records] == [None, {"fluent-metadata": '{"m":1}'}]

    run(test())


def test_without_a_chunk_nothing_is_acknowledged_and_everything_stored() -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (listener, port):
            client = await Client.connect(port)
            await client.send("t", _ENTRIES)
            await client.send("t", [entry(3)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
            assert listener.counts.acknowledged == 1
        assert messages(stored(buffer)) == ["m1", "m2", "m3"]

    run(test())


def test_messages_may_come_in_any_pieces_and_many_at_once() -> None:
    async def test() -> None:
        buffer = memory()
        data = b"".join(packed(["t", [entry(n)], {"chunk": f"c{n}"}]) for n in range(5))
        async with listening(buffer) as (_, port):
            client = await Client.connect(port)
            for start in range(0, len(data), 7):
                await client.write(data[start : start + 7])
                await asyncio.sleep(0)
            assert [await client.read() for _ in range(5)] == [{"ack": f"c{n}"} for n in range(5)]
        assert messages(stored(buffer)) == [f"m{n}" for n in range(5)]

    run(test())


@pytest.mark.parametrize("name", sorted(path.name for path in CAPTURES.glob("*.bin")))
def test_what_fluent_bit_sent_is_stored_and_acknowledged(name: str) -> None:
    async def test() -> None:
        buffer = memory()
        data = (CAPTURES / name).read_bytes()
        pattern = "kube.var.log.containers.{application-service}_{business-capability}_{business-service}-*.log"
        async with listening(buffer, converting=conversion(pattern=pattern, defaults=DEFAULTS)) as (listener, port):
            client = await Client.connect(port)
            await client.write(data)
            if "default" not in name:
                acknowledgement = await client.read()
                assert list(acknowledgement) == ["ack"]
                assert acknowledgement["ack"].encode() in data
            await client.send("t", [], {"chunk": "end"})
            assert await client.read() == {"ack": "end"}
            assert listener.counts.dead_letters == 0
        records = stored(buffer)
        if "five" in name:
            assert [(r["message"], r["business-capability"]) for r in records] == [("héllo", "cap")] * 5
            return
        [record] = records
        assert record["message"] == "served GET /v1/orders/17 with 200"
        assert record["duration"] == "12.5"
        extra = record["extra-fields"]
        assert extra["bytes"] == "18446744073709551615"
        assert '"app.kubernetes.io/name":"checkout"' in extra["kubernetes"]
        assert record["time"].startswith(("2026-11-21T", "17"))
        has_metadata = "v1" not in name and "integer" not in name
        assert extra.get("fluent-metadata") == ('{"source":"dummy","severity":9}' if has_metadata else None)
        if "message" in name:
            assert record["args"]["fluent-tag"] == "app.shop"
        else:
            assert (record["application-service"], record["business-capability"]) == ("checkout-7d9c", "shop")
            assert record["business-service"] == "api"

    run(test())


# --- dead letters


def test_what_is_no_record_becomes_a_dead_letter_and_the_chunk_is_acknowledged() -> None:
    async def test() -> None:
        buffer = memory()
        entries = [entry(1), "no event", [SECONDS, {"level": "x"}], entry(2, message=b"caf\xe9".decode("latin1"))]
        async with listening(buffer) as (listener, port):
            client = await Client.connect(port)
            await client.send("t", entries, {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
            assert (listener.counts.records, listener.counts.dead_letters) == (2, 2)
        kept = letters(buffer)
        assert kept[0].raw == packed("no event")
        assert "business-capability: required" in kept[1].reason
        assert b'"level":"x"' in kept[1].raw

    run(test())


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        ({"compressed": "gzip"}, gzip.compress(_PACKED)[:-9], "gzip"),
        ({"compressed": "gzip"}, b"plain", "gzip"),
        ({"compressed": "lz4"}, b"data", "'lz4' is not known"),
        ({"compressed": "gzip"}, gzip.compress(bytes(1 << 23)), "expands"),
        ({"compressed": "zstd"}, zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28)), "expands"),
        ({"fluent_signal": 1}, b"metrics", "metrics"),
    ],
)
def test_a_chunk_that_cannot_be_read_is_kept_whole_and_acknowledged(
    options: dict[str, Any], data: bytes, reason: str
) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (_, port):
            client = await Client.connect(port)
            await client.send("t", data, {"chunk": "c", **options})
            assert await client.read() == {"ack": "c"}
        [letter] = letters(buffer)
        assert reason in letter.reason
        assert letter.raw == packed(["t", data, {"chunk": "c", **options}])

    run(test())


# --- delivered once


def test_a_chunk_that_comes_again_changes_nothing(redis_buffer: RedisBuffer) -> None:
    async def test() -> None:
        mixed = [entry(1), entry(2, business_capability="other"), "no event"]
        async with listening(redis_buffer) as (_, port):
            for _ in range(3):
                client = await Client.connect(port)
                await client.send("t", mixed, {"chunk": "c"})
                assert await client.read() == {"ack": "c"}
                client.close()
            client = await Client.connect(port)
            await client.send("another tag", [entry(3)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
        assert messages(stored(redis_buffer)) == ["m1", "m2", "m3"]
        assert len(letters(redis_buffer)) == 1

    run(test())


def test_a_full_buffer_ends_the_connection_without_acknowledgement_and_the_retry_is_stored_once(
    redis_buffer: RedisBuffer, redis_client: Redis
) -> None:
    async def test() -> None:
        async with listening(redis_buffer) as (listener, port):
            redis_client.config_set("maxmemory", 1)
            client = await Client.connect(port)
            await client.send("t", [entry(1)], {"chunk": "c"})
            assert await client.read() is None
            assert listener.counts.refused == 1
            redis_client.config_set("maxmemory", 0)
            client = await Client.connect(port)
            await client.send("t", [entry(1)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
        assert messages(stored(redis_buffer)) == ["m1"]

    run(test())


def test_what_nobody_would_send_again_waits_until_the_buffer_takes_it(
    redis_buffer: RedisBuffer, redis_client: Redis
) -> None:
    async def test() -> None:
        async with listening(redis_buffer) as (listener, port):
            redis_client.config_set("maxmemory", 1)
            client = await Client.connect(port)
            await client.send("t", [entry(1)])
            while not listener.counts.messages:
                await asyncio.sleep(0.01)
            assert listener.counts.records == 0
            redis_client.config_set("maxmemory", 0)
            await client.send("t", [entry(2)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
        assert messages(stored(redis_buffer)) == ["m1", "m2"]

    run(test())


def test_a_listener_that_stops_stores_and_acknowledges_what_was_sent_before() -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (listener, port):
            idle, busy, half = [await Client.connect(port) for _ in range(3)]
            await half.write(packed(["t", [entry(9)], {"chunk": "half"}])[:-3])
            await busy.send("t", [entry(1)], {"chunk": "c"})
            await busy.send("t", [entry(2)], {"chunk": "d"})
            await listener.stop()
            assert [await busy.read() for _ in range(3)] == [{"ack": "c"}, {"ack": "d"}, None]
            assert await idle.read() is None
            assert await half.read() is None
        assert messages(stored(buffer)) == ["m1", "m2"]

    run(test())


# --- who is let in


@pytest.mark.parametrize("users", [{}, {"agent": "secret", "other": "x"}])
def test_a_client_that_knows_the_secrets_is_let_in(users: dict[str, str]) -> None:
    async def test() -> None:
        buffer = memory()
        credentials = Credentials("key", users, "here")
        async with listening(buffer, credentials=credentials) as (_, port):
            client = await Client.connect(port)
            assert (await client.greet("key", "agent", "secret"))[:4] == ["PONG", True, "", "here"]
            await client.send("t", [entry(1)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
        assert messages(stored(buffer)) == ["m1"]

    run(test())


@pytest.mark.parametrize(
    ("key", "user", "password", "reason"),
    [
        ("wrong", "agent", "secret", "shared key mismatch"),
        ("key", "agent", "wrong", "user or password"),
        ("key", "nobody", "secret", "user or password"),
        ("key", "", "", "user or password"),
    ],
)
def test_a_client_that_does_not_is_told_why_and_nothing_of_it_is_stored(
    key: str, user: str, password: str, reason: str
) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, credentials=Credentials("key", {"agent": "secret"})) as (_, port):
            client = await Client.connect(port)
            assert await client.greet(key, user, password) == ["PONG", False, reason, "", ""]
            assert await client.read() is None
        assert stored(buffer) == []

    run(test())


@pytest.mark.parametrize(
    "data",
    [
        packed(["t", [entry(1)], {"chunk": "c"}]),
        packed(["PING", "host", "salt", "digest", "user"]),
        packed(["PING", 1, 2, 3, 4, 5]),
        packed("PING"),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xc1",
        bytes(10_000),
    ],
)
def test_who_does_not_answer_the_handshake_is_not_let_in(data: bytes) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, credentials=Credentials("key")) as (listener, port):
            client = await Client.connect(port)
            await client.write(data)
            answers = [await client.read(), await client.read()]
            assert answers[0][0] == "HELO"
            assert answers[1] is None or answers[1][1] is False
            while not listener.counts.broken:
                await asyncio.sleep(0.01)
        assert stored(buffer) == []
        assert letters(buffer) == []

    run(test())


def test_who_says_nothing_in_the_handshake_is_a_probe() -> None:
    async def test() -> None:
        async with listening(memory(), credentials=Credentials("key")) as (listener, port):
            client = await Client.connect(port)
            assert (await client.read())[0] == "HELO"
            client.close()
            while not listener.counts.connections or listener.counts.connected:
                await asyncio.sleep(0.01)
            assert not listener.counts.broken

    run(test())


# --- peers that mean harm


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xc1",
        packed({"tag": "t"}),
        packed([]),
        packed(["t"]),
        packed([1, [entry(1)]]),
        packed(["t", None]),
        packed(["t", SECONDS]),
        b"\x91" * 5000,
        b"\x93\xa1t\xc6\xff\xff\xff\xff" + bytes(2 << 20),
        b"\x93\xa1t\xdd\xff\xff\xff\xff" + bytes(2 << 20),
    ],
    ids=range(11),
)
def test_what_is_no_message_ends_its_connection_and_no_other(data: bytes) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, max_bytes=1 << 20) as (listener, port):
            good = await Client.connect(port)
            hostile = await Client.connect(port)
            with contextlib.suppress(ConnectionError):  # it may be shut out while it still writes
                await hostile.write(data)
            assert await hostile.read() is None
            await good.send("t", [entry(1)], {"chunk": "c"})
            assert await good.read() == {"ack": "c"}
            assert listener.counts.broken == 1
        assert messages(stored(buffer)) == ["m1"]
        assert letters(buffer) == []

    run(test())


def test_half_a_message_is_not_waited_for_longer_than_allowed(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, message_seconds=0.05) as (listener, port):
            slow = await Client.connect(port)
            await slow.write(packed(["t", [entry(1)], {"chunk": "c"}])[:-1])
            assert await slow.read() is None
            assert listener.counts.broken == 1
        assert stored(buffer) == []
        assert "connection closed: it was too slow" in caplog.text

    run(test())


def test_a_connection_may_be_silent_between_messages() -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, message_seconds=0.05) as (_, port):
            client, other = await Client.connect(port), await Client.connect(port)
            await client.send("t", [entry(1)], {"chunk": "c"})
            assert await client.read() == {"ack": "c"}
            await other.write(packed(["t", [entry(9)]])[:-1])
            assert await other.read() is None  # at least the time allowed for a message has passed
            await client.send("t", [entry(2)], {"chunk": "d"})
            assert await client.read() == {"ack": "d"}

    run(test())


def test_many_large_messages_at_once_wait_for_each_other_and_all_arrive() -> None:
    async def one(port: int, number: int) -> None:
        client = await Client.connect(port)
        text = "x" * 60_000
        await client.send("t", [entry(number, text=text)] * 30, {"chunk": f"c{number}"})
        assert await client.read() == {"ack": f"c{number}"}

    async def test() -> None:
        buffer = memory()
        async with listening(buffer) as (listener, port):
            await asyncio.gather(*(one(port, number) for number in range(12)))
            assert listener.counts.records == 360

    run(test())


def test_beyond_the_limit_of_connections_new_ones_are_closed() -> None:
    async def test() -> None:
        buffer = memory()
        async with listening(buffer, max_connections=1) as (_, port):
            first = await Client.connect(port)
            await first.send("t", [entry(1)], {"chunk": "c"})
            assert await first.read() == {"ack": "c"}
            second = await Client.connect(port)
            assert await second.read() is None
            await first.send("t", [entry(2)], {"chunk": "d"})
            assert await first.read() == {"ack": "d"}

    run(test())


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_in_any_pieces_are_framed_alike_or_refused(data: bytes, size: int) -> None:
    def framed(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        framer, found = Framer(1000), list[bytes]()
        try:
            for piece in pieces:
                framer.feed(piece)
                while (message := framer.next()) is not None:
                    found.append(message)
        except ForwardError:
            return found, True
        assert framer.pending == len(data) - sum(map(len, found))
        return found, False

    whole = framed([data])
    assert framed([data[at : at + size] for at in range(0, len(data), size)]) == whole
    assert data.startswith(b"".join(whole[0]))
    for message in whole[0]:
        with contextlib.suppress(ForwardError):
            parse(message)


_parts = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**64 - 1) | st.text(max_size=9) | st.binary(max_size=40) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.lists(_parts, max_size=5)
    | st.tuples(
        st.text(max_size=9),
        st.lists(_parts, max_size=3) | st.binary(max_size=40) | _parts,
        st.fixed_dictionaries(
            {}, optional={"chunk": _parts, "compressed": _parts | st.just("gzip"), "fluent_signal": _parts}
        ),
    )
)
def test_any_message_is_refused_or_everything_of_it_is_kept(parts: Any) -> None:
    try:
        message = parse(packed(parts))
    except ForwardError:
        return
    request, records, dead_letters = conversion().request(message)
    if not message.packed and not dead_letters:
        assert not records
    else:
        assert records + dead_letters > 0
    assert (request.id == "") == (message.chunk is None)


# --- TLS


def test_tls_carries_the_same_and_who_says_no_goodbye_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "GOODBYE_SECONDS", 0.1)
    monkeypatch.setattr(forward, "HANDSHAKE_SECONDS", 60)

    def connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
        connection = socket.create_connection(("127.0.0.1", port), 30)
        return context.wrap_socket(connection, server_hostname="localhost")

    async def test() -> None:
        certificates = Certificates.make(tmp_path)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificates.certificate, certificates.key)
        buffer = memory()
        async with listening(buffer, tls=server) as (listener, port):
            plain = await Client.connect(port)
            await plain.send("t", [entry(1)], {"chunk": "c"})
            assert await plain.read() is None
            context = ssl.create_default_context(cafile=str(certificates.certificate))
            client = await Client.connect(port, context)
            await client.send("t", [entry(2)], {"chunk": "d"})
            assert await client.read() == {"ack": "d"}
            client.close()
            with await asyncio.to_thread(connect, port, context):
                async with asyncio.timeout(20):
                    await listener.stop()
        assert messages(stored(buffer)) == ["m2"]

    run(test())
