"""dask.distributed: a scheduler and worker processes on this machine, large inputs scattered, batches cut by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import ALL, Engine

CHUNK = 10_000


def increment_array(numbers: Any) -> Any:
    """A chunk as numpy has it."""
    return numbers + 1


class Dask(Engine):
    """`LocalCluster` of processes with one thread each."""

    name = "dask"
    modules = ("dask", "distributed")
    packages = ("dask", "distributed")
    rows = ALL | {"many_workers"}

    def start(self) -> None:
        self._cluster(self.workers, 1)

    def start_many(self, nodes: int, slots: int) -> None:
        self._cluster(nodes, slots)

    def _cluster(self, processes: int, threads: int) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(
            n_workers=processes, threads_per_worker=threads, processes=True, dashboard_address=None, host="127.0.0.1"
        )
        self.client = Client(self.cluster)
        self.client.wait_for_workers(processes, timeout=300)

    def stop(self) -> None:
        self.client.close()
        self.cluster.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(function, *args, pure=False)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        found: list[Any] = self.client.gather(list(handles))
        return found

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.gather(self.client.map(function, list(items), pure=False))

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        def arrays() -> Iterable[int]:
            import numpy

            given = [numpy.arange(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
            for part in self.map(increment_array, given):
                yield from part.tolist()

        def lists() -> Iterable[int]:
            for part in self.map(work.increment_all, list(work.chunks(range(count), CHUNK))):
                yield from part

        return {"numpy chunks by hand": (count, arrays), "lists by hand": (count, lists)}

    def checksum(self, array: Any) -> int:
        return int(self.client.submit(work.checksum, self.client.scatter(array, hash=False), pure=False).result())

    @staticmethod
    def nap(seconds: float) -> tuple[Any, float]:
        """Who: process and thread; the process stands last, to be killed."""
        import os
        import threading
        import time

        began_s = time.monotonic()
        time.sleep(seconds)
        return f"{threading.get_ident()}:{os.getpid()}", began_s
