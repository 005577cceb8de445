"""The SQS door against moto's server: stored then deleted, each message once, whatever dies or fails in between."""

import asyncio
import gzip
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from typer.testing import CliRunner

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Buffer
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.cli.app import app
from d2p_pipeline.ingest import sqs_sender
from d2p_pipeline.ingest.commit import GroupCommit, Request
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.messages import Messages, S3Objects
from d2p_pipeline.ingest.sqs import Message, Pollers, Queue, pollers_wanted
from d2p_pipeline_tests.fixtures.s3 import ACCESS_KEY, REGION, SECRET_KEY, Service, s3_service
from d2p_pipeline_tests.ingest.forward_client import RECORD, letters, rules, stored

__all__ = ["s3_service"]
pytestmark = pytest.mark.usefixtures("s3_service")
DEADLINE = 90.0
QUIET = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": REGION}


def record(number: int, **fields: object) -> str:
    return json.dumps({**RECORD, "time": "2024-05-01T12:00:00Z", "message": f"m{number}", **fields})


def client(service: str, url: str) -> Any:
    return Session().create_client(
        service,
        region_name=REGION,
        endpoint_url=url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )


@dataclass
class TestQueue:
    """A queue of its own, asked directly; `url` leads over the proxy."""

    __test__ = False

    direct: Any
    direct_url: str
    proxy: "Proxy"

    @property
    def url(self) -> str:
        return f"{self.proxy.url}/{self.direct_url.split('/', 3)[3]}"

    def send(self, *bodies: str) -> list[str]:
        return [self.direct.send_message(QueueUrl=self.direct_url, MessageBody=body)["MessageId"] for body in bodies]

    def left(self) -> int:
        """Messages that wait or are being worked on."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.direct.get_queue_attributes(QueueUrl=self.direct_url, AttributeNames=names)
        return sum(int(answer["Attributes"][name]) for name in names)


@dataclass
class Proxy:
    """Passes calls on to the server; `hooks` may keep parts of them from it."""

    upstream: str
    url: str = ""
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    hooks: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]] | None]] = field(default_factory=dict)
    """By operation: takes entries out of a call, and gives what the answer says of them."""

    def calls(self, operation: str) -> list[dict[str, Any]]:
        return [call for name, call in self.seen if name == operation]


@pytest.fixture
def queue(s3_service: Service) -> Iterator[TestQueue]:
    proxy = Proxy(s3_service.url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            operation = self.headers["X-Amz-Target"].rpartition(".")[2]
            proxy.seen.append((operation, call))
            hook = proxy.hooks.get(operation)
            failed = hook(call) if hook else None
            headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
            request = urllib.request.Request(proxy.upstream + self.path, json.dumps(call).encode(), headers)
            body: dict[str, Any] = {}
            if call.get("Entries") != []:
                with urllib.request.urlopen(request) as answer:
                    body = json.loads(answer.read() or b"{}")
            if failed:
                body.setdefault("Failed", []).extend(failed)
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        direct = client("sqs", s3_service.url)
        yield TestQueue(direct, direct.create_queue(QueueName=f"q{secrets.token_hex(6)}")["QueueUrl"], proxy)
        server.shutdown()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.02)


def polling(
    queue: TestQueue,
    buffer: Buffer,
    test: Callable[[Pollers], Awaitable[None]],
    *,
    visibility: int = 30,
    most: int = 4,
    convert: Messages | None = None,
) -> None:
    """Runs pollers beside `test`, then stops them."""

    async def run() -> None:
        commit = GroupCommit(buffer, window=600, keep_dead_letters=True)
        pollers = Pollers(
            Queue(client("sqs", queue.proxy.url), queue.url, wait=1, visibility=visibility),
            commit,
            convert or messages(),
            most=most,
            adapt_seconds=0.05,
        )
        running = asyncio.create_task(pollers.run())
        try:
            await test(pollers)
        finally:
            pollers.stop()
            await running
            await commit.close()

    asyncio.run(run())


def messages(**options: Any) -> Messages:
    return Messages(Intake(rules(), max_record_bytes=1 << 20), max_record_bytes=1 << 20, **options)


def texts(buffer: Buffer) -> list[str]:
    return sorted(each["message"] for each in stored(buffer))


# --- what messages hold


def test_messages_are_stored_and_then_deleted(queue: TestQueue, redis_buffer: RedisBuffer) -> None:
    queue.send(*map(record, range(25)))

    async def test(pollers: Pollers) -> None:
        await until(lambda: pollers.counts.deleted == 25)
        assert pollers.counts.records == 25
        assert queue.left() == 0

    polling(queue, redis_buffer, test)
    assert texts(redis_buffer) == sorted(f"m{n}" for n in range(25))


def test_a_message_may_hold_many_records_and_what_is_none_is_kept_with_the_messages_id(
    queue: TestQueue, redis_buffer: RedisBuffer
) -> None:
    ids = queue.send(
        f"{record(1)}\n{record(2)}\n",
        f"[{record(3)},{record(4)}]",
        f'{{"logs":[{record(5)}]}}',
        "no JSON",
        f"{record(6)}\n{{broken\n{record(7, business_capability='other')}",
        "[1,",
    )

    async def test(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)
        assert (pollers.counts.records, pollers.counts.dead_letters) == (7, 3)

    polling(queue, redis_buffer, test)
    assert texts(redis_buffer) == [f"m{n}" for n in range(1, 8)]
    reasons = {letter.raw: letter.reason for letter in letters(redis_buffer)}
    assert set(reasons) == {b"no JSON", b"{broken", b"[1,"}
    for raw, number in ((b"no JSON", 3), (b"{broken", 4), (b"[1,", 5)):
        assert reasons[raw].startswith(f"SQS message {ids[number]}: ")


def notification(inner: str) -> str:
    return json.dumps({"Type": "Notification", "MessageId": "n", "TopicArn": "arn:aws:sns:x:1:t", "Message": inner})


def test_sns_notifications_are_unwrapped_and_raw_delivery_is_taken_as_it_is(
    queue: TestQueue, redis_buffer: RedisBuffer
) -> None:
    queue.send(notification(record(1)), notification(f"{record(2)}\n{record(3)}"), record(4))

    async def test(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)

    polling(queue, redis_buffer, test, convert=messages(sns=True))
    assert texts(redis_buffer) == ["m1", "m2", "m3", "m4"]
    assert letters(redis_buffer) == []


def s3_event(*objects: tuple[str, str], name: str = "ObjectCreated:Put", **more: str) -> str:
    changes = [
        {"eventSource": "aws:s3", "eventName": name, "s3": {"bucket": {"name": bucket}, "object": {"key": key, **more}}}
        for bucket, key in objects
    ]
    return json.dumps({"Records": changes})


def test_the_objects_of_s3_events_are_read_once(
    queue: TestQueue, redis_buffer: RedisBuffer, s3_service: Service
) -> None:
    bucket = s3_service.bucket()
    lines = "\n".join(record(n) for n in range(300))
    s3_service.client.put_object(Bucket=bucket, Key="a b/logs+1.gz", Body=gzip.compress(lines.encode()))
    s3_service.client.put_object(Bucket=bucket, Key="bad.json", Body=f"{record(300)}\nnot JSON\n".encode())
    s3_service.client.put_object(Bucket=bucket, Key="cut.gz", Body=gzip.compress(record(301).encode())[:-4])
    s3_service.client.put_object(Bucket=bucket, Key="image", Body=b"PAR1....PAR1")
    old, new = (
        s3_service.client.put_object(Bucket=bucket, Key="twice", Body=record(n).encode())["ETag"].strip('"')
        for n in (303, 304)
    )
    first, again = ((bucket, key) for key in ("a+b/logs%2B1.gz", "bad.json"))
    [event_id, *_] = queue.send(
        s3_event(first, again),
        notification(s3_event((bucket, "cut.gz"))),
        s3_event((bucket, "image")),
        s3_event((bucket, "nowhere")),
        s3_event((bucket, "nowhere"), name="ObjectRemoved:Delete"),
        json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": bucket}),
        record(302),
        s3_event((bucket, "twice"), eTag=old),
        s3_event((bucket, "twice"), eTag=new),
    )

    async def test(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)

    unwrapping = messages(sns=True, objects=S3Objects(s3_service.client))
    polling(queue, redis_buffer, test, convert=unwrapping)
    found = texts(redis_buffer)
    assert set(found) >= {f"m{n}" for n in (*range(301), 302, 304)}
    assert len(found) == len(set(found))
    reasons = [letter.reason for letter in letters(redis_buffer)]
    assert len(reasons) == 5
    for part in (f"{event_id}: s3://{bucket}/bad.json: ", "cut.gz: it cannot be read to its end", "a Parquet file"):
        assert any(part in reason for reason in reasons), reasons
    assert any("twice" in reason and "PreconditionFailed" in reason for reason in reasons)
    assert any("nowhere" in reason and "NoSuchKey" in reason for reason in reasons)


class SomeObjects:
    """One of two is there; its content is its name."""

    def open(self, bucket: str, key: str, version: str | None, etag: str | None) -> IO[bytes]:
        if len(key) % 2:
            raise LookupError("NoSuchKey")
        return io.BytesIO(key.encode("utf-8", "replace"))


# What SNS and S3 say, and what is nearly that.
said = st.text(max_size=40) | st.sampled_from(["Notification", "ObjectCreated:Put", "s3:TestEvent", record(1)])
names = ["Type", "Message", "TopicArn", "Records", "eventName", "s3", "bucket", "object", "name", "key", "Event"]
envelopes = st.recursive(
    said | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4),
)
changes = st.builds(
    lambda event, bucket, key: {"eventName": event, "s3": {"bucket": {"name": bucket}, "object": {"key": key}}},
    *(said, said, said),
)


unwrapping = messages(sns=True, objects=SomeObjects())


@given(
    st.text(max_size=200)
    | envelopes.map(json.dumps)
    | st.lists(changes, max_size=3).map(lambda some: json.dumps({"Records": some}))
    | st.builds(lambda inner: notification(json.dumps(inner)), envelopes)
)
def test_whatever_a_message_says_is_taken_kept_or_has_nothing_to_read(body: str) -> None:
    found = list(unwrapping(Message("id", "receipt", body)))
    assert len({request.id for request in found}) == len(found)
    assert all(
        letter.reason.startswith("SQS message id: ")
        for one in found
        for some in one.dead_letters.values()
        for letter in some
    )
    assert any(one.lines or one.dead_letters for one in found) or "Records" in body or "s3:TestEvent" in body


def test_an_object_that_cannot_be_fetched_now_leaves_its_message_in_the_queue(
    queue: TestQueue, redis_buffer: RedisBuffer
) -> None:
    queue.send(s3_event(("bucket", "key")))

    async def test(pollers: Pollers) -> None:
        await until(lambda: pollers.counts.left)
        assert queue.left() == 1

    # Nothing listens there.
    unwrapping = messages(objects=S3Objects(client("s3", "http://127.0.0.1:9")))
    polling(queue, redis_buffer, test, convert=unwrapping)
    assert stored(redis_buffer) == []
    assert letters(redis_buffer) == []


def test_a_message_that_cannot_be_stored_stays_in_the_queue_and_keeps_no_other_from_it(
    queue: TestQueue, redis_buffer: RedisBuffer, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Defective(Messages):
        def __call__(self, message: Message) -> Iterator[Request]:
            if message.body == "unforeseen":
                raise ZeroDivisionError
            return super().__call__(message)

    redis_client.set("data:{theirs}", "another program's")
    defective, foreign, *_ = queue.send("unforeseen", record(1, business_capability="theirs"), record(2))

    async def test(pollers: Pollers) -> None:
        await until(lambda: pollers.counts.left == 2)
        queue.send(record(3))
        await until(lambda: queue.left() == 2)

    convert = Defective(Intake(rules(), max_record_bytes=1 << 20), max_record_bytes=1 << 20)
    polling(queue, redis_buffer, test, most=1, convert=convert)
    assert texts(redis_buffer) == ["m2", "m3"]
    assert "ZeroDivisionError" in caplog.text
    for message, reason in ((defective, ""), (foreign, ": in Redis data:{theirs} is a string")):
        assert f"message {message} stays in the queue{reason}" in caplog.text


# --- once, whatever happens


def test_what_was_not_deleted_comes_again_and_changes_nothing(queue: TestQueue, redis_buffer: RedisBuffer) -> None:
    def refuse_all(call: dict[str, Any]) -> list[dict[str, Any]]:
        entries, call["Entries"] = call["Entries"], []
        return [{"Id": entry["Id"], "Code": "ReceiptHandleIsInvalid", "SenderFault": True} for entry in entries]

    queue.proxy.hooks["DeleteMessageBatch"] = refuse_all
    queue.send(record(1), "no JSON")

    async def test(pollers: Pollers) -> None:
        await until(lambda: pollers.counts.messages >= 6)  # each of them three times
        del queue.proxy.hooks["DeleteMessageBatch"]
        await until(lambda: queue.left() == 0)

    polling(queue, redis_buffer, test, visibility=1)
    assert texts(redis_buffer) == ["m1"]
    assert len(letters(redis_buffer)) == 1


def test_of_a_deletion_that_failed_in_part_only_that_part_is_tried_again(
    queue: TestQueue, redis_buffer: RedisBuffer
) -> None:
    def fail_one(call: dict[str, Any]) -> list[dict[str, Any]]:
        if len(queue.proxy.calls("DeleteMessageBatch")) > 1:
            return []
        entry = call["Entries"].pop(2)
        return [{"Id": entry["Id"], "Code": "InternalError", "SenderFault": False}]

    queue.proxy.hooks["DeleteMessageBatch"] = fail_one
    queue.send(*map(record, range(6)))

    async def test(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)
        assert pollers.counts.messages == 6

    polling(queue, redis_buffer, test, most=1)
    first, second = queue.proxy.calls("DeleteMessageBatch")
    assert (len(first["Entries"]), len(second["Entries"])) == (5, 1)
    assert texts(redis_buffer) == [f"m{n}" for n in range(6)]


def test_while_the_buffer_is_full_messages_stay_hidden_and_are_stored_once_afterwards(
    queue: TestQueue, redis_buffer: RedisBuffer, redis_client: Redis
) -> None:
    queue.send(*map(record, range(3)))
    redis_client.config_set("maxmemory", 1)

    async def test(pollers: Pollers) -> None:
        await until(lambda: len(queue.proxy.calls("ChangeMessageVisibilityBatch")) >= 3)
        assert pollers.counts.messages == 3
        assert pollers.counts.refused > 0
        redis_client.config_set("maxmemory", 0)
        await until(lambda: queue.left() == 0)
        assert pollers.counts.messages == 3

    polling(queue, redis_buffer, test, visibility=2)
    assert texts(redis_buffer) == ["m0", "m1", "m2"]


def test_while_what_messages_hold_takes_long_to_read_they_stay_hidden(
    queue: TestQueue, redis_buffer: RedisBuffer
) -> None:
    read = threading.Event()

    class Slow(Messages):
        def __call__(self, message: Message) -> Iterator[Request]:
            read.wait(DEADLINE)
            yield from super().__call__(message)

    queue.send(*map(record, range(10)))

    async def test(pollers: Pollers) -> None:
        try:
            await until(lambda: queue.proxy.calls("ChangeMessageVisibilityBatch"))
        finally:
            read.set()
        await until(lambda: queue.left() == 0)

    convert = Slow(Intake(rules(), max_record_bytes=1 << 20), max_record_bytes=1 << 20)
    polling(queue, redis_buffer, test, visibility=2, most=1, convert=convert)
    assert texts(redis_buffer) == [f"m{n}" for n in range(10)]


def test_a_poller_that_stops_while_the_buffer_is_full_gives_its_messages_back(
    queue: TestQueue, redis_buffer: RedisBuffer, redis_client: Redis
) -> None:
    queue.send(record(1))
    redis_client.config_set("maxmemory", 1)

    async def refused(pollers: Pollers) -> None:
        await until(lambda: pollers.counts.refused)

    async def taken(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)

    polling(queue, redis_buffer, refused, visibility=3600)
    redis_client.config_set("maxmemory", 0)
    # The first one ended with its poller.
    another = RedisBuffer(redis_client, Names(), full_records=100, full_bytes=1 << 20)
    polling(queue, another, taken, visibility=3600)
    assert texts(another) == ["m1"]


def test_redis_may_die_and_come_back(queue: TestQueue) -> None:
    with tempfile.TemporaryDirectory(prefix="d2p") as directory, ExitStack() as running:
        server = running.enter_context(EmbeddedRedis(Path(directory), durable=True))
        redis = Redis.from_url(server.url)
        buffer = RedisBuffer(redis, Names(), full_records=100, full_bytes=1 << 20)
        queue.send(record(1))

        async def test(pollers: Pollers) -> None:
            await until(lambda: queue.left() == 0)
            await asyncio.to_thread(running.close)
            queue.send(record(2))
            await until(lambda: pollers.counts.refused)
            assert queue.left() == 1
            # Not in a thread: the server ends with the one that started it.
            running.enter_context(EmbeddedRedis(Path(directory), durable=True))
            await until(lambda: queue.left() == 0)

        polling(queue, buffer, test)
        assert texts(buffer) == ["m1", "m2"]
        redis.close()


# --- the process


def start(queue: TestQueue, redis: EmbeddedRedis, **settings: str) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("D2P_", "AWS_"))}
    given = {"redis_url": redis.url, "sqs_queue_url": queue.url, "sqs_endpoint": queue.proxy.url, "sqs_wait": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "d2p_pipeline.cli.main", "sqs"],
        env={**environment, **QUIET, **{f"D2P_{name.upper()}": value for name, value in {**given, **settings}.items()}},
    )


def test_a_process_killed_between_push_and_deletion_loses_and_doubles_nothing(
    queue: TestQueue, redis_server: EmbeddedRedis, redis_buffer: RedisBuffer
) -> None:
    reached, receipts = threading.Event(), list[str]()

    def hold(call: dict[str, Any]) -> list[dict[str, Any]]:
        receipts.extend(entry["ReceiptHandle"] for entry in call["Entries"])
        call["Entries"] = []
        reached.set()
        killed.wait(DEADLINE)
        return []

    killed = threading.Event()
    queue.proxy.hooks["DeleteMessageBatch"] = hold
    queue.send(*map(record, range(8)), "no JSON")
    process = start(queue, redis_server, sqs_max_pollers="1")
    assert reached.wait(DEADLINE)
    process.kill()
    process.wait(DEADLINE)
    del queue.proxy.hooks["DeleteMessageBatch"]
    killed.set()
    assert queue.left() == 9
    for receipt in receipts:  # what their visibility timeout would do
        queue.direct.change_message_visibility(QueueUrl=queue.direct_url, ReceiptHandle=receipt, VisibilityTimeout=0)
    process = start(queue, redis_server)
    asyncio.run(until(lambda: queue.left() == 0))
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert texts(redis_buffer) == [f"m{n}" for n in range(8)]
    assert len(letters(redis_buffer)) == 1


def test_a_queue_that_is_not_there_ends_the_command_with_exit_code_2(
    queue: TestQueue, redis_server: EmbeddedRedis
) -> None:
    assert start(queue, redis_server, sqs_endpoint="http://127.0.0.1:9").wait(DEADLINE) == 2


# --- how many pollers


@pytest.mark.parametrize(
    ("pollers", "depth", "refused", "wanted"),
    [
        (1, 0, False, 1),
        (1, 10, False, 1),
        (1, 11, False, 2),
        (2, 1000, False, 4),
        (2, 25, False, 3),
        (8, 1000, False, 8),
        (4, 20, False, 4),
        (4, 15, False, 3),
        (4, 0, False, 3),
        (4, 1000, True, 2),
        (1, 1000, True, 1),
    ],
)
def test_pollers_follow_the_depth_of_the_queue_and_the_buffer(
    pollers: int, depth: int, refused: bool, wanted: int
) -> None:
    assert pollers_wanted(pollers, depth=depth, refused=refused, least=1, most=8) == wanted


@given(st.integers(1, 50), st.integers(0, 10**6), st.booleans(), st.integers(1, 20), st.integers(0, 20))
def test_pollers_stay_between_their_bounds_and_settle(
    pollers: int, depth: int, refused: bool, least: int, more: int
) -> None:
    seen = list[int]()
    for _ in range(60):
        pollers = pollers_wanted(pollers, depth=depth, refused=refused, least=least, most=least + more)
        assert least <= pollers <= least + more
        seen.append(pollers)
    assert seen[-1] == seen[-2]


def test_a_deep_queue_gets_more_pollers_and_an_empty_one_fewer(queue: TestQueue, redis_buffer: RedisBuffer) -> None:
    entries = [{"Id": str(n), "MessageBody": record(n)} for n in range(10)]
    for _ in range(20):
        queue.direct.send_message_batch(QueueUrl=queue.direct_url, Entries=entries)
    most = 0

    async def test(pollers: Pollers) -> None:
        def look() -> bool:
            nonlocal most
            most = max(most, pollers.wanted)
            return queue.left() == 0 and pollers.wanted == 1

        await until(look)

    polling(queue, redis_buffer, test)
    assert most > 1
    # A queue may give a message twice, to two pollers at that.
    assert texts(redis_buffer) == sorted(f"m{n}" for n in range(10) for _ in range(20))


# --- the generator


def test_generated_records_go_through_a_queue(queue: TestQueue, redis_buffer: RedisBuffer) -> None:
    environment = {**QUIET, "D2P_SQS_QUEUE_URL": queue.url, "D2P_SQS_ENDPOINT": queue.proxy.url}
    arguments = ["generate", "1000", "--bad-ratio", "0.1", "--target", "sqs", "--batch", "90"]
    result = CliRunner().invoke(app, arguments, env=environment)
    assert (result.exit_code, result.stdout) == (0, "1000 records sent, 0 retries\n"), result.output
    assert queue.left() == 12

    async def test(pollers: Pollers) -> None:
        await until(lambda: queue.left() == 0)

    polling(queue, redis_buffer, test)
    assert (len(stored(redis_buffer)), len(letters(redis_buffer))) == (900, 100)


def test_large_records_are_spread_over_messages_that_sqs_takes(queue: TestQueue) -> None:
    lines = [record(n, text="x" * 60_000).encode() for n in range(10)]
    assert sqs_sender.send(lines, client("sqs", queue.proxy.url), queue.url, batch=10).accepted == 10
    sent = [call["MessageBody"].split("\n") for call in queue.proxy.calls("SendMessage")]
    assert [len(body) for body in sent] == [4, 4, 2]
    assert [line.encode() for body in sent for line in body] == lines
