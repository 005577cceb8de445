"""The HTTP receiver: requests to canonical lines, by group commit into the buffer, answered when the buffer has them.

It speaks RSGI, granian's own protocol (https://github.com/emmett-framework/granian/blob/master/docs/spec/RSGI.md): the
thinnest way from a socket to Python there is. Routes and answers are those of docs/receiver.md. An answer in the 200s
means that the buffer has the records; any other means that it has none of them, but for a 503 that says Redis did not
answer: then nobody knows, and a repetition under the same Idempotency-Key is right in either case.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
from granian._granian import RSGIHTTPProtocol as HTTPProtocol
from granian.rsgi import Scope

from d2p_pipeline.buffer.protocol import Buffer, BufferFullError, BufferUnavailableError
from d2p_pipeline.ingest import openapi
from d2p_pipeline.ingest.admission import Admission
from d2p_pipeline.ingest.answers import Answer, HttpError
from d2p_pipeline.ingest.bodies import SNIFFED, BodyError, Packed, Raw, Splitter, is_packed, records, splitter
from d2p_pipeline.ingest.commit import GroupCommit, Request
from d2p_pipeline.ingest.fluent import Completion, Misfit
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

_encode = msgspec.json.Encoder().encode
_JSON = ("content-type", "application/json")


class Receiver:
    """The RSGI application over one buffer."""

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
    ) -> None:
        self._buffer = buffer
        self._commit = commit
        self._tokens = tokens
        self._bodies = bodies
        self._limits = bodies.limits
        self._intake = Intake(rules, max_record_bytes=self._limits.record_bytes)
        self._completion = completion or Completion(rules)
        self._metrics = metrics
        self._posts: dict[str, Callable[[Scope, Body], Awaitable[Answer]]] = {
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

    async def __rsgi__(self, scope: Scope, protocol: HTTPProtocol) -> None:
        started = time.perf_counter()
        path = scope.path.rstrip("/")
        try:
            answer = await self._answer(path, scope, protocol)
        except HttpError as error:
            answer = error.answer
        except KeyFullError as error:
            answer = Answer(429, {"error": str(error)}, (("retry-after", "5"),), "key_full")
        except BufferFullError as error:
            answer = Answer(503, {"error": str(error)}, (("retry-after", "5"),), "buffer_full")
        except BufferUnavailableError as error:
            log.error("request not stored: %s", error)  # noqa: TRY400  # the reason is the whole story
            answer = Answer(503, {"error": str(error)}, (("retry-after", "1"),), "buffer_unavailable")
        seconds = time.perf_counter() - started
        if answer.text:
            body, kind = answer.text
            headers = [("content-type", kind)]
        else:
            body = _encode({**answer.body, "timestamp": int(time.time()), "elapsed": f"{seconds * 1000:.3f}ms"})
            headers = [_JSON, *answer.headers]
        known = path in self._posts or path in self._gets
        self._metrics.answered(path if known else "other", answer.status, answer.refusal, seconds)
        protocol.response_bytes(answer.status, headers, b"" if scope.method == "HEAD" else body)

    async def _answer(self, path: str, scope: Scope, protocol: HTTPProtocol) -> Answer:
        post = self._posts.get(path)
        if post is None:
            return await self._answer_get(path, scope)
        if scope.method != "POST":
            raise HttpError(405, "method", "use POST", ("allow", "POST"))
        self._authorize(scope)
        body = self._bodies.open(scope, protocol)
        try:
            return await post(scope, body)
        except BodyError as error:
            raise HttpError(400, "body_unreadable", str(error)) from error
        finally:
            body.close()

    async def _answer_get(self, path: str, scope: Scope) -> Answer:
        get = self._gets.get(path)
        if get is None:
            paths = ", ".join([*self._posts, *self._gets])
            raise HttpError(404, "no_such_path", f"no such path; there are {paths}")
        if scope.method not in ("GET", "HEAD"):
            raise HttpError(405, "method", "use GET", ("allow", "GET"))
        if get == self._get_metrics:
            self._authorize(scope)
        return await get()

    def _authorize(self, scope: Scope) -> None:
        if self._tokens and not self._tokens.allow(scope.headers.get("authorization", "")):
            raise HttpError(401, "unauthorized", "a valid bearer token is needed", ("www-authenticate", "Bearer"))

    # --- records

    async def _post_record(self, scope: Scope, body: Body) -> Answer:
        raw = await body.whole()
        admission = self._admission(scope)
        admission.saw(raw)
        try:
            text = self._one(raw, scope)
            self._intake.add(text, admission.request)
        except Rejected as error:
            raise HttpError(400, "record_invalid", error.reason) from error
        await self._store(admission.named(), 1, 0, len(raw))
        return Answer(201)

    def _one(self, body: bytes, scope: Scope) -> bytes:
        """The only record of a body."""
        tag = _tag(scope)
        if not is_packed(body, ""):
            return self._completion.complete_text(body, tag) if tag else body.strip()
        packed = Packed(self._completion, tag)
        found: list[Raw] = [*packed.feed(body), *packed.end()]
        if len(found) != 1:
            raise Rejected(f"the body has {len(found)} records; send one, or use /records")
        if isinstance(found[0], Misfit):
            raise Rejected(found[0].reason)
        return found[0]

    async def _post_records(self, scope: Scope, body: Body) -> Answer:
        admission = self._admission(scope)
        size = 0
        if body.is_small:
            whole = await body.whole()
            size = len(whole)
            admission.saw(whole)
            content_type = "" if whole[:1] in b"{[" else scope.headers.get("content-type", "")
            if is_packed(whole, content_type):
                packed = Packed(self._completion, _tag(scope))
                await admission.take_all(packed.feed(whole))
                await admission.take_all(packed.end())
            else:
                await admission.take_all(self._completed_all(records(whole), scope))
        else:
            size = await self._take_pieces(scope, body, admission)
        if admission.records:
            await self._store(admission.named(), admission.records, admission.rejected, size)
        accepted = admission.records - admission.rejected
        return Answer(202, {"accepted": accepted, "dead_lettered": admission.rejected, "errors": admission.errors})

    async def _take_pieces(self, scope: Scope, body: Body, admission: Admission) -> int:
        """Take in a large body as it comes; returns its bytes."""
        content_type = scope.headers.get("content-type", "")
        head, size = b"", 0
        split: Splitter | None = None
        async for piece in body.pieces():
            size += len(piece)
            admission.saw(piece)
            if split is None:
                head += piece
                if len(head) < SNIFFED:
                    continue
                split, piece, head = splitter(head, content_type, self._completion, _tag(scope)), head, b""
            await admission.take_all(self._completed_of(split, split.feed(piece), scope))
        if split is None:
            split = splitter(head, content_type, self._completion, _tag(scope))
            await admission.take_all(self._completed_of(split, split.feed(head), scope))
        await admission.take_all(self._completed_of(split, split.end(), scope))
        return size

    def _completed_of(self, split: Splitter, raws: Iterable[Raw], scope: Scope) -> Iterable[Raw]:
        return raws if isinstance(split, Packed) else self._completed_all(raws, scope)

    def _completed_all(self, raws: Iterable[Raw], scope: Scope) -> Iterable[Raw]:
        """JSON records with what Fluent Bit's tag adds to them, if the request has one."""
        if not (tag := _tag(scope)):
            return raws
        return (raw if isinstance(raw, Misfit) else self._completion.complete_text(raw, tag) for raw in raws)

    def _admission(self, scope: Scope) -> Admission:
        key = scope.headers.get("idempotency-key", "")
        if len(key) > LONGEST_KEY:
            raise HttpError(400, "idempotency_key", f"an Idempotency-Key has at most {LONGEST_KEY} characters")
        return Admission(self._intake, self._limits, key)

    async def _store(self, request: Request, records: int, rejected: int, size: int) -> None:
        await self._commit.store(request)
        self._metrics.stored(records - rejected, rejected, size)

    # --- the rest

    async def _post_flush(self, scope: Scope, body: Body) -> Answer:
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

    async def close(self) -> None:
        """Finish what is in flight."""
        await self._commit.close()
        self._buffer.close()


def _tag(scope: Scope) -> str:
    """What Fluent Bit's `http` output says with `header_tag X-Fluent-Tag`."""
    return scope.headers.get("x-fluent-tag", "")


class _Flush(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[str]
