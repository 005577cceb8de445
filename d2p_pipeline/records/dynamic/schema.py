"""A JSON Schema (draft 2020-12) becomes columns, and a validator for the values in them.

What decides about types is read here: type, properties, additionalProperties, items, enum, const, format, $ref to places in
the same document, and unions with null. All other keywords are the validator's (jsonschema-rs). What could not be a column,
or would let a value pass unseen, is refused with its JSON pointer, when the program starts and not when records come.

Masked properties are validated as strings and ignored ones not at all, because the validator sees what is left of them.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast
from urllib.parse import unquote

import jsonschema_rs
import msgspec

from d2p_pipeline.records.dynamic.columns import (
    BOOLEAN,
    DATE,
    EXTRA,
    INTEGER,
    NULL,
    NUMBER,
    STRING,
    TEXT,
    TIMESTAMP,
    Column,
    can_be_column,
    settled,
)
from d2p_pipeline.records.rules import Rules

Schema = dict[str, Any]

_REFUSED = (
    "$dynamicRef",
    "$recursiveRef",
    "patternProperties",
    "prefixItems",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "if",
)
"""Keywords that make the type of a value, or the names there may be, depend on other values."""

_SHAPING = ("type", "properties", "items", "additionalProperties", "$ref", "format")
_SCALARS = {"boolean": BOOLEAN, "integer": INTEGER, "number": NUMBER, "string": STRING}
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_DEEPEST = 64


class SchemaError(ValueError):
    """A schema that cannot be used; `pointer` is the JSON pointer of the place."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"JSON Schema, {pointer or 'the root'}: {reason}")
        self.pointer = pointer
        self.reason = reason


@dataclass(frozen=True)
class Compiled:
    """The columns of the records, and what validates them."""

    columns: Column
    validator: jsonschema_rs.Draft202012Validator


@cache
def compiled(rules: Rules) -> Compiled:
    """Read the schema of the rules. SchemaError tells the first thing that cannot work, ValueError what the rules miss."""
    document = _document(rules.json_schema or "")
    reader = _Reader(document, rules)
    root, effective = reader.read(document, "", "", ())
    if root.kind == "map":
        raise SchemaError("", "names no properties, so it gives no columns; columns are inferred without a schema")
    if root.kind != "object":
        raise SchemaError("", f"describes a {root.kind}, but records are objects; give it type object")
    columns = _with_time(settled(root), rules)
    for name in rules.key_fields:
        _check_key(columns, name)
    if rules.hmac_key is not None and "hmac" in dict(columns.members):
        raise SchemaError("/properties/hmac", "is computed by use_hmac; name the property differently")
    return Compiled(columns, _validator(effective))


def _validator(schema: Any) -> jsonschema_rs.Draft202012Validator:
    try:
        return jsonschema_rs.Draft202012Validator(schema, validate_formats=True, retriever=_retrieve)
    except jsonschema_rs.ValidationError as error:
        raise SchemaError(_pointer(error.instance_path), error.message) from error


def _retrieve(uri: str) -> Any:
    raise LookupError(f"{uri} is not in this document")


def _document(text: str) -> Schema:
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SchemaError("", f"is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise SchemaError("", "is no object")
    schema = cast(Schema, document)
    if str(schema.get("$schema", _DRAFT)).rstrip("#") != _DRAFT:
        raise SchemaError("/$schema", f"is {schema['$schema']}; only {_DRAFT} is read")
    _check_meta(schema, "")
    return schema


def _check_meta(schema: Any, pointer: str) -> None:
    try:
        jsonschema_rs.meta.validate(schema)
    except jsonschema_rs.ValidationError as error:
        raise SchemaError(pointer + _pointer(error.instance_path), error.message) from error


def _pointer(path: list[str | int]) -> str:
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)


