"""`d2p receive`: the HTTP receiver alone."""

from typing import Annotated

import typer

from d2p_pipeline.cli.setup import ConfigFile, check_receiver, check_records, redis, settings_of


def receive(
    config: ConfigFile = None,
    address: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that receive.")] = None,
) -> None:
    """Take records over HTTP into the buffer. SIGTERM: stop accepting, finish what is in flight, exit 0."""
    settings = settings_of(config, address=address, port=port, workers=workers)
    check_records(settings)
    check_receiver(settings)
    with redis(settings):
        from d2p_pipeline.ingest.server import serve

        raise typer.Exit(serve(settings_of(None)))
