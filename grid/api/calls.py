"""map, submit and their kin: what a script calls.

Rules this file keeps:

- a map is a stage; submits of the same function and options share one, as long as what the function captures is the same;
- callables that are made anew for each call (lambdas in a loop, partials) travel as arguments of one common stage.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from grid.api import feed, serialize, wire
from grid.api.captures import Captures
from grid.api.futures import GridFuture
from grid.api.map_stage import MapStage
from grid.api.session import Session, current, function_name
from grid.api.submit_stage import SubmitStage

P = ParamSpec("P")
T = TypeVar("T")

OPEN_STAGES_MAX = 64
"""Submit stages kept open for further calls of the same function; the one unused longest is closed."""
FRESH_CALLABLES_MAX = 4
"""After this many stages for different objects (or states) of one kind, the next ones travel as arguments."""
WATCHED_BYTES_MAX = 4 << 10
"""A function this small whose captures can change in place is pickled at each submit, to see whether they did (some 30 µs)."""
_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def map(function: Callable[..., T], /, *iterables: Iterable[Any], return_exceptions: bool = False) -> Iterator[T]:
    """Call the function for each item (or for items side by side, to the shortest) on the grid; results in order.

    The stage starts at once. Inputs are taken lazily, results come as they are ready; memory stays bounded. Never
    iterated, the calls are still made before the job ends; closed after iteration began, the rest is cancelled. The
    first error is raised in its place and cancels the rest, or yielded with `return_exceptions`. An error of the
    iterable itself is always raised, after the results of the items before it.
    """
    return _DEFAULT.map(function, *iterables, return_exceptions=return_exceptions)


def map_unordered(function: Callable[..., T], /, *iterables: Iterable[Any], return_exceptions: bool = False) -> Iterator[T]:
    """As `map`, but results come in the order in which they are ready."""
    return _DEFAULT.map_unordered(function, *iterables, return_exceptions=return_exceptions)


def submit(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
    """Call `function(*args, **kwargs)` on the grid; return its future. The arguments are frozen at once."""
    return _DEFAULT.submit(function, *args, **kwargs)


def options(
    *,
    retries: int | None = None,
    task_timeout: float | None = None,
    cpus: int | None = None,
    memory: int | str | None = None,
    tags: Iterable[str] = (),
    pure: bool = True,
) -> Options:
    """Return an object with `map`, `map_unordered` and `submit` whose calls have these options. None: the job's.

    retries: how often a task that raised runs again. task_timeout: seconds. cpus: slots a task takes. memory: bytes, or
    text as "2GB". tags: only on peers that have all of them. pure=False: never run twice on purpose (still at least
    once after a loss). Raises ValueError.
    """
    if retries is not None and retries < 0:
        raise ValueError("retries must be 0 or more")
    if task_timeout is not None and not task_timeout > 0:
        raise ValueError("task_timeout must be more than 0 seconds")
    if cpus is not None and cpus < 1:
        raise ValueError("cpus must be 1 or more")
    if isinstance(tags, str):
        tags = (tags,)
    memory_bytes = parse_size(memory) if isinstance(memory, str) else memory
    if memory_bytes is not None and memory_bytes <= 0:
        raise ValueError("memory must be more than 0 bytes")
    return Options(wire.Options(retries, task_timeout, cpus, memory_bytes, tuple(tags), pure))


def parse_size(text: str) -> int:
    """Return the bytes that a text as "512MB", "2 GiB" or "1000" means. Raises ValueError."""
    cleaned = text.strip().lower().removesuffix("b")
    unit = next((unit for unit in ("ki", "mi", "gi", "ti", "k", "m", "g", "t") if cleaned.endswith(unit)), "")
    try:
        number = float(cleaned.removesuffix(unit))
    except ValueError:
        raise ValueError(f"{text!r} is no size: write a number with KB, MB, GB, KiB, MiB or GiB") from None
    return int(number * _SIZES.get(unit, 1))


class Options:
    """Calls with options; see `grid.options`."""

    def __init__(self, wire_options: wire.Options) -> None:
        self._options = wire_options

    def __repr__(self) -> str:
        return f"grid.options({self._options!r})"

    def map(self, function: Callable[..., T], /, *iterables: Iterable[Any], return_exceptions: bool = False) -> Iterator[T]:
        """As `grid.map`."""
        return self._start(function, iterables, True, return_exceptions).results()

    def map_unordered(
        self, function: Callable[..., T], /, *iterables: Iterable[Any], return_exceptions: bool = False
    ) -> Iterator[T]:
        """As `grid.map_unordered`."""
        return self._start(function, iterables, False, return_exceptions).results()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """As `grid.submit`."""
        return self._submit(function, args, kwargs)

    def _start(
        self, function: Callable[..., T], iterables: tuple[Iterable[Any], ...], ordered: bool, return_exceptions: bool
    ) -> MapStage:
        if not callable(function):
            raise TypeError(f"map needs something to call first, not {type(function).__name__}")
        if not iterables:
            raise TypeError("map needs at least one iterable")
        for iterable in iterables:
            if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
                raise TypeError(f"{type(iterable).__name__!r} object is not iterable")
        kind = serialize.ONE if len(iterables) == 1 else serialize.MANY
        name = function_name(function)
        stage = MapStage(current(), function, name, ordered, self._options, kind, return_exceptions)
        feed.start(stage, iterables)
        return stage

    def _submit(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> GridFuture:
        session = current()
        book = _books.get(session)
        if book is None:
            with _books_lock:
                book = _books.setdefault(session, _Book(session))
        return book.submit(function, self._options, args, kwargs)


_DEFAULT = Options(wire.Options())


def _apply(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call what travelled as an argument."""
    return function(*args, **kwargs)


