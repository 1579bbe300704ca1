"""What a replay pickled otherwise than the run before: is it the same all the same? Only the driver's process may unpickle.

Sets in the order of addresses, a string that was one object and now is two: such bytes differ and mean the same. Both are
loaded, and what came out is compared, part by part. Rules: "the same" must never be wrong, "different" only costs a rerun:
types are compared exactly, floats by their bits, an object by what it is pickled as (its own `==` is not asked); whatever
raises is different. Classes of the script are compared by the state that each pickle brings along.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
import types
from collections.abc import Callable, Sequence
from typing import Any

from grid.api import serialize, wire
from grid.api.cloud import loading

BYTES_MAX = 8 << 20
"""Two bodies together; more is different without a look: results must not wait behind it."""
_SHARED = frozenset({tuple, frozenset, type, types.CodeType, types.FunctionType, types.BuiltinFunctionType, types.ModuleType})
"""Whether one object stands in two places, or two that are alike, makes no difference to these."""
DEPTH_MAX = 200
"""Nesting followed: deeper is different."""
_PLAIN = frozenset({int, str, bytes, bool, type(None), range, type(...), type(NotImplemented)})


def same_items(message: wire.Compare, body: serialize.Buffer) -> tuple[tuple[int, int], ...]:
    """The ranges of indexes whose items are the same in both segments of a Compare."""
    same: list[tuple[int, int]] = []
    pair = _load(body, message.old_bytes, serialize.load_segment)
    if pair is None:
        return ()
    (old, old_states), (new, new_states) = pair
    if old.kind != new.kind or not len(old.items) == len(new.items) == message.count:
        return ()
    for index in range(message.count):
        if _alike(old.items[index], new.items[index], old_states, new_states):
            at = message.first + index
            if same and same[-1][1] == at:
                same[-1] = same[-1][0], at + 1
            else:
                same.append((at, at + 1))
    return tuple(same)


def same_function(message: wire.CompareFunction, body: serialize.Buffer) -> bool:
    """Whether both functions have the same code and captured the same."""
    pair = _load(body, message.old_bytes, serialize.load_function)
    return pair is not None and _alike(pair[0][0], pair[1][0], pair[0][1], pair[1][1])


States = dict[type, list[Any]]


def _load(body: serialize.Buffer, split: int, load: Callable[[Any], Any]) -> tuple[tuple[Any, States], tuple[Any, States]] | None:
    """Both halves, each with the states that it brought along for its classes."""
    if len(body) > BYTES_MAX:
        return None
    view, loaded = memoryview(body), []
    for data in (view[:split], view[split:]):
        loading.states = {}
        try:
            loaded.append((load(bytes(data)), loading.states))
        except Exception:  # of the user's __setstate__, or a module that is not here
            return None
        finally:
            loading.states = None
    return loaded[0], loaded[1]


def _alike(old: Any, new: Any, old_states: States, new_states: States) -> bool:
    try:
        return _Comparison(old_states, new_states).alike(old, new)
    except Exception:  # of the user's __reduce__
        return False


class _Comparison:
    """Two graphs of objects, walked side by side."""

    def __init__(self, old_states: States, new_states: States) -> None:
        self._states = old_states, new_states
        self._known: dict[tuple[int, int], tuple[Any, Any]] = {}
        """Pairs compared, or under comparison further up; kept alive, so that their addresses stay theirs."""
        self._twins: dict[int, int] = {}
        """The address of the other one, of what can be changed in place."""
        self._depth = 0

    def alike(self, old: Any, new: Any) -> bool:
        """Whether nobody could tell the two apart."""
        kind = type(old)
        if type(new) is not kind:
            return False
        if kind in _PLAIN:
            return bool(old == new)
        if kind is float:
            return struct.pack("<d", old) == struct.pack("<d", new)
        if kind is complex:
            return struct.pack("<dd", old.real, old.imag) == struct.pack("<dd", new.real, new.imag)
        pair = id(old), id(new)
        if pair in self._known:
            return True
        if kind not in _SHARED and (self._twins.setdefault(pair[0], pair[1]), self._twins.setdefault(pair[1], pair[0])) != (
            pair[1],
            pair[0],
        ):
            return False  # one list in two places is not two lists
        self._known[pair] = old, new
        self._depth += 1
        try:
            return self._depth <= DEPTH_MAX and self._parts(old, new, kind)
        finally:
            self._depth -= 1

    def _parts(self, old: Any, new: Any, kind: type) -> bool:
        if kind is tuple or kind is list:
            return self._each(old, new)
        if kind is dict:
            return self._each(list(old.items()), list(new.items()))
        if kind is set or kind is frozenset:
            return self._sets(old, new)
        if isinstance(old, type):
            return old is new and self._each(*(states.get(old, []) for states in self._states))
        if kind is types.FunctionType:
            return self._functions(old, new)
        if kind is types.CodeType:
            return bool(old == new)
        if kind is pickle.PickleBuffer:
            return bytes(old.raw()) == bytes(new.raw())
        if kind is types.CellType:
            return self._each(_content(old), _content(new))
        if kind in (types.ModuleType, types.BuiltinFunctionType) and old is new:
            return True
        if kind is types.MethodType:
            return self._each((old.__func__, old.__self__), (new.__func__, new.__self__))
        if kind in (property, classmethod, staticmethod):
            return self._each(_wrapped(old), _wrapped(new))
        return self._reduced(old, new)

    def _each(self, old: Sequence[Any], new: Sequence[Any]) -> bool:
        return len(old) == len(new) and all(map(self.alike, old, new))

    def _sets(self, old: Any, new: Any) -> bool:
        others = {item: item for item in new}
        return len(old) == len(new) and all(item in others and self.alike(item, others[item]) for item in old)

    def _functions(self, old: Any, new: Any) -> bool:
        if old is new:
            return True
        for name in ("__code__", "__name__", "__qualname__", "__module__", "__defaults__", "__kwdefaults__", "__dict__"):
            if not self.alike(getattr(old, name), getattr(new, name)):
                return False
        from cloudpickle import cloudpickle

        if not self._each(old.__closure__ or (), new.__closure__ or ()):
            return False
        for name in cloudpickle._extract_code_globals(old.__code__):
            values = [function.__globals__.get(name, cloudpickle) for function in (old, new)]
            if not self.alike(*values):
                return False
        return True

    def _reduced(self, old: Any, new: Any) -> bool:
        """Compare what they are pickled as."""
        if old is new:
            return True
        return self._each(*(_reduction(value) for value in (old, new)))


def _reduction(value: Any) -> Sequence[Any]:
    reduce = copyreg.dispatch_table.get(type(value))
    reduced = reduce(value) if reduce is not None else value.__reduce_ex__(5)
    if isinstance(reduced, str):
        return (reduced,)
    parts: list[Any] = list(reduced)
    for index in (3, 4):  # iterators of items
        if len(parts) > index and parts[index] is not None:
            parts[index] = list(parts[index])
    return parts


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _wrapped(value: Any) -> tuple[Any, ...]:
    return (value.fget, value.fset, value.fdel, value.__doc__) if isinstance(value, property) else (value.__func__,)
