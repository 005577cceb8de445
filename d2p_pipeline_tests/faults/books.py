"""The books of a course of faults: what the producers know of every number, against the files and the dead letters."""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq

from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.records.dead_letter import DeadLetter
from d2p_pipeline_tests.faults.producers import KEYS, Account, is_bad


@dataclass
class Books:
    """What became of the records of one schedule. `faults` were drawn; those of them that struck are in `struck`."""

    seed: int
    server: str
    target: str
    faults: Counter[str]
    struck: Counter[str] = field(default_factory=Counter[str])
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    rows: int = 0
    dead_letters: int = 0
    runs: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list[str])
    doubled: list[str] = field(default_factory=list[str])
    refused_but_there: list[str] = field(default_factory=list[str])
    invented: list[str] = field(default_factory=list[str])
    out_of_order: list[str] = field(default_factory=list[str])

    @property
    def balance(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.refused_but_there or self.invented or self.out_of_order)

    def balance_with(
        self,
        accounts: Sequence[Account],
        batches: Sequence[Sequence[str]],
        letters: Iterable[str],
        *,
        in_order: bool = True,
    ) -> None:
        """Compare what producers know with what files, by batch in the order of delivery, and dead letters hold.

        `in_order`: whether that order is known; otherwise only that within a batch is looked at.
        """
        mine = f"{self.seed}."
        rows = [number for batch in batches for number in batch if number.startswith(mine)]
        letters = [number for number in letters if number.startswith(mine)]
        there = Counter([*rows, *letters])
        accepted = set[str]().union(*(account.good | account.bad for account in accounts))
        refused = set[str]().union(*(account.refused for account in accounts))
        unknown = set[str]().union(*(account.unknown for account in accounts))
        self.accepted, self.refused, self.unknown = len(accepted), len(refused), len(unknown)
        self.rows, self.dead_letters = len(rows), len(letters)
        self.lost = sorted(accepted - there.keys())
        self.doubled = sorted(number for number, count in there.items() if count > 1)
        self.refused_but_there = sorted(refused & there.keys())
        wrong = [number for number in rows if is_bad(number)] + [number for number in letters if not is_bad(number)]
        self.invented = sorted((there.keys() - accepted - refused - unknown) | set(wrong))
        for group in [rows] if in_order else batches:
            place = {number: index for index, number in enumerate(group)}
            for numbers in (numbers for account in accounts for numbers in account.order.values()):
                found = [number for number in numbers if number in place]
                self.out_of_order += [two for one, two in pairwise(found) if place[one] > place[two]]


def batches_of(files: Iterable[Path | io.BytesIO], sealed: Mapping[str, int]) -> list[list[str]]:
    """Numbers in files, by batch as they were sealed, units and rows as they are numbered."""
    found: list[tuple[int, str, int, list[str]]] = []
    for source in files:
        file = pq.ParquetFile(source)
        metadata = file.metadata.metadata or {}
        batch, unit = metadata[b"d2p.batch"].decode(), int(metadata[b"d2p.unit"])
        found.append((sealed.get(batch, 0), batch, unit, file.read(["message"]).column(0).to_pylist()))
    batches: dict[str, list[str]] = {}
    for _, batch, _, messages in sorted(found):
        batches.setdefault(batch, []).extend(messages)
    return list(batches.values())


def letters_of(buffer: RedisBuffer) -> list[str]:
    """Numbers in dead letters."""
    return [
        json.loads(DeadLetter.from_json(letter).raw)["message"] for key in KEYS for letter in buffer.dead_letters(key)
    ]
