"""grid.put and grid.Ref: objects that are stored once and named by their content.

A Ref is resolved when it is an argument of a task itself, or stands directly in a list, tuple or dict that is one. Deeper
ones, and those that a function captures, stay Refs: call `get()`. The value is loaded once a process and shared by its
tasks, arrays in it as read-only maps of the blob's file: treat it as read-only.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from grid.api import serialize, wire
from grid.api.errors import GridError
from grid.api.session import current

T = TypeVar("T")

CACHE_BYTES_MAX = 256 << 20
"""Blobs whose values this process keeps loaded; the one used longest ago goes first, the last one stays whatever its size."""


class Ref(Generic[T]):
    """A stored object: `name` is the hex BLAKE3 of its `size` pickled bytes."""

    __slots__ = ("name", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def get(self) -> T:
        """Return the object. Raises GridError if no copy is left."""
        value: T = _cache.get(self)
        return value

    def __repr__(self) -> str:
        return f"<grid.Ref {self.name[:12]}, {self.size} bytes>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        serialize.note_ref(self.name)
        return Ref, (self.name, self.size)


def put(obj: T) -> Ref[T]:
    """Store an object on the grid and return its Ref, which costs little to pass to any number of tasks.

    Raises TypeError or PicklingError if the object can't be pickled, GridError if it can't be stored.
    """
    writer = serialize.SegmentWriter()
    writer.add(obj)
    parts, size = writer.finish()
    return Ref(current().put(parts, size), size)


class _Cache:
    """Values of Refs, those used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[int, Any]] = OrderedDict()
        self._size = 0

    def get(self, ref: Ref[Any]) -> Any:
        with self._lock:
            known = self._values.get(ref.name)
            if known is not None:
                self._values.move_to_end(ref.name)
                return known[1]
        path = current().request(lambda number: wire.Fetch(number, ref.name, ref.size)).path
        value = serialize.load_results(serialize.map_file(path, private=False))[0]
        with self._lock:
            if ref.name not in self._values:
                self._values[ref.name] = (ref.size, value)
                self._size += ref.size
                while self._size > CACHE_BYTES_MAX and len(self._values) > 1:
                    self._size -= self._values.popitem(last=False)[1][0]
            return value


_cache = _Cache()


def resolving(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callable that replaces the Refs among its arguments by their values and calls `function`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_resolve, args), **{name: _resolve(value) for name, value in kwargs.items()})

    return call


def _resolve(value: Any) -> Any:
    kind = type(value)
    if kind is Ref:
        return value.get()
    if kind is list or kind is tuple:
        if any(type(item) is Ref for item in value):
            return kind(item.get() if type(item) is Ref else item for item in value)
    elif kind is dict and any(type(item) is Ref for item in value.values()):
        return {key: item.get() if type(item) is Ref else item for key, item in value.items()}
    return value


class StoredFunction:
    """A function too large for a frame: a blob, loaded at the first call."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._function
        if function is None:
            path = current().request(lambda number: wire.Fetch(number, self.name, self.size)).path
            try:
                function = self._function = pickle.loads(serialize.map_file(path, private=False))
            except OSError as error:
                raise GridError(f"the stored function can't be read: {error}") from error
        return function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredFunction, (self.name, self.size)
