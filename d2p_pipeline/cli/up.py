"""`d2p up`: everything on this host, in the foreground."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from d2p_pipeline.cli.setup import ConfigFile, check_records, check_store, redis, settings_of, target

if TYPE_CHECKING:
    from d2p_pipeline.buffer.protocol import Buffer
    from d2p_pipeline.cli.supervise import Stop, Supervisor
    from d2p_pipeline.settings import Settings

DRAIN_SECONDS = 60.0


def up(
    config: ConfigFile = None,
    port: Annotated[int | None, typer.Option(help="Port of the receiver.")] = None,
    dagster_port: Annotated[int | None, typer.Option(help="Port of the Dagster UI.")] = None,
) -> None:
    """Start Redis (if none is configured), receiver and Dagster. Ctrl-C stops accepting, lets running deliveries end, stops all.

    What is still buffered then stays in Redis and is delivered after the next start.
    """
    from d2p_pipeline.cli.supervise import StartError, Stop, running

    stop = Stop()
    settings = settings_of(config, port=port, dagster_port=dagster_port)
    check_records(settings)
    for note in settings.notes:
        typer.echo(note, err=True)
    is_embedded = settings.redis_dsn() is None
    try:
        with redis(settings):
            settings = settings_of(None)
            check_store(settings)
            with running(settings, lambda text: typer.echo(text, err=True)) as supervisor:
                _greet(settings, is_embedded=is_embedded)
                tend_until_stopped(supervisor, stop)
                drain(settings, supervisor)
    except StartError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error


def _greet(settings: "Settings", *, is_embedded: bool) -> None:
    from d2p_pipeline.buffer.connect import without_password
    from d2p_pipeline.wiring import redis_url

    typer.echo(f"receiver   http://{settings.address}:{settings.port}/records")
    if settings.forward_port is not None:
        typer.echo(f"Forward    {settings.forward_address}:{settings.forward_port}")
    ui = f"http://127.0.0.1:{settings.dagster_port}"
    storage = "PostgreSQL" if settings.dagster_postgres_url else f"under {settings.home / 'dagster'}"
    typer.echo(f"Dagster    {ui} (its storage: {storage})")
    typer.echo(f"recovery   {ui}/assets/recovery")
    typer.echo(f"rejected   {ui}/assets/dead_letters, or d2p dlq list")
    typer.echo(f"flush now  {ui}/locations/d2p/jobs/flush/playground, or POST /flush/")
    typer.echo(f"files      {target(settings)}")
    typer.echo(f"logs       {settings.home / 'logs'}")
    typer.echo(
        f"alerts     {'to alert_webhook_url' if settings.alert_webhook_url else 'nowhere: no alert_webhook_url'}"
    )
    place = f"embedded, under {settings.home / 'redis'}" if is_embedded else without_password(redis_url(settings))
    typer.echo(f"Redis      {place}")
    typer.echo("Ctrl-C ends all.")


def tend_until_stopped(supervisor: "Supervisor", stop: "Stop") -> None:
    """Keep the processes running until somebody asks to stop."""
    while not stop.asked:
        supervisor.tend()
        time.sleep(0.2)


def drain(settings: "Settings", supervisor: "Supervisor") -> None:
    """Stop accepting, then let deliveries end; a memory-only buffer is emptied first, since nothing would keep it."""
    from d2p_pipeline import wiring

    typer.echo("Stopping: the receiver accepts no more, running deliveries end …", err=True)
    supervisor.stop("receiver")
    supervisor.stop("forward listener")
    buffer, _ = wiring.open_buffer(settings)
    if settings.buffer_type == "mem":
        buffer.request_flush()
        _wait(supervisor, lambda: not _has_records(buffer))
    supervisor.stop("daemon")
    _wait(supervisor, lambda: not any(buffer.is_claimed(batch.ref) for batch in buffer.open_batches()))
    left = sum(state.records for state in buffer.waiting()) + sum(batch.records for batch in buffer.open_batches())
    if left:
        typer.echo(f"{left:,} records wait in Redis; they are delivered after the next start.", err=True)
    buffer.close()


def _has_records(buffer: "Buffer") -> bool:
    return next(buffer.waiting(), None) is not None or next(buffer.open_batches(), None) is not None


def _wait(supervisor: "Supervisor", done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DRAIN_SECONDS
    while not done() and time.monotonic() < deadline:
        supervisor.tend()
        time.sleep(0.2)
