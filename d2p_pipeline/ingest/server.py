"""Runs the receiver under granian: one listening socket, `workers` processes, graceful end on SIGTERM.

Workers read the settings from the environment, so whoever starts the server puts them there (`Settings.environment`). One
that dies is replaced; the others go on. HTTP/1.1 only, with keep-alive and pipelining; no access log.
"""

import asyncio
import logging
import os
import resource
import tempfile
from typing import TYPE_CHECKING, Any

from granian._granian import RSGIHTTPProtocol as HTTPProtocol
from granian.constants import HTTPModes, Interfaces, Loops, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.rsgi import Scope
from granian.server import Server

from d2p_pipeline import logs, wiring
from d2p_pipeline.buffer.embedded import end_with_parent
from d2p_pipeline.settings import Settings, load

if TYPE_CHECKING:
    from d2p_pipeline.ingest.receiver import Receiver

log = logging.getLogger(__name__)

HEADER_BYTES = 64 << 10
"""Longest request head; there may be 100 headers. Also how much of a body is read at once."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""


class Application:
    """The target granian loads in each worker; opens the buffer once the event loop is there."""

    def __init__(self) -> None:
        self._receiver: Receiver | None = None

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        end_with_parent()  # a worker that outlived its server would go on under settings that are no more
        settings = load()
        logs.configure(settings.log_formatter, debug=settings.debug)
        self._receiver = receiver(settings)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._receiver:
            loop.run_until_complete(self._receiver.close())

    async def __rsgi__(self, scope: Scope, protocol: HTTPProtocol) -> Any:
        assert self._receiver
        return await self._receiver.__rsgi__(scope, protocol)


def receiver(settings: Settings) -> "Receiver":
    """The receiver that the settings describe."""
    # prometheus-client chooses how to count when it is imported: not before the worker has its environment.
    from d2p_pipeline.ingest.commit import GroupCommit
    from d2p_pipeline.ingest.metrics import Metrics
    from d2p_pipeline.ingest.pressure import Pressure
    from d2p_pipeline.ingest.reading import Bodies, Limits
    from d2p_pipeline.ingest.receiver import Receiver
    from d2p_pipeline.ingest.tokens import Tokens

    buffer, _ = wiring.open_buffer(settings)
    bodies = Bodies(
        Limits(
            body_bytes=settings.max_body_bytes,
            record_bytes=settings.max_record_bytes,
            keys=settings.max_request_keys,
            expansion=settings.max_expansion,
            body_seconds=settings.body_timeout,
            memory_bytes=settings.max_held_bytes,
        )
    )
    metrics = Metrics(buffer, lambda: bodies.held)
    commit = GroupCommit(
        buffer,
        window=max(1, round(settings.push_window)),
        keep_dead_letters=settings.use_dlq,
        pressure=Pressure(buffer, max_key_bytes=settings.max_key_bytes, max_bytes=settings.max_buffer_bytes),
        observe=metrics.committed,
    )
    tokens = Tokens([token.get_secret_value() for token in settings.tokens], settings.tokens_file)
    return Receiver(
        buffer,
        wiring.rules(settings),
        commit,
        bodies=bodies,
        tokens=tokens,
        metrics=metrics,
        completion=wiring.completion(settings),
    )


application = Application()


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT: then stop accepting, finish what is in flight, return."""
    buffer, warnings = wiring.open_buffer(settings)
    buffer.close()
    for warning in warnings:
        log.warning(warning)
    _allow_connections(settings.max_connections)
    with tempfile.TemporaryDirectory(prefix="d2p-metrics-") as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        Server(
            f"{__name__}:application",
            address=settings.address,
            port=settings.port,
            interface=Interfaces.RSGI,
            workers=settings.workers,
            loop=Loops.uvloop,
            http=HTTPModes.http1,
            websockets=False,
            backlog=BACKLOG,
            backpressure=max(1, settings.max_connections // settings.workers),
            http1_settings=HTTP1Settings(
                header_read_timeout=round(settings.header_timeout * 1000),
                max_buffer_size=HEADER_BYTES,
                pipeline_flush=True,
            ),
            log_level=LogLevels.warning,
            log_access=False,
            ssl_cert=settings.tls_cert,
            ssl_key=settings.tls_key,
            ssl_protocol_min=SSLProtocols.tls12,
            ssl_ca=settings.tls_client_ca,
            ssl_client_verify=settings.tls_client_ca is not None,
            respawn_failed_workers=True,
            workers_kill_timeout=30,
        ).serve()


def _allow_connections(connections: int) -> None:
    """Raise the limit on open files as far as it takes and the system lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
