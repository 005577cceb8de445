"""Fluent events into JSON records: MessagePack as Fluent Bit and Fluentd write it, each record completed from its event.

An event is `[time, record]`, or `[[time, metadata], record]` since Fluent Bit 2.1. `time` is an EventTime (extension type
0: seconds and nanoseconds, unsigned, big-endian), an integer or a float
(https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1). Two EventTimes that no clock shows mark the begin
and the end of a group, whose attributes belong to the records between them. What is no event becomes a `Misfit`: the bytes
are kept, and the events around them are read.
"""

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

import msgpack
import msgspec

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import normalize_name, target_name
from d2p_pipeline.records.normalize import members_of
from d2p_pipeline.records.rules import Rules

TAG, TIME, METADATA, GROUP = "fluent-tag", "fluent-time", "fluent-metadata", "fluent-group"
"""Names under which a record keeps what only its event knew."""

_GROUP_BEGINS, _GROUP_ENDS = (0xFFFFFFFF, 0), (0xFFFFFFFE, 0)
_EVENT_TIME = struct.Struct(">II")
_EPOCH = datetime(1970, 1, 1)  # UTC, which is written behind it
_LONGEST_KEPT_NAME = 64


@dataclass(slots=True)
class Event:
    """One record and what its event says about it. `time` is text or a number; `raw` the event's bytes."""

    time: "EventTime | int | float"
    record: dict[str, Any]
    raw: bytes
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    group: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Misfit:
    """Bytes that are no event, and why not."""

    reason: str
    raw: bytes


class EventTime:
    """A moment: seconds since 1970 and nanoseconds, as the extension has them."""

    __slots__ = ("nanoseconds", "seconds")

    def __init__(self, seconds: int, nanoseconds: int) -> None:
        self.seconds, self.nanoseconds = seconds, nanoseconds

    def __str__(self) -> str:
        more, nanoseconds = divmod(self.nanoseconds, 10**9)
        try:
            return f"{_second(self.seconds + more)}.{nanoseconds:09d}Z"
        except OverflowError:  # in no year that has four digits: as a number
            return f"{self.seconds + more}.{nanoseconds:09d}"


@lru_cache(maxsize=256)
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()


def unpacker(size: int) -> msgpack.Unpacker:
    """A MessagePack reader for `size` bytes: text that is no UTF-8 keeps its bytes, maps become dicts with text as keys."""
    return msgpack.Unpacker(max_buffer_size=max(size, 1), **_READING)


def events(packed: bytes) -> Iterator[Event | Misfit]:
    """The events of a stream; from where it cannot be read on, one misfit with the rest.

    An event is decoded when its end is found: what it claims of its length is not believed before.
    """
    stream = unpacker(len(packed))
    stream.feed(packed)
    start = 0

    def following() -> Iterator[tuple[Any, bytes]]:
        nonlocal start
        while start < len(packed):
            stream.skip()
            end = stream.tell()
            raw = packed[start:end]
            yield msgpack.unpackb(raw, **_READING), raw
            start = end

    try:
        yield from judged(following())
    except (ValueError, msgpack.OutOfData) as error:
        yield Misfit(f"the MessagePack cannot be read on: {error or 'it ends within a value'}", packed[start:])


def judged(entries: Iterator[tuple[Any, bytes]], group: dict[str, Any] | None = None) -> Iterator[Event | Misfit]:
    """Decoded entries with their bytes as events; the records of a group get its attributes, which `group` keeps from one
    part of a stream to the next."""
    group = {} if group is None else group
    for entry, raw in entries:
        event = _event(entry, raw)
        if isinstance(event, Event) and isinstance(event.time, EventTime):
            moment = (event.time.seconds, event.time.nanoseconds)
            if moment == _GROUP_BEGINS:
                parts = {"metadata": event.metadata, "attributes": event.record}
                group.clear()
                group.update({name: part for name, part in parts.items() if part})
                continue
            if moment == _GROUP_ENDS:
                group.clear()
                continue
            event.group = dict(group)
        yield event


