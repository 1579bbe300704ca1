"""Spark in local mode: a Spark job a call, slices chosen by hand, arrays broadcast."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine, environment

SLICES = 4
"""Of a worker: enough to balance, few enough to be cheap."""
FAILURES_MAX = 4


class Spark(Engine):
    """`local[N]`."""

    name = "spark"
    modules = ("pyspark",)
    packages = ("pyspark",)
    can_retry = True

    @classmethod
    def installed(cls) -> bool:
        return super().installed() and (bool(os.environ.get("JAVA_HOME")) or shutil.which("java") is not None)

    def start(self) -> None:
        os.environ.update(environment())
        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
        from pyspark.sql import SparkSession

        cores = f"{self.workers}, {FAILURES_MAX}" if self.retries else str(self.workers)
        builder = SparkSession.builder.master(f"local[{cores}]").config("spark.ui.enabled", "false")
        builder = builder.config("spark.driver.memory", "4g").config("spark.driver.maxResultSize", "4g")
        builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
        self.session = builder.getOrCreate()
        self.context = self.session.sparkContext
        self.context.setLogLevel("OFF")

    def stop(self) -> None:
        self.session.stop()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """A job of one task: it is over when this returns."""
        return self.context.parallelize([args], 1).map(lambda given: function(*given)).collect()[0]

    def result(self, handle: Any) -> Any:
        return handle

    def _mapped(self, function: Callable[[Any], Any], items: Sequence[Any], slices: int) -> list[Any]:
        found: list[Any] = self.context.parallelize(items, max(1, min(len(items), slices))).map(function).collect()
        return found

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self._mapped(function, items, SLICES * self.workers)

    def map_words(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return self._mapped(function, items, 8 * SLICES * self.workers)

    def map_integers(self, count: int) -> dict[str, tuple[int, Callable[[], Iterable[int]]]]:
        return {f"{self.workers} slices": (count, lambda: self._mapped(work.increment, range(count), self.workers))}

    def checksum(self, array: Any) -> int:
        sent = self.context.broadcast(array)
        try:
            return int(self.context.parallelize([0], 1).map(lambda _: work.checksum(sent.value)).collect()[0])
        finally:
            sent.destroy()
