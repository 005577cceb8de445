import pyarrow as pa
import pytest

from d2p_pipeline.records.fields import LOG_FIELDS, arrow_schema, markdown_table


def field_ids(field: pa.Field) -> list[int]:
    ids = [int(field.metadata[b"PARQUET:field_id"])] if field.metadata else []
    if pa.types.is_map(field.type):
        return [*ids, *field_ids(field.type.key_field), *field_ids(field.type.item_field)]
    if pa.types.is_list(field.type):
        return [*ids, *field_ids(field.type.value_field)]
    return ids


def test_a_log_has_the_34_fields_of_the_predecessors_in_their_order() -> None:
    names = [field.name for field in LOG_FIELDS]
    assert len(set(names)) == 34
    assert names[:5] == ["time", "level", "message", "correlation-id", "business-capability"]
    assert names[-2:] == ["ttl", "user-id"]


def test_no_alias_is_a_field_or_the_alias_of_another_field() -> None:
    names = [name for field in LOG_FIELDS for name in (field.name, *field.aliases)]
    assert len(set(names)) == len(names)


def test_every_column_and_every_nested_field_has_its_own_parquet_field_id() -> None:
    ids = [field_id for field in arrow_schema() for field_id in field_ids(field)]
    assert len(ids) == len(set(ids)) == 34 + 2 * 2 + 2


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_time_has_the_unit_that_was_asked_for(unit) -> None:
    assert arrow_schema(unit).field("time").type == pa.timestamp(unit, tz="UTC")


def test_snake_case_columns_have_no_hyphen() -> None:
    assert not [name for name in arrow_schema("us", "snake").names if "-" in name]


def test_the_documentation_lists_every_field_with_its_aliases() -> None:
    table = markdown_table()
    assert all(f"| `{field.name}` |" in table for field in LOG_FIELDS)
    assert "| `time` | timestamp, UTC | yes | `timestamp`, `when` |" in table
