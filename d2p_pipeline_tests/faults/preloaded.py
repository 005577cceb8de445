"""What the server that processes are forked from has imported. Settings that are read at import come from here."""

import os

os.environ |= {"D2P_WRITE_RETRIES": "2", "D2P_WRITE_RETRY_DELAY": "0.05"}

import dagster as dg

import d2p_pipeline.definitions
import d2p_pipeline.delivery
import d2p_pipeline.parquet.s3

# What a run imports when it first needs it.
with dg.DagsterInstance.ephemeral():
    d2p_pipeline.definitions.defs.resolve_job_def("flush")
