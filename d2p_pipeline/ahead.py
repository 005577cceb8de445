"""Prepares a run's next units in threads, while the one before is written and acknowledged.

Nothing here is final: what was prepared in vain is thrown away, and a step that failed is done anew by whoever asks again. At
most `jobs` units are in memory at once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from d2p_pipeline.delivery import ParquetFile, Rows, Text, Unit


class Ahead:
    """The steps before `write`, for `units` that are asked for in this order."""

    def __init__(
        self,
        pool: Executor,
        jobs: int,
        units: Sequence[Unit],
        *,
        read: Callable[[Unit], Text],
        check: Callable[[Text], Rows],
        build: Callable[[Rows], list[ParquetFile]],
    ) -> None:
        self._pool = pool
        self._jobs = jobs
        self._units = list(units)
        self._steps: dict[str, Callable[[Any], Any]] = {"read": read, "check": check, "build": build}
        self._begun: dict[Unit, dict[str, Future[Any]]] = {}

    def read(self, unit: Unit) -> Text:
        """The unit's chunks; begins the units that come after it."""
        if unit in self._units:
            place = self._units.index(unit)
            for near in self._units[place : place + self._jobs]:
                self._begin(near)
            del self._units[: place + 1]
        return self._take(unit, "read", unit)

    def check(self, text: Text) -> Rows:
        return self._take(text.unit, "check", text)

    def build(self, rows: Rows) -> list[ParquetFile]:
        return self._take(rows.unit, "build", rows)

    def _begin(self, unit: Unit) -> None:
        if unit not in self._begun:
            self._begun[unit] = {step: Future() for step in self._steps}
            self._pool.submit(self._prepare, unit, dict(self._begun[unit]))

    def _prepare(self, unit: Unit, futures: dict[str, Future[Any]]) -> None:
        value: Any = unit
        for step, future in futures.items():
            try:
                value = self._steps[step](value)
            except Exception as error:  # noqa: BLE001  # raised where the step is asked for
                future.set_exception(error)
                return
            future.set_result(value)

    def _take(self, unit: Unit, step: str, value: Any) -> Any:
        """A step's result, once: from its thread, or done here where no thread has it or had it."""
        futures = self._begun.get(unit, {})
        future = futures.pop(step, None)
        if future is None:
            return self._steps[step](value)
        if not futures or future.exception():  # the steps after a failed one come from no thread
            del self._begun[unit]
        return future.result()
