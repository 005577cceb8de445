import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.normalize import Normalizer
from d2p_pipeline.records.rules import Rules
from d2p_pipeline_tests.records.builders import FULL, REQUIRED, line

NORMALIZER = Normalizer(Rules())


def normalized(raw: bytes, rules: Rules | None = None) -> dict[str, Any]:
    normalizer = Normalizer(rules) if rules else NORMALIZER
    return json.loads(normalizer.canonical(raw).line)


def with_member(member: str) -> bytes:
    """A valid record that has one more member, given as JSON text."""
    return line()[:-1] + b"," + member.encode() + b"}"


def rejection(raw: bytes, rules: Rules | None = None) -> Rejected:
    with pytest.raises(Rejected) as caught:
        (Normalizer(rules) if rules else NORMALIZER).canonical(raw)
    return caught.value


# What is canonical already


@pytest.mark.parametrize("record", [REQUIRED, FULL])
def test_a_canonical_record_stays_byte_for_byte(record) -> None:
    raw = json.dumps(record).encode()
    canonical = NORMALIZER.canonical(b" " + raw + b"\r\n")
    assert canonical.line == raw
    assert canonical.key == "payments"


def test_a_record_over_several_lines_becomes_one_line() -> None:
    canonical = NORMALIZER.canonical(json.dumps(FULL, indent=2).encode()).line
    assert b"\n" not in canonical
    assert json.loads(canonical) == FULL


def test_several_key_fields_are_joined_by_colons() -> None:
    rules = Rules(key_fields=("business-capability", "region"))
    assert Normalizer(rules).canonical(line(region="eu")).key == "payments:eu"
    assert Normalizer(rules).canonical(line(Region="eu")).key == "payments:eu"


# Names


def test_names_match_in_any_case_and_with_underscores() -> None:
    record = {name.replace("-", "_").upper(): value for name, value in FULL.items()}
    assert normalized(line(record)) == FULL


@pytest.mark.parametrize(
    ("alias", "field"),
    [("lvl", "level"), ("MSG", "message"), ("log", "message"), ("elapsed", "duration"), ("elapsed_time", "duration"),
     ("error-message", "error"), ("error_msg", "error")],
)  # fmt: skip
def test_an_alias_fills_its_field(alias, field) -> None:
    record = {name: value for name, value in REQUIRED.items() if name != field} | {alias: "x"}
    assert normalized(line(record))[field] == "x"


@pytest.mark.parametrize("alias", ["timestamp", "when", "Timestamp"])
def test_time_has_aliases_too(alias) -> None:
    record = {name: value for name, value in REQUIRED.items() if name != "time"} | {alias: REQUIRED["time"]}
    assert normalized(line(record))["time"] == REQUIRED["time"]


def test_the_field_wins_over_its_alias_whose_value_is_kept() -> None:
    record = normalized(line(msg="second"))
    assert record["message"] == "paid"
    assert record["extra-fields"] == {"msg": "second"}


def test_a_null_field_leaves_its_place_to_an_alias() -> None:
    assert normalized(b'{"message":null,"msg":"m",' + line(message=None)[1:])["message"] == "m"


def test_names_that_become_equal_are_all_kept() -> None:
    record = normalized(line({**REQUIRED, "User_Id": "2", "USER-ID": "3", "user-id": "1"}))
    assert record["user-id"] == "1"
    assert record["extra-fields"] == {"user-id": "2", "USER-ID": "3"}


def test_unknown_names_that_become_equal_are_all_kept() -> None:
    record = normalized(line({**REQUIRED, "A_b": 1, "a-b": 2, "a_b": 3, "extra_fields": {"a_b": 4}}))
    assert record["extra-fields"] == {"a-b": "2", "A_b": "1", "a_b": "4", "a_b#2": "3"}


def test_a_nameless_field_is_kept() -> None:
    assert normalized(with_member('"":1'))["extra-fields"] == {"": "1"}


# Values


@pytest.mark.parametrize(
    ("value", "text"),
    [("200", "200"), ("200.0", "200.0"), ("-0", "0"), ("-0.0", "-0.0"), ("1.10", "1.10"), ("1E5", "1E5"), ("1e400", "1e400"),
     ("123456789012345678", "123456789012345678"), ("9" * 400, "9" * 400), ("true", "true"), ("false", "false"),
     ('{ "b": [1, 2.50, "x y"] }', '{"b":[1,2.50,"x y"]}'), ("[ ]", "[]"), (r'"\u00e9\u0000"', "é\0")],
)  # fmt: skip
def test_a_value_that_is_no_string_becomes_its_json_text(value, text) -> None:
    assert normalized(with_member(f'"http-response":{value}'))["http-response"] == text
    assert normalized(with_member(f'"unknown":{value}'))["extra-fields"] == {"unknown": text}
    assert normalized(with_member(f'"args":{{"a":{value}}}'))["args"] == {"a": text}
    if value[0] != "[":
        assert normalized(with_member(f'"tags":{value}'))["tags"] == [text]
    assert normalized(with_member(f'"tags":[{value}]'))["tags"] == [text]


