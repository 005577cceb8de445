"""A key as Dagster's partition key: percent-encoded where Dagster, its CLI or its UI would trip over a character."""

from urllib.parse import quote, unquote

PARTITIONS = "keys"
"""Name of the dynamic partition set of keys."""

RECOVERY = "recovery"
"""Name of the dynamic partition set of batches whose delivery failed; a partition is a batch's id."""


def partition_of(key: str) -> str:
    """Encodes `%`, control characters, separators Dagster uses (`,` `|` `...`) and everything beyond ASCII."""
    return quote(key, safe=" !#$&'()*+-./:;=?@[]^_`{}~<>\"").replace("...", "%2E%2E%2E")


def key_of(partition: str) -> str:
    """The inverse of `partition_of`."""
    return unquote(partition)