class _Reader:
    """Walks a schema once: per place the column, and the schema that validates what is left after hiding."""

    def __init__(self, document: Schema, rules: Rules) -> None:
        self._document = document
        self._rules = rules

    def read(self, schema: Any, pointer: str, path: str, within: tuple[str, ...]) -> tuple[Column, Any]:
        if schema is True or schema == {}:
            return TEXT, schema
        if schema is False:
            raise SchemaError(pointer, "allows no value at all")
        if len(pointer) > 0 and pointer.count("/") > _DEEPEST * 2:
            raise SchemaError(pointer, "is nested too deep")
        for keyword in _REFUSED:
            if keyword in schema:
                raise SchemaError(
                    f"{pointer}/{keyword}", "is not supported: columns need types that depend on no value"
                )
        if "$ref" in schema:
            return self._referred(schema, pointer, path, within)
        if any(keyword in schema for keyword in ("anyOf", "oneOf")):
            return self._union(schema, pointer, path, within)
        self._check_conditions(schema, pointer)
        return self._typed(schema, pointer, path, within)

    def _referred(self, schema: Schema, pointer: str, path: str, within: tuple[str, ...]) -> tuple[Column, Any]:
        reference: str = schema["$ref"]
        if not reference.startswith("#/") and reference != "#":
            raise SchemaError(f"{pointer}/$ref", f"{reference!r} is not in this document; only #/… is read")
        if reference == "#" or reference in within:
            raise SchemaError(f"{pointer}/$ref", f"{reference!r} contains itself; columns cannot be endless")
        beside = [keyword for keyword in _SHAPING if keyword != "$ref" and keyword in schema]
        if beside:
            raise SchemaError(f"{pointer}/{beside[0]}", "stands beside $ref; put it into the schema referred to")
        column, effective = self.read(self._at(reference, f"{pointer}/$ref"), reference[1:], path, (*within, reference))
        others = {keyword: value for keyword, value in schema.items() if keyword not in ("$ref", "$defs")}
        return column, {"allOf": [effective], **others} if others else effective

    def _at(self, reference: str, pointer: str) -> Any:
        place: Any = self._document
        for part in unquote(reference[2:]).split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                place = place[int(name) if isinstance(place, list) and name.isdecimal() else name]
            except (LookupError, TypeError):
                raise SchemaError(pointer, f"{reference!r} is not there") from None
        _check_meta(place, reference[1:])  # it may lie where the document's check saw no schema
        return place

    def _union(self, schema: Schema, pointer: str, path: str, within: tuple[str, ...]) -> tuple[Column, Any]:
        """anyOf and oneOf: of one type, or one type and null. Alternatives that tell nothing of types only validate."""
        [keyword, *more] = [keyword for keyword in ("anyOf", "oneOf") if keyword in schema]
        branches: list[Any] = schema[keyword]
        if not any(_shapes(branch) for branch in branches):
            return self._typed(schema, pointer, path, within)
        if more or any(name in schema for name in _SHAPING):
            raise SchemaError(f"{pointer}/{keyword}", "stands beside other descriptions of the type; keep one")
        read = [self.read(branch, f"{pointer}/{keyword}/{n}", path, within) for n, branch in enumerate(branches)]
        columns = {column for column, _ in read if column != NULL} or {NULL}
        if columns == {INTEGER, NUMBER}:
            columns = {NUMBER}
        if len(columns) > 1:
            raise SchemaError(
                f"{pointer}/{keyword}", "has alternatives of different types; a column holds one, and null"
            )
        return columns.pop(), {**schema, keyword: [effective for _, effective in read]}

    def _check_conditions(self, schema: Schema, pointer: str) -> None:
        for number, branch in enumerate(schema.get("allOf", ())):
            if _shapes(branch):
                raise SchemaError(f"{pointer}/allOf/{number}", "describes a type; write it into the schema itself")

    def _typed(self, schema: Schema, pointer: str, path: str, within: tuple[str, ...]) -> tuple[Column, Any]:
        types = _types(schema) - {"null"}
        if types == {"object"}:
            return self._object(schema, pointer, path, within)
        if types == {"array"}:
            column, items = self.read(schema.get("items", True), f"{pointer}/items", path, within)
            return Column("list", item=column), {**schema, "items": items}
        if types & {"object", "array"}:
            raise SchemaError(f"{pointer}/type", f"has {', '.join(sorted(types))} together; a column holds one type")
        if types == {"string"} and schema.get("format") in ("date-time", "date"):
            return (TIMESTAMP if schema["format"] == "date-time" else DATE), schema
        if types == {"integer", "number"}:
            return NUMBER, schema
        if len(types) == 1:
            return _SCALARS[types.pop()], schema
        return (TEXT if types or not _types(schema) else NULL), schema

    def _object(self, schema: Schema, pointer: str, path: str, within: tuple[str, ...]) -> tuple[Column, Any]:
        others = schema.get("additionalProperties", True)
        extra, more = None, False
        if others is not False:
            extra, more = self.read(others, f"{pointer}/additionalProperties", path, within)
            extra = extra if extra.kind not in ("object", "list", "map", "text", "null") else TEXT
        named: Schema = schema.get("properties", {})
        if not named:
            return (Column("map", item=extra) if extra else TEXT), {**schema, "additionalProperties": more}
        members: list[tuple[str, Column]] = []
        properties: Schema = {}
        hidden: set[str] = set()
        for name, inner in named.items():
            place = f"{pointer}/properties{_pointer([name])}"
            if not can_be_column(name):
                raise SchemaError(place, f"has a name that cannot be a column: {name!r}")
            if name == EXTRA and extra:
                raise SchemaError(place, "is where unknown names go; set additionalProperties to false, or rename it")
            below = f"{path}.{name}" if path else name
            fate = self._rules.fate_of(name, below)
            if fate == "drop":
                hidden.add(name)
            elif fate == "mask":
                members.append((name, STRING))
                properties[name] = {"type": ["string", "null"]}
            else:
                column, properties[name] = self.read(inner, place, below, within)
                members.append((name, column))
        effective = {**schema, "properties": properties, "additionalProperties": more}
        effective["required"] = [name for name in schema.get("required", ()) if name not in hidden]
        return Column("object", tuple(members), extra), effective


