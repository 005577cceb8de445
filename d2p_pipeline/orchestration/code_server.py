"""Dagster's code server as `d2p up` starts it: the processes of its runs are forked from one that has imported what runs need.

Dagster's own starts a Python for each run, and that imports Dagster, Polars and pyarrow anew: two seconds or more. The process
that is forked does nothing but import, so no run inherits a thread, a connection or a lock of another.

It also makes the tables of Dagster's instance, before webserver and daemon start.
"""

import multiprocessing
import sys
from multiprocessing import forkserver
from typing import Any

import dagster as dg
from dagster._cli import cli
from dagster._grpc import server

PRELOADED = "d2p_pipeline.orchestration.preloaded"


class ForkingServer(server.DagsterApiServer):
    """Dagster's, but for where the processes of runs come from."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if sys.platform != "linux":  # elsewhere the system's own libraries do not survive a fork
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._mp_ctx = context  # pyright: ignore[reportAttributeAccessIssue]
        forkserver.ensure_running()  # the first run need not wait for it


def main() -> None:
    # Nobody else uses the instance before this server answers: two processes that made its tables at once would corrupt them.
    try:
        with dg.DagsterInstance.get():
            pass
    except Exception as error:
        error.add_note(
            "Dagster's storage cannot be used: look at dagster_postgres_url or, without it, at `dagster` under home."
        )
        raise
    server.DagsterApiServer = ForkingServer  # where the command takes it from
    cli(["api", "grpc", *sys.argv[1:]])


if __name__ == "__main__":
    main()
