"""One dynamic record as received becomes its line: checked, hidden fields gone, its key told.

With a JSON Schema the line fits the columns, so the bulk decoder (parse.py) reads it without losing anything. Without one,
the line stays as it came, because nobody knows the columns before all records of a batch are there.
"""

from typing import Any, cast

import jsonschema_rs
import msgspec

from d2p_pipeline.records.conceal import conceal, may_hide
from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.dynamic.columns import fitted, strict_type
from d2p_pipeline.records.dynamic.schema import compiled
from d2p_pipeline.records.normalize import BYTE_ORDER_MARK, WHITESPACE, Canonical, members_of, text_of
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.timestamps import canonical_time

_SHOWN_ERRORS = 5
_LONGEST_REASON = 300

_plain = msgspec.json.Decoder(dict[str, Any]).decode


class DynamicNormalizer:
    """Normalizes dynamic records by fixed rules. Safe to share between threads."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._schema = compiled(rules) if rules.json_schema is not None else None
        if self._schema:
            strict = strict_type(self._schema.columns, rules.timestamp_unit)
            self._strict = msgspec.json.Decoder(strict).decode

    def canonical(self, raw: bytes) -> Canonical:
        """The key and the line of one JSON object; Rejected if there is none."""
        line = raw.strip(WHITESPACE).removeprefix(BYTE_ORDER_MARK)
        if may_hide(line, self._rules):
            line = conceal(line, self._rules)
        try:
            record = members_of(line)
            completed = self._complete(record)
            key = self._key_of(record)
            if self._schema and not completed:
                self._validate(_decoded(line))
                if self.fits(line):
                    return Canonical(key, line)
            elif self._schema:
                self._validate(_decoded(msgspec.json.encode(record)))
            else:
                self._check_time(record)
                if not completed and b"\n" not in line:
                    return Canonical(key, line)
            return Canonical(key, msgspec.json.encode(self._fitted(record)))
        except RecursionError:
            raise Rejected("nested too deep to be read") from None

    def fits(self, line: bytes) -> bool:
        """Whether a line that was canonical when it was received still is one."""
        if b"\n" in line or may_hide(line, self._rules):
            return False
        if self._schema is None:
            return True
        try:
            self._strict(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return True

    def _complete(self, record: dict[str, Any]) -> bool:
        """Fill in the default capability; whether there was something to fill in."""
        default, [first, *others] = self._rules.default_capability, self._rules.key_fields
        if default is None or others or "." in first or record.get(first) not in (None, ""):
            return False
        record[first] = default
        return True

    def _key_of(self, record: dict[str, Any]) -> str:
        return ":".join(_key_part(record, name) for name in self._rules.key_fields)

    def _check_time(self, record: dict[str, Any]) -> None:
        name = self._rules.time_field
        if record.get(name) is not None:
            try:
                canonical_time(text_of(record[name]) or "", self._rules.timestamp_unit)
            except Rejected as error:
                raise Rejected(f"{name}: {error.reason.removeprefix('time: ')}", name) from None

    def _validate(self, record: dict[str, Any]) -> None:
        assert self._schema
        if self._schema.validator.is_valid(record):
            return
        reasons: list[str] = []
        for error in self._schema.validator.iter_errors(record):
            reasons.append(_reason(error))
            if len(reasons) == _SHOWN_ERRORS:
                break
        raise Rejected("; ".join(reasons), reasons[0].partition(":")[0])

    def _fitted(self, record: dict[str, Any]) -> Any:
        if self._schema is None:
            return record
        return fitted(self._schema.columns, record, self._rules.timestamp_unit)


def _decoded(line: bytes) -> dict[str, Any]:
    """The record with its floats as numbers, as a validator wants them; it was read before, with floats as text."""
    try:
        return _plain(line)
    except msgspec.DecodeError:
        raise Rejected("a number is beyond those of 64-bit floats") from None


def _key_part(record: dict[str, Any], name: str) -> str:
    value: Any = record.get(name)
    if value is None:
        value = record
        for part in name.split("."):
            value = cast(dict[str, Any], value).get(part) if isinstance(value, dict) else None
    if value is None:
        raise Rejected(f"{name}: key field, is missing or null", name)
    if value == "":
        raise Rejected(f"{name}: key field, is empty", name)
    if isinstance(value, dict | list):
        raise Rejected(f"{name}: key field, is no text", name)
    return text_of(value) or ""


def _reason(error: jsonschema_rs.ValidationError) -> str:
    """The path of the field, and what rule of the schema it breaks."""
    path = ""
    for part in error.instance_path:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    rule = "/".join(map(str, error.schema_path))
    message = error.message if len(error.message) <= _LONGEST_REASON else f"{error.message[:_LONGEST_REASON]}…"
    return f"{path or 'the record'}: {message} (schema: {rule})"
