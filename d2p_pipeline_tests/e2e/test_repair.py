"""Failures of every kind in the whole system, seen and repaired as people do it: through the webserver's GraphQL."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Batch, Claim, Push, Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline_tests.faults.struck_run import StruckRun
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.system import Start, System, partitions_in_recovery, until
from d2p_pipeline_tests.webhook import Webhook

pytestmark = pytest.mark.timeout(900)

IN_RECOVERY = 500
HOURS = 400
"""Files of the batch whose run is killed: enough to strike between two of them."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis", durable=False) as server:
        yield server


@pytest.fixture
def buffer(redis: EmbeddedRedis) -> Iterator[RedisBuffer]:
    with Redis.from_url(redis.url) as client:
        yield RedisBuffer(client, Names(), full_records=10**6, full_bytes=10**9)


def sealed(buffer: RedisBuffer, key: str, *messages: str) -> Batch:
    """A batch with one chunk per record, named after its key and first record."""
    for message in messages:
        record = line(key, message)
        buffer.push([Push(key, f"{key} {message}", 60, chunk=record, records=1, size=len(record))])
    [batch] = buffer.seal([Seal(key, f"B-{key}-{messages[0]}".replace(" ", "-"), "age")])
    return batch


def claimed(buffer: RedisBuffer, batch: Batch) -> Claim:
    claim = buffer.claim(batch.ref, "a run that died", 1000)
    assert claim
    return claim


def test_what_failed_is_repaired_by_a_backfill_and_nothing_is_lost_or_doubled(
    start: Start, redis: EmbeddedRedis, buffer: RedisBuffer
) -> None:
    expected: list[str] = []
    for number in range(IN_RECOVERY):
        batch = sealed(buffer, f"key {number % 10}", f"{number:03}")
        buffer.fail(claimed(buffer, batch), "disk full")
        expected.append(f"{number:03}")
    with Webhook() as webhook:
        system = start(
            redis_url=redis.url,
            try_auto_recover="false",
            flush_interval="1",
            redis_lock_ttl="3",
            recovery_run_batches="250",
            alert_webhook_url=webhook.url,
        ).wait()
        shutil.rmtree(system.root, ignore_errors=True)
        system.root.write_text("no directory")
        system.post(line("payments", "first"))
        until(lambda: len(partitions_in_recovery(system)) == IN_RECOVERY + 1)
        system.post(line("payments", "meanwhile"))
        until(lambda: len(partitions_in_recovery(system)) == IN_RECOVERY + 2)
        until(lambda: any("of key payments" in message["text"] for message in webhook.messages))
        system.root.unlink()
        backfill = system.backfill(partitions_in_recovery(system))
        expected += ["first", "meanwhile"]

        expected += kill_a_run_between_two_files(system)
        expected += reject_and_replay(system)

        until(lambda: system.backfill_status(backfill) not in ("REQUESTED", "COMPLETED"))
        assert system.backfill_status(backfill) == "COMPLETED_SUCCESS"
        runs = system.graphql(
            "query($id: String!) {partitionBackfillOrError(backfillId: $id) {... on PartitionBackfill {runs {status}}}}",
            id=backfill,
        )["partitionBackfillOrError"]["runs"]
        assert len(runs) == 3
        until(lambda: partitions_in_recovery(system) == [])
        until(lambda: len(system.messages()) >= len(expected))
        assert system.messages() == sorted(expected)
        until(lambda: checks(system).get("books_balance") == "SUCCEEDED")


