"""What the server that processes are forked from has imported and made. Settings that are read at import come from here."""

import gc
import os

os.environ |= {"D2P_WRITE_RETRIES": "2", "D2P_WRITE_RETRY_DELAY": "0.05"}

import dagster as dg

import d2p_pipeline.definitions
import d2p_pipeline.delivery
import d2p_pipeline.parquet.s3  # noqa: F401

INSTANCE = dg.DagsterInstance.ephemeral()
"""Of every process its own: a fork is a copy. To make one takes longer than a tick."""


@dg.op
def nothing() -> None:
    """What a run imports when it first needs it, is imported by this one."""


@dg.job
def first() -> None:
    nothing()


first.execute_in_process(instance=INSTANCE)
gc.freeze()  # or each fork copies what its collector looks at
