"""`d2p generate`: seeded log records to a file, to stdout, through any door, or straight into Redis."""

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from d2p_pipeline.ingest.delivering import Sent
    from d2p_pipeline.settings import Settings

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
    target: Annotated[
        Literal["http", "forward", "sqs", "redis"] | None,
        typer.Option(help="Send there instead, with the address and the secrets of the settings (D2P_…)."),
    ] = None,
    http: Annotated[str, typer.Option(metavar="URL", help="Send to the receiver at this URL instead.")] = "",
    token: Annotated[str, typer.Option(help="Bearer token of the receiver.")] = "",
    connections: Annotated[int, typer.Option(min=1, help="Requests, or connections, at a time.")] = 4,
    redis: Annotated[
        str, typer.Option(metavar="URL", help="Push straight into the buffers of this Redis instead.")
    ] = "",
    forward: Annotated[str, typer.Option(metavar="HOST:PORT", help="Send to this Forward listener instead.")] = "",
    sqs: Annotated[str, typer.Option(metavar="URL", help="Send to this SQS queue instead.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Records a request, a message, or a chunk in Redis.")] = 500,
) -> None:
    """Make seeded log records, for load tests and demos."""
    from d2p_pipeline.ingest import generator

    named = {"http": http, "forward": forward, "sqs": sqs, "redis": redis}
    if len([place for place in (target, out.removeprefix("-"), *named.values()) if place]) > 1:
        options = "--out, --target, --http, --forward, --sqs and --redis"
        raise typer.BadParameter(f"the records go to one place: give one of {options}")
    door = target or next((name for name, address in named.items() if address), None)
    if logs and door:
        raise typer.BadParameter("--logs is a form of file: it goes with --out")

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
        if door == "http":
            summary = _send(lines, *_receiver(http, token), min(batch, step), connections, advance)
        elif door == "forward":
            summary = _send_forward(lines, forward, min(batch, step), connections, advance)
        elif door == "sqs":
            summary = _send_sqs(lines, sqs, min(batch, step), connections, advance)
        elif door == "redis":
            summary = _push(lines, redis or _redis_url(), batch, min(_WINDOW, step), advance)
        else:
            summary = _write(lines, out, logs, min(_WRITE, step), advance)
    typer.echo(summary, err=not door)


def _settings() -> "Settings":
    from d2p_pipeline.cli.setup import settings_of

    return settings_of(None)


def _receiver(url: str, token: str) -> tuple[str, str]:
    """The receiver's URL and token: those given, else those of the settings."""
    if url:
        return url, token
    settings = _settings()
    scheme = "https" if settings.tls_cert else "http"
    tokens = [token, *(each.get_secret_value() for each in settings.tokens)]
    return f"{scheme}://{settings.address}:{settings.port}", next(filter(None, tokens), "")


def _redis_url() -> str:
    from d2p_pipeline import wiring

    return wiring.redis_url(_settings())


def _account(sent: "Sent") -> str:
    return f"{sent.accepted} accepted, {sent.dead_lettered} dead-lettered in {sent.requests} requests, {sent.retries} retries"


@contextmanager
def _accounting(option: str) -> Iterator[None]:
    """What ends a sending early ends the command, with the account of what was sent before."""
    from d2p_pipeline.ingest.delivering import Undelivered

    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    except Undelivered as error:
        typer.echo(f"{error}\nBefore that: {_account(error.sent)}", err=True)
        raise typer.Exit(1) from error


def _send(
    lines: Iterable[bytes], url: str, token: str, batch: int, connections: int, advance: Callable[[int], None]
) -> str:
    from d2p_pipeline.ingest.sender import send

    with _accounting("--http"):
        return _account(send(lines, url, batch=batch, connections=connections, token=token, on_progress=advance))


def _send_forward(
    lines: Iterable[bytes], address: str, batch: int, connections: int, advance: Callable[[int], None]
) -> str:
    import ssl

    from d2p_pipeline.ingest.forward_sender import send

    settings = _settings()
    key, users = settings.forward_shared_key, settings.forward_users
    tls = ssl.create_default_context(cafile=settings.tls_cert) if settings.forward_tls else None
    with _accounting("--forward"):
        sent = send(
            lines,
            address or f"{settings.forward_address}:{settings.forward_port or 24224}",
            batch=batch,
            connections=connections,
            shared_key=key.get_secret_value() if key else None,
            user=users[0].get_secret_value() if users else "",
            tls=tls,
            on_progress=advance,
        )
    return f"{sent.accepted} acknowledged in {sent.requests} chunks, {sent.retries} retries"


def _send_sqs(lines: Iterable[bytes], url: str, batch: int, connections: int, advance: Callable[[int], None]) -> str:
    from d2p_pipeline.ingest.polling import client
    from d2p_pipeline.ingest.sqs_sender import send

    settings = _settings()
    queue = url or settings.sqs_queue_url
    if not queue:
        raise typer.BadParameter("there is no queue: give sqs_queue_url, or --sqs", param_hint="--target")
    with _accounting("--sqs"):
        sent = send(lines, client("sqs", settings), queue, batch=batch, connections=connections, on_progress=advance)
    return f"{sent.accepted} records sent, {sent.retries} retries"


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
