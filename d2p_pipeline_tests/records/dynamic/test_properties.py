"""Any schema and any record: nothing is lost, nothing that breaks the schema becomes a row, and the bytes are the same."""

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from d2p_pipeline.parquet.encode import Encoding, encode, split
from d2p_pipeline.records import chunk
from d2p_pipeline.records.parse import Parsed, parse
from d2p_pipeline.records.rules import Rules

NOW = 1_700_000_000_123
INFERRED = Rules(record_type="dynamic", key_fields=("k",))


def rows(result: Parsed) -> list[dict[str, Any]]:
    return result.table.to_pylist(maps_as_pydicts="strict")


def files(lines: list[bytes], rules: Rules) -> list[bytes]:
    table = parse([b"\n".join(lines)], rules, NOW).table
    return [encode(piece, Encoding(), {}).to_pybytes() for _, _, piece in split(table, rules)]


# Without a schema

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
names = st.sampled_from(["a", "b", "A", "c_d", "e.f", "extra-fields", "hmac"]) | texts
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
)
anything = st.dictionaries(names.filter(lambda name: name not in ("k", "time")), values, max_size=4)


def leaves(value: Any) -> list[str]:
    """The values in a record or a row, numbers as exact numbers, JSON text by what it holds."""
    match value:
        case None:
            return []
        case dict():
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        case list():
            return [leaf for inner in value for leaf in leaves(inner)]
        case bool():
            return [str(value).lower()]
        case str():
            try:
                held = json.loads(value, parse_float=Decimal)
            except (ValueError, InvalidOperation):
                return [value]
            return [value] if isinstance(held, str) else leaves(held)
        case datetime():
            return []
        case _:
            return [str(Decimal(str(value)).normalize() + 0)]


@given(st.lists(anything, min_size=1, max_size=6), st.booleans())
def test_every_value_of_any_records_is_found_in_their_rows(records: list[dict[str, Any]], ours: bool) -> None:
    lines = [json.dumps({"k": "key", **record}, ensure_ascii=False).encode() for record in records]
    result = parse([chunk.encode(lines, NOW)] if ours else lines, INFERRED, NOW)
    assert not result.rejects
    for record, row in zip(records, rows(result), strict=True):
        assert sorted(leaves(row)) == sorted(["key", *leaves(record)])
    assert files(lines, INFERRED) == files(lines, INFERRED)


@given(st.lists(anything, min_size=1, max_size=4))
@settings(max_examples=30)
def test_what_is_written_is_read_by_everybody(records: list[dict[str, Any]]) -> None:
    lines = [json.dumps({"k": "key", **record}).encode() for record in records]
    for data in files(lines, INFERRED):
        table = pq.read_table(pa.BufferReader(data))
        assert table.num_rows == len(records)
        assert pl.read_parquet(data).height == len(records)
        assert duckdb.from_arrow(table).count("*").fetchall() == [(len(records),)]


# With a schema


@dataclass(frozen=True)
class Typed:
    """A schema, records of it, what they are stored as, and values that break it."""

    schema: dict[str, Any]
    values: st.SearchStrategy[tuple[Any, Any]]
    wrong: st.SearchStrategy[Any]


def same(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    return strategy.map(lambda value: (value, value))


moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))
LEAVES = [
    Typed({"type": "string", "maxLength": 4}, same(texts), st.just("too long") | st.integers() | st.just([])),
    Typed({"type": "integer"}, same(st.integers(-(2**63), 2**63 - 1)), st.just(2**63) | st.just(1.5) | st.just("1")),
    Typed(
        {"type": "integer", "minimum": 0, "multipleOf": 2},
        st.integers(0, 50).map(lambda n: (float(2 * n) if n % 3 else 2 * n, 2 * n)),
        st.sampled_from([-2, 3, True]),
    ),
    Typed({"type": "number"}, same(st.floats(allow_nan=False, allow_infinity=False)), st.sampled_from(["1", True, {}])),
    Typed({"type": "boolean"}, same(st.booleans()), st.sampled_from(["true", 0, [True]])),
    Typed({"enum": ["x", "y"]}, same(st.sampled_from("xy")), st.sampled_from(["z", 1])),
    Typed(
        {"type": "string", "format": "date-time"},
        moments.map(lambda moment: (moment.isoformat(), moment)),
        st.sampled_from(["soon", "2026-02-30T00:00:00Z", "2026-01-01", 5]),
    ),
    Typed(
        {"type": "string", "format": "date"},
        st.dates(date(1, 1, 1)).map(lambda day: (day.isoformat(), day)),
        st.sampled_from(["2026-02-30", "today", 20260101]),
    ),
    Typed({"type": "string", "pattern": "^[a-c]+$"}, same(st.text("abc", min_size=1)), st.sampled_from(["d", "a\n"])),
]


