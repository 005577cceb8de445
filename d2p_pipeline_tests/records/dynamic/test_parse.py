import json
from datetime import UTC, datetime
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2p_pipeline.parquet.encode import Encoding, encode, split
from d2p_pipeline.records import chunk
from d2p_pipeline.records.parse import Parsed, parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.sign import sign
from d2p_pipeline.records.transform import transform
from d2p_pipeline.records.validate import validate

NOW = 1_700_000_000_123
RECEIVED = datetime.fromtimestamp(NOW / 1000, UTC)
INFERRED = Rules(record_type="dynamic", key_fields=("k",))


def by_schema(
    properties: dict[str, Any], additional: Any = False, required: tuple[str, ...] = (), **options: Any
) -> Rules:
    schema = {
        "type": "object",
        "properties": {"k": {"type": "string"}, **properties},
        "additionalProperties": additional,
        "required": list(required),
    }
    return Rules(record_type="dynamic", json_schema=json.dumps(schema), **{"key_fields": ("k",), **options})


def line(**fields: Any) -> bytes:
    return json.dumps({"k": "a", **fields}).encode()


def parsed(*chunks: bytes, rules: Rules = INFERRED) -> Parsed:
    """The chunks parsed, with the books checked, and the same result when they come as one chunk of ours."""
    result = parse(chunks, rules, received_at=NOW, batch="B1")
    assert result.lines == result.table.num_rows + len(result.rejects)
    assert validate(result.table, rules).good is result.table
    return result


def values(result: Parsed, name: str) -> list[Any]:
    return result.table.column(name).to_pylist(maps_as_pydicts="strict")


def inferred(*some: Any) -> list[Any]:
    return values(parsed(*(line(x=value) for value in some)), "x")


# Without a schema


