"""What Dagster loads; nothing but assembly."""

import dagster as dg

from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.flush import acknowledge, flush
from d2p_pipeline.orchestration.io_manager import ParquetIOManager, UnitMemory
from d2p_pipeline.orchestration.recovery import recover, recovery, recovery_sensor
from d2p_pipeline.orchestration.resources import DeliveryResource
from d2p_pipeline.orchestration.schedule import periodic_flush
from d2p_pipeline.orchestration.sensor import buffer_sensor
from d2p_pipeline.settings import load

defs = dg.Definitions(
    assets=[parquet_files, recovery],
    jobs=[flush, recover],
    sensors=[buffer_sensor, recovery_sensor],
    schedules=[periodic_flush(load().flush_cron)],
    resources={
        "delivery_parts": DeliveryResource(),
        "parquet": ParquetIOManager(),
        "memory": UnitMemory(last_op=acknowledge.name),
    },
    executor=dg.in_process_executor,
)
