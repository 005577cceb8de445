"""One run of `flush` as a process of its own, on the instance of DAGSTER_HOME: `python -m benchmarks.scale_run CONFIG`.

As a run worker does it: `execute_in_process` would keep the values of all steps in memory until its end.
"""

import json
import sys

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository


def main() -> None:
    job = ReconstructableRepository.for_module("d2p_pipeline.definitions", "defs").get_reconstructable_job("flush")
    with dg.DagsterInstance.get() as instance:
        result = dg.execute_job(job, instance, run_config=json.loads(sys.argv[1]), raise_on_error=True)
        assert result.success


if __name__ == "__main__":
    main()
