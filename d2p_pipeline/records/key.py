"""The key of a record that was rejected, so that its dead letter lies with its key's."""

import re
from functools import cache

import msgspec

_string = msgspec.json.Decoder(str).decode


def key_of(raw: bytes, key_fields: tuple[str, ...]) -> str | None:
    """The key as far as the text tells, even of a record that is cut off or no JSON; None when it does not.

    `key_fields` are normalized names; of a path, its last name is looked for. A number in a key field counts as its text,
    as it does in a good record.
    """
    parts = [_part(pattern, raw) for pattern in _patterns(key_fields)]
    return ":".join(part for part in parts if part) if all(parts) else None


@cache
def _patterns(key_fields: tuple[str, ...]) -> tuple[re.Pattern[bytes], ...]:
    value = rb'\s*:\s*("(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|true|false)'
    names = [re.escape(name.rpartition(".")[2]).encode().replace(rb"\-", b"[-_]") for name in key_fields]
    return tuple(re.compile(b'"' + name + b'"' + value, re.IGNORECASE) for name in names)


def _part(pattern: re.Pattern[bytes], raw: bytes) -> str | None:
    found = pattern.search(raw)
    if found is None:
        return None
    text = found[1]
    if not text.startswith(b'"'):
        return text.decode()
    try:
        return _string(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