def test_null_is_kept_where_it_tells_something() -> None:
    record = normalized(with_member('"ttl":null,"unknown":null,"args":{"a":null,"b":1},"tags":[null,1]'))
    assert "ttl" not in record
    assert record["extra-fields"] == {"unknown": None}
    assert record["args"] == {"a": None, "b": "1"}
    assert record["tags"] == [None, "1"]


@pytest.mark.parametrize(("value", "meant"), [("true", True), ("false", False), ('"true"', True), ('"False"', False)])
def test_booleans_may_come_as_strings(value, meant) -> None:
    assert normalized(with_member(f'"audit":{value}'))["audit"] is meant


@pytest.mark.parametrize("value", ["1", '"yes"', "[true]"])
def test_what_is_no_boolean_goes_to_the_extra_fields(value) -> None:
    record = normalized(with_member(f'"audit":{value}'))
    assert "audit" not in record
    assert record["extra-fields"] == {"audit": value.strip('"')}


@pytest.mark.parametrize("value", ['"text"', "1", "[1]", "true"])
@pytest.mark.parametrize("name", ["args", "extra-fields"])
def test_what_is_no_map_goes_to_the_extra_fields(name, value) -> None:
    record = normalized(with_member(f'"{name}":{value}'))
    assert "args" not in record
    assert record["extra-fields"] == {name: value.strip('"')}


def test_two_spellings_of_a_map_are_merged() -> None:
    record = normalized(line({**REQUIRED, "Args": {"a": 1, "c": 3}, "args": {"a": 2, "b": 2}}))
    assert record["args"] == {"a": "2", "b": "2", "c": "3"}
    assert record["extra-fields"] == {"a": "1"}


def test_output_given_as_input_comes_back_the_same() -> None:
    once = NORMALIZER.canonical(line({**FULL, "unknown": 1, "HMAC": "ab", "extra_fields": {"x": {"y": 1}}})).line
    assert json.loads(once)["hmac"] == "ab"
    assert NORMALIZER.canonical(once).line == once
    spelled = json.loads(once)
    spelled["HMAC"], spelled["extra_fields"] = spelled.pop("hmac"), spelled.pop("extra-fields")
    assert normalized(json.dumps(spelled).encode()) == json.loads(once)


def test_the_last_of_repeated_names_counts() -> None:
    assert normalized(with_member('"ttl":1,"ttl":2,"args":{"a":1,"a":2}')) == {
        **REQUIRED,
        "ttl": "2",
        "args": {"a": "2"},
    }


# Time


@pytest.mark.parametrize(
    "text",
    ["2026-01-02T03:04:05Z", "2026-01-02t03:04:05z", "2026-01-02 03:04:05+05:30", "2026-01-02T03:04:05-0330",
     "2026-01-02T03:04:05.1Z", "2026-01-02T03:04:05.123456789123Z", "2026-01-02T03:04:05-00:00", "0001-01-01T00:00:00Z",
     "9999-12-31T23:59:59.9999999Z", "2024-02-29T23:59:59+23:59"],
)  # fmt: skip
def test_rfc_3339_stays_as_written(text) -> None:
    assert normalized(line(time=text))["time"] == text
    assert normalized(line(time=text, unknown=1))["time"] == text


@pytest.mark.parametrize(
    ("epoch", "text"),
    [("1700000000", "2023-11-14T22:13:20Z"), ("1700000000123", "2023-11-14T22:13:20.123Z"),
     ("1700000000123456", "2023-11-14T22:13:20.123456Z"), ("1700000000123456789", "2023-11-14T22:13:20.123456789Z"),
     ("1700000000.5", "2023-11-14T22:13:20.5Z"), ("1700000000.1234567891", "2023-11-14T22:13:20.123456789Z"),
     ("1.7e9", "2023-11-14T22:13:20Z"), ("1700000000123.25", "2023-11-14T22:13:20.12325Z"),
     ("0", "1970-01-01T00:00:00Z"), ("-0.5", "1969-12-31T23:59:59.5Z"), ("-62135596800", "0001-01-01T00:00:00Z"),
     ("1e-400", "1970-01-01T00:00:00Z")],
)  # fmt: skip
def test_epoch_times_are_read_by_their_magnitude(epoch, text) -> None:
    bare = line(time=None)[:-1]
    assert json.loads(NORMALIZER.canonical(bare + f',"time":{epoch}}}'.encode()).line)["time"] == text
    assert json.loads(NORMALIZER.canonical(bare + f',"time":"{epoch}"}}'.encode()).line)["time"] == text


