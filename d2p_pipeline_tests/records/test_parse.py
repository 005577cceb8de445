import json
import sys
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import arrow_schema
from d2p_pipeline.records.normalize import Normalizer
from d2p_pipeline.records.parse import Parsed, parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline_tests.records.builders import FULL, line

RULES = Rules()
NORMALIZER = Normalizer(RULES)
NOW = 1_700_000_000_000


def parsed(*chunks: bytes, rules: Rules = RULES) -> Parsed:
    """The chunks parsed, with the books checked: each line is a row or a reject, and each row knows its line."""
    result = parse(chunks, rules, received_at=NOW, batch="b1")
    assert result.lines == result.table.num_rows + len(result.rejects)
    for row in range(result.table.num_rows):
        assert result.raw(row).strip()
    return result


def messages(result: Parsed) -> list[str]:
    return result.table.column("message").to_pylist()


def test_no_chunks_are_no_rows() -> None:
    assert parsed().table.equals(arrow_schema().empty_table())
    assert parsed(b"", b"\n \r\n").table.num_rows == 0


def test_rows_have_the_types_of_the_fields() -> None:
    row = parsed(line(FULL)).table.to_pylist(maps_as_pydicts="strict")[0]
    assert row["time"].isoformat() == "2026-03-05T14:07:08.123456+00:00"
    assert row["args"] == {"host": "h1", "empty": "", "none": None}
    assert row["tags"] == ["a", None, "b"]
    assert row["trace-ip"] == []
    assert row["audit"] is True
    assert row["region"] is None


@pytest.mark.parametrize(("unit", "digits"), [("ms", 123), ("us", 123456), ("ns", 123456789)])
def test_times_are_cut_to_the_unit_and_not_rounded(unit, digits) -> None:
    table = parsed(
        line(time="1969-12-31T23:59:59.123456789Z"),
        line(time="1970-01-01T00:00:00.123456789Z"),
        rules=Rules(timestamp_unit=unit),
    ).table
    ticks = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    assert table.column("time").cast("int64").to_pylist() == [digits - ticks, digits]


def test_snake_case_columns_hold_the_same_values() -> None:
    snake = parsed(line(FULL), rules=Rules(column_names="snake")).table
    assert snake.schema.equals(arrow_schema("us", "snake"), check_metadata=True)
    assert [list(row.values()) for row in snake.to_pylist()] == [
        list(row.values()) for row in parsed(line(FULL)).table.to_pylist()
    ]


def test_chunks_of_every_kind_keep_their_order() -> None:
    lines = [line(message=str(number)) for number in range(8)]
    result = parsed(
        lines[0],
        chunk.encode(lines[1:3], NOW),
        b"\n".join(lines[3:5]),
        zstandard.compress(lines[5]),
        line(message="6", unknown=1),
        chunk.encode(lines[7:], NOW),
    )
    assert messages(result) == [str(number) for number in range(8)]
    assert [result.raw(row) for row in (0, 2, 4, 5, 7)] == [lines[0], lines[2], lines[4], lines[5], lines[7]]
    assert result.raw(6) == line(message="6", unknown=1)


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"])
def test_line_ends_blank_lines_and_a_byte_order_mark_are_no_records(separator, start, end) -> None:
    lines = [line(message=str(number)) for number in range(3)]
    result = parsed(start + separator.join(lines) + end)
    assert messages(result) == ["0", "1", "2"]
    assert [result.raw(row).strip() for row in range(3)] == lines


# What the decoder itself refuses, and what only the check for canonical lines finds.
REFUSED_LINES = [b"nonsense", b"[]", b"1", b"null", line()[:-1], line() + line(), line() + b" " + line(), b'{"a":"\xff"}', b"\0",
                 b"{}\0", line(time="nope"), line(time="a\0b"), b"\x0b", rb'{"message":"\ud800"}']  # fmt: skip
LENIENTLY_READ_LINES = [line(time="2026-01-02"), line(level=None), line()[:-1] + b",}",
                        b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "bad"),
    [(True, bad) for bad in REFUSED_LINES] + [(False, bad) for bad in REFUSED_LINES + LENIENTLY_READ_LINES],
)
def test_a_bad_line_takes_no_neighbour_with_it(ours, bad) -> None:
    lines = [line(message="0"), bad, line(message="1"), bad, bad, line(message="2")]
    result = parsed(chunk.encode(lines, NOW + 1) if ours else b"\n".join(lines))
    assert messages(result) == ["0", "1", "2"]
    assert [result.raw(row) for row in range(3)] == [lines[0], lines[2], lines[5]]
    assert [letter.raw for letter in result.rejects] == [bad] * 3
    letter = result.rejects[0]
    assert letter.stage == "parse"
    assert letter.batch == "b1"
    assert letter.received_at == (NOW + 1 if ours else NOW)


def test_many_blocks_with_bad_lines_between_keep_order_and_books() -> None:
    lines = [b"bad" if number % 997 == 0 else line(message=f"{number} {'x' * 900}") for number in range(10_000)]
    for chunks in ([chunk.encode(lines, NOW)], [b"\n".join(lines)]):
        result = parsed(*chunks)
        assert [int(message.split()[0]) for message in messages(result)] == [n for n in range(10_000) if n % 997]
        assert result.raw(5000) == lines[5006]


def test_a_line_of_ours_that_is_not_canonical_after_all_is_normalized() -> None:
    result = parsed(chunk.encode([line(), line(time=5), line() + b"\n", line(message="last")], NOW))
    assert messages(result) == ["paid", "paid", "paid", "last"]


