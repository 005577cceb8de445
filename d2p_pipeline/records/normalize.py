"""One record as received becomes its canonical line, or is rejected with the reason.

A canonical line is one JSON object without newline that fits `canonical_struct`: exact names and types, nothing unknown.
The bulk decoder (parse.py) takes only canonical lines, because it drops what it does not know. Most records arrive
canonical and are kept byte for byte; the others are rewritten value by value, and numbers keep their text.

Nothing is lost on the way. What its field cannot hold (a number in `audit`, a string in `args`), what an alias carries
beside its field, and every unknown field goes to `extra-fields`: under its normalized name, if that is taken under the
name as written, else with `#2`, `#3`… after it. Of a name repeated within one JSON object the last value counts.
A `hmac` that a record brings is a field like any other, or unknown where the column is computed (sign.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple, cast

import msgspec

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import BY_NAME, LOG_FIELDS, Field, canonical_struct, normalize_name, target_name
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.timestamps import canonical_time, certain_years

WHITESPACE = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Longer names are not remembered, so that no sender fills the memory with them.
_LONGEST_KEPT_NAME = 64


def _as_written(number: str) -> msgspec.Raw:
    return msgspec.Raw(number.encode("ascii"))


_year_of = attrgetter("time.year")
_object = msgspec.json.Decoder(dict[str, Any], float_hook=_as_written).decode


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
        computed = frozenset({"hmac"} if rules.hmac_key is not None else ())
        self._fields = {name: field for name, field in BY_NAME.items() if name not in computed}
        strict = canonical_struct(rules.key_fields, left_out=self._hidden | computed, refused_entries=self._hidden)
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(strict).decode
        self._key_of: Callable[[Any], str | tuple[str, ...]] = attrgetter(
            *(n.replace("-", "_") for n in rules.key_fields)
        )
        self._years = certain_years(rules.timestamp_unit)
        required = [field.name for field in LOG_FIELDS if field.required]
        self._needed = tuple(dict.fromkeys((*required, *rules.key_fields)))
        self._plain_strings = frozenset(f.name for f in LOG_FIELDS if f.kind == "string") - self._hidden - computed

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
            record = self._record(members_of(line))
        except RecursionError:
            raise Rejected("nested too deep to be read") from None
        key = self._completed(record)
        return Canonical(key, msgspec.json.encode(record))

    def _record(self, members: dict[str, Any]) -> dict[str, Any]:
        """Every value at its place: exact names first, then other spellings of a field's name, then aliases, then all
        that is left over."""
        record: dict[str, Any] = {}
        spellings: list[tuple[Field, str, Any]] = []
        aliases: list[tuple[Field, str, Any]] = []
        spares: list[_Spare] = []
        for written, value in members.items():
            if type(value) is str and written in self._plain_strings:
                record[written] = value
            elif written in self._fields:
                self._take(self._fields[written], written, value, record, spares)
            else:
                name, target = _meaning(written)
                if target not in self._fields:
                    self._leave(target, written, value, spares)
                elif name == target:
                    spellings.append((self._fields[target], written, value))
                else:
                    aliases.append((self._fields[target], written, value))
        for field, written, value in (*spellings, *aliases):
            self._take(field, written, value, record, spares)
        if spares:
            self._place(spares, record)
        return record

    def _leave(self, name: str, written: str, value: Any, spares: list["_Spare"]) -> None:
        """Keep the value of an unknown field."""
        if name in self._rules.masked_fields and value is not None:
            value = "*"
        if name not in self._rules.ignored_fields:
            spares.append(_Spare(written, text_of(value)))

    def _take(self, field: Field, written: str, value: Any, record: dict[str, Any], spares: list["_Spare"]) -> None:
        """Give the field its value; what loses to an earlier value or does not fit is added to `spares`."""
        if value is None or field.name in self._rules.ignored_fields:
            return
        if field.kind == "map" and type(value) is dict:
            self._merge(record.setdefault(field.name, {}), field, cast(dict[str, Any], value), spares)
            return
        if field.name in self._rules.masked_fields:
            value = "*"
        if field.name in record or (fitting := self._fitting(field, value)) is None:
            spares.append(_Spare(written, text_of(value)))
        else:
            record[field.name] = fitting

    def _fitting(self, field: Field, value: Any) -> object | None:
        """A value that is not null as its field holds it, None if it does not fit."""
        match field.kind:
            case "string":
                return text_of(value)
            case "timestamp":
                return canonical_time(text_of(value) or "", self._rules.timestamp_unit)
            case "bool":
                return (
                    value if type(value) is bool else {"true": True, "false": False}.get((text_of(value) or "").lower())
                )
            case "list":
                elements = cast(list[Any], value) if type(value) is list else [value]
                return [text_of(element) for element in elements]
            case "map":
                return None

    def _merge(
        self, entries: dict[str, str | None], field: Field, value: dict[str, Any], spares: list["_Spare"]
    ) -> None:
        all_masked = field.name in self._rules.masked_fields
        for name, inner in value.items():
            text = text_of(inner)
            if self._hidden:
                target = _meaning(name)[1]
                if target in self._rules.ignored_fields:
                    continue
                if text is not None and (all_masked or target in self._rules.masked_fields):
                    text = "*"
            if name in entries:
                spares.append(_Spare(name, text))
            else:
                entries[name] = text

    def _place(self, spares: list["_Spare"], record: dict[str, Any]) -> None:
        """Put every spare value into `extra-fields` under a name that is free."""
        if "extra-fields" in self._rules.ignored_fields:
            return
        entries: dict[str, str | None] = record.setdefault("extra-fields", {})
        masked = "extra-fields" in self._rules.masked_fields
        placed: dict[str, str | None] = {}
        # Names that need no normalization come first: they have the better right to themselves.
        for spare in sorted(spares, key=lambda spare: spare.written != normalize_name(spare.written)):
            free = next(name for name in _names_for(spare.written) if name not in entries and name not in placed)
            placed[free] = "*" if masked and spare.text is not None else spare.text
        # Sorted, so that the files depend neither on the order of members nor on how records were read.
        entries.update(sorted(placed.items()))

    def _completed(self, record: dict[str, Any]) -> str:
        """Fill in the default capability, check what must be there, and return the key."""
        if self._rules.default_capability and not record.get("business-capability"):
            record["business-capability"] = self._rules.default_capability
        if missing := [name for name in self._needed if name not in record]:
            raise Rejected("; ".join(f"{name}: required, is missing or null" for name in missing), missing[0])
        for name in self._rules.key_fields:
            if record[name] == "":
                raise Rejected(f"{name}: key field, is empty", name)
        return ":".join(record[name] for name in self._rules.key_fields)


class _Spare(NamedTuple):
    """A value for `extra-fields`."""

    written: str
    text: str | None


def members_of(line: bytes) -> dict[str, Any]:
    """The object's members; floats as Raw, so that their text stays as written."""
    line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return _object(line)
    except UnicodeDecodeError:
        raise _not_utf8(line) from None
    except msgspec.ValidationError as error:
        raise Rejected(f"no record: {error}") from None
    except msgspec.DecodeError as error:
        position = "" if "(byte " in str(error) else f" (byte {len(line)})"
        raise Rejected(f"invalid JSON: {error}{position}") from None


def _not_utf8(line: bytes) -> Rejected:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(f"invalid UTF-8: {error.reason} (byte {error.start})")
    return Rejected("invalid UTF-8")


def text_of(value: Any) -> str | None:
    """A value as a string field holds it: numbers and booleans as written, nested values as compact JSON."""
    if value is None or type(value) is str:
        return value
    if type(value) is msgspec.Raw:
        return bytes(value).decode("ascii")
    return msgspec.json.encode(value).decode("utf-8")


def _meaning(written: str) -> tuple[str, str]:
    """The normalized name and the field it means, if any."""
    return _short_meaning(written) if len(written) <= _LONGEST_KEPT_NAME else _short_meaning.__wrapped__(written)


@lru_cache(maxsize=4096)
def _short_meaning(written: str) -> tuple[str, str]:
    name = normalize_name(written)
    return name, target_name(name)


def _names_for(written: str) -> Iterator[str]:
    yield normalize_name(written)
    yield written
    yield from (f"{written}#{number}" for number in count(2))