def _event(entry: Any, raw: bytes) -> Event | Misfit:
    match entry:
        case [[moment, dict() as metadata], dict() as record]:
            pass
        case [moment, dict() as record]:
            metadata = {}
        case _:
            return Misfit("no Fluent event: it should be [time, record] or [[time, metadata], record]", raw)
    if isinstance(moment, bool) or not isinstance(moment, EventTime | int | float) or _is_no_number(moment):
        return Misfit("no Fluent event: its time is no EventTime and no number", raw)
    return Event(moment, record, raw, metadata)


def _is_no_number(moment: object) -> bool:
    return isinstance(moment, float) and not math.isfinite(moment)


# --- values


def to_json(record: Mapping[str, Any]) -> bytes:
    """A record as JSON text; strings that are no UTF-8 keep their bytes, so whoever reads the text can tell."""
    try:
        return msgspec.json.encode(record, enc_hook=_as_text)
    except UnicodeEncodeError:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=_as_text)
        return text.encode("utf-8", "surrogateescape")


def _object(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {name if type(name) is str else _name(name): _value(value) for name, value in pairs}


def _value(value: Any) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is dict:
        return value
    if kind is bytes:
        return _text(value)
    if kind is float:
        return value if math.isfinite(value) else str(value)
    if kind is list:
        return [_value(element) for element in value]
    return value


def _text(value: bytes) -> str:
    """Binary data as text, where it is that."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


def _name(name: Any) -> str:
    value = _value(name)
    return value if type(value) is str else json.dumps(value, ensure_ascii=False, default=_as_text)


def _extension(code: int, data: bytes) -> "EventTime | dict[str, Any]":
    if code == 0 and len(data) == _EVENT_TIME.size:
        return EventTime(*_EVENT_TIME.unpack(data))
    return {"extension": code, "data": _text(data)}


_READING: dict[str, Any] = {
    "unicode_errors": "surrogateescape",
    "object_pairs_hook": _object,
    "ext_hook": _extension,
    "strict_map_key": False,
}


def _as_text(value: object) -> str:
    if isinstance(value, EventTime):
        return str(value)
    if isinstance(value, msgpack.Timestamp):
        return str(EventTime(value.seconds, value.nanoseconds))
    raise NotImplementedError(f"no text for {type(value).__name__}")


class Lines:
    """Values of a stream into JSON text: maps as they are, events completed. One per stream, as it remembers the group."""

    def __init__(self, completion: "Completion", tag: str = "") -> None:
        self._completion = completion
        self._tag = tag
        self._group: dict[str, Any] = {}

    def of(self, values: Iterable[bytes]) -> Iterator[bytes | Misfit]:
        """Whole values, of lengths that are known to be true, as JSON text; what is no record as a misfit."""
        for raw in values:
            try:
                yield from self._of_value(msgpack.unpackb(raw, **_READING), raw)
            except (ValueError, RecursionError) as error:
                yield Misfit(f"the MessagePack cannot be read: {error or type(error).__name__}", raw)

    def _of_value(self, value: Any, raw: bytes) -> Iterator[bytes | Misfit]:
        if isinstance(value, dict):
            yield to_json(value)
            return
        # Two events in an array look like one until their ends.
        entries = (
            value if isinstance(value, list) and value and all(isinstance(one, list) for one in value) else [value]
        )
        for event in judged(((entry, raw) for entry in entries), self._group):
            yield event if isinstance(event, Misfit) else to_json(self._completion.complete(event, self._tag))


# --- what a record lacks


class Completion:
    """Gives records what they lack: from their tag, from defaults, and their event's time.

    `pattern` names fields in a tag, see `tag_pattern`. What the record has itself stays; of what only the event
    knows, tag and time go to `args`, metadata and group to `extra-fields`.
    """

    def __init__(self, rules: Rules, *, pattern: str | None = None, defaults: Mapping[str, str] | None = None) -> None:
        self._is_log = rules.record_type == "log"
        self._time_field = "time" if self._is_log else rules.time_field
        self._tag = tag_pattern(pattern) if pattern else None
        self._meaning: Callable[[str], str] = _target if self._is_log else str
        self._defaults = {self._meaning(name): value for name, value in (defaults or {}).items()}

    def complete(self, event: Event, tag: str) -> dict[str, Any]:
        """The event's record, with everything the event and its tag add to it."""
        record = event.record
        there = self._there(record)
        if self._time_field in there:
            self._keep(record, TIME, str(event.time))
        else:
            record[self._time_field] = str(event.time) if isinstance(event.time, EventTime) else event.time
        self._fill(record, there, tag)
        for name, extra in ((METADATA, event.metadata), (GROUP, event.group)):
            if extra:
                record.setdefault(name, dict(extra))
        return record

    def complete_text(self, raw: bytes, tag: str) -> bytes:
        """A record of JSON text, with what its tag adds to it; what is no object stays as it is."""
        try:
            record = members_of(raw)
        except (Rejected, RecursionError):
            return raw
        self._fill(record, self._there(record), tag)
        return msgspec.json.encode(record)

    def _there(self, record: Mapping[str, Any]) -> set[str]:
        return {self._meaning(name) for name, value in record.items() if value is not None}

    def _fill(self, record: dict[str, Any], there: set[str], tag: str) -> None:
        if tag:
            self._keep(record, TAG, tag)
        for name, value in (*self._from_tag(tag), *self._defaults.items()):
            if name not in there:
                record[name] = value
                there.add(name)

    def _from_tag(self, tag: str) -> list[tuple[str, str]]:
        found = self._tag.expression.fullmatch(tag) if self._tag else None
        if self._tag is None or found is None:
            return []
        return list(zip(map(self._meaning, self._tag.fields), found.groups(), strict=True))

    def _keep(self, record: dict[str, Any], name: str, value: str) -> None:
        """In `args` where records have them, beside the other fields where that is no map or has the name."""
        args = record.setdefault("args", {}) if self._is_log else record
        if args is None:
            args = record["args"] = {}
        (args if isinstance(args, dict) and name not in args else record).setdefault(name, value)


_PLACES = re.compile(r"\{([^{}]*)\}|(\*\*)|(\*)")


@dataclass(frozen=True, slots=True)
class TagPattern:
    """An expression over tags, and the field that each of its groups names."""

    expression: re.Pattern[str]
    fields: tuple[str, ...]


def tag_pattern(pattern: str) -> TagPattern:
    """Reads a pattern such as `kube.{business-capability}.*`.

    A name in braces takes at least one character that is no dot, `*` any number of them, `**` anything. ValueError for a
    pattern that names no field, or one twice.
    """
    expression, fields, end = "", list[str](), 0
    for place in _PLACES.finditer(pattern):
        expression += re.escape(pattern[end : place.start()])
        expression += ".*" if place[2] else "[^.]*" if place[3] else "([^.]+)"
        if place[1] is not None:
            fields.append(place[1])
        end = place.end()
    expression += re.escape(pattern[end:])
    if not fields or not all(re.fullmatch(r"\w[\w-]*", name) for name in fields):
        raise ValueError("should name fields in braces, such as kube.{business-capability}.*")
    if len(set(map(normalize_name, fields))) < len(fields):
        raise ValueError("should name each field once")
    return TagPattern(re.compile(expression, re.DOTALL), tuple(fields))


def _target(written: str) -> str:
    return _short_target(written) if len(written) <= _LONGEST_KEPT_NAME else target_name(normalize_name(written))


@lru_cache(maxsize=4096)
def _short_target(written: str) -> str:
    return target_name(normalize_name(written))
