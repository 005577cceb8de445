"""A run's claims stay its own for as long as it works, and are given back when it ends."""

from d2p_pipeline.buffer.lease import Leases
from d2p_pipeline.buffer.protocol import BatchRef, Buffer, Push, Seal

REF = BatchRef("k", "B1")


def sealed(buffer: Buffer) -> None:
    buffer.push([Push("k", "1", 60, b"chunk", 1, 5)])
    buffer.seal([Seal("k", "B1", "age")])


def test_a_claim_outlives_its_lease_while_the_run_works(buffer: Buffer) -> None:
    sealed(buffer)
    lease_ms = 300
    with Leases(buffer, "run 1", lease_ms) as leases:
        assert leases.take(REF)
        end = buffer.now() + 4 * lease_ms
        while buffer.now() < end:
            assert buffer.claim(REF, "run 2", lease_ms) is None
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
        buffer.release(claim)
        assert buffer.claim(REF, "run 2", 60_000)
        end = buffer.now() + 600
        while buffer.now() < end:
            assert not buffer.renew(claim, 300)
    assert buffer.is_claimed(REF)
