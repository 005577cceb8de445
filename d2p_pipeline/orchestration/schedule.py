"""`periodic_flush`: everything that waits, at the times of the setting `flush_cron`, whatever the buffer sensor would say."""

import dagster as dg

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
