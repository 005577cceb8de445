"""Runs the Forward listener in one process, until SIGTERM or SIGINT."""

import asyncio
import logging
import signal

import uvloop

from d2p_pipeline import wiring
from d2p_pipeline.ingest import tls
from d2p_pipeline.ingest.commit import GroupCommit
from d2p_pipeline.ingest.counts import Counted, expose
from d2p_pipeline.ingest.forward import Conversion, Credentials, Forward
from d2p_pipeline.ingest.intake import Intake
from d2p_pipeline.ingest.pressure import Pressure
from d2p_pipeline.settings import Settings

log = logging.getLogger(__name__)

PORT = 24224
"""The protocol's own."""


def listen(settings: Settings) -> int:
    """Serve; returns the command's exit code."""
    return uvloop.run(_listen(settings))


async def _listen(settings: Settings) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    buffer, warnings = wiring.open_buffer(settings)
    for warning in warnings:
        log.warning(warning)
    commit = GroupCommit(
        buffer,
        window=max(1, round(settings.push_window)),
        keep_dead_letters=settings.use_dlq,
        pressure=Pressure(buffer, max_key_bytes=settings.max_key_bytes, max_bytes=settings.max_buffer_bytes),
    )
    listener = Forward(
        commit,
        conversion(settings),
        credentials=_credentials(settings),
        max_bytes=settings.max_body_bytes,
        max_connections=settings.forward_connections,
    )
    address, port = settings.forward_address, settings.forward_port or PORT
    try:
        port = await listener.start(address, port, tls.context(settings) if settings.forward_tls else None)
    except OSError as error:
        log.error("cannot listen on %s:%d: %s", address, port, error)  # noqa: TRY400  # the reason is the whole story
        return 1
    log.info("Forward listener on %s:%d%s", address, port, " (TLS)" if settings.forward_tls else "")
    if settings.metrics_port is not None:
        expose(Counted("forward", listener.counts, gauges=("connected",)), settings.address, settings.metrics_port)
    await stop.wait()
    await listener.stop()
    await commit.close()
    buffer.close()
    log.info("%s", listener.counts)
    return 0


def conversion(settings: Settings) -> Conversion:
    """How messages become records, by the settings."""
    intake = Intake(wiring.rules(settings), max_record_bytes=settings.max_record_bytes)
    return Conversion(intake, wiring.completion(settings), max_bytes=settings.max_body_bytes)


def _credentials(settings: Settings) -> Credentials | None:
    if settings.forward_shared_key is None:
        return None
    users = dict(user.get_secret_value().split(":", 1) for user in settings.forward_users)
    return Credentials(settings.forward_shared_key.get_secret_value(), users, settings.redis_lock_instance_name)