def _shapes(branch: Any) -> bool:
    """Whether an alternative tells something of the type."""
    return isinstance(branch, dict) and any(
        keyword in branch for keyword in (*_SHAPING, "anyOf", "oneOf", "allOf", "enum", "const", *_REFUSED)
    )


def _types(schema: Schema) -> set[str]:
    """The types a schema names, or those its values and keywords amount to."""
    if "type" in schema:
        given = schema["type"]
        return {given} if isinstance(given, str) else set(cast(list[str], given))
    if "const" in schema or "enum" in schema:
        return {_type_of(value) for value in schema.get("enum", [schema.get("const")])}
    if "properties" in schema:
        return {"object"}
    if "items" in schema:
        return {"array"}
    return {"string"} if "format" in schema else set()


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case _:
            return "array" if isinstance(value, list) else "object"


def _with_time(root: Column, rules: Rules) -> Column:
    """The time column is a timestamp, whatever is declared, and there in any case: it places rows in files."""
    members = dict(root.members)
    declared = members.get(rules.time_field, TIMESTAMP)
    if declared.kind not in ("timestamp", "string", "text", "integer", "number"):
        raise ValueError(f"time_field: {rules.time_field} is a {declared.kind} in the JSON Schema, no time")
    members[rules.time_field] = TIMESTAMP
    return replace(root, members=tuple(members.items()))


def _check_key(root: Column, name: str) -> None:
    column = find(root, name)
    if column is None:
        raise ValueError(f"key_fields: {name} is no property of the JSON Schema")
    if column.kind not in ("string", "text", "integer", "boolean", "date"):
        raise ValueError(f"key_fields: {name} is a {column.kind} in the JSON Schema; a key needs text")


def find(root: Column, name: str) -> Column | None:
    """The column at a name, or at a path with dots between names."""
    members = dict(root.members)
    if name in members:
        return members[name]
    first, _, rest = name.partition(".")
    return find(members[first], rest) if rest and first in members else None
