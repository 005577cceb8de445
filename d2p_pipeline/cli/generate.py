"""`d2p generate`: seeded log records to a file, to stdout, to the receiver or straight into Redis."""

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Literal

import typer

_WRITE = 1000  # records a write
_WINDOW = 10_000  # records grouped by key for one Redis pipeline


def generate(
    count: Annotated[int, typer.Argument(min=0, help="Records to make.")] = 100_000,
    seed: Annotated[
        int, typer.Option(help="The same seed makes the same records; give generators that run at once different ones.")
    ] = 0,
    profile: Annotated[
        Literal["canonical", "d2p"],
        typer.Option(help="canonical: about 870 bytes a record; d2p: Data2Parquet-go's generator, about 2.3 kB."),
    ] = "canonical",
    keys: Annotated[int, typer.Option(min=1, help="Business capabilities (canonical only).")] = 8,
    bad_ratio: Annotated[float, typer.Option(min=0, max=1, help="Fraction of records spoiled on purpose.")] = 0.0,
    extra_field: Annotated[bool, typer.Option("--extra-field", help="Add a field the schema does not know.")] = False,
    start: Annotated[
        datetime | None,
        typer.Option(help="Time of the first record, UTC; the others follow over one hour. Default: the clock's time."),
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="Records a second; 0 is as fast as possible.")] = 0,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="File to write, - for stdout; .gz and .zst are compressed.")
    ] = "-",
    logs: Annotated[
        bool, typer.Option("--logs", help='Write one {"logs":[…]} document, valid JSON also with bad records in it.')
    ] = False,
    http: Annotated[str, typer.Option(metavar="URL", help="Send to the receiver at this URL instead.")] = "",
    token: Annotated[str, typer.Option(help="Bearer token of the receiver.")] = "",
    connections: Annotated[int, typer.Option(min=1, help="Requests at a time to the receiver.")] = 4,
    redis: Annotated[
        str, typer.Option(metavar="URL", help="Push straight into the buffers of this Redis instead.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Records a request, or a chunk in Redis.")] = 500,
) -> None:
    """Make seeded log records, for load tests and demos."""
    from d2p_pipeline.ingest import generator

    if len([target for target in (http, redis, out.removeprefix("-")) if target]) > 1:
        raise typer.BadParameter("the records go to one place: give one of --out, --http and --redis")
    if logs and (http or redis):
        raise typer.BadParameter("--logs is a form of file: it goes with --out, not with --http or --redis")

    lines = generator.generate(
        count,
        seed=seed,
        profile=profile,
        keys=keys,
        bad_ratio=bad_ratio,
        # Cut-off records would make the whole document unreadable.
        faults=[fault for fault in generator.FAULTS if not (logs and fault == "truncated")],
        start=start.replace(tzinfo=UTC) if start else None,
        extra_field=extra_field,
    )
    lines = generator.paced(lines, rate)
    # A slow rate goes out four times a second, not once a full batch has come together.
    step = max(1, int(rate / 4)) if rate else sys.maxsize
    with _progress(count) as advance:
        if http:
            summary = _send(lines, http, token, min(batch, step), connections, advance)
        elif redis:
            summary = _push(lines, redis, batch, min(_WINDOW, step), advance)
        else:
            summary = _write(lines, out, logs, min(_WRITE, step), advance)
    typer.echo(summary, err=not (http or redis))


def _send(
    lines: Iterable[bytes], url: str, token: str, batch: int, connections: int, advance: Callable[[int], None]
) -> str:
    from d2p_pipeline.ingest.sender import Sent, Undelivered, send

    def account(sent: Sent) -> str:
        return (
            f"{sent.accepted} accepted, {sent.dead_lettered} dead-lettered "
            f"in {sent.requests} requests, {sent.retries} retries"
        )

    try:
        return account(send(lines, url, batch=batch, connections=connections, token=token, on_progress=advance))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--http") from error
    except Undelivered as error:
        typer.echo(f"{error}\nBefore that: {account(error.sent)}", err=True)
        raise typer.Exit(1) from error


def _push(lines: Iterable[bytes], url: str, batch: int, window: int, advance: Callable[[int], None]) -> str:
    from d2p_pipeline.ingest.sender import Undelivered, push

    try:
        return f"{push(lines, url, batch=batch, window=window, on_progress=advance)} records pushed"
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--redis") from error
    except Undelivered as error:
        typer.echo(f"{error}\nBefore that: {error.sent.accepted} records pushed", err=True)
        raise typer.Exit(1) from error


def _write(lines: Iterator[bytes], out: str, logs: bool, step: int, advance: Callable[[int], None]) -> str:
    opening, between, closing = (b'{"logs":[\n', b",\n", b"\n]}\n") if logs else (b"", b"\n", b"\n")
    records = size = 0
    with _opened(out) as file:
        file.write(opening)
        while part := list(islice(lines, step)):
            size += file.write((between if records else b"") + between.join(part))
            if out == "-":
                file.flush()
            records += len(part)
            advance(len(part))
        if records or logs:
            file.write(closing)
    return f"{records} records, {size / 1e6:.1f} MB before compression, written to {'stdout' if out == '-' else out}"


@contextmanager
def _opened(out: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    with ExitStack() as stack:
        if out == "-":
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
            return
        try:
            file = stack.enter_context(Path(out).open("wb"))
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from error
        if out.endswith(".gz"):
            # Neither name nor time in the header: the same records are the same file.
            yield stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
        elif out.endswith(".zst"):
            import zstandard

            yield stack.enter_context(zstandard.ZstdCompressor().stream_writer(file, closefd=False))
        else:
            yield file


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody sees it; the value is told how many more records are done."""
    if not sys.stderr.isatty():
        yield lambda records: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("records", total=count)
        yield lambda records: progress.advance(task, records)
