"""The whole system as users start it: `d2p up` with real processes, from the HTTP request to the Parquet file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.fixtures.s3 import REGION, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.system import Start, until

pytestmark = pytest.mark.timeout(240)


def test_a_posted_record_is_in_a_file_and_in_the_ui_and_survives_a_restart(start: Start) -> None:
    system = start().wait()
    system.post(line("payments", "first"))
    until(lambda: system.messages() == ["first"], seconds=60)

    [run] = until(
        lambda: system.graphql(
            "{runsOrError(filter: {statuses: [SUCCESS]}) {... on Runs {results {tags {key value}}}}}"
        )["runsOrError"]["results"]
    )
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert tags["d2p/key"] == "payments"
    [file] = system.root.rglob("*.parquet")
    assert file.name == f"{tags['d2p/batch']}-0.parquet"
    asset = system.graphql(
        """{assetOrError(assetKey: {path: "parquet_files"}) {... on Asset {assetMaterializations {
            partition metadataEntries {label ... on IntMetadataEntry {intValue}}}}}}"""
    )["assetOrError"]
    [materialization] = asset["assetMaterializations"]
    figures = {entry["label"]: entry.get("intValue") for entry in materialization["metadataEntries"]}
    assert (materialization["partition"], figures["dagster/row_count"]) == ("payments", 1)

    assert httpx.post(f"http://127.0.0.1:{system.port}/healthcheck/").status_code == 405
    assert system.stop() == 0, system.log.read_text()

    again = start(flush_interval="3600", buffer_size="1000000").wait()
    again.post(line("payments", "second"))
    assert again.stop(signal.SIGTERM) == 0
    assert "1 records wait in Redis" in again.log.read_text()
    third = start(flush_interval="1").wait()
    until(lambda: third.messages() == ["first", "second"], seconds=60)


def test_two_instances_on_one_redis_that_restarts_deliver_everything_once(start: Start, tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "redis").start()
    settings = {"redis_url": redis.url, "writer_file_path": str(tmp_path / "out"), "flush_interval": "1"}
    one, two = start("one", **settings), start("two", **settings)
    one.wait()
    two.wait()
    expected: list[str] = []
    for number in range(20):
        system, key = (one, two)[number % 2], f"key {number % 4}"
        system.post(line(key, f"{number:03}"))
        expected.append(f"{number:03}")
        if number == 10:
            assert redis.process
            redis.process.kill()
            redis.process.wait()
            redis.stop()
            redis = EmbeddedRedis(tmp_path / "redis").start()
    with Redis.from_url(redis.url) as producer:
        producer.rpush("data:{foreign}", line("foreign", "pushed"))
    until(lambda: len(one.messages()) >= 21, seconds=120)
    assert one.messages() == sorted([*expected, "pushed"])
    assert one.stop() == two.stop() == 0
    assert one.messages() == sorted([*expected, "pushed"])
    redis.stop()


def test_the_whole_system_writes_to_s3_under_an_assumed_role_and_shows_no_secret(
    start: Start, s3_service: Service, aws_environment: None
) -> None:
    bucket = s3_service.bucket()
    system = start(
        writer_type="aws-s3",
        s3_bucket_name=bucket,
        s3_prefix="logs",
        s3_region=REGION,
        s3_endpoint=s3_service.url,
        s3_role_arn="arn:aws:iam::123456789012:role/d2p",
        s3_sts_endpoint=s3_service.url,
        flush_interval="1",
        tokens="a-token-nobody-sees",
    ).wait()
    answer = httpx.post(
        f"http://127.0.0.1:{system.port}/records",
        content=line("payments", "to S3"),
        headers={"authorization": "Bearer a-token-nobody-sees"},
    )
    assert answer.json()["accepted"] == 1
    [key] = until(lambda: [key for key in s3_service.keys(bucket) if key.endswith(".parquet")])
    assert key.startswith("logs/capability=payments/year=2026/month=11/day=21/hour=10/")
    query = "{runsOrError {... on Runs {results {runConfigYaml tags {key value}}}}}"
    shown = json.dumps(system.graphql(query)) + "".join(
        log.read_text(errors="replace") for log in [system.log, *(system.directory / ".d2p/logs").iterdir()]
    )
    for secret in ("a-token-nobody-sees", os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in shown
    assert system.stop() == 0


def test_a_target_that_cannot_be_written_is_said_at_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    system = start(writer_file_path=str(tmp_path / "file"))
    assert system.process.wait(60) == 2
    assert f"files cannot be written to {tmp_path / 'file'}" in system.log.read_text()


def test_demo_balances_its_books(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "d2p_pipeline.cli.main",
        "demo",
        "--exit",
        "--records",
        "5000",
        "--bad-ratio",
        "0.02",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("D2P_", "DAGSTER_"))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "received 5,000 = rows 4,900 + dead letters 100" in done.stdout
    assert "the books balance" in done.stdout


def test_status_shows_what_waits(tmp_path: Path, redis_server: EmbeddedRedis, redis_client: Redis) -> None:
    redis_client.rpush("data:{payments}", line(), line())
    environment = {**os.environ, "D2P_REDIS_URL": redis_server.url}
    command = [sys.executable, "-m", "d2p_pipeline.cli.main", "status", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    status = json.loads(done.stdout)
    assert status["keys"]["payments"]["buffered"] == 2
    buffer = RedisBuffer(redis_client, Names(), full_records=10, full_bytes=1000)
    [batch] = buffer.seal([Seal("payments", "B1", "age")])
    claim = buffer.claim(batch.ref, "run", 1000)
    assert claim
    buffer.fail(claim, "disk full")
    done = subprocess.run(command[:-1], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "in recovery: batch B1 of 'payments', failed 1 times: disk full" in done.stdout.replace("\n", " ")
