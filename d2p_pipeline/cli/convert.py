"""`d2p convert`: files and standard input into Parquet, without Redis and Dagster."""

import contextlib
import glob
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2p_pipeline.cli.setup import ConfigFile, check_records, check_store, settings_of
from d2p_pipeline.logs import plain

if TYPE_CHECKING:
    from d2p_pipeline.ingest.convert import Summary
    from d2p_pipeline.ingest.task import Plan
    from d2p_pipeline.settings import Settings

SHOWN_REASONS = 10


def convert(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]…", help="Files or patterns; - or nothing: standard input.", show_default=False),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="PATH", help="Root of the files (writer_file_path).")
    ] = None,
    config: ConfigFile = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes that convert. Default: one a core.")
    ] = None,
    memory_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for all processes together, such as 500MiB.")
    ] = "1GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Convert NDJSON, a JSON array or {"logs": […]}, plain or compressed with gzip or zstd, to partitioned Parquet.

    Converting the same input again overwrites the same files. Rejected records go to _dead_letters below the root, with
    the reason. Exit code 1: something was rejected, or an input could not be read to its end; the others are converted.
    """
    from d2p_pipeline.ingest import workers

    names = _names(files)
    jobs = jobs or workers.cores()
    try:
        with contextlib.ExitStack() as stack:
            # They get ready while settings are read.
            ready: workers.Workers | None = context.obj
            if ready and ready.count < jobs:
                ready.end()
                ready = None
            ready = ready or workers.for_files(names, jobs)
            if ready:
                stack.enter_context(ready)
            settings = settings_of(config, writer_file_path=out)
            check_records(settings)
            if settings.writer_type != "file" or settings.writer_url:
                check_store(settings)  # after an hour of reading it is late to learn that a right is missing
            plan = _plan(settings)
            block_bytes, jobs = _shares(memory_limit, jobs)
            advance = stack.enter_context(_progress(names))

            from d2p_pipeline.ingest.convert import convert

            summary = convert(names, plan, jobs=jobs, block_bytes=block_bytes, on_progress=advance, workers=ready)
    except KeyboardInterrupt:
        typer.echo("Interrupted. Every file there is, is whole; the same command again overwrites them.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_summary(summary), indent=2))  # in ASCII: names may be no UTF-8
    else:
        _print(summary)
    _complain(summary, settings)
    raise typer.Exit(1 if summary.failed or summary.stopped or summary.dead_letters else 0)


def _names(files: list[str] | None) -> list[str]:
    from d2p_pipeline.ingest.convert import STDIN

    if not files:
        if sys.stdin.isatty():
            raise typer.BadParameter("name files to convert, or pipe records in", param_hint="FILE")
        return [STDIN]
    names: list[str] = []
    for file in files:
        # A file may be called like a pattern. A pattern that nothing matches is reported like a file that is not there.
        is_name = file == STDIN or Path(file).exists()
        found = [] if is_name else sorted(glob.glob(file, recursive=True))  # noqa: PTH207 (patterns may be absolute)
        if "**" in file:  # it names what is in directories, and them
            found = [path for path in found if not Path(path).is_dir()]
        names.extend(found or [file])
    return names


def _plan(settings: "Settings") -> "Plan":
    from d2p_pipeline import wiring
    from d2p_pipeline.ingest.task import Plan
    from d2p_pipeline.parquet.errors import StoreError

    try:
        return Plan(
            rules=wiring.rules(settings),
            encoding=wiring.encoding(settings),
            store=wiring.store(settings),
            by_ingest_time=settings.partition_time == "ingest",
            use_hash=settings.use_hash,
            keep_dead_letters=settings.use_dlq,
            max_record_bytes=settings.max_record_bytes,
        )
    except (ValueError, NotImplementedError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    except StoreError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error


def _shares(memory_limit: str, wanted: int) -> tuple[int, int]:
    """Bytes of a block, and how many jobs the limit allows for."""
    from pydantic import TypeAdapter, ValidationError

    from d2p_pipeline.ingest.convert import block_for, memory_needed
    from d2p_pipeline.settings import Bytes

    try:
        limit = TypeAdapter[int](Bytes).validate_python(memory_limit)
    except ValidationError as error:
        raise typer.BadParameter(f"{memory_limit!r} is no size such as 2GiB", param_hint="--memory-limit") from error
    block = block_for(limit)
    allowed = next((count for count in range(wanted, 0, -1) if memory_needed(count, block) <= limit), 0)
    if not allowed:
        raise typer.BadParameter(
            f"{memory_limit} is too little for one job: 256MiB is enough", param_hint="--memory-limit"
        )
    if allowed < wanted:
        needed = -(-memory_needed(wanted, block) >> 20)
        typer.echo(
            f"{allowed} of {wanted} jobs, which would take {needed} MiB; raise --memory-limit for more.", err=True
        )
    return block, allowed


def _summary(summary: "Summary") -> dict[str, Any]:
    return {
        "inputs": summary.inputs,
        "empty": summary.empty,
        "failed": summary.failed,
        "stopped": summary.stopped,
        "records": summary.records,
        "rows": summary.rows,
        "dropped": summary.dropped,
        "dead_letters": summary.dead_letters,
        "reasons": dict(summary.reasons.most_common()),
        "files": summary.files,
        "bytes_in": summary.bytes_in,
        "bytes_out": summary.bytes_out,
        "seconds": round(summary.seconds, 3),
        "mb_per_second": round(_rate(summary), 1),
    }


def _rate(summary: "Summary") -> float:
    return summary.bytes_in / 1e6 / summary.seconds if summary.seconds else 0.0


def _print(summary: "Summary") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    inputs = [f"{summary.empty} empty"] if summary.empty else []
    inputs += [f"{len(summary.failed)} failed"] if summary.failed else []
    table.add_row("inputs", f"{summary.inputs:,}", ", ".join(inputs))
    table.add_row("records", f"{summary.records:,}", f"{summary.bytes_in / 1e6:,.1f} MB")
    table.add_row("rows", f"{summary.rows:,}")
    if summary.dropped:
        table.add_row("dropped", f"{summary.dropped:,}", "by transform")
    table.add_row("dead letters", f"{summary.dead_letters:,}")
    for reason, count in summary.reasons.most_common(SHOWN_REASONS):
        table.add_row("", f"{count:,}", Text(plain(reason)))
    if others := summary.reasons.most_common()[SHOWN_REASONS:]:
        table.add_row("", f"{sum(count for _, count in others):,}", f"for {len(others)} other reasons")
    table.add_row("files", f"{summary.files:,}", f"{summary.bytes_out / 1e6:,.1f} MB")
    table.add_row("seconds", f"{summary.seconds:,.1f}", f"{_rate(summary):,.1f} MB/s")
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _complain(summary: "Summary", settings: "Settings") -> None:
    from d2p_pipeline.ingest.convert import STDIN
    from d2p_pipeline.ingest.task import DEAD_LETTERS

    for name, reason in summary.failed.items():
        typer.echo(plain(f"{'standard input' if name == STDIN else name}: {reason}"), err=True)
    if summary.dead_letters:
        kept = f"kept in {_root(settings)}/{DEAD_LETTERS}" if settings.use_dlq else "not kept (use_dlq = false)"
        typer.echo(f"{summary.dead_letters:,} records were rejected; they are {kept}.", err=True)
    if summary.stopped:
        typer.echo(f"Stopped before the end: {plain(summary.stopped)}", err=True)


def _root(settings: "Settings") -> str:
    if settings.writer_type == "file":
        return str(settings.writer_url or settings.writer_file_path)
    return f"s3://{settings.s3_bucket_name}/{settings.s3_prefix}".rstrip("/")


@contextlib.contextmanager
def _progress(names: list[str]) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody sees it; the value is told how many more bytes of the inputs are done."""
    if not sys.stderr.isatty():
        yield lambda taken: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("bytes", total=_size(names))
        yield lambda taken: progress.advance(task, taken)


def _size(names: list[str]) -> int | None:
    """Bytes of all inputs, None if that cannot be known."""
    files = [Path(name) for name in names if Path(name).exists()]
    return sum(file.stat().st_size for file in files) if all(map(Path.is_file, files)) and "-" not in names else None
