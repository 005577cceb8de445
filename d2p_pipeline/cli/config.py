"""`d2p config`: the settings in force and where each comes from, with secrets hidden."""

import json
from pathlib import Path
from typing import Any

import typer


def config(
    file: Path | None = typer.Option(None, "--config", "-c", help="File to read settings from (default: D2P_CONFIG)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object: name to value and source."),
) -> None:
    """Print every setting, the value in force and its source: default, file, env or flag.

    Secrets are hidden. Notes about settings without effect go to standard error. Exit code 2: the settings are not valid.
    """
    from d2p_pipeline.settings import Settings, SettingsError, load

    try:
        settings = load(file)
    except SettingsError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    rows = {name: (settings.shown(name), settings.origin(name)) for name in Settings.model_fields}
    if as_json:
        typer.echo(
            _json({name: {"value": value, "source": source} for name, (value, source) in rows.items()}, indent=2)
        )
    else:
        for name, (value, source) in rows.items():
            typer.echo(f"{name} = {_json('' if value is None else value)}  # {source}")
    for note in settings.notes:
        typer.echo(note, err=True)


def _json(value: Any, indent: int | None = None) -> str:
    """JSON, whose scalars and lists of strings read as TOML too."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
