from hypothesis import example, given
from hypothesis import strategies as st

from d2p_pipeline.buffer.names import Names, decode_key, encode_key

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text(
    st.sampled_from("%257BD{}0a\x00"), min_size=1
)


@given(keys)
@example("%257B")
@example("%25257B")
def test_every_key_survives_its_redis_name(key: str) -> None:
    names = Names()
    assert decode_key(encode_key(key)) == key
    assert names.key_of(names.of("data", key), "data") == key
    assert names.batch_of(names.of("batch", key, "B1"), "batch") == (key, "B1")


@given(keys)
def test_a_name_holds_no_braces_or_control_characters_of_the_key(key: str) -> None:
    assert not set(encode_key(key)) & (set("{}\x7f") | {chr(code) for code in range(32)})


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="{}"), min_size=1))
def test_the_name_a_foreign_producer_chose_is_the_name_we_use(text: str) -> None:
    assert encode_key(decode_key(text)) == text


def test_ordinary_keys_stay_as_they_are() -> None:
    assert Names().of("data", "card payments/eu: 100%") == b"data:{card payments/eu: 100%}"
    assert Names().key_of(b"keys", "data") is None
    assert Names().key_of(b"database:{k}", "data") is None
