"""Events and what becomes of them: the framings, the values, and what a record gets from its event, its tag and defaults."""

import json
import math
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.ingest.fluent import Completion, Event, Misfit, events, tag_pattern, to_json
from d2p_pipeline_tests.ingest.forward_client import RECORD, SECONDS, event_time, packed, rules

GROUP_BEGINS = msgpack.ExtType(0, b"\xff\xff\xff\xff\0\0\0\0")
GROUP_ENDS = msgpack.ExtType(0, b"\xff\xff\xff\xfe\0\0\0\0")


def only(value: object) -> Event:
    [event] = events(packed(value))
    assert isinstance(event, Event), event
    return event


def completed(value: object, tag: str = "", **options: Any) -> dict[str, Any]:
    record_type = options.pop("record_type", "log")
    completion = Completion(rules(record_type=record_type), **options)
    return json.loads(to_json(completion.complete(only(value), tag)))


# --- framings and times


def test_both_framings_are_read() -> None:
    assert only([event_time(), {"a": 1}]).metadata == {}
    assert only([[event_time(), {"m": 1}], {"a": 1}]).metadata == {"m": 1}


@pytest.mark.parametrize(
    ("moment", "time"),
    [
        (event_time(), "2023-11-14T22:13:20.123456789Z"),
        (event_time(0xFFFFFFFD, 1), "2106-02-07T06:28:13.000000001Z"),
        (SECONDS, SECONDS),
        (SECONDS + 0.5, SECONDS + 0.5),
    ],
)
def test_a_record_without_time_gets_its_events(moment: object, time: object) -> None:
    assert completed([moment, {"a": 1}])["time"] == time


@pytest.mark.parametrize(
    "value",
    [
        7,
        "text",
        None,
        {},
        [],
        [SECONDS],
        [SECONDS, "no map"],
        [SECONDS, {}, {}],
        [[SECONDS], {}],
        [[SECONDS, []], {}],
        ["now", {}],
        [True, {}],
        [math.inf, {}],
        [msgpack.ExtType(1, bytes(8)), {}],
        [msgpack.ExtType(0, bytes(4)), {}],
    ],
)
def test_what_is_no_event_is_kept_and_spoils_no_other(value: object) -> None:
    good = packed([SECONDS, {"a": 1}])
    first, misfit, last = events(good + packed(value) + good)
    assert isinstance(first, Event) and isinstance(last, Event)
    assert isinstance(misfit, Misfit)
    assert misfit.raw == packed(value)


def test_where_a_stream_breaks_off_the_rest_is_kept() -> None:
    good = packed([SECONDS, {"a": 1}])
    for rest in (good[:-1], b"\xc1" + good, b"\x92\x00\x81\xc1"):
        event, misfit = events(good + rest)
        assert isinstance(event, Event)
        assert isinstance(misfit, Misfit)
        assert misfit.raw == rest


def test_what_lies_about_its_length_takes_no_memory() -> None:
    lies = (b"\xdd" + (1 << 20).to_bytes(4)) * 50 + bytes(1 << 20)
    tracemalloc.start()
    try:
        [found] = events(lies)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, Misfit)
    assert peak < 10 * len(lies)


def test_the_records_of_a_group_get_its_attributes_and_no_other_does() -> None:
    stream = [
        [SECONDS, {"n": 0}],
        [[GROUP_BEGINS, {"schema": "otlp"}], {"resource": {"service.name": "shop"}}],
        [[event_time(), {}], {"n": 1}],
        [[event_time(), {}], {"n": 2}],
        [[GROUP_ENDS, {}], {}],
        [SECONDS, {"n": 3}],
    ]
    completion = Completion(rules())
    read = [
        completion.complete(event, "") for event in events(b"".join(map(packed, stream))) if isinstance(event, Event)
    ]
    assert [record["n"] for record in read] == [0, 1, 2, 3]
    group = {"metadata": {"schema": "otlp"}, "attributes": {"resource": {"service.name": "shop"}}}
    assert [record.get("fluent-group") for record in read] == [None, group, group, None]


# --- values


def test_values_keep_what_they_are() -> None:
    values = {
        "text": "h€llo",
        "binary text": b"bytes",
        "binary": b"\xff\x00",
        "large": 2**64 - 1,
        "small": -(2**63),
        "fraction": 12.5,
        "no number": math.nan,
        "endless": [-math.inf, b"\xff"],
        "nested": {"list": [1, {"deep": [b"x"]}], "null": None},
        "moment": event_time(),
        "late moment": event_time(nanoseconds=1_123_456_789),
        "timestamp": msgpack.Timestamp(SECONDS, 123456789),
        "early timestamp": msgpack.Timestamp(-1, 0),
        "timestamp of no year": msgpack.Timestamp(2**62, 5),
        "extension": msgpack.ExtType(5, b"data"),
        7: "number as name",
        b"name": "bytes as name",
        None: "nothing as name",
    }
    assert json.loads(to_json(only([SECONDS, values]).record)) == {
        "text": "h€llo",
        "binary text": "bytes",
        "binary": "/wA=",
        "large": 2**64 - 1,
        "small": -(2**63),
        "fraction": 12.5,
        "no number": "nan",
        "endless": ["-inf", "/w=="],
        "nested": {"list": [1, {"deep": ["x"]}], "null": None},
        "moment": "2023-11-14T22:13:20.123456789Z",
        "late moment": "2023-11-14T22:13:21.123456789Z",
        "timestamp": "2023-11-14T22:13:20.123456789Z",
        "early timestamp": "1969-12-31T23:59:59.000000000Z",
        "timestamp of no year": f"{2**62}.000000005",
        "extension": {"extension": 5, "data": "data"},
        "7": "number as name",
        "name": "bytes as name",
        "null": "nothing as name",
    }


