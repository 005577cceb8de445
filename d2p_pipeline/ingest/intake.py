"""Raw records of any door into a request for the buffer: canonical lines by key, and dead letters for what cannot be one."""

from d2p_pipeline.ingest.commit import Request
from d2p_pipeline.records.accept import acceptor
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.dead_letter import DeadLetter, Rejected
from d2p_pipeline.records.key import key_of
from d2p_pipeline.records.rules import Rules

UNKNOWN_KEY = "undefined"
"""Where the dead letters of records go whose key nobody can tell."""


class Intake:
    """Sorts raw records by fixed rules. Safe to share between threads."""

    def __init__(self, rules: Rules, *, max_record_bytes: int) -> None:
        self._rules = rules
        self._acceptor = acceptor(rules)
        self._max_record_bytes = max_record_bytes
        self._unknown_key = rules.default_capability or UNKNOWN_KEY

    def add(self, raw: bytes, request: Request) -> None:
        """Add one record, JSON text, to `request`; Rejected if it is none."""
        if len(raw) > self._max_record_bytes:
            limit = f"more than max_record_bytes ({self._max_record_bytes})"
            raise Rejected(f"the record has {len(raw)} bytes, {limit}")
        canonical = self._acceptor.canonical(raw)
        lines = request.lines.get(canonical.key)
        if lines is None:
            lines = request.lines[canonical.key] = []
        lines.append(canonical.line)

    def take(self, raw: bytes, request: Request, received_at: int, *, source: str = "") -> str | None:
        """Add one record, or a dead letter received at `received_at` (ms); returns the reason if it is rejected.

        `source` stands before the reason.
        """
        try:
            self.add(raw, request)
        except Rejected as error:
            reason = source + error.reason
            self.refuse(raw, reason, request, received_at)
            return reason
        return None

    def refuse(self, raw: bytes, reason: str, request: Request, received_at: int) -> None:
        """Add a dead letter with `raw`, less what the rules hide."""
        kept = conceal(raw, self._rules)
        letter = DeadLetter(reason=reason, stage="receive", received_at=received_at, raw=kept)
        key = key_of(raw, self._rules.key_fields) or self._unknown_key
        request.dead_letters.setdefault(key, []).append(letter)
