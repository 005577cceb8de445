"""Runs the receiver under granian: one listening socket, `workers` processes, graceful end on SIGTERM.

Workers read the settings from the environment, so whoever starts the server puts them there (`Settings.environment`).
"""

import asyncio
import logging
from typing import Any

from granian._granian import RSGIHTTPProtocol as HTTPProtocol
from granian.constants import Interfaces, Loops
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.rsgi import Scope
from granian.server import Server

from d2p_pipeline import logs, wiring
from d2p_pipeline.ingest.receiver import Receiver
from d2p_pipeline.settings import Settings, load

log = logging.getLogger(__name__)


class Application:
    """The target granian loads in each worker; opens the buffer once the event loop is there."""

    def __init__(self) -> None:
        self._receiver: Receiver | None = None

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        settings = load()
        logs.configure(settings.log_formatter, debug=settings.debug)
        buffer, _ = wiring.open_buffer(settings)
        self._receiver = Receiver(
            buffer,
            wiring.rules(settings),
            tokens=[token.get_secret_value() for token in settings.tokens],
            max_body_bytes=settings.max_body_bytes,
            max_record_bytes=settings.max_record_bytes,
            push_window=int(settings.push_window),
            keep_dead_letters=settings.use_dlq,
        )

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._receiver:
            loop.run_until_complete(self._receiver.close())

    async def __rsgi__(self, scope: Scope, protocol: HTTPProtocol) -> Any:
        assert self._receiver
        return await self._receiver.__rsgi__(scope, protocol)


application = Application()


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT: then stop accepting, finish what is in flight, return."""
    _, warnings = wiring.open_buffer(settings)
    for warning in warnings:
        log.warning(warning)
    Server(
        f"{__name__}:application",
        address=settings.address,
        port=settings.port,
        interface=Interfaces.RSGI,
        workers=settings.workers,
        loop=Loops.uvloop,
        websockets=False,
        http1_settings=HTTP1Settings(pipeline_flush=True),
        log_level=LogLevels.warning,
        ssl_cert=settings.tls_cert,
        ssl_key=settings.tls_key,
        workers_kill_timeout=30,
    ).serve()
