"""cloudpickle with the grid's class identities: for what belongs to the script itself, which no other process imports.

A class that travels by value is the same class everywhere in the job: it keeps the identity under which it was first sent,
derived from the job, its module, its qualified name and which one of that name it is. So objects come back to the driver as
instances of the driver's own class, and a driver that is started again gives its classes the same identities.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from typing import Any

_namespace = ""
_occurrences: dict[str, int] = {}
_names_lock = threading.Lock()


def set_namespace(namespace: str) -> None:
    """Derive the identities of classes first pickled from now on from `namespace`: the job, or in a worker the task.

    The same script pickling the same classes in the same order gets the same identities (the driver's replay does).
    """
    global _namespace
    with _names_lock:
        if namespace != _namespace:
            _namespace = namespace
            _occurrences.clear()


def _identify(class_: type) -> None:
    """Give a class that travels by value its identity, unless it has one (it came from another process, say)."""
    from cloudpickle import cloudpickle

    with _names_lock, cloudpickle._DYNAMIC_CLASS_TRACKER_LOCK:
        if not _namespace or class_ in cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS:
            return
        name = f"{class_.__module__}\0{class_.__qualname__}"
        occurrence = _occurrences.get(name, 0)
        _occurrences[name] = occurrence + 1
        identity = hashlib.blake2b(f"{_namespace}\0{name}\0{occurrence}".encode(), digest_size=16).hexdigest()
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[class_] = identity
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID[identity] = class_


def _class_at(index: int) -> type:
    """Stands in a pickle for the index-th class of its segment."""
    return loading.classes[index]


class ClassTable:
    """The script's own classes that a stage's values use, sent once a segment. Only ever grows."""

    def __init__(self) -> None:
        self._indexes: dict[type, int] = {}
        self._data = b""
        self._written = 0
        self.wanted = False
        """Whether the last value needed cloudpickle: the next one probably does too."""

    def index(self, class_: type) -> int:
        """Return the class's place in the table."""
        with _names_lock:
            return self._indexes.setdefault(class_, len(self._indexes))

    def __len__(self) -> int:
        return len(self._indexes)

    def dump(self) -> bytes:
        """The pickled list of classes, made anew only when the table grew."""
        if self._written < len(self._indexes):
            classes = list(self._indexes)
            self._data = cloud_dumps(classes)
            self._written = len(classes)
        return self._data


_pickler_class: Any = None


def cloud_pickler() -> Any:
    """cloudpickle's Pickler with our class identities; imported on first use, for it takes a few milliseconds."""
    global _pickler_class
    if _pickler_class is None:
        from cloudpickle import cloudpickle

        class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]
            """`table` collects the classes that are sent by value; None: they are written in place."""

            def __init__(self, file: Any, buffer_callback: Any = None, table: ClassTable | None = None) -> None:
                super().__init__(file, 5, buffer_callback)
                self._table = table

            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, type) and not cloudpickle._should_pickle_by_reference(obj):
                    _identify(obj)
                    if self._table is not None:
                        return _class_at, (self._table.index(obj),)
                return super().reducer_override(obj)

        _pickler_class = CloudPickler
    return _pickler_class


def cloud_dumps(value: Any) -> bytes:
    """Pickle with cloudpickle and our class identities."""
    out = io.BytesIO()
    cloud_pickler()(out).dump(value)
    return out.getvalue()


class _Loading(threading.local):
    """The classes of the segment that this thread loads."""

    classes: Sequence[type] = ()


loading = _Loading()
