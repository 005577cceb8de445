"""Producers of numbered records, each with its own account of what became of every number it sent.

accepted    answered with success, or the reply to a repetition under the same Idempotency-Key was
refused     every answer said that nothing was stored
unknown     the last word was a broken connection or a 503 that says nobody knows: there once, or not at all
"""

import json
import threading
import time
from dataclasses import dataclass, field
from random import Random

import httpx
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

KEYS = ["payments", "orders", "a/b 50%"]
REPEAT_SECONDS = 15.0


@dataclass
class Account:
    """What one producer knows. `order`: per key, its accepted good numbers in the order it sent them."""

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
    """Sends batches one after the other until told to stop."""

    def __init__(self, name: str, seed: int, pause: float = 0.02) -> None:
        super().__init__(name=name, daemon=True)
        self.account = Account()
        self._random = Random(f"{seed} {name}")
        self._pause = pause
        self._ending = threading.Event()
        self._next = 0

    def run(self) -> None:
        while not self._ending.wait(self._pause):
            key = self._random.choice(KEYS)
            numbers = [f"{self.name}-{self._next + number:06}" for number in range(self._random.randint(1, 12))]
            self._next += len(numbers)
            self.account.settle(key, numbers, self.send(numbers[0], b"\n".join(line(key, n) for n in numbers), key))

    def send(self, name: str, body: bytes, key: str) -> str:
        raise NotImplementedError

    def stop(self) -> Account:
        self._ending.set()
        self.join(60)
        assert not self.is_alive()
        return self.account


class HttpProducer(Producer):
    """Repeats a request under its Idempotency-Key until the answer is a success, or for a while."""

    def __init__(self, name: str, seed: int, urls: list[str]) -> None:
        super().__init__(name, seed)
        self._urls = urls
        self._http = httpx.Client(timeout=5, trust_env=False)

    def send(self, name: str, body: bytes, key: str) -> str:
        outcome, deadline = "refused", time.monotonic() + REPEAT_SECONDS
        while time.monotonic() < deadline:
            url = self._random.choice(self._urls)
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
        super().__init__(name, seed, pause=0.1)
        self._client = Redis.from_url(redis_url, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def send(self, name: str, body: bytes, key: str) -> str:
        try:
            self._client.rpush(f"data:{{{key}}}", body)
        except OutOfMemoryError:
            return "refused"
        except RedisError:
            return "unknown"
        return "accepted"
