"""What Dagster loads; nothing but assembly."""

import dagster as dg

from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.checks import books_balance, oldest_record_is_young
from d2p_pipeline.orchestration.dead_letters import dead_letters, discard_dead_letters, replay_dead_letters
from d2p_pipeline.orchestration.flush import acknowledge, flush
from d2p_pipeline.orchestration.io_manager import ParquetIOManager, UnitMemory
from d2p_pipeline.orchestration.recovery import recover, recovery, recovery_sensor
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.schedule import inspect, inspection, periodic_flush
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline.settings import load

SETTINGS = load()

defs = dg.Definitions(
    assets=[parquet_files, recovery, dead_letters],
    asset_checks=[books_balance, oldest_record_is_young(SETTINGS.lag_limit)],
    jobs=[flush, recover, inspect, replay_dead_letters, discard_dead_letters],
    sensors=[buffer_sensor, recovery_sensor],
    schedules=[periodic_flush(SETTINGS.flush_cron), inspection],
    resources={
        "delivery_parts": DeliveryResource(),
        "parquet": ParquetIOManager(),
        "memory": UnitMemory(last_op=acknowledge.name),
    },
    executor=dg.in_process_executor,
)
