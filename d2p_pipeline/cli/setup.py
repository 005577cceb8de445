"""What every command that works on the buffer does first: settings, logging, and a Redis to work with."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from d2p_pipeline.settings import Settings

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="File to read settings from (default: D2P_CONFIG).")
]


def settings_of(config: Path | None, **flags: Any) -> "Settings":
    """The settings in force; what is wrong with them ends the command with exit code 2."""
    from d2p_pipeline import logs
    from d2p_pipeline.settings import SettingsError, load

    try:
        settings = load(config, **flags)
    except SettingsError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    logs.configure(settings.log_formatter, debug=settings.debug)
    return settings


def check_records(settings: "Settings") -> None:
    """Prove that records can be read and transformed as the settings say; what is wrong ends the command with exit code 2."""
    from d2p_pipeline import wiring
    from d2p_pipeline.settings import SettingsError

    try:
        wiring.check_records(settings)
    except SettingsError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error


def check_receiver(settings: "Settings") -> None:
    """Prove that tokens and certificates can be used; what is wrong ends the command with exit code 2."""
    from d2p_pipeline.ingest import tls
    from d2p_pipeline.ingest.tokens import TokenFileError, read

    try:
        if settings.tokens_file:
            read(settings.tokens_file)
        tls.context(settings)
    except (TokenFileError, OSError) as error:
        typer.echo(f"the receiver cannot start: {error}", err=True)
        raise typer.Exit(2) from error


def check_store(settings: "Settings") -> None:
    """Prove that files can be written where they are to go; what is wrong ends the command with exit code 2."""
    from d2p_pipeline import wiring
    from d2p_pipeline.parquet.errors import StoreError

    try:
        wiring.store(settings).check()
    except (StoreError, OSError) as error:
        typer.echo(f"files cannot be written to {target(settings)}: {error}", err=True)
        raise typer.Exit(2) from error


def target(settings: "Settings") -> str:
    """Where files go, as people say it."""
    if settings.writer_type == "aws-s3":
        return f"s3://{settings.s3_bucket_name}/{settings.s3_prefix}".rstrip("/")
    return settings.writer_url or str(settings.writer_file_path)


@contextlib.contextmanager
def redis(settings: "Settings") -> Iterator[None]:
    """A Redis for as long as the block lasts: the configured one, or the embedded server.

    Child processes find it, and all settings, in the environment.
    """
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.connect import RedisRefusedError
    from d2p_pipeline.buffer.protocol import BufferUnavailableError

    # A file may name things relative to this directory; its values travel, not its name.
    os.environ.pop("D2P_CONFIG", None)
    os.environ.update(settings.environment())
    try:
        with contextlib.ExitStack() as stack:
            if settings.redis_dsn() is None:
                server = stack.enter_context(wiring.embedded(settings))
                os.environ["D2P_REDIS_URL"] = server.url
            yield
    except (RedisRefusedError, BufferUnavailableError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
