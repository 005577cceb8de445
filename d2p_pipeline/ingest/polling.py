"""Runs the SQS door in one process, until SIGTERM or SIGINT."""

import asyncio
import logging
import re
import signal
from typing import Any

import uvloop
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

from d2p_pipeline import wiring
from d2p_pipeline.ingest.commit import GroupCommit
from d2p_pipeline.ingest.counts import Counted, expose
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.messages import Messages, S3Objects
from d2p_pipeline.ingest.pressure import Pressure
from d2p_pipeline.ingest.sqs import Pollers, Queue
from d2p_pipeline.settings import Settings

log = logging.getLogger(__name__)

_URL_REGION = re.compile(r"https://sqs\.([a-z0-9-]+)\.")


def poll(settings: Settings) -> int:
    """Move messages; returns the command's exit code."""
    return uvloop.run(_poll(settings))


async def _poll(settings: Settings) -> int:
    assert settings.sqs_queue_url
    try:
        queue = Queue(
            client("sqs", settings), settings.sqs_queue_url, wait=settings.sqs_wait, visibility=settings.sqs_visibility
        )
        queue.depth()
        objects = S3Objects(client("s3", settings)) if "s3" in settings.sqs_unwrap else None
    except (BotoCoreError, ClientError) as error:
        log.error("the queue %s cannot be read: %s", settings.sqs_queue_url, error)  # noqa: TRY400
        return 2
    buffer, warnings = wiring.open_buffer(settings)
    for warning in warnings:
        log.warning(warning)
    commit = GroupCommit(
        buffer,
        window=max(1, round(settings.sqs_window)),
        keep_dead_letters=settings.use_dlq,
        pressure=Pressure(buffer, max_key_bytes=settings.max_key_bytes, max_bytes=settings.max_buffer_bytes),
    )
    intake = Intake(wiring.rules(settings), max_record_bytes=settings.max_record_bytes)
    messages = Messages(
        intake, max_record_bytes=settings.max_record_bytes, sns="sns" in settings.sqs_unwrap, objects=objects
    )
    pollers = Pollers(queue, commit, messages, least=settings.sqs_min_pollers, most=settings.sqs_max_pollers)
    if settings.metrics_port is not None:
        expose(Counted("sqs", pollers.counts, gauges=("pollers",)), settings.address, settings.metrics_port)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, pollers.stop)
    log.info("reading %s", settings.sqs_queue_url)
    await pollers.run()
    await commit.close()
    buffer.close()
    log.info("%s", pollers.counts)
    return 0


def client(service: str, settings: Settings) -> Any:
    """A client of botocore, as the settings of the queue say."""
    session = Session()
    url_region = _URL_REGION.match(settings.sqs_queue_url or "")
    region = settings.sqs_region or (url_region and url_region[1]) or session.get_config_variable("region")
    config = Config(
        connect_timeout=5,
        read_timeout=settings.sqs_wait + 20,
        retries={"mode": "standard", "total_max_attempts": 2},
        max_pool_connections=2 * settings.sqs_max_pollers + 2,
        s3={"addressing_style": "path"} if settings.sqs_endpoint else None,
    )
    return session.create_client(
        service, region_name=region or settings.s3_region, endpoint_url=settings.sqs_endpoint, config=config
    )
