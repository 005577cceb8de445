"""Large plain text: decoded first, then every line held against the bytes its row accounts for."""

import json
import tracemalloc
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2p_pipeline.records import chunk
from d2p_pipeline.records.parse import Parsed, parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.shape import Member, Shapes, shared_by
from d2p_pipeline_tests.records.builders import FULL, REQUIRED, line

PADDING = [line(FULL, message=f"padding {number}", stack_trace='at a("x")\n\tat b\\c' * 8) for number in range(250)]
"""More than the bulk path's least; with escapes."""


def in_bulk(*lines: bytes, rules: Rules | None = None) -> Parsed:
    """The lines amid padding, as one chunk of plain text."""
    return parse([b"\n".join([*PADDING[:125], *lines, *PADDING[125:]])], rules or Rules(), 0)


def one_by_one(*lines: bytes, rules: Rules | None = None) -> Parsed:
    """Each line alone, far below what is decoded in bulk."""
    parsed = {text: parse([text], rules or Rules(), 0) for text in {b"", *lines}}
    results = [parsed[text] for text in (b"", *lines)]
    return Parsed(
        pa.concat_tables([result.table for result in results]),
        [reject for result in results for reject in result.rejects],
        sum(result.lines for result in results),
        [],
    )


def assert_same(lines: list[bytes], rules: Rules | None = None) -> None:
    bulk, single = in_bulk(*lines, rules=rules), one_by_one(*lines, rules=rules)
    rows = bulk.table.num_rows - len(PADDING)
    assert bulk.table.slice(125, rows).equals(single.table)
    assert [reject.raw for reject in bulk.rejects] == [reject.raw for reject in single.rejects]
    assert [reject.reason for reject in bulk.rejects] == [reject.reason for reject in single.rejects]
    assert bulk.lines == single.lines + len(PADDING)
    kept = [text for text in lines if text not in {reject.raw for reject in bulk.rejects} and text.strip()]
    assert [bulk.raw(row) for row in range(125, 125 + rows)] == kept


UNUSUAL: list[bytes] = [
    line(FULL, unknown=1),
    line(FULL, Level="upper case"),
    line(FULL)[:-1] + b',"az":null}',
    line(FULL)[:-1] + b',"level":"twice"}',
    line(FULL)[:-1] + b',"":""}',
    line(FULL)[:-1] + b',"\\n":"\\n"}',
    json.dumps(FULL).encode(),
    json.dumps({**FULL, "unknown": "x, y: z"}).encode(),
    json.dumps(FULL, indent=1).replace("\n", "").encode(),
    json.dumps(FULL).replace('": ', '" :').encode(),
    json.dumps({**FULL, "message": "é \U0001f389 \x01"}).encode(),
    line(FULL, message="é 🎉"),
    line(FULL, message='quote " backslash \\ slash / tab \t'),
    line(FULL).replace(b"paid", b"pa\\/id"),
    line(FULL, args={"a": "1", "b": None, "c": "\n"}),
    line(FULL, args={}, tags=[], extra_fields={}),
    line(FULL)[:-1] + b',"args":{"a":"1","a":"2"}}',
    line({**REQUIRED, "args": {}})[:-2] + b'"a":"1","a":"2"}}',
    line(FULL, http_response=200),
    line(FULL, audit="true"),
    line(FULL, tags=["a", 1, {"b": 2}]),
    line(FULL, time=1_795_224_407),
    line(FULL, time="2026-03-05T14:07:08.123456789Z"),
    line(FULL, time="2026-03-05t14:07:08z"),
    line(FULL, time="2026-03-05T14:07:08+0530"),
    line(FULL, time="2026-03-05 14:07:08.5-05:30"),
    line(FULL, time="2026-03-05T14:07Z"),
    line(FULL, time="2026-03-05"),
    line(FULL, time="2026-03-05T14:07:60Z"),
    line(FULL, time="2026-02-30T14:07:00Z"),
    line(FULL, time="0000-01-01T00:00:00Z"),
    line(FULL, time="9999-12-31T23:59:59.999999Z"),
    line(FULL, level=None),
    line(FULL)[:-1] + b',"message":null}',
    line(FULL)[:-9],
    line(FULL) + line(FULL),
    line(FULL) + b" ",
    line(FULL) + b"\r",
    b"\t" + line(FULL),
    b"",
    b"   ",
    b"[]",
    b"[1]",
    b"3",
    b"null",
    b'"text"',
    b"{}",
    b"{",
    b"\xff",
    line(FULL).replace(b"paid", b"pa\xffid"),
    line(FULL).replace(b"paid", b"\\ud800"),
    line(FULL, message="nul \x00"),
    line(FULL).replace(b"paid", b"\x00"),
    b"\xef\xbb\xbf" + line(FULL),
]


