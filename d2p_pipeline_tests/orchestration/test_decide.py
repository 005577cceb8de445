"""Why a buffer is sealed, and which batches share a run."""

from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.buffer.protocol import Batch, BufferState
from d2p_pipeline.orchestration.decide import Limits, share_runs, why_seal

LIMITS = Limits(records=100, size=1000, age_ms=5000, run_bytes=1000, runs=3)


def state(records: int = 1, size: int = 1, first: int = 100_000) -> BufferState:
    return BufferState("k", records, size, 1, first)


def batch(key: str, size: int = 10, sealed_at: int = 0, id: str = "B") -> Batch:
    return Batch(
        key=key, id=id, state="open", reason="age", sealed_at=sealed_at, first=0, chunks=1, records=1, size=size,
        counted=True, token=0, requests=0, units_done=frozenset(), rows=0, dead_letters=0,
    )  # fmt: skip


def test_a_buffer_is_sealed_for_the_first_reason_that_holds() -> None:
    now = 101_000
    assert why_seal(state(records=100, size=5000, first=0), now, LIMITS) == "size"
    assert why_seal(state(size=1000, first=0), now, LIMITS) == "bytes"
    assert why_seal(state(first=96_000), now, LIMITS) == "age"
    assert why_seal(state(), now, LIMITS) == "request"


def test_each_key_has_its_own_run_while_the_keys_are_few() -> None:
    runs = share_runs([batch("a"), batch("b"), batch("a", id="B2")], LIMITS)
    assert [[found.key for found in run] for run in runs] == [["a", "a"], ["b"]]


def test_many_small_keys_share_runs_up_to_the_byte_budget() -> None:
    runs = share_runs([batch(f"k{number}", size=300) for number in range(9)], LIMITS)
    assert [len(run) for run in runs] == [3, 3, 3]


def test_a_batch_beyond_the_budget_runs_alone() -> None:
    runs = share_runs([batch("large", size=5000), batch("small")], LIMITS)
    assert [[found.key for found in run] for run in runs] == [["large"], ["small"]]


def test_the_oldest_batches_run_first_and_the_rest_wait() -> None:
    runs = share_runs([batch(f"k{number}", size=1000, sealed_at=-number) for number in range(5)], LIMITS)
    assert [[found.key for found in run] for run in runs] == [["k4"], ["k3"], ["k2"]]


@given(st.lists(st.builds(batch, st.sampled_from("abcdefgh"), st.integers(0, 2000), st.integers(0, 9)), max_size=30))
def test_no_batch_runs_twice_and_no_shared_run_exceeds_the_budget(batches: list[Batch]) -> None:
    runs = share_runs(batches, LIMITS)
    assert len(runs) <= LIMITS.runs
    assert sum(map(len, runs)) <= len(batches)
    assert all(len(run) == 1 or sum(found.size for found in run) <= LIMITS.run_bytes for run in runs)
    if batches:
        assert runs