@pytest.mark.parametrize(
    ("some", "stored"),
    [
        ([1, 2], [1, 2]),
        ([1, 1.5], [1.0, 1.5]),
        ([1, "a", 2.5], ["1", "a", "2.5"]),
        ([True, 1], ["true", "1"]),
        ([None, True], [None, True]),
        ([None], [None]),
        ([{"a": 1}, {"b": "x"}], [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ([{"a": 1}, "s"], ['{"a":1}', "s"]),
        ([{"a": 1.50}, [1]], ['{"a":1.5}', "[1]"]),
        ([[1, 2], [1.5], []], [[1.0, 2.0], [1.5], []]),
        ([[1, "a"], [2]], ['[1,"a"]', "[2]"]),
        ([[{"a": 1}], [{"a": "b"}]], [[{"a": "1"}], [{"a": "b"}]]),
        ([[[1]], [["a"]]], ["[[1]]", '[["a"]]']),
        ([{}, {}], ["{}", "{}"]),
        ([[], []], [[], []]),
        ([2**53 + 1, 1], [2**53 + 1, 1]),
        ([2**53 + 1, 1.5], [str(2**53 + 1), "1.5"]),
        ([2**63, 1], [str(2**63), "1"]),
        (["2026-01-01T00:00:00Z", None], ["2026-01-01T00:00:00Z", None]),
    ],
)
def test_columns_are_widened_until_they_hold_every_record(some: list[Any], stored: list[Any]) -> None:
    assert inferred(*some) == stored
    assert inferred(*reversed(some)) == stored[::-1]
    # Enough records that most are only tried against the types of the first ones.
    assert inferred(*([some[0]] * 500), *some) == [*([stored[0]] * 500), *stored]


def test_names_are_untouched_and_columns_come_in_the_order_of_their_appearance() -> None:
    result = parsed(line(Zeta=1, a_b=2), line(**{"a-b": 3, "x.y": 4, "日": 5}))
    assert result.table.column_names == ["time", "k", "Zeta", "a_b", "a-b", "x.y", "日"]


def test_what_is_too_wide_or_too_deep_for_columns_is_kept_all_the_same() -> None:
    deep: Any = 1
    for _ in range(30):
        deep = {"d": deep}
    result = parsed(line(wide={f"id{number}": number for number in range(1500)}, deep=deep))
    wide = values(result, "wide")[0]
    assert wide["id999"] == 999
    assert wide["extra-fields"] == {f"id{number}": str(number) for number in range(1000, 1500)}
    assert '{"d":1}' in json.dumps(values(result, "deep")[0]).replace("\\", "")


def test_names_that_cannot_be_columns_go_to_extra_fields() -> None:
    result = parsed(line(**{"a\0b": 1, "extra-fields": {"x": 2.50}}), line(**{"extra-fields": "text"}))
    assert values(result, "extra-fields") == [{"a\0b": "1", "x": "2.5"}, {"extra-fields": "text"}]


# Time and key


def test_the_time_is_that_of_the_record_or_of_its_reception() -> None:
    result = parsed(
        line(time="2026-01-02T03:04:05+01:00"),
        line(time=1_700_000_000),
        line(time=None),
        chunk.encode([line()], NOW + 5),
    )
    assert values(result, "time") == [
        datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC),
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
        RECEIVED,
        datetime.fromtimestamp((NOW + 5) / 1000, UTC),
    ]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("time", ["soon", "2026-02-30T00:00:00Z", "2026-01-01T00:00:00", {"a": 1}, True])
def test_an_unreadable_time_is_a_dead_letter_and_no_guess(ours: bool, time: Any) -> None:
    for rules in (INFERRED, by_schema({"time": {}}, additional=True)):
        lines = [line(time=time), line()]
        result = parsed(*([chunk.encode(lines, NOW)] if ours else lines), rules=rules)
        [letter] = result.rejects
        assert letter.reason.startswith("time: ")
        assert letter.raw == lines[0]
        assert result.table.num_rows == 1


@pytest.mark.parametrize("rules", [INFERRED, by_schema({}, additional=True)])
def test_a_record_without_a_key_is_a_dead_letter(rules: Rules) -> None:
    result = parsed(line(), b"{}", line(k=None), line(k=""), line(k={"a": 1}), rules=rules)
    assert [letter.reason.partition(",")[0] for letter in result.rejects] == ["k: key field"] * 4
    assert result.table.num_rows == 1


def test_a_default_capability_fills_the_key() -> None:
    for rules in (INFERRED, by_schema({})):
        filled = Rules(
            record_type="dynamic", key_fields=("k",), default_capability="other", json_schema=rules.json_schema
        )
        result = parsed(b"{}", line(), b'{"k":null}', b'{"k":""}', rules=filled)
        assert values(result, "k") == ["other", "a", "other", "other"]


def test_keys_lie_at_names_or_paths_and_may_be_numbers() -> None:
    rules = Rules(record_type="dynamic", key_fields=("user.id", "Region"))
    result = parsed(
        b'{"user":{"id":5},"Region":"eu"}',
        b'{"user.id":"x","Region":true}',
        b'{"user":{"id":"5"},"Region":"eu"}',
        rules=rules,
    )
    assert [key for key, _, _ in split(result.table, rules)] == ["5:eu", "x:true"]


# With a schema

PROPERTIES = {
    "n": {"type": ["integer", "null"], "minimum": 3},
    "when": {"type": "string", "format": "date-time"},
    "day": {"type": "string", "format": "date"},
    "who": {
        "properties": {"name": {"type": "string", "maxLength": 3}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "tags": {"type": "array", "items": {"type": "string"}},
    "labels": {"type": "object", "additionalProperties": {"type": "number"}},
}


def test_values_get_the_types_of_the_schema() -> None:
    record = {
        "n": 3.0,
        "when": "2026-01-02T03:04:05.678+01:00",
        "day": "2026-01-02",
        "who": {"name": "ann"},
        "tags": ["a"],
        "labels": {"x": 1, "y": 2.5},
    }
    [row] = parsed(line(**record), rules=by_schema(PROPERTIES)).table.to_pylist(maps_as_pydicts="strict")
    assert row == {
        "k": "a",
        "n": 3,
        "when": datetime(2026, 1, 2, 2, 4, 5, 678000, UTC),
        "day": datetime(2026, 1, 2).date(),
        "who": {"name": "ann"},
        "tags": ["a"],
        "labels": {"x": 1.0, "y": 2.5},
        "time": RECEIVED,
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n: 2 is less than the minimum of 3 (schema: properties/n/minimum)"),
        ({"n": 2**64}, "n: does not fit into 64 bits"),
        ({"n": "5"}, "n: "),
        ({"when": "2026-02-30T00:00:00Z"}, 'when: "2026-02-30T00:00:00Z" is not a "date-time"'),
        ({"day": "x"}, 'day: "x" is not a "date"'),
        ({"who": {"name": "long"}}, 'who.name: "long" is longer than 3 characters'),
        ({"who": {}}, 'who: "name" is a required property'),
        ({"who": {"name": "a", "b": 1}}, "who: Additional properties are not allowed ('b' was unexpected)"),
        ({"tags": ["a", 5]}, 'tags[1]: 5 is not of type "string"'),
        ({"labels": {"x": "y"}}, 'labels.x: "y" is not of type "number"'),
        ({"other": 1}, "the record: Additional properties are not allowed ('other' was unexpected)"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_record_against_the_schema_is_a_dead_letter_that_names_place_and_rule(
    fields: dict[str, Any], reason: str, ours: bool
) -> None:
    lines = [line(n=5), line(**fields), line(n=6)]
    result = parsed(*([b"\n".join(lines)]), rules=by_schema(PROPERTIES))
    assert values(result, "n") == [5, 6]
    [letter] = result.rejects
    assert letter.reason.startswith(reason)
    assert letter.raw == lines[1]
    assert letter.batch == "B1"


def test_a_number_that_no_validator_reads_is_said_to_be_one() -> None:
    [letter] = parsed(b'{"k": "a", "n": 1e400}', rules=by_schema(PROPERTIES)).rejects
    assert letter.reason == "a number is beyond those of 64-bit floats"


def test_unknown_fields_of_an_open_schema_are_kept() -> None:
    result = parsed(
        line(n=5, a=1.50, b=None, c=[1]), line(**{"extra-fields": {"x": "1"}}), rules=by_schema(PROPERTIES, True)
    )
    assert values(result, "extra-fields") == [{"a": "1.5", "b": None, "c": "[1]"}, {"x": "1"}]
    typed = parsed(line(a=1), rules=by_schema({}, {"type": "integer"}))
    assert values(typed, "extra-fields") == [{"a": 1}]


def test_of_a_name_given_twice_the_last_value_counts() -> None:
    raw = b'{"k":"a","labels":{"x":1,"x":2},"n":4,"n":5}'
    [row] = parsed(raw, rules=by_schema(PROPERTIES)).table.to_pylist(maps_as_pydicts="strict")
    assert (row["labels"], row["n"]) == ({"x": 2.0}, 5)


def test_a_line_received_under_another_schema_loses_nothing() -> None:
    older = chunk.encode([line(old=1, n=5)], NOW)
    assert values(parsed(older, rules=by_schema(PROPERTIES, True)), "extra-fields") == [{"old": "1"}]
    assert "'old' was unexpected" in parsed(older, rules=by_schema(PROPERTIES)).rejects[0].reason


# With the other settings


@pytest.mark.parametrize("schema", [True, False])
def test_hidden_fields_are_gone_at_every_depth_and_in_dead_letters(schema: bool) -> None:
    options: Any = {"ignored_fields": frozenset({"token"}), "masked_fields": frozenset({"Pass_Word", "who.mail"})}
    properties = {
        "who": {
            "properties": {"mail": {"type": "string", "format": "email"}, "token": {}},
            "required": ["mail", "token"],
        },
        "pass_word": {"type": "integer"},
        "n": {"type": "integer"},
    }
    rules = by_schema(properties, **options) if schema else Rules(record_type="dynamic", key_fields=("k",), **options)
    good = line(pass_word=5, who={"mail": "s3cret", "token": "s3cret", "more": {"pass-word": "s3cret"}})
    bad = line(pass_word="s3cret", time="nope", who={"mail": "s3cret", "token": 1}, n="x")
    result = parsed(good, bad, chunk.encode([good], NOW), rules=rules)
    assert "s3cret" not in str(result.table.to_pylist())
    assert values(result, "pass_word") == ["*", "*"]
    assert [who["mail"] for who in values(result, "who")] == ["*", "*"]
    assert b"s3cret" not in b"".join(letter.to_json() for letter in result.rejects)
    assert len(result.rejects) == 1


@pytest.mark.parametrize("rules", [INFERRED, by_schema(PROPERTIES, True)])
def test_files_are_split_signed_and_read_back_by_everybody(rules: Rules, tmp_path: Any) -> None:
    rules = Rules(record_type="dynamic", key_fields=("k",), json_schema=rules.json_schema, hmac_key=b"key")
    lines = [
        line(n=5, who={"name": "ann"}, tags=["a"], labels={"x": 1}, hmac="mine"),
        line(n=6, time="2026-01-01T00:00:00Z"),
    ]
    table = sign(transform(parsed(*lines, rules=rules).table, rules), rules)
    parts = split(table, rules)
    assert [(key, hour.year, piece.num_rows) for key, hour, piece in parts] == [("a", 2023, 1), ("a", 2026, 1)]
    data = encode(parts[0][2], Encoding(), {})
    again = encode(split(sign(parsed(*lines, rules=rules).table, rules), rules)[0][2], Encoding(), {})
    assert data.equals(again)
    path = tmp_path / "f.parquet"
    path.write_bytes(data)
    [row] = pq.read_table(pa.BufferReader(data)).to_pylist(maps_as_pydicts="strict")
    assert row["extra-fields"] == {"hmac": "mine"}
    assert len(row["hmac"]) == 64
    assert sign(pq.read_table(pa.BufferReader(data)), rules).column("hmac").to_pylist() == [row["hmac"]]
    assert pl.read_parquet(path)["n"].to_list() == [5]
    assert duckdb.execute(f"SELECT n, who.name, tags[1], labels['x'] FROM '{path}'").fetchall() == [(5, "ann", "a", 1)]


@pytest.mark.parametrize("rules", [INFERRED, by_schema(PROPERTIES)])
def test_chunks_without_any_record_have_no_partitions(rules: Rules) -> None:
    for chunks in ((), (b"\n",), (b"{}", b"[]")):
        assert split(parsed(*chunks, rules=rules).table, rules) == []
