import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2p_pipeline.parquet.encode import Encoding, encode
from d2p_pipeline.records.parse import parse
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.records.transform import TransformError, load, transform
from d2p_pipeline_tests.records import transforms
from d2p_pipeline_tests.records.builders import FULL, line

ROWS = parse([line(FULL), line(level="debug", args={"a": None}), line(message="third one")], Rules(), 0).table


def by(name: str) -> Rules:
    return Rules(transform=f"{transforms.__name__}:{name}")


def test_without_a_function_and_without_rows_nothing_happens() -> None:
    assert transform(ROWS, Rules()) is ROWS
    empty = ROWS.slice(0, 0)
    assert transform(empty, by("broken")) is empty


def test_values_change_and_all_else_stays_types_maps_and_field_ids_included() -> None:
    table = transform(ROWS, by("shout"))
    assert table.column("message").to_pylist() == ["PAID", "PAID", "THIRD ONE"]
    assert table.schema.equals(ROWS.schema, check_metadata=True)
    assert table.drop(["message"]).to_pylist() == ROWS.drop(["message"]).to_pylist()


def test_columns_come_and_go() -> None:
    table = transform(ROWS, by("widened"))
    file = pq.ParquetFile(pa.BufferReader(encode(table, Encoding(), {})))
    read = file.read()
    assert "ttl" not in read.column_names
    assert read.column("length").to_pylist() == [4, 4, 9]
    assert read.column("kind").to_pylist() == ["info", "debug", "info"]
    assert read.column("words").to_pylist() == [["paid"], ["paid"], ["third", "one"]]
    assert read.column("place").to_pylist() == [{"region": None, "az": None}] * 3
    assert pa.types.is_map(read.schema.field("args").type)
    assert read.column("args").to_pylist() == ROWS.column("args").to_pylist()


@pytest.mark.parametrize("name", ["without_debug", "lazily"])
def test_rows_may_be_dropped(name: str) -> None:
    assert transform(ROWS, by(name)).column("level").to_pylist() == ["info", "info"]


def test_the_same_rows_become_the_same_bytes() -> None:
    one, other = (encode(transform(ROWS, by("widened")), Encoding(), {}) for _ in range(2))
    assert one.equals(other)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doubled", "6 rows for 3"),
        ("nothing", "NoneType instead of a Polars frame"),
        ("timeless", "a frame without the column time"),
        ("textual", "the column time as String; it has to stay Datetime"),
        ("keyless", "rows without a value in business-capability"),
        ("broken", "raised ColumnNotFoundError"),
        ("ending", "raised SystemExit: 3 rows"),
        ("panicking", "raised PanicException: 3 rows"),
        ("of_objects", "Python objects in thing, which no file holds"),
        ("of_huge_integers", "columns that no file holds"),
        ("of_nothing", "columns that no file holds"),
    ],
)
def test_what_cannot_be_written_is_an_error_that_names_the_function(name: str, reason: str) -> None:
    with pytest.raises(TransformError, match=reason) as caught:
        transform(ROWS, by(name))
    assert str(caught.value).startswith(f"transform {transforms.__name__}:{name}: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        (f"{transforms.__name__}:nope", "cannot be imported: AttributeError"),
        (f"{transforms.__name__}:NO_FUNCTION", "is no function, but int"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_before_there_are_rows(name: str, reason: str) -> None:
    with pytest.raises(TransformError, match=reason):
        load(name)


def test_a_module_in_the_current_directory_is_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "local_step_of_test.py").write_text("def same(frame):\n    return frame\n")
    monkeypatch.chdir(tmp_path)
    assert transform(ROWS, Rules(transform="local_step_of_test:same")).equals(ROWS)
