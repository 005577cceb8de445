"""`d2p status`: what waits, what is being delivered, what was rejected."""

from typing import Annotated, Any

import typer

from d2p_pipeline.cli.setup import ConfigFile, redis, settings_of
from d2p_pipeline.logs import plain


def status(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show every key's buffer, open batches, dead letters, totals and the age of its oldest record."""
    settings = settings_of(config)
    with redis(settings):
        from d2p_pipeline import wiring

        buffer, warnings = wiring.open_buffer(settings_of(None))
        for warning in warnings:
            typer.echo(warning, err=True)
        keys = _keys(buffer)
        recovery = [_failure(batch) for batch in buffer.recovering()]
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode({"keys": keys, "recovery": recovery})).decode())
        return
    if not keys:
        typer.echo("No records yet.")
        return
    _print(keys)
    for failure in recovery:
        what = f"batch {failure['batch']} of {failure['key']}, failed {failure['failures']} times: {failure['error']}"
        typer.echo(f"in recovery: {plain(what)}")


def _failure(batch: Any) -> dict[str, Any]:
    return {"batch": batch.id, "key": batch.key, "failures": batch.failures, "error": batch.error}


def _keys(buffer: Any) -> dict[str, dict[str, Any]]:
    """Per key: records buffered, in batches and in recovery, rows, dead letters, accepted; age of the oldest in seconds."""
    now = buffer.now()
    keys: dict[str, dict[str, Any]] = {}

    def of(key: str) -> dict[str, Any]:
        empty = dict.fromkeys(
            ("accepted", "buffered", "bytes", "batches", "in_batches", "in_recovery", "rows", "dead_letters"), 0
        )
        return keys.setdefault(key, {**empty, "oldest_seconds": 0.0})

    for key, totals in buffer.totals():
        of(key).update(accepted=totals.accepted, rows=totals.rows, dead_letters=totals.dead_letters)
    for batch in (*buffer.open_batches(), *buffer.recovering()):
        entry = of(batch.key)
        entry["batches"] += 1
        place = "in_recovery" if batch.state == "recovery" else "in_batches"
        entry[place] += max(0, batch.records - batch.rows - batch.dead_letters)
        entry["oldest_seconds"] = max(entry["oldest_seconds"], (now - batch.first) / 1000)
    for state in buffer.waiting():
        entry = of(state.key)
        entry.update(buffered=state.records, bytes=state.size)
        entry["oldest_seconds"] = max(entry["oldest_seconds"], (now - state.first) / 1000)
    return dict(sorted(keys.items()))


def _print(keys: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    table.add_column("key", overflow="fold")
    columns = ["accepted", "buffered", "in_batches", "in_recovery", "rows", "dead_letters", "batches", "oldest_seconds"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for key, entry in keys.items():
        table.add_row(Text(plain(key)), *(f"{entry[column]:,.0f}" for column in columns))
    Console().print(table)
