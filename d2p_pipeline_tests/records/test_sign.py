import hashlib
import hmac
import json
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.parquet.encode import Encoding, encode
from d2p_pipeline.records import chunk
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.sign import canonical_json, sign
from d2p_pipeline_tests.records.builders import FULL, REQUIRED, line

KEY = b"the key"
RULES = Rules(hmac_key=KEY)


def signed(*lines: bytes, rules: Rules = RULES) -> pa.Table:
    parsed = parse(lines, rules, 0)
    assert not parsed.rejects
    return sign(parsed.table, rules)


def digests(table: pa.Table) -> list[str]:
    return table.column("hmac").to_pylist()


def test_the_canonical_json_is_that_of_the_documentation() -> None:
    [text] = canonical_json(signed(line(FULL, message='a"b\\c\nü\x01', tags=["a", None])))
    expected = {
        **{name: value for name, value in FULL.items() if value is not None},
        "message": 'a"b\\c\nü\x01',
        "tags": ["a", None],
        "time": "2026-03-05 14:07:08.123456+00:00",
    }
    assert text.decode() == json.dumps(expected, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def test_the_digest_is_hmac_sha256() -> None:
    table = signed(line())
    [text] = canonical_json(table)
    assert digests(table) == [hmac.new(KEY, text, hashlib.sha256).hexdigest()]


def test_without_a_key_nothing_is_signed() -> None:
    table = parse([line(hmac="mine")], Rules(), 0).table
    assert sign(table, Rules()) is table
    assert digests(table) == ["mine"]


def test_the_schema_stays_as_it_is() -> None:
    table = signed(line())
    assert table.schema.equals(parse([], RULES, 0).table.schema, check_metadata=True)


def test_the_order_in_maps_and_of_columns_makes_no_difference() -> None:
    one, other = signed(line(args={"a": "1", "b": "2"}), line(args={"b": "2", "a": "1"})), signed(line(args={"b": "3"}))
    assert digests(one)[0] == digests(one)[1] != digests(other)[0]
    assert list(canonical_json(one.select(one.column_names[::-1]))) == list(canonical_json(one))


def test_null_and_absent_are_the_same_and_empty_is_not() -> None:
    null, absent, empty = digests(signed(line()[:-1] + b',"args":null}', line(), line(args={})))
    assert null == absent != empty


def test_kebab_and_snake_columns_have_the_same_canonical_json() -> None:
    assert digests(signed(line(FULL))) == digests(signed(line(FULL), rules=Rules(hmac_key=KEY, column_names="snake")))


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("style", ["kebab", "snake"])
def test_it_can_be_rebuilt_from_a_file(unit: Any, style: Any) -> None:
    rules = Rules(hmac_key=KEY, timestamp_unit=unit, column_names=style)
    table = signed(
        line(FULL), line(time="1969-12-31T23:59:59.123456789Z"), line(args={}, tags=[]), line(ttl=""), rules=rules
    )
    read = pq.read_table(pa.BufferReader(encode(table, Encoding(), {})))
    assert digests(sign(read, rules)) == digests(table)


@pytest.mark.parametrize("ours", [True, False])
def test_a_hmac_that_a_record_brings_is_kept_beside_the_computed_one(ours: bool) -> None:
    raw = [line(hmac="theirs"), line(HMAC=5), line(extra_fields={"hmac": "inner"})]
    # A chunk that was received before the column was computed holds it as a field of its own.
    table = signed(*([chunk.encode([raw[0], *raw[2:]], 0)] if ours else raw))
    extras = [extra["hmac"] for extra in table.column("extra-fields").to_pylist(maps_as_pydicts="strict")]
    assert extras == (["theirs", "inner"] if ours else ["theirs", "5", "inner"])
    assert all(len(text) == 64 for text in digests(table))


def test_columns_of_a_transform_are_signed_too_with_times_of_every_depth_as_text() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)
    frame = pl.DataFrame(
        {"at": [[moment]], "in": [{"day": moment.date(), "n": 1.5}], "user_id": ["a"], "user-id": ["b"]}
    )
    assert list(canonical_json(frame.to_arrow())) == [
        b'{"at":["2026-01-02 03:04:05.678900+00:00"],"in":{"day":"2026-01-02","n":1.5},"user-id":"b","user_id":"a"}'
    ]


def test_many_rows_are_signed_each_by_itself() -> None:
    lines = [line(message=str(number)) for number in range(5000)]
    together = digests(signed(chunk.encode(lines, 0)))
    assert len(set(together)) == 5000
    assert together[4999] == digests(signed(lines[4999]))[0]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
records = st.fixed_dictionaries(
    {},
    optional={
        "message": texts,
        "args": st.dictionaries(texts, st.none() | texts, max_size=3),
        "tags": st.lists(st.none() | texts, max_size=3),
        "audit": st.booleans(),
        "region": texts,
    },
)


@given(records, records)
def test_records_have_the_same_digest_exactly_if_they_are_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = digests(signed(line(REQUIRED | one), line(REQUIRED | other)))
    assert (first == second) == (REQUIRED | one == REQUIRED | other)
