"""Failures of every kind in the whole system, seen and repaired as people do it: through the webserver's GraphQL.

With FULL_SIZE=1 there are 500 batches in recovery and 100,000 dead letters, whose memory is measured, too.
"""

import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.names import Names
from d2p_pipeline.buffer.protocol import Batch, Claim, Push, Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.spill import FILE_LETTERS
from d2p_pipeline_tests.faults.struck_run import StruckRun
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.system import Start, System, block, partitions_in_recovery, peak_mb, until
from d2p_pipeline_tests.webhook import Webhook

pytestmark = pytest.mark.timeout(900)

IS_FULL = os.environ.get("FULL_SIZE") == "1"
IN_RECOVERY = 500 if IS_FULL else 60
DEAD_LETTERS = 100_000 if IS_FULL else 5000
QUEUED_LETTERS = DEAD_LETTERS // 10
"""What may stay in Redis of them."""
LETTERS = "letters"
"""Their key."""
LETTERS_MB = 80
"""What 100,000 have in bytes; as objects in memory they would take more."""
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


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Open."""
    gate = tmp_path / "gate" / "closed"
    gate.parent.mkdir()
    monkeypatch.setenv("GATE", str(gate))
    return gate


@pytest.fixture(autouse=True)
def hurried_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's daemon looks at backfills and at freshness every two seconds instead of thirty."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("hurried")), prepend=os.pathsep)
    monkeypatch.setenv("FRESHNESS_DAEMON_INTERVAL_SECONDS", "2")


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
    redis: EmbeddedRedis, buffer: RedisBuffer, start: Start, gate: Path
) -> None:
    """One system goes through it all, because starting one is what costs most."""
    expected: list[str] = []
    for number in range(IN_RECOVERY):
        batch = sealed(buffer, f"key {number % 10}", f"{number:03}")
        buffer.fail(claimed(buffer, batch), "disk full")
        expected.append(f"{number:03}")
    fill_dead_letters(buffer)
    with Webhook() as webhook:
        settings = {
            "redis_url": redis.url,
            "try_auto_recover": "false",
            "flush_interval": "1",
            "redis_lock_ttl": "6",
            "recovery_run_batches": str(IN_RECOVERY // 2 + 1),
            "dlq_max_records": str(QUEUED_LETTERS),
            "alert_webhook_url": webhook.url,
            "transform": "d2p_pipeline_tests.e2e.gate:pass_gate",
        }
        system = start(**settings).wait()
        blocked = block(system, "payments")
        system.post(line("payments", "first"))
        until(lambda: len(partitions_in_recovery(system)) == IN_RECOVERY + 1)
        system.post(line("payments", "meanwhile"))
        until(lambda: len(partitions_in_recovery(system)) == IN_RECOVERY + 2)
        until(lambda: any("of key payments" in message["text"] for message in webhook.messages))
        blocked.unlink()
        first_backfill = system.backfill(partitions_in_recovery(system))
        expected += ["first", "meanwhile"]

        expected += kill_a_run_between_two_files(system)
        expected += reject_and_replay(system)

        until(lambda: system.backfill_status(first_backfill) not in ("REQUESTED", "COMPLETED"))
        assert system.backfill_status(first_backfill) == "COMPLETED_SUCCESS"
        runs = system.graphql(
            "query($id: String!) {partitionBackfillOrError(backfillId: $id) {... on PartitionBackfill {runs {status}}}}",
            id=first_backfill,
        )["partitionBackfillOrError"]["runs"]
        assert len(runs) == 2
        until(lambda: len(system.messages(besides=LETTERS)) >= len(expected))
        assert system.messages(besides=LETTERS) == sorted(expected)

        lost = lose_runs_with_their_host(system, buffer, gate)
        expected += leave_batches_in_every_state(system, redis, buffer)
        system = start(**settings, own_runs="0").wait()  # fewer runs: what each key's own run does is seen above
        until(lambda: [system.status(run) for run in lost] == ["FAILURE", "FAILURE"])
        waiting = ["B-given-up-given-up", "B-lost-in-recovery-lost-in-recovery"]  # for a person
        until(lambda: sorted(partitions_in_recovery(system)) == waiting)
        backfill = system.backfill(waiting)
        until(lambda: system.backfill_status(backfill) == "COMPLETED_SUCCESS")
        expected += ["lost", "lost in recovery"]
        until(lambda: len(system.messages(besides=LETTERS)) >= len(expected))
        assert system.messages(besides=LETTERS) == sorted(expected)
        until(lambda: system.rows(LETTERS)[0] >= DEAD_LETTERS)
        assert system.rows(LETTERS) == (DEAD_LETTERS, DEAD_LETTERS)
        until(lambda: partitions_in_recovery(system) == [])
        assert list(buffer.open_batches()) == list(buffer.recovering()) == []
        until(lambda: checks(system).get("books_balance") == "SUCCEEDED")
        until(lambda: freshness(system) == {"parquet_files": "HEALTHY", "dead_letters": "HEALTHY"})


def fill_dead_letters(buffer: RedisBuffer) -> None:
    """Many letters of one key, all without their level."""
    fill = "x" * 500
    for start in range(0, DEAD_LETTERS, 5000):
        letters = [
            DeadLetter(
                reason="level: missing",
                stage="receive",
                received_at=number,
                raw=line(LETTERS, f"{number} {fill}", level=None),
                id=str(number),
            )
            for number in range(start, start + 5000)
        ]
        pushed = [letter.to_json() for letter in letters]
        buffer.push([Push(LETTERS, f"letters {start}", 60, rejected=len(pushed), dead_letters=pushed)])


def kill_a_run_between_two_files(system: System) -> list[str]:
    """Posts records of many hours, and kills the run that writes them when some of its files are there."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    messages = [f"hour {number}" for number in range(HOURS)]
    system.post(
        *(line("killed", message, (begin + timedelta(hours=n)).isoformat()) for n, message in enumerate(messages))
    )
    run = until(lambda: system.runs_of("killed"), longest_pause=0.1)[-1]
    pid = until(lambda: system.process_of(run), longest_pause=0.1)
    until(lambda: any(system.root.glob("capability=killed/**/*.parquet")), longest_pause=0.02)
    os.kill(pid, signal.SIGKILL)
    assert len(list(system.root.glob("capability=killed/**/*.parquet"))) < HOURS
    until(lambda: system.status(run) == "FAILURE")
    return messages


