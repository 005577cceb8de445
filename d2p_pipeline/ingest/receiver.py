"""The HTTP receiver: requests to canonical lines, by group commit into the buffer, answered when the buffer has them.

It speaks RSGI, granian's own protocol (https://github.com/emmett-framework/granian/blob/master/docs/spec/RSGI.md): the
thinnest way from a socket to Python there is. Routes and answers are those of the README's HTTP table. An answer in the 200s
means that the buffer has the records; any other means that it has none of them.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from granian._granian import RSGIHTTPProtocol as HTTPProtocol
from granian.rsgi import Scope

from d2p_pipeline.buffer.protocol import Buffer, BufferFullError, BufferUnavailableError
from d2p_pipeline.ingest.bodies import BodyError, records
from d2p_pipeline.ingest.commit import GroupCommit, Request
from d2p_pipeline.records.accept import acceptor
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected
from d2p_pipeline.records.key import key_of
from d2p_pipeline.records.rules import Rules

log = logging.getLogger(__name__)

SHOWN_ERRORS = 20
"""Reasons listed in the answer to a batch."""
DISCARDED_BODIES = 4
"""How many times `max_body_bytes` of a body too large is read and thrown away before the connection is cut."""
UNKNOWN_KEY = "undefined"
"""Where the dead letters of records go whose key nobody can tell."""

_encode = msgspec.json.Encoder().encode
Handler = Callable[[HTTPProtocol, bytes], Awaitable["Answer"]]


class Answer(msgspec.Struct):
    status: int
    body: dict[str, Any]
    headers: tuple[tuple[str, str], ...] = ()


class HttpError(Exception):
    """A request that is refused, with nothing stored."""

    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.answer = Answer(status, {"error": reason}, headers)


class Receiver:
    """The RSGI application over one buffer."""

    def __init__(
        self,
        buffer: Buffer,
        rules: Rules,
        *,
        tokens: Sequence[str] = (),
        max_body_bytes: int = 64 << 20,
        max_record_bytes: int = 16 << 20,
        push_window: int = 120,
        keep_dead_letters: bool = True,
    ) -> None:
        self._buffer = buffer
        self._acceptor = acceptor(rules)
        self._rules = rules
        self._unknown_key = rules.default_capability or UNKNOWN_KEY
        self._tokens = [f"Bearer {token}".encode() for token in tokens]
        self._max_body_bytes = max_body_bytes
        self._max_record_bytes = max_record_bytes
        self._commit = GroupCommit(buffer, window=push_window, keep_dead_letters=keep_dead_letters)
        self._posts: dict[str, Callable[[bytes], Awaitable[Answer]]] = {
            "/record": self._post_record,
            "/records": self._post_records,
            "/flush": self._post_flush,
        }
        self._gets: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/healthcheck": self._get_healthcheck,
            "/ready": self._get_ready,
        }

    async def __rsgi__(self, scope: Scope, protocol: HTTPProtocol) -> None:
        started = time.perf_counter()
        try:
            answer = await self._answer(scope, protocol)
        except HttpError as error:
            answer = error.answer
        except BufferFullError as error:
            answer = Answer(503, {"error": str(error)}, (("retry-after", "5"),))
        except BufferUnavailableError as error:
            log.error("request not stored: %s", error)  # noqa: TRY400  # the reason is the whole story
            answer = Answer(503, {"error": str(error)}, (("retry-after", "1"),))
        elapsed = f"{(time.perf_counter() - started) * 1000:.3f}ms"
        body = _encode({**answer.body, "timestamp": int(time.time()), "elapsed": elapsed})
        protocol.response_bytes(answer.status, [("content-type", "application/json"), *answer.headers], body)

    async def _answer(self, scope: Scope, protocol: HTTPProtocol) -> Answer:
        path = scope.path.rstrip("/")
        post, get = self._posts.get(path), self._gets.get(path)
        if post is None and get is None:
            raise HttpError(404, f"no such path; there are {', '.join([*self._posts, *self._gets])}")
        if get is not None:
            if scope.method not in ("GET", "HEAD"):
                raise HttpError(405, "use GET", ("allow", "GET"))
            return await get()
        assert post is not None
        if scope.method != "POST":
            raise HttpError(405, "use POST", ("allow", "POST"))
        self._authorize(scope)
        return await post(await self._read(scope, protocol))

    def _authorize(self, scope: Scope) -> None:
        if not self._tokens:
            return
        given = scope.headers.get("authorization", "").encode()
        # Every token is compared, in constant time: the answer's delay tells nothing.
        matches = [hmac.compare_digest(given, token) for token in self._tokens]
        if not any(matches):
            raise HttpError(401, "a valid bearer token is needed", ("www-authenticate", "Bearer"))

    async def _read(self, scope: Scope, protocol: HTTPProtocol) -> bytes:
        encoding = scope.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise HttpError(415, f"Content-Encoding {encoding} is not supported; send the body as it is")
        length = scope.headers.get("content-length")
        if length is not None and int(length) <= self._max_body_bytes:
            return await protocol()
        if length is not None and int(length) > DISCARDED_BODIES * self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        discarded = 0
        async for part in protocol:
            if len(body) + len(part) <= self._max_body_bytes and not discarded:
                body += part
                continue
            # Most clients read the answer only when they have sent everything: take in what is not absurd.
            discarded += len(part)
            if discarded > DISCARDED_BODIES * self._max_body_bytes:
                break
        if discarded:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body exceeds max_body_bytes ({self._max_body_bytes}); send smaller batches")

    async def _post_record(self, body: bytes) -> Answer:
        request = Request()
        try:
            self._accept(body.strip(), request)
        except Rejected as error:
            raise HttpError(400, error.reason) from error
        await self._commit.store(request)
        return Answer(201, {})

    async def _post_records(self, body: bytes) -> Answer:
        try:
            raws = records(body)
        except BodyError as error:
            raise HttpError(400, str(error)) from error
        request, errors, dead = Request(), [], 0
        now = time.time_ns() // 1_000_000
        for number, raw in enumerate(raws, 1):
            try:
                self._accept(raw, request)
            except Rejected as error:
                dead += 1
                kept = conceal(raw, self._rules)
                letter = DeadLetter(reason=error.reason, stage="receive", received_at=now, raw=kept)
                request.dead_letters.setdefault(key_of(raw, self._rules.key_fields) or self._unknown_key, []).append(
                    letter
                )
                if len(errors) < SHOWN_ERRORS:
                    errors.append({"line": number, "reason": error.reason})
        if raws:
            await self._commit.store(request)
        return Answer(202, {"accepted": len(raws) - dead, "dead_lettered": dead, "errors": errors})

    def _accept(self, raw: bytes, request: Request) -> None:
        if len(raw) > self._max_record_bytes:
            raise Rejected(f"the record has {len(raw)} bytes, more than max_record_bytes ({self._max_record_bytes})")
        canonical = self._acceptor.canonical(raw)
        lines = request.lines.get(canonical.key)
        if lines is None:
            lines = request.lines[canonical.key] = []
        lines.append(canonical.line)

    async def _post_flush(self, body: bytes) -> Answer:
        try:
            keys = msgspec.json.decode(body, type=_Flush).keys if body.strip() else None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HttpError(400, f'the body is empty or {{"keys": ["…"]}}: {error}') from error
        due = await asyncio.to_thread(self._buffer.request_flush, keys)
        return Answer(202, {"keys": due})

    async def _get_healthcheck(self) -> Answer:
        return Answer(200, {"status": "ok"})

    async def _get_ready(self) -> Answer:
        await asyncio.to_thread(self._buffer.check_writable)
        return Answer(200, {"status": "ready"})

    async def close(self) -> None:
        """Finish what is in flight."""
        await self._commit.close()
        self._buffer.close()


class _Flush(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[str]
