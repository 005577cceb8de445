from datetime import UTC, datetime

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.parquet.encode import Encoding, encode, split
from d2p_pipeline.records.fields import LOG_FIELDS
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline_tests.records.builders import FULL, line

RULES = Rules()


def table(*lines: bytes, rules: Rules = RULES) -> pa.Table:
    parsed = parse(lines, rules, 0)
    assert not parsed.rejects
    return parsed.table


def messages(piece: pa.Table) -> list[str]:
    return piece.column("message").to_pylist()


# Splitting


def test_rows_are_parted_by_key_and_hour_in_order() -> None:
    rows = table(
        line(message="0", time="2026-01-02T03:59:59Z"),
        line(message="1", time="2026-01-02T04:00:00Z"),
        line(message="2", time="2026-01-02T03:30:00+01:00"),
        line(message="3", time="2026-01-02T03:00:00Z", business_capability="other"),
        line(message="4", time="2026-01-02T03:00:00Z"),
    )
    parts = [(key, hour.isoformat(), messages(piece)) for key, hour, piece in split(rows, RULES)]
    assert parts == [
        ("payments", "2026-01-02T03:00:00+00:00", ["0", "4"]),
        ("payments", "2026-01-02T04:00:00+00:00", ["1"]),
        ("payments", "2026-01-02T02:00:00+00:00", ["2"]),
        ("other", "2026-01-02T03:00:00+00:00", ["3"]),
    ]


def test_one_partition_is_not_copied() -> None:
    rows = table(line(message="0"), line(message="1"))
    [(_, _, piece)] = split(rows, RULES)
    assert piece.equals(rows)
    before, after = (t.column("message").chunk(0).buffers()[2].address for t in (rows, piece))
    assert before == after


def test_ingest_time_puts_all_rows_of_a_key_into_one_hour() -> None:
    rows = table(line(), line(time="2020-01-01T00:00:00Z"))
    [(_, hour, piece)] = split(rows, RULES, ingested_at=1_700_000_000_000)
    assert hour == datetime(2023, 11, 14, 22, tzinfo=UTC)
    assert piece.num_rows == 2


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_hours_before_1970_are_right_too(unit) -> None:
    rules = Rules(timestamp_unit=unit)
    [(_, hour, _)] = split(table(line(time="1969-12-31T23:59:59.5Z"), rules=rules), rules)
    assert hour == datetime(1969, 12, 31, 23, tzinfo=UTC)


def test_the_whole_calendar_has_hours() -> None:
    hours = [
        hour for _, hour, _ in split(table(line(time="0001-01-01T00:00:00Z"), line(time="9999-12-31T23:59:59Z")), RULES)
    ]
    assert hours == [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, tzinfo=UTC)]


def test_several_key_fields_and_snake_case_columns_make_the_key() -> None:
    rules = Rules(key_fields=("business-capability", "level"), column_names="snake")
    assert [key for key, _, _ in split(table(line(), line(level="warn"), rules=rules), rules)] == [
        "payments:info",
        "payments:warn",
    ]


def test_no_rows_have_no_partitions() -> None:
    assert split(table(), RULES) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=30))
def test_no_row_is_lost_or_doubled(rows) -> None:
    lines = [
        line(message=str(number), business_capability=key, time=f"2026-01-01T0{hour}:00:00Z")
        for number, (key, hour) in enumerate(rows)
    ]
    parts = split(table(*lines), RULES)
    assert len({(key, hour) for key, hour, _ in parts}) == len(parts)
    assert sorted(int(m) for _, _, piece in parts for m in messages(piece)) == list(range(len(rows)))
    for key, hour, piece in parts:
        numbers = [int(m) for m in messages(piece)]
        assert numbers == sorted(numbers)
        assert all(rows[number] == (key, hour.hour) for number in numbers)


# Encoding


@pytest.fixture
def rows() -> pa.Table:
    return table(line(FULL), line(message="ü🎉\0"), line({**FULL, "message": "3", "args": {}, "tags": []}))


@pytest.fixture
def path(rows, tmp_path):
    file = tmp_path / "file.parquet"
    file.write_bytes(encode(rows, Encoding(), {"d2p.batch": "b1"}))
    return file


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_every_compression_comes_back_the_same(rows, compression) -> None:
    read = pq.read_table(pa.BufferReader(encode(rows, Encoding(compression), {})))
    assert read.column_names == rows.column_names
    assert read.to_pylist() == rows.to_pylist()
    codec = (
        pq.ParquetFile(pa.BufferReader(encode(rows, Encoding(compression), {})))
        .metadata.row_group(0)
        .column(2)
        .compression
    )
    assert codec == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_the_same_rows_are_the_same_bytes(rows) -> None:
    again = table(line(FULL), line(message="ü🎉\0"), line({**FULL, "message": "3", "args": {}, "tags": []}))
    assert encode(rows, Encoding(), {"a": "b"}).equals(encode(again, Encoding(), {"a": "b"}))


def test_polars_reads_the_rows(rows, path) -> None:
    frame = pl.read_parquet(path)
    assert frame["message"].to_list() == rows.column("message").to_pylist()
    assert frame["time"].dtype == pl.Datetime("us", "UTC")
    assert frame["tags"].to_list() == rows.column("tags").to_pylist()


def test_duckdb_reads_the_rows_and_looks_into_maps(path) -> None:
    read = duckdb.execute(
        f"""SELECT time::VARCHAR, args['host'], "extra-fields"['team'], tags[1], audit FROM '{path}'"""
    ).fetchall()
    assert [row[1:] for row in read] == [
        ("h1", "blue", "a", True),
        (None, None, None, None),
        (None, "blue", None, True),
    ]


def test_the_footer_carries_the_metadata_and_no_arrow_schema(path) -> None:
    assert pq.ParquetFile(path).metadata.metadata == {b"d2p.batch": b"b1"}


def test_every_field_has_its_own_id_and_maps_hold_utf8(path) -> None:
    fields = duckdb.execute(
        f"SELECT name, field_id, converted_type FROM parquet_schema('{path}') WHERE field_id IS NOT NULL"
    ).fetchall()
    ids = [field_id for _, field_id, _ in fields]
    assert len(set(ids)) == len(ids) == 40
    assert {name: field_id for name, field_id, _ in fields if field_id <= 34} == {
        field.name: position for position, field in enumerate(LOG_FIELDS, start=1)
    }
    assert {kind for name, _, kind in fields if name in ("key", "value", "element")} == {"UTF8"}


def test_columns_have_statistics_and_a_page_index(path) -> None:
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.statistics.has_min_max
    assert column.has_column_index
    assert column.has_offset_index


def test_row_groups_are_bounded_in_bytes_even_with_uneven_rows() -> None:
    rows = table(*(line(message="x" * (40_000 if number % 50 == 0 else 10)) for number in range(500)))
    limit = 100_000
    file = pq.ParquetFile(pa.BufferReader(encode(rows, Encoding(row_group_bytes=limit), {})))
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    assert sum(group.num_rows for group in groups) == 500
    assert len(groups) > 4
    assert all(group.nbytes <= limit * 1.1 for group in groups)


def test_a_row_larger_than_a_row_group_has_its_own() -> None:
    rows = table(line(message="x" * 10_000), line(message="y" * 10_000))
    assert pq.ParquetFile(pa.BufferReader(encode(rows, Encoding(row_group_bytes=1024), {}))).num_row_groups == 2


def test_no_rows_make_a_file_all_the_same() -> None:
    assert pq.read_table(pa.BufferReader(encode(table(), Encoding(), {}))).num_rows == 0
