"""Delivers NDJSON lines to where a producer would put them: the receiver over HTTP, or a Redis buffer directly.

A plain RPUSH has no key that would make its repetition a no-op: towards Redis nothing is repeated.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from d2p_pipeline.ingest.delivering import Answer, Busy, Refused, Sent, Undelivered, batches, deliver
from d2p_pipeline.ingest.generator import capability_of


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
    target = _records_url(url)
    headers = {"Content-Type": "application/x-ndjson"} | ({"Authorization": f"Bearer {token}"} if token else {})
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    with httpx.Client(headers=headers, limits=limits, timeout=30.0) as client:

        def post(lines: list[bytes], name: str) -> Answer:
            return _post(client, target, b"\n".join(lines), name)

        return deliver(
            batches(lines, batch),
            target,
            [post] * connections,
            transient=(httpx.TransportError,),
            permanent=(httpx.RequestError,),
            patience=patience,
            on_progress=on_progress,
        )


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
        for group in batches(lines, window):
            buffers: dict[str, list[bytes]] = {}
            for line in group:
                capability = capability_of(line) or capability
                buffers.setdefault(capability, []).append(line)
            pipeline = client.pipeline(transaction=False)
            for key, waiting in buffers.items():
                pipeline.rpush(f"{prefix}:{{{key}}}", *(b"\n".join(chunk) for chunk in batches(waiting, batch)))
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


class _Counts(msgspec.Struct):
    accepted: int
    dead_lettered: int


def _post(client: httpx.Client, target: str, body: bytes, idempotency_key: str) -> Answer:
    response = client.post(target, content=body, headers={"Idempotency-Key": idempotency_key})
    answered = f"it answered {response.status_code} {response.reason_phrase}: {response.text[:300]}"
    if response.status_code in (429, 503):
        raise Busy(answered, _seconds(response.headers.get("Retry-After", "")))
    if not response.is_success:
        raise Refused(answered)
    try:
        counts = msgspec.json.decode(response.content, type=_Counts)
    except msgspec.DecodeError as error:
        raise Refused(f"{answered}\nThat is not a receiver's answer ({error}); look at the URL") from error
    return Answer(counts.accepted, counts.dead_lettered)


def _seconds(retry_after: str) -> float | None:
    """The header's seconds or HTTP date (RFC 9110, 10.2.3) as seconds from now; None when it is neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at.astimezone(UTC) - datetime.now(UTC)).total_seconds())
