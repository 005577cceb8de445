"""A run holds one unit at a time, however many its batches have and whatever becomes of them."""

import gc
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from redis import Redis

from d2p_pipeline import delivery
from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline_tests.pipeline import Pipeline, line

UNITS = 3


def flush() -> dg.JobDefinition:
    from d2p_pipeline.definitions import defs

    return defs.resolve_job_def("flush")


def look(frame: pl.DataFrame) -> pl.DataFrame:
    """The user's function, which is called while a unit is worked on."""
    values = [
        value for value in gc.get_objects() if isinstance(value, delivery.Text | delivery.Rows | delivery.Announced)
    ]
    full = [value for value in values if any(isinstance(member, list) and member for member in vars(value).values())]
    held.append(sorted(type(value).__name__ for value in full))
    return frame


held: list[list[str]] = []


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_holds_one_unit_at_a_time(
    pipeline: Pipeline, redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """In a run as its process has it: executing in process for a test, Dagster keeps all outputs."""
    monkeypatch.setenv("D2P_UNIT_BYTES", "1")
    monkeypatch.setenv("D2P_TRANSFORM", f"{__name__}:look")
    if fails:
        pipeline.root.mkdir()
        (pipeline.root / "capability=payments").write_text("in the way")
    for number in range(UNITS):
        redis_client.rpush("data:{payments}", line(message=str(number)))
    pipeline.buffer.seal([Seal("payments", "B1", "age")])
    config = {"ops": {"plan_units": {"config": {"batches": [{"key": "payments", "id": "B1"}]}}}}
    held.clear()
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        result = dg.execute_job(dg.reconstructable(flush), instance, run_config=config)
    assert result.success != fails
    assert held == [["Text"]] * UNITS
