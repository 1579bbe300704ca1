"""Parsl: python apps on its high-throughput executor, one manager on this machine, batches cut by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine

CHUNK = 10_000


class Parsl(Engine):
    """`HighThroughputExecutor` with a `LocalProvider`."""

    name = "parsl"
    modules = ("parsl",)
    packages = ("parsl",)
    can_retry = True

    def start(self) -> None:
        import parsl
        from parsl.config import Config
        from parsl.executors import HighThroughputExecutor
        from parsl.providers import LocalProvider

        self.parsl: Any = parsl
        self.apps: dict[Any, Any] = {}
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        executor = HighThroughputExecutor(
            label="here", address="127.0.0.1", max_workers_per_node=self.workers, cores_per_worker=1e-6, encrypted=False,
            provider=LocalProvider(init_blocks=1, max_blocks=1),
        )  # fmt: skip
        folder = self.folder.name
        parsl.load(Config([executor], run_dir=folder, strategy="none", retries=self.retries, initialize_logging=False))

    def stop(self) -> None:
        self.parsl.dfk().cleanup()
        self.parsl.clear()
        self.folder.cleanup()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        app = self.apps.get(function)
        if app is None:
            app = self.apps[function] = self.parsl.python_app(function)
        return app(*args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self.gather([self.submit(function, item) for item in items])

    def map_quick(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        raise NotImplementedError

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        def lists() -> Iterable[int]:
            for part in self.map(work.increment_all, list(work.chunks(range(count), CHUNK))):
                yield from part

        return {"lists by hand": (count, lists)}
