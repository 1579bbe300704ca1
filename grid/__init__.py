"""grid: run Python functions on machines that pool themselves.

    import grid

    def count(path): ...
    for result in grid.map(count, grid.files("corpus/*.txt")):
        ...

This module is what a job's script imports, so it loads nothing until a name is used. ARCHITECTURE.md has the map.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from grid.api.calls import Executor as Executor
    from grid.api.calls import map as map
    from grid.api.calls import map_unordered as map_unordered
    from grid.api.calls import options as options
    from grid.api.calls import submit as submit
    from grid.api.connect import connect as connect
    from grid.api.context import Context as Context
    from grid.api.context import context as context
    from grid.api.context import output as output
    from grid.api.errors import GridError as GridError
    from grid.api.errors import MemoryExceeded as MemoryExceeded
    from grid.api.errors import RemoteTraceback as RemoteTraceback
    from grid.api.errors import TaskError as TaskError
    from grid.api.errors import TaskTimeout as TaskTimeout
    from grid.api.errors import UnpicklableResult as UnpicklableResult
    from grid.api.errors import WorkerDied as WorkerDied
    from grid.api.files import File as File
    from grid.api.files import files as files
    from grid.api.refs import Ref as Ref
    from grid.api.refs import put as put

_HOMES = {
    "Executor": "calls",
    "map": "calls",
    "map_unordered": "calls",
    "options": "calls",
    "submit": "calls",
    "connect": "connect",
    "Context": "context",
    "context": "context",
    "output": "context",
    "GridError": "errors",
    "MemoryExceeded": "errors",
    "RemoteTraceback": "errors",
    "TaskError": "errors",
    "TaskTimeout": "errors",
    "UnpicklableResult": "errors",
    "WorkerDied": "errors",
    "File": "files",
    "files": "files",
    "Ref": "refs",
    "put": "refs",
}

__all__ = [
    "Context",
    "Executor",
    "File",
    "GridError",
    "MemoryExceeded",
    "Ref",
    "RemoteTraceback",
    "TaskError",
    "TaskTimeout",
    "UnpicklableResult",
    "WorkerDied",
    "connect",
    "context",
    "files",
    "map",
    "map_unordered",
    "options",
    "output",
    "put",
    "submit",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'grid' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"grid.api.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
