"""cloudpickle with the grid's identities: for what belongs to the script itself, which no other process imports.

Rules this file keeps:

- a class that travels by value is the same class everywhere in the job: it keeps the identity under which it was first sent,
  derived from the job, its module, its qualified name and which one of that name it is. Objects come back to the driver as
  instances of the driver's own class, which stays as the driver made it, whatever state a pickle brings along;
- the same value gives the same bytes in every process that runs the same script: no path of this machine (places.py), no
  random identity, no order that depends on addresses or on which module happened to be imported first;
- a value names a class by its content (`ClassTable`), so its bytes depend neither on what was pickled before nor by whom.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
import types
import typing
import weakref
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from grid.api import places

_namespace = ""
_occurrences: dict[str, int] = {}
_names_lock = threading.Lock()
_own: weakref.WeakSet[Any] = weakref.WeakSet()
"""Classes that came to be in this process: no pickle changes them."""
_loaded: weakref.WeakValueDictionary[bytes, type] = weakref.WeakValueDictionary()
_contents: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()
"""Of classes that were loaded: the key of the state that they have now."""


def set_namespace(namespace: str) -> None:
    """Derive the identities of classes first pickled from now on from `namespace`: the job, or in a worker the task.

    The same script pickling the same classes in the same order gets the same identities (the driver's replay does).
    """
    global _namespace
    with _names_lock:
        if namespace != _namespace:
            _namespace = namespace
            _occurrences.clear()


def _identify(thing: Any) -> str:
    """The identity of a class (or type variable) that travels by value: given now, or it came with it."""
    from cloudpickle import cloudpickle

    with _names_lock:
        with cloudpickle._DYNAMIC_CLASS_TRACKER_LOCK:
            known: str | None = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(thing)
            if known is None and _namespace:
                name = f"{thing.__module__}\0{getattr(thing, '__qualname__', thing.__name__)}"
                occurrence = _occurrences.get(name, 0)
                _occurrences[name] = occurrence + 1
                known = hashlib.blake2b(f"{_namespace}\0{name}\0{occurrence}".encode(), digest_size=16).hexdigest()
                cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[thing] = known
                cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID[known] = thing
                _own.add(thing)
        return known or str(cloudpickle._get_or_create_tracker_id(thing))


def _class_of(identity: str) -> Any:
    from cloudpickle import cloudpickle

    return cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(identity)


# ---- loading ---------------------------------------------------------------------------------------------------------


class _Loading(threading.local):
    """What the loading hooks of this thread use."""

    classes: Mapping[bytes, tuple[str, bytes]] = {}
    """Of the segment that is being loaded: identity and pickle of its classes, by key."""
    states: dict[type, list[Any]] | None = None
    """Set by who compares: the states that pickles bring along for each class."""


loading = _Loading()


def _class_at(key: bytes) -> type:
    """Stands in a pickle for a class of its segment."""
    known = _loaded.get(key)
    if known is not None and _contents.get(known) == key and loading.states is None:
        return known
    identity, data = loading.classes[key]
    own = _class_of(identity)
    if own is not None and own in _own and loading.states is None:
        return own  # type: ignore[no-any-return]
    class_: type = pickle.loads(data)
    _loaded[key] = class_
    _contents[class_] = key
    return class_


def _find_class(identity: str, make: Any, arguments: tuple[Any, ...]) -> Any:
    """The class of this identity, else an empty one to be filled."""
    known = _class_of(identity)
    return make(*arguments) if known is None else known


def _settle_class(class_: type, state: Any) -> None:
    """Fill a class that was loaded, also one that this process knew already: it gets its new state."""
    from cloudpickle import cloudpickle

    if loading.states is not None:
        loading.states.setdefault(class_, []).append(state)
    if class_ not in _own:
        _contents.pop(class_, None)
        cloudpickle._class_setstate(class_, state)


# ---- pickling --------------------------------------------------------------------------------------------------------


class ClassTable:
    """The script's own classes that a stage's values use, each as it was when it was first used there."""

    def __init__(self) -> None:
        self._keys: dict[type, bytes] = {}
        self._rows: dict[bytes, tuple[str, bytes]] = {}
        self._dumped: tuple[tuple[bytes, ...], bytes] = ((), b"")
        self.wanted = False
        """Whether the last value needed cloudpickle: the next one probably does too."""

    def key(self, class_: type) -> bytes:
        """Name the class by its content."""
        known = self._keys.get(class_)
        if known is None:
            data = cloud_dumps(class_)
            known = hashlib.blake2b(data, digest_size=16).digest()
            self._rows[known] = (_identify(class_), data)
            known = self._keys.setdefault(class_, known)
        return known

    def dump(self, keys: Iterable[bytes]) -> bytes:
        """These classes, pickled, for a segment's head: the same keys give the same bytes."""
        order = tuple(sorted(keys))
        if self._dumped[0] != order:
            self._dumped = order, pickle.dumps({key: self._rows[key] for key in order}, 5)
        return self._dumped[1]


_pickler_class: Any = None


def cloud_pickler() -> Any:
    """cloudpickle's Pickler with our identities; imported on first use, for it takes a few milliseconds."""
    global _pickler_class
    if _pickler_class is None:
        import pathlib

        from cloudpickle import cloudpickle

        builtin = frozenset({*cloudpickle._BUILTIN_TYPE_NAMES, type(None), type(...), type(NotImplemented)})

        class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]
            """`table` collects the classes that are sent by value; None: they are written in place."""

            dispatch_table = ChainMap(
                {
                    types.CodeType: _reduce_code,
                    types.CellType: _reduce_cell,
                    typing.TypeVar: _reduce_type_variable,
                    pathlib.PosixPath: _reduce_path,
                },
                *cloudpickle.Pickler.dispatch_table.maps,
            )

            def __init__(self, file: Any, buffer_callback: Any = None, table: ClassTable | None = None) -> None:
                super().__init__(file, 5, buffer_callback)
                self._table = table
                self.used: dict[bytes, None] = {}
                """Keys of the classes that what was dumped refers to."""

            def reducer_override(self, obj: Any) -> Any:
                if not isinstance(obj, type) or obj in builtin or cloudpickle._should_pickle_by_reference(obj):
                    return super().reducer_override(obj)
                identity = _identify(obj)
                if self._table is not None:
                    key = self._table.key(obj)
                    self.used[key] = None
                    return _class_at, (key,)
                make, arguments, state, _, _, _ = super().reducer_override(obj)
                state[0].pop("__slotnames__", None)  # copyreg's note, made when the first instance is pickled
                _place_values(state[0])
                registered = state[0].get("_abc_impl")
                if registered:
                    registered.sort(key=lambda class_: (class_.__module__, class_.__qualname__))
                return _find_class, (identity, make, arguments), state, None, None, _settle_class

            def _dynamic_function_reduce(self, func: Any) -> Any:
                reduced = super()._dynamic_function_reduce(func)
                base, (_, slots) = reduced[1][1], reduced[2]
                for name in ("__file__", "__path__"):
                    if name in base:
                        base[name] = _portable(base[name])
                _place_values(slots["__globals__"])
                if func.__defaults__:
                    slots["__defaults__"] = tuple(map(places.of_value, func.__defaults__))
                slots["_cloudpickle_submodules"].sort(key=lambda module: module.__name__)
                return reduced

        _pickler_class = CloudPickler
    return _pickler_class


def _place_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) is str:
            values[name] = places.of_value(value)


def _portable(value: Any) -> Any:
    return [places.of_file(entry) for entry in value] if type(value) is list else places.of_file(value)


def _reduce_code(code: types.CodeType) -> Any:
    from cloudpickle import cloudpickle

    make, arguments = cloudpickle._code_reduce(code)
    place = places.of_file(code.co_filename)
    if place is code.co_filename:
        return make, arguments
    return make, tuple(place if part is code.co_filename else part for part in arguments)


def _reduce_cell(cell: types.CellType) -> Any:
    from cloudpickle import cloudpickle

    reduced = cloudpickle._cell_reduce(cell)
    return reduced[0], tuple(map(places.of_value, reduced[1]))


def _reduce_type_variable(variable: Any) -> Any:
    from cloudpickle import cloudpickle

    _identify(variable)
    return cloudpickle._typevar_reduce(variable)


def _reduce_path(path: Any) -> Any:
    text = str(path)
    place = places.of_value(text)
    return path.__reduce__() if place is text else (type(path), (place,))


def cloud_dumps(value: Any) -> bytes:
    """Pickle with cloudpickle and our identities."""
    out = io.BytesIO()
    cloud_pickler()(out).dump(value)
    return out.getvalue()