def reject_and_replay(system: System) -> list[str]:
    """A record without its level is rejected, seen in the catalogue, mended and replayed by launched jobs; so are all the
    letters that were there before, most of them from files. No run needs more memory for 100,000 than for none."""
    answer = system.client.post(
        f"http://127.0.0.1:{system.port}/records", content=line("payments", "once rejected", level=None)
    ).json()
    assert (answer["accepted"], answer["dead_lettered"]) == (0, 1)
    peaks = {"spilled": peak_of(system, system.launch("spill_dead_letters"))}
    files = list(system.root.glob(f"_dead_letters/capability={LETTERS}/*.zst"))
    assert len(files) * min(FILE_LETTERS, QUEUED_LETTERS) > DEAD_LETTERS / 2
    peaks["listed"] = peak_of(system, system.launch("inspect"))
    asset = system.graphql(
        """{assetOrError(assetKey: {path: ["dead_letters"]}) {... on Asset {assetMaterializations(limit: 1) {
            metadataEntries {label ... on IntMetadataEntry {intValue}
                ... on TableMetadataEntry {table {records}}}}}}}"""
    )["assetOrError"]
    entries = {entry["label"]: entry for entry in asset["assetMaterializations"][0]["metadataEntries"]}
    assert entries["dead_letters"]["intValue"] == DEAD_LETTERS + 1
    reasons = [json.loads(record) for record in entries["reasons"]["table"]["records"]]
    assert [(row["key"], row["letters"]) for row in reasons] == [(LETTERS, DEAD_LETTERS), ("payments", 1)]
    assert all("level" in row["reason"] for row in reasons)
    config = {"ops": {"replay_letters": {"config": {"set_fields": {"level": "warn"}}}}}
    peaks["replayed"] = peak_of(system, system.launch("replay_dead_letters", config))
    if IS_FULL:
        assert all(peaks.values())
        peaks["none left"] = peak_of(system, system.launch("inspect"))
        more = {what: peak - peaks["none left"] for what, peak in peaks.items()}
        assert max(more.values()) < LETTERS_MB / 2, peaks
    assert list((system.root / "_dead_letters").rglob("*.zst")) == []
    return ["once rejected"]


