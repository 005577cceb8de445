"""Files in a bucket, over the wire: what is written, with which credentials, and how it is read back."""

import io
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2p_pipeline.parquet.s3 import Bucket, S3Store
from d2p_pipeline_tests.fixtures.s3 import REGION, SECRET_KEY, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service

pytestmark = pytest.mark.usefixtures("aws_environment")

MIB = 2**20
LARGEST = 100 * MIB
PART = 5 * MIB  # the smallest that S3 takes
LARGE = bytes(range(256)) * (PART // 256) + b"the second part"


@pytest.fixture
def bucket(s3_service: Service, s3_proxy: Proxy) -> Bucket:
    return Bucket(s3_service.bucket(), region=REGION, endpoint=s3_proxy.url, path_style=True)


def open_store(bucket: Bucket) -> S3Store:
    return S3Store(bucket, attempts=1, part_bytes=PART)


@pytest.fixture
def store(bucket: Bucket) -> S3Store:
    return open_store(bucket)


def parquet(rows: int = 3) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"x": range(rows)}), file)
    return file.getvalue()


# --- what is written


@pytest.mark.parametrize("prefix", ["", "logs", "/team a/logs/"])
def test_a_file_becomes_an_object_below_the_prefix(s3_service: Service, bucket: Bucket, prefix: str) -> None:
    store = open_store(replace(bucket, prefix=prefix))
    store.write("capability=a/x.parquet", b"content")
    key = "/".join(filter(None, (prefix.strip("/"), "capability=a/x.parquet")))
    assert s3_service.keys(bucket.name) == [key]
    assert s3_service.content(bucket.name, key) == b"content"
    assert store.scan() == store.scan("capability=a") == [f"s3://{bucket.name}/{key}"]


@pytest.mark.parametrize("data", [b"", b"small", LARGE, LARGE[:PART], LARGE * 3])
def test_the_content_is_the_same_whatever_its_size_and_form(s3_service: Service, bucket: Bucket, data: bytes) -> None:
    store = open_store(bucket)
    for name, form in {"a": data, "b": bytearray(data), "c": memoryview(data), "d": pa.py_buffer(data)}.items():
        store.write(name, form)
        assert s3_service.content(bucket.name, name) == data
    assert s3_service.unfinished(bucket.name) == []


def test_a_file_written_again_replaces_itself(s3_service: Service, bucket: Bucket) -> None:
    store = open_store(bucket)
    for data in (b"first", LARGE, b"last"):
        store.write("x.parquet", data)
        assert s3_service.content(bucket.name, "x.parquet") == data
    assert s3_service.keys(bucket.name) == ["x.parquet"]


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_an_object_carries_encryption_class_tags_and_metadata(s3_service: Service, bucket: Bucket, data: bytes) -> None:
    key_id = "arn:aws:kms:eu-central-1:123456789012:key/0"
    dressed = replace(
        bucket,
        encryption="sse-kms",
        kms_key_id=key_id,
        storage_class="STANDARD_IA",
        tags=(("team", "a b"), ("cost", "x+y=z@1")),
    )
    open_store(dressed).write("x.parquet", data, {"batch": "01J", "key": "zahlung ü"})
    found = s3_service.client.head_object(Bucket=bucket.name, Key="x.parquet")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", key_id)
    assert (found["StorageClass"], found["ContentType"]) == ("STANDARD_IA", "application/vnd.apache.parquet")
    assert found["Metadata"] == {"batch": "01J", "key": "zahlung%20%C3%BC"}
    tags = s3_service.client.get_object_tagging(Bucket=bucket.name, Key="x.parquet")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "a b", "cost": "x+y=z@1"}


def test_nothing_but_the_content_type_is_sent_unless_asked_for(s3_proxy: Proxy, bucket: Bucket) -> None:
    open_store(bucket).write("x.parquet", b"content")
    [request] = s3_proxy.of("PutObject")
    assert {name for name in request.headers if name.startswith("x-amz-")} == {"x-amz-content-sha256", "x-amz-date"}


def test_sse_s3_and_an_acl_are_sent_when_asked_for(s3_proxy: Proxy, bucket: Bucket) -> None:
    open_store(replace(bucket, encryption="sse-s3", acl="bucket-owner-full-control")).write("x.parquet", b"content")
    [request] = s3_proxy.of("PutObject")
    assert request.headers["x-amz-server-side-encryption"] == "AES256"
    assert request.headers["x-amz-acl"] == "bucket-owner-full-control"


def test_a_store_can_be_sent_to_another_process_without_its_secrets(store: S3Store) -> None:
    sent = pickle.dumps(store)
    assert SECRET_KEY.encode() not in sent
    pickle.loads(sent).write("x.parquet", LARGE)
    assert len(store.scan()) == 1


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_aws_itself_is_sent_checksums(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_proxy.url)
    open_store(replace(bucket, endpoint=None)).write("x.parquet", data)
    assert s3_service.content(bucket.name, "x.parquet") == data
    uploads = s3_proxy.of("PutObject") + s3_proxy.of("UploadPart")
    assert all("x-amz-checksum-crc32" in request.headers for request in uploads)


