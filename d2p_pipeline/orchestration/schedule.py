"""What runs by the clock: `periodic_flush` at the times of the setting `flush_cron`, and a look at books and dead letters."""

import dagster as dg

from d2p_pipeline.orchestration.assets import parquet_files
from d2p_pipeline.orchestration.dead_letters import dead_letters
from d2p_pipeline.orchestration.flush import flush
from d2p_pipeline.orchestration.sensor import parts


def periodic_flush(cron: str) -> dg.ScheduleDefinition:
    """The schedule; off until somebody switches it on, because the sensor already flushes by age."""

    @dg.schedule(
        job=flush,
        cron_schedule=cron,
        name="periodic_flush",
        description="Flushes all that waits at the times of `flush_cron`. The buffer sensor flushes by size and age without it.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        del context
        settings, buffer = parts()
        if settings.redis_skip_flush:
            return dg.SkipReason("this instance only receives (redis_skip_flush)")
        if next(iter(buffer.waiting()), None) is None:
            return dg.SkipReason("no buffer has records")
        return dg.RunRequest(
            run_config={"ops": {"plan_units": {"config": {"reason": "schedule"}}}}, tags={"d2p/key": "all that wait"}
        )

    return schedule


inspect = dg.define_asset_job(
    "inspect",
    selection=dg.AssetSelection.assets(dead_letters)
    | dg.AssetSelection.checks(
        *(dg.AssetCheckKey(parquet_files.key, name) for name in ("books_balance", "oldest_record", "reject_share"))
    ),
    executor_def=dg.in_process_executor,
    description="Counts the dead letters and checks the books.",
)

inspection = dg.ScheduleDefinition(
    name="inspection",
    job=inspect,
    cron_schedule="*/15 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Keeps the counts of dead letters and the asset checks fresh.",
)
