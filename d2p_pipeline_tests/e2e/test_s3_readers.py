"""What the flow wrote to S3, read over S3 by those it is for; keys with characters that need escaping among them."""

from typing import Any
from urllib.parse import unquote

import dagster as dg
import duckdb
import polars as pl
import pyarrow.dataset as ds
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import S3FileSystem

from d2p_pipeline.orchestration.assets import keys as keys_of_files
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.keys import partition_of
from d2p_pipeline_tests.fixtures.s3 import ACCESS_KEY, REGION, SECRET_KEY, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import Pipeline, line

KEYS = ["plain", "a/b 50%", "x=y+z", "[q]?*", "ü😀", 'it\'s "#"', "a&b;c,d", "{e}\\f", "%2F"]
HOURS = [9, 10, 11]
ROWS = sorted((key, hour, f"{key} {hour}") for key in KEYS for hour in HOURS)


@pytest.fixture
def bucket(
    pipeline: Pipeline, s3_service: Service, s3_proxy: Proxy, aws_environment: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A row of each key for each hour, by the flush job."""
    name = s3_service.bucket()
    for setting, value in {
        "WRITER_TYPE": "aws-s3",
        "S3_BUCKET_NAME": name,
        "S3_PREFIX": "team a/logs",
        "S3_REGION": REGION,
        "S3_ENDPOINT": s3_proxy.url,
    }.items():
        monkeypatch.setenv(f"D2P_{setting}", value)
    for key in KEYS:
        lines = [line(key, f"{key} {hour}", time=f"2026-11-21T{hour:02}:30:00Z") for hour in HOURS]
        pipeline.receive(lines, name=key)
    assert pipeline.flush().success
    assert len(s3_service.keys(name)) == len(ROWS)
    s3_proxy.seen.clear()
    return name


@pytest.fixture
def filesystem(s3_proxy: Proxy) -> S3FileSystem:
    host = s3_proxy.url.removeprefix("http://")
    return S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, region=REGION, scheme="http", endpoint_override=host
    )


def test_polars_pyarrow_and_duckdb_read_every_row_and_those_of_one_place(
    bucket: str, s3_proxy: Proxy, filesystem: S3FileSystem
) -> None:
    polars_reads(bucket, s3_proxy)
    pyarrow_reads(bucket, filesystem)
    duckdb_reads(bucket, filesystem)


def polars_reads(bucket: str, s3_proxy: Proxy) -> None:
    options = {
        "aws_access_key_id": ACCESS_KEY,
        "aws_secret_access_key": SECRET_KEY,
        "aws_region": REGION,
        "aws_endpoint_url": s3_proxy.url,
        "aws_allow_http": "true",
    }
    files = pl.scan_parquet(f"s3://{bucket}/team a/logs/", hive_partitioning=True, storage_options=options)
    assert sorted(files.select("capability", pl.col("hour").cast(int), "message").collect().rows()) == ROWS
    one = files.filter(pl.col("capability") == "a/b 50%", pl.col("hour") == 10)
    assert one.select("message").collect().rows() == [("a/b 50% 10",)]


def pyarrow_reads(bucket: str, filesystem: S3FileSystem) -> None:
    files = ds.dataset(f"{bucket}/team a/logs", filesystem=filesystem, partitioning="hive", format="parquet")
    rows = files.to_table(columns=["capability", "hour", "message"]).to_pylist()
    assert sorted((row["capability"], row["hour"], row["message"]) for row in rows) == ROWS


def duckdb_reads(bucket: str, filesystem: S3FileSystem) -> None:
    """DuckDB's own S3 client is an extension that it downloads; Arrow's stands in for it here."""

    class S3(ArrowFSWrapper):
        protocol = "s3"  # pyright: ignore

    connection = duckdb.connect()
    connection.register_filesystem(S3(filesystem))
    files = f"read_parquet('s3://{bucket}/team a/logs/**/*.parquet', hive_partitioning = true)"
    rows = connection.execute(f"SELECT capability, hour::INT, message FROM {files}").fetchall()
    assert sorted(rows) == ROWS
    one = connection.execute(f"SELECT message FROM {files} WHERE capability = '[q]?*' AND hour = '11'").fetchall()
    assert one == [("[q]?* 11",)]


# --- assets downstream


def read(pipeline: Pipeline, asset: dg.AssetsDefinition, partition: str | None = None) -> None:
    source = dg.AssetSpec("parquet_files", partitions_def=keys_of_files).with_io_manager_key("parquet")
    resources = {"parquet": ParquetIOManager()}
    assert dg.materialize(
        [asset, source], resources=resources, instance=pipeline.instance, partition_key=partition
    ).success


def asked_for(proxy: Proxy, operation: str) -> set[str]:
    return {unquote(request.path) for request in proxy.of(operation)}


def test_an_asset_of_one_key_lists_and_reads_that_keys_files_alone(
    pipeline: Pipeline, bucket: str, s3_proxy: Proxy
) -> None:
    seen: list[Any] = []

    @dg.asset(ins={"files": dg.AssetIn("parquet_files")}, partitions_def=keys_of_files)
    def messages(files: pl.LazyFrame) -> None:
        seen.extend(files.select("message").collect()["message"].sort())

    read(pipeline, messages, partition_of("a/b 50%"))
    assert seen == sorted(f"a/b 50% {hour}" for hour in HOURS)
    [listed] = asked_for(s3_proxy, "ListObjectsV2")
    assert "prefix=team a/logs/capability=a%2Fb 50%25/&" in listed.replace("+", " ")
    assert all("/capability=a%2Fb 50%25/" in path for path in asked_for(s3_proxy, "GetObject"))
    assert len(asked_for(s3_proxy, "GetObject")) == len(HOURS)


def test_a_filter_by_partition_reads_no_other_files(pipeline: Pipeline, bucket: str, s3_proxy: Proxy) -> None:
    seen: list[Any] = []

    @dg.asset(ins={"files": dg.AssetIn("parquet_files")})
    def messages(files: pl.LazyFrame) -> None:
        files.collect_schema()  # for it Polars reads the footers of up to 16 files, whichever
        s3_proxy.seen.clear()
        hour = files.filter(pl.col("capability") == "x=y+z", pl.col("hour") == 10)
        seen.extend(hour.select("message").collect()["message"])

    read(pipeline, messages)
    assert seen == ["x=y+z 10"]
    [path] = asked_for(s3_proxy, "GetObject")
    assert "/capability=x%3Dy+z/year=2026/month=11/day=21/hour=10/" in path
