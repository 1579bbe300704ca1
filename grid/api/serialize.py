"""Segments: the pickled arguments or results of a short run of tasks, and how functions and exceptions travel.

Rules this file keeps:

- the plain C pickler first, cloudpickle only where it fails or would name something of `__main__`, which no other
  process has;
- each object is frozen when it is added: a task or generator may reuse it afterwards. Only scalars go in batches;
- buffers of OUT_OF_BAND_BYTES or more lie outside the pickle, ALIGNMENT bytes aligned: a mapped segment is used in
  place. What was writable before is writable after (where the memory is), what was read-only stays so;
- classes of `__main__` travel once a segment, under an identity that any process of the job derives alike;
- a segment's bytes follow from its items alone, and an item's chunk and buffers from the item alone, whatever was pickled
  before it: a class is named in it by its content. So an item's digest needs no look at the classes' pickle.

Layout, little endian: HEAD, a CHUNK each, a BUFFER each, the classes' pickle, the chunks' pickles, padding, buffers.
A chunk is the pickle of one value (count 0) or of a sequence of `count` values: scalars that follow each other are one chunk.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import re
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from grid.api import wire
from grid.api.cloud import ClassTable as ClassTable
from grid.api.cloud import cloud_dumps, cloud_pickler, loading
from grid.api.cloud import set_namespace as set_namespace

Buffer: TypeAlias = bytes | bytearray | memoryview

HEAD = struct.Struct("<2sBBIIQ")
"""Magic, kind, flags, number of chunks, number of buffers, length of the classes' pickle."""
CHUNK = struct.Struct("<QII")
"""Length of the pickle, count of values (0: one bare value), number of its buffers."""
BUFFER = struct.Struct("<QQ")
"""Offset from the segment's start, length."""
MAGIC = b"g1"
HAS_REFS = 1
ALIGNMENT = 64
"""A cache line, and what numpy and Arrow ask for."""
OUT_OF_BAND_BYTES = 64 << 10
"""Below this a copy is cheaper than a buffer of its own."""

EXCEPTION_BYTES_MAX = 1 << 20
"""An exception that drags more along reaches the caller by its text alone: it travels in a frame."""

ONE, MANY, CALL = 0, 1, wire.CALLS
"""What an item is: the only argument, a tuple of arguments, or (args, kwargs or None)."""

SCALARS = frozenset({int, float, str, bytes, bool, complex, type(None)})
"""Types whose values can't change and name no class: pickled in batches, unchecked."""
_LARGE_TYPES = frozenset({str, bytes, bytearray})
_MAIN = b"\x8c\x08__main__"  # how protocol 5 writes the module name of anything that belongs to the script itself
_PICKLING_ERRORS = (pickle.PicklingError, TypeError, AttributeError, ImportError, RecursionError, NotImplementedError)
_GENERATORS = (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType)


class SegmentError(ValueError):
    """The bytes are no segment."""


class _State(threading.local):
    """What the pickling hooks of this thread collect."""

    def __init__(self) -> None:
        self.refs: list[str] = []


_state = _State()


def note_ref(name: str) -> None:
    """Called by objects as they are pickled: whoever loads this will read the blob of this (hex) name."""
    _state.refs.append(name)


# ---- writing segments ------------------------------------------------------------------------------------------------


class Pickled:
    """One value, frozen: pickle parts, out-of-band buffers, names of the blobs it refers to.

    The parts and buffers of a large one may still be the caller's own memory until it is written or `freeze`d.
    """

    __slots__ = ("buffers", "classes", "length", "parts", "refs", "size")

    def __init__(
        self, parts: list[Buffer], buffers: list[memoryview], refs: tuple[str, ...], classes: tuple[bytes, ...] = ()
    ) -> None:
        self.parts = parts
        self.buffers = buffers
        self.refs = refs
        self.classes = classes
        self.length = sum(map(_nbytes, parts))
        self.size = self.length + sum(view.nbytes for view in buffers)

    def freeze(self) -> None:
        """Copy what may still be the caller's memory."""
        self.parts = [part if type(part) is bytes else bytes(part) for part in self.parts]
        self.buffers = [memoryview((bytes if view.readonly else bytearray)(view)) for view in self.buffers]


class _Sink:
    __slots__ = ("write",)
    write: Callable[[Any], Any]


