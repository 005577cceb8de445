"""Batches on their way from Redis to S3 through the Dagster job, while requests break in every step of an upload.

Each batch meets a fault of its own, known by its key. What may pass is repeated by the step's retry policy; what does not, or
not soon enough, puts the batch into recovery. When the faults are over, everything is there once and nothing is left over.
"""

import base64
import io
import os
from typing import Any

import pyarrow.parquet as pq
import pytest
from redis import Redis

from d2p_pipeline.buffer.protocol import BatchRef, Seal, Totals
from d2p_pipeline.orchestration.flush import retry_policy
from d2p_pipeline.orchestration.keys import RECOVERY
from d2p_pipeline.parquet import s3
from d2p_pipeline.parquet.s3 import S3Store
from d2p_pipeline_tests.fixtures.s3 import REGION, SMALL_PART, Fault, Proxy, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_proxy as s3_proxy
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import Pipeline, line

TRANSIENT: list[Fault] = ["500", "503", "reset", "lost", "stall"]
PERMANENT: list[Fault] = ["403", "expired"]
STEPS = ["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]
LONG = base64.b64encode(os.urandom(SMALL_PART)).decode()
"""Takes more than one part; compression does not help."""


class SmallParts(S3Store):
    """With parts smaller than the settings allow."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"part_bytes": SMALL_PART})


@pytest.fixture
def bucket(s3_service: Service, s3_proxy: Proxy, aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    name = s3_service.bucket()
    for setting, value in {
        "WRITER_TYPE": "aws-s3",
        "S3_BUCKET_NAME": name,
        "S3_REGION": REGION,
        "S3_ENDPOINT": s3_proxy.url,
        "S3_ATTEMPTS": "1",
        "S3_TIMEOUT": "4",
        "RECOVERY_DELAY": "0.001",
        "UNIT_BYTES": "1",  # each batch is a unit of its own, and fails by itself
    }.items():
        monkeypatch.setenv(f"D2P_{setting}", value)
    monkeypatch.setattr(s3, "S3Store", SmallParts)
    return name


def buffered(pipeline: Pipeline, redis_client: Redis, key: str, message: str) -> BatchRef:
    """A sealed batch of a good record and a bad one."""
    redis_client.rpush(f"data:{{{key}}}", b"\n".join([line(key, message), b"bad"]))
    [batch] = pipeline.buffer.seal([Seal(key, f"B-{key}", "age")])
    return batch.ref


def recover(pipeline: Pipeline) -> list[str]:
    """Deliver what is in recovery, all partitions in one run as a backfill does it; the keys that were."""
    from d2p_pipeline.definitions import defs

    batches = list(pipeline.buffer.recovering())
    partitions = pipeline.instance.get_dynamic_partitions(RECOVERY)
    assert sorted(partitions) == sorted(batch.id for batch in batches)
    ends = {"dagster/asset_partition_range_start": partitions[0], "dagster/asset_partition_range_end": partitions[-1]}
    assert defs.resolve_job_def("recover").execute_in_process(instance=pipeline.instance, tags=ends).success
    return sorted(batch.key for batch in batches)


def assert_everything_is_there_once(pipeline: Pipeline, s3_service: Service, bucket: str, keys: list[str]) -> None:
    """The message of each key's one good record begins with the key."""
    files = [io.BytesIO(s3_service.content(bucket, key)) for key in s3_service.keys(bucket)]
    messages = [
        message for file in files for message in pq.read_table(file, columns=["message"])["message"].to_pylist()
    ]
    assert sorted(message.removesuffix(LONG) for message in messages) == sorted(keys)
    assert s3_service.unfinished(bucket) == []
    assert dict(pipeline.buffer.totals()) == {key: Totals(accepted=2, rows=1, dead_letters=1) for key in keys}
    assert [len(pipeline.buffer.dead_letters(key)) for key in keys] == [1] * len(keys)
    assert [*pipeline.buffer.open_batches(), *pipeline.buffer.recovering()] == []


@pytest.mark.parametrize("step", STEPS)
def test_whatever_breaks_in_whichever_step_everything_arrives_once(
    pipeline: Pipeline, redis_client: Redis, bucket: str, s3_service: Service, s3_proxy: Proxy, step: str
) -> None:
    retries = retry_policy().max_retries
    cases: dict[str, tuple[Fault, int]] = {f"{fault}-passes": (fault, 1) for fault in TRANSIENT}
    cases |= {f"{fault}-stays": (fault, 1) for fault in PERMANENT}
    if step in ("PutObject", "UploadPart"):
        cases["503-stays"] = ("503", 1 + retries)
    if step == "CompleteMultipartUpload":
        cases["200-passes"] = ("200", 1)
    rest = "" if step == "PutObject" else LONG
    refs = [buffered(pipeline, redis_client, key, key + rest) for key in cases]
    for key, (fault, times) in cases.items():
        part = "[?&]partNumber=2$" if step == "UploadPart" else ""  # the parts are sent at the same time
        s3_proxy.break_next(step, fault, times, path=f"capability={key}/.*{part}")
    assert not pipeline.flush(*refs).success
    assert s3_proxy.to_break() == 0
    stayed = sorted(key for key in cases if key.endswith("stays"))
    assert sorted(batch.key for batch in pipeline.buffer.recovering()) == stayed
    assert recover(pipeline) == stayed
    assert_everything_is_there_once(pipeline, s3_service, bucket, list(cases))


def test_uploads_that_could_not_even_be_aborted_are_gone_when_their_batch_is_delivered(
    pipeline: Pipeline, redis_client: Redis, bucket: str, s3_service: Service, s3_proxy: Proxy
) -> None:
    cases: dict[str, Fault] = {str(fault): fault for fault in TRANSIENT + PERMANENT}
    refs = [buffered(pipeline, redis_client, key, key + LONG) for key in cases]
    for fault in cases.values():
        # One of the parts that are sent at the same time: what fails calls off those that are not under way yet.
        s3_proxy.break_next("UploadPart", "403", 1, path=f"capability={fault}/.*[?&]partNumber=2$")
        # The upload's own abort, then that of all the key has left.
        s3_proxy.break_next("AbortMultipartUpload", fault, 2, path=f"capability={fault}/")
    assert not pipeline.flush(*refs).success
    assert len(s3_service.unfinished(bucket)) >= len(cases) - 1  # the server may have done what it was asked
    assert len(recover(pipeline)) == len(cases)
    assert_everything_is_there_once(pipeline, s3_service, bucket, list(cases))
