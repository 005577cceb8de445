"""A code location of somebody's own, whose S3Resource of dagster-aws reaches the bucket."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster_aws.s3 import S3Resource

from d2p_pipeline.definitions import build_defs
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline.parquet.errors import PermanentStoreError
from d2p_pipeline.settings import SettingsError
from d2p_pipeline_tests.fixtures.s3 import REGION, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import Pipeline, line

SECRET = "hunter2-of-the-resource"


@pytest.fixture
def bucket(s3_service: Service, aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The settings name the bucket; the environment has no credentials but those the resource names."""
    name = s3_service.bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("LAKE_SECRET", SECRET)
    monkeypatch.setenv("D2P_WRITER_TYPE", "aws-s3")
    monkeypatch.setenv("D2P_S3_BUCKET_NAME", name)
    return name


@pytest.fixture
def s3(bucket: str, s3_proxy: Proxy) -> S3Resource:
    return S3Resource(
        region_name=REGION,
        endpoint_url=s3_proxy.url,
        max_attempts=1,
        aws_access_key_id="AKIDRESOURCE",
        aws_secret_access_key=dg.EnvVar("LAKE_SECRET"),
    )


def flush(pipeline: Pipeline, defs: dg.Definitions) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def("flush").execute_in_process(instance=pipeline.instance, raise_on_error=False)


def test_the_flow_reaches_the_bucket_through_the_resource(
    pipeline: Pipeline, s3: S3Resource, bucket: str, s3_service: Service, s3_proxy: Proxy
) -> None:
    @dg.asset(ins={"files": dg.AssetIn("parquet_files")})
    def messages(s3: S3Resource, files: pl.LazyFrame) -> None:
        [item] = s3.get_client().list_objects_v2(Bucket=bucket)["Contents"]
        assert "capability=a%2Fb 50%25/" in item["Key"]
        assert files.select("capability", "message").collect().rows() == [("a/b 50%", "m")]

    read = dg.define_asset_job("read", [messages])
    pipeline.receive([line("a/b 50%")])
    defs = dg.Definitions.merge(build_defs(s3=s3), dg.Definitions(assets=[messages], jobs=[read]))
    assert flush(pipeline, defs).success
    assert len(s3_service.keys(bucket)) == 1
    assert defs.resolve_job_def("read").execute_in_process(instance=pipeline.instance).success
    assert {request.access_key for request in s3_proxy.seen} == {"AKIDRESOURCE"}


def test_the_first_tick_of_a_code_location_proves_that_files_can_be_written(
    pipeline: Pipeline, s3: S3Resource, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2P_BUFFER_SIZE", "1")
    pipeline.receive([line()])
    pipeline.buffer.request_flush()
    repository = build_defs(s3=s3).get_repository_def()

    def tick() -> int:
        context = dg.build_sensor_context(instance=pipeline.instance, repository_def=repository)
        return len(buffer_sensor.evaluate_tick(context).run_requests or [])

    s3_proxy.break_next("PutObject", "403")
    with pytest.raises(PermanentStoreError, match="allow s3:PutObject on arn:aws:s3:::"):
        tick()
    assert len(list(pipeline.buffer.waiting())) == 1
    assert tick() == 1
    proven = len(s3_proxy.seen)
    assert tick() == 0
    assert len(s3_proxy.seen) == proven


def test_the_documented_code_location_loads(bucket: str) -> None:
    document = Path(__file__).parents[2] / "docs" / "s3.md"
    found = re.search(r"<!-- resource -->\s*```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert found
    module: dict[str, Any] = {}
    exec(found[1], module)
    assert "s3" in module["defs"].get_repository_def().get_top_level_resources()


@pytest.mark.parametrize(("setting", "own"), [("s3_region", "region_name"), ("s3_endpoint", "endpoint_url")])
def test_settings_that_the_resource_replaces_are_refused(
    s3: S3Resource, setting: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"D2P_{setting.upper()}", "http://elsewhere")
    with pytest.raises(SettingsError, match=f"{setting}.*has no effect with an S3Resource, which has {own}"):
        build_defs(s3=s3)


def test_a_secret_in_the_code_is_refused_because_the_ui_would_show_it(bucket: str) -> None:
    with pytest.raises(SettingsError, match=r"aws_secret_access_key.*EnvVar") as caught:
        build_defs(s3=S3Resource(aws_access_key_id="AK", aws_secret_access_key=SECRET))
    assert SECRET not in str(caught.value)


def test_an_error_names_what_the_resource_calls_it(bucket: str, s3_proxy: Proxy, s3: S3Resource) -> None:
    from d2p_pipeline.orchestration.io_manager import ParquetIOManager
    from d2p_pipeline_tests.fixtures.s3 import Answer

    answer = Answer(400, "AuthorizationHeaderMalformed", extra="<Region>ap-south-1</Region>")
    s3_proxy.break_next("PutObject", answer, times=2)
    with (
        dg.build_resources({"parquet": ParquetIOManager(s3=s3)}) as resources,
        pytest.raises(PermanentStoreError, match="set region_name to ap-south-1"),
    ):
        resources.parquet.check()


def test_no_secret_is_in_what_dagster_shows_and_stores(
    pipeline: Pipeline, s3: S3Resource, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    defs = build_defs(s3=s3)
    shown: list[Any] = [dg.serialize_value(RepositorySnap.from_def(defs.get_repository_def()))]
    for fault in ("403", "expired", None):
        pipeline.receive([line()], str(fault))
        if fault:
            s3_proxy.break_next("PutObject", fault)
        result = flush(pipeline, defs)
        assert result.success == (fault is None)
        run = result.dagster_run
        shown += [run, run.run_config, run.tags]
        shown += [dg.serialize_value(entry) for entry in pipeline.instance.all_logs(result.run_id)]
    text = "\n".join(map(str, [*shown, caplog.text]))
    assert "LAKE_SECRET" in text
    assert "ExpiredToken" in text
    assert SECRET not in text


def test_a_run_without_the_resource_does_not_import_dagster_aws() -> None:
    program = "import sys, d2p_pipeline.definitions; print(*sys.modules)"
    environment = {**os.environ, "D2P_WRITER_TYPE": "aws-s3", "D2P_S3_BUCKET_NAME": "b-1"}
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    assert not {"boto3", "botocore", "dagster_aws"} & set(ran.stdout.split())
