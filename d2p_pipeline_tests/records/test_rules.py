import pytest

from d2p_pipeline.records.rules import Rules


def test_names_are_kept_normalized_and_aliases_mean_their_field() -> None:
    rules = Rules(key_fields=("Business_Capability",), masked_fields=frozenset({"User_ID", "MSG"}))
    assert rules.key_fields == ("business-capability",)
    assert rules.masked_fields == {"user-id", "message"}


def test_equal_rules_are_equal_values() -> None:
    assert Rules(ignored_fields=frozenset({"a_b"})) == Rules(ignored_fields=frozenset({"A-B"}))
    assert hash(Rules()) == hash(Rules())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"key_fields": ()}, "key_fields: is empty"),
        ({"key_fields": ("nope",)}, "nope is not a field"),
        ({"key_fields": ("audit",)}, "audit is a bool"),
        ({"key_fields": ("region", "region")}, "region is there twice"),
        ({"ignored_fields": frozenset({"when"})}, "time is required"),
        ({"ignored_fields": frozenset({"business-capability"})}, "is a key field"),
        ({"masked_fields": frozenset({"business_capability"})}, "is a key field"),
        ({"masked_fields": frozenset({"time"})}, "time is a timestamp"),
        ({"masked_fields": frozenset({"audit"})}, "audit is a bool"),
        ({"masked_fields": frozenset({"tags"})}, "tags is a list"),
        ({"timestamp_unit": "s"}, "timestamp_unit"),
        ({"column_names": "camel"}, "column_names"),
        ({"record_type": "binary"}, "record_type"),
        (
            {"record_type": "dynamic", "key_fields": ("user.Id",), "masked_fields": frozenset({"id"})},
            "is needed to place",
        ),
        ({"default_capability": ""}, "default_capability"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        Rules(**settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"key_fields.*ignored_fields: level.*mask_fields: tags"):
        Rules(key_fields=("nope",), ignored_fields=frozenset({"level"}), masked_fields=frozenset({"tags"}))