@pytest.mark.parametrize("text", UNUSUAL, ids=lambda text: text[-40:].decode(errors="replace"))
def test_an_unusual_line_amid_many_is_what_it_is_alone(text: bytes) -> None:
    assert_same([text])


def test_all_unusual_lines_together_keep_their_order() -> None:
    assert_same(UNUSUAL)


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_every_unit(unit: Any) -> None:
    rules = Rules(timestamp_unit=unit, column_names="snake")
    assert_same([line(FULL, time=f"2026-03-05T14:07:08.{'123456789'[:digits]}Z") for digits in range(1, 10)], rules)


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_texts, inner, max_size=2),
    max_leaves=4,
)
_changes = st.dictionaries(
    st.sampled_from([*FULL, "az", "Az", "unknown", "msg", "extra"]) | _texts, _values, max_size=3
)
_separators = st.sampled_from([(",", ":"), (", ", ": "), (",", ": "), (" ,", " :")])


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    record = {**draw(st.sampled_from([REQUIRED, FULL])), **draw(_changes)}
    text = json.dumps(record, separators=draw(_separators), ensure_ascii=draw(st.booleans()))
    return text.encode()


@settings(max_examples=60, deadline=None)
@given(st.lists(_lines() | st.binary(max_size=6).filter(lambda text: b"\n" not in text), max_size=6))
def test_whatever_the_lines_the_number_of_bytes_never_deceives(lines: list[bytes]) -> None:
    bulk, single = in_bulk(*lines), one_by_one(*lines)
    assert bulk.table.slice(125, bulk.table.num_rows - len(PADDING)).equals(single.table)
    assert [reject.raw for reject in bulk.rejects] == [reject.raw for reject in single.rejects]
    assert bulk.lines == single.lines + len(PADDING)


def test_an_unknown_field_as_long_as_the_missing_spaces_is_not_overlooked() -> None:
    """A compact line and the spaces it lacks: an unknown field of just that many bytes must not pass for them."""
    record = line(REQUIRED)
    spaces = 2 * len(REQUIRED) - 1
    for length in range(spaces + 20):
        text = record[:-1] + b',"u":"' + b"x" * length + b'"}'
        [row] = in_bulk(text).table.to_pylist()[125:-125]
        assert dict(row["extra-fields"]) == {"u": "x" * length}