# --- names


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"], exclude_characters="/"), min_size=1)
plain_names = names.filter(lambda name: name.strip(".") != "" and name[0] not in "._" and len(name.encode()) < 200)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(directory=plain_names, name=plain_names)
def test_any_name_comes_back_as_it_was(
    s3_service: Service, bucket: Bucket, store: S3Store, directory: str, name: str
) -> None:
    key = f"{directory}/{name}.parquet"
    store.write(key, key.encode())
    assert s3_service.content(bucket.name, key) == key.encode()
    assert f"s3://{bucket.name}/{key}" in store.scan(directory)


@pytest.mark.parametrize("value", ["a b", "a+b", "50%", "a%2Fb", "😀é", "x=y", "a&b;c'd", "[1]*?"])
def test_polars_and_pyarrow_read_what_was_written(bucket: Bucket, value: str) -> None:
    store = open_store(replace(bucket, prefix="p q"))
    store.write(f"capability={value}/x.parquet", parquet())
    [url] = store.scan(f"capability={value}")
    frame = pl.scan_parquet([url], glob=False, storage_options=store.storage_options()).collect()
    assert frame["x"].to_list() == [0, 1, 2]
    table = pq.read_table(url.removeprefix("s3://"), filesystem=arrow_filesystem(store))
    assert table.num_rows == 3


def test_readers_find_the_bucket_as_the_writer_does(bucket: Bucket) -> None:
    def reach(**changed: Any) -> dict[str, str]:
        options = S3Store(replace(bucket, **changed)).storage_options()
        return {name: value for name, value in options.items() if "key" not in name}

    assert reach(endpoint=None) == {"aws_region": REGION}
    assert reach(endpoint="https://oss.example", path_style=False) == {
        "aws_region": REGION,
        "aws_endpoint_url": f"https://{bucket.name}.oss.example",
        "aws_virtual_hosted_style_request": "true",
        "aws_allow_http": "false",
    }


def test_duckdb_reads_what_was_written(bucket: Bucket) -> None:
    """Through Arrow's filesystem, because DuckDB's own S3 support is an extension that it downloads."""
    store = open_store(bucket)
    for part in range(3):
        store.write(f"capability=a/{part}.parquet", parquet())
    files = [url.removeprefix("s3://") for url in store.scan()]
    connection = duckdb.connect()
    connection.register("files", pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(store)))
    assert connection.execute("SELECT count(*), sum(x) FROM files").fetchall() == [(9, 9)]


def arrow_filesystem(store: S3Store) -> pyarrow.fs.S3FileSystem:
    options = store.storage_options()
    return pyarrow.fs.S3FileSystem(
        access_key=options["aws_access_key_id"],
        secret_key=options["aws_secret_access_key"],
        session_token=options.get("aws_session_token"),
        region=options["aws_region"],
        scheme="http",
        endpoint_override=options["aws_endpoint_url"].removeprefix("http://"),
    )


# --- listing


def test_a_scan_finds_the_files_of_one_directory_on_any_number_of_pages(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")  # the server's setting
    files = [f"p/capability=pay/{number}.parquet" for number in range(12)]
    others = ["p/capability=payments/x.parquet", "p/capability=pay/_tmp.parquet", "p/capability=pay/x.txt", "q.parquet"]
    for key in files + others:
        s3_service.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    store = open_store(replace(bucket, prefix="p"))
    assert store.scan("capability=pay") == sorted(f"s3://{bucket.name}/{key}" for key in files)
    assert len(s3_proxy.of("ListObjectsV2")) == 3
    assert len(store.scan()) == 13
    assert store.scan("capability=none") == []


# --- what it costs


def test_memory_stays_within_the_buffers_of_the_connections_however_large_the_file(bucket: Bucket) -> None:
    """The process that uploads has the content once, where it made it."""
    upload = f"""
        import re
        from pathlib import Path
        from d2p_pipeline.parquet.s3 import Bucket, S3Store

        def peak():  # not getrusage, which begins with the peak of the process that started this one
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

        store = S3Store(Bucket({bucket.name!r}, endpoint={bucket.endpoint!r}, path_style=True))
        store.write("small.parquet", b"small")
        data = bytearray(range(256)) * ({LARGEST} // 256)
        before = peak()
        store.write("large.parquet", data)
        print(before, peak() - before)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(upload)], check=True, capture_output=True, text=True)
    before, more = map(int, ran.stdout.split())
    assert before > LARGEST // MIB  # in MiB: the content was there when the measurement began
    assert more < 24


def test_botocore_is_not_imported_before_files_go_to_s3() -> None:
    names = "import sys, d2p_pipeline.wiring, d2p_pipeline.parquet.store; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", names], check=True, capture_output=True, text=True)
    assert not {"boto3", "botocore"} & set(ran.stdout.split())
