"""Why a buffer is sealed, and which batches share a run."""

from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.buffer.protocol import Batch, BufferState
from d2p_pipeline.orchestration.decide import Limits, Share, share_runs, why_seal

LIMITS = Limits(records=100, size=1000, age_ms=5000, run_bytes=1000, hot_bytes=500, own_runs=3, runs=3)


def state(records: int = 1, size: int = 1, first: int = 100_000) -> BufferState:
    return BufferState("k", records, size, 1, first)


def batch(key: str, size: int = 10, sealed_at: int = 0, id: str = "B") -> Batch:
    return Batch(
        key=key, id=id, state="open", reason="age", sealed_at=sealed_at, first=0, chunks=1, records=1, size=size,
        counted=True, token=0, requests=0, units_done=frozenset(), rows=0, dead_letters=0,
    )  # fmt: skip


def keys(share: Share) -> str:
    return "".join(found.key for found in share.batches)


def test_a_buffer_is_sealed_for_the_first_reason_that_holds() -> None:
    now = 101_000
    assert why_seal(state(records=100, size=5000, first=0), now, LIMITS) == "size"
    assert why_seal(state(size=1000, first=0), now, LIMITS) == "bytes"
    assert why_seal(state(first=96_000), now, LIMITS) == "age"
    assert why_seal(state(), now, LIMITS) == "request"


def test_each_key_has_its_own_run_while_the_keys_are_few() -> None:
    shares = share_runs([batch("a"), batch("b"), batch("a", id="B2")], LIMITS)
    assert [(keys(share), share.why) for share in shares] == [("aa", "few keys due"), ("b", "few keys due")]


def test_many_small_keys_share_runs_up_to_the_byte_budget() -> None:
    shares = share_runs([batch(str(number), size=300) for number in range(9)], LIMITS)
    assert [(keys(share), share.why) for share in shares] == [("012", "shared"), ("345", "shared"), ("678", "shared")]


def test_many_keys_share_runs_up_to_a_number_of_batches() -> None:
    shares = share_runs([batch(str(number), size=1) for number in range(1100)], LIMITS)
    assert [len(share.batches) for share in shares] == [500, 500, 100]


def test_a_hot_key_has_a_run_of_its_own_among_many() -> None:
    shares = share_runs([batch(key, size=500 if key == "d" else 10) for key in "abcdef"], LIMITS)
    assert [(keys(share), share.why) for share in shares] == [("d", "hot key"), ("abcef", "shared")]


def test_a_batch_beyond_the_budget_runs_alone() -> None:
    shares = share_runs([batch("large", size=5000), batch("small")], LIMITS)
    assert [[found.key for found in share.batches] for share in shares] == [["large"], ["small"]]


def test_the_oldest_batches_run_first_and_the_rest_wait() -> None:
    shares = share_runs([batch(str(number), size=1000, sealed_at=-number) for number in range(5)], LIMITS)
    assert [keys(share) for share in shares] == ["4", "3", "2"]


def test_a_flood_of_one_key_stands_back_behind_every_other_key() -> None:
    flood = [batch("F", size=1000, sealed_at=number, id=str(number)) for number in range(50)]
    shares = share_runs([*flood, batch("a", sealed_at=60), batch("b", sealed_at=70)], LIMITS)
    assert [(keys(share), share.behind) for share in shares] == [("F", 0), ("a", 0), ("b", 0)]
    shares = share_runs([*flood, batch("a", sealed_at=60), batch("b", sealed_at=70)], LIMITS, waiting={"F": 2})
    assert [(keys(share), share.behind) for share in shares] == [("a", 0), ("b", 0), ("F", 2)]


@given(st.lists(st.builds(batch, st.sampled_from("abcdefgh"), st.integers(0, 2000), st.integers(0, 9)), max_size=30))
def test_no_batch_runs_twice_and_no_run_exceeds_the_budget(batches: list[Batch]) -> None:
    shares = share_runs(batches, LIMITS)
    assert len(shares) <= LIMITS.runs
    assert sum(len(share.batches) for share in shares) <= len(batches)
    assert all(
        len(share.batches) == 1 or sum(found.size for found in share.batches) <= LIMITS.run_bytes for share in shares
    )
    if batches:
        assert shares