def kill_a_run_between_two_files(system: System) -> list[str]:
    """Posts records of many hours, and kills the run that writes them when some of its files are there."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    messages = [f"hour {number}" for number in range(HOURS)]
    system.post(
        *(line("killed", message, (begin + timedelta(hours=n)).isoformat()) for n, message in enumerate(messages))
    )
    query = """{runsOrError(filter: {tags: [{key: "d2p/key", value: "killed"}]}) {... on Runs {results {
        runId status eventConnection {events {... on MessageEvent {message}}}}}}}"""

    def process() -> tuple[str, int] | None:
        for run in system.graphql(query)["runsOrError"]["results"]:
            for event in run["eventConnection"]["events"]:
                if found := re.search(r"\(pid: (\d+)\)", event.get("message", "")):
                    return run["runId"], int(found[1])
        return None

    run, pid = until(process, longest_pause=0.1)
    until(lambda: any(system.root.glob("capability=killed/**/*.parquet")), longest_pause=0.02)
    os.kill(pid, signal.SIGKILL)
    assert len(list(system.root.glob("capability=killed/**/*.parquet"))) < HOURS
    until(lambda: system.status(run) == "FAILURE")
    return messages


def reject_and_replay(system: System) -> list[str]:
    """A record without its level is rejected, seen in the catalogue, mended and replayed by a launched job."""
    answer = httpx.post(
        f"http://127.0.0.1:{system.port}/records", content=line("payments", "once rejected", level=None)
    ).json()
    assert (answer["accepted"], answer["dead_lettered"]) == (0, 1)
    inspection = system.launch("inspect")
    until(lambda: system.status(inspection) == "SUCCESS")
    asset = system.graphql(
        """{assetOrError(assetKey: {path: ["dead_letters"]}) {... on Asset {assetMaterializations(limit: 1) {
            metadataEntries {label ... on IntMetadataEntry {intValue}
                ... on TableMetadataEntry {table {records}}}}}}}"""
    )["assetOrError"]
    entries = {entry["label"]: entry for entry in asset["assetMaterializations"][0]["metadataEntries"]}
    assert entries["dead_letters"]["intValue"] == 1
    assert "level" in str(entries["reasons"]["table"]["records"])
    config = {"keys": ["payments"], "set_fields": {"level": "warn"}}
    replay = system.launch("replay_dead_letters", {"ops": {"replay_letters": {"config": config}}})
    until(lambda: system.status(replay) == "SUCCESS")
    return ["once rejected"]


def checks(system: System) -> dict[str, Any]:
    """Launches the inspection, and returns the newest result of every check."""
    run = system.launch("inspect")
    until(lambda: system.status(run) == "SUCCESS")
    [node] = system.graphql(
        """{assetNodes(assetKeys: [{path: ["parquet_files"]}]) {assetChecksOrError {... on AssetChecks {checks {
            name executionForLatestMaterialization {status}}}}}}"""
    )["assetNodes"]
    return {
        check["name"]: check["executionForLatestMaterialization"]["status"]
        for check in node["assetChecksOrError"]["checks"]
        if check["executionForLatestMaterialization"]
    }


def test_a_restart_takes_up_batches_in_every_state(start: Start, redis: EmbeddedRedis, buffer: RedisBuffer) -> None:
    settings = {"redis_url": redis.url, "flush_interval": "3600", "redis_lock_ttl": "2", "unit_bytes": "500"}
    first = start(**settings).wait()
    first.post(line("buffered", "buffered"))
    first.process.kill()
    first.process.wait()

    expected = ["sealed", "claimed", "one", "two", "three", "failed", "given up"]
    sealed(buffer, "sealed", "sealed")
    claimed(buffer, sealed(buffer, "claimed", "claimed"))
    die_after_the_first_unit(sealed(buffer, "half", "one", "two", "three"), redis, first.root)
    failed, given_up = sealed(buffer, "failed", "failed"), sealed(buffer, "given up", "given up")
    for batch in (failed, given_up):
        buffer.fail(claimed(buffer, batch), "disk full")
    buffer.retry_at(failed.ref, 1)

    second = start(**settings).wait()
    flush = second.launch("flush", {"ops": {"plan_units": {"config": {"keys": ["buffered"]}}}})
    until(lambda: second.status(flush) == "SUCCESS")
    until(lambda: given_up.id in partitions_in_recovery(second))
    by_hand = second.launch("recover", tags={"dagster/partition": given_up.id})
    until(lambda: second.status(by_hand) == "SUCCESS")
    until(lambda: len(second.messages()) >= len(expected) + 1)
    assert second.messages() == sorted([*expected, "buffered"])
    until(lambda: partitions_in_recovery(second) == [])
    assert list(buffer.open_batches()) == list(buffer.recovering()) == []
    assert {key: totals.rows for key, totals in buffer.totals()} == {
        **dict.fromkeys(("buffered", "sealed", "claimed", "failed", "given up"), 1),
        "half": 3,
    }


def die_after_the_first_unit(batch: Batch, redis: EmbeddedRedis, root: Path) -> None:
    settings = {"redis_url": redis.url, "writer_file_path": str(root), "unit_bytes": "500", "redis_lock_ttl": "2"}
    run = StruckRun(root.with_name("struck.log"), [batch.ref], "after:acknowledge:1", settings=settings)
    assert run.wait() == -signal.SIGKILL, run.output()
