"""`d2p sqs`: records from an SQS queue."""

from typing import Annotated

import typer

from d2p_pipeline.cli.setup import ConfigFile, check_records, redis, settings_of


def sqs(
    config: ConfigFile = None,
    queue_url: Annotated[str | None, typer.Option(help="URL of the queue.")] = None,
    min_pollers: Annotated[int | None, typer.Option(help="Receive calls at a time, at least.")] = None,
    max_pollers: Annotated[int | None, typer.Option(help="Receive calls at a time, at most.")] = None,
) -> None:
    """Take records from the messages of an SQS queue into the buffer; a message is deleted when Redis has it.

    SIGTERM: receive no more, store and delete what was received, exit 0.
    """
    settings = settings_of(config, sqs_queue_url=queue_url, sqs_min_pollers=min_pollers, sqs_max_pollers=max_pollers)
    if settings.sqs_queue_url is None:
        typer.echo("sqs_queue_url: is required; give it, or --queue-url", err=True)
        raise typer.Exit(2)
    check_records(settings)
    with redis(settings):
        from d2p_pipeline.ingest.polling import poll

        raise typer.Exit(poll(settings_of(None)))