@pytest.mark.parametrize(
    "value",
    ["2026-01-02T03:04:05", "2026-01-02", "2026-13-02T03:04:05Z", "2026-02-30T00:00:00Z", "2026-01-02T24:00:00Z",
     "2026-01-02T23:59:60Z", "2026-01-02T03:04Z", "2026-01-02T03:04:05 UTC", "2026-01-02T03:04:05+24:00", "yesterday", "",
     "NaN", "0x10", "1 2", "٢٠٢٦-01-02T03:04:05Z", "2026-01-02T03:04:05Z\n", True, {}, [], 1e20, -99999999999, 10**400, "1e400",
     "1e999999999", "9" * 200, "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00"],
)  # fmt: skip
def test_an_unreadable_time_is_rejected_with_its_value(value) -> None:
    rejected = rejection(line(time=value))
    assert rejected.field == "time"
    assert rejected.reason.startswith("time: ")
    shown = value if isinstance(value, str) else json.dumps(value)
    assert repr(shown)[:50] in rejected.reason


@pytest.mark.parametrize("text", ["2300-01-01T00:00:00Z", "1600-01-01T00:00:00Z", "9999999999"])
def test_a_time_that_nanoseconds_cannot_tell_is_rejected_where_they_are_stored(text) -> None:
    assert normalized(line(time=text))
    assert "1678 to 2261" in rejection(line(time=text), Rules(timestamp_unit="ns")).reason


# What is required


def test_all_missing_and_null_fields_are_named() -> None:
    rejected = rejection(
        b'{"time":"2026-01-02T03:04:05Z","level":null,"message":"m","business-domain":"d","business-service":"s"}'
    )
    assert rejected.field == "level"
    assert rejected.reason == "; ".join(
        f"{name}: required, is missing or null" for name in ("level", "business-capability", "application-service")
    )


def test_an_empty_required_field_is_there() -> None:
    assert normalized(line(message=""))["message"] == ""


def test_an_empty_key_field_is_rejected() -> None:
    assert rejection(line(business_capability="")).reason == "business-capability: key field, is empty"


def test_an_optional_field_is_required_as_a_key_field() -> None:
    assert rejection(line(), Rules(key_fields=("region",))).reason == "region: required, is missing or null"


@pytest.mark.parametrize("capability", [None, ""])
def test_the_default_capability_fills_a_missing_one(capability) -> None:
    normalizer = Normalizer(Rules(default_capability="undefined"))
    assert normalizer.canonical(line(business_capability=capability)).key == "undefined"
    assert normalizer.canonical(line()).key == "payments"


# What must not be stored


def test_ignored_fields_are_dropped_wherever_they_are() -> None:
    rules = Rules(ignored_fields=frozenset({"user_id", "secret", "error"}))
    record = {
        **REQUIRED,
        "User-Id": 1,
        "secret": 2,
        "error-msg": 3,
        "args": {"SECRET": 4, "a": "5"},
        "extra-fields": {"user_id": "6"},
    }
    assert normalized(line(record), rules) == {**REQUIRED, "args": {"a": "5"}, "extra-fields": {}}


def test_masked_fields_are_starred_wherever_they_are() -> None:
    rules = Rules(masked_fields=frozenset({"user_id", "secret", "message"}))
    record = {**REQUIRED, "User-Id": 1, "user-id": 2, "secret": [3], "msg": "4", "args": {"SECRET": 5, "a": "6"}}
    masked = normalized(line(record), rules)
    assert masked == {
        **REQUIRED,
        "message": "*",
        "user-id": "*",
        "args": {"SECRET": "*", "a": "6"},
        "extra-fields": {"user-id": "*", "secret": "*", "msg": "*"},
    }


def test_masking_needs_no_other_reason_to_look_at_a_record() -> None:
    rules = Rules(masked_fields=frozenset({"user-id", "token"}))
    assert normalized(line(user_id="u"), rules)["user-id"] == "*"
    assert normalized(line(args={"Token": "t"}), rules)["args"] == {"Token": "*"}
    assert normalized(line(extra_fields={"user_id": "t"}), rules)["extra-fields"] == {"user_id": "*"}


def test_names_outside_ascii_are_masked_in_maps_too() -> None:
    assert normalized(line(args={"SCHLÜSSEL": "t"}), Rules(masked_fields=frozenset({"schlüssel"})))["args"] == {
        "SCHLÜSSEL": "*"
    }


@pytest.mark.parametrize("value", [{"a": 1, "b": None}, "text", [1]])
def test_all_values_of_a_masked_map_are_starred(value) -> None:
    rules = Rules(masked_fields=frozenset({"extra-fields", "args"}))
    record = normalized(line({**REQUIRED, "args": value, "unknown": "x"}), rules)
    starred = {**record.get("args", {}), **record["extra-fields"]}
    assert set(starred.values()) <= {"*", None}
    assert "unknown" in record["extra-fields"]


