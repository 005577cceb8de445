"""Dead letters: listed, replayed once and only once, discarded, and never in a loop."""

import json
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from d2p_pipeline import dead_letters
from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.protocol import Buffer, Push, Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.cli.main import app
from d2p_pipeline.dead_letters import Selection, discard, replay, select
from d2p_pipeline.ingest.commit import Request, pushes
from d2p_pipeline.records import chunk
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.records.normalize import Normalizer
from d2p_pipeline.records.rules import Rules
from d2p_pipeline_tests.pipeline import Pipeline, line

NORMALIZER = Normalizer(Rules())


def canonical(raw: bytes) -> tuple[str, bytes]:
    found = NORMALIZER.canonical(raw)
    return found.key, found.line


def reject(buffer: Buffer, key: str, *raws: bytes, reason: str = "time: unreadable", received_at: int = 1000) -> None:
    """What the receiver stores for rejected records."""
    letters = [DeadLetter(reason=reason, stage="receive", received_at=received_at, raw=raw) for raw in raws]
    name = f"push-{key}-{reason}-{received_at}"
    buffer.push(list(pushes([Request(dead_letters={key: letters})], name, 60, keep_dead_letters=True)))


def waiting(buffer: Buffer) -> dict[str, int]:
    return {state.key: state.records for state in buffer.waiting()}


def test_letters_are_selected_by_key_reason_stage_and_time(buffer: Buffer) -> None:
    reject(buffer, "a", b"1", b"2")
    reject(buffer, "b", b"3", reason="level: missing", received_at=5000)
    assert {stored.letter.raw for stored in select(buffer, Selection())} == {b"1", b"2", b"3"}
    assert [stored.letter.raw for stored in select(buffer, Selection(keys=("b",)))] == [b"3"]
    assert [stored.letter.raw for stored in select(buffer, Selection(reason="time"))] == [b"1", b"2"]
    assert [stored.letter.raw for stored in select(buffer, Selection(since=2000))] == [b"3"]
    assert [stored.letter.raw for stored in select(buffer, Selection(until=2000))] == [b"1", b"2"]
    assert list(select(buffer, Selection(stage="parse"))) == []


def test_a_replay_with_a_fix_sends_the_records_on_their_way_and_balances_the_books(buffer: Buffer) -> None:
    reject(buffer, "undefined", line(time="soon"), line(time="later"))
    assert replay(buffer, canonical, Selection(), {"time": "2026-11-21T10:00:00Z"}, dry_run=True).replayed == 2
    assert waiting(buffer) == {}
    outcome = replay(buffer, canonical, Selection(), {"time": "2026-11-21T10:00:00Z"})
    assert (outcome.selected, outcome.replayed) == (2, 2)
    assert waiting(buffer) == {"payments": 2}
    assert list(buffer.dead_letter_keys()) == []
    assert dict(buffer.totals()) == {"undefined": Totals(0, 0, 0), "payments": Totals(2, 0, 0)}


def test_a_replay_that_died_before_it_removed_the_letters_doubles_nothing(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = line()
    reject(buffer, "payments", same, same, line(message="other"))  # two letters alike are two records

    def die(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dead_letters, "_remove", die)
        replay(buffer, canonical, Selection())
    assert waiting(buffer) == {"payments": 3}
    assert replay(buffer, canonical, Selection()).replayed == 3
    assert waiting(buffer) == {"payments": 3}
    assert list(buffer.dead_letter_keys()) == []


def test_what_is_rejected_again_stays_with_its_history_and_does_not_loop(buffer: Buffer) -> None:
    reject(buffer, "payments", line(level=None), reason="time: unreadable")
    for _ in range(3):
        outcome = replay(buffer, canonical, Selection())
        assert (outcome.selected, outcome.replayed) == (1, 0)
    [stored] = select(buffer, Selection())
    assert stored.letter.reason == "level: required, is missing or null"
    assert stored.letter.history == ("time: unreadable",)
    assert dict(buffer.totals()) == {"payments": Totals(1, 0, 1)}


def test_discarded_letters_are_gone_and_counted(buffer: Buffer) -> None:
    reject(buffer, "payments", b"1", b"2", b"3")
    assert discard(buffer, Selection(), dry_run=True).selected == 3
    assert discard(buffer, Selection()).discarded == 3
    assert list(buffer.dead_letter_keys()) == []
    assert dict(buffer.totals()) == {"payments": Totals(accepted=3, rows=0, dead_letters=0, discarded=3)}


def test_thousands_are_worked_through_by_pages(buffer: Buffer) -> None:
    reject(buffer, "payments", *[line(message=str(number)) if number % 3 else b"bad" for number in range(1800)])
    outcome = replay(buffer, canonical, Selection())
    assert (outcome.selected, outcome.replayed) == (1800, 1200)
    assert waiting(buffer) == {"payments": 1200}
    assert dict(buffer.dead_letter_keys()) == {"payments": 600}


def test_a_letter_taken_out_twice_is_counted_once(buffer: Buffer) -> None:
    buffer.push([Push("k", "1", 60, rejected=2, dead_letters=[b"one", b"two"])])
    assert buffer.remove_dead_letters("k", [b"one"], discarded=True) == 1
    assert buffer.remove_dead_letters("k", [b"one"], discarded=True) == 0
    assert buffer.dead_letters("k") == [b"two"]
    assert dict(buffer.totals()) == {"k": Totals(2, 0, 1, 1)}


def test_a_flushs_dead_letters_are_replayed_into_files(pipeline: Pipeline, redis_client: Redis) -> None:
    redis_client.rpush("data:{payments}", line(message="good"), line(message="late", time="soon"), b"no JSON")
    assert pipeline.flush().success
    assert replay(pipeline.buffer, canonical, Selection(), {"time": "2026-11-21T11:00:00Z"}).replayed == 1
    assert pipeline.flush().success
    assert pipeline.messages() == ["good", "late"]
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=3, rows=2, dead_letters=1)}


def test_the_commands(
    redis_buffer: RedisBuffer,
    redis_client: Redis,
    redis_server: EmbeddedRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2P_REDIS_URL", redis_server.url)
    run = CliRunner()
    assert "No dead letters" in run.invoke(app, ["dlq", "list"]).output
    reject(redis_buffer, "payments", line(time="soon"), line(time="soon"), b"no JSON")
    listed = run.invoke(app, ["dlq", "list"]).output
    assert "payments" in listed
    assert "3" in listed
    [first, *_] = run.invoke(app, ["dlq", "show", "--limit", "1"]).output.splitlines()
    assert json.loads(first)["raw"] == line(time="soon").decode()
    fixed = run.invoke(app, ["dlq", "replay", "--set", "time=2026-11-21T10:00:00Z"])
    assert fixed.exit_code == 1  # one was rejected again
    assert "2 of 3 dead letters replayed" in fixed.output
    elements = redis_client.lrange("data:{payments}", 0, -1)
    assert [
        json.loads(chunk.decode(bytes(element)).body)["time"] for element in elements if isinstance(element, bytes)
    ] == ["2026-11-21T10:00:00Z"] * 2
    assert "1 dead letters discarded" in run.invoke(app, ["dlq", "discard", "--yes"]).output
    assert run.invoke(app, ["dlq", "replay", "--set", "nonsense"]).exit_code == 2