def as_dicts(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with maps as dicts: the order of entries says nothing."""
    return table.to_pylist(maps_as_pydicts="strict")


def test_short_lines_that_are_no_records_take_little_more_memory_than_their_dead_letters() -> None:
    text = b"12,abc,5\n" * 20_000
    parse([text[:100_000]], Rules(), 0)
    tracemalloc.start()
    try:
        parsed = parse([text], Rules(), 0)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(parsed.rejects) == parsed.lines == 20_000
    assert peak < 1.5 * left


SHAPES: dict[str, dict[str, Any]] = {
    "unknown": {"shoe-size": 42, "Shoe_Color": "red", "happy": True},
    "alias": {"msg": "by alias", "message": None, "LVL": "warn", "level": None},
    "spelling": {"Correlation_Id": "c-2", "correlation-id": None, "HMAC": ""},
    "scalars": {"http-response": 200, "ttl": True, "user-id": 7},
    "time by alias": {"timestamp": "2026-03-05T14:07:08.123456789Z", "time": None},
    "epoch": {"time": 1_795_224_407},
    "both": {"msg": "beside", "message": "target"},
    "fraction": {"duration": 1.5},
    "nested": {"context": {"a": 1}},
    "audit by spelling": {"Audit": True, "audit": None},
    "collision": {"user_id": "u2", "user-id": "u3", "team": "red"},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_producers_own_spelling_gives_what_each_record_gives_alone(changes: dict[str, Any]) -> None:
    merged = [{**FULL, **changes, "device-id": f"{number}" * 200} for number in range(9)]
    lines = [line({name: value for name, value in record.items() if value is not None}) for record in merged]
    odd = [line(FULL), line(FULL, unknown="another"), b'{"cut', line(FULL, level=None)]
    many = [*lines * 30, *odd, *lines * 30]
    bulk, single = parse([b"\n".join(many)], Rules(), 0), one_by_one(*many)
    assert as_dicts(bulk.table) == as_dicts(single.table)
    assert [reject.reason for reject in bulk.rejects] == [reject.reason for reject in single.rejects]
    assert bulk.raw(0) == lines[0]
    assert bulk.lines == len(many)


def test_the_same_lines_give_the_same_table() -> None:
    many = [line(FULL, unknown=number, other="x" * 300) for number in range(300)]
    first, second = (parse([b"\n".join(many)], Rules(), 0).table for _ in range(2))
    assert first.equals(second)


@pytest.mark.parametrize(
    "character", ["\U0001f389", "\U00010000", "\U00020000", "\U0002ffff", "\U0010ffff", "\\\U00020000"]
)
def test_an_escaped_character_beyond_16_bits_is_that_character(character: str) -> None:
    text = json.dumps({**FULL, "message": character}).encode()
    for result in (parse([text], Rules(), 0), in_bulk(text), parse([chunk.encode([text], 0)], Rules(), 0)):
        assert character in result.table.column("message").to_pylist()


BROKEN: dict[str, bytes] = {
    "two objects on a line and a blank line": line(FULL) + line(FULL) + b"\n",
    "two objects on a line, and one over two lines": line(FULL)
    + b" "
    + line(FULL)
    + b"\n"
    + line(FULL, message="a}NL{b").replace(b"NL", b"\n"),
    "a newline in a string and a space": line(FULL, message="aNLb").replace(b"NL", b"\n") + b" " + line(FULL),
    "an object over two lines": line(FULL).replace(b',"level"', b'\n,"level"'),
    "a tab in a string": line(FULL, message="a@b").replace(b"@", b"\t"),
    "a control character in a string": line(FULL, message="a@b").replace(b"@", b"\x01"),
    "cut after an inner object": line(FULL)[: line(FULL).index(b"}") + 1],
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("times", [1, 300])
def test_rows_never_get_out_of_step_with_their_lines(text: bytes, times: int) -> None:
    lines = b"\n".join([text, line(FULL, message="last")] * times).split(b"\n")
    bulk, single = in_bulk(*lines), one_by_one(*lines)
    assert bulk.table.slice(125, bulk.table.num_rows - len(PADDING)).equals(single.table)
    assert [(reject.raw, reject.reason) for reject in bulk.rejects] == [
        (reject.raw, reject.reason) for reject in single.rejects
    ]
    for row, raw in enumerate(b for b in lines if b not in {reject.raw for reject in bulk.rejects} and b.strip()):
        assert bulk.raw(125 + row) == raw


@pytest.mark.parametrize("written", [b"1e2", b"12E2", b"1.5e4", b"-1e2", b'"0200"', b"200", b"9223372036854775808"])
def test_a_number_in_a_string_field_keeps_its_text_amid_others(written: bytes) -> None:
    others = [line(FULL, http_response=200 + number % 2) for number in range(600)]
    odd = line(FULL, http_response="@").replace(b'"@"', written)
    assert_same([*others, odd, *others])


def test_what_was_found_out_about_other_producers_changes_no_result() -> None:
    producers = [
        [line({**FULL, **changes, "device-id": f"{number}"}) for number in range(250)] for changes in SHAPES.values()
    ]
    mixed = [one for some in zip(*producers, strict=True) for one in some]
    shapes = Shapes()
    for lines in (*producers, mixed, *reversed(producers)):
        text = b"\n".join(lines)
        known, anew = parse([text], Rules(), 0, shapes=shapes), parse([text], Rules(), 0)
        assert known.table.equals(anew.table)
        assert known.rejects == anew.rejects


def test_lines_share_a_shape_only_if_all_have_it() -> None:
    own = line(FULL, user_id="u-1", http_response=200)
    assert shared_by([own, own, own]) == (Member("http-response", "int"),)
    assert shared_by([own, own, line(FULL)]) == shared_by([line(FULL)]) == shared_by([b"no record"]) == ()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_the_lines_that_are_looked_at_first_speak_for_no_others(changes: dict[str, Any]) -> None:
    seen = line({**FULL, **changes})
    lines = [seen, *PADDING[:125], seen, *PADDING[125:], seen]
    assert parse([b"\n".join(lines)], Rules(), 0).table.equals(one_by_one(*lines).table)


def test_unknown_fields_are_in_the_order_of_their_names_however_they_were_read() -> None:
    records = [{**FULL, "zulu": "1", "Alpha": 2}, {**FULL, "Alpha": 2, "zulu": "1"}]
    many = [line(record) for record in records * 200]
    bulk = parse([b"\n".join(many)], Rules(), 0)
    assert bulk.table.equals(one_by_one(*many).table)
    assert [name for name, _ in bulk.table.column("extra-fields")[0].as_py()][-2:] == ["alpha", "zulu"]
