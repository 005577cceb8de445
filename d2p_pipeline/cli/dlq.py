"""`d2p dlq`: dead letters, listed, shown, replayed and discarded, in Redis and in the files beside the data."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2p_pipeline.cli.setup import ConfigFile, redis, settings_of
from d2p_pipeline.logs import plain

if TYPE_CHECKING:
    from d2p_pipeline.dead_letters import DeadLetters, Mend, Outcome, Selection, Stored
    from d2p_pipeline.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look at dead letters, replay them, throw them away.")

Keys = Annotated[list[str] | None, typer.Option("--key", "-k", help="Of this key; may be repeated. Default: all keys.")]
Reason = Annotated[str, typer.Option(help="Whose reason contains this text.")]
Stage = Annotated[str, typer.Option(help="Rejected at this stage: receive, parse or validate.")]
Since = Annotated[str, typer.Option(help="Received since then: 2026-11-21, or 2026-11-21T10:30:00+01:00; else UTC.")]
Until = Annotated[str, typer.Option(help="Received until then.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

SHOWN_BYTES = 10_000
"""Of a record that is printed for people; `--json` prints all of it."""


@app.command("list")
def list_(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = "",
    until: Until = "",
    as_json: Json = False,
) -> None:
    """Count dead letters by key, stage and reason, with when the first and the last came.

    `--json` prints an array of objects.
    """
    selection = _selection(key, reason, stage, since, until)
    with _letters(config) as (_, letters):
        groups = letters.count(selection)
    rows = [
        {
            "key": name,
            "stage": at,
            "reason": why,
            "letters": group.letters,
            "first": _moment(group.first),
            "last": _moment(group.last),
        }
        for (name, at, why), group in groups.items()
    ]
    if as_json:
        typer.echo(_json(rows))
    elif not rows:
        typer.echo("No dead letters.")
    else:
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="right" if name == "letters" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else Text(plain(value)) for value in row.values()))
    Console().print(table)


@app.command()
def show(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = "",
    until: Until = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Print dead letters, oldest first per key: reason, earlier reasons, where they come from, and the record as received.

    `--json` prints one object per line.
    """
    from itertools import islice

    selection = _selection(key, reason, stage, since, until)
    with _letters(config) as (_, letters):
        is_empty = True
        for stored in islice(letters.select(selection), limit):
            is_empty = False
            typer.echo(_line(stored) if as_json else _described(stored))
    if is_empty and not as_json:
        typer.echo("No dead letters.")


def _line(stored: "Stored") -> str:
    import msgspec

    return msgspec.json.encode({"key": stored.key, **msgspec.json.decode(stored.letter.to_json())}).decode()


def _described(stored: "Stored") -> str:
    letter = stored.letter
    raw = letter.raw[:SHOWN_BYTES].decode(errors="replace")
    if len(letter.raw) > SHOWN_BYTES:
        raw += f"… ({len(letter.raw):,} bytes in all; --json prints them)"
    facts = [f"received {_moment(letter.received_at)}", f"stage {letter.stage}"]
    facts += [f"batch {letter.batch}"] if letter.batch else []
    facts += [f"in file {stored.file}"] if stored.file else []
    lines = [
        f"{stored.key}: {letter.reason}",
        f"  {', '.join(facts)}",
        *(f"  rejected before: {reason}" for reason in reversed(letter.history)),
        *(f"    {line}" for line in raw.splitlines() or [""]),
        "",
    ]
    return "\n".join(map(plain, lines))


@app.command()
def replay(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = "",
    until: Until = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value, set in every record first.")] = None,
    transform: Annotated[
        str | None, typer.Option(help="module:function, given each letter, returns the record to send, or None.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Send rejected records again, on the way every record takes. Those rejected again stay, with their history.

    Exit code 1: some were rejected again.
    """
    from d2p_pipeline import wiring

    selection, mend = _selection(key, reason, stage, since, until), _mend(set_, transform)
    with _letters(config) as (settings, letters):
        outcome = letters.replay(wiring.canonical(settings), selection, mend, dry_run=dry_run)
    if as_json:
        typer.echo(_json(_figures(outcome) | {"dry_run": dry_run}))
    else:
        verb = "would be replayed" if dry_run else "replayed"
        typer.echo(f"{outcome.replayed:,} of {outcome.selected:,} dead letters {verb}")
        if outcome.left:
            typer.echo(f"{outcome.left:,} left where they are by {transform}")
        for why, count in outcome.rejected_again.most_common(10):
            typer.echo(f"{count:,} rejected again: {plain(why)}", err=True)
    if outcome.rejected_again:
        raise typer.Exit(1)


@app.command()
def discard(
    config: ConfigFile = None,
    key: Keys = None,
    reason: Reason = "",
    stage: Stage = "",
    since: Since = "",
    until: Until = "",
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Throw dead letters away for good; they stay counted as discarded. With `--json`, `--yes` is needed."""
    selection = _selection(key, reason, stage, since, until)
    if as_json and not (yes or dry_run):
        raise typer.BadParameter("needs --yes or --dry-run, because it cannot ask", param_hint="--json")
    with _letters(config) as (_, letters):
        if not yes or dry_run:
            count = letters.discard(selection, dry_run=True).selected
            if dry_run or not count:
                text = f"{count:,} dead letters would be discarded"
                typer.echo(_json({"selected": count, "discarded": 0, "dry_run": dry_run}) if as_json else text)
                return
            typer.confirm(f"Discard {count:,} dead letters for good?", abort=True)
        outcome = letters.discard(selection)
    figures = {"selected": outcome.selected, "discarded": outcome.discarded, "dry_run": False}
    typer.echo(_json(figures) if as_json else f"{outcome.discarded:,} dead letters discarded")


def _figures(outcome: "Outcome") -> dict[str, Any]:
    return {
        "selected": outcome.selected,
        "replayed": outcome.replayed,
        "left": outcome.left,
        "rejected_again": dict(outcome.rejected_again.most_common()),
    }


@contextlib.contextmanager
def _letters(config: Any) -> "Iterator[tuple[Settings, DeadLetters]]":
    """The dead letters; what keeps them from being read or replayed ends the command with exit code 1."""
    from d2p_pipeline import wiring
    from d2p_pipeline.buffer.letters import LettersMovedError
    from d2p_pipeline.buffer.protocol import BufferFullError
    from d2p_pipeline.dead_letters import MendError
    from d2p_pipeline.parquet.errors import StoreError

    settings = settings_of(config)
    with redis(settings):
        settings = settings_of(None)
        buffer, _ = wiring.open_buffer(settings)
        with contextlib.closing(buffer):
            try:
                yield settings, wiring.dead_letters(settings, buffer)
            except (LettersMovedError, BufferFullError, MendError, StoreError, OSError) as error:
                typer.echo(error, err=True)
                raise typer.Exit(1) from error


def _selection(keys: list[str] | None, reason: str, stage: str, since: str, until: str) -> "Selection":
    from d2p_pipeline.dead_letters import Selection

    try:
        return Selection.of(keys or (), reason, stage, since, until)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _mend(assignments: list[str] | None, transform: str | None) -> "Mend":
    from d2p_pipeline.dead_letters import MendError, mending

    changes = dict(_assignment(one) for one in assignments or ())
    try:
        return mending(changes, transform)
    except MendError as error:
        raise typer.BadParameter(str(error), param_hint="--transform") from error


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


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value)).decode()


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
