"""The OpenAPI document of the receiver, at `/openapi.json`: routes, bodies, answers, and what a client does about each."""

from functools import cache
from typing import Any

import msgspec

from d2p_pipeline import __version__


@cache
def document() -> bytes:
    """The document as JSON text."""
    return msgspec.json.encode(_document())


def _document() -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Data2Parquet receiver",
            "version": __version__,
            "description": (
                "Takes JSON records into the buffer. An answer in the 200s means that the buffer has them. After 408, 429, 503, "
                "a timeout or a reset, repeat the request under the same Idempotency-Key."
            ),
        },
        "paths": {
            "/record/": {"post": _post_record()},
            "/records": {"post": _post_records()},
            "/flush/": {"post": _post_flush()},
            "/healthcheck/": {"get": _get("Whether the process lives.", "Status")},
            "/ready": {"get": _get("Whether Redis takes writes.", "Status")},
            "/metrics": {"get": _get_metrics()},
            "/openapi.json": {"get": _get("This document.", None)},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "headers": {
                "Retry-After": {"description": "Seconds before the next attempt.", "schema": {"type": "integer"}}
            },
            "parameters": {
                "IdempotencyKey": {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "description": "Key and body together name a request; repeated within push_window it stores nothing.",
                    "schema": {"type": "string", "maxLength": 255},
                },
                "FluentTag": {
                    "name": "X-Fluent-Tag",
                    "in": "header",
                    "description": "The tag of Fluent Bit's records; key_from_tag and fluent_defaults complete them.",
                    "schema": {"type": "string"},
                },
            },
            "schemas": _schemas(),
        },
        "security": [{}, {"token": []}],
    }


_PARAMETERS = [{"$ref": f"#/components/parameters/{name}"} for name in ("IdempotencyKey", "FluentTag")]


def _post_record() -> dict[str, Any]:
    return {
        "summary": "Store one record.",
        "parameters": _PARAMETERS,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("Record")}, "application/msgpack": {}},
        },
        "responses": {"201": _answer("Stored.", "Stored"), **_refusals()},
    }


def _post_records() -> dict[str, Any]:
    return {
        "summary": "Store many records.",
        "description": (
            'NDJSON, a JSON array, {"logs": […]}, or MessagePack (maps, or Fluent events), told apart by looking; '
            "Content-Encoding gzip or zstd. Malformed records become dead letters, the others are accepted."
        ),
        "parameters": _PARAMETERS,
        "requestBody": {
            "required": True,
            "content": {
                "application/x-ndjson": {"schema": {"type": "string"}},
                "application/json": {"schema": {"oneOf": [{"type": "array", "items": _ref("Record")}, _ref("Logs")]}},
                "application/msgpack": {},
            },
        },
        "responses": {"202": _answer("Stored.", "Accepted"), **_refusals()},
    }


def _post_flush() -> dict[str, Any]:
    return {
        "summary": "Make keys due for delivery at the next tick.",
        "requestBody": {"content": {"application/json": {"schema": _ref("Flush")}}},
        "responses": {"202": _answer("Due.", "Flushed"), **_refusals()},
    }


def _get_metrics() -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "summary": "Metrics in Prometheus' text format.",
        "responses": {"200": {"description": "Metrics.", "content": text}, "401": _answer("No valid token.", "Error")},
    }


def _get(summary: str, schema: str | None) -> dict[str, Any]:
    answers = {"200": _answer("Yes." if schema else summary, schema)}
    if schema:
        answers["503"] = _answer("No.", "Error")
    return {"summary": summary, "security": [], "responses": answers}


_REFUSALS = {
    "400": "The body, or the record, cannot be read. Do not repeat it.",
    "401": "No valid token.",
    "408": "The body did not come in time. Repeat the request.",
    "413": "The body, or what it brings, is too large. Send smaller batches.",
    "415": "The Content-Encoding is not supported.",
    "429": "A key has as much waiting as it may (max_key_bytes). Repeat the request.",
    "500": "Another program's value has a name of the key in Redis, or a defect. Repeat the request when it is mended.",
    "503": "The buffer takes nothing now. Repeat the request.",
}
_WITHOUT_BODY = {
    "431": "The head is too long.",
    "501": "A Transfer-Encoding other than chunked.",
}


def _refusals() -> dict[str, Any]:
    refusals = {status: _answer(text, "Error") for status, text in _REFUSALS.items()}
    for status in ("429", "503"):
        refusals[status]["headers"] = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
    return refusals | {status: {"description": text} for status, text in _WITHOUT_BODY.items()}


def _answer(description: str, schema: str | None) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(schema) if schema else {"type": "object"}}}
    return {"description": description, "content": content}


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    common = {"timestamp": {"type": "integer"}, "elapsed": {"type": "string"}}
    return {"type": "object", "properties": properties | common, "required": [*properties, *common]}


def _schemas() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "integer", "minimum": 0}
    error = {"type": "object", "properties": {"line": number, "reason": text}, "required": ["line", "reason"]}
    return {
        "Record": {"type": "object", "description": "A record, see docs/record.md."},
        "Logs": {
            "type": "object",
            "properties": {"logs": {"type": "array", "items": _ref("Record")}},
            "required": ["logs"],
            "additionalProperties": False,
        },
        "Flush": {
            "type": "object",
            "properties": {"keys": {"type": "array", "items": text}},
            "required": ["keys"],
            "additionalProperties": False,
        },
        "Stored": _object(),
        "Accepted": _object(accepted=number, dead_lettered=number, errors={"type": "array", "items": error}),
        "Flushed": _object(keys={"type": "array", "items": text}),
        "Status": _object(status=text),
        "Error": _object(error=text),
    }
