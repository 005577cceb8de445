"""`d2p demo`: the whole system on generated records, ending with books that balance."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2p_pipeline.cli.setup import redis, settings_of

if TYPE_CHECKING:
    from d2p_pipeline.buffer.protocol import Buffer
    from d2p_pipeline.settings import Settings

DELIVER_SECONDS = 600.0


def demo(
    records: Annotated[int, typer.Option(min=1, help="Records to send.")] = 100_000,
    bad_ratio: Annotated[float, typer.Option(min=0, max=1, help="Fraction of them spoiled on purpose.")] = 0.01,
    keys: Annotated[int, typer.Option(min=1, help="Business capabilities.")] = 8,
    home: Annotated[Path, typer.Option(help="Where the demo keeps everything; emptied first.")] = Path(".d2p/demo"),
    exit_: Annotated[bool, typer.Option("--exit", help="End after the table; do not leave the UI running.")] = False,
) -> None:
    """Start everything, send generated records over HTTP, and show what became of each.

    Exit code 1: the books do not balance.
    """
    from d2p_pipeline.cli.supervise import StartError, Stop, running
    from d2p_pipeline.cli.up import drain, tend_until_stopped

    stop = Stop()
    if home.exists():
        if not (home / ".d2p-demo").exists():
            typer.echo(f"{home} exists and was not made by the demo; name another --home", err=True)
            raise typer.Exit(2)
        shutil.rmtree(home)
    home.mkdir(parents=True)
    (home / ".d2p-demo").touch()
    settings = settings_of(None, home=home, writer_file_path=home / "files", buffer_size=50_000, **_free_ports())
    try:
        with redis(settings):
            settings = settings_of(None)
            typer.echo("Starting Redis, the receiver and Dagster …", err=True)
            with running(settings, lambda text: typer.echo(text, err=True)) as supervisor:
                ui = f"http://127.0.0.1:{settings.dagster_port}"
                typer.echo(f"Dagster UI: {ui}", err=True)
                balanced = _run(settings, records, keys, bad_ratio, supervisor.tend, stop)
                if not exit_ and balanced and not stop.asked:
                    typer.echo(
                        f"\nThe UI stays at {ui}, the receiver at http://127.0.0.1:{settings.port}/records.\n"
                        f"The files are in {settings.writer_file_path}. Ctrl-C ends all."
                    )
                    tend_until_stopped(supervisor, stop)
                drain(settings, supervisor)
    except StartError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if balanced else 1)


def _free_ports() -> dict[str, int]:
    """The usual ports where they are free."""
    import socket

    ports: dict[str, int] = {}
    for name, usual in (("port", 8080), ("dagster_port", 3000)):
        for port in (usual, 0):
            try:
                with closing(socket.create_server(("127.0.0.1", port))) as listener:
                    ports[name] = listener.getsockname()[1]
                break
            except OSError:
                continue
    return ports


def _run(settings: "Settings", records: int, keys: int, bad_ratio: float, tend: Callable[[], None], stop: Any) -> bool:
    from rich.console import Console

    from d2p_pipeline import wiring

    buffer, _ = wiring.open_buffer(settings)
    feed = Feed(f"http://{settings.address}:{settings.port}", records, keys, bad_ratio)
    with closing(buffer), _progress(records) as show:
        feed.thread.start()
        deadline = time.monotonic() + DELIVER_SECONDS
        while not stop.asked and time.monotonic() < deadline:
            tend()
            done = sum(totals.rows + totals.dead_letters for _, totals in buffer.totals())
            show(feed.sent, done)
            if feed.error or (not feed.thread.is_alive() and done >= feed.stored):
                break
            time.sleep(0.2)
        if feed.error:
            typer.echo(f"Sending failed: {feed.error}", err=True)
            return False
        ledger = read_ledger(buffer, settings.writer_file_path, feed.by_key)
    Console().print(ledger.table())
    typer.echo(ledger.verdict())
    return ledger.balanced


@dataclass
class Feed:
    """Sends the records in a thread of its own and counts them by key before they leave."""

    url: str
    records: int
    keys: int
    bad_ratio: float
    by_key: Counter[str] = field(default_factory=Counter[str])
    sent: int = 0
    stored: int = 0
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._send, name="d2p-feed", daemon=True)

    def _send(self) -> None:
        from d2p_pipeline.ingest.sender import Undelivered, send

        try:
            outcome = send(self._lines(), self.url, batch=1000, on_progress=self._count)
        except Undelivered as error:
            self.error = error
        else:
            self.stored = outcome.accepted + outcome.dead_lettered

    def _lines(self) -> Iterator[bytes]:
        from d2p_pipeline.ingest.generator import capability_of, generate
        from d2p_pipeline.ingest.intake import UNKNOWN_KEY

        for line in generate(self.records, keys=self.keys, bad_ratio=self.bad_ratio):
            self.by_key[capability_of(line) or UNKNOWN_KEY] += 1
            yield line

    def _count(self, records: int) -> None:
        self.sent += records


@dataclass
class Account:
    """What became of one key's records."""

    sent: int = 0
    received: int = 0
    rows: int = 0
    distinct: int = 0
    files: int = 0
    bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])

    @property
    def dead_letters(self) -> int:
        return self.reasons.total()

    @property
    def balanced(self) -> bool:
        return self.received == self.rows + self.dead_letters and self.rows == self.distinct


