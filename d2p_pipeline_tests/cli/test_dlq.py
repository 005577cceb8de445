"""`d2p dlq` as people and scripts use it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from d2p_pipeline.buffer.embedded import EmbeddedRedis
from d2p_pipeline.buffer.protocol import Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.cli.app import app
from d2p_pipeline.dead_letters import DeadLetters
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.spill import Limits
from d2p_pipeline_tests.pipeline import line
from d2p_pipeline_tests.test_dead_letters import reject

Run = Callable[..., Result]
FIX = "time=2026-11-21T10:00:00Z"
MANY = 100_000
PEAK_MB = 250
"""Starting Python with what a replay imports takes a good part of it."""


@pytest.fixture
def run(redis_client: Redis, redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `d2p dlq …` on an empty Redis."""
    del redis_client  # empties it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2P_REDIS_URL", redis_server.url)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["dlq", *arguments])


@pytest.fixture
def three(run: Run, redis_buffer: RedisBuffer, tmp_path: Path) -> None:
    """Two letters that can be mended, in a file, and one that cannot."""
    del run
    reject(redis_buffer, "payments", line(time="soon"), line(time="soon"), b"no JSON", received_at=1_700_000_000_000)
    DeadLetters(redis_buffer, lambda: LocalStore(tmp_path / "out")).spill(Limits(letters=2, size=1 << 30))


def data(result: Result) -> Any:
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def test_nothing_to_list_or_show_is_said(run: Run) -> None:
    for command in ("list", "show"):
        assert run(command).stdout == "No dead letters.\n"
    assert data(run("list", "--json")) == []
    assert run("show", "--json").stdout == ""


@pytest.mark.usefixtures("three")
def test_letters_are_listed_in_files_too(run: Run) -> None:
    listed = run("list").stdout
    assert all(word in listed for word in ("payments", "receive", "time: unreadable", "3", "2023-11-14 22:13:20Z"))
    [group] = data(run("list", "--json"))
    assert (group["key"], group["letters"], group["first"]) == ("payments", 3, "2023-11-14 22:13:20Z")
    assert data(run("list", "--json", "--since", "2023-11-15")) == []
    assert data(run("list", "--json", "--until", "2023-11-14T22:13:20Z", "--key", "payments")) == [group]


@pytest.mark.usefixtures("three")
def test_a_letter_is_shown_with_its_reasons_and_the_record(run: Run, redis_buffer: RedisBuffer) -> None:
    shown = run("show", "--limit", "1").stdout
    assert shown.startswith("payments: time: unreadable\n  received 2023-11-14 22:13:20Z, stage receive, in file ")
    assert f"    {line(time='soon').decode()}\n" in shown
    assert run("replay", "--set", "level=").exit_code == 1
    assert "  rejected before: time: unreadable\n" in run("show").stdout
    letter = json.loads(run("show", "--json").stdout.splitlines()[0])
    assert letter["key"] == "payments"
    assert letter["history"] == ["time: unreadable"]
    assert len(letter["raw"]) > 0
    assert dict(redis_buffer.totals())["payments"] == Totals(3, 0, 3)


@pytest.mark.usefixtures("three")
def test_letters_are_replayed_and_discarded(run: Run, redis_buffer: RedisBuffer) -> None:
    tried = run("replay", "--set", FIX, "--dry-run", "--json")
    assert tried.exit_code == 1
    [(reason, count)] = data(tried)["rejected_again"].items()
    assert (data(tried)["replayed"], count, data(tried)["dry_run"]) == (2, 1, True)
    fixed = run("replay", "--set", FIX)
    assert fixed.exit_code == 1
    assert fixed.stdout == "2 of 3 dead letters replayed\n"
    assert fixed.stderr == f"1 rejected again: {reason}\n"
    assert {state.key: state.records for state in redis_buffer.waiting()} == {"payments": 2}
    assert run("discard", "--dry-run").stdout == "1 dead letters would be discarded\n"
    assert data(run("discard", "--yes", "--json")) == {"selected": 1, "discarded": 1, "dry_run": False}
    assert run("replay").exit_code == 0
    assert dict(redis_buffer.totals())["payments"] == Totals(3, 0, 0, 1)


@pytest.mark.usefixtures("three")
def test_a_discard_asks_first(run: Run, redis_buffer: RedisBuffer) -> None:
    assert run("discard").exit_code == 1  # no answer
    assert len(redis_buffer.dead_letters("payments")) == 1
    assert run("discard", "--json").exit_code == 2


@pytest.mark.usefixtures("three")
def test_a_function_mends_the_letters(run: Run, tmp_path: Path, redis_buffer: RedisBuffer) -> None:
    lines = [
        "import json",
        "def mend(letter):",
        "    if letter.raw.startswith(b'{'):",
        "        return {**json.loads(letter.raw), 'time': letter.received_at}",
    ]
    (tmp_path / "mending_letters.py").write_text("\n".join(lines))
    mended = run("replay", "--transform", "mending_letters:mend")
    assert mended.exit_code == 0
    assert mended.stdout == "2 of 3 dead letters replayed\n1 left where they are by mending_letters:mend\n"
    assert {state.key: state.records for state in redis_buffer.waiting()} == {"payments": 2}


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["replay", "--set", "nonsense"], "nonsense"),
        (["replay", "--transform", "no_such_module:f"], "no_such_module"),
        (["list", "--since", "yesterday"], "since"),
        (["show", "--stage", "parsing"], "receive, parse, validate"),
        (["discard", "--until", "10:00"], "until"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(run: Run, arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr


@pytest.mark.usefixtures("three")
def test_a_file_that_cannot_be_read_is_named(run: Run, tmp_path: Path) -> None:
    [file] = tmp_path.rglob("*.zst")
    file.unlink()
    result = run("list")
    assert result.exit_code == 1
    assert file.name in result.stderr


def test_a_hundred_thousand_letters_are_listed_and_replayed_in_bounded_memory(
    run: Run, redis_buffer: RedisBuffer, redis_client: Redis, tmp_path: Path
) -> None:
    """Half of them from files; each command is a process of its own, and tells its peak."""
    del run  # sets the environment
    fill = "x" * 500
    for start in range(0, MANY, 10_000):
        letters = [
            DeadLetter(
                reason="time: unreadable",
                stage="receive",
                received_at=number,
                raw=line(message=f"{number} {fill}", time="soon"),
                id=str(number),
            ).to_json()
            for number in range(start, start + 10_000)
        ]
        redis_client.rpush("dlq:{payments}", *letters)
    redis_client.hset("totals:{payments}", mapping={"accepted": MANY, "dead_letters": MANY})
    DeadLetters(redis_buffer, lambda: LocalStore(tmp_path / "out")).spill(Limits(letters=MANY // 2, size=1 << 40))

    def peak(*arguments: str) -> str:
        program = (
            "import resource, subprocess, sys; "
            f"subprocess.run([sys.executable, '-m', 'd2p_pipeline.cli.main', 'dlq', *{arguments!r}], check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr)"
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stderr.split()[-1]) < PEAK_MB
        return ran.stdout

    [group] = json.loads(peak("list", "--json"))
    assert group["letters"] == MANY
    assert json.loads(peak("replay", "--set", FIX, "--json"))["replayed"] == MANY
    assert {state.key: state.records for state in redis_buffer.waiting()} == {"payments": MANY}
    assert dict(redis_buffer.totals()) == {"payments": Totals(MANY, 0, 0)}
    assert redis_buffer.letters.keys() == []
