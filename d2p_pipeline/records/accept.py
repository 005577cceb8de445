"""What a receiver asks of a record: its key and its canonical line, whatever the kind of records."""

from typing import Protocol

from d2p_pipeline.records.normalize import Canonical, Normalizer
from d2p_pipeline.records.rules import Rules


class Acceptor(Protocol):
    """Accepts records one by one."""

    def canonical(self, raw: bytes) -> Canonical:
        """The canonical form of one JSON object; Rejected if there is none."""
        ...


def acceptor(rules: Rules) -> Acceptor:
    """The normalizer for the rules' kind of records."""
    if rules.record_type == "log":
        return Normalizer(rules)
    from d2p_pipeline.records.dynamic.normalize import DynamicNormalizer

    return DynamicNormalizer(rules)
