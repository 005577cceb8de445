"""Asset checks: the books of every key balance, and no record waits too long."""

import dagster as dg

from d2p_pipeline import books
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.resources import DeliveryResource

SHOWN = 20


@dg.asset_check(
    asset=parquet_files.key,
    description="For every key: accepted = rows + dead letters + discarded + buffered + in batches or recovery.",
)
def books_balance(delivery_parts: DeliveryResource) -> dg.AssetCheckResult:
    """Records of producers that push by themselves are accepted when they are delivered, so they cannot be missing."""
    buffer = delivery_parts.buffer
    differences = books.differences(buffer, books.read(buffer))
    return dg.AssetCheckResult(
        passed=not differences,
        metadata={
            "keys_out_of_balance": len(differences),
            "differences": dg.MetadataValue.json(dict(list(differences.items())[:SHOWN])),
        },
    )


def oldest_record_is_young(limit_seconds: float) -> dg.AssetChecksDefinition:
    """A check that fails when a record has waited for longer than `limit_seconds`."""

    @dg.asset_check(
        asset=parquet_files.key, description=f"No record has waited for a file for more than {limit_seconds:.0f} s."
    )
    def oldest_record(delivery_parts: DeliveryResource) -> dg.AssetCheckResult:
        found = books.waiting(delivery_parts.buffer)
        waits = {key: found.time - book.oldest for key, book in found.keys.items() if book.oldest}
        late = {key: wait / 1000 for key, wait in waits.items() if wait > limit_seconds * 1000}
        return dg.AssetCheckResult(
            passed=not late,
            metadata={
                "oldest_seconds": max(waits.values(), default=0) / 1000,
                "late_keys": dg.MetadataValue.json(dict(sorted(late.items(), key=lambda entry: -entry[1])[:SHOWN])),
            },
        )

    return oldest_record
