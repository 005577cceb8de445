"""A rejected record with its reason, as it is kept in `dlq:{key}`.

Nothing of the record is lost: the bytes that were refused come back exactly, whatever they are.
"""

import base64
import logging
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import msgspec

Stage = Literal["receive", "parse", "validate"]

_log = logging.getLogger(__name__)
_REASONS_LOGGED = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Rejected(Exception):
    """A record cannot become a row. `field` is the one to blame, None if the record is unreadable as a whole."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """`raw` is the record as received, or a whole chunk where not even lines could be told apart.

    `received_at` is in milliseconds since the epoch. `history` holds the reasons of earlier rejections, oldest first. `id`
    tells it from another letter with the same content; whoever stores letters gives them one.
    """

    reason: str
    stage: Stage
    received_at: int
    raw: bytes
    batch: str | None = None
    history: tuple[str, ...] = ()
    id: str = ""

    def to_json(self) -> bytes:
        """`{"reason", "stage", "received_at", "batch", "raw"}`, with `raw_base64` for `raw` that is not UTF-8."""
        try:
            text, base64_text = self.raw.decode("utf-8"), None
        except UnicodeDecodeError:
            text, base64_text = None, base64.b64encode(self.raw).decode("ascii")
        received_at = _EPOCH + timedelta(milliseconds=self.received_at)
        return msgspec.json.encode(
            _Wire(self.reason, self.stage, received_at, self.batch, text, base64_text, self.history or None, self.id)
        )

    @classmethod
    def from_json(cls, data: bytes) -> "DeadLetter":
        """Inverse of `to_json`. ValueError if `data` is something else."""
        try:
            wire = _decode_wire(data)
            received_at = wire.received_at.astimezone(UTC)
        except (RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from error
        if wire.raw is not None:
            raw = wire.raw.encode("utf-8")
        elif wire.raw_base64 is not None:
            raw = base64.b64decode(wire.raw_base64, validate=True)
        else:
            raise msgspec.ValidationError("Object missing required field `raw` or `raw_base64`")
        return cls(
            reason=wire.reason,
            stage=wire.stage,
            received_at=(received_at - _EPOCH) // timedelta(milliseconds=1),
            raw=raw,
            batch=wire.batch,
            history=wire.history or (),
            id=wire.id,
        )

    @classmethod
    def read(cls, data: bytes) -> "DeadLetter":
        """The letter in an element of a queue; what is none is a letter about itself."""
        try:
            return cls.from_json(data)
        except ValueError as error:
            return cls(reason=f"not a dead letter: {error}", stage="receive", received_at=0, raw=data)


def reasons(letters: Iterable[DeadLetter]) -> Counter[str]:
    """How many for each reason."""
    return Counter(letter.reason for letter in letters)


def log_unkept(key: str, letters: Iterable[DeadLetter]) -> None:
    """Where dead letters are not kept (`use_dlq = false`), the log is all that tells of them."""
    for reason, count in reasons(letters).most_common(_REASONS_LOGGED):
        _log.warning("key=%s %d records rejected and not kept (use_dlq = false): %s", key, count, reason)


class _Wire(msgspec.Struct, omit_defaults=True):
    reason: str
    stage: Stage
    received_at: Annotated[datetime, msgspec.Meta(tz=True)]
    batch: str | None
    raw: str | None = None
    raw_base64: str | None = None
    history: tuple[str, ...] | None = None
    id: str = ""


_decode_wire = msgspec.json.Decoder(_Wire).decode
