import json
from typing import Any

import pyarrow as pa
import pytest

from d2p_pipeline.records.dynamic.columns import arrow_schema
from d2p_pipeline.records.dynamic.schema import SchemaError, compiled
from d2p_pipeline.records.rules import Rules

KEY: dict[str, Any] = {"k": {"type": "string"}}


def rules(schema: Any, **options: Any) -> Rules:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Rules(record_type="dynamic", json_schema=text, **{"key_fields": ("k",), **options})


def columns(properties: dict[str, Any], **schema: Any) -> dict[str, pa.DataType]:
    document = {"type": "object", "properties": KEY | properties, "additionalProperties": False, **schema}
    found = arrow_schema(compiled(rules(document)).columns, "us")
    return {field.name: field.type for field in found if field.name not in ("k", "time")}


STRING = pa.string()
OPEN = pa.map_(STRING, STRING)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, STRING),
        ({"type": ["string", "null"], "pattern": "^a+$", "minLength": 1}, STRING),
        ({"type": "integer", "minimum": 0}, pa.int64()),
        ({"type": "number"}, pa.float64()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"type": "null"}, STRING),
        ({"type": "string", "format": "date-time"}, pa.timestamp("us", "UTC")),
        ({"format": "date"}, pa.date32()),
        ({"type": "string", "format": "uuid"}, STRING),
        ({"enum": ["a", "b", None]}, STRING),
        ({"enum": [1, 2]}, pa.int64()),
        ({"const": True}, pa.bool_()),
        ({}, STRING),
        (True, STRING),
        ({"type": ["string", "integer"]}, STRING),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(pa.field("element", pa.int64()))),
        ({"type": "array"}, pa.list_(pa.field("element", STRING))),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/id"}]}, STRING),
        ({"$ref": "#/$defs/id", "description": "who"}, STRING),
        ({"$ref": "#/$defs/a~1b"}, pa.float64()),
        ({"$ref": "#/$defs/more/anyOf/0"}, pa.bool_()),
        ({"$ref": "#/$defs/%69d"}, STRING),
        ({"type": "string", "anyOf": [{"minLength": 3}, {"maxLength": 1}], "not": {"const": "x"}}, STRING),
        ({"type": "object"}, OPEN),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, pa.map_(STRING, pa.int64())),
        ({"type": "object", "additionalProperties": {"type": "array"}}, OPEN),
        ({"type": "object", "additionalProperties": False}, STRING),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
            pa.struct({"a": pa.int64()}),
        ),
        ({"properties": {"a": {"type": "integer"}}}, pa.struct({"a": pa.int64(), "extra-fields": OPEN})),
    ],
)
def test_a_property_becomes_a_column(schema: Any, expected: pa.DataType) -> None:
    defs = {"id": {"type": "string", "format": "uuid"}, "a/b": {"type": "number"}}
    more = {"anyOf": [{"type": "boolean"}]}
    assert columns({"x": schema}, **{"$defs": {**defs, "more": more}}) == {"x": expected}


def test_names_and_their_order_are_kept_as_they_are() -> None:
    assert list(columns({"Zeta_Name": {}, "a-b": {}, "user.id": {}, "日本": {}})) == [
        "Zeta_Name",
        "a-b",
        "user.id",
        "日本",
    ]


def test_there_is_a_time_column_whatever_is_declared() -> None:
    for declared in ({}, {"time": {"type": "integer"}}, {"time": {"type": "string", "format": "date-time"}}):
        schema = compiled(rules({"type": "object", "properties": KEY | declared})).columns
        assert arrow_schema(schema, "ms").field("time").type == pa.timestamp("ms", "UTC")


@pytest.mark.parametrize(
    ("schema", "pointer", "reason"),
    [
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, "/properties/x/oneOf", "different types"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "/properties/x/anyOf", "different types"),
        ({"type": "string", "oneOf": [{"type": "string"}]}, "/properties/x/oneOf", "beside other descriptions"),
        ({"type": ["object", "string"]}, "/properties/x/type", "a column holds one type"),
        ({"$ref": "https://example.org/s"}, "/properties/x/$ref", "not in this document"),
        ({"$ref": "#/$defs/nope"}, "/properties/x/$ref", "is not there"),
        ({"$ref": "#/required/-1"}, "/properties/x/$ref", "is not there"),
        ({"$ref": "#/required/0"}, "/required/0", "is not of types"),
        ({"$ref": "#/x/odd"}, "/x/odd/type", "strange"),
        ({"not": {"$ref": "https://example.org/s"}}, "", "not in this document"),
        ({"pattern": "("}, "/properties/x/pattern", "is not a"),
        ({"$ref": "#/$defs/tree"}, "/$defs/tree/properties/left/$ref", "contains itself"),
        ({"$ref": "#"}, "/properties/x/$ref", "contains itself"),
        ({"$ref": "#/$defs/tree", "type": "object"}, "/properties/x/type", "stands beside $ref"),
        ({"type": "object", "patternProperties": {"^a": {}}}, "/properties/x/patternProperties", "not supported"),
        ({"type": "array", "prefixItems": [{}]}, "/properties/x/prefixItems", "not supported"),
        ({"if": {}, "then": {"type": "string"}}, "/properties/x/if", "not supported"),
        ({"allOf": [{"minLength": 1}, {"type": "string"}]}, "/properties/x/allOf/1", "write it into the schema"),
        (False, "/properties/x", "allows no value"),
        ({"type": "strange"}, "/properties/x/type", "strange"),
        ({"properties": {"extra-fields": {}}}, "/properties/x/properties/extra-fields", "is where unknown names go"),
        ({"properties": {"a\0": {}}}, "/properties/x/properties/a\0", "cannot be a column"),
        ({"items": {"type": "array", "items": {"if": {}}}}, "/properties/x/items/items/if", "not supported"),
    ],
)
def test_what_no_column_can_hold_is_refused_at_its_place(schema: Any, pointer: str, reason: str) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}
    with pytest.raises(SchemaError, match=reason.replace("$", r"\$")) as caught:
        columns({"x": schema}, **{"$defs": {"tree": tree}, "required": ["k"], "x": {"odd": {"type": "strange"}}})
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("{", "is no JSON"),
        ("[]", "is no object"),
        ('{"a":' * 5000, "is no JSON"),
        ('{"properties": {"\\ud800": {}}}', "is no JSON"),
        ({"type": "string"}, "describes a string"),
        ({"type": "object"}, "names no properties"),
        ({"$schema": 5, "type": "object"}, "is 5; only"),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "type": "object"},
            "only https://json-schema.org/draft",
        ),
    ],
)
def test_a_document_that_describes_no_record_is_refused(document: Any, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        compiled(rules(document))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"key_fields": ("nope",)}, "nope is no property"),
        ({"key_fields": ("n",)}, "n is a number"),
        ({"key_fields": ("o",)}, "o is a object"),
        ({"time_field": "o"}, "time_field: o is a object"),
        ({"hmac_key": b"k"}, "computed by use_hmac"),
    ],
)
def test_a_schema_that_does_not_go_with_the_other_settings_is_refused(options: Any, complaint: str) -> None:
    properties = KEY | {"n": {"type": "number"}, "o": {"properties": {"a": {}}}, "hmac": {}}
    with pytest.raises(ValueError, match=complaint):
        compiled(rules({"type": "object", "properties": properties}, **options))


def test_a_key_may_lie_deeper() -> None:
    schema = {"properties": {"user": {"properties": {"id": {"type": "integer"}}}}}
    assert compiled(rules(schema, key_fields=("user.id",)))
