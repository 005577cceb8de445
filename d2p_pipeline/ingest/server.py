"""Runs the receiver: one listening socket, `workers` processes that accept from it, graceful end on SIGTERM.

Workers are forked, before anything here has threads. One that dies is replaced; the others go on. The parent does nothing
but wait for signals.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import uvloop

from d2p_pipeline import logs, wiring
from d2p_pipeline.buffer.embedded import end_with_parent
from d2p_pipeline.ingest import tls
from d2p_pipeline.ingest.http import Service
from d2p_pipeline.settings import Settings

if TYPE_CHECKING:
    from d2p_pipeline.ingest.receiver import Receiver

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that may wait to be accepted."""
DRAIN_SECONDS = 30.0
"""How long the end waits for what is in flight."""
SHORTEST_LIFE = 1.0
"""Seconds from a worker's start to its successor's, at least, lest one that cannot start keeps the machine busy."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


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
        access_log=settings.access_log,
    )


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT: then stop accepting, finish what is in flight; returns the command's exit code."""
    buffer, warnings = wiring.open_buffer(settings)
    buffer.close()
    for warning in warnings:
        log.warning(warning)
    _allow_connections(settings.max_connections)
    context = tls.context(settings)
    try:
        listener = _listener(settings.address, settings.port)
    except OSError as error:
        log.error("cannot listen on %s:%d: %s", settings.address, settings.port, error)  # noqa: TRY400  # it says all
        return 1
    with tempfile.TemporaryDirectory(prefix="d2p-metrics-") as directory, listener:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        log.info("receiver on %s:%d%s", settings.address, settings.port, " (TLS)" if context else "")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            _supervise(settings, listener, context)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _supervise(settings: Settings, listener: socket.socket, context: ssl.SSLContext | None) -> None:
    """Keep the workers running until a signal says to end them."""

    def start() -> tuple[BaseProcess, float]:
        worker = get_context("fork").Process(target=_work, args=(settings, listener, context))
        worker.start()
        return worker, time.monotonic()

    workers = [start() for _ in range(settings.workers)]
    while signal.sigwait(_SIGNALS) == signal.SIGCHLD:
        for place, (worker, since) in enumerate(workers):
            if worker.is_alive():
                continue
            log.error("worker %s ended (exit code %s) and is replaced", worker.pid, worker.exitcode)
            if (missing := since + SHORTEST_LIFE - time.monotonic()) > 0 and _ended_within(missing):
                return _end(workers, listener)
            workers[place] = start()
    return _end(workers, listener)


def _ended_within(seconds: float) -> bool:
    """Wait, and tell whether a signal said to end."""
    return signal.sigtimedwait((signal.SIGTERM, signal.SIGINT), seconds) is not None


def _end(workers: list[tuple[BaseProcess, float]], listener: socket.socket) -> None:
    listener.shutdown(socket.SHUT_RDWR)  # of all processes that have it: new clients are turned away at once
    for worker, _ in workers:
        worker.terminate()
    for worker, _ in workers:
        worker.join()
    while signal.sigtimedwait(_SIGNALS, 0):  # a signal that came again asked for no more than this
        pass


def _work(settings: Settings, listener: socket.socket, context: ssl.SSLContext | None) -> None:
    """A worker's life."""
    end_with_parent()  # a worker that outlived its server would go on under settings that are no more
    logs.configure(settings.log_formatter, debug=settings.debug)
    uvloop.run(_served(settings, listener, context))


async def _served(settings: Settings, listener: socket.socket, context: ssl.SSLContext | None) -> None:
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    target = receiver(settings)
    service = Service(
        target.handle,
        head_seconds=settings.header_timeout,
        body_seconds=settings.body_timeout,
        most=max(1, settings.max_connections // settings.workers),
        on_refusal=target.refused,
    )
    accepting = asyncio.create_task(service.accept(listener, context))
    await ending.wait()
    accepting.cancel()
    await service.drain(DRAIN_SECONDS)
    await target.close()


def _listener(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _allow_connections(connections: int) -> None:
    """Raise the limit on open files as far as it takes and the system lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
