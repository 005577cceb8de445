"""The commands of `d2p`: one Typer application, one module per command.

Command modules import only Typer and the standard library at module level, so that `d2p --help` and the processes that
`d2p up` starts pay for nothing they do not use. Exit codes: 0 all delivered, 1 something failed or was rejected,
2 usage or configuration.
"""

import typer

from d2p_pipeline import __version__
from d2p_pipeline.cli.config import config
from d2p_pipeline.cli.convert import convert
from d2p_pipeline.cli.demo import demo
from d2p_pipeline.cli.dlq import app as dlq
from d2p_pipeline.cli.forward import forward
from d2p_pipeline.cli.generate import generate
from d2p_pipeline.cli.receive import receive
from d2p_pipeline.cli.sqs import sqs
from d2p_pipeline.cli.status import status
from d2p_pipeline.cli.up import up
from d2p_pipeline.cli.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"d2p {__version__}")
        raise typer.Exit


@app.callback(help="Data2Parquet on Dagster: JSON records in, validated and partitioned Parquet out.")
def root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True)) -> None:
    del version


for command in (up, demo, receive, forward, sqs, convert, generate, status, verify, config):
    app.command()(command)
app.add_typer(dlq, name="dlq")
