import json
from datetime import UTC, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from d2p_pipeline.cli.app import app
from d2p_pipeline.parquet.encode import Encoding, encode
from d2p_pipeline.parquet.layout import file_path
from d2p_pipeline.parquet.verify import verify
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.sign import sign
from d2p_pipeline_tests.records.builders import FULL, line

KEY = b"key"
METADATA = {"d2p.batch": "B1", "d2p.unit": "0", "d2p.key": "k", "d2p.schema_version": "1", "d2p.software": "s"}


def rows(rules: Rules | None = None) -> pa.Table:
    rules = rules or Rules(hmac_key=KEY)
    lines = [line(FULL, message=f"message {number}") for number in range(20)]
    return sign(parse(lines, rules, 0).table, rules)


def put(root: Path, table: pa.Table, *, hashed: bool = False, batch: str = "B1") -> Path:
    data = encode(table, Encoding(row_group_bytes=2000), {**METADATA, "d2p.batch": batch})
    path = root / file_path("k", datetime(2026, 1, 1, tzinfo=UTC), "B1", 0, data if hashed else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run(*arguments: str | Path, key: str | None = "key") -> Result:
    environment = {"D2P_HMAC_KEY": key, "D2P_CONFIG": None}
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env=environment)


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("style", ["kebab", "snake"])
@pytest.mark.parametrize("hashed", [True, False])
def test_files_as_they_were_written_pass(tmp_path: Path, unit: Any, style: Any, hashed: bool) -> None:
    put(tmp_path, rows(Rules(hmac_key=KEY, timestamp_unit=unit, column_names=style)), hashed=hashed)
    result = run(tmp_path, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["ok"], document["hmac_checked"]) == (True, True)
    [report] = document["files"]
    assert (report["rows"], report["good"], report["bad"], report["missing"]) == (20, 20, 0, 0)


def test_whatever_columns_a_transform_adds_pass(tmp_path: Path) -> None:
    added: dict[str, Any] = {
        "nan": pa.array([float("nan")] * 20),
        "nothing": pa.nulls(20),
        "took": pa.array([1_500_000] * 20, pa.duration("us")),
        "raw": pa.array([b"\xff"] * 20),
        "price": pa.array([Decimal("1.50")] * 20),
        "at": pa.array([time(10, 30)] * 20),
    }
    table = parse([line(FULL)] * 20, Rules(), 0).table
    for name, column in added.items():
        table = table.append_column(name, column)
    report = verify(put(tmp_path, sign(table, Rules(hmac_key=KEY))), KEY)
    assert (report.good, report.problems) == (20, [])


def test_a_changed_cell_is_found_and_its_row_named(tmp_path: Path) -> None:
    table = rows()
    position = table.schema.get_field_index("message")
    messages = table.column("message").to_pylist()
    messages[13] = "forged"
    path = put(tmp_path, table.set_column(position, table.schema.field(position), pa.array(messages)))
    result = run(path)
    assert result.exit_code == 1
    assert f"{path}: 1 rows have a wrong HMAC, 0 have none" in result.stdout
    assert "first of these rows: 13" in result.stdout
    assert "HMAC: 19 good, 1 bad, 0 missing" in result.stdout


def test_another_key_fits_no_row(tmp_path: Path) -> None:
    report = verify(put(tmp_path, rows()), b"another key")
    assert (report.good, report.bad, report.bad_rows) == (0, 20, list(range(10)))


def test_rows_that_were_never_signed_are_missing_their_hmac(tmp_path: Path) -> None:
    path = put(tmp_path, rows(Rules()))
    assert verify(path, KEY).missing == 20
    result = run(path, key=None)
    assert result.exit_code == 0
    assert "HMAC not checked: there is no hmac_key" in result.stdout


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_byte_that_changed_is_found_by_the_md5_in_the_name(tmp_path: Path, data: st.DataObject) -> None:
    path = put(tmp_path, rows(Rules()), hashed=True)
    text = bytearray(path.read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)
    assert any("MD5" in problem for problem in verify(path).problems)


def test_a_byte_that_changed_in_a_page_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = put(tmp_path, rows(Rules()))
    text = path.read_bytes()
    at = text.index(b"message 7")
    path.write_bytes(text[:at] + b"n" + text[at + 1 :])
    [problem] = verify(path).problems
    assert "CRC" in problem


@pytest.mark.parametrize("cut", [0, 3, 100, -5])
def test_a_file_that_is_cut_off_cannot_be_read(tmp_path: Path, cut: int) -> None:
    path = put(tmp_path, rows())
    path.write_bytes(path.read_bytes()[:cut])
    assert "cannot be read" in verify(path, KEY).problems[0]


def test_a_footer_that_says_something_else_is_a_problem(tmp_path: Path) -> None:
    moved = put(tmp_path, rows(), batch="B2")
    assert verify(moved).problems == ["its name is not that of B2-0, which its footer names"]
    moved.write_bytes(encode(rows(), Encoding(), {"d2p.batch": "B1"}))
    assert verify(moved).problems == ["its footer lacks d2p.unit, d2p.key, d2p.schema_version, d2p.software"]


def test_nothing_to_check_is_a_usage_error(tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 2
    assert run(tmp_path / "nowhere").exit_code == 2
