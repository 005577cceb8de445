"""One run of `flush` as a process of its own, on the instance of DAGSTER_HOME: `python -m benchmarks.scale_run CONFIG`."""

import json
import sys

import dagster as dg


def main() -> None:
    from d2p_pipeline.definitions import defs

    with dg.DagsterInstance.get() as instance:
        result = defs.resolve_job_def("flush").execute_in_process(
            instance=instance, run_config=json.loads(sys.argv[1]), raise_on_error=True
        )
    assert result.success


if __name__ == "__main__":
    main()