def test_a_name_that_is_a_list_or_a_map_becomes_its_text() -> None:
    data = b"\x92" + packed(SECONDS) + b"\x81" + packed([1, {"a": 2}]) + packed("value")
    [event] = events(data)
    assert isinstance(event, Event)
    assert list(event.record) == ['[1, {"a": 2}]']


def test_text_that_is_no_utf8_keeps_its_bytes() -> None:
    raw = b"caf\xe9"
    record = only([SECONDS, {"log": raw.decode("utf-8", "surrogateescape"), "at": event_time()}]).record
    assert to_json(record) == b'{"log":"' + raw + b'","at":"2023-11-14T22:13:20.123456789Z"}'


# --- completion


def test_the_records_own_time_stays_and_the_events_is_kept_beside_it() -> None:
    record = completed([event_time(), {"timestamp": "2024-01-01T00:00:00Z"}])
    assert record == {"timestamp": "2024-01-01T00:00:00Z", "args": {"fluent-time": "2023-11-14T22:13:20.123456789Z"}}


def test_the_tag_goes_to_args_and_metadata_to_a_field_of_its_own() -> None:
    record = completed([[SECONDS, {"m": 1}], {"args": {"a": "b"}}], "app.shop")
    assert record["args"] == {"a": "b", "fluent-tag": "app.shop"}
    assert record["fluent-metadata"] == {"m": 1}


@pytest.mark.parametrize("args", ["text", ["list"], {"fluent-tag": "other"}])
def test_where_args_cannot_take_the_tag_it_goes_beside_it(args: object) -> None:
    record = completed([SECONDS, {"args": args}], "app.shop")
    assert record["args"] == args
    assert record["fluent-tag"] == "app.shop"


def test_args_that_are_null_hold_the_tag() -> None:
    assert completed([SECONDS, {"args": None}], "app.shop")["args"] == {"fluent-tag": "app.shop"}


def test_missing_fields_come_from_the_tag_then_from_defaults_and_never_replace_a_value() -> None:
    record = completed(
        [SECONDS, {"Business_Service": "own", "level": None, "lvl": "WARN"}],
        "kube.shop.orders",
        pattern="kube.{business-capability}.{business-service}",
        defaults={"business_capability": "default", "Business-Domain": "default", "level": "info"},
    )
    assert record["business-capability"] == "shop"
    assert record["Business_Service"] == "own"
    assert "business-service" not in record
    assert record["business-domain"] == "default"
    assert record["level"] is None and record["lvl"] == "WARN"


def test_a_dynamic_record_keeps_its_names_and_has_no_args() -> None:
    record = completed(
        [SECONDS, {"Name": 1}],
        "a.b",
        record_type="dynamic",
        pattern="{my-key}.{my_other}",
        defaults={"Name": "n", "x": "y"},
    )
    assert record == {"Name": 1, "time": SECONDS, "fluent-tag": "a.b", "my-key": "a", "my_other": "b", "x": "y"}


@pytest.mark.parametrize(
    ("pattern", "tag", "found"),
    [
        ("kube.{business-capability}.*", "kube.shop.x", ("shop",)),
        ("kube.{business-capability}.*", "kube.shop.x.y", None),
        ("kube.{business-capability}.**", "kube.shop.x.y", ("shop",)),
        ("{a}_{b}_{c}-*.log", "pod-1_ns_app-web-0123.log", ("pod-1", "ns", "app-web")),
        ("a+b.{x}", "a+b.1", ("1",)),
        ("a+b.{x}", "aab.1", None),
        ("{x}.end", ".end", None),
    ],
)
def test_a_tag_pattern_takes_what_is_between_dots(pattern: str, tag: str, found: tuple[str, ...] | None) -> None:
    match = tag_pattern(pattern).expression.fullmatch(tag)
    assert (match and match.groups()) == found


@pytest.mark.parametrize("pattern", ["", "kube.*", "{}", "{a b}", "{a}.{A}", "{a-b}.{a_b}"])
def test_a_tag_pattern_that_names_no_field_or_one_twice_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="should name"):
        tag_pattern(pattern)


# --- anything at all

_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
_extensions = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
_anything = st.recursive(
    _scalars | _extensions,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_to_their_end_or_kept(data: bytes) -> None:
    for event in events(data):
        if isinstance(event, Event):
            to_json(event.record)
        else:
            assert event.raw and event.raw in data


@given(st.lists(_anything, max_size=6), st.integers(0, 40))
def test_of_any_values_nothing_goes_missing(values: list[Any], cut: int) -> None:
    data = b"".join(map(packed, values))
    read = list(events(data))
    assert b"".join(event.raw for event in read) == data
    assert len(read) == len(values)
    for event in events(data[:-cut] if cut else data):
        assert isinstance(event, Event | Misfit)


@given(st.dictionaries(st.text(), _anything, max_size=5), st.text())
def test_any_record_completed_is_json_with_everything_it_had(record: dict[str, Any], tag: str) -> None:
    before = json.loads(to_json(only([SECONDS, record]).record))
    completion = Completion(rules(), pattern="{business-capability}.**", defaults={"level": "info"})
    after = json.loads(to_json(completion.complete(only([SECONDS, record]), tag)))
    assert {name: after[name] for name, value in before.items() if value is not None and name != "args"} == {
        name: value for name, value in before.items() if value is not None and name != "args"
    }
    if isinstance(before.get("args"), dict):
        assert before["args"].items() <= after["args"].items()


def test_a_complete_record_is_accepted() -> None:
    assert set(completed([SECONDS, RECORD], "t")) == {*RECORD, "time", "args"}
