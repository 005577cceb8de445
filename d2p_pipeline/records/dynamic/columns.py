# pyright: standard
"""The columns of dynamic records as a tree, and the three things that are made of it.

    arrow_schema   the table's types
    strict_type    the type of a line that the bulk decoder reads without losing anything
    fitted         the rewriting of any other record into such a line, by the rule that nothing is dropped

Names that an object does not know go to a map beside its columns, `extra-fields`, if the object is open.
pyarrow has no type information, hence `standard` above.
"""

import datetime
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, count
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import TimestampUnit
from d2p_pipeline.records.normalize import text_of
from d2p_pipeline.records.timestamps import canonical_time, certain_years

EXTRA = "extra-fields"
"""The map of names that an open object does not know."""

Kind = Literal[
    "null", "boolean", "integer", "bigint", "number", "string", "text", "timestamp", "date", "object", "list", "map"
]
"""`bigint`: integers beyond 2^53, which no float holds. `text`: anything, as a string or as JSON text."""

_NO_COLUMN_NAME = re.compile(r'[\x00-\x1f"\\]')

INT64 = 2**63
EXACT = 2**53
"""Integers up to here are floats without loss."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column, or a part of one. `members` and `extra` (what the map beside them holds) are an object's, `item` is a
    list's or a map's."""

    kind: Kind
    members: tuple[tuple[str, "Column"], ...] = ()
    extra: "Column | None" = None
    item: "Column | None" = None


NULL, BOOLEAN, INTEGER, BIGINT = Column("null"), Column("boolean"), Column("integer"), Column("bigint")
NUMBER, STRING, TEXT = Column("number"), Column("string"), Column("text")
TIMESTAMP, DATE = Column("timestamp"), Column("date")


def can_be_column(name: str) -> bool:
    """Whether msgspec and Arrow take it as a name: without control characters, quotes and backslashes."""
    return _NO_COLUMN_NAME.search(name) is None


def settled(column: Column) -> Column:
    """The column without what Parquet cannot hold: objects without members and columns without a type are strings."""
    if column.kind == "null" or (column.kind == "object" and not column.members and column.extra is None):
        return TEXT
    return Column(
        column.kind,
        tuple((name, settled(member)) for name, member in column.members),
        settled(column.extra) if column.extra else None,
        settled(column.item) if column.item else None,
    )


def arrow_schema(root: Column, unit: TimestampUnit) -> pa.Schema:
    """The columns of the table, in order."""
    return pa.schema(_fields(root, unit))


def _fields(column: Column, unit: TimestampUnit) -> list[pa.Field]:
    fields = [pa.field(name, _arrow_type(member, unit)) for name, member in column.members]
    if column.extra:
        fields.append(pa.field(EXTRA, pa.map_(pa.string(), _arrow_type(column.extra, unit))))
    return fields


def _arrow_type(column: Column, unit: TimestampUnit) -> pa.DataType:
    match column.kind:
        case "timestamp":
            return pa.timestamp(unit, "UTC")
        case "object":
            return pa.struct(_fields(column, unit))
        case "list":
            return pa.list_(pa.field("element", _arrow_type(column.item or TEXT, unit)))
        case "map":
            return pa.map_(pa.string(), _arrow_type(column.item or TEXT, unit))
        case kind:
            return _ARROW.get(kind, pa.string())


_ARROW = {
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    "bigint": pa.int64(),
    "number": pa.float64(),
    "date": pa.date32(),
}


def strict_type(column: Column, unit: TimestampUnit, *, lenient_text: bool = False) -> Any:
    """What msgspec decodes a value as, null apart. With `lenient_text`, `text` is any value: then a line fits if its
    record would not change the columns."""
    match column.kind:
        case "object":
            return _strict_struct(column, unit, lenient_text)
        case "list":
            return list[strict_type(column.item or TEXT, unit, lenient_text=lenient_text) | None]
        case "map":
            return dict[str, strict_type(column.item or TEXT, unit, lenient_text=lenient_text) | None]
        case "text" | "timestamp" if lenient_text:
            return Any
        case "integer" if lenient_text:
            return _EXACT
        case "timestamp":
            return Annotated[str, msgspec.Meta(pattern=_time_pattern(unit))]
        case kind:
            return _PYTHON[kind]


_INT64 = Annotated[int, msgspec.Meta(ge=-INT64, le=INT64 - 1)]
_EXACT = Annotated[int, msgspec.Meta(ge=-EXACT, le=EXACT)]
_PYTHON: dict[str, Any] = {
    "null": type(None),
    "boolean": bool,
    "integer": _INT64,
    "bigint": _INT64,
    "number": _EXACT | float,
    "date": datetime.date,
    "string": str,
    "text": str,
}


