"""What Dagster loads; nothing but assembly."""

from typing import TYPE_CHECKING

import dagster as dg

from d2p_pipeline import wiring
from d2p_pipeline.orchestration.alerts import alerts
from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.checks import books_balance, few_are_rejected, oldest_record_is_young
from d2p_pipeline.orchestration.dead_letters import (
    dead_letters,
    discard_dead_letters,
    replay_dead_letters,
    spill_dead_letters,
    spilling,
)
from d2p_pipeline.orchestration.flush import acknowledge, flush, read_records, validate_records
from d2p_pipeline.orchestration.housekeeping import hourly_housekeeping, housekeeping
from d2p_pipeline.orchestration.io_manager import ParquetIOManager, UnitMemory
from d2p_pipeline.orchestration.recovery import recover, recovery, recovery_sensor
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.schedule import inspect, inspection, periodic_flush
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline.settings import load

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource


def build_defs(s3: "S3Resource | None" = None) -> dg.Definitions:
    """Everything Dagster needs. With `s3`, files go to the bucket through that resource, and the settings name no region,
    endpoint or role; assets merged with these may use it too."""
    settings = load()
    if s3 is not None:
        wiring.check_s3_resource(settings, s3)
    return dg.Definitions(
        assets=[parquet_files, recovery, dead_letters],
        asset_checks=[
            books_balance,
            oldest_record_is_young(settings.lag_limit),
            few_are_rejected(settings.reject_limit, settings.reject_window),
        ],
        jobs=[flush, recover, inspect, replay_dead_letters, discard_dead_letters, spill_dead_letters, housekeeping],
        sensors=[buffer_sensor, recovery_sensor, alerts],
        schedules=[periodic_flush(settings.flush_cron), inspection, spilling, hourly_housekeeping],
        resources={
            "delivery_parts": DeliveryResource(),
            "parquet": ParquetIOManager(s3=s3) if s3 else ParquetIOManager(),
            "memory": UnitMemory(last_op=acknowledge.name, spent={validate_records.name: read_records.name}),
            **({"s3": s3} if s3 else {}),
        },
        executor=dg.in_process_executor,
    )


defs = build_defs()
