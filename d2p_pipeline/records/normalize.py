"""One record as received becomes its canonical line, or is rejected with the reason.

A canonical line is one JSON object without newline that fits `canonical_struct`: exact names and types, nothing unknown.
The bulk decoder (parse.py) takes only canonical lines, because it drops what it does not know. Most records arrive
canonical and are kept byte for byte; the others are rewritten value by value, from the exact text of each value.

Nothing is lost on the way. What its field cannot hold (a number in `audit`, a string in `args`), what an alias carries
beside its field, and every unknown field goes to `extra-fields`: under its normalized name, if that is taken under the
name as written, else with `#2`, `#3`… after it. Of a name repeated within one JSON object the last value counts.
A `hmac` that a record brings is a field like any other until a later step fills the column.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import BY_NAME, LOG_FIELDS, Field, canonical_struct, normalize_name, target_name
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.timestamps import canonical_time, certain_years

WHITESPACE = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MASKED = b'"*"'

_year_of = attrgetter("time.year")
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_string = msgspec.json.Decoder(str).decode


@dataclass(frozen=True, slots=True)
class Canonical:
    """A record's key and its canonical line, without newline."""

    key: str
    line: bytes


class Normalizer:
    """Normalizes records by fixed rules. Cheap to use, costs a millisecond to build; safe to share between threads."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._hidden = rules.ignored_fields | rules.masked_fields
        strict = canonical_struct(rules.key_fields, left_out=self._hidden, refused_entries=self._hidden)
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(strict).decode
        self._key_of: Callable[[Any], str | tuple[str, ...]] = attrgetter(
            *(n.replace("-", "_") for n in rules.key_fields)
        )
        self._years = certain_years(rules.timestamp_unit)

    def canonical(self, raw: bytes) -> Canonical:
        """The canonical form of one JSON object; Rejected if there is none."""
        line = raw.strip(WHITESPACE)
        first, last = self._years
        try:
            record = self._decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._rewritten(line)
        if b"\n" in line or not first <= record.time.year <= last:
            return self._rewritten(line)
        parts = self._key_of(record)
        return Canonical(parts if isinstance(parts, str) else ":".join(parts), line)

    def count_canonical(self, lines: bytes) -> int | None:
        """The number of records if `lines` is nothing but canonical lines, each ended by a newline; else None."""
        texts = lines.split(b"\n")
        if texts.pop():
            return None
        try:
            years = list(map(_year_of, map(self._decode, texts)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        first, last = self._years
        return len(years) if not years or (min(years) >= first and max(years) <= last) else None

    def rewritten_line(self, raw: bytes) -> bytes:
        """The canonical line written anew even if `raw` is one, so that no name in it is repeated."""
        return self._rewritten(raw.strip(WHITESPACE)).line

    def _rewritten(self, line: bytes) -> Canonical:
        try:
            claims, spares = self._claims(_members(line))
            record = self._fields(claims, spares)
            self._place(spares, record)
        except msgspec.DecodeError as error:
            raise _unreadable(line, error) from None
        except RecursionError:
            raise Rejected("nested too deep to be read") from None
        return Canonical(self._completed(record), msgspec.json.encode(record))

    def _claims(self, members: dict[str, msgspec.Raw]) -> tuple[dict[str, list["_Claim"]], list["_Spare"]]:
        """Which values claim which field, the best claim first, and the values that no field is meant by."""
        claims: dict[str, list[_Claim]] = {}
        spares: list[_Spare] = []
        for written, raw in members.items():
            name = normalize_name(written)
            target = target_name(name)
            value = bytes(raw)
            if target in self._rules.ignored_fields:
                continue
            # A masked map keeps its names; its values are masked when it is merged.
            if target in self._rules.masked_fields and value != b"null" and not _is_map(target, value):
                value = _MASKED
            if target not in BY_NAME:
                spares.append(_Spare(written, _text(value)))
            elif value != b"null":
                rank = 0 if written == target else 1 if name == target else 2
                claims.setdefault(target, []).append(_Claim(rank, written, value))
        for rivals in claims.values():
            rivals.sort(key=attrgetter("rank"))
        return claims, spares

    def _fields(self, claims: dict[str, list["_Claim"]], spares: list["_Spare"]) -> dict[str, Any]:
        """The record of the claims that win; what loses or does not fit its field is added to `spares`."""
        record: dict[str, Any] = {}
        for field in LOG_FIELDS:
            for claim in claims.get(field.name, ()):
                if _is_map(field.name, claim.value):
                    self._merge(record.setdefault(field.name, {}), field, claim.value, spares)
                elif field.name not in record and (fitting := self._fitting(field, claim.value)) is not None:
                    record[field.name] = fitting
                else:
                    spares.append(_Spare(claim.written, _text(claim.value)))
        return record

    def _fitting(self, field: Field, value: bytes) -> object | None:
        """A value that is not null as its field holds it, None if it does not fit."""
        match field.kind:
            case "string":
                return _text(value)
            case "timestamp":
                return canonical_time(_text(value) or "", self._rules.timestamp_unit)
            case "bool":
                return {"true": True, "false": False}.get((_text(value) or "").lower())
            case "list":
                return [_text(bytes(element)) for element in _array(value)] if value[:1] == b"[" else [_text(value)]
            case "map":
                return None

    def _merge(self, entries: dict[str, str | None], field: Field, value: bytes, spares: list["_Spare"]) -> None:
        for name, raw in _object(value).items():
            target = target_name(normalize_name(name))
            if target in self._rules.ignored_fields:
                continue
            text = _text(bytes(raw))
            if text is not None and not self._rules.masked_fields.isdisjoint((field.name, target)):
                text = "*"
            if name in entries:
                spares.append(_Spare(name, text))
            else:
                entries[name] = text

    def _place(self, spares: list["_Spare"], record: dict[str, Any]) -> None:
        """Put every spare value into `extra-fields` under a name that is free."""
        if not spares or "extra-fields" in self._rules.ignored_fields:
            return
        entries: dict[str, str | None] = record.setdefault("extra-fields", {})
        masked = "extra-fields" in self._rules.masked_fields
        # Names that need no normalization come first: they have the better right to themselves.
        for spare in sorted(spares, key=lambda spare: spare.written != normalize_name(spare.written)):
            free = next(name for name in _names_for(spare.written) if name not in entries)
            entries[free] = "*" if masked and spare.text is not None else spare.text

    def _completed(self, record: dict[str, Any]) -> str:
        """Fill in the default capability, check what must be there, and return the key."""
        if self._rules.default_capability and not record.get("business-capability"):
            record["business-capability"] = self._rules.default_capability
        needed = dict.fromkeys([field.name for field in LOG_FIELDS if field.required] + list(self._rules.key_fields))
        if missing := [name for name in needed if name not in record]:
            raise Rejected("; ".join(f"{name}: required, is missing or null" for name in missing), missing[0])
        for name in self._rules.key_fields:
            if record[name] == "":
                raise Rejected(f"{name}: key field, is empty", name)
        return ":".join(record[name] for name in self._rules.key_fields)


class _Claim(NamedTuple):
    """A value whose name means a known field. Rank 0: the name itself, 1: another spelling of it, 2: an alias."""

    rank: int
    written: str
    value: bytes


class _Spare(NamedTuple):
    """A value for `extra-fields`."""

    written: str
    text: str | None


def _members(line: bytes) -> dict[str, msgspec.Raw]:
    line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"invalid UTF-8: {error.reason} (byte {error.start})") from None
    return _object(line)


def _unreadable(line: bytes, error: msgspec.DecodeError) -> Rejected:
    if isinstance(error, msgspec.ValidationError):
        return Rejected(f"not a JSON object: {error}")
    position = "" if "(byte " in str(error) else f" (byte {len(line)})"
    return Rejected(f"invalid JSON: {error}{position}")


def _text(value: bytes) -> str | None:
    """JSON as a string field holds it: numbers and booleans as written, nested values compact, null as None."""
    match value[:1]:
        case b'"':
            return _string(value)
        case b"n":
            return None
        case b"{" | b"[":
            return msgspec.json.format(value, indent=-1).decode("utf-8")
        case _:
            return value.decode("utf-8")


def _is_map(field_name: str, value: bytes) -> bool:
    return field_name in BY_NAME and BY_NAME[field_name].kind == "map" and value[:1] == b"{"


def _names_for(written: str) -> Iterator[str]:
    yield normalize_name(written)
    yield written
    yield from (f"{written}#{number}" for number in count(2))
