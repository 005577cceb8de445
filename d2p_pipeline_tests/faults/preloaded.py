"""What the server that processes are forked from has imported. Settings that are read at import come from here."""

import os

os.environ |= {"D2P_WRITE_RETRIES": "2", "D2P_WRITE_RETRY_DELAY": "0.05"}

import d2p_pipeline.definitions
import d2p_pipeline.delivery  # noqa: F401
