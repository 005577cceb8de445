"""Records for the tests of this package."""

import json
from typing import Any

REQUIRED: dict[str, Any] = {
    "time": "2026-03-05T14:07:08.123456Z",
    "level": "info",
    "message": "paid",
    "business-capability": "payments",
    "business-domain": "cards",
    "business-service": "ledger",
    "application-service": "api",
}

FULL: dict[str, Any] = REQUIRED | {
    "correlation-id": "c-1",
    "args": {"host": "h1", "empty": "", "none": None},
    "audit": True,
    "auto-index": False,
    "error": "boom",
    "extra-fields": {"team": "blue"},
    "tags": ["a", None, "b"],
    "trace-ip": [],
    "user-id": "u1",
}


def line(record: dict[str, Any] | None = None, /, **changes: Any) -> bytes:
    """A record as compact JSON; `changes` are set after `_` became `-`, None drops the field."""
    merged = (REQUIRED if record is None else record) | {
        name.replace("_", "-"): value for name, value in changes.items()
    }
    kept = {name: value for name, value in merged.items() if value is not None}
    return json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()
