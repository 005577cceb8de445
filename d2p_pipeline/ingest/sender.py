"""Delivers NDJSON lines to where a producer would put them: the receiver over HTTP, or a Redis buffer directly.

Over HTTP a batch is repeated until it is answered, always under the same Idempotency-Key, so a repetition the receiver
already has changes nothing. A plain RPUSH has no such key: towards Redis nothing is repeated.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice

import httpx
import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
)

from d2p_pipeline.ingest.generator import capability_of

_MAX_WAIT = 30.0  # seconds between two attempts, whatever Retry-After says


@dataclass(frozen=True, slots=True)
class Sent:
    """What the receiver answered for: records by fate, requests answered with success, attempts beyond the first."""

    accepted: int = 0
    dead_lettered: int = 0
    requests: int = 0
    retries: int = 0


class Undelivered(Exception):
    """A batch was refused for good, or not answered in time. `sent` is what was delivered before and beside it."""

    def __init__(self, target: str, records: int, reason: str, sent: Sent) -> None:
        super().__init__(f"{target} did not take a batch of {records} records: {reason}")
        self.target = target
        self.records = records
        self.reason = reason
        self.sent = sent


def send(
    lines: Iterable[bytes],
    url: str,
    *,
    batch: int = 500,
    connections: int = 4,
    token: str | None = None,
    patience: float = 60.0,
    on_progress: Callable[[int], object] = lambda records: None,
) -> Sent:
    """POST NDJSON lines to `url`/records, `batch` records a request, over `connections` at a time.

    429, 503 and connection errors are repeated, after Retry-After where it is given, for at most about `patience`
    seconds a batch. `on_progress` is told the records of each answered batch, from one thread at a time. Lines are
    drawn as senders come free, so at most `batch * connections` are in memory; their order in the buffer is not kept.

    Raises Undelivered at the first batch refused for good or not taken in time: no further batch is begun, and one that
    waits for its next attempt gets a last one. Raises ValueError for a URL that is not http or https.
    """
    delivery = _Delivery(_batches(lines, batch), _records_url(url), patience, on_progress)
    headers = {"Content-Type": "application/x-ndjson"} | ({"Authorization": f"Bearer {token}"} if token else {})
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    with (
        httpx.Client(headers=headers, limits=limits, timeout=30.0) as client,
        ThreadPoolExecutor(connections, thread_name_prefix="send") as pool,
    ):
        workers = [pool.submit(delivery.work, client) for _ in range(connections)]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            delivery.halt.set()
    if delivery.failure:
        raise Undelivered(delivery.target, *delivery.failure, delivery.sent)
    return delivery.sent


def push(
    lines: Iterable[bytes],
    url: str,
    *,
    batch: int = 500,
    window: int = 10_000,
    prefix: str = "data",
    on_progress: Callable[[int], object] = lambda records: None,
) -> int:
    """RPUSH plain NDJSON chunks of at most `batch` records to `prefix`:{capability}; the number of records pushed.

    A line that names no capability goes where the one before it went. `window` lines at a time are grouped by key and
    pushed in one pipeline.

    Raises Undelivered when Redis is away or refuses; part of that window may have been stored.
    """
    pushed = 0
    capability = "undefined"
    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
        for group in _batches(lines, window):
            buffers: dict[str, list[bytes]] = {}
            for line in group:
                capability = capability_of(line) or capability
                buffers.setdefault(capability, []).append(line)
            pipeline = client.pipeline(transaction=False)
            for key, waiting in buffers.items():
                pipeline.rpush(f"{prefix}:{{{key}}}", *(b"\n".join(chunk) for chunk in _batches(waiting, batch)))
            try:
                pipeline.execute()
            except redis.RedisError as error:
                raise Undelivered("Redis", len(group), str(error), Sent(accepted=pushed)) from error
            pushed += len(group)
            on_progress(len(group))
    return pushed


def _records_url(url: str) -> str:
    try:
        valid = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise ValueError(f"{url} is no HTTP address: give the receiver's, for example http://127.0.0.1:8080")
    return f"{url.rstrip('/')}/records"


class _Answer(msgspec.Struct):
    accepted: int
    dead_lettered: int


class _Refused(Exception):
    """Repeating the request would not help."""


class _Busy(Exception):
    """Repeating it will, `retry_after` seconds from now if the receiver said so."""

    def __init__(self, answered: str, retry_after: float | None) -> None:
        super().__init__(answered)
        self.retry_after = retry_after


class _Delivery:
    """What the senders of one `send` share: the batches still to go, and the account of those that went."""

    def __init__(
        self, batches: Iterator[list[bytes]], target: str, patience: float, on_progress: Callable[[int], object]
    ) -> None:
        self.target = target
        self.sent = Sent()
        self.failure: tuple[int, str] | None = None
        self.halt = threading.Event()
        self._batches = batches
        self._drawing = threading.Lock()
        self._counting = threading.Lock()
        self._patience = patience
        self._on_progress = on_progress

    def work(self, client: httpx.Client) -> None:
        """Send batches until there are none left, or until `halt`."""
        while lines := self._draw():
            self._deliver(client, lines)

    def _draw(self) -> list[bytes]:
        with self._drawing:
            return [] if self.halt.is_set() else next(self._batches, [])

    def _deliver(self, client: httpx.Client, lines: list[bytes]) -> None:
        attempts = Retrying(
            retry=retry_if_exception_type((_Busy, httpx.TransportError)),
            stop=stop_any(stop_after_delay(self._patience), stop_when_event_set(self.halt)),
            wait=_wait,
            sleep=sleep_using_event(self.halt),
            reraise=True,
        )
        answer, reason = None, ""
        try:
            answer = attempts(self._post, client, b"\n".join(lines), str(uuid.uuid4()))
        except (_Busy, _Refused) as error:
            reason = str(error)
        except httpx.RequestError as error:
            reason = f"{type(error).__name__}: {error}"
        retries = attempts.statistics["attempt_number"] - 1
        with self._counting:
            if answer:
                self.sent = Sent(
                    self.sent.accepted + answer.accepted,
                    self.sent.dead_lettered + answer.dead_lettered,
                    self.sent.requests + 1,
                    self.sent.retries + retries,
                )
                self._on_progress(len(lines))
            else:
                self.sent = replace(self.sent, retries=self.sent.retries + retries)
                self.failure = self.failure or (len(lines), reason)
                self.halt.set()

    def _post(self, client: httpx.Client, body: bytes, idempotency_key: str) -> _Answer:
        response = client.post(self.target, content=body, headers={"Idempotency-Key": idempotency_key})
        answered = f"it answered {response.status_code} {response.reason_phrase}: {response.text[:300]}"
        if response.status_code in (429, 503):
            raise _Busy(answered, _seconds(response.headers.get("Retry-After", "")))
        if not response.is_success:
            raise _Refused(answered)
        try:
            return msgspec.json.decode(response.content, type=_Answer)
        except msgspec.DecodeError as error:
            raise _Refused(f"{answered}\nThat is not a receiver's answer ({error}); look at the URL") from error


_backoff = wait_exponential_jitter(multiplier=0.2, max=10, jitter=0.2)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Busy) and error.retry_after is not None:
        return min(error.retry_after, _MAX_WAIT)
    return _backoff(state)


def _seconds(retry_after: str) -> float | None:
    """The header's seconds or HTTP date (RFC 9110, 10.2.3) as seconds from now; None when it is neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _batches(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    remaining = iter(lines)
    while batch := list(islice(remaining, size)):
        yield batch
