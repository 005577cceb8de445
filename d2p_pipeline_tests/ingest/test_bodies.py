"""Bodies in every form become their records, however they are cut into pieces, and nothing they hold takes the decoder down."""

import json
import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from d2p_pipeline.ingest.bodies import SNIFFED, BodyError, Packed, Raw, records, splitter
from d2p_pipeline.ingest.fluent import Completion, Misfit
from d2p_pipeline.ingest.intake import Intake, Request
from d2p_pipeline.records.rules import Rules

RULES = Rules()
EVENT_TIME = msgpack.ExtType(0, struct.pack(">II", 1_700_000_000, 123_456_789))
MOMENT = "2023-11-14T22:13:20.123456789Z"


def split(body: bytes, cuts: Iterable[int] = (), content_type: str = "") -> list[Raw]:
    """The body's records when it comes in pieces that end at `cuts`."""
    head = body[:SNIFFED]
    into = splitter(head, content_type, Completion(RULES))
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(body)}), len(body)]
    found: list[Raw] = []
    for start, end in pairwise(places):
        found.extend(into.feed(body[start:end]))
    found.extend(into.end())
    return found


def texts(found: Iterable[Raw]) -> list[Any]:
    return [one if isinstance(one, Misfit) else json.loads(one) for one in found]


def packed(*values: Any) -> bytes:
    return b"".join(msgpack.packb(value) or b"" for value in values)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text(), json_values, max_size=5)


@pytest.mark.parametrize("is_one_array", [False, True])
@given(found=st.lists(objects, max_size=6), cuts=st.lists(st.integers(1, 2000), max_size=8))
def test_maps_are_the_same_records_as_their_json(is_one_array: bool, found: list[Any], cuts: list[int]) -> None:
    body = packed(found) if is_one_array else packed(*found)
    if body:
        assert texts(split(body, cuts)) == found


@pytest.mark.parametrize("form", ["lines", "array", "logs"])
@given(found=st.lists(objects, min_size=1, max_size=6), cuts=st.lists(st.integers(1, 2000), max_size=8))
def test_json_is_the_same_records_however_it_is_cut(form: str, found: list[Any], cuts: list[int]) -> None:
    bodies = {
        "lines": "\n".join(map(json.dumps, found)),
        "array": json.dumps(found),
        "logs": json.dumps({"logs": found}),
    }
    body = bodies[form].encode()
    assert texts(split(body, cuts)) == texts(records(body)) == found


EVENTS = [
    [EVENT_TIME, {"m": "v1"}],
    [[EVENT_TIME, {}], {"m": "v2"}],
    [1_700_000_000, {"m": "integer"}],
    [1_700_000_000.5, {"m": "float"}],
    [[EVENT_TIME, {"a": 1}], {"m": "metadata"}],
    [EVENT_TIME, {"m": b"binary", "kubernetes": {"labels": {"app": b"x"}}}],
    [EVENT_TIME, {"m": "own time", "time": "2026-01-01T00:00:00Z"}],
]


@pytest.mark.parametrize("shape", ["stream", "array", "pair", "single"])
def test_fluent_events_in_both_framings_become_records_with_their_time(shape: str) -> None:
    expected = [
        {"m": "v1", "time": MOMENT},
        {"m": "v2", "time": MOMENT},
        {"m": "integer", "time": 1_700_000_000},
        {"m": "float", "time": 1_700_000_000.5},
        {"m": "metadata", "time": MOMENT, "fluent-metadata": {"a": 1}},
        {"m": "binary", "kubernetes": {"labels": {"app": "x"}}, "time": MOMENT},
        {"m": "own time", "time": "2026-01-01T00:00:00Z", "args": {"fluent-time": MOMENT}},
    ]
    events = EVENTS[:2] if shape == "pair" else EVENTS[:1] if shape == "single" else EVENTS
    body = packed(*events) if shape in ("stream", "single") else packed(events)
    for step in (1, 3, len(body)):
        assert texts(split(body, range(0, len(body), step))) == expected[: len(events)]


def test_group_markers_are_no_records_and_their_attributes_stay_with_the_group() -> None:
    begin, end = (msgpack.ExtType(0, struct.pack(">II", moment, 0)) for moment in (0xFFFFFFFF, 0xFFFFFFFE))
    body = packed([[begin, {"schema": "otlp"}], {"r": 1}], EVENTS[1], [[end, {}], {}], EVENTS[1])
    first, second = texts(split(body, range(len(body))))
    assert first["fluent-group"] == {"metadata": {"schema": "otlp"}, "attributes": {"r": 1}}
    assert "fluent-group" not in second


def test_what_is_no_event_is_a_misfit_and_spoils_no_other() -> None:
    found = split(packed({"m": 1}, "text", 17, ["no time", {}], {"m": 2}))
    assert [isinstance(one, Misfit) for one in found] == [False, True, True, True, False]


def test_text_that_is_no_utf8_keeps_its_bytes_for_the_dead_letter() -> None:
    [line] = split(b"\x81\xa1m\xa2\xff\xfe")
    assert isinstance(line, bytes)
    request = Request()
    reason = Intake(RULES, max_record_bytes=1000).take(line, request, 0)
    assert reason and "UTF-8" in reason
    assert b"\xff\xfe" in request.dead_letters["undefined"][0].raw


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\x03\xff\xff\xff" * 200,
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\x81\xa1m\xc6\xff\xff\xff\xff",
        packed({"m": 1})[:-1],
        packed([{"m": 1}] * 3)[:-1],
        b"\x81\xa1m\xc1",
    ],
)
def test_broken_or_lying_messagepack_is_refused_whole(body: bytes) -> None:
    with pytest.raises(BodyError):
        split(body, range(0, len(body), 1000))


@example(b"[" * 100_000, [])
@example(b'{"logs":[' + b"[" * 100_000, [])
@example(b'{"logs":[1],"\xff":1}', [])
@example(b'{"a":' * 100_000, [])
@given(body=st.binary(max_size=300), cuts=st.lists(st.integers(1, 300), max_size=5))
def test_any_bytes_are_records_or_refused(body: bytes, cuts: list[int]) -> None:
    intake = Intake(RULES, max_record_bytes=1 << 20)
    for content_type in ("", "application/msgpack"):
        request = Request()
        try:
            for raw in split(body, cuts, content_type):
                if not isinstance(raw, Misfit):
                    intake.take(raw, request, 0)
        except BodyError:
            continue


@given(body=st.binary(max_size=60), events=st.lists(st.sampled_from(EVENTS), max_size=3), place=st.integers(0, 200))
def test_damaged_messagepack_is_records_or_refused(body: bytes, events: list[Any], place: int) -> None:
    whole = packed(*events)
    damaged = whole[:place] + body + whole[place + len(body) :]
    into = Packed(Completion(RULES))
    try:
        for raw in [*into.feed(damaged), *into.end()]:
            assert isinstance(raw, bytes | Misfit)
    except BodyError as error:
        assert "MessagePack" in str(error)


def test_many_small_pieces_of_one_large_value_cost_no_more_than_the_value() -> None:
    body = packed({"m": "x" * 4_000_000, "n": list(range(200_000))})
    [line] = split(body, range(0, len(body), 1000))
    assert len(line if isinstance(line, bytes) else b"") > 4_000_000
