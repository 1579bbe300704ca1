"""What a function of the script takes with it, and whether that changed since it was sent.

A function travels once for a stage, with the globals, closure and defaults it uses as they are then. A later submit of
the same function must not run with stale ones: rebinding is seen here by identity, at every call; values that can be
changed in place (`mutable`) make the caller compare the pickles: at every call, or those of a large function when it is idle.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

VALUES_MAX = 1000
"""Captured values watched; a function with more is taken for mutable."""
_IMMUTABLE = (int, float, complex, str, bytes, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType, range)
_MISSING = object()


class Captures:
    """The captured values of one callable, at the time of construction."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.mutable = False
        """Whether something captured can change without being bound anew."""
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._seen: set[int] = set()
        self._add(function)
        self._seen.clear()

    def _add(self, value: Any) -> None:
        if len(self._globals) + len(self._cells) > VALUES_MAX:
            self.mutable = True
        if self.mutable or id(value) in self._seen:
            return
        if isinstance(value, types.FunctionType):
            self._seen.add(id(value))
            self._add_function(value)
        elif type(value) in (tuple, frozenset):
            for item in value:
                self._add(item)
        elif not isinstance(value, _IMMUTABLE) and not _is_logger(value):
            self.mutable = True

    def _add_function(self, function: types.FunctionType) -> None:
        from cloudpickle import cloudpickle

        if cloudpickle._should_pickle_by_reference(function):
            return
        for name in cloudpickle._extract_code_globals(function.__code__):
            value = function.__globals__.get(name, _MISSING)
            self._globals.append((function.__globals__, name, value))
            if value is not _MISSING:
                self._add(value)
        for cell in function.__closure__ or ():
            value = _content(cell)
            self._cells.append((cell, value))
            if value is not _MISSING:
                self._add(value)
        self._add(function.__defaults__)
        if function.__kwdefaults__ or function.__dict__:
            self.mutable = True

    def changed(self) -> bool:
        """Whether something captured was bound to another object."""
        for namespace, name, value in self._globals:
            if namespace.get(name, _MISSING) is not value:
                return True
        return any(_content(cell) is not value for cell, value in self._cells)


def _is_logger(value: Any) -> bool:
    """A logger travels as its name."""
    logging = sys.modules.get("logging")
    return logging is not None and isinstance(value, logging.Logger)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING
