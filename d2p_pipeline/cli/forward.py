"""`d2p forward`: the Forward listener alone."""

from typing import Annotated

import typer

from d2p_pipeline.cli.setup import ConfigFile, check_records, redis, settings_of


def forward(
    config: ConfigFile = None,
    address: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default: 24224).")] = None,
) -> None:
    """Take records from Fluent Bit's and Fluentd's forward outputs into the buffer.

    SIGTERM: stop accepting, store and acknowledge what has arrived, exit 0.
    """
    settings = settings_of(config, forward_address=address, forward_port=port)
    check_records(settings)
    with redis(settings):
        from d2p_pipeline.ingest.listen import listen

        raise typer.Exit(listen(settings_of(None)))
