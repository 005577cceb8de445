import pytest

from d2p_pipeline.records.key import key_of

FIELDS = ("business-capability",)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"business-capability": "payments"}', "payments"),
        (b'{"Business_Capability":"pay\\u0041"', "payA"),
        (b'{"a": 1, "business_capability": 12', "12"),
        (b'{"business-capability": ""}', None),
        (b'{"business-capability": null}', None),
        (b'{"business-capability": "cut o', None),
        (b'{"business-capability": "\\ud800"}', None),
        (b'{"business-capability": "\xff"}', None),
        (b"no JSON at all", None),
    ],
)
def test_the_key_is_what_the_text_tells(raw: bytes, key: str | None) -> None:
    assert key_of(raw, FIELDS) == key


def test_several_fields_are_joined_and_all_are_needed() -> None:
    assert key_of(b'{"level":"x","business-capability":"a"}', ("business-capability", "level")) == "a:x"
    assert key_of(b'{"business-capability":"a"}', ("business-capability", "level")) is None