def test_a_time_beyond_nanoseconds_is_rejected_wherever_it_comes_from() -> None:
    far = line(time="2300-01-01T00:00:00Z")
    result = parsed(far, chunk.encode([far, line()], NOW), rules=Rules(timestamp_unit="ns"))
    assert result.table.num_rows == 1
    assert [letter.raw for letter in result.rejects] == [far, far]
    assert all("1678 to 2261" in letter.reason for letter in result.rejects)


def test_of_a_map_key_given_twice_the_last_value_counts() -> None:
    twice = line()[:-1] + b',"args":{"a":"1","b":"2","a":"3"}}'
    chunks = [line(), twice, line(args={"a": "4"})]
    for given_chunks in (chunks, [chunk.encode(chunks, NOW)]):
        result = parsed(*given_chunks)
        assert result.table.column("args").to_pylist(maps_as_pydicts="strict") == [
            None,
            {"a": "3", "b": "2"},
            {"a": "4"},
        ]
        assert result.raw(1) == twice


def test_of_a_field_given_twice_the_last_value_counts() -> None:
    assert parsed(line()[:-1] + b',"ttl":"1","ttl":"2"}').table.column("ttl").to_pylist() == ["2"]


def test_an_unreadable_chunk_is_one_dead_letter_with_its_bytes() -> None:
    broken = chunk.encode([line()], NOW)[:-3]
    result = parsed(line(), broken, line())
    assert result.table.num_rows == 2
    [letter] = result.rejects
    assert letter.raw == broken
    assert "zstd" in letter.reason


def test_a_chunk_beyond_the_limit_is_a_dead_letter() -> None:
    result = parse([chunk.encode([line()] * 100, NOW)], RULES, NOW, chunk_limit=100)
    assert "more than the 100 bytes" in result.rejects[0].reason


@pytest.mark.parametrize("ours", [True, False])
def test_a_nul_in_a_value_is_kept_and_in_a_time_rejected(ours) -> None:
    lines = [line(message="a\0b"), line(time="a\0b")]
    result = parsed(chunk.encode(lines, NOW)) if ours else parsed(*lines)
    assert messages(result) == ["a\0b"]
    assert len(result.rejects) == 1


def test_a_value_of_ten_megabytes_is_a_row() -> None:
    long = line(message="x" * 10_000_000)
    assert len(messages(parsed(long, chunk.encode([long], NOW)))[1]) == 10_000_000


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
strings = st.none() | texts
changes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "message": strings,
        "level": strings | st.integers(),
        "time": st.sampled_from(
            [
                "2026-01-02T03:04:05.9999999+05:30",
                "2026-01-02 03:04:05z",
                "nope",
                "9999-12-31T23:59:59-10:00",
                1_700_000_000,
                None,
            ]
        ),
        "args": st.dictionaries(texts, strings, max_size=3),
        "extra-fields": st.dictionaries(texts, strings, max_size=3),
        "tags": st.lists(strings, max_size=3),
        "audit": st.booleans() | st.just("true"),
        "region": strings,
        "unknown": st.integers(),
        "business-capability": st.sampled_from(["", "a", "b"]),
    },
)


@given(st.lists(changes.map(lambda changed: line({**FULL, **changed})) | st.binary(max_size=5), max_size=8))
def test_the_bulk_path_and_the_path_per_record_give_the_same_rows(lines) -> None:
    lines = [raw.replace(b"\n", b" ") for raw in lines]
    canonical: list[bytes] = []
    for raw in lines:
        try:
            canonical.append(NORMALIZER.rewritten_line(raw))
        except Rejected:
            continue
    # The blank line keeps a line with zstd's magic number from being a chunk of another kind.
    bulk = parsed(b"\n" + b"\n".join(lines))
    single = parsed(*(b"\n" + raw for raw in lines))
    assert bulk.table.equals(single.table)
    assert [letter.raw for letter in bulk.rejects] == [letter.raw for letter in single.rejects]
    ours = parsed(chunk.encode(canonical, NOW)) if canonical else parsed()
    assert bulk.table.equals(ours.table)
    assert not ours.rejects


@given(
    st.lists(
        st.sampled_from([line(), line(message="\0"), *REFUSED_LINES]),
        min_size=1,
        max_size=6,
    )
)
def test_a_chunk_of_ours_with_whatever_lines_gives_what_plain_text_gives(lines) -> None:
    ours, plain = parsed(chunk.encode(lines, NOW)), parsed(b"\n".join(lines))
    assert ours.table.equals(plain.table)
    assert [letter.raw for letter in ours.rejects] == [letter.raw for letter in plain.rejects]


def test_a_row_and_its_values_are_those_of_json() -> None:
    row = parsed(line(FULL)).table.to_pylist(maps_as_pydicts="strict")[0]
    assert {name: value for name, value in row.items() if value is not None and name != "time"} == {
        name: value for name, value in json.loads(line(FULL)).items() if name != "time"
    }


@pytest.mark.parametrize("rules", [RULES, Rules(record_type="dynamic")])
def test_a_text_is_let_go_with_what_was_made_of_it(rules) -> None:
    text = (line(FULL) + b"\n") * 5000
    holders = sys.getrefcount(text)
    table = parse([text], rules, received_at=NOW).table
    assert table.num_rows == 5000
    assert sys.getrefcount(text) == holders
