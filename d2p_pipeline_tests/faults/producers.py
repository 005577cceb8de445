"""Producers of numbered records through every door, each with its own account of what became of every number it sent.

accepted    answered with success, or the reply to a repetition under the same Idempotency-Key was
refused     every answer said that nothing was stored
unknown     the last word was a broken connection or a 503 that says nobody knows: there once, or not at all
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from d2p_pipeline.ingest import forward_sender
from d2p_pipeline.ingest.delivering import Undelivered

KEYS = ["payments", "orders", "a/b 50%"]
REPEAT_SECONDS = 15.0


@dataclass
class Account:
    """What one producer knows. `order`: the accepted good numbers that stay in the order in which it sent them: those of a key,
    or, where its door keeps no order, of one batch."""

    good: set[str] = field(default_factory=set[str])
    bad: set[str] = field(default_factory=set[str])
    refused: set[str] = field(default_factory=set[str])
    unknown: set[str] = field(default_factory=set[str])
    order: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def settle(self, key: str, numbers: list[str], outcome: str) -> None:
        if outcome != "accepted":
            getattr(self, outcome).update(numbers)
            return
        good = [number for number in numbers if not is_bad(number)]
        self.good.update(good)
        self.bad.update(number for number in numbers if is_bad(number))
        self.order.setdefault(key, []).extend(good)


def is_bad(number: str) -> bool:
    return number.endswith("7")


def line(key: str, number: str) -> bytes:
    """Every tenth record lacks its level."""
    record = {
        "time": "2025-11-21T10:30:00Z",
        "level": "info",
        "message": number,
        "business-capability": key,
        "business-domain": "d",
        "business-service": "s",
        "application-service": "a",
    }
    if is_bad(number):
        del record["level"]
    return json.dumps(record).encode()


class Producer(threading.Thread):
    """Sends as many batches as it is given leave to, one after the other, until told to stop. Its seed decides their keys, their
    sizes and their order, whatever becomes of them. Names, and so numbers, belong to a seed: what a process stores when it wakes
    up under the next schedule is told apart."""

    is_ordered = True
    """Whether its door keeps the order in which it sends."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name=f"{seed}.{name}", daemon=True)
        self.account = Account()
        self._random = Random(f"{seed} {name}")
        self._leave = threading.Semaphore(0)
        self._sent = threading.Semaphore(0)
        self._ending = threading.Event()
        self._next = 0

    def run(self) -> None:
        while self._leave.acquire() and not self._ending.is_set():
            key = self._random.choice(KEYS)
            numbers = [f"{self.name}-{self._next + number:06}" for number in range(self._random.randint(1, 12))]
            self._next += len(numbers)
            outcome = self.send(numbers[0], b"\n".join(line(key, n) for n in numbers), key)
            self.account.settle(key if self.is_ordered else numbers[0], numbers, outcome)
            self._sent.release()

    def send(self, name: str, body: bytes, key: str) -> str:
        raise NotImplementedError

    def give_leave(self, batches: int, *, at_most: bool = False) -> None:
        """To send so many more; `at_most`: and none of the earlier ones that it has not sent yet."""
        while at_most and self._leave.acquire(blocking=False):
            pass
        self._leave.release(batches)

    def finish(self, batches: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until it has sent so many in all."""
        for _ in range(batches):
            deadline = time.monotonic() + 120
            while not self._sent.acquire(timeout=0.1):
                meanwhile()
                assert time.monotonic() < deadline, f"{self.name} did not send all it was to send"

    def stop(self) -> Account:
        self._ending.set()
        self._leave.release()
        self.join(60)
        assert not self.is_alive()
        self.close()
        return self.account

    def close(self) -> None:
        """Let go of connections."""


class HttpProducer(Producer):
    """Repeats a request under its Idempotency-Key until the answer is a success, or for a while."""

    def __init__(self, name: str, seed: int, urls: list[str]) -> None:
        super().__init__(name, seed)
        self._urls = urls
        self._ways = Random(f"{seed} {name} ways")
        self._http = httpx.Client(timeout=5, trust_env=False, verify=False)

    def close(self) -> None:
        self._http.close()

    def send(self, name: str, body: bytes, key: str) -> str:
        outcome, deadline = "refused", time.monotonic() + REPEAT_SECONDS
        while time.monotonic() < deadline:
            url = self._ways.choice(self._urls)
            try:
                answer = self._http.post(f"{url}/records", content=body, headers={"idempotency-key": name})
            except httpx.TransportError as error:
                if not isinstance(error, httpx.ConnectError):
                    outcome = "unknown"
            else:
                if answer.status_code == 202:
                    return "accepted"
                if answer.status_code != 429 and "out of memory" not in answer.text:
                    outcome = "unknown"
            if self._ending.wait(0.1):
                return outcome
        return outcome


class PushProducer(Producer):
    """A foreign program that knows nothing but RPUSH, and repeats nothing."""

    def __init__(self, name: str, seed: int, redis_url: str) -> None:
        super().__init__(name, seed)
        self._client = Redis.from_url(redis_url, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def close(self) -> None:
        self._client.close()

    def send(self, name: str, body: bytes, key: str) -> str:
        try:
            self._client.rpush(f"data:{{{key}}}", body)
        except OutOfMemoryError:
            return "refused"
        except RedisError:
            return "unknown"
        return "accepted"


class ForwardProducer(Producer):
    """Sends chunks as Fluent Bit does, each again under its name until it is acknowledged, or for a while."""

    def __init__(self, name: str, seed: int, address: str) -> None:
        super().__init__(name, seed)
        self._address = address

    def send(self, name: str, body: bytes, key: str) -> str:
        lines = body.split(b"\n")
        try:
            forward_sender.send(lines, self._address, connections=1, patience=REPEAT_SECONDS)
        except Undelivered:
            return "unknown"
        return "accepted"


class SqsProducer(Producer):
    """Puts messages into a queue, which promises no order; what SQS has taken is accepted."""

    is_ordered = False

    def __init__(self, name: str, seed: int, client: Any, url: str) -> None:
        super().__init__(name, seed)
        self._client, self._url = client, url

    def send(self, name: str, body: bytes, key: str) -> str:
        try:
            self._client.send_message(QueueUrl=self._url, MessageBody=body.decode())
        except (BotoCoreError, ClientError):
            return "unknown"
        return "accepted"