@dataclass
class Ledger:
    """The accounts of all keys, read from the files and the dead-letter queues themselves."""

    accounts: dict[str, Account]

    @property
    def total(self) -> Account:
        total = Account()
        for account in self.accounts.values():
            for name in ("sent", "received", "rows", "distinct", "files", "bytes"):
                setattr(total, name, getattr(total, name) + getattr(account, name))
            total.reasons += account.reasons
        return total

    @property
    def balanced(self) -> bool:
        return self.total.sent == self.total.received and all(account.balanced for account in self.accounts.values())

    def verdict(self) -> str:
        total = self.total
        equation = f"received {total.received:,} = rows {total.rows:,} + dead letters {total.dead_letters:,}"
        if self.balanced:
            return f"{equation}; no duplicate message-id, read back from the files with DuckDB: the books balance."
        return (
            f"The books do NOT balance: sent {total.sent:,}, {equation}, {total.rows - total.distinct:,} duplicates; "
            "see the logs and `d2p status`."
        )

    def table(self) -> Any:
        from rich.table import Table

        table = Table(header_style="bold", row_styles=["", "dim"])
        table.add_column("capability", no_wrap=True)
        for name in ("received", "rows", "dead"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("letters by reason")
        for name in ("files", "MB"):
            table.add_column(name, justify="right", no_wrap=True)
        for key, account in [*sorted(self.accounts.items()), ("total", self.total)]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in account.reasons.most_common())
            if key == "total":
                table.add_section()
            table.add_row(
                key,
                f"{account.received:,}",
                f"{account.rows:,}",
                f"{account.dead_letters:,}",
                reasons,
                f"{account.files:,}",
                f"{account.bytes / 1e6:.1f}",
            )
        return table


def read_ledger(buffer: "Buffer", root: Path, sent: Counter[str]) -> Ledger:
    """Count rows with DuckDB from the files, dead letters from the queues, receptions from the buffer's totals."""
    from d2p_pipeline.records.dead_letter import DeadLetter

    accounts = {key: Account(sent=count) for key, count in sent.items()}

    def of(key: str) -> Account:
        return accounts.setdefault(key, Account())

    for key, totals in buffer.totals():
        of(key).received = totals.accepted
    for key, _ in buffer.dead_letter_keys():
        of(key).reasons.update(_short(DeadLetter.from_json(letter).reason) for letter in buffer.dead_letters(key))
    for key, rows, distinct, files in _count_rows(root):
        account = of(key)
        account.rows, account.distinct = rows, distinct
        account.files = len(files)
        account.bytes = sum(Path(file).stat().st_size for file in files)
    return Ledger(accounts)


def _count_rows(root: Path) -> list[tuple[str, int, int, list[str]]]:
    """Capability, rows, distinct message-ids and files, as DuckDB reads them."""
    import duckdb

    if not any(root.rglob("*.parquet")):
        return []
    query = """
        SELECT "business-capability", count(*), count(DISTINCT "message-id"), list(DISTINCT filename)
        FROM read_parquet($1, filename = true) GROUP BY 1
    """
    return duckdb.connect().execute(query, [str(root / "**" / "*.parquet")]).fetchall()


def _short(reason: str) -> str:
    """The kind of a reason, without values and positions."""
    from d2p_pipeline.records.fields import BY_NAME

    field, separator, problem = reason.partition(": ")
    if not separator:
        return reason
    if field not in BY_NAME:
        return field
    return "missing field" if problem.startswith("required") else f"{field} unreadable"


@contextmanager
def _progress(records: int) -> Iterator[Callable[[int, int], None]]:
    """Bars of what was sent and delivered; nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = [progress.add_task(name, total=records) for name in ("sent", "delivered")]

        def show(sent: int, delivered: int) -> None:
            for task, value in zip(tasks, (sent, delivered), strict=True):
                progress.update(task, completed=value)

        yield show
