"""`d2p convert` into a bucket: the target is proven before anything is read, and the files are those of a directory."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from d2p_pipeline.cli.app import app
from d2p_pipeline_tests.fixtures.s3 import REGION, SECRET_KEY, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import line


@pytest.fixture
def bucket(
    s3_service: Service, s3_proxy: Proxy, aws_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    name = s3_service.bucket()
    settings = {"WRITER_TYPE": "aws-s3", "S3_BUCKET_NAME": name, "S3_REGION": REGION, "S3_ENDPOINT": s3_proxy.url}
    for setting, value in settings.items():
        monkeypatch.setenv(f"D2P_{setting}", value)
    monkeypatch.chdir(tmp_path)
    Path("in.ndjson").write_bytes(b"\n".join([line("a/b 50%"), line("c"), b"bad"]))
    return name


def convert(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["convert", "in.ndjson", "--json", *arguments])


def test_a_missing_right_is_told_before_anything_is_converted(bucket: str, s3_proxy: Proxy) -> None:
    s3_proxy.break_next("CreateMultipartUpload", "403")
    result = convert()
    assert result.exit_code == 2
    assert f"files cannot be written to s3://{bucket}: cannot begin and abort an upload" in result.stderr
    assert f"allow s3:PutObject on arn:aws:s3:::{bucket}/*" in result.stderr
    assert SECRET_KEY not in result.output
    assert s3_proxy.operations() == ["PutObject", "DeleteObject", "CreateMultipartUpload"]


def test_the_files_arrive_though_a_request_breaks(bucket: str, s3_service: Service, s3_proxy: Proxy) -> None:
    result = convert("--jobs", "1")
    keys = s3_service.keys(bucket)
    assert result.exit_code == 1  # one record was rejected
    assert json.loads(result.stdout)["rows"] == 2
    assert [key.partition("/year=")[0] for key in keys if key.endswith(".parquet")] == [
        "capability=a%2Fb 50%25",
        "capability=c",
    ]
    s3_proxy.break_next("PutObject", "503", times=2)
    assert convert("--jobs", "1").exit_code == 1
    assert s3_service.keys(bucket) == keys
