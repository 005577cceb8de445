"""The records that are measured: seeded, made once, kept below .d2p/bench.

Run as a program of its own: what it allocates would show as the peak of the processes that are started next.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal

DIRECTORY = Path(".d2p/bench")
_START = datetime(2026, 11, 21, 10, tzinfo=UTC)
_WRITE = 1000  # lines a write

Profile = Literal["canonical", "d2p"]


@dataclass(frozen=True)
class Data:
    """Records over one hour: `keys` capabilities (canonical only), a ratio of spoiled ones, one field nobody knows."""

    count: int
    profile: Profile = "canonical"
    keys: int = 8
    bad_ratio: float = 0.0
    extra_field: bool = False

    @property
    def path(self) -> Path:
        variant = f"{f'-bad{self.bad_ratio}' if self.bad_ratio else ''}{'-extra' if self.extra_field else ''}"
        return DIRECTORY / f"{self.profile}-{self.count}-{self.keys}keys{variant}.ndjson"

    @property
    def arguments(self) -> list[str]:
        """What this module takes on its command line."""
        return [str(self.count), self.profile, str(self.keys), str(self.bad_ratio), str(int(self.extra_field))]

    def lines(self) -> Iterator[bytes]:
        from d2p_pipeline.ingest.generator import generate

        return generate(
            self.count,
            profile=self.profile,
            keys=self.keys,
            bad_ratio=self.bad_ratio,
            start=_START,
            extra_field=self.extra_field,
        )


def make(data: Data) -> None:
    """Write the file unless it is there."""
    if data.path.exists():
        return
    data.path.parent.mkdir(parents=True, exist_ok=True)
    partial = data.path.with_suffix(f".{os.getpid()}")
    lines = data.lines()
    with partial.open("wb") as file:
        while some := list(islice(lines, _WRITE)):
            file.write(b"\n".join(some) + b"\n")
    partial.replace(data.path)


if __name__ == "__main__":
    count, profile, keys, bad_ratio, extra_field = sys.argv[1:]
    make(
        Data(int(count), "d2p" if profile == "d2p" else "canonical", int(keys), float(bad_ratio), extra_field == "1"),
    )
