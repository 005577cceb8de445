"""Spilling, replaying and discarding dead letters, killed with SIGKILL between any two steps, and repeated: each letter once."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from redis import Redis

from d2p_pipeline import books
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.protocol import Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.dead_letters import DeadLetters, Selection
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.records import chunk
from d2p_pipeline.spill import Limits
from d2p_pipeline_tests.faults.dying_letters import work
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.test_dead_letters import reject

MESSAGES = [str(number) for number in range(100)]


@pytest.fixture
def letters(
    redis_buffer: RedisBuffer, redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DeadLetters:
    """A hundred of them; the limit is forty."""
    values = {"REDIS_URL": redis_server.url, "WRITER_FILE_PATH": str(tmp_path), "DLQ_MAX_RECORDS": "40"}
    for name, value in values.items():
        monkeypatch.setenv(f"D2P_{name}", value)
    reject(redis_buffer, "payments", *[line(message=message) for message in MESSAGES])
    return DeadLetters(redis_buffer, lambda: LocalStore(tmp_path))


def kill(point: str, what: str, buffer: RedisBuffer) -> None:
    command = [sys.executable, "-m", "d2p_pipeline_tests.faults.dying_letters", point, what]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert books.differences(buffer, books.read(buffer)) == {}


def sent(client: Redis, *keys: str) -> Counter[str]:
    """Messages in buffers."""
    chunks = [element for key in keys for element in client.lrange(f"data:{{{key}}}", 0, -1)]
    bodies = [chunk.decode(element).body for element in chunks if isinstance(element, bytes)]
    return Counter(json.loads(one)["message"] for body in bodies for one in body.splitlines())


def files(root: Path) -> list[Path]:
    return list(root.rglob("*.zst"))


@pytest.mark.parametrize(
    "point",
    ["before:rename:1", "after:rename:1", "after:write:1", "after:spill:1", "after:write:2", "after:spill:2"],
)
def test_a_spill_killed_and_repeated_keeps_every_letter_once(
    letters: DeadLetters, redis_buffer: RedisBuffer, tmp_path: Path, point: str
) -> None:
    kill(point, "spill", redis_buffer)
    work("spill")
    assert [json.loads(stored.letter.raw)["message"] for stored in letters.select(Selection())] == MESSAGES
    assert len(files(tmp_path)) == 2
    assert dict(redis_buffer.totals()) == {"payments": Totals(100, 0, 100)}


@pytest.mark.parametrize(
    "point",
    [
        "before:intend:1",
        "after:intend:1",
        "after:push:1",
        "after:end:1",
        "after:intend:2",
        "after:push:3",
        "after:end:3",
        "after:remove:1",
        "after:forget:1",
        "before:remove:2",
    ],
)
def test_a_replay_killed_and_repeated_with_another_fix_sends_every_record_once(
    letters: DeadLetters, redis_buffer: RedisBuffer, redis_client: Redis, tmp_path: Path, point: str
) -> None:
    letters.spill(Limits(letters=40, size=1 << 30))
    assert len(files(tmp_path)) == 2
    kill(point, "replay", redis_buffer)
    work("replay", **{"business-capability": "second"})
    assert sent(redis_client, "first", "second") == Counter(MESSAGES)
    assert list(letters.select(Selection())) == []
    assert files(tmp_path) == []
    found = dict(redis_buffer.totals())
    assert found["payments"] == Totals(0, 0, 0)
    assert sum(totals.accepted for totals in found.values()) == 100


def test_a_replay_that_died_is_ended_by_the_next_spill(
    letters: DeadLetters, redis_buffer: RedisBuffer, redis_client: Redis
) -> None:
    kill("after:intend:1", "replay", redis_buffer)
    work("spill")  # the dead one's sign of life has not yet run out
    assert sent(redis_client, "first") == Counter()
    redis_buffer.letters.idle("payments")
    work("spill")
    assert sent(redis_client, "first") == Counter(MESSAGES)
    assert list(letters.select(Selection())) == []


@pytest.mark.parametrize("point", ["before:discard:1", "after:discard:1", "after:discard:3", "after:remove:1"])
def test_a_discard_killed_and_repeated_counts_every_letter_once(
    letters: DeadLetters, redis_buffer: RedisBuffer, tmp_path: Path, point: str
) -> None:
    letters.spill(Limits(letters=40, size=1 << 30))
    kill(point, "discard", redis_buffer)
    work("discard")
    assert list(letters.select(Selection())) == []
    assert files(tmp_path) == []
    assert dict(redis_buffer.totals()) == {"payments": Totals(accepted=100, rows=0, dead_letters=0, discarded=100)}
