import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records.dead_letter import DeadLetter


@given(
    st.builds(
        DeadLetter,
        reason=st.text(st.characters(exclude_categories=["Cs"])),
        stage=st.sampled_from(["receive", "parse", "validate"]),
        received_at=st.integers(0, 253_402_300_799_999),
        raw=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
        batch=st.none() | st.just("01J"),
        history=st.lists(st.just("earlier reason")).map(tuple),
    )
)
def test_a_dead_letter_comes_back_exactly(letter) -> None:
    assert DeadLetter.from_json(letter.to_json()) == letter


def test_the_wire_form_is_readable() -> None:
    letter = DeadLetter(reason="no", stage="parse", received_at=1_700_000_000_123, raw=b'{"a":1}', batch="b1")
    assert json.loads(letter.to_json()) == {
        "reason": "no",
        "stage": "parse",
        "received_at": "2023-11-14T22:13:20.123000Z",
        "batch": "b1",
        "raw": '{"a":1}',
    }


def test_bytes_that_are_not_text_are_carried_as_base64() -> None:
    letter = DeadLetter(reason="no", stage="parse", received_at=0, raw=b"\xff")
    wire = json.loads(letter.to_json())
    assert wire["raw_base64"] == "/w=="
    assert "raw" not in wire


def told(received_at: str = "1970-01-01T00:00:00Z", more: str = '"raw":"x"') -> bytes:
    return f'{{"reason":"r","stage":"parse","received_at":"{received_at}","batch":null,{more}}}'.encode()


SOMETHING_ELSE = {
    "nothing": b"",
    "no fields": b"{}",
    "no record": told(more='"history":[]'),
    "a time of no zone": told("1970-01-01T00:00:00"),
    "a time after all years": told("9999-12-31T23:59:59.9999-23:59"),
    "a time before all years": told("0001-01-01T00:00:00+23:59"),
    "nested without end": told(more='"raw":"x","deep":' + "[" * 100_000),
    "no base64": told(more='"raw_base64":"a!==="'),
}


@pytest.mark.parametrize("data", SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_something_else_is_not_a_dead_letter(data: bytes) -> None:
    """Any program may write into a queue; whoever reads it shows what is no letter as one about itself."""
    assert DeadLetter.from_json(told()).raw == b"x"
    with pytest.raises(ValueError):
        DeadLetter.from_json(data)
    assert DeadLetter.read(data).raw == data
