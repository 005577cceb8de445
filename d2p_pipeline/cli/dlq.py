"""`d2p dlq`: dead letters, listed, shown, replayed and discarded."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2p_pipeline.cli.setup import ConfigFile, redis, settings_of

if TYPE_CHECKING:
    from d2p_pipeline.buffer.redis import RedisBuffer
    from d2p_pipeline.dead_letters import Outcome, Selection
    from d2p_pipeline.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look at dead letters, replay them, throw them away.")

Keys = Annotated[list[str] | None, typer.Option("--key", "-k", help="Of this key; may be repeated. Default: all keys.")]
Reason = Annotated[str, typer.Option(help="Whose reason contains this text.")]
Stage = Annotated[str, typer.Option(help="Rejected at this stage: receive, parse or validate.")]
Since = Annotated[datetime | None, typer.Option(help="Received since then (UTC).")]
Until = Annotated[datetime | None, typer.Option(help="Received until then (UTC).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")]


@app.command("list")
def list_(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = None,
    until: Until = None,
) -> None:
    """Count dead letters by key, stage and reason, with when the first and the last came."""
    from rich.console import Console
    from rich.table import Table

    from d2p_pipeline.dead_letters import select

    groups: dict[tuple[str, str, str], list[int]] = {}
    with _buffer(config) as (_, buffer):
        for stored in select(buffer, _selection(key, reason, stage, since, until)):
            group = groups.setdefault((stored.key, stored.letter.stage, stored.letter.reason), [0, 1 << 62, 0])
            received = stored.letter.received_at
            group[:] = [group[0] + 1, min(group[1], received), max(group[2], received)]
    if not groups:
        typer.echo("No dead letters.")
        return
    table = Table(box=None, header_style="bold")
    for name in ("key", "stage", "reason", "letters", "first", "last"):
        table.add_column(name, justify="right" if name == "letters" else "left", overflow="fold")
    for (name, at, why), (count, first, last) in sorted(groups.items(), key=lambda group: -group[1][0]):
        table.add_row(name, at, why, f"{count:,}", _moment(first), _moment(last))
    Console().print(table)


@app.command()
def show(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
) -> None:
    """Print dead letters as JSON lines: reason, stage, time, batch and the record as received."""
    from itertools import islice

    from d2p_pipeline.dead_letters import select

    with _buffer(config) as (_, buffer):
        for stored in islice(select(buffer, _selection(key, reason, stage, since, until)), limit):
            typer.echo(stored.data.decode())


@app.command()
def replay(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = None,
    until: Until = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value, set in every record first.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Send rejected records again, on the way every record takes. Those rejected again stay, with their history.

    Exit code 1: some were rejected again.
    """
    from d2p_pipeline import wiring
    from d2p_pipeline.dead_letters import replay as replay_letters
    from d2p_pipeline.records.accept import acceptor

    changes = dict(_assignment(one) for one in set_ or ())
    with _buffer(config) as (settings, buffer):
        accept = acceptor(wiring.rules(settings))

        def canonical(raw: bytes) -> tuple[str, bytes]:
            found = accept.canonical(raw)
            return found.key, found.line

        selection = _selection(key, reason, stage, since, until)
        outcome = replay_letters(buffer, canonical, selection, changes, dry_run=dry_run)
    verb = "would be replayed" if dry_run else "replayed"
    typer.echo(f"{outcome.replayed:,} of {outcome.selected:,} dead letters {verb}")
    _tell_rejected(outcome)


@app.command()
def discard(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = None,
    until: Until = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Throw dead letters away for good; they stay counted as discarded."""
    from d2p_pipeline.dead_letters import discard as discard_letters

    selection = _selection(key, reason, stage, since, until)
    with _buffer(config) as (_, buffer):
        count = discard_letters(buffer, selection, dry_run=True).selected
        if dry_run or not count:
            typer.echo(f"{count:,} dead letters would be discarded")
            return
        if not yes:
            typer.confirm(f"Discard {count:,} dead letters for good?", abort=True)
        typer.echo(f"{discard_letters(buffer, selection).discarded:,} dead letters discarded")


def _tell_rejected(outcome: "Outcome") -> None:
    for reason, count in outcome.rejected_again.most_common(10):
        typer.echo(f"{count:,} rejected again: {reason}", err=True)
    if outcome.rejected_again:
        raise typer.Exit(1)


@contextlib.contextmanager
def _buffer(config: Any) -> "Iterator[tuple[Settings, RedisBuffer]]":
    from d2p_pipeline import wiring

    settings = settings_of(config)
    with redis(settings):
        settings = settings_of(None)
        buffer, _ = wiring.open_buffer(settings)
        with contextlib.closing(buffer):
            yield settings, buffer


def _selection(
    keys: list[str] | None, reason: str, stage: str, since: datetime | None, until: datetime | None
) -> "Selection":
    from d2p_pipeline.dead_letters import Selection

    everything = Selection()
    return Selection(
        keys=tuple(keys or ()),
        reason=reason,
        stage=stage,
        since=_milliseconds(since) if since else everything.since,
        until=_milliseconds(until) if until else everything.until,
    )


def _assignment(text: str) -> tuple[str, object]:
    """`field=value`; a value that is JSON is taken as JSON, any other as text."""
    import msgspec

    name, separator, value = text.partition("=")
    if not name or not separator:
        raise typer.BadParameter(f"{text!r} is not field=value", param_hint="--set")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


def _milliseconds(moment: datetime) -> int:
    return int(moment.replace(tzinfo=UTC).timestamp() * 1000)


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
