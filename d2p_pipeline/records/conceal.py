"""What `ignored_fields` and `mask_fields` name is hidden in rejected records too, before they are kept as dead letters.

Good records lose it in the normalizer. A dead letter keeps the text that was received, so the text is rewritten here, and
only where something is to hide: every other value stays as it was written. Of text that is no JSON object nobody can tell
the fields; what looks like `"name": value` is masked there, which is the best that can be done, and no promise.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache

import msgspec

from d2p_pipeline.records.fields import BY_NAME, normalize_name, spellings, target_name
from d2p_pipeline.records.rules import Fate, Rules

_MASK = b'"*"'

_BLANK = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\r\n,\]}]++")
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)

_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_string = msgspec.json.Decoder(str).decode

_Judge = Callable[[str, bytes], "Fate | _Judge"]
"""What becomes of a member, by its name and the first byte of its value; a judge if the members of that value decide."""


def conceal(raw: bytes, rules: Rules) -> bytes:
    """`raw` with hidden fields dropped or masked: `raw` itself where there are none."""
    hidden = rules.ignored_fields | rules.masked_fields
    if not hidden:
        return raw
    start = raw.find(b"{")
    judge = _log_judge(rules) if rules.record_type == "log" else _dynamic_judge(rules)
    try:
        _object(raw[start:])
        return raw[:start] + _rewritten(raw, start, judge)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _guessed(raw, hidden)


def may_hide(text: bytes, rules: Rules) -> bool:
    """Whether `text`, JSON of dynamic records, may hold a hidden name; False is certain, and quick."""
    hidden = rules.ignored_fields | rules.masked_fields
    return bool(hidden) and (b"\\" in text or _any_of(hidden).search(text) is not None)


@cache
def _log_judge(rules: Rules) -> _Judge:
    """For the fields of a log record; what is unknown shares the fate of `extra-fields`, where it would have gone."""

    def fate_of(name: str) -> Fate:
        target = target_name(normalize_name(name))
        return "drop" if target in rules.ignored_fields else "mask" if target in rules.masked_fields else "keep"

    def entry(name: str, opening: bytes) -> Fate:
        return fate_of(name)

    def masked_entry(name: str, opening: bytes) -> Fate:
        return "drop" if fate_of(name) == "drop" else "mask"

    def judge(name: str, opening: bytes) -> Fate | _Judge:
        field = BY_NAME.get(target_name(normalize_name(name)))
        fate = fate_of(name)
        if field is None:
            return fate_of("extra-fields") if fate == "keep" else fate
        if field.kind == "map" and opening == b"{" and fate != "drop":
            return masked_entry if fate == "mask" else entry
        return fate

    return judge


@cache
def _dynamic_judge(rules: Rules, within: str = "") -> _Judge:
    """For the fields of a dynamic record, at every depth."""

    def judge(name: str, opening: bytes) -> Fate | _Judge:
        path = f"{within}.{name}" if within else name
        fate = rules.fate_of(name, path)
        return _dynamic_judge.__wrapped__(rules, path) if opening in (b"{", b"[") and fate == "keep" else fate

    return judge


def _rewritten(text: bytes, start: int, judge: _Judge) -> bytes:
    """The JSON object at `start` without what the judge hides. `text` is valid from there on."""
    kept: list[bytes] = []
    for name_at, value_at, end in _members(text, start):
        value = text[value_at:end]
        fate = judge(_name(text, name_at), value[:1])
        if fate == "drop":
            continue
        if callable(fate):
            value = _rewritten_value(value, fate)
        elif fate == "mask" and value != b"null":
            value = _MASK
        kept.append(text[name_at:value_at] + value)
    return b"{" + b",".join(kept) + b"}"


def _rewritten_value(value: bytes, judge: _Judge) -> bytes:
    if value.startswith(b"{"):
        return _rewritten(value, 0, judge)
    if not value.startswith(b"["):
        return value
    elements: list[bytes] = []
    at = _after_blank(value, 1)
    while value[at : at + 1] != b"]":
        end = _end(value, at)
        elements.append(_rewritten_value(value[at:end], judge))
        at = _after_blank(value, end)
        if value[at : at + 1] == b",":
            at = _after_blank(value, at + 1)
    return b"[" + b",".join(elements) + b"]"


def _name(text: bytes, start: int) -> str:
    found = _STRING.match(text, start)
    written = found[0] if found else b'""'
    try:
        return _string(written)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return written[1:-1].decode("utf-8", "replace")


def _members(text: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Per member of the object at `start`, where its name and its value begin and where that ends."""
    at = _after_blank(text, start + 1)
    while text[at : at + 1] != b"}":
        name_at = at
        at = _after_blank(text, _end(text, at)) + 1
        value_at = _after_blank(text, at)
        at = _end(text, value_at)
        yield name_at, value_at, at
        at = _after_blank(text, at)
        if text[at : at + 1] == b",":
            at = _after_blank(text, at + 1)


def _after_blank(text: bytes, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _end(text: bytes, at: int) -> int:
    """Where the value at `at` ends, or the text where it breaks off."""
    match text[at : at + 1]:
        case b'"':
            found = _STRING.match(text, at)
        case b"{" | b"[":
            return _end_of_container(text, at)
        case _:
            found = _SCALAR.match(text, at)
    return found.end() if found else len(text)


def _end_of_container(text: bytes, at: int) -> int:
    depth = 0
    while at < len(text):
        depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(text[at : at + 1], 0)
        at += 1
        if not depth:
            return at
        found = _TO_BRACKET.match(text, at)
        at = found.end() if found else at
        if text[at : at + 1] == b'"':  # a string that does not end
            break
    return len(text)


def _guessed(text: bytes, hidden: frozenset[str]) -> bytes:
    """`text` with the values masked that seem to belong to hidden names."""
    pieces: list[bytes] = []
    at = 0
    while found := _named(hidden).search(text, at):
        pieces += (text[at : found.end()], _MASK)
        at = _end(text, found.end())
    pieces.append(text[at:])
    return b"".join(pieces)


@cache
def _named(hidden: frozenset[str]) -> re.Pattern[bytes]:
    names = sorted(re.escape(name.encode()).replace(rb"\-", b"[-_]") for name in spellings(hidden))
    names += [last for name in names if (last := name.rpartition(rb"\.")[2]) != name]
    return re.compile(b'"(?:' + b"|".join(names) + rb')"[ \t\r\n]*+:[ \t\r\n]*+', re.IGNORECASE)


@cache
def _any_of(hidden: frozenset[str]) -> re.Pattern[bytes]:
    """Ends of quoted names, of those with letters beyond ASCII any: folding their case is not for bytes."""
    if not all(name.isascii() for name in hidden):
        return re.compile(b"")
    lasts = sorted({re.escape(name.rpartition(".")[2].encode()).replace(rb"\-", b"[-_]") for name in hidden})
    return re.compile(b"(?:" + b"|".join(lasts) + b')"', re.IGNORECASE)
