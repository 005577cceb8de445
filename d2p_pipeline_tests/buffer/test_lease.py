"""A run's claims stay its own for as long as it works, and are given back when it ends."""

import time
from collections.abc import Callable

from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.protocol import BatchRef, Buffer, Claim, Push, Seal

REF = BatchRef("k", "B1")


def sealed(buffer: Buffer) -> None:
    buffer.push([Push("k", "1", 60, b"chunk", 1, 5)])
    buffer.seal([Seal("k", "B1", "age")])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_a_claim_outlives_its_lease_while_the_run_works(buffer: Buffer) -> None:
    sealed(buffer)
    lease_ms = 300
    with Leases(buffer, "run 1", lease_ms) as leases:
        assert leases.take(REF)
        end = buffer.now() + 4 * lease_ms
        # On a slow machine a lease may have run out for a moment; what counts is that it is renewed again and again.
        until(lambda: buffer.now() > end and buffer.is_claimed(REF))
        batch = buffer.batch(REF)
        assert batch
        assert batch.token == 1
    assert not buffer.is_claimed(REF)


def test_a_batch_that_another_run_holds_is_not_taken(buffer: Buffer) -> None:
    sealed(buffer)
    with Leases(buffer, "run 1", 60_000) as first, Leases(buffer, "run 2", 60_000) as second:
        assert first.take(REF)
        assert second.take(REF) is None


def test_a_claim_lost_to_another_run_is_not_renewed(buffer: Buffer) -> None:
    sealed(buffer)
    with Leases(buffer, "run 1", 300) as leases:
        claim = leases.take(REF)
        assert claim

        def taken_by_another() -> Claim | None:
            buffer.release(claim)
            return buffer.claim(REF, "run 2", 60_000)

        until(taken_by_another)  # a renewal may come in between
        end = buffer.now() + 600
        while buffer.now() < end:
            assert not buffer.renew(claim, 300)
    assert buffer.is_claimed(REF)


def test_a_run_says_that_it_lives_for_as_long_as_it_works(buffer: Buffer) -> None:
    with Leases(buffer, "owner", 300, "run 1"):
        said = buffer.silent(buffer.now() + 1000)
        assert said.keys() == {"run 1"}
        until(lambda: buffer.silent(buffer.now() + 1000)["run 1"] > said["run 1"])
        assert buffer.silent(said["run 1"]) == {}
    assert buffer.silent(buffer.now() + 1000) == {}


def test_keys_are_attended_while_the_run_lives_and_no_longer_than_it_said(buffer: Buffer) -> None:
    def due() -> bool:
        return bool(buffer.due(buffer.now() + 1000, 10))

    buffer.push([Push("k", "1", 60, b"chunk", 1, 5)])
    with Leases(buffer, "run 1", 60_000) as leases:
        leases.attend(["k"], 600)
        assert not due()
    assert due()
    with Leases(buffer, "run 2", 300) as leases:
        leases.attend(["k"], 0.5)
        until(due)
