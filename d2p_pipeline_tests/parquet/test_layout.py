import re
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2p_pipeline.parquet.layout import (
    EMPTY,
    capability_prefix,
    component,
    escape,
    file_name,
    file_path,
    partition_path,
    unescape,
)

HOUR = datetime(2026, 3, 5, 7, tzinfo=UTC)
texts = st.text(st.characters(exclude_categories=["Cs"]))


def test_a_path_names_capability_and_hour() -> None:
    assert partition_path("payments", HOUR) == "capability=payments/year=2026/month=03/day=05/hour=07"
    assert partition_path("p", datetime(1, 1, 1, tzinfo=UTC)).endswith("year=0001/month=01/day=01/hour=00")


def test_a_file_is_named_by_batch_unit_and_hash() -> None:
    assert file_name("01J", 2) == "01J-2.parquet"
    assert file_path("p", HOUR, "01J", 0, b"data").endswith("/01J-0-8d777f385d3dfec8815d20f7496026dc.parquet")
    assert file_path("p", HOUR, "01J", 0).endswith("/hour=07/01J-0.parquet")


@pytest.mark.parametrize("batch_id", ["", "../x", "a/b", ".hidden", "_hidden", "a\n"])
def test_a_batch_id_that_could_lead_elsewhere_is_refused(batch_id) -> None:
    with pytest.raises(ValueError, match="batch id"):
        file_name(batch_id, 0)


@pytest.mark.parametrize(
    ("value", "escaped"),
    [("a b", "a b"), ("a/b", "a%2Fb"), ("a=b:c", "a%3Db%3Ac"), ("100%", "100%25"), ("..", "%2E%2E"), ("a..", "a.."), ("", EMPTY),
     ("\n\0", "%0A%00"), ("zahlung-ü🎉", "zahlung-ü🎉"), ("{x}", "%7Bx}")],
)  # fmt: skip
def test_values_are_escaped_as_hive_does(value, escaped) -> None:
    assert escape(value) == escaped


@given(texts | st.just(EMPTY))
def test_escaping_can_be_undone(value) -> None:
    assert unescape(escape(value)) == value


@given(texts | st.text("./%é🎉", min_size=60, max_size=400))
def test_a_key_is_one_component_that_every_filesystem_takes(key) -> None:
    prefix = capability_prefix(key)
    assert len(PurePosixPath(prefix).parts) == 1
    assert len(prefix.encode()) <= 255
    assert prefix.startswith("capability=")
    assert not re.search(r"[\x00-\x1f\x7f]", prefix)
    unescape(prefix)


def test_long_keys_that_differ_in_their_end_have_different_directories() -> None:
    one, other = capability_prefix("x" * 500), capability_prefix("x" * 499 + "y")
    assert one != other
    assert one == capability_prefix("x" * 500)


def test_shortening_cuts_no_escape_in_two() -> None:
    for length in range(60, 90):
        shortened = component("k", "a" * length + "/" * 200)
        assert unescape(shortened).rpartition("~")[0].strip("/").strip("ka=") == ""


NASTY = [
    "plain",
    "a/b",
    "..",
    ".",
    "two words",
    "a:b=c",
    "100%",
    "%2F",
    "日本 🎉",
    "a,b",
    "new\nline",
    "{}",
    "[x]*?",
    "a'b\"c",
    "x\\y",
    "#",
    "+",
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lake")
    for key in NASTY:
        target = root / file_path(key, HOUR, "b", 0)
        target.parent.mkdir(parents=True)
        pq.write_table(pa.table({"key": [key]}), target)
    return root


def test_duckdb_reads_the_keys_back(lake) -> None:
    rows = duckdb.execute(
        f"SELECT key, capability, year, hour FROM read_parquet('{lake}/**/*.parquet', hive_partitioning = true)"
    ).fetchall()
    assert sorted(rows) == sorted((key, key, 2026, "07") for key in NASTY)


def test_polars_reads_the_keys_back(lake) -> None:
    rows = (
        pl.scan_parquet(f"{lake}/**/*.parquet", hive_partitioning=True)
        .select("key", "capability", "month")
        .collect()
        .rows()
    )
    assert sorted(rows) == sorted((key, key, 3) for key in NASTY)


def test_pyarrow_reads_the_keys_back(lake) -> None:
    rows = ds.dataset(lake, partitioning="hive").to_table(columns=["key", "capability"]).to_pylist()
    assert sorted(row["capability"] for row in rows) == sorted(NASTY)
    assert all(row["key"] == row["capability"] for row in rows)


@settings(max_examples=30)
@given(texts)
def test_a_key_makes_a_directory_below_the_root_and_nothing_else(tmp_path_factory, key) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / partition_path(key, HOUR)).mkdir(parents=True)
    assert len(list(root.iterdir())) == 1
    assert len(list(root.parent.glob(root.name))) == 1
