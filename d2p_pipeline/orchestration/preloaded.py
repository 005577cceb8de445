"""What runs import, in the process that they are forked from; loaded there and nowhere else.

Nothing here may start a thread or open a connection.
"""

import gc
from importlib import import_module

from d2p_pipeline.settings import load

_MODULES = [
    "d2p_pipeline.definitions",
    "d2p_pipeline.buffer.connect",
    "pyarrow.parquet",
    # Of Dagster what it imports when it is first needed: to open an instance, and to execute.
    "dagster._grpc.impl",
    "dagster._daemon.controller",
    "dagster._core.executor.in_process",
    "dagster._core.storage.noop_compute_log_manager",
    "dagster._core.instance.runs",
    "upath.implementations.local",
]


def _import_all() -> None:
    settings = load()
    store = "sqlite" if settings.dagster_postgres_url is None else "postgres"
    to_s3 = ["d2p_pipeline.parquet.s3"] if settings.writer_type == "aws-s3" else []
    for name in (*_MODULES, f"d2p_pipeline.orchestration.{store}", *to_s3):
        import_module(name)


gc.disable()  # nothing of what is imported is garbage
try:
    _import_all()
finally:
    gc.freeze()  # and a run's own collections need not look at it
    gc.enable()
