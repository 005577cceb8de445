"""The flush job into a bucket, and a downstream asset that reads from it."""

import dagster as dg
import polars as pl
import pytest

from d2p_pipeline_tests.fixtures.s3 import REGION, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import Pipeline, line


@pytest.fixture
def bucket(s3_service: Service, s3_proxy: Proxy, aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    name = s3_service.bucket()
    for setting, value in {
        "WRITER_TYPE": "aws-s3",
        "S3_BUCKET_NAME": name,
        "S3_PREFIX": "logs",
        "S3_REGION": REGION,
        "S3_ENDPOINT": s3_proxy.url,
        "S3_TAGS": "team=payments",
        "WRITE_RETRY_DELAY": "0.01",
    }.items():
        monkeypatch.setenv(f"D2P_{setting}", value)
    return name


def test_records_arrive_once_though_requests_break(
    pipeline: Pipeline, bucket: str, s3_service: Service, s3_proxy: Proxy
) -> None:
    pipeline.receive([line("a/b 50%", f"m{n}") for n in range(5)], "one")
    pipeline.receive([line("c", "m5")], "two")
    s3_proxy.break_next("PutObject", "503")
    result = pipeline.flush()
    assert result.success
    keys = s3_service.keys(bucket)
    assert len(keys) == 2
    assert keys[0].startswith("logs/capability=a%2Fb 50%25/year=2026/")
    assert s3_service.client.head_object(Bucket=bucket, Key=keys[0])["Metadata"]["d2p-key"] == "a/b%2050%25"

    @dg.asset(ins={"files": dg.AssetIn("parquet_files")})
    def messages(files: pl.LazyFrame) -> None:
        assert sorted(files.collect()["message"]) == [f"m{n}" for n in range(6)]
        assert set(files.collect()["capability"]) == {"a/b 50%", "c"}

    from d2p_pipeline.orchestration.io_manager import ParquetIOManager

    source = dg.AssetSpec("parquet_files").with_io_manager_key("parquet")
    assert dg.materialize(
        [messages, source], resources={"parquet": ParquetIOManager()}, instance=pipeline.instance
    ).success


def test_a_missing_right_is_not_tried_again(pipeline: Pipeline, bucket: str, s3_proxy: Proxy) -> None:
    pipeline.receive([line()], "one")
    s3_proxy.break_next("PutObject", "403")
    assert not pipeline.flush().success
    assert s3_proxy.operations() == ["PutObject"]
