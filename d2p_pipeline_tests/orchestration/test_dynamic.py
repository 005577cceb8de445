"""Dynamic records all the way: received, flushed, converted."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import polars as pl
import pytest
from redis import Redis
from typer.testing import CliRunner

from d2p_pipeline.buffer.protocol import Totals
from d2p_pipeline.cli.app import app
from d2p_pipeline.definitions import defs
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.pipeline import Pipeline
from d2p_pipeline_tests.receiving import StartReceiver

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "tenant": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
        "at": {"type": ["string", "null"], "format": "date-time"},
        "amount": {"type": "number", "minimum": 0},
        "card": {"type": "string"},
    },
    "required": ["tenant"],
    "additionalProperties": True,
}


def order(tenant: str = "acme", **fields: Any) -> dict[str, Any]:
    return {"tenant": {"id": tenant}, **fields}


@pytest.fixture(params=["schema", "inferred"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {"record_type": "dynamic", "key_fields": "tenant.id", "time_field": "at", "mask_fields": "card"}
    if request.param == "schema":
        path = tmp_path / "schema.json"
        path.write_text(json.dumps(SCHEMA))
        values["json_schema_path"] = str(path)
    for name, value in values.items():
        monkeypatch.setenv(f"D2P_{name.upper()}", value)
    return values


def test_what_the_receiver_accepts_lies_in_files_by_key_and_time(
    pipeline: Pipeline, settings: dict[str, str], start_receiver: StartReceiver, redis_client: Redis
) -> None:
    receiver = start_receiver(**settings)
    records = [
        order(at="2026-01-02T03:04:05+01:00", amount=1, card="4111"),
        order(amount=2.5, new={"a": [1]}),
        order("other", amount=3),
        {"amount": 1, "card": "4111"},
    ]
    body = b"\n".join(json.dumps(record).encode() for record in records) + b'\n{"card": "4111'
    answer = receiver.client.post("/records", content=body).json()
    assert (answer["accepted"], answer["dead_lettered"]) == (3, 2)
    assert receiver.client.post("/record/", json=order(amount="x", at="soon")).status_code == 400
    assert receiver.client.post("/record/", json=order(amount=4)).status_code == 201
    redis_client.rpush("data:{acme}", json.dumps(order(amount=5, card="4111")).encode(), b'{"card":"4111"}')
    assert pipeline.flush().success
    found = pipeline.rows("SELECT capability, amount, card, tenant.id, year FROM files ORDER BY amount")
    year = datetime.now(UTC).year
    assert [(row[0], float(row[1]), *row[2:]) for row in found] == [
        ("acme", 1.0, "*", "acme", 2026),
        ("acme", 2.5, None, "acme", year),
        ("other", 3.0, None, "other", year),
        ("acme", 4.0, None, "acme", year),
        ("acme", 5.0, "*", "acme", year),
    ]
    [(at,)] = pipeline.rows('SELECT "at" FROM files WHERE amount = 3')
    assert abs(datetime.now(UTC) - at.astimezone(UTC)) < timedelta(minutes=10)
    letters = [
        DeadLetter.from_json(letter)
        for key, _ in pipeline.buffer.dead_letter_keys()
        for letter in pipeline.buffer.dead_letters(key)
    ]
    assert len(letters) == 3
    assert not any(b"4111" in letter.raw for letter in letters)
    totals = dict(pipeline.buffer.totals())
    assert totals["acme"] == Totals(accepted=5, rows=4, dead_letters=1)
    assert totals["other"] == Totals(1, 1, 0)


def test_batches_whose_records_differ_share_a_run_and_a_reader(
    pipeline: Pipeline, settings: dict[str, str], redis_client: Redis
) -> None:
    for tenant, extra in {"a": {"x": 1}, "b": {"x": "text"}, "c": {"y": [1, {"z": None}]}}.items():
        redis_client.rpush(f"data:{{{tenant}}}", json.dumps(order(tenant, amount=1, **extra)).encode())
    assert pipeline.flush().success
    query = f"SELECT capability FROM read_parquet('{pipeline.root}/**/*.parquet', union_by_name = true) ORDER BY 1"
    assert duckdb.execute(query).fetchall() == [("a",), ("b",), ("c",)]


def test_a_downstream_asset_reads_columns_that_came_and_widened_and_is_told_of_those_that_cannot_be_one(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, redis_client: Redis
) -> None:
    monkeypatch.setenv("D2P_RECORD_TYPE", "dynamic")
    monkeypatch.setenv("D2P_KEY_FIELDS", "k")
    seen: list[pl.DataFrame] = []

    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="keys"))
    def downstream(parquet_files: pl.LazyFrame) -> None:
        seen.append(parquet_files.collect())

    def deliver(**record: Any) -> None:
        redis_client.rpush("data:{k}", json.dumps({"k": "k", **record}).encode())
        assert pipeline.flush().success

    def load() -> dg.ExecuteInProcessResult:
        both = dg.Definitions.merge(defs, dg.Definitions(assets=[downstream])).resolve_implicit_global_asset_job_def()
        return both.execute_in_process(
            instance=pipeline.instance, partition_key="k", asset_selection=[downstream.key], raise_on_error=False
        )

    deliver(amount=1, code=7, of={"a": 1})
    deliver(amount=2.5, code="x7", of={"a": 1.5, "b": "z"}, new=[1])
    assert load().success
    found = seen[0].sort("amount").select("amount", "code", "of", "new", "year").rows()
    year = datetime.now(UTC).year
    assert found == [
        (1.0, "7", {"a": 1.0, "b": None}, None, year),
        (2.5, "x7", {"a": 1.5, "b": "z"}, [1], year),
    ]
    deliver(amount=3, of=[1])
    failed = load()
    assert not failed.success
    said = [str(event.event_specific_data) for event in failed.all_node_events if event.is_step_failure]
    assert "column 'of' has types that cannot be one column" in said[0]


def test_convert_writes_them_too(settings: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "in.ndjson"
    lines = [order(amount=1, card="4111"), order(at="2026-01-02T03:04:05Z", amount=2), {"card": "4111"}]
    file.write_text("\n".join(json.dumps(record) for record in lines))
    result = CliRunner().invoke(app, ["convert", str(file), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert (summary["records"], summary["rows"], summary["dead_letters"]) == (3, 2, 1)
    files = f"{tmp_path / 'out'}/capability=acme/**/*.parquet"
    assert duckdb.execute(f"SELECT amount, card FROM read_parquet('{files}') ORDER BY 1").fetchall() == [
        (1, "*"),
        (2, None),
    ]
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out" / "_dead_letters").iterdir())
    assert b"4111" not in kept
