"""What a flush costs, by phase: `python -m benchmarks.scale_budget`, on the instance and the Redis that the environment names.

Prints JSON: milliseconds in a process that has just begun (stock), and in the same process for the next flush (warm worker).
"""

import json
import time

_BEGAN = time.monotonic()


def main() -> None:
    phases: dict[str, float] = {}
    import dagster as dg

    imported = _lap(phases, "import dagster", _BEGAN)
    from d2p_pipeline.definitions import defs

    loaded = _lap(phases, "import the definitions", imported)
    with dg.DagsterInstance.get() as instance:
        _lap(phases, "open the instance", loaded)
        job = defs.resolve_job_def("flush")
        stock = phases | _flush(job, instance, "first")
        warm = _flush(job, instance, "second")
    print(json.dumps({"stock": _rounded(stock), "warm": _rounded(warm)}))


def _flush(job: object, instance: object, name: str) -> dict[str, float]:
    from d2p_pipeline import wiring
    from d2p_pipeline.settings import load

    buffer, _ = wiring.open_buffer(load())
    _push(buffer, name)
    buffer.close()
    began = time.time()
    result = job.execute_in_process(instance=instance)  # type: ignore[attr-defined]
    ended = time.time()
    assert result.success
    at = {
        (event.event_type_value, event.step_key): record.timestamp
        for record in instance.all_logs(result.run_id)  # type: ignore[attr-defined]
        if (event := record.dagster_event)
    }
    steps = ["plan_units", *(f"{step}[00000]" for step in ("read_records", "validate_records", "build_parquet"))]
    steps += ["acknowledge[00000]", "go_on", "report"]
    phases = {"create the run, until its first step": (at["STEP_START", "plan_units"] - began) * 1000}
    for step in steps:
        phases[step.partition("[")[0]] = (at["STEP_SUCCESS", step] - at["STEP_START", step]) * 1000
    between = (at["STEP_SUCCESS", "report"] - at["STEP_START", "plan_units"]) * 1000 - sum(list(phases.values())[1:])
    phases["between the steps"] = between
    phases["end the run"] = (ended - at["STEP_SUCCESS", "report"]) * 1000
    return phases


def _push(buffer: object, name: str) -> None:
    from d2p_pipeline.buffer.protocol import Push
    from d2p_pipeline.ingest.generator import generate
    from d2p_pipeline.records import chunk

    lines = list(generate(1000, profile="canonical", keys=1, seed=1))
    size = sum(map(len, lines)) + len(lines)
    now = buffer.now()  # type: ignore[attr-defined]
    buffer.push([Push("payments", name, 5, chunk.encode(lines, now), len(lines), size)])  # type: ignore[attr-defined]


def _lap(phases: dict[str, float], name: str, since: float) -> float:
    now = time.monotonic()
    phases[name] = (now - since) * 1000
    return now


def _rounded(phases: dict[str, float]) -> dict[str, int]:
    return {name: round(ms) for name, ms in phases.items()} | {"together": round(sum(phases.values()))}


if __name__ == "__main__":
    main()
