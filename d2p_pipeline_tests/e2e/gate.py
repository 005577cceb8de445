"""A step that a test can hold up: the setting `transform` names it."""

import os
import time
from pathlib import Path

import polars as pl


def pass_gate(frame: pl.DataFrame) -> pl.DataFrame:
    """Says which process has come, with which key, and waits for as long as the gate is there."""
    gate = Path(os.environ["GATE"])
    key = frame["business-capability"][0]
    (gate.parent / f"{key}-{os.getpid()}").touch()
    while gate.exists():
        time.sleep(0.05)
    return frame
