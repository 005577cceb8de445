"""Batches delivered in one step of a run, one after the other: what `recovery` does, and a flush that goes on."""

from collections.abc import Sequence

import dagster as dg

from d2p_pipeline.buffer.protocol import BatchRef
from d2p_pipeline.delivery import Delivered
from d2p_pipeline.logs import plain
from d2p_pipeline.orchestration.failures import put_into_recovery
from d2p_pipeline.orchestration.io_manager import ParquetIOManager
from d2p_pipeline.orchestration.resources import DeliveryResource


def deliver(
    parts: DeliveryResource,
    parquet: ParquetIOManager,
    refs: Sequence[BatchRef],
    context: dg.AssetExecutionContext | dg.OpExecutionContext,
) -> tuple[list[Delivered], dict[BatchRef, Exception]]:
    """Deliver what is left of batches. A batch that fails goes (back) into recovery with its reason, and holds up no other."""
    delivered: list[Delivered] = []
    failed: dict[BatchRef, Exception] = {}
    planned = parts.plan(refs)
    failed |= planned.refused
    for ref in planned.skipped:
        context.log.info(plain(f"key={ref.key} batch={ref.id} skipped: delivered already, or another run holds it"))
    for unit in planned.units:
        if all(part.claim.batch in failed for part in unit.parts):
            continue
        try:
            rows = parts.check(parts.read(unit))
            delivered += parts.acknowledge(rows, parquet.write(parts.build(rows)), parquet.remove)
        except Exception as error:  # noqa: BLE001  # nothing about one batch may hold up the others
            for part in unit.parts:
                failed[part.claim.batch] = error
                put_into_recovery(parts, part.claim, error, context.instance, context.log)
    return delivered, failed
