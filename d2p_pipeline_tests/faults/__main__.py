"""Schedules of faults one after the other: `python -m d2p_pipeline_tests.faults FIRST COUNT`; a line of JSON for each."""

import sys
import tempfile
from pathlib import Path

import msgspec

from d2p_pipeline_tests.faults.schedule import schedule
from d2p_pipeline_tests.faults.world import World


def main() -> int:
    first, number = int(sys.argv[1]), int(sys.argv[2])
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        world = World(Path(directory))
        try:
            for seed in range(first, first + number):
                books = world.run(schedule(seed))
                failed += not books.balance
                print(msgspec.json.encode(books).decode(), flush=True)
                if not books.balance:
                    print((Path(directory) / f"runs-{seed}.log").read_text(errors="replace")[-20000:], file=sys.stderr)
        finally:
            world.close()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
