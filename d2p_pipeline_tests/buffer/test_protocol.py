"""What every buffer promises, on Redis and in memory."""

from collections.abc import Iterator
from itertools import count

import pytest

from d2p_pipeline.buffer.protocol import (
    Announcement,
    Batch,
    BatchRef,
    Buffer,
    Claim,
    ClaimLostError,
    Push,
    Seal,
    Totals,
)

LEASE = 60_000
STRANGE_KEYS = ["a/b", "..", "two words", "a:b", "100%", "%7B", "{}", "日本 🎉", "x" * 500, "a,b", "new\nline", "*[?]"]


def push(buffer: Buffer, key: str, *chunks: bytes, records: int = 1) -> None:
    for chunk in chunks:
        buffer.push([Push(key, f"push-{chunk!r}", 60, chunk, records, len(chunk))])


def seal(buffer: Buffer, key: str, batch_id: str = "B1") -> Batch:
    [batch] = buffer.seal([Seal(key, batch_id, "request")])
    return batch


def deliver(buffer: Buffer, batch: Batch, *, rows: int) -> None:
    claim = buffer.claim(batch.ref, "run", LEASE)
    assert claim
    assert buffer.acknowledge(claim, 0, units=1, rows=rows) == "complete"


def test_what_was_pushed_is_read_back_from_the_sealed_batch_in_order(buffer: Buffer) -> None:
    push(buffer, "k", b"one", b"two", b"three")
    batch = seal(buffer, "k")
    assert buffer.read(batch.ref, 0, batch.chunks) == [b"one", b"two", b"three"]
    assert (batch.records, batch.size, batch.chunks, batch.counted) == (3, 11, 3, True)
    assert list(buffer.waiting()) == []


@pytest.mark.parametrize("key", STRANGE_KEYS)
def test_any_key_has_its_own_buffer_batch_and_dead_letters(buffer: Buffer, key: str) -> None:
    push(buffer, "other", b"mine")
    buffer.push([Push(key, "1", 60, b"chunk", 1, 5, 1, [b"letter"])])
    assert {state.key for state in buffer.waiting()} == {"other", key}
    batch = seal(buffer, key)
    assert buffer.read(BatchRef(key, "B1"), 0, 1) == [b"chunk"]
    assert [found.ref for found in buffer.open_batches()] == [batch.ref]
    assert buffer.dead_letters(key) == [b"letter"]
    deliver(buffer, batch, rows=1)
    assert dict(buffer.totals())[key] == Totals(accepted=2, rows=1, dead_letters=1)


def test_a_push_that_arrives_twice_is_stored_once(buffer: Buffer) -> None:
    twice = Push("k", "same", 60, b"chunk", 2, 5, 1, [b"letter"])
    buffer.push([twice])
    buffer.push([twice, Push("other", "same", 60, b"chunk", 1, 5)])
    assert sorted((state.key, state.records, state.size, state.chunks) for state in buffer.waiting()) == [
        ("k", 2, 5, 1),
        ("other", 1, 5, 1),
    ]
    assert buffer.dead_letters("k") == [b"letter"]
    assert dict(buffer.totals())["k"] == Totals(3, 0, 1)


