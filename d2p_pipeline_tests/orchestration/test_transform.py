"""The user's function and the HMAC in a run: the books balance, and a function that fails keeps the batch."""

import pytest
from redis import Redis

from d2p_pipeline.buffer.protocol import Seal, Totals
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.records import transforms


def by(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_TRANSFORM", f"{transforms.__name__}:{name}")


def test_rows_that_the_function_drops_are_counted_as_rejected_and_kept_nowhere(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, redis_client: Redis
) -> None:
    by("without_debug", monkeypatch)
    pipeline.receive([line(message="1"), line(message="2", level="debug"), line(message="3", level="debug")])
    redis_client.rpush("data:{payments}", b"no record")
    assert pipeline.flush().success
    assert pipeline.messages() == ["1"]
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=4, rows=1, dead_letters=3)}
    assert len(list(pipeline.buffer.dead_letters("payments"))) == 1
    [record] = pipeline.instance.fetch_materializations(parquet_files.key, limit=10).records
    assert record.asset_materialization
    reasons = record.asset_materialization.metadata["dead_letter_reasons"].value
    assert isinstance(reasons, dict)
    assert reasons["dropped by transform"] == 2


def test_a_unit_whose_rows_are_all_dropped_is_done_without_a_file(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    by("without_debug", monkeypatch)
    pipeline.receive([line(level="debug")])
    assert pipeline.flush().success
    assert pipeline.files() == []
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(1, 0, 1)}


def test_a_function_that_fails_keeps_the_batch_in_recovery_until_it_is_mended(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    by("broken", monkeypatch)
    pipeline.receive([line(message="1")])
    [batch] = pipeline.buffer.seal([Seal("payments", "B1", "age")])
    assert not pipeline.flush(batch.ref).success
    [waiting] = pipeline.buffer.recovering()
    assert waiting.ref == batch.ref
    assert f"transform {transforms.__name__}:broken: raised ColumnNotFoundError" in waiting.error
    assert list(pipeline.buffer.dead_letter_keys()) == []
    by("shout", monkeypatch)
    monkeypatch.setenv("D2P_USE_HMAC", "true")
    monkeypatch.setenv("D2P_HMAC_KEY", "key")
    assert pipeline.flush(batch.ref).success
    assert pipeline.rows("SELECT message, length(hmac) FROM files WHERE message = '1'") == [("1", 64)]
