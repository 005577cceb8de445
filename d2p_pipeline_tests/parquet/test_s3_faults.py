"""Requests that break, one at a time and in every way: the error tells what to do, and a retry leaves the file once and whole."""

import threading
from dataclasses import replace

import pytest

from d2p_pipeline.parquet.errors import PermanentStoreError, StoreError, TransientStoreError
from d2p_pipeline.parquet.s3 import Bucket, Role, S3Store
from d2p_pipeline_tests.fixtures.s3 import REGION, SMALL_PART, Fault, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service

pytestmark = pytest.mark.usefixtures("aws_environment")

SMALL = b"small"
LARGE = bytes(range(256)) * (SMALL_PART // 256) + b"the last part"

TRANSIENT: list[Fault] = ["500", "503", "reset", "lost", "stall"]
PERMANENT: list[Fault] = ["403", "expired"]
STEPS = [
    ("PutObject", SMALL),
    ("CreateMultipartUpload", LARGE),
    ("UploadPart", LARGE),
    ("CompleteMultipartUpload", LARGE),
]
BREAKS = [
    *((step, data, fault) for step, data in STEPS for fault in [*TRANSIENT, *PERMANENT]),
    ("CompleteMultipartUpload", LARGE, "200"),
]


@pytest.fixture
def bucket(s3_service: Service, s3_proxy: Proxy) -> Bucket:
    return Bucket(s3_service.bucket(), region=REGION, endpoint=s3_proxy.url, path_style=True)


def open_store(bucket: Bucket, *, attempts: int = 1, timeout: float = 20.0) -> S3Store:
    return S3Store(bucket, attempts=attempts, timeout=timeout, part_bytes=SMALL_PART)


@pytest.mark.parametrize(("step", "data", "fault"), BREAKS)
def test_a_write_that_broke_leaves_nothing_behind_and_succeeds_when_repeated(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket, step: str, data: bytes, fault: Fault
) -> None:
    store = open_store(bucket, timeout=2.0 if fault == "stall" else 20.0)
    s3_proxy.break_next(step, fault)
    with pytest.raises(PermanentStoreError if fault in PERMANENT else TransientStoreError) as caught:
        store.write("x.parquet", data)
    assert caught.value.target == f"s3://{bucket.name}/x.parquet"
    assert s3_service.unfinished(bucket.name) == []
    # Whole, where the server did what it was asked and only the answer was lost; otherwise not there.
    arrived = fault == "lost" and step in ("PutObject", "CompleteMultipartUpload")
    assert [s3_service.content(bucket.name, key) for key in s3_service.keys(bucket.name)] == [data] * arrived

    store.write("x.parquet", data)
    assert s3_service.keys(bucket.name) == ["x.parquet"]
    assert s3_service.content(bucket.name, "x.parquet") == data
    assert s3_service.unfinished(bucket.name) == []


@pytest.mark.parametrize(("step", "data"), STEPS)
@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_a_single_fault_is_not_noticed_when_the_client_may_try_again(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket, step: str, data: bytes, fault: Fault
) -> None:
    s3_proxy.break_next(step, fault)
    open_store(bucket, attempts=3).write("x.parquet", data)
    assert s3_service.content(bucket.name, "x.parquet") == data
    assert s3_service.unfinished(bucket.name) == []


def test_an_upload_that_began_twice_because_the_answer_was_lost_leaves_none(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket
) -> None:
    s3_proxy.break_next("CreateMultipartUpload", "lost")
    open_store(bucket, attempts=3).write("x.parquet", LARGE)
    assert s3_proxy.operations().count("CreateMultipartUpload") == 2
    assert s3_service.unfinished(bucket.name) == []
    assert s3_service.content(bucket.name, "x.parquet") == LARGE


def test_a_permanent_fault_is_not_tried_again(s3_proxy: Proxy, bucket: Bucket) -> None:
    s3_proxy.break_next("PutObject", "403")
    with pytest.raises(PermanentStoreError):
        open_store(bucket, attempts=5).write("x.parquet", SMALL)
    assert s3_proxy.operations() == ["PutObject"]


def test_a_retry_removes_what_a_killed_process_left_of_the_same_file_alone(s3_service: Service, bucket: Bucket) -> None:
    for key in ("x.parquet", "x.parquet", "x.parquet.other", "y.parquet"):
        s3_service.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    open_store(bucket).write("x.parquet", LARGE)
    assert sorted(s3_service.unfinished(bucket.name)) == ["x.parquet.other", "y.parquet"]


@pytest.mark.parametrize("step", ["AbortMultipartUpload", "ListMultipartUploads"])
def test_leftovers_that_cannot_be_removed_are_a_warning_and_the_file_is_there(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    s3_service.client.create_multipart_upload(Bucket=bucket.name, Key="x.parquet")
    s3_proxy.break_next(step, "403")
    open_store(bucket).write("x.parquet", LARGE)
    assert s3_service.content(bucket.name, "x.parquet") == LARGE
    [warning] = [record for record in caplog.records if record.name == "d2p_pipeline.parquet.s3"]
    assert "cannot remove unfinished uploads of" in warning.getMessage()
    assert "allow s3:" in warning.getMessage()


def test_a_failed_write_keeps_its_own_error_when_the_abort_fails_too(
    s3_service: Service, s3_proxy: Proxy, bucket: Bucket
) -> None:
    s3_proxy.break_next("UploadPart", "503")
    s3_proxy.break_next("AbortMultipartUpload", "500", times=2)
    with pytest.raises(TransientStoreError, match="SlowDown"):
        open_store(bucket).write("x.parquet", LARGE)
    assert s3_service.unfinished(bucket.name) == ["x.parquet"]
    open_store(bucket).write("x.parquet", LARGE)
    assert s3_service.unfinished(bucket.name) == []


def test_two_writers_of_one_file_end_with_that_file(s3_service: Service, bucket: Bucket) -> None:
    store = open_store(bucket)

    def write() -> None:
        while True:
            try:
                return store.write("x.parquet", LARGE)
            except TransientStoreError as error:
                assert error.code == "NoSuchUpload"

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert s3_service.content(bucket.name, "x.parquet") == LARGE
    assert s3_service.unfinished(bucket.name) == []


@pytest.mark.parametrize("fault", [*TRANSIENT, *PERMANENT])
def test_a_broken_listing_is_told_apart_too(s3_proxy: Proxy, bucket: Bucket, fault: Fault) -> None:
    s3_proxy.break_next("ListObjectsV2", fault)
    with pytest.raises(PermanentStoreError if fault in PERMANENT else TransientStoreError):
        open_store(bucket, timeout=2.0 if fault == "stall" else 20.0).scan()


@pytest.mark.parametrize("fault", [*TRANSIENT, *PERMANENT])
def test_a_broken_role_assumption_is_told_apart_too(s3_proxy: Proxy, bucket: Bucket, fault: Fault) -> None:
    s3_proxy.break_next("AssumeRole", fault)
    role = Role("arn:aws:iam::123456789012:role/writer", sts_endpoint=s3_proxy.url)
    store = open_store(replace(bucket, role=role), timeout=2.0 if fault == "stall" else 20.0)
    with pytest.raises(StoreError) as caught:
        store.write("x.parquet", SMALL)
    assert isinstance(caught.value, PermanentStoreError if fault in PERMANENT else TransientStoreError)
    store.write("x.parquet", SMALL)
