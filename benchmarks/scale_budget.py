"""What a flush costs, by phase: `python -m benchmarks.scale_budget`, on the instance and the Redis that the environment names.

Prints JSON: milliseconds of processor time until the first flush of a fresh process has ended (stock), and of each phase of a
later flush in the same process (warm worker), the least of several, which other work on the machine disturbs least.
"""

import json
import time

_FLUSHES = 9


def main() -> None:
    stock: dict[str, float] = {"start Python": time.process_time() * 1000}
    import dagster as dg

    _lap(stock, "import dagster")
    from d2p_pipeline.definitions import defs

    _lap(stock, "import the definitions")
    with dg.DagsterInstance.get() as instance:
        _lap(stock, "open the instance")
        job = defs.resolve_job_def("flush")
        flushes = [_flush(job, instance, "first")]
        _lap(stock, "the first flush, with what it imports")
        began = time.process_time()
        flushes = [_flush(job, instance, str(number)) for number in range(_FLUSHES)]
        processor = (time.process_time() - began) / _FLUSHES * 1000
    warm = {phase: min(flush[phase] for flush in flushes) for phase in flushes[0]}
    print(json.dumps({"stock": _rounded(stock), "warm": _rounded(warm), "warm, processor time": round(processor)}))


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


def _lap(phases: dict[str, float], name: str) -> None:
    phases[name] = time.process_time() * 1000 - sum(phases.values())


def _rounded(phases: dict[str, float]) -> dict[str, int]:
    return {name: round(ms) for name, ms in phases.items()} | {"together": round(sum(phases.values()))}


if __name__ == "__main__":
    main()