def _strict_struct(column: Column, unit: TimestampUnit, lenient_text: bool) -> type[msgspec.Struct]:
    typed = [(name, strict_type(member, unit, lenient_text=lenient_text)) for name, member in column.members]
    if column.extra:
        typed.append((EXTRA, dict[str, strict_type(column.extra, unit, lenient_text=lenient_text) | None]))
    members = [(f"f{number}", kind | None, None) for number, (_, kind) in enumerate(typed)]
    return msgspec.defstruct(
        "Record",
        members,
        rename={f"f{number}": name for number, (name, _) in enumerate(typed)},
        forbid_unknown_fields=not (lenient_text and column.extra),
        kw_only=True,
        gc=False,
    )


def _time_pattern(unit: TimestampUnit) -> str:
    """RFC 3339 in the years that can be stored whatever the offset; days that months do not have are the decoder's."""
    first, last = certain_years(unit)
    years = r"(?:1[7-9]|20|21)\d\d" if first > 1000 else r"(?!000[01]|9999)\d{4}"
    assert first <= 1700 and last >= 2199
    clock = r"(?:[01]\d|2[0-3]):[0-5]\d"
    return rf"^(?a:(?:{years})-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])T{clock}:[0-5]\d(?:\.\d{{1,9}})?(?:Z|[+-]{clock}))\Z"


def fitted(column: Column, value: Any, unit: TimestampUnit, path: str = "") -> Any:
    """The value as its column holds it, floats as the text they were decoded as. Rejected when it cannot."""
    match column.kind:
        case _ if value is None:
            return None
        case "string" | "text" | "null":
            return text_of(value)
        case "timestamp":
            return _time(value, unit, path)
        case "object" if type(value) is dict:
            return _object(column, value, unit, path)
        case "list" if type(value) is list:
            item = column.item or TEXT
            return [fitted(item, element, unit, f"{path}[{number}]") for number, element in enumerate(value)]
        case "map" if type(value) is dict:
            item = column.item or TEXT
            return {name: fitted(item, inner, unit, _below(path, name)) for name, inner in value.items()}
        case kind:
            return _scalar(kind, value, path)


def _scalar(kind: Kind, value: Any, path: str) -> Any:
    match kind:
        case "integer" | "bigint":
            return _integer(value, path)
        case "number":
            return _number(value, path)
        case "boolean" if type(value) is bool:
            return value
        case "date" if type(value) is str and _is_date(value):
            return value
        case _:
            raise Rejected(f"{path or 'the record'}: is no {kind}", path)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _integer(value: Any, path: str) -> int:
    try:
        number = value if type(value) is int else int(_whole(value))
    except (TypeError, ValueError, ArithmeticError):
        raise Rejected(f"{path}: is no integer", path) from None
    if not -INT64 <= number < INT64:
        raise Rejected(f"{path}: does not fit into 64 bits", path)
    return number


def _whole(value: Any) -> Decimal:
    """A number written with a fraction or an exponent, which amounts to an integer nevertheless: 1.0, 1e3."""
    if type(value) is not msgspec.Raw:
        raise TypeError
    number = Decimal(bytes(value).decode("ascii"))
    if number.adjusted() > 20 or number != number.to_integral_value():
        raise ValueError
    return number


def _number(value: Any, path: str) -> Any:
    if type(value) is int:
        return value
    if type(value) is not msgspec.Raw:
        raise Rejected(f"{path}: is no number", path)
    if not math.isfinite(float(bytes(value))):
        raise Rejected(f"{path}: does not fit into a 64-bit float", path)
    return value


def _time(value: Any, unit: TimestampUnit, path: str) -> str:
    try:
        return canonical_time(text_of(value) or "", unit)
    except Rejected as error:
        raise Rejected(f"{path}: {error.reason.removeprefix('time: ')}", path) from None


def _is_date(text: str) -> bool:
    try:
        return len(text) == len("2026-01-31") and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _object(column: Column, value: dict[str, Any], unit: TimestampUnit, path: str) -> dict[str, Any]:
    members = dict(column.members)
    fit: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, inner in value.items():
        if name in members:
            fit[name] = fitted(members[name], inner, unit, _below(path, name))
        elif column.extra is None:
            raise Rejected(f"{_below(path, name)}: there is no such field", path)
        elif name == EXTRA and type(inner) is dict:
            for entry, innermost in inner.items():
                extra[_free(entry, extra)] = fitted(column.extra, innermost, unit, _below(path, entry))
        else:
            extra[_free(name, extra)] = fitted(column.extra, inner, unit, _below(path, name))
    if extra or (column.extra and type(value.get(EXTRA)) is dict):
        fit[EXTRA] = extra
    return fit


def _free(name: str, taken: dict[str, Any]) -> str:
    names = chain([name], (f"{name}#{number}" for number in count(2)))
    return next(free for free in names if free not in taken)