def test_a_batch_sealed_twice_is_one_batch(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    first = seal(buffer, "k")
    push(buffer, "k", b"two")
    assert seal(buffer, "k") == first
    assert [state.chunks for state in buffer.waiting()] == [1]
    assert len(list(buffer.open_batches())) == 1


def test_a_seal_that_arrives_again_after_the_delivery_takes_nothing(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    deliver(buffer, seal(buffer, "k"), rows=1)
    push(buffer, "k", b"two")
    assert seal(buffer, "k").state == "done"
    assert [state.chunks for state in buffer.waiting()] == [1]
    assert list(buffer.open_batches()) == []


def test_an_empty_buffer_gives_no_batch(buffer: Buffer) -> None:
    assert buffer.seal([Seal("nobody", "B1", "age")]) == []


def test_a_claimed_batch_is_nobody_elses_until_it_is_released(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    claim = buffer.claim(ref, "run 1", LEASE)
    assert claim
    assert buffer.claim(ref, "run 1", LEASE) == claim  # the same request, arriving twice
    assert buffer.claim(ref, "run 2", LEASE) is None
    assert buffer.is_claimed(ref)
    buffer.release(claim)
    buffer.release(claim)
    assert not buffer.is_claimed(ref)
    second = buffer.claim(ref, "run 2", LEASE)
    assert second
    assert second.token > claim.token
    buffer.release(claim)  # late: the batch is another's now
    assert buffer.is_claimed(ref)


def test_a_run_that_lost_its_claim_cannot_acknowledge(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    paused = buffer.claim(ref, "paused", LEASE)
    assert paused
    buffer.release(paused)  # as its lease would end
    successor = buffer.claim(ref, "successor", LEASE)
    assert successor
    assert not buffer.renew(paused, LEASE)
    with pytest.raises(ClaimLostError, match=r"B1.*'k'.*stale"):
        buffer.acknowledge(paused, 0, units=1, rows=1, rejected=1, dead_letters=[b"letter"])
    assert buffer.dead_letters("k") == []
    assert buffer.acknowledge(successor, 0, units=1, rows=1) == "complete"


def test_a_lease_that_ran_out_is_renewed_while_nobody_else_took_the_batch(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    claim = buffer.claim(ref, "run", 1)
    assert claim
    while buffer.is_claimed(ref):
        pass
    assert buffer.renew(claim, LEASE)
    assert buffer.is_claimed(ref)
    assert buffer.acknowledge(claim, 0, units=1, rows=1) == "complete"


def test_the_first_plan_stays(buffer: Buffer) -> None:
    push(buffer, "k", b"one", b"two")
    ref = seal(buffer, "k").ref
    assert buffer.plan(ref, [(0, 1), (1, 2)]) == ((0, 1), (1, 2))
    assert buffer.plan(ref, [(0, 2)]) == ((0, 1), (1, 2))
    found = buffer.batch(ref)
    assert found
    assert found.plan == ((0, 1), (1, 2))
    assert buffer.plan(BatchRef("k", "unknown"), [(0, 1)]) is None


def announced(buffer: Buffer, claim: Claim, *names: str, content: str = "", own: bool = False) -> list[str] | None:
    [strays] = buffer.announce([Announcement(claim, 0, dict.fromkeys(names, content), own)])
    return strays and sorted(strays)


def successive(buffer: Buffer, ref: BatchRef) -> Iterator[Claim]:
    """One claim after the other, each taken when the last one's lease has ended."""
    for number in count():
        claim = buffer.claim(ref, f"run {number}", LEASE)
        assert claim
        yield claim
        buffer.release(claim)


def test_an_attempt_is_told_what_earlier_ones_announced_and_it_does_not(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    claims = successive(buffer, seal(buffer, "k").ref)
    first = next(claims)
    assert announced(buffer, first, "a", "b") == []
    assert announced(buffer, first, "a", "b") == []
    second = next(claims)
    assert announced(buffer, second, "b", "c") == ["a"]
    assert announced(buffer, next(claims), "c", "d") == ["a", "b"]
    with pytest.raises(ClaimLostError):
        announced(buffer, second, "e")
    assert buffer.announced(second.batch, 0) == {"c": "", "d": ""}
    assert buffer.announced(second.batch, 1) is None


def test_a_name_is_not_shared_with_other_content_nor_with_who_may_remove_it(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    claims = successive(buffer, seal(buffer, "k").ref)
    announced(buffer, next(claims), "a", "b", content="first")
    second = next(claims)
    assert announced(buffer, second, "a", content="second") is None
    assert announced(buffer, second, "a", content="first") == ["b"]
    third = next(claims)
    assert announced(buffer, third, "a", "b", content="first") is None
    assert announced(buffer, third, "own", content="first", own=True) == ["a", "b"]
    assert announced(buffer, third, "own", content="again", own=True) == ["a", "b"]


def test_a_batch_is_removed_with_its_last_unit_and_each_acknowledgement_counts_once(buffer: Buffer) -> None:
    push(buffer, "k", b"one", b"two", records=10)
    ref = seal(buffer, "k").ref
    claim = buffer.claim(ref, "run", LEASE)
    assert claim
    answers = [buffer.acknowledge(claim, 1, units=2, rows=9, rejected=1, dead_letters=[b"letter"]) for _ in range(2)]
    assert answers == ["marked", "repeated"]
    marked = buffer.batch(ref)
    assert marked
    assert (marked.units_done, marked.rows, marked.dead_letters) == (frozenset({1}), 9, 1)
    assert buffer.read(ref, 0, 2) == [b"one", b"two"]
    assert buffer.acknowledge(claim, 0, units=2, rows=10) == "complete"
    assert buffer.acknowledge(claim, 0, units=2, rows=10) == "repeated"
    assert buffer.read(ref, 0, 2) == []
    assert buffer.claim(ref, "late run", LEASE) is None
    assert buffer.dead_letters("k") == [b"letter"]
    assert dict(buffer.totals()) == {"k": Totals(accepted=20, rows=19, dead_letters=1)}


def test_rejected_records_are_counted_even_where_dead_letters_are_not_kept(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    claim = buffer.claim(ref, "run", LEASE)
    assert claim
    buffer.acknowledge(claim, 0, units=1, rows=0, rejected=1)
    assert dict(buffer.totals()) == {"k": Totals(1, 0, 1)}
    assert list(buffer.dead_letter_keys()) == []


def test_a_buffer_is_due_by_records_by_bytes_by_age_or_on_request(buffer: Buffer) -> None:
    push(buffer, "small", b"chunk")
    push(buffer, "many", b"chunk", records=100)
    push(buffer, "large", b"x" * 10_000)
    before = buffer.now() - 60_000
    assert {state.key for state in buffer.due(before, 10)} == {"many", "large"}
    assert buffer.request_flush(["small", "empty"]) == ["small"]
    assert {state.key for state in buffer.due(before, 10)} == {"many", "large", "small"}
    for state in buffer.due(before, 10):
        seal(buffer, state.key, f"B-{state.key}")
    push(buffer, "small", b"next")
    assert buffer.due(before, 10) == []
    assert [state.key for state in buffer.due(buffer.now() + 60_000, 10)] == ["small"]
    assert len(buffer.due_batches(buffer.now(), 10)) == 3
    assert buffer.request_flush() == ["small"]


def test_a_postponed_batch_is_looked_at_later_and_counts_the_runs_asked_for(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    buffer.postpone({ref: buffer.now() + 60_000}, requested=True)
    assert buffer.due_batches(buffer.now(), 10) == []
    [batch] = buffer.due_batches(buffer.now() + 120_000, 10)
    assert batch.requests == 1
    deliver(buffer, batch, rows=1)
    buffer.postpone({ref: buffer.now()}, requested=True)  # late, after the delivery
    assert buffer.due_batches(buffer.now() + 120_000, 10) == []


def test_dead_letters_are_listed_by_pages_oldest_first(buffer: Buffer) -> None:
    letters = [f"letter {number}".encode() for number in range(5)]
    buffer.push([Push("k", "1", 60, rejected=5, dead_letters=letters)])
    assert buffer.dead_letters("k", 1, 3) == letters[1:3]
    assert buffer.dead_letters("k") == letters
    assert list(buffer.dead_letter_keys()) == [("k", 5)]
    assert list(buffer.waiting()) == []


def failed(buffer: Buffer, key: str = "k", batch_id: str = "B1") -> Batch:
    push(buffer, key, b"one", b"two")
    batch = seal(buffer, key, batch_id)
    claim = buffer.claim(batch.ref, "run", LEASE)
    assert claim
    assert buffer.fail(claim, "disk full") == 1
    assert buffer.fail(claim, "disk full") == 0  # the same failure, arriving twice
    found = buffer.batch(batch.ref)
    assert found
    return found


def test_a_failed_batch_waits_in_recovery_with_its_error_until_it_is_delivered(buffer: Buffer) -> None:
    batch = failed(buffer)
    assert (batch.state, batch.error, batch.failures) == ("recovery", "disk full", 1)
    assert batch.failed_at > 0
    assert not buffer.is_claimed(batch.ref)
    assert list(buffer.open_batches()) == []
    assert buffer.due_batches(buffer.now() + 1000, 10) == []
    assert [found.ref for found in buffer.recovering()] == [batch.ref]
    deliver(buffer, batch, rows=2)
    assert list(buffer.recovering()) == []
    assert dict(buffer.totals()) == {"k": Totals(2, 2, 0)}


def test_a_batch_in_recovery_is_due_when_it_was_told_to_be(buffer: Buffer) -> None:
    first, second = failed(buffer, "a", "B1"), failed(buffer, "b", "B2")
    now = buffer.now()
    assert list(buffer.recovering(now + LEASE)) == []
    buffer.retry_at(first.ref, now + 10)
    assert [found.ref for found in buffer.recovering(now + 20)] == [first.ref]
    assert [found.ref for found in buffer.recovering()] == [first.ref, second.ref]


def test_a_run_asked_for_a_batch_in_recovery_is_counted_and_a_claim_that_came_to_nothing_is_seen(
    buffer: Buffer,
) -> None:
    batch = failed(buffer)
    assert batch.failed_token == batch.token
    buffer.retry_at(batch.ref, buffer.now() + 1, requested=True)
    claim = buffer.claim(batch.ref, "a run that dies", LEASE)
    assert claim
    buffer.release(claim)  # or the lease ends
    found = buffer.batch(batch.ref)
    assert found
    assert (found.requests, found.failures) == (1, 1)
    assert found.failed_token < found.token


def test_a_batch_fails_again_and_again_and_keeps_its_delivered_units(buffer: Buffer) -> None:
    batch = failed(buffer)
    for failures in (2, 3):
        claim = buffer.claim(batch.ref, f"run {failures}", LEASE)
        assert claim
        buffer.acknowledge(claim, failures, units=9, rows=1)
        assert buffer.fail(claim, f"error {failures}") == failures
    found = buffer.batch(batch.ref)
    assert found
    assert (found.units_done, found.error) == (frozenset({2, 3}), "error 3")


def test_a_run_that_lost_its_claim_cannot_fail_the_batch(buffer: Buffer) -> None:
    push(buffer, "k", b"one")
    ref = seal(buffer, "k").ref
    paused = buffer.claim(ref, "paused", LEASE)
    assert paused
    buffer.release(paused)
    assert buffer.claim(ref, "successor", LEASE)
    assert buffer.fail(paused, "too late") == 0
    found = buffer.batch(ref)
    assert found
    assert (found.state, found.failures) == ("open", 0)


def test_what_deliveries_came_to_is_counted_once(buffer: Buffer) -> None:
    buffer.push([Push("k", "1", 60, b"chunk", 1, 5)])
    [batch] = buffer.seal([Seal("k", "B1", "age")])
    buffer.seal([Seal("k", "B1", "age")])
    claim = buffer.claim(batch.ref, "run", 60_000)
    assert claim
    buffer.fail(claim, "disk full")
    again = buffer.claim(batch.ref, "next run", 60_000)
    assert again
    for _ in range(2):
        buffer.acknowledge(again, 0, units=1, rows=1, files=[100, 50])
    [(key, found)] = buffer.deliveries()
    assert (key, found.files, found.file_bytes, found.units, found.failures) == ("k", 2, 150, 1, 1)
    assert found.sealed == {"age": 1}
    assert 0 <= found.delivery_ms < 60_000
