"""joblib on loky: `Parallel` for maps and arrays (it batches and maps memory by itself), loky's executor for single calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine

CHUNK = 10_000
IN_PART = 0.2
"""joblib's own batching takes seconds for a million."""


class Loky(Engine):
    """joblib and loky."""

    name = "loky"
    modules = ("joblib", "loky")
    packages = ("joblib", "loky")

    def start(self) -> None:
        self._executor: Any = None
        self._parallel: Any = None

    @property
    def executor(self) -> Any:
        """Loky's own."""
        if self._executor is None:
            from loky import get_reusable_executor

            self._executor = get_reusable_executor(max_workers=self.workers, timeout=None)
        return self._executor

    @property
    def parallel(self) -> Any:
        """joblib's, with workers that stay."""
        if self._parallel is None:
            from joblib import Parallel

            self._parallel = Parallel(n_jobs=self.workers, return_as="generator").__enter__()
        return self._parallel

    def stop(self) -> None:
        if self._parallel is not None:
            self._parallel.__exit__(None, None, None)
        if self._executor is not None:
            self._executor.shutdown(kill_workers=True)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(function, *args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        from joblib import delayed

        results: Iterable[Any] = self.parallel(delayed(function)(item) for item in items)
        return results

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        some = max(1, int(count * IN_PART))
        return {
            "Parallel": (some, lambda: self.map(work.increment, range(some))),
            f"executor, chunksize {CHUNK}": (
                count,
                lambda: self.executor.map(work.increment, range(count), chunksize=CHUNK),
            ),
        }

    def checksum(self, array: Any) -> int:
        return int(next(iter(self.map(work.checksum, [array]))))
