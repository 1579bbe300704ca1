"""The standard library's process pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine

CHUNKS = ((10_000, 1.0), (1_000, 1.0), (1, 0.02))
"""Chunk sizes tried for a million integers, and which part of them: one by one takes minutes."""


class ProcessPool(Engine):
    """`concurrent.futures.ProcessPoolExecutor`, started by fork where that is the default."""

    name = "pool"

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(self.workers)

    def stop(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self.pool.submit(function, *args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.pool.map(function, items)

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        def way(chunk: int, part: float) -> tuple[int, Callable[[], Iterable[int]]]:
            n = max(1, int(count * part))
            return n, lambda: self.pool.map(work.increment, range(n), chunksize=chunk)

        return {f"chunksize {chunk}": way(chunk, part) for chunk, part in CHUNKS}
