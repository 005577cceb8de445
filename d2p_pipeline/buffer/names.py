"""What things are called in Redis. Every name of one key carries the hash tag `{key}`, so a script touches one slot.

A key's own braces and control characters are percent-encoded, and a `%` only where it would read as such an escape:
ordinary keys stay as they are, so any producer can write `data:{payments}`.
"""

import re
from functools import lru_cache

import msgspec

_SPECIAL = r"(?:25)*(?:7B|7D|0[0-9A-F]|1[0-9A-F]|7F)"
_ENCODE = re.compile(rf"[\x00-\x1f\x7f{{}}]|%(?={_SPECIAL})")
_DECODE = re.compile(rf"%(?:(7B|7D|0[0-9A-F]|1[0-9A-F]|7F)|(25)(?={_SPECIAL}))")


@lru_cache(maxsize=4096)
def encode_key(key: str) -> str:
    """The form of `key` inside a Redis name."""
    return _ENCODE.sub(lambda match: f"%{ord(match[0]):02X}", key)


def decode_key(text: str) -> str:
    """The inverse of `encode_key`."""
    return _DECODE.sub(lambda match: chr(int(match[1] or match[2], 16)), text)


class Names(msgspec.Struct, frozen=True):
    """Prefixes of Redis names; the defaults are the settings' defaults."""

    data: str = "data"
    dlq: str = "dlq"
    lock: str = "lock"
    keys: str = "keys"
    batches: str = "batches"
    recovery: str = "recovery"
    attended: str = "attended"
    runs: str = "runs"

    def of(self, prefix: str, key: str, suffix: str = "") -> bytes:
        """`prefix:{key}` or `prefix:{key}:suffix`."""
        name = f"{prefix}:{{{encode_key(key)}}}"
        return (f"{name}:{suffix}" if suffix else name).encode(errors="surrogateescape")

    def key_of(self, name: bytes, prefix: str) -> str | None:
        """The key in a name of that prefix without suffix; None for any other name."""
        text = name.decode(errors="surrogateescape")
        if not (text.startswith(f"{prefix}:{{") and text.endswith("}")):
            return None
        return decode_key(text[len(prefix) + 2 : -1])

    def batch_of(self, name: bytes, prefix: str) -> tuple[str, str] | None:
        """The key and batch id in a name `prefix:{key}:id`; None for any other name."""
        head, _, batch_id = name.decode(errors="surrogateescape").rpartition(":")
        key = self.key_of(head.encode(errors="surrogateescape"), prefix)
        return None if key is None else (key, batch_id)


def glob(prefix: str) -> str:
    """A pattern that only `prefix` itself matches."""
    return "".join(f"\\{char}" if char in "*?[]\\^" else char for char in prefix)