def _nbytes(part: Buffer) -> int:
    return len(part) if type(part) is bytes else memoryview(part).nbytes


def _is_large(value: Any) -> bool:
    return type(value) in _LARGE_TYPES and len(value) >= OUT_OF_BAND_BYTES


def pickle_value(value: Any, table: ClassTable, large: bool = False) -> bytes | Pickled:
    """Pickle one value: to plain bytes where they say it all. `large`: it holds long strings, don't copy them.

    Raises what pickling raised: TypeError, PicklingError or whatever the object's own methods did.
    """
    buffers: list[memoryview] = []

    def keep_in(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    refs = _state.refs
    if refs:
        refs.clear()
    if table.wanted:
        item = _pickle_by_value(value, table, keep_in, buffers)
        if item.classes:
            return item
        table.wanted = False  # what the plain pickler can do, it does: the bytes don't depend on the value before
        buffers.clear()
        refs.clear()
    try:
        if large:
            parts: list[Buffer] = []
            sink = _Sink()
            sink.write = parts.append
            pickle.Pickler(sink, 5, buffer_callback=keep_in).dump(value)
            if not any(_MAIN in part for part in parts):
                return Pickled(parts, buffers, tuple(refs))
        else:
            data = pickle.dumps(value, 5, buffer_callback=keep_in)
            if _MAIN not in data:
                return Pickled([data], buffers, tuple(refs)) if buffers or refs else data
    except _PICKLING_ERRORS:
        pass
    buffers.clear()
    refs.clear()
    item = _pickle_by_value(value, table, keep_in, buffers)
    table.wanted = bool(item.classes)
    return item


def _pickle_by_value(
    value: Any, table: ClassTable, keep_in: Callable[[pickle.PickleBuffer], bool], buffers: list[memoryview]
) -> Pickled:
    out = io.BytesIO()
    pickler = cloud_pickler()(out, keep_in, table)
    pickler.dump(value)
    return Pickled([out.getvalue()], buffers, tuple(_state.refs), tuple(pickler.used))


def pickle_call(args: tuple[Any, ...], kwargs: dict[str, Any] | None, table: ClassTable) -> bytes | Pickled:
    """Pickle the arguments of one submitted call: an item of kind CALL."""
    large = False
    for value in args:
        if type(value) in _LARGE_TYPES and len(value) >= OUT_OF_BAND_BYTES:
            large = True
    if kwargs and not large:
        large = any(map(_is_large, kwargs.values()))
    return pickle_value((args, kwargs or None), table, large)


class SegmentWriter:
    """Gathers values into one segment. `table`: where its values' classes are, to share between segments."""

    def __init__(self, kind: int = ONE, table: ClassTable | None = None) -> None:
        self.kind = kind
        self.count = 0
        self.size = 0
        """Bytes gathered so far, but for scalars not flushed yet."""
        self._table = ClassTable() if table is None else table
        self._run: list[Any] = []
        self._run_size = 0
        self._rows: list[bytes] = []
        self._parts: list[Buffer] = []
        self._buffers: list[memoryview] = []
        self._refs: dict[str, None] = {}
        self._classes: dict[bytes, None] = {}

    def add(self, value: Any) -> None:
        """Add one value, pickled at once unless nobody can change it. Raises what pickling raised, and adds nothing."""
        if type(value) in SCALARS and not _is_large(value):
            self._run.append(value)
            self.count += 1
            if type(value) is str or type(value) is bytes:
                self._run_size += len(value)
                self.size += len(value)
            return
        large = _is_large(value) or (self.kind == MANY and type(value) is tuple and any(map(_is_large, value)))
        self.add_pickled(pickle_value(value, self._table, large))

    def add_scalars(self, values: list[Any]) -> None:
        """Add numbers, of SCALARS types but neither text nor bytes. They make one chunk with the scalars beside them."""
        size = len(pickle.dumps(values, 5))
        self._run += values
        self._run_size += size
        self.size += size
        self.count += len(values)

    def flush(self) -> None:
        """Pickle the scalars gathered."""
        if self._run:
            self.count -= len(self._run)
            self.size -= self._run_size
            self._run_size = 0
            run, self._run = self._run, []
            self.add_batch(run)

    def add_batch(self, values: Sequence[Any]) -> None:
        """Add the values of a sequence that nobody will change and that needs no cloudpickle: scalars, a range."""
        if self._run:
            self.flush()
        data = pickle.dumps(values, 5)
        self._rows.append(CHUNK.pack(len(data), len(values), 0))
        self._parts.append(data)
        self.size += len(data) + CHUNK.size
        self.count += len(values)

    def add_pickled(self, item: bytes | Pickled) -> None:
        """Add what `pickle_value` or `pickle_call` returned for this writer's class table."""
        if self._run:
            self.flush()
        self.count += 1
        if type(item) is bytes:
            self._rows.append(CHUNK.pack(len(item), 0, 0))
            self._parts.append(item)
            self.size += len(item) + CHUNK.size
            return
        assert isinstance(item, Pickled)
        if item.classes:
            self._classes.update(dict.fromkeys(item.classes))
        self._rows.append(CHUNK.pack(item.length, 0, len(item.buffers)))
        self._parts += item.parts
        self._buffers += item.buffers
        self.size += item.size + CHUNK.size
        if item.refs:
            self._refs.update(dict.fromkeys(item.refs))

    @property
    def refs(self) -> tuple[str, ...]:
        """Hex names of the blobs its tasks will read."""
        return tuple(self._refs)

    def finish(self) -> tuple[list[Buffer], int]:
        """Return the segment's parts and its length in bytes, a multiple of ALIGNMENT."""
        self.flush()
        classes = self._table.dump(self._classes) if self._classes else b""
        flags = HAS_REFS if self._refs else 0
        head = HEAD.pack(MAGIC, self.kind, flags, len(self._rows), len(self._buffers), len(classes))
        end = len(head) + CHUNK.size * len(self._rows) + BUFFER.size * len(self._buffers) + len(classes)
        end += sum(map(_nbytes, self._parts))
        table: list[bytes] = []
        tail: list[Buffer] = []
        for view in self._buffers:
            padding = -end % ALIGNMENT
            table.append(BUFFER.pack(end + padding, view.nbytes))
            tail += (bytes(padding), view)
            end += padding + view.nbytes
        padding = -end % ALIGNMENT
        front = b"".join((head, *self._rows, *table, classes))
        if end < 4 * OUT_OF_BAND_BYTES:
            return [b"".join((front, *self._parts, *tail, bytes(padding)))], end + padding
        return [front, *self._parts, *tail, bytes(padding)], end + padding


def dump_segment(items: Iterable[Any], kind: int = ONE) -> tuple[list[Buffer], tuple[str, ...]]:
    """Pickle items of one kind into one segment: (its parts, hex names of the blobs its tasks will read)."""
    writer = SegmentWriter(kind)
    for item in items:
        writer.add(item)
    return writer.finish()[0], writer.refs


_GLOBAL = re.compile(rb"\x8c.([A-Za-z_][\w.]*)\x94\x8c.[\w.]+\x94\x93", re.DOTALL)  # as protocol 5 first names one of a module


def modules_in(parts: Sequence[Buffer]) -> tuple[str, ...]:
    """Modules loaded here that the pickles among a segment's parts name, at least those named near their beginning."""
    found: dict[str, None] = {}
    for part in parts:
        if type(part) is bytes and len(part) <= OUT_OF_BAND_BYTES:
            found.update((match[1].decode(), None) for match in _GLOBAL.finditer(part))
    return tuple(name for name in found if name in sys.modules and name != "__main__")


# ---- reading segments ------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Items of one kind (ONE, MANY or CALL)."""

    kind: int
    items: Sequence[Any]
    has_refs: bool

    def bind(self, function: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return what calls `function` with one item, with `grid.Ref`s among its arguments replaced by their values."""
        if self.has_refs:
            from grid.api.refs import resolving

            function = resolving(function)
        if self.kind == ONE:
            return function
        if self.kind == MANY:
            return lambda item: function(*item)
        return lambda item: function(*item[0], **item[1]) if item[1] else function(*item[0])


def load_segment(data: Buffer | mmap.mmap, lo: int = 0, hi: int | None = None) -> Segment:
    """Load items [lo, hi) of a segment. Raises SegmentError, or what unpickling raised."""
    view = memoryview(data)
    try:
        magic, kind, flags, chunks, buffers, classes_length = HEAD.unpack_from(view)
        if magic != MAGIC:
            raise SegmentError("these bytes are no segment")
        tables = HEAD.size + CHUNK.size * chunks
        start = tables + BUFFER.size * buffers
        rows = list(CHUNK.iter_unpack(view[HEAD.size : tables]))
        areas = [view[offset : offset + length] for offset, length in BUFFER.iter_unpack(view[tables:start])]
    except struct.error as error:
        raise SegmentError("these bytes are no segment") from error
    before = loading.classes
    if classes_length:
        loading.classes = pickle.loads(view[start : start + classes_length])
        start += classes_length
    try:
        if len(rows) == 1 and rows[0][1]:
            items: Sequence[Any] = pickle.loads(view[start:], buffers=areas)
            return Segment(kind, items if lo == 0 and hi in (None, len(items)) else items[lo:hi], bool(flags & HAS_REFS))
        return Segment(kind, _load_chunks(view, start, rows, areas, lo, hi), bool(flags & HAS_REFS))
    finally:
        loading.classes = before


def _load_chunks(
    view: memoryview, start: int, rows: list[tuple[int, int, int]], areas: list[memoryview], lo: int, hi: int | None
) -> list[Any]:
    loads = pickle.loads
    items: list[Any] = []
    index = area = 0
    for length, count, buffers in rows:
        after = index + (count or 1)
        if after > lo and (hi is None or index < hi):
            chunk = view[start : start + length]
            value = loads(chunk, buffers=areas[area : area + buffers]) if buffers else loads(chunk)
            if not count:
                items.append(value)
            elif index < lo or (hi is not None and after > hi):
                items.extend(value[max(lo - index, 0) : None if hi is None else hi - index])
            else:
                items.extend(value)  # not +=, which numpy would take for an addition
        start += length
        area += buffers
        index = after
    return items


def map_file(path: str, private: bool = True) -> memoryview:
    """Map a file whole. `private`: arrays in it may be written to, and the file never is; else they are read-only."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_READ))


# ---- results ---------------------------------------------------------------------------------------------------------


class ResultWriter(SegmentWriter):
    """Gathers the values that tasks returned, each frozen when it is added."""

    def add(self, value: Any) -> None:
        """Add one task's result. Raises TypeError for a generator, else what pickling raised, and adds nothing."""
        if isinstance(value, _GENERATORS):
            what = "generator" if isinstance(value, types.GeneratorType) else "coroutine or asynchronous generator"
            raise TypeError(f"the task returned a {what}, which can't leave its process: return a list instead")
        super().add(value)


def dump_results(values: Iterable[Any]) -> list[Buffer]:
    """Pickle the results of consecutive tasks into one segment's parts."""
    writer = ResultWriter()
    for value in values:
        writer.add(value)
    return writer.finish()[0]


def load_results(data: Buffer | mmap.mmap, lo: int = 0, hi: int | None = None) -> Sequence[Any]:
    """Load the values [lo, hi) of a result segment."""
    return load_segment(data, lo, hi).items


# ---- functions and exceptions ----------------------------------------------------------------------------------------


def dump_function(function: Callable[..., Any]) -> bytes:
    """Pickle a callable with all it captures. Raises TypeError that names it when something in it can't be pickled."""
    try:
        return cloud_dumps(function)
    except Exception as error:
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        raise TypeError(f"{name} can't be sent to workers, something it uses can't be pickled: {error}") from error


def load_function(data: Buffer) -> Callable[..., Any]:
    """Load a callable. Raises whatever its imports raise."""
    function: Callable[..., Any] = pickle.loads(data)
    return function


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception, or return b"" if it wouldn't survive.

    Many take other arguments than they keep, and can't be made from what they kept: those are put together without a call.
    """
    for value in (error, _AsKept(error)):
        try:
            data = b"".join(dump_results([value]))
            copy = load_results(data)[0]
        except Exception:  # of the user's __reduce__ or __init__
            continue
        if type(copy) is type(error) and len(data) <= EXCEPTION_BYTES_MAX:
            return data
    return b""


class _AsKept:
    """Pickles as an exception's class, args and attributes."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _put_together, (type(self._error), self._error.args, vars(self._error))


def _put_together(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


def load_exception(data: Buffer) -> BaseException | None:
    """Load what `dump_exception` returned; None if there is nothing or it can't be loaded here."""
    if not len(data):
        return None
    try:
        error = load_results(data)[0]
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None
