"""The HTTP receiver: requests to canonical lines, by group commit into the buffer, answered when the buffer has them.

Routes and answers are those of docs/receiver.md. An answer in the 200s means that the buffer has the records; any other
means that it has none of them, but for a 503 that says Redis did not answer: then nobody knows, and a repetition under the
same Idempotency-Key is right in either case. A single record whose body is there is answered without a task of its own.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from d2p_pipeline.buffer.protocol import Buffer, BufferFullError, BufferUnavailableError, ForeignValueError
from d2p_pipeline.ingest import openapi
from d2p_pipeline.ingest.admission import Admission, Name
from d2p_pipeline.ingest.answers import Answer, HttpError
from d2p_pipeline.ingest.bodies import SNIFFED, BodyError, Packed, Raw, Splitter, is_packed, records, splitter
from d2p_pipeline.ingest.commit import GroupCommit, Request
from d2p_pipeline.ingest.fluent import Completion, Misfit
from d2p_pipeline.ingest.http import ClientGoneError, Exchange
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.pressure import KeyFullError
from d2p_pipeline.ingest.reading import Bodies, Body
from d2p_pipeline.ingest.tokens import Tokens
from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.rules import Rules

if TYPE_CHECKING:
    from d2p_pipeline.ingest.metrics import Metrics

log = logging.getLogger(__name__)

LONGEST_KEY = 255
"""Characters an Idempotency-Key may have."""
COMPLAINT_SECONDS = 1.0
"""The log is told no oftener that the buffer does not answer."""

_encode = msgspec.json.Encoder().encode
_JSON = (("content-type", "application/json"),)
_CREATED = Answer(201)


class Receiver:
    """Answers requests, over one buffer."""

    def __init__(
        self,
        buffer: Buffer,
        rules: Rules,
        commit: GroupCommit,
        *,
        bodies: Bodies,
        tokens: Tokens,
        metrics: "Metrics",
        completion: Completion | None = None,
        access_log: bool = False,
    ) -> None:
        self._buffer = buffer
        self._commit = commit
        self._tokens = tokens
        self._bodies = bodies
        self._limits = bodies.limits
        self._intake = Intake(rules, max_record_bytes=self._limits.record_bytes)
        self._completion = completion or Completion(rules)
        self._metrics = metrics
        self._has_access_log = access_log
        self._tasks: set[asyncio.Task[None]] = set()
        self._untold = 0
        """Requests refused as the buffer does not answer, that the log was not told of yet."""
        self._next_complaint = 0.0
        self._posts: dict[str, Callable[[Exchange, Body], Awaitable[Answer]]] = {
            "/record": self._post_record,
            "/records": self._post_records,
            "/flush": self._post_flush,
        }
        self._gets: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/healthcheck": self._get_healthcheck,
            "/ready": self._get_ready,
            "/metrics": self._get_metrics,
            "/openapi.json": self._get_openapi,
        }

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later."""
        path = exchange.path.rstrip("/")
        is_at_once = path == "/record" and exchange.method == "POST" and self._bodies.is_at_once(exchange)
        if is_at_once and self._commit.takes_at_once:
            self._record_at_once(exchange)
            return
        task = asyncio.create_task(self._serve(path, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, status: int) -> None:
        """Something came that is no request."""
        self._metrics.answered("other", status, "no_request", 0)
        if self._has_access_log:
            log.info("no request %d", status)

    async def _serve(self, path: str, exchange: Exchange) -> None:
        try:
            answer = await self._answer(path, exchange)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001  # _refusal tells what is expected from what is a defect
            answer = self._refusal(error)
        self._send(path, exchange, answer)

    def _send(self, path: str, exchange: Exchange, answer: Answer) -> None:
        seconds = time.monotonic() - exchange.arrived
        known = path in self._posts or path in self._gets
        self._metrics.answered(path if known else "other", answer.status, answer.refusal, seconds)
        if self._has_access_log:
            log.info("%s %s %d %.3f ms", exchange.method, exchange.path, answer.status, seconds * 1000)
        if answer.text:
            body, kind = answer.text
            headers = (("content-type", kind),)
        elif answer is _CREATED:
            body = b'{"timestamp":%d,"elapsed":"%.3fms"}' % (time.time(), seconds * 1000)
            headers = _JSON
        else:
            body = _encode({**answer.body, "timestamp": int(time.time()), "elapsed": f"{seconds * 1000:.3f}ms"})
            headers = (*_JSON, *answer.headers)
        exchange.answer(answer.status, headers, body)

    async def _answer(self, path: str, exchange: Exchange) -> Answer:
        post = self._posts.get(path)
        if post is None:
            return await self._answer_get(path, exchange)
        if exchange.method != "POST":
            raise HttpError(405, "method", "use POST", ("allow", "POST"))
        self._authorize(exchange)
        body = self._bodies.open(exchange)
        try:
            return await post(exchange, body)
        finally:
            body.close()

    async def _answer_get(self, path: str, exchange: Exchange) -> Answer:
        get = self._gets.get(path)
        if get is None:
            paths = ", ".join([*self._posts, *self._gets])
            raise HttpError(404, "no_such_path", f"no such path; there are {paths}")
        if exchange.method not in ("GET", "HEAD"):
            raise HttpError(405, "method", "use GET", ("allow", "GET, HEAD"))
        if get == self._get_metrics:
            self._authorize(exchange)
        return await get()

    def _authorize(self, exchange: Exchange) -> None:
        if self._tokens and not self._tokens.allow(exchange.headers.get("authorization", "")):
            raise HttpError(401, "unauthorized", "a valid bearer token is needed", ("www-authenticate", "Bearer"))

    # --- records

    def _record_at_once(self, exchange: Exchange) -> None:
        """`POST /record` with all of its body there."""
        body = None
        try:
            self._authorize(exchange)
            body = self._bodies.open(exchange)
            raw = body.at_once()
            request = self._request_of_one(raw, exchange)
            self._commit.submit(request, partial(self._ended, exchange, body, len(raw)))
        except Exception as error:  # noqa: BLE001  # _refusal tells what is expected from what is a defect
            if body:
                body.close()
            self._send("/record", exchange, self._refusal(error))

    def _ended(self, exchange: Exchange, body: Body, size: int, error: Exception | None) -> None:
        body.close()
        if error is None:
            self._metrics.stored(1, 0, size)
        self._send("/record", exchange, self._refusal(error) if error else _CREATED)

    async def _post_record(self, exchange: Exchange, body: Body) -> Answer:
        raw = await body.whole()
        await self._commit.store(self._request_of_one(raw, exchange))
        self._metrics.stored(1, 0, len(raw))
        return _CREATED

    def _request_of_one(self, raw: bytes, exchange: Exchange) -> Request:
        request = Request(size=len(raw))
        if key := _idempotency_key(exchange):
            name = Name(key)
            name.update(raw)
            request.id = name.id
        try:
            self._intake.add(self._one(raw, exchange), request)
        except Rejected as error:
            raise HttpError(400, "record_invalid", error.reason) from error
        return request

    def _one(self, body: bytes, exchange: Exchange) -> bytes:
        """The only record of a body."""
        tag = _tag(exchange)
        if not is_packed(body, ""):
            return self._completion.complete_text(body, tag) if tag else body.strip()
        packed = Packed(self._completion, tag)
        found: list[Raw] = [*packed.feed(body), *packed.end()]
        if len(found) != 1:
            raise Rejected(f"the body has {len(found)} records; send one, or use /records")
        if isinstance(found[0], Misfit):
            raise Rejected(found[0].reason)
        return found[0]

    async def _post_records(self, exchange: Exchange, body: Body) -> Answer:
        admission = Admission(self._intake, self._limits, _idempotency_key(exchange))
        size = 0
        if body.is_small:
            whole = await body.whole()
            size = len(whole)
            admission.saw(whole)
            content_type = "" if whole[:1] in b"{[" else exchange.headers.get("content-type", "")
            if is_packed(whole, content_type):
                packed = Packed(self._completion, _tag(exchange))
                await admission.take_all(packed.feed(whole))
                await admission.take_all(packed.end())
            else:
                await admission.take_all(self._completed_all(records(whole), exchange))
        else:
            size = await self._take_pieces(exchange, body, admission)
        if admission.records:
            await self._commit.store(admission.named())
            self._metrics.stored(admission.records - admission.rejected, admission.rejected, size)
        accepted = admission.records - admission.rejected
        return Answer(202, {"accepted": accepted, "dead_lettered": admission.rejected, "errors": admission.errors})

    async def _take_pieces(self, exchange: Exchange, body: Body, admission: Admission) -> int:
        """Take in a large body as it comes; returns its bytes."""
        content_type = exchange.headers.get("content-type", "")
        head, size = b"", 0
        split: Splitter | None = None
        async for piece in body.pieces():
            size += len(piece)
            admission.saw(piece)
            if split is None:
                head += piece
                if len(head) < SNIFFED:
                    continue
                split, piece, head = splitter(head, content_type, self._completion, _tag(exchange)), head, b""
            await admission.take_all(self._completed_of(split, split.feed(piece), exchange))
        if split is None:
            split = splitter(head, content_type, self._completion, _tag(exchange))
            await admission.take_all(self._completed_of(split, split.feed(head), exchange))
        await admission.take_all(self._completed_of(split, split.end(), exchange))
        return size

    def _completed_of(self, split: Splitter, raws: Iterable[Raw], exchange: Exchange) -> Iterable[Raw]:
        return raws if isinstance(split, Packed) else self._completed_all(raws, exchange)

    def _completed_all(self, raws: Iterable[Raw], exchange: Exchange) -> Iterable[Raw]:
        """JSON records with what Fluent Bit's tag adds to them, if the request has one."""
        if not (tag := _tag(exchange)):
            return raws
        return (raw if isinstance(raw, Misfit) else self._completion.complete_text(raw, tag) for raw in raws)

    # --- the rest

    async def _post_flush(self, exchange: Exchange, body: Body) -> Answer:
        text = await body.whole()
        try:
            keys = msgspec.json.decode(text, type=_Flush).keys if text.strip() else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = f'the body is empty or {{"keys": ["…"]}}: {error}'
            raise HttpError(400, "body_unreadable", reason) from error
        return Answer(202, {"keys": await asyncio.to_thread(self._buffer.request_flush, keys)})

    async def _get_healthcheck(self) -> Answer:
        return Answer(200, {"status": "ok"})

    async def _get_ready(self) -> Answer:
        await asyncio.to_thread(self._buffer.check_writable)
        return Answer(200, {"status": "ready"})

    async def _get_metrics(self) -> Answer:
        return Answer(200, text=await asyncio.to_thread(self._metrics.exposition))

    async def _get_openapi(self) -> Answer:
        return Answer(200, text=(openapi.document(), "application/json"))

    def _refusal(self, error: Exception) -> Answer:
        """What a client is told of an error."""
        match error:
            case HttpError():
                return error.answer
            case BodyError():
                return Answer(400, {"error": str(error)}, refusal="body_unreadable")
            case KeyFullError():
                return Answer(429, {"error": str(error)}, (("retry-after", "5"),), "key_full")
            case BufferFullError():
                return Answer(503, {"error": str(error)}, (("retry-after", "5"),), "buffer_full")
            case BufferUnavailableError():
                self._untold += 1
                if time.monotonic() >= self._next_complaint:  # of an outage, not of each request in it
                    log.error("%d requests refused: %s", self._untold, error)
                    self._next_complaint, self._untold = time.monotonic() + COMPLAINT_SECONDS, 0
                return Answer(503, {"error": str(error)}, (("retry-after", "1"),), "buffer_unavailable")
            case ForeignValueError():
                log.error("request not stored: %s", error)
                return Answer(500, {"error": str(error)}, refusal="foreign_value")
            case _:
                log.error("request not stored", exc_info=error)
                return Answer(
                    500, {"error": f"{type(error).__name__}: nothing is known of the request"}, refusal="defect"
                )

    async def close(self) -> None:
        """Finish what is in flight."""
        await self._commit.close()
        self._buffer.close()


def _idempotency_key(exchange: Exchange) -> str:
    key = exchange.headers.get("idempotency-key", "")
    if len(key) > LONGEST_KEY:
        raise HttpError(400, "idempotency_key", f"an Idempotency-Key has at most {LONGEST_KEY} characters")
    return key


def _tag(exchange: Exchange) -> str:
    """What Fluent Bit's `http` output says with `header_tag X-Fluent-Tag`."""
    return exchange.headers.get("x-fluent-tag", "")


class _Flush(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[str]
