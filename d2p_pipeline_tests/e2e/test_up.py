"""The whole system as users start it: `d2p up` with real processes, from the HTTP request to the Parquet file."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest import forward_sender
from d2p_pipeline.orchestration.code_server import PRELOADED
from d2p_pipeline_tests.fixtures.s3 import REGION, Service
from d2p_pipeline_tests.fixtures.s3 import aws_environment as aws_environment
from d2p_pipeline_tests.fixtures.s3 import s3_service as s3_service
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.system import Start, System, free_port, until

pytestmark = pytest.mark.timeout(600)


SECRET = "swordfish"
TOKEN = f"token-{SECRET}"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SECRETS = {
    "use_hmac": "true",
    "hmac_key": f"hmac-{SECRET}",
    "forward_shared_key": f"shared-{SECRET}",
    "alert_webhook_url": f"http://127.0.0.1:1/{SECRET}",
}


def test_what_two_systems_are_sent_is_in_s3_once_and_in_the_ui_whatever_happens_to_redis_and_no_secret_is_shown(
    s3_service: Service, aws_environment: None, start: Start, tmp_path: Path
) -> None:
    """One after the other, because starting a system is what costs most."""
    bucket = s3_service.bucket()
    settings = {
        "writer_type": "aws-s3",
        "s3_bucket_name": bucket,
        "s3_prefix": "logs",
        "s3_region": REGION,
        "s3_endpoint": s3_service.url,
        "s3_role_arn": "arn:aws:iam::123456789012:role/d2p",
        "s3_sts_endpoint": s3_service.url,
        "tokens": TOKEN,
        "flush_interval": "3600",
        "own_runs": "0",
        "forward_port": (forward_port := str(free_port())),
        **SECRETS,
    }
    # The first system's own Redis, in our hands: the system finds it where it would start it.
    redis = EmbeddedRedis(tmp_path / "one" / ".d2p" / "redis").start()
    systems = [
        start("one", **settings),
        start("two", **settings | {"redis_url": redis.url, "forward_port": str(free_port())}),
    ]
    for system in systems:
        system.wait()
        assert {address for address, _ in listening(system.process.pid)} == {"127.0.0.1"}
        assert [one for one in commands(system.process.pid) if "forkserver" in one and PRELOADED in one]
    assert systems[0].client.post(f"http://127.0.0.1:{systems[0].port}/records", content=line()).status_code == 401
    post(systems[0], "payments", "first")
    flush(systems[1])
    until(lambda: any(key.endswith(".parquet") for key in s3_service.keys(bucket)))
    assert messages(s3_service, bucket) == ["first"]
    a_delivery_is_shown(systems, s3_service.keys(bucket))

    forward_sender.send(
        [line("payments", "second")], f"127.0.0.1:{forward_port}", shared_key=SECRETS["forward_shared_key"]
    )
    with Redis.from_url(redis.url) as producer:
        producer.rpush("data:{foreign}", line("foreign", "pushed"))
    for number in range(20):
        post(systems[number % 2], f"key {number // 2 % 2}", f"{number:03}")
        if number % 5 == 0:
            flush(systems[number % 2])
        if number == 10:
            assert redis.process
            redis.process.kill()
            redis.process.wait()
            redis.stop()
            redis = EmbeddedRedis(system_home(systems[0]) / "redis").start()
    flush(systems[0])
    expected = sorted([f"{number:03}" for number in range(20)] + ["first", "second", "pushed"])
    with Redis.from_url(redis.url) as client:
        buffer = RedisBuffer(client, Names(), full_records=10, full_bytes=1000)
        until(lambda: sum(totals.rows for _, totals in buffer.totals()) == len(expected))
        told = "".join(map(secrets_are_nowhere, systems))
        assert "payments" in told
        post(systems[0], "payments", "left over")
        for system, end, place in zip(
            systems, (signal.SIGINT, signal.SIGTERM), ("embedded, under", redis.url), strict=True
        ):
            assert system.stop(end) == 0
            log = system.log.read_text()
            assert f"Redis      {place}" in log
            assert "1 records wait in Redis" in log
        assert [(state.key, state.records) for state in buffer.waiting()] == [("payments", 1)]
    assert messages(s3_service, bucket) == expected
    redis.stop()


def flush(system: System) -> None:
    assert system.client.post(f"http://127.0.0.1:{system.port}/flush/", headers=BEARER).status_code == 202


def post(system: System, key: str, message: str) -> None:
    url = f"http://127.0.0.1:{system.port}/records"
    assert system.client.post(url, content=line(key, message), headers=BEARER).json()["accepted"] == 1


def system_home(system: System) -> Path:
    return system.directory / ".d2p"


def a_delivery_is_shown(systems: list[System], keys: list[str]) -> None:
    """The one run, with its tags and its materialization, by the system that took it."""
    query = "{runsOrError(filter: {statuses: [SUCCESS]}) {... on Runs {results {tags {key value}}}}}"

    def delivered() -> list[tuple[System, Any]]:
        return [(system, run) for system in systems for run in system.graphql(query)["runsOrError"]["results"]]

    [(system, run)] = until(delivered)
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert tags["d2p/key"] == "payments"
    [file] = (key for key in keys if key.endswith(".parquet"))
    assert file.endswith(f"/{tags['d2p/batch']}-0.parquet")
    asset = system.graphql(
        """{assetOrError(assetKey: {path: "parquet_files"}) {... on Asset {assetMaterializations {
            partition metadataEntries {label ... on IntMetadataEntry {intValue}}}}}}"""
    )["assetOrError"]
    [materialization] = asset["assetMaterializations"]
    figures = {entry["label"]: entry.get("intValue") for entry in materialization["metadataEntries"]}
    assert (materialization["partition"], figures["dagster/row_count"]) == ("payments", 1)


def secrets_are_nowhere(system: System) -> str:
    """Neither in what Dagster tells and stores, nor in logs, nor where `ps` looks; and no op's value was pickled. Returns what
    Dagster tells."""
    told = str(
        system.graphql(
            """{instance {info} runsOrError {... on Runs {results {runConfigYaml tags {key value}
            eventConnection {events {... on MessageEvent {message}}}}}}
            topLevelResourceDetailsOrError(resourceSelector: {repositoryName: "__repository__",
            repositoryLocationName: "d2p", resourceName: "delivery_parts"}) {
            ... on ResourceDetails {configuredValues {value}}}}"""
        )
    )
    home = system_home(system)
    files = [system.log, *(file for file in home.rglob("*") if file.is_file())]
    found: list[bytes] = []
    for file in (*files, *Path("/proc").glob("[0-9]*/cmdline")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(file.read_bytes())
    for secret in (SECRET, os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in told
        assert not [text for text in found if secret.encode() in text]
    for private in ("dagster", "logs", "redis"):
        assert not (home / private).exists() or (home / private).stat().st_mode & 0o077 == 0
    assert not [path for path in (home / "dagster" / "storage").rglob("*") if path.is_file()]
    return told


def commands(process: int) -> list[str]:
    """The command lines of what a process started."""
    import psutil

    return [" ".join(one.cmdline()) for one in psutil.Process(process).children(recursive=True)]


def listening(process: int) -> set[tuple[str, int]]:
    """Addresses and ports that a process and what it started listen on."""
    import psutil

    family = psutil.Process(process)
    return {
        (connection.laddr.ip, connection.laddr.port)
        for one in [family, *family.children(recursive=True)]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def messages(s3_service: Service, bucket: str) -> list[str]:
    keys = [key for key in s3_service.keys(bucket) if key.endswith(".parquet")]
    assert all(key.startswith("logs/capability=") for key in keys)
    files = [io.BytesIO(s3_service.content(bucket, key)) for key in keys]
    return sorted(message for file in files for message in pq.read_table(file)["message"].to_pylist())


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
    assert "in recovery: batch B1 of payments, failed 1 times: disk full" in done.stdout.replace("\n", " ")
