"""`d2p verify`: whether Parquet files are still what was written."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2p_pipeline.cli.setup import ConfigFile, settings_of

if TYPE_CHECKING:
    from d2p_pipeline.parquet.verify import Report


def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE|DIR…", help="Files, or directories of them.")],
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check Parquet files: the MD5 in the name, the checksums of pages, the footer, and with hmac_key every row's HMAC.

    Exit code 1: a file is not what was written. Exit code 2: there is nothing to check.
    """
    settings = settings_of(config)
    key = settings.hmac_key.get_secret_value().encode() if settings.hmac_key else None
    files = list(_files(paths))
    if not files:
        typer.echo(f"There is no Parquet file in {', '.join(map(str, paths))}.", err=True)
        raise typer.Exit(2)

    from d2p_pipeline.parquet.verify import verify

    reports: list[Report] = []
    for file in files:
        try:
            reports.append(verify(file, key))
        except OSError as error:
            typer.echo(f"{file}: {error.strerror}", err=True)
            raise typer.Exit(2) from error
    if as_json:
        _print_json(reports, hmac_checked=key is not None)
    else:
        _print(reports, hmac_checked=key is not None)
    raise typer.Exit(1 if any(report.problems for report in reports) else 0)


def _files(paths: list[Path]) -> Iterator[Path]:
    """Every file named, and every Parquet file below the directories named that readers would read."""
    for path in paths:
        if path.is_dir():
            found = path.rglob("*.parquet")
            yield from sorted(file for file in found if not file.name.startswith((".", "_")) and file.is_file())
        elif path.exists():
            yield path
        else:
            typer.echo(f"{path}: there is no such file or directory", err=True)
            raise typer.Exit(2)


def _print(reports: "list[Report]", *, hmac_checked: bool) -> None:
    for report in reports:
        for problem in report.problems:
            typer.echo(f"{report.path}: {problem}")
        if report.bad_rows:
            typer.echo(f"{report.path}: first of these rows: {', '.join(map(str, report.bad_rows))}")
    wrong = sum(bool(report.problems) for report in reports)
    rows = sum(report.rows for report in reports)
    if hmac_checked:
        counts = ", ".join(
            f"{sum(getattr(report, name) for report in reports):,} {name}" for name in ("good", "bad", "missing")
        )
        what = f"HMAC: {counts}"
    else:
        what = "HMAC not checked: there is no hmac_key"
    typer.echo(f"{len(reports):,} files, {wrong:,} with problems; {rows:,} rows; {what}")


def _print_json(reports: "list[Report]", *, hmac_checked: bool) -> None:
    import msgspec

    document = {"ok": not any(report.problems for report in reports), "hmac_checked": hmac_checked, "files": reports}
    typer.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
