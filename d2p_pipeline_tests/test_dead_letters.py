"""Dead letters: listed, replayed once and only once, discarded, spilled to files, and never in a loop."""

from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from d2p_pipeline.buffer.letters import LettersMovedError
from d2p_pipeline.buffer.protocol import Buffer, Totals
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.dead_letters import DeadLetters, MendError, Selection, mending
from d2p_pipeline.ingest.commit import Request, pushes
from d2p_pipeline.parquet.store import LocalStore
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline.records.normalize import Normalizer
from d2p_pipeline.records.rules import Rules
from d2p_pipeline.spill import Limits
from d2p_pipeline_tests.pipeline import Pipeline, line

NORMALIZER = Normalizer(Rules())
ALL = Selection()
NONE_IN_REDIS = Limits(letters=1, size=1)
FIX = {"time": "2026-11-21T10:00:00Z"}


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


@pytest.fixture
def letters(redis_buffer: RedisBuffer, tmp_path: Path) -> DeadLetters:
    return DeadLetters(redis_buffer, lambda: LocalStore(tmp_path / "out"))


@pytest.fixture(params=["queue", "files", "both"])
def placed(request: pytest.FixtureRequest, redis_buffer: RedisBuffer, letters: DeadLetters) -> Any:
    """Rejects records, and brings them where the test is about: the queue, files, or some here and some there."""

    def place(key: str, *raws: bytes, **how: Any) -> None:
        reject(redis_buffer, key, *raws, **how)
        if request.param != "queue":
            size = 1 if request.param == "files" else 1 << 30
            limits = Limits(letters=max(1, len(raws) // 2), size=size)
            letters.spill(limits)

    return place


def raws(letters: DeadLetters, selection: Selection = ALL) -> list[bytes]:
    return [stored.letter.raw for stored in letters.select(selection)]


def files(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.zst"))


def test_letters_are_selected_by_key_reason_stage_and_time(placed: Any, letters: DeadLetters) -> None:
    placed("a", b"1", b"2")
    placed("b", b"3", reason="level: missing", received_at=5000)
    assert sorted(raws(letters)) == [b"1", b"2", b"3"]
    assert raws(letters, Selection(keys=("b",))) == [b"3"]
    assert raws(letters, Selection(reason="time")) == [b"1", b"2"]
    assert raws(letters, Selection(since=2000)) == [b"3"]
    assert raws(letters, Selection(until=2000)) == [b"1", b"2"]
    assert raws(letters, Selection(stage="parse")) == []


def test_a_selection_as_people_write_it() -> None:
    selection = Selection.of(["a"], "time", "parse", since="1970-01-01T01:00:01+01:00", until="1970-01-01T00:00:02")
    assert selection == Selection(("a",), "time", "parse", 1000, 2000)
    for wrong in ({"stage": "parsing"}, {"since": "yesterday"}, {"until": "10:00"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Selection.of([], **wrong)


def test_letters_are_counted_by_key_stage_and_reason_with_their_times(placed: Any, letters: DeadLetters) -> None:
    placed("a", b"1", b"2", received_at=1000)
    placed("a", b"3", received_at=5000)
    placed("b", b"4", reason="level: missing")
    [(name, group), _] = letters.count(ALL).items()
    assert name == ("a", "receive", "time: unreadable")
    assert (group.letters, group.first, group.last) == (3, 1000, 5000)
    assert group.sample
    assert group.sample.raw == b"1"


def test_a_replay_with_a_fix_sends_the_records_on_their_way_and_balances_the_books(
    placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer, tmp_path: Path
) -> None:
    placed("undefined", line(time="soon"), line(time="later"))
    assert letters.replay(canonical, ALL, mending(FIX), dry_run=True).replayed == 2
    assert waiting(redis_buffer) == {}
    outcome = letters.replay(canonical, ALL, mending(FIX))
    assert (outcome.selected, outcome.replayed) == (2, 2)
    assert waiting(redis_buffer) == {"payments": 2}
    assert letters.replay(canonical, ALL, mending(FIX)).selected == 0
    assert dict(redis_buffer.totals()) == {"undefined": Totals(0, 0, 0), "payments": Totals(2, 0, 0)}
    assert files(tmp_path) == []


def test_two_letters_alike_are_two_records(placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer) -> None:
    placed("payments", line(), line(), line(message="other"))
    assert letters.replay(canonical, ALL).replayed == 3
    assert waiting(redis_buffer) == {"payments": 3}


def test_what_is_rejected_again_stays_with_its_history_and_does_not_loop(
    placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer
) -> None:
    placed("payments", line(level=None), reason="time: unreadable")
    for _ in range(3):
        outcome = letters.replay(canonical, ALL)
        assert (outcome.selected, outcome.replayed) == (1, 0)
    [stored] = letters.select(ALL)
    assert stored.letter.reason == "level: required, is missing or null"
    assert stored.letter.history == ("time: unreadable",)
    assert stored.letter.raw == line(level=None)
    assert dict(redis_buffer.totals()) == {"payments": Totals(1, 0, 1)}


def test_only_what_is_selected_is_replayed_and_only_once(
    placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer
) -> None:
    placed("payments", *[line(message=str(number)) for number in range(10)])
    placed("payments", *[line(message=str(number)) for number in range(10, 15)], reason="level: missing")
    assert letters.replay(canonical, Selection(reason="level")).replayed == 5
    assert letters.replay(canonical, Selection(reason="level")).replayed == 0
    assert len(raws(letters)) == 10
    assert letters.replay(canonical, ALL).replayed == 10
    assert waiting(redis_buffer) == {"payments": 15}


def test_discarded_letters_are_gone_and_counted(
    placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer, tmp_path: Path
) -> None:
    placed("payments", b"1", b"2", b"3")
    assert letters.discard(ALL, dry_run=True).selected == 3
    assert letters.discard(ALL).discarded == 3
    assert raws(letters) == []
    assert files(tmp_path) == []
    assert dict(redis_buffer.totals()) == {"payments": Totals(accepted=3, rows=0, dead_letters=0, discarded=3)}


def test_thousands_are_worked_through_by_pages(placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer) -> None:
    placed("payments", *[line(message=str(number)) if number % 3 else b"bad" for number in range(1800)])
    outcome = letters.replay(canonical, ALL)
    assert (outcome.selected, outcome.replayed) == (1800, 1200)
    assert waiting(redis_buffer) == {"payments": 1200}
    assert raws(letters) == [b"bad"] * 600
    assert letters.discard(ALL).discarded == 600
    assert dict(redis_buffer.totals()) == {"payments": Totals(accepted=1800, rows=0, dead_letters=0, discarded=600)}


def test_a_function_mends_letters_or_leaves_them(placed: Any, letters: DeadLetters, redis_buffer: RedisBuffer) -> None:
    placed("payments", line(time="soon"), b"level=info no JSON", b"nothing to be done")
    mend = mending(FIX, "d2p_pipeline_tests.records.transforms:mended")
    outcome = letters.replay(canonical, Selection(reason="time"), mend)
    assert (outcome.selected, outcome.replayed, outcome.left) == (3, 1, 0)
    assert outcome.rejected_again.total() == 2  # no fields can be set in them
    outcome = letters.replay(canonical, ALL, mending({}, "d2p_pipeline_tests.records.transforms:mended"))
    assert (outcome.selected, outcome.replayed, outcome.left) == (2, 1, 1)
    assert raws(letters) == [b"nothing to be done"]
    assert waiting(redis_buffer) == {"payments": 2}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("broken", "raised AttributeError"),
        ("NO_FUNCTION", "no function"),
        ("absent", "absent"),
        ("wordy", "returned int"),
    ],
)
def test_a_function_that_cannot_mend_changes_nothing_and_says_why(
    redis_buffer: RedisBuffer, letters: DeadLetters, function: str, reason: str
) -> None:
    reject(redis_buffer, "payments", line(time="soon"))
    with pytest.raises(MendError, match=reason):
        letters.replay(canonical, ALL, mending({}, f"d2p_pipeline_tests.records.transforms:{function}"))
    assert raws(letters) == [line(time="soon")]
    assert waiting(redis_buffer) == {}


def test_an_element_that_is_no_letter_is_shown_spilled_and_discarded_like_one(
    redis_client: Redis, letters: DeadLetters
) -> None:
    redis_client.rpush("dlq:{payments}", b"not\na letter", b"{}")
    for _ in range(2):
        assert raws(letters) == [b"not\na letter", b"{}"]
        letters.spill(NONE_IN_REDIS)
    assert letters.discard(ALL).discarded == 2


def test_oversized_queues_move_to_files_oldest_letters_first(
    redis_buffer: RedisBuffer, redis_client: Redis, letters: DeadLetters, tmp_path: Path
) -> None:
    every = [str(number).encode() for number in range(25)]
    reject(redis_buffer, "pay/ments", *every)
    reject(redis_buffer, "small", b"1")
    assert letters.spill(Limits(letters=10, size=1 << 30)) == {"pay/ments": 20}
    assert redis_client.llen("dlq:{pay/ments}") == 5
    assert len(files(tmp_path)) == 2
    assert all(name.startswith("_dead_letters/capability=pay%2Fments/") for name in files(tmp_path))
    assert raws(letters, Selection(keys=("pay/ments",))) == every
    assert letters.spill(Limits(letters=10, size=1 << 30)) == {}
    assert dict(redis_buffer.totals())["pay/ments"] == Totals(25, 0, 25)
    assert letters.spill(Limits(letters=100, size=100)) == {"pay/ments": 5, "small": 1}


def test_a_selection_by_time_reads_no_file_without_letters_of_that_time(
    redis_buffer: RedisBuffer, letters: DeadLetters, tmp_path: Path
) -> None:
    reject(redis_buffer, "a", b"old", b"older", received_at=1000)
    letters.spill(NONE_IN_REDIS)
    for name in files(tmp_path):
        (tmp_path / "out" / name).write_bytes(b"unreadable")
    assert raws(letters, Selection(since=2000)) == []


def test_a_file_that_is_gone_is_named(redis_buffer: RedisBuffer, letters: DeadLetters, tmp_path: Path) -> None:
    reject(redis_buffer, "a", b"1", b"2")
    letters.spill(NONE_IN_REDIS)
    [name, *_] = files(tmp_path)
    (tmp_path / "out" / name).unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        raws(letters)


def test_of_two_at_work_on_the_same_letters_one_is_told(redis_buffer: RedisBuffer, letters: DeadLetters) -> None:
    reject(redis_buffer, "a", line("a"), line("a"))

    def meanwhile(letter: DeadLetter) -> bytes:
        letters.discard(ALL)
        return letter.raw

    with pytest.raises(LettersMovedError, match="'a'"):
        letters.replay(canonical, ALL, meanwhile)
    assert waiting(redis_buffer) == {}
    assert dict(redis_buffer.totals()) == {"a": Totals(2, 0, 0, 2)}


def test_letters_that_people_work_on_are_not_spilled(redis_buffer: RedisBuffer, letters: DeadLetters) -> None:
    reject(redis_buffer, "a", line("a"), line("a"))
    spilled: list[dict[str, int]] = []

    def meanwhile(letter: DeadLetter) -> bytes:
        spilled.append(letters.spill(NONE_IN_REDIS))
        return letter.raw

    assert letters.replay(canonical, ALL, meanwhile).replayed == 2
    assert spilled == [{}, {}]


def test_letters_can_be_discarded_when_redis_is_out_of_memory(
    redis_buffer: RedisBuffer, redis_client: Redis, letters: DeadLetters
) -> None:
    reject(redis_buffer, "a", *[b"x" * 100] * 500)
    redis_client.config_set("maxmemory", 1)
    assert letters.discard(ALL).discarded == 500
    redis_client.config_set("maxmemory", 0)
    assert raws(letters) == []


def test_a_flushs_dead_letters_are_replayed_into_files(
    pipeline: Pipeline, redis_client: Redis, letters: DeadLetters
) -> None:
    redis_client.rpush("data:{payments}", line(message="good"), line(message="late", time="soon"), b"no JSON")
    assert pipeline.flush().success
    assert letters.replay(canonical, ALL, mending({"time": "2026-11-21T11:00:00Z"})).replayed == 1
    assert pipeline.flush().success
    assert pipeline.messages() == ["good", "late"]
    assert dict(pipeline.buffer.totals()) == {"payments": Totals(accepted=3, rows=2, dead_letters=1)}
