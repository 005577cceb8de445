"""What the catalogue shows: `parquet_files`, one partition per key, with the figures of each delivery."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import dagster as dg

from d2p_pipeline.delivery import Delivered
from d2p_pipeline.orchestration.keys import PARTITIONS, partition_of
from d2p_pipeline.orchestration.markdown import code

keys = dg.DynamicPartitionsDefinition(name=PARTITIONS)

parquet_files = dg.AssetSpec(
    "parquet_files",
    partitions_def=keys,
    group_name="delivery",
    kinds={"parquet"},
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(days=1), warn_window=timedelta(hours=1)),
    description=(
        "Validated records as partitioned Parquet files, one partition per business capability. The `flush` job writes them; "
        "an asset that takes this one as its input receives a Polars LazyFrame over its key's files."
    ),
).with_io_manager_key("parquet")


def report_deliveries(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, parts: Sequence[Delivered], *, now: int, took: float
) -> None:
    """Show what a run delivered: one materialization of `parquet_files` per key."""
    events = list(_materializations(parts, now=now, took=took))
    if events:
        context.instance.add_dynamic_partitions(PARTITIONS, [cast(str, event.partition) for event in events])
    for event in events:
        context.log_event(event)


def _materializations(parts: Sequence[Delivered], *, now: int, took: float) -> Iterator[dg.AssetMaterialization]:
    """One event per key; `now` in ms by the buffer's clock, `took` in seconds since the run began."""
    by_key: dict[str, list[Delivered]] = {}
    for part in parts:
        by_key.setdefault(part.part.claim.batch.key, []).append(part)
    total = sum(part.rows for part in parts)
    for key, delivered in by_key.items():
        yield dg.AssetMaterialization(
            asset_key=parquet_files.key,
            partition=partition_of(key),
            metadata=_figures(delivered, now, total / took if took > 0 else 0.0),
            tags={},
        )


def _figures(delivered: Sequence[Delivered], now: int, rows_per_second: float) -> dict[str, Any]:
    files = [file for part in delivered for file in part.files]
    reasons: dict[str, int] = {}
    for part in delivered:
        for reason, count in part.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    rejected = sum(reasons.values())
    first = min(part.part.first for part in delivered)
    figures: dict[str, Any] = {
        "dagster/row_count": sum(part.rows for part in delivered),
        "bytes": sum(file.size for file in files),
        "files": len(files),
        "dead_letters": rejected,
        "lag_seconds": (now - first) / 1000,
        "rows_per_second": rows_per_second,
        "sealed_by": ", ".join(sorted({part.part.reason for part in delivered})),
        "batches": dg.MetadataValue.md("\n".join(f"- `{batch}`" for batch in _batches(delivered)[:20])),
        "paths": dg.MetadataValue.md("\n".join(f"- {code(file.path)}" for file in files[:20])),
        "preview": dg.MetadataValue.md(_preview(delivered[0].preview)),
    }
    if rejected:
        figures["dead_letter_reasons"] = dg.MetadataValue.json(
            dict(sorted(reasons.items(), key=lambda item: -item[1])[:20])
        )
    return figures


def _batches(delivered: Sequence[Delivered]) -> list[str]:
    return sorted({part.part.claim.batch.id for part in delivered})


_PREVIEW_COLUMNS = 8


def _preview(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of the first columns that hold something."""
    if not rows:
        return "no rows"
    columns = list(dict.fromkeys(name for row in rows for name in row))[:_PREVIEW_COLUMNS]
    lines = ["| " + " | ".join(map(code, columns)) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(code(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