# What cannot be read


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"", "invalid JSON"), (b"{", "invalid JSON"), (line()[:-1], "byte"), (line() + line(), "trailing characters"),
     (b"[]", "no record: .*array"), (b"1", "no record: .*int"), (b"null", "no record: .*null"),
     (b'{"a":NaN}', "byte 5"), (b'{"a":01}', "byte 6"), (b'{"a":"\xff"}', r"invalid UTF-8.*byte 6"),
     (b'{"a":"\xed\xa0\x80"}', "invalid UTF-8"), (rb'{"a":"\ud800"}', "byte"), (rb'{"\ude00":1}', "byte"),
     (b'{"a":"\0"}', "byte 6"), (line() + b"\0", "trailing"),
     (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deep"),
     (b'{"a":' + b'{"b":' * 10_000 + b"1" + b"}" * 10_001, "nested too deep")],
)  # fmt: skip
def test_what_is_no_json_object_is_rejected_with_the_position(raw, reason) -> None:
    rejected = rejection(raw)
    assert rejected.field is None
    assert re.search(reason, rejected.reason)


@pytest.mark.parametrize("depth", range(880, 1001, 3))
def test_a_record_near_the_deepest_that_can_be_read_is_read_or_rejected(depth) -> None:
    with contextlib.suppress(Rejected):
        assert normalized(with_member('"a":' + "[" * depth + "]" * depth))["extra-fields"] == {
            "a": "[" * depth + "]" * depth
        }


def test_a_number_of_more_digits_than_python_reads_is_rejected() -> None:
    assert "out of range" in rejection(with_member(f'"a":{"9" * 5000}')).reason


def test_a_byte_order_mark_is_not_part_of_the_record() -> None:
    assert normalized(b"\xef\xbb\xbf" + line()) == REQUIRED


def test_a_value_of_ten_megabytes_is_a_value() -> None:
    assert len(normalized(line(message="x" * 10_000_000, unknown=1))["message"]) == 10_000_000


# Any record at all

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = (
    st.sampled_from(
        ["user-id", "User_Id", "args", "Args", "extra_fields", "audit", "tags", "msg", "hmac", "a_b", "A-b"]
    )
    | texts
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)


def leaf_texts(value: Any) -> list[str]:
    """The texts by which every value of a record must be found again; nested values by that of their own parts."""
    match value:
        case None:
            return []
        case str():
            return [value]
        case dict():
            return [text for inner in value.values() for text in leaf_texts(inner)]
        case list():
            return [text for inner in value for text in leaf_texts(inner)]
        case _:
            return [json.dumps(value)]


@given(st.dictionaries(names, values, max_size=8))
def test_every_value_of_any_record_is_found_again(extra) -> None:
    raw = json.dumps({**extra, **REQUIRED}, ensure_ascii=False).encode()
    canonical = NORMALIZER.canonical(raw)
    stored = leaf_texts(json.loads(canonical.line))
    nested = [json.loads(text) for text in stored if text[:1] in ("{", "[") and is_json(text)]
    found = sorted([*stored, *(text for value in nested for text in leaf_texts(value))])
    for text in leaf_texts({**extra, **REQUIRED}):
        # A boolean field holds "true" as true, and "True" as well.
        candidates = [text, text.lower()] if text.lower() in ("true", "false") else [text]
        match = next((candidate for candidate in candidates if candidate in found), None)
        assert match is not None, f"{text!r} is lost"
        found.remove(match)


@given(st.dictionaries(names, values, max_size=8))
def test_a_canonical_line_is_its_own_canonical_form(extra) -> None:
    canonical = NORMALIZER.canonical(json.dumps({**extra, **REQUIRED}, ensure_ascii=False).encode())
    assert NORMALIZER.canonical(canonical.line) == canonical
    assert NORMALIZER.count_canonical(canonical.line + b"\n") == 1
    kept = {name: value for name, value in json.loads(canonical.line).items() if value is not None}
    assert json.loads(NORMALIZER.rewritten_line(canonical.line)) == kept


@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_rejected_and_nothing_else(raw) -> None:
    with contextlib.suppress(Rejected):
        NORMALIZER.canonical(raw)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# Many lines at once


def test_a_block_of_canonical_lines_is_told_from_any_other() -> None:
    one = line()
    assert NORMALIZER.count_canonical((one + b"\n") * 3) == 3
    assert NORMALIZER.count_canonical(b"") == 0
    for other in (
        one,
        one + one + b"\n",
        one + b"\n\n",
        b"\n" + one,
        one[:1] + b"\n" + one[1:] + b"\n",
        one + one[:-1] + b"\n}\n",
        line(unknown=1) + b"\n",
        b"[]\n",
    ):
        assert NORMALIZER.count_canonical(other) is None, other