def peak_of(system: System, run: str) -> int:
    """What a run's process needed (MB), when the run has succeeded."""
    process = until(lambda: system.process_of(run), longest_pause=0.1)
    peak = 0

    def has_ended() -> bool:
        nonlocal peak
        peak = max(peak, peak_mb(process))
        return system.status(run) in ("SUCCESS", "FAILURE")

    until(has_ended, longest_pause=0.1 if IS_FULL else 0.5)
    assert system.status(run) == "SUCCESS"
    return peak


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


def freshness(system: System) -> dict[str, str]:
    nodes = system.graphql("{assetNodes {assetKey {path} freshnessStatusInfo {freshnessStatus}}}")["assetNodes"]
    found = {node["assetKey"]["path"][0]: node["freshnessStatusInfo"] for node in nodes}
    return {name: status["freshnessStatus"] for name, status in found.items() if status}


def lose_runs_with_their_host(system: System, buffer: RedisBuffer, gate: Path) -> list[str]:
    """Kills everything while a flush and a recovery are at work; returns the runs."""
    gate.touch()
    failed = sealed(buffer, "lost-in-recovery", "lost in recovery")
    buffer.fail(claimed(buffer, failed), "disk full")
    buffer.retry_at(failed.ref, 1)
    system.post(line("lost", "lost"))
    runs = [until(lambda key=key: system.runs_of(key))[0] for key in ("lost", "lost-in-recovery")]
    processes = [until(lambda run=run: system.process_of(run)) for run in runs]
    until(lambda: len(list(gate.parent.glob("lost*"))) == 2)
    system.process.kill()
    system.process.wait()
    for process in processes:
        os.kill(process, signal.SIGKILL)
    gate.unlink()
    return runs


def leave_batches_in_every_state(system: System, redis: EmbeddedRedis, buffer: RedisBuffer) -> list[str]:
    """What a system can find when it starts; returns what it delivers without being asked, or from the partition `given up`."""
    buffer.push([Push("buffered", "1", 60, chunk=line("buffered", "buffered"), records=1, size=1)])
    sealed(buffer, "sealed", "sealed")
    claimed(buffer, sealed(buffer, "claimed", "claimed"))
    die_after_the_first_unit(sealed(buffer, "half", "one", "two", "three"), redis, system.root)
    failed, given_up = sealed(buffer, "failed", "failed"), sealed(buffer, "given up", "given up")
    for batch in (failed, given_up):
        buffer.fail(claimed(buffer, batch), "disk full")
    buffer.retry_at(failed.ref, 1)
    return ["buffered", "sealed", "claimed", "one", "two", "three", "failed", "given up"]


def die_after_the_first_unit(batch: Batch, redis: EmbeddedRedis, root: Path) -> None:
    settings = {"redis_url": redis.url, "writer_file_path": str(root), "unit_bytes": "500", "redis_lock_ttl": "2"}
    run = StruckRun(root.with_name("struck.log"), [batch.ref], "after:acknowledge:1", settings=settings)
    assert run.wait() == -signal.SIGKILL, run.output()
