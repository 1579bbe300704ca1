"""polars' word count: one process, its own threads, batches of texts through its expressions."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine

BATCH_BYTES = 32 << 20
"""Texts of a frame: enough for all threads, little enough for memory."""


class Polars(Engine):
    """In process."""

    name = "polars"
    modules = ("polars",)
    packages = ("polars",)
    rows: ClassVar[frozenset[str]] = frozenset({"words"})

    def measure_words(self, *, corpus: str, batch_bytes: int) -> work.Values:
        """The same count of the same files."""
        os.environ["POLARS_MAX_THREADS"] = str(self.workers)
        import polars

        def counted(frame: Any) -> Any:
            return frame.group_by("word").agg(polars.col("times").sum())

        began = time.perf_counter()
        paths, sizes = work.corpus_files(corpus)
        parts = []
        for batch in work.batches(paths, sizes, BATCH_BYTES):
            texts = polars.Series("text", [Path(path).read_bytes().decode() for path in batch])
            found = texts.str.extract_all("[A-Za-z0-9_]+").explode().drop_nulls().alias("word")
            parts.append(found.to_frame().group_by("word").agg(polars.len().alias("times")))
        rows = counted(polars.concat(parts)).rows()
        elapsed_s = time.perf_counter() - began
        total = Counter({word.encode(): times for word, times in rows})
        return {"s": elapsed_s, "check": work.told(total), "megabytes": sum(sizes) / 1e6, "files": len(sizes)}
