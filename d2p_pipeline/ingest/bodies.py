"""Request bodies into raw records: NDJSON, a JSON array, `{"logs": [...]}`, one object; told apart by looking.

Many clients call NDJSON `application/json`, so the body decides, not its Content-Type.
"""

import re

import msgspec

_LOGS = re.compile(rb'\s*\{\s*"logs"\s*:\s*\[')
_BOM = b"\xef\xbb\xbf"


class BodyError(Exception):
    """The body as a whole cannot be read."""


class _Logs(msgspec.Struct, forbid_unknown_fields=True):
    logs: list[msgspec.Raw]


_array = msgspec.json.Decoder(list[msgspec.Raw])
_logs = msgspec.json.Decoder(_Logs)
_value = msgspec.json.Decoder(msgspec.Raw)


def records(body: bytes) -> list[bytes]:
    """The raw records of a body, in order; NDJSON lines are not looked into, so a malformed one spoils no other."""
    body = body.removeprefix(_BOM)
    start = body[:1024].lstrip()[:1]
    if start == b"[":
        return [bytes(item) for item in _decode(_array, body)]
    if start == b"{":
        if _LOGS.match(body):
            try:
                return [bytes(item) for item in _logs.decode(body).logs]
            except msgspec.DecodeError:
                pass  # NDJSON whose first record has a field "logs"
        try:
            return [bytes(_value.decode(body))]
        except msgspec.DecodeError:
            pass  # more than one line, or a malformed one
    return [line for line in body.split(b"\n") if line and not line.isspace()]


def _decode(decoder: "msgspec.json.Decoder[list[msgspec.Raw]]", body: bytes) -> list[msgspec.Raw]:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BodyError(f"the JSON array cannot be read: {error}; nothing of it was stored") from error
