import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records.fields import arrow_schema
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.validate import validate
from d2p_pipeline_tests.records.builders import REQUIRED, line


def table(*rows: dict, rules: Rules | None = None) -> pa.Table:
    rules = rules or Rules()
    schema = arrow_schema(rules.timestamp_unit, rules.column_names)
    good = {**REQUIRED, "time": 0}
    return pa.Table.from_pylist([{**good, **row} for row in rows], schema=schema)


def test_good_rows_pass_uncopied() -> None:
    rows = table({}, {"message": ""})
    split = validate(rows, Rules())
    assert split.good is rows
    assert split.bad == []


def test_no_rows_are_good_rows() -> None:
    assert validate(table(), Rules()).good.num_rows == 0


def test_every_reason_of_a_bad_row_is_told_and_good_rows_keep_their_order() -> None:
    split = validate(
        table({"message": "0"}, {"level": None, "business-capability": ""}, {"message": "2"}, {"time": None}), Rules()
    )
    assert split.good.column("message").to_pylist() == ["0", "2"]
    assert split.bad == [
        (1, "level: required, is missing or null; business-capability: key field, is empty"),
        (3, "time: required, is missing or null"),
    ]
    assert split.good.schema.equals(arrow_schema(), check_metadata=True)
    assert validate(split.good, Rules()).bad == []


def test_thousands_of_bad_rows_are_all_found() -> None:
    split = validate(table(*({"message": None if number % 2 else "m"} for number in range(5000))), Rules())
    assert split.good.num_rows == 2500
    assert [row for row, _ in split.bad] == list(range(1, 5000, 2))


@pytest.mark.parametrize("time", [-62_135_596_800_000_001, 253_402_300_800_000_000])
def test_a_time_outside_the_calendar_is_rejected(time) -> None:
    assert validate(table({"time": time}), Rules()).bad == [(0, "time: lies outside the years that can be stored")]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_what_the_normalizer_takes_for_the_first_and_the_last_time_is_good(unit) -> None:
    rules = Rules(timestamp_unit=unit)
    years = (1678, 2261) if unit == "ns" else (1, 9999)
    lines = [line(time=f"{years[0]:04}-01-01T00:00:00Z"), line(time=f"{years[1]}-12-31T23:59:59.999999999Z")]
    parsed = parse([b"\n".join(lines)], rules, 0)
    assert parsed.table.num_rows == 2
    assert validate(parsed.table, rules).bad == []


def test_a_key_field_that_is_optional_otherwise_must_be_there() -> None:
    rules = Rules(key_fields=("region", "az"), column_names="snake")
    good = {name.replace("-", "_"): value for name, value in REQUIRED.items()} | {"time": 0}
    rows = pa.Table.from_pylist(
        [{**good, "region": "eu"}, {**good, "region": "", "az": "a"}], schema=arrow_schema("us", "snake")
    )
    assert validate(rows, rules).bad == [(0, "az: required, is missing or null"), (1, "region: key field, is empty")]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("style", ["kebab", "snake"])
def test_what_parse_makes_has_the_types_that_are_validated(unit, style) -> None:
    rules = Rules(timestamp_unit=unit, column_names=style)
    assert validate(parse([line()], rules, 0).table, rules).bad == []


def test_another_table_is_refused_as_a_whole() -> None:
    with pytest.raises(TypeError, match="schema"):
        validate(table().set_column(1, "level", pa.array([], pa.int64())), Rules())


_rows = st.lists(
    st.fixed_dictionaries(
        {
            "message": st.sampled_from(["m", "", None]),
            "business-capability": st.sampled_from(["k", "k", "", None]),
            "time": st.sampled_from([0, 0, None, 253_402_300_800_000_000]),
        }
    ),
    max_size=6,
)


@given(_rows)
def test_exactly_the_rows_that_break_a_rule_are_rejected(rows: list[dict]) -> None:
    def is_bad(row: dict) -> bool:
        return row["message"] is None or not row["business-capability"] or row["time"] != 0

    split = validate(table(*rows), Rules())
    assert [number for number, _ in split.bad] == [number for number, row in enumerate(rows) if is_bad(row)]
    assert split.good.num_rows == len(rows) - len(split.bad)


def test_sound_rows_do_not_pay_for_what_explains_bad_ones() -> None:
    script = """
import sys
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.validate import validate
from d2p_pipeline_tests.records.builders import line
assert validate(parse([line()], Rules(), 0).table, Rules()).bad == []
assert "pandera" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
