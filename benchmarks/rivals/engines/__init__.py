"""One adapter file an engine; `ENGINES` names them in the order of the table. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rivals.engines.base import Engine

ENGINES = {
    "grid": "grid:Durable",
    "grid-3": "grid:Three",
    "grid-files": "grid:Files",
    "embedded": "embedded:Embedded",
    "pool": "process_pool:ProcessPool",
    "loky": "loky:Loky",
    "dask": "dask:Dask",
    "ray": "ray:Ray",
    "parsl": "parsl:Parsl",
    "spark": "spark:Spark",
    "duckdb": "duckdb:DuckDB",
    "polars": "polars:Polars",
    "bare": "bare:Bare",
    "serial": "serial:Serial",
}
OURS = ("grid", "grid-3", "grid-files", "embedded")
RIVALS = ("pool", "loky", "dask", "ray", "parsl", "spark")
"""General engines that run Python: what we must beat. `bare` and `serial` are what no engine can be, DuckDB and polars no rivals
but a measure."""


def engine_class(name: str) -> type[Engine]:
    """The adapter; its engine's package isn't imported yet."""
    module, _, cls = ENGINES[name].partition(":")
    found: type[Engine] = getattr(importlib.import_module(f"benchmarks.rivals.engines.{module}"), cls)
    return found