def nullable(inner: Typed) -> Typed:
    schema = {"anyOf": [inner.schema, {"type": "null"}]}
    return Typed(schema, st.just((None, None)) | inner.values, inner.wrong.filter(lambda value: value is not None))


def array(inner: Typed) -> Typed:
    pairs = st.lists(inner.values, max_size=3).map(lambda some: ([v for v, _ in some], [s for _, s in some]))
    return Typed({"type": "array", "items": inner.schema}, pairs, inner.wrong.map(lambda value: [value]) | st.just("x"))


@st.composite
def one_of_object(draw: st.DrawFn, members: dict[str, Typed], required: frozenset[str]) -> tuple[Any, Any]:
    given_names = [name for name in members if name in required or draw(st.booleans())]
    pairs = {name: draw(members[name].values) for name in given_names}
    stored = {name: pairs[name][1] if name in pairs else None for name in members}
    return {name: pair[0] for name, pair in pairs.items()}, stored


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    members = draw(st.dictionaries(st.sampled_from(["p", "q_r", "s-t", "u v"]), inner, min_size=1, max_size=3))
    required = draw(st.frozensets(st.sampled_from(sorted(members))))
    schema = {
        "type": "object",
        "properties": {name: member.schema for name, member in members.items()},
        "required": sorted(required),
        "additionalProperties": False,
    }
    return Typed(schema, one_of_object(members, required), st.sampled_from([{"unknown": 1}, [], 5]))


leaf = st.sampled_from(LEAVES)
types = st.recursive(
    leaf | leaf.map(nullable), lambda inner: objects(inner) | inner.map(array) | leaf.map(nullable), max_leaves=4
)


@given(st.data())
@settings(max_examples=40)
def test_a_valid_record_is_a_row_and_an_invalid_one_a_dead_letter_that_names_the_place(data: st.DataObject) -> None:
    members = data.draw(st.dictionaries(st.sampled_from(["x", "Y_z", "a b"]), types, min_size=1, max_size=3))
    key = {"type": "string"}
    schema = {"type": "object", "properties": {"k": key, **{name: typed.schema for name, typed in members.items()}}}
    rules = Rules(record_type="dynamic", key_fields=("k",), json_schema=json.dumps(schema))
    drawn = data.draw(st.lists(one_of_object(members, frozenset()), max_size=4))
    broken = data.draw(st.sampled_from(sorted(members)))
    wrong = {"k": "key", broken: data.draw(members[broken].wrong)}
    lines = [json.dumps({"k": "key", **record}).encode() for record, _ in drawn]
    lines.insert(len(lines) // 2, json.dumps(wrong).encode())
    result = parse([b"\n".join(lines)], rules, NOW)
    [letter] = result.rejects
    assert letter.raw == json.dumps(wrong).encode()
    assert letter.reason.startswith(broken), letter.reason
    found = [{name: row[name] for name in members} for row in rows(result)]
    assert found == [{name: stored[name] for name in members} for _, stored in drawn]
    assert files(lines, rules) == files(lines, rules)
    good = [line for line in lines if line != letter.raw]
    if good:
        ours = parse([chunk.encode(good, NOW)], rules, NOW)
        assert ours.table.equals(result.table)