class _Entry:
    __slots__ = ("captures", "data", "function", "stage")

    def __init__(self, stage: SubmitStage, function: Callable[..., Any]) -> None:
        self.stage = stage
        self.function = function
        self.captures = Captures(function)
        self.data = serialize.dump_function(function) if self.captures.mutable else b""

    def stale(self) -> bool:
        """Whether the function would travel otherwise now than it did."""
        if self.stage.over or self.stage.total is not None or self.captures.changed():
            return True
        if not self.captures.mutable or (len(self.data) > WATCHED_BYTES_MAX and not self.stage.idle):
            return False
        return serialize.dump_function(self.function) != self.data


class _Book:
    """The submit stages of a session that are open for further calls."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._kinds: dict[Any, int] = {}
        self._last: tuple[Any, wire.Options, tuple[int, int, int], _Entry] | None = None

    def submit(
        self, function: Callable[..., Any], options: wire.Options, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> GridFuture:
        session = self._session()
        assert session is not None
        last = self._last
        if last is not None and last[0] is function and last[1] is options and last[2] == session.task:
            entry = last[3]
            future = None if entry.stale() else entry.stage.submit(args, kwargs)
            if future is not None:
                return future
        if not callable(function):
            raise TypeError(f"submit needs something to call first, not {type(function).__name__}")
        while True:
            with self._lock:
                found = self._entry(session, function, options)
                if found is None:
                    function, args, name = _apply, (function, *args), function_name(function)
                    found = self._entry(session, function, options, name)
                    assert found is not None
                elif function is not _apply:
                    self._last = (function, options, session.task, found)
            future = found.stage.submit(args, kwargs)
            if future is not None:  # else another thread has just closed it
                return future

    def _entry(self, session: Session, function: Callable[..., Any], options: wire.Options, name: str = "") -> _Entry | None:
        """The open stage for this function; None: it is one too many of its kind and shall travel as an argument."""
        key = (_identity(function), options, session.task, name)
        entry = self._entries.get(key)
        if entry is not None and not entry.stale():
            self._entries.move_to_end(key)
            return entry
        if entry is not None:
            del self._entries[key]
            entry.stage.close()
        if function is not _apply:
            kind = (_kind(function), session.task)
            count = self._kinds[kind] = self._kinds.get(kind, 0) + 1
            if len(self._kinds) > 16 * OPEN_STAGES_MAX:
                self._kinds.clear()
            if count > FRESH_CALLABLES_MAX:
                return None
        stage = SubmitStage(session, function, name or function_name(function), options)
        entry = self._entries[key] = _Entry(stage, function)
        if len(self._entries) > OPEN_STAGES_MAX:
            self._entries.popitem(last=False)[1].stage.close()
        return entry


def _identity(function: Callable[..., Any]) -> Any:
    """Equal for what is the same callable: a bound method is a new object at each access."""
    if isinstance(function, types.MethodType):
        return id(function.__self__), id(function.__func__)
    return id(function)


def _kind(function: Callable[..., Any]) -> Any:
    if isinstance(function, types.FunctionType):
        return function.__code__
    if isinstance(function, types.MethodType):
        return function.__func__
    inner = getattr(function, "func", None)
    return type(function), getattr(inner, "__code__", None)


_books: weakref.WeakKeyDictionary[Session, _Book] = weakref.WeakKeyDictionary()
_books_lock = threading.Lock()


class Executor(concurrent.futures.Executor):
    """The grid as a standard executor, for libraries that take one. `call_options`: what `grid.options` returned."""

    def __init__(self, call_options: Options | None = None) -> None:
        self._calls = call_options or _DEFAULT
        self._lock = threading.Lock()
        self._closed = False
        self._futures: set[concurrent.futures.Future[Any]] = set()
        self._stages: weakref.WeakSet[MapStage] = weakref.WeakSet()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """As concurrent.futures.Executor.submit. Raises RuntimeError after shutdown."""
        with self._lock:
            self._check()
            future = self._calls.submit(fn, *args, **kwargs)
            self._futures.add(future)
        concurrent.futures.Future.add_done_callback(future, self._futures.discard)
        return future

    def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As concurrent.futures.Executor.map. Iterables are read at once but with `buffersize`; chunks are our business."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._check()
        if not iterables:
            return iter(())
        if buffersize is None:
            rows = list(zip(*iterables, strict=False))
            iterables = tuple(list(column) for column in zip(*rows, strict=True)) or ((),)
        stage = self._calls._start(fn, iterables, True, False)
        self._stages.add(stage)
        return stage.results(deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As concurrent.futures.Executor.shutdown; cancel_futures also cancels calls that run already."""
        with self._lock:
            self._closed = True
            futures = list(self._futures)
            stages = list(self._stages)
        if cancel_futures:
            for future in futures:
                future.cancel()
            for stage in stages:
                stage.cancel("the executor was shut down")
        if wait:
            concurrent.futures.wait(futures)
            for stage in stages:
                stage.absorb()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
