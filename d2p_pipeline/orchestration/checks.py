"""Asset checks: the books of every key balance, and no record waits too long."""

import dagster as dg

from d2p_pipeline.buffer.protocol import Buffer, Totals
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.resources import DeliveryResource

LOOKS = 5
"""The buffer is read key by key while records move; only a difference that stays is one."""
SHOWN = 20


@dg.asset_check(
    asset=parquet_files.key,
    description="For every key: accepted = rows + dead letters + discarded + buffered + in batches or recovery.",
)
def books_balance(delivery_parts: DeliveryResource) -> dg.AssetCheckResult:
    """Records of producers that push by themselves are accepted when they are delivered, so they cannot be missing."""
    differences = unbalanced(delivery_parts.buffer)
    for _ in range(LOOKS):
        if not differences:
            break
        again = unbalanced(delivery_parts.buffer)
        differences = {key: found for key, found in again.items() if differences.get(key) == found}
    return dg.AssetCheckResult(
        passed=not differences,
        metadata={
            "keys_out_of_balance": len(differences),
            "differences": dg.MetadataValue.json(dict(list(differences.items())[:SHOWN])),
        },
    )


def unbalanced(buffer: Buffer) -> dict[str, int]:
    """Accepted records that are nowhere (or, if negative, too many), by key."""
    waiting: dict[str, int] = {}
    for state in buffer.waiting():
        waiting[state.key] = waiting.get(state.key, 0) + state.counted
    for batch in (*buffer.open_batches(), *buffer.recovering()):
        # What a unit has acknowledged is counted in the totals already.
        waiting[batch.key] = waiting.get(batch.key, 0) + batch.records - batch.rows - batch.dead_letters
    return {
        key: difference
        for key, totals in buffer.totals()
        if (difference := _accounted(totals) - waiting.get(key, 0)) and not _is_foreign(buffer, key)
    }


def _accounted(totals: Totals) -> int:
    return totals.accepted - totals.rows - totals.dead_letters - totals.discarded


def _is_foreign(buffer: Buffer, key: str) -> bool:
    """Whether batches under way hold records that nobody counted yet."""
    return any(batch.key == key and not batch.counted for batch in (*buffer.open_batches(), *buffer.recovering()))


def oldest_record_is_young(limit_seconds: float) -> dg.AssetChecksDefinition:
    """A check that fails when a record has waited for longer than `limit_seconds`."""

    @dg.asset_check(
        asset=parquet_files.key, description=f"No record has waited for a file for more than {limit_seconds:.0f} s."
    )
    def oldest_record(delivery_parts: DeliveryResource) -> dg.AssetCheckResult:
        buffer = delivery_parts.buffer
        now = buffer.now()
        waits = {state.key: now - state.first for state in buffer.waiting()}
        for batch in (*buffer.open_batches(), *buffer.recovering()):
            waits[batch.key] = max(waits.get(batch.key, 0), now - batch.first)
        late = {key: wait / 1000 for key, wait in waits.items() if wait > limit_seconds * 1000}
        return dg.AssetCheckResult(
            passed=not late,
            metadata={
                "oldest_seconds": max(waits.values(), default=0) / 1000,
                "late_keys": dg.MetadataValue.json(dict(sorted(late.items(), key=lambda entry: -entry[1])[:SHOWN])),
            },
        )

    return oldest_record
