"""Asset checks: the books of every key balance, no record waits too long, and not too many are rejected."""

import dagster as dg

from d2p_pipeline import books, rejects
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.resources import DeliveryResource

SHOWN = 20
RECORDS_JUDGED = 100
"""A key with fewer records in the window is judged only as a part of all."""


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
        waiting = books.waiting(delivery_parts.buffer)
        waits = {key: (waiting.time - book.oldest) / 1000 for key, book in waiting.keys.items() if book.oldest}
        late = {key: wait for key, wait in waits.items() if wait > limit_seconds}
        return dg.AssetCheckResult(
            passed=not late,
            metadata={
                "oldest_seconds": max(waits.values(), default=0.0),
                "late_keys": dg.MetadataValue.json(dict(sorted(late.items(), key=lambda entry: -entry[1])[:SHOWN])),
            },
        )

    return oldest_record


def few_are_rejected(limit: float, window_seconds: float) -> dg.AssetChecksDefinition:
    """A check that fails when more than the share `limit` of the records of the last `window_seconds` was rejected."""

    @dg.asset_check(
        asset=parquet_files.key,
        description=(
            f"At most {limit:.1%} of the records of the last {window_seconds / 60:.0f} min were rejected: of all, and of each "
            f"key with {RECORDS_JUDGED} or more."
        ),
    )
    def reject_share(delivery_parts: DeliveryResource) -> dg.AssetCheckResult:
        buffer = delivery_parts.buffer
        found = rejects.look(buffer.letters, buffer.now(), int(window_seconds * 1000))
        every = rejects.Rejects(sum(one.records for one in found.values()), sum(one.rejected for one in found.values()))
        over = {key: one.share for key, one in found.items() if one.records >= RECORDS_JUDGED and one.share > limit}
        return dg.AssetCheckResult(
            passed=every.share <= limit and not over,
            metadata={
                "reject_share": every.share,
                "rejected": every.rejected,
                "records": every.records,
                "keys_over_the_limit": dg.MetadataValue.json(
                    dict(sorted(over.items(), key=lambda entry: -entry[1])[:SHOWN])
                ),
            },
        )

    return reject_share
