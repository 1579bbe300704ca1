"""DuckDB's word count: one process, its own threads, SQL."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, ClassVar

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import Engine

QUERY = """
SELECT word, count(*) AS times
FROM (SELECT unnest(regexp_extract_all(content, '[A-Za-z0-9_]+')) AS word FROM read_text($paths))
GROUP BY word
"""


class DuckDB(Engine):
    """In process."""

    name = "duckdb"
    modules = ("duckdb",)
    packages = ("duckdb",)
    rows: ClassVar[frozenset[str]] = frozenset({"words"})

    def measure_words(self, *, corpus: str, batch_bytes: int) -> work.Values:
        """The same count of the same files."""
        import duckdb

        began = time.perf_counter()
        paths, sizes = work.corpus_files(corpus)
        connection: Any = duckdb.connect()
        connection.execute(f"SET threads = {self.workers}")
        rows = connection.execute(QUERY, {"paths": paths}).fetchall()
        elapsed_s = time.perf_counter() - began
        total = Counter({word.encode(): times for word, times in rows})
        return {"s": elapsed_s, "check": work.told(total), "megabytes": sum(sizes) / 1e6, "files": len(sizes)}
