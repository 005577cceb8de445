"""A client that repeats what was not answered with success, while receivers are killed or hang, turn requests away, and Redis
is killed and fills up: under an Idempotency-Key every record is stored once; without one at least once."""

import json
import signal
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.records import chunk
from d2p_pipeline_tests.receiving import RunningReceiver, StartReceiver
from d2p_pipeline_tests.system import until

GOOD: dict[str, Any] = {
    "time": "2026-11-21T10:00:00Z",
    "level": "info",
    "business-capability": "payments",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}
LOST, LATE = 0, -1
"""In place of a status: the connection ended; no answer came in time."""
AGAIN = (LOST, LATE, 408, 429, 500, 502, 503, 504)
CLIENTS = 4


def stored(client: Redis) -> Counter[str]:
    chunks = [chunk.decode(cast(bytes, element)) for element in client.lrange("data:{payments}", 0, -1)]
    return Counter(json.loads(line)["message"] for found in chunks for line in found.body.splitlines())


class Crowd:
    """Clients that post batches, each until it is answered with success, or `ending`."""

    def __init__(self, with_key: bool) -> None:
        self.url = ""
        self.with_key = with_key
        self.ending = threading.Event()
        self.answered: set[str] = set()
        self.repeated = 0
        self.refusals: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)

    def work(self, client: int) -> None:
        batch = 0
        with httpx.Client(timeout=3, verify=False) as connection:
            while not self.ending.is_set():
                batch += 1
                self._deliver(
                    connection, [f"{client}-{batch}-{number} {'x' * 200}" for number in range(1 + batch % 20)]
                )

    def wait_for(self, batches: int) -> None:
        with self._more:
            target = len(self.answered) + batches
            assert self._more.wait_for(lambda: len(self.answered) >= target, 60)

    def wait_for_refusal(self, status: int) -> None:
        with self._more:
            before = self.refusals[status]
            assert self._more.wait_for(lambda: self.refusals[status] > before, 60)

    def _deliver(self, connection: httpx.Client, messages: list[str]) -> None:
        body = "\n".join(json.dumps({**GOOD, "message": message}) for message in messages)
        headers = {"idempotency-key": str(uuid.uuid4())} if self.with_key else {}
        for attempt in range(100_000):
            try:
                status = connection.post(f"{self.url}/records", content=body, headers=headers).status_code
            except httpx.TimeoutException:
                status = LATE
            except httpx.TransportError:
                status = LOST
            with self._more:
                self.repeated += attempt > 0
                self.refusals[status] += status != 202
                if status == 202:
                    self.answered.update(messages)
                self._more.notify_all()
            if status == 202:
                return
            assert status in AGAIN
            self.ending.wait(0.01)


@pytest.mark.parametrize("with_key", [True, False], ids=["with key", "without key"])
def test_every_answered_record_is_stored_and_under_a_key_once(
    start_receiver: StartReceiver, tmp_path: Path, with_key: bool
) -> None:
    redis = EmbeddedRedis(tmp_path).start()
    settings = {"redis_url": redis.url, "redis_timeout": "1", "workers": "2"}
    crowd = Crowd(with_key)
    receiver: RunningReceiver = start_receiver(**settings)
    crowd.url = receiver.url
    with ThreadPoolExecutor(CLIENTS) as pool, Redis.from_url(redis.url) as client:
        working = [pool.submit(crowd.work, number) for number in range(CLIENTS)]
        try:
            for limit in ("1", "0"):  # the first turns all away
                crowd.wait_for(20)
                receiver.kill()
                crowd.wait_for_refusal(LOST)
                receiver = start_receiver(**settings, max_key_bytes=limit)
                crowd.url = receiver.url
                if limit == "1":
                    crowd.wait_for_refusal(429)
                    crowd.url = (receiver := start_receiver(**settings)).url
            crowd.wait_for(20)
            receiver.strike(signal.SIGSTOP)
            crowd.wait_for_refusal(LATE)
            receiver.strike(signal.SIGCONT)
            crowd.wait_for(20)
            assert redis.process
            redis.process.kill()
            redis.process.wait()
            redis.stop()
            redis = EmbeddedRedis(tmp_path).start()
            crowd.wait_for(20)
            client.config_set("maxmemory", 1)
            crowd.wait_for_refusal(503)
            client.config_set("maxmemory", 0)
            crowd.wait_for(20)
        finally:
            receiver.strike(signal.SIGCONT)
            crowd.ending.set()
            if redis.process and redis.process.poll() is None:
                client.config_set("maxmemory", 0)
        for worker in working:
            worker.result(60)
        receiver.stop()
        found = stored(client)
    redis.stop()
    assert crowd.repeated
    assert set(found) == crowd.answered
    if with_key:
        assert set(found.values()) == {1}


def test_what_a_full_redis_refused_is_stored_nowhere(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    lines = "\n".join(json.dumps({**GOOD, "message": str(number)}) for number in range(100))
    redis_client.config_set("maxmemory", 1)
    try:
        for headers in ({}, {"idempotency-key": "k"}):
            answer = receiver.client.post("/records", content=lines, headers=headers)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
    finally:
        redis_client.config_set("maxmemory", 0)
    assert not stored(redis_client)
    assert receiver.client.post("/records", content=lines, headers={"idempotency-key": "k"}).status_code == 202
    assert stored(redis_client).total() == 100


def test_an_outage_is_told_of_not_each_request_in_it(start_receiver: StartReceiver, tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path).start()
    receiver = start_receiver(redis_url=redis.url)
    redis.stop()
    for _ in range(30):
        assert receiver.client.post("/record/", json={**GOOD, "message": "m"}).status_code == 503
    assert 1 <= receiver.log.read_text().count(" requests refused: ") < 30


@pytest.mark.parametrize(("setting", "status"), [("max_key_bytes", 429), ("max_buffer_bytes", 503)])
def test_a_byte_limit_turns_requests_away_until_there_is_room(
    start_receiver: StartReceiver, redis_client: Redis, setting: str, status: int
) -> None:
    receiver = start_receiver(**{setting: "10000"})
    record = {**GOOD, "message": "x" * 1000}
    accepted = 0
    while (answer := receiver.client.post("/record/", json=record)).status_code == 201:
        accepted += 1
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "5")
    assert setting in answer.json()["error"]
    assert redis_client.hget("stats:{payments}", "records") == str(accepted).encode()
    assert 8 <= accepted <= 12
    other = receiver.client.post("/record/", json={**record, "business-capability": "other"})
    assert other.status_code == (201 if status == 429 else 503)
    redis_client.delete("data:{payments}", "stats:{payments}")
    until(lambda: receiver.client.post("/record/", json=record).status_code == 201)
