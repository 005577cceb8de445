from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.orchestration.keys import key_of, partition_of

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text(
    st.sampled_from(".,|%/: \n\x00"), min_size=1
)


@given(keys)
def test_every_key_survives_as_a_partition_that_dagster_accepts(key: str) -> None:
    partition = partition_of(key)
    assert key_of(partition) == key
    assert "..." not in partition
    assert partition.isascii()
    assert partition.isprintable()
    assert not set(",|\\") & set(partition)


def test_ordinary_keys_stay_readable() -> None:
    assert partition_of("card payments/eu:west") == "card payments/eu:west"
