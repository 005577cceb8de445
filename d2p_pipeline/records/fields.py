# pyright: standard
"""The log record: one table of its 34 fields, and everything that derives from it.

The Arrow schema, the strict type of a canonical line, the column checks (validate.py) and the documentation all read
`LOG_FIELDS`; nothing else in the project lists field names. The order is that of the predecessors' files.
pyarrow has no type information, hence `standard` above; it is imported by who asks for a schema of it, as the receiver and
the command line do not.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "1"
"""Of the files: changes when a column changes its name or type."""

Kind = Literal["string", "bool", "map", "list", "timestamp"]
TimestampUnit = Literal["ms", "us", "ns"]
ColumnNames = Literal["kebab", "snake"]


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its kebab-case name, and the other names it may arrive under (normalized, see `normalize_name`)."""

    name: str
    kind: Kind = "string"
    required: bool = False
    aliases: tuple[str, ...] = ()


LOG_FIELDS: tuple[Field, ...] = (
    Field("time", "timestamp", required=True, aliases=("timestamp", "when")),
    Field("level", required=True, aliases=("lvl",)),
    Field("message", required=True, aliases=("msg", "log")),
    Field("correlation-id"),
    Field("business-capability", required=True),
    Field("business-domain", required=True),
    Field("business-service", required=True),
    Field("application-service", required=True),
    Field("args", "map"),
    Field("audit", "bool"),
    Field("auto-index", "bool"),
    Field("az"),
    Field("cloud-provider"),
    Field("device-id"),
    Field("duration", aliases=("elapsed", "elapsed-time")),
    Field("error", aliases=("error-message", "error-msg")),
    Field("error-code"),
    Field("extra-fields", "map"),
    Field("hmac"),
    Field("http-response"),
    Field("logger-name"),
    Field("message-id"),
    Field("person-id"),
    Field("region"),
    Field("resource-type"),
    Field("session-id"),
    Field("source-id"),
    Field("stack-trace"),
    Field("tags", "list"),
    Field("thread-name"),
    Field("trace-ip", "list"),
    Field("transaction-message-reference"),
    Field("ttl"),
    Field("user-id"),
)

BY_NAME: dict[str, Field] = {field.name: field for field in LOG_FIELDS}

_TARGETS = {alias: field.name for field in LOG_FIELDS for alias in (field.name, *field.aliases)}

_CHILD_ID_BASE = 1000


def normalize_name(name: str) -> str:
    """The form in which names are compared: lower case, `-` for `_`."""
    return name.lower().replace("_", "-")


def target_name(name: str) -> str:
    """The field a normalized name means: an alias's field, else the name itself, known or not."""
    return _TARGETS.get(name, name)


def spellings(names: frozenset[str]) -> list[str]:
    """Every normalized name that means one of `names`."""
    return [alias for alias, name in _TARGETS.items() if name in names] + [n for n in names if n not in _TARGETS]


def column_name(name: str, style: ColumnNames) -> str:
    """The column a field is stored in."""
    return name.replace("-", "_") if style == "snake" else name


@cache
def arrow_schema(unit: TimestampUnit = "us", style: ColumnNames = "kebab") -> pa.Schema:
    """The columns of a table of log records, in order. Every field, nested ones included, has its own Parquet field id.

    Columns are nullable, the required ones too: nulls are found by validation, which can name the record.
    """
    import pyarrow as pa

    return pa.schema(
        [
            _arrow_field(column_name(field.name, style), _arrow_type(field.kind, position, unit), position)
            for position, field in enumerate(LOG_FIELDS, start=1)
        ]
    )


@cache
def canonical_struct(
    key_fields: tuple[str, ...] = (),
    left_out: frozenset[str] = frozenset(),
    refused_entries: frozenset[str] = frozenset(),
) -> type[msgspec.Struct]:
    """The strict type of a canonical record: exact names, exact types, nothing unknown, key fields not empty.

    `left_out` fields are unknown to it, and map entries named like `refused_entries` do not fit, so a record with one of
    them is not canonical. `time` only tells that its text is readable: msgspec rounds to µs where Arrow truncates.
    """
    pattern = _no_entry_of(refused_entries)
    members: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in LOG_FIELDS:
        if field.name in left_out or (field.kind == "map" and pattern is None):
            continue
        kind: Any = _PYTHON_TYPES[field.kind]
        if field.kind == "map" and pattern:
            kind = dict[Annotated[str, msgspec.Meta(pattern=pattern)], str | None]
        if field.name in key_fields:
            kind = Annotated[str, msgspec.Meta(min_length=1)]
        attribute = field.name.replace("-", "_")
        if field.required or field.name in key_fields:
            members.append((attribute, kind))
        else:
            members.append((attribute, kind | None, None))
    return msgspec.defstruct(
        "CanonicalLog", members, rename="kebab", forbid_unknown_fields=True, kw_only=True, gc=False
    )


def markdown_table() -> str:
    """The fields as documentation."""
    rows = ["| field | type | required | also read from |", "|---|---|---|---|"]
    for field in LOG_FIELDS:
        aliases = ", ".join(f"`{alias}`" for alias in field.aliases)
        rows.append(f"| `{field.name}` | {_DOCUMENTED[field.kind]} | {'yes' if field.required else ''} | {aliases} |")
    return "\n".join(rows) + "\n"


_PYTHON_TYPES: dict[Kind, Any] = {
    "string": str,
    "bool": bool,
    "map": dict[str, str | None],
    "list": list[str | None],
    "timestamp": Annotated[datetime.datetime, msgspec.Meta(tz=True)],
}

_DOCUMENTED: dict[Kind, str] = {
    "string": "string",
    "bool": "boolean",
    "map": "map<string, string>",
    "list": "list<string>",
    "timestamp": "timestamp, UTC",
}


def _arrow_field(name: str, kind: pa.DataType, field_id: int, nullable: bool = True) -> pa.Field:
    import pyarrow as pa

    return pa.field(name, kind, nullable=nullable, metadata={"PARQUET:field_id": str(field_id)})


def _arrow_type(kind: Kind, position: int, unit: TimestampUnit) -> pa.DataType:
    import pyarrow as pa

    # Ids of children depend on their own field alone, so a field added at the end renumbers nothing.
    child = _CHILD_ID_BASE + 10 * position
    match kind:
        case "string":
            return pa.string()
        case "bool":
            return pa.bool_()
        case "timestamp":
            return pa.timestamp(unit, tz="UTC")
        case "list":
            return pa.list_(_arrow_field("element", pa.string(), child))
        case "map":
            key = _arrow_field("key", pa.string(), child, nullable=False)
            return pa.map_(key, _arrow_field("value", pa.string(), child + 1))


def _no_entry_of(names: frozenset[str]) -> str | None:
    """A pattern for names that do not mean one of `names`; "" if all do; None if no pattern can tell."""
    if not names:
        return ""
    written = spellings(names)
    # str.lower() and the pattern's case folding agree on ASCII only.
    if not all(spelling.isascii() for spelling in written):
        return None
    alternatives = "|".join(sorted(re.escape(spelling).replace(r"\-", "[-_]") for spelling in written))
    return rf"^(?!(?i:{alternatives})\Z)"
