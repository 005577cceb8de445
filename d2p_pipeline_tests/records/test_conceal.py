import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records import chunk
from d2p_pipeline.records.conceal import conceal
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline_tests.records.builders import FULL, REQUIRED, line

RULES = Rules(ignored_fields=frozenset({"token"}), masked_fields=frozenset({"user_id", "message", "password"}))
SECRET = "s3cret"


def concealed(record: dict[str, Any] | str, rules: Rules = RULES) -> Any:
    text = record if isinstance(record, str) else json.dumps(record)
    return json.loads(conceal(text.encode(), rules))


def test_where_nothing_is_hidden_the_text_is_untouched() -> None:
    raw = b' { "user-id" : "u" } '
    assert conceal(raw, Rules()) is raw


def test_hidden_fields_are_found_in_every_spelling_and_under_every_alias() -> None:
    assert concealed({"User_ID": "u", "msg": "m", "LOG": 5, "PassWord": [1], "TOKEN": "t", "level": "info"}) == {
        "User_ID": "*",
        "msg": "*",
        "LOG": "*",
        "PassWord": "*",
        "level": "info",
    }


def test_entries_of_the_maps_are_hidden_and_nested_values_elsewhere_are_not() -> None:
    inner = {"token": "t", "password": "p", "other": {"password": "kept"}}
    assert concealed({"args": inner, "Extra_Fields": inner, "unknown": inner}) == {
        "args": {"password": "*", "other": {"password": "kept"}},
        "Extra_Fields": {"password": "*", "other": {"password": "kept"}},
        "unknown": inner,
    }


def test_a_masked_map_keeps_its_names_and_a_hidden_extra_fields_hides_what_is_unknown() -> None:
    masked = Rules(masked_fields=frozenset({"args", "extra-fields"}))
    assert concealed({"args": {"a": 1, "b": None}, "unknown": "u", "level": "info"}, masked) == {
        "args": {"a": "*", "b": None},
        "unknown": "*",
        "level": "info",
    }
    assert concealed({"args": "text"}, masked) == {"args": "*"}
    assert concealed({"args": [{"a": 1}]}, masked) == {"args": "*"}
    dropped = Rules(ignored_fields=frozenset({"args", "extra-fields"}))
    assert concealed({"args": {"a": 1}, "unknown": "u", "level": "info"}, dropped) == {"level": "info"}


def test_null_stays_null_and_every_repetition_is_hidden() -> None:
    assert concealed({"user-id": None}) == {"user-id": None}
    assert conceal(b'{"user-id":"a","user-id":"b"}', RULES) == b'{"user-id":"*","user-id":"*"}'


def test_a_name_written_with_escapes_is_the_same_name() -> None:
    assert conceal(rb'{"us\u0065r-id":"a\"b"}', RULES) == rb'{"us\u0065r-id":"*"}'


def test_other_values_stay_as_they_were_written() -> None:
    raw = rb'{"a": 1.50e+3 ,"b":"\u00fc\/", "c":[ 1,{"x":"}]"} ],"token":1}'
    assert conceal(raw, RULES) == rb'{"a": 1.50e+3,"b":"\u00fc\/","c":[ 1,{"x":"}]"} ]}'


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (b'{"user-id":"s3cret","level":', b'{"user-id":"*","level":'),
        (b'{"level":"info","msg" : "s3cret', b'{"level":"info","msg" : "*"'),
        (b'{"msg":"s3\\"cret"', b'{"msg":"*"'),
        (b'[{"User_Id":["s3cret",{"a":"]s3cret"}],"b":1}]', b'[{"User_Id":"*","b":1}]'),
        (b'{"args":{"password":"s3cret', b'{"args":{"password":"*"'),
        (b'{"password":{"a":"s3cret"', b'{"password":"*"'),
        (b'{"token":s3cret,"b":2', b'{"token":"*","b":2'),
        (b"", b""),
        (b"\xff\x00", b"\xff\x00"),
    ],
)
def test_in_text_that_is_no_object_what_looks_like_a_hidden_field_is_masked(raw: bytes, left: bytes) -> None:
    assert conceal(raw, RULES) == left


names = st.sampled_from(
    ["user-id", "User_Id", "msg", "MESSAGE", "log", "password", "Token", "level", "x", "args", "audit", "tags"]
)
secrets = st.sampled_from([SECRET, [SECRET], {"deep": SECRET}])
plain = st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def records(draw: st.DrawFn, depth: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name in draw(st.lists(names, max_size=6)):
        hidden = name.lower().replace("_", "-") in ("user-id", "msg", "message", "log", "password", "token")
        if name == "args" and not depth:
            record[name] = draw(records(depth=1))
        else:
            record[name] = draw(secrets if hidden else plain)
    return record


@given(records(), st.booleans(), st.booleans())
def test_no_hidden_value_survives_in_any_dead_letter(record: dict[str, Any], ours: bool, indented: bool) -> None:
    bad = json.dumps({**record, "time": "no time"}, indent="\t" if indented else None).replace("\n", "\r").encode()
    empty_key = line(FULL, business_capability="", user_id=SECRET)
    lines = [bad, empty_key]
    result = parse([chunk.encode(lines, 0)] if ours else lines, RULES, 0)
    assert result.table.num_rows == 0
    for letter in result.rejects:
        assert SECRET.encode() not in letter.to_json()
    kept = json.loads(result.rejects[0].raw)
    visible = {name for name in record if name in ("level", "x", "audit", "tags")}
    assert {name: kept[name] for name in visible} == {name: record[name] for name in visible}


def test_a_dead_letter_says_the_same_of_what_is_not_hidden() -> None:
    [letter] = parse([line(REQUIRED, time="soon", password=SECRET)], RULES, 0).rejects
    assert json.loads(letter.raw) == REQUIRED | {"time": "soon", "message": "*", "password": "*"}


def test_in_dynamic_records_names_are_hidden_at_every_depth_and_paths_where_they_lie() -> None:
    rules = Rules(
        record_type="dynamic",
        key_fields=("k",),
        ignored_fields=frozenset({"token"}),
        masked_fields=frozenset({"User-Id", "customer.name"}),
    )
    record = {
        "user_id": 1,
        "name": "kept",
        "customer": {"name": "n", "USER-ID": None, "list": [[{"Token": 1, "user_id": {"a": 1}}], 2, []]},
        "customer.name": "n",
    }
    assert concealed(record, rules) == {
        "user_id": "*",
        "name": "kept",
        "customer": {"name": "*", "USER-ID": None, "list": [[{"user_id": "*"}], 2, []]},
        "customer.name": "*",
    }
    assert conceal(b'{"customer": {"Name": "cut', rules) == b'{"customer": {"Name": "*"'
