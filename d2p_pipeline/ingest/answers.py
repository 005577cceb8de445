"""What the receiver answers: a status, a JSON body, headers, and for the metrics why a request was refused."""

from typing import Any, Literal

import msgspec

Refusal = Literal[
    "",
    "no_request",
    "unauthorized",
    "no_such_path",
    "method",
    "encoding",
    "body_unreadable",
    "body_too_large",
    "body_too_slow",
    "record_invalid",
    "too_many_keys",
    "too_many_rejects",
    "idempotency_key",
    "memory",
    "key_full",
    "buffer_full",
    "buffer_unavailable",
    "foreign_value",
    "defect",
]


class Answer(msgspec.Struct):
    """`body` is completed with timestamp and elapsed time; a `text` (body, content type) is sent as it is."""

    status: int
    body: dict[str, Any] = {}
    headers: tuple[tuple[str, str], ...] = ()
    refusal: Refusal = ""
    text: tuple[bytes, str] | None = None


class HttpError(Exception):
    """A request that is refused, with nothing stored."""

    def __init__(self, status: int, refusal: Refusal, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.answer = Answer(status, {"error": reason}, headers, refusal)
