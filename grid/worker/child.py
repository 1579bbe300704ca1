"""A worker: runs tasks of one job, one at a time, in its main thread.

Rules this file keeps:

- what is received while a task runs (by its nested calls, or by the clock when the task takes long) is queued;
- each Run is answered exactly once in full (reporting.py), whatever its tasks do short of ending the process;
- the work for a trivial task stays near a tenth of a microsecond: nothing is hashed, locked, sent or timed for a single one,
  unless its stage limits its tasks' time;
- when the peer is gone, so is the worker.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import mmap
import os
import platform
import socket
import struct
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice, repeat
from operator import is_
from typing import Any, Final

from grid.api import serialize, session, wire
from grid.api.channel import Channel, ChannelClosed
from grid.worker import progress
from grid.worker.prints import Prints
from grid.worker.reporting import TINY, TINY_MAX, Reporter
from grid.worker.seeding import Seeder

TICK_S: Final = 0.1
"""Of the clock thread: how long a result, a print or a Revoke may wait behind a long task."""
IDLE_TICKS: Final = 10
"""Then the clock stops until there is work again."""
SEGMENTS_KEPT: Final = 2
"""Segments of which parts were run: the next bundle most likely is the rest of one."""
LOOK_NS: Final = 500_000
"""About how often the loop over tasks looks at the clock, to flush what is due: it tries so many tasks more, or fewer, each time.
Where tasks turn slow in between, the clock thread flushes."""
LOOK_GROWTH: Final = 4
LOOK_TASKS_MAX: Final = 1024
MADV_POPULATE_READ: Final = 22
"""Linux 5.14; where there is none, pages come one after the other."""
_USED: Final = object()


def start_child(channel: Channel) -> wire.Setup:
    """Take the Setup, put in place what drivers and workers share, and tell the peer that we are ready."""
    setup, _ = channel.receive()
    assert isinstance(setup, wire.Setup)
    os.environ.clear()
    os.environ.update(setup.env)
    if setup.workdir:
        os.makedirs(setup.workdir, exist_ok=True)
        os.chdir(setup.workdir)
    folder = os.path.dirname(setup.script)
    if setup.script and folder not in sys.path[:1]:
        sys.path.insert(0, folder)
    sys.argv[:] = [setup.script, *setup.argv]
    sys.modules["__main__"] = types.ModuleType("__main__")
    channel.send(wire.Ready(os.getpid(), platform.python_version()))
    return setup


def main(sock: socket.socket, progress_fd: int, early_fd: int | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    channel = Channel(sock)
    os.register_at_fork(after_in_child=lambda: os.close(channel.fileno()))  # what a task forks is no worker
    try:
        setup = start_child(channel)
        faulthandler.enable(2)
        cell = mmap.mmap(progress_fd, progress.CELL_BYTES)
        os.close(progress_fd)
        with memoryview(cell).cast("q") as view:
            Worker(channel, setup, view, None if early_fd is None else socket.socket(fileno=early_fd)).serve()
    except (ChannelClosed, wire.WireError):
        os._exit(1)  # nobody is left to hear of it
    return 0


class Worker:
    """The state of a worker process."""

    def __init__(self, channel: Channel, setup: wire.Setup, cell: memoryview, early: socket.socket | None = None) -> None:
        self._channel = channel
        self._cell = cell
        self._queue: deque[tuple[wire.Run, Any] | None] = deque()
        self._arrived = threading.Condition()
        self._functions: dict[int, Any] = {}
        self._segments: deque[tuple[wire.Run, Any, serialize.Segment]] = deque(maxlen=SEGMENTS_KEPT)
        self._imports: tuple[str, ...] = ()
        self._mapped: mmap.mmap | None = None
        self._forks = 0
        self._busy = False
        self._clock_runs = threading.Event()
        self._seeder = Seeder(setup.seed)
        self._session = session.attach(channel, setup, self._take, partial(_TaskSession, cell))
        self._prints = Prints(channel.send, lambda: self._session.task)
        self._prints.install()
        self._reporter = Reporter(self._session, self._prints, early)
        os.register_at_fork(after_in_parent=self._forked)
        self._seeder.watch(lambda: self._seeder.of(*self._session.task[:2]))

    def serve(self) -> None:
        """Run what arrives until Stop. Raises ChannelClosed."""
        before = threading.stack_size(256 << 10)  # it counts against the memory limit
        threading.Thread(target=self._clock, name="grid-clock", daemon=True).start()
        threading.stack_size(before)
        while True:
            item = self._next()
            if item is None:
                self._reporter.flush()
                return
            self._busy = True
            if not self._clock_runs.is_set():
                self._clock_runs.set()
            try:
                self._run(*item)
            finally:
                self._busy = False

    # ---- frames ------------------------------------------------------------------------------------------------------

    def _take_waiting(self) -> None:
        """Called by the clock while a task runs: take the frames that are there, unless the task pumps itself."""
        if self._session.reading.lock.acquire(blocking=False):
            try:
                self._session.pump(_never, 0.0)
            finally:
                self._session.reading.lock.release()

    def _take(self, message: Any, body: Any) -> None:
        """Take a frame that is none of the session's, in whichever thread read it."""
        kind = type(message)
        if kind is wire.Function:
            self._functions[message.fn] = _Unloaded(body)
            return
        if kind is wire.Import:
            self._imports += message.modules
            return
        with self._arrived:
            if kind is wire.Run:
                self._queue.append((message, body))
            elif kind is wire.Stop:
                self._queue.append(None)
            elif kind is wire.Revoke:
                for item in self._queue:
                    if item is not None and item[0].ticket == message.ticket:
                        self._queue.remove(item)
                        self._channel.send(wire.Returned(message.ticket))
                        break
            self._arrived.notify()

    def _next(self) -> tuple[wire.Run, Any] | None:
        """Wait for the next Run; None: stop."""
        current = self._session
        current.pump(_never, 0.0)  # a Revoke may stand behind the Run that it revokes
        while True:
            with self._arrived:
                if self._queue:
                    return self._queue.popleft()
            if self._imports:
                self._import()
                continue
            if current.pump(lambda: self._queue or self._imports):
                continue
            with self._arrived:  # the session's reader has taken over
                while not self._queue and current.error is None:
                    self._arrived.wait(TICK_S * IDLE_TICKS)
            if not self._queue and current.error is not None:
                raise ChannelClosed(str(current.error))

    def _import(self) -> None:
        """What the next arguments will need. What can't be imported is told when they are loaded."""
        names, self._imports = self._imports, ()
        for name in names:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def _run(self, run: wire.Run, body: Any) -> None:
        if not run.shared:
            self._run_bundle(run, body)
            return
        forks = self._forks
        try:
            self._run_bundle(run, body)
        finally:
            clean = self._unmap() and forks == self._forks
            self._channel.send(wire.Unmapped(run.ticket, clean))

    def _run_bundle(self, run: wire.Run, body: Any) -> None:
        reporter = self._reporter
        reporter.begin(run)
        self._session.task = (run.stage, run.lo, run.attempt)  # of what its function and arguments run as they are loaded
        self._cell[2] = run.ticket
        try:
            function = self._function(run.fn)
        except BaseException as error:
            reporter.fail_all("raised", error, f"the function can't be loaded: {error}")
            return
        try:
            call, items = self._load(run, body, function)
        except BaseException as error:
            reporter.fail_all("raised", error, f"the arguments can't be loaded: {error}")
            return
        del body
        self._run_tasks(run, call, items)
        self._session.task = (run.stage, reporter.last, run.attempt)
        self._cell[3] = reporter.last
        self._cell[0] = -1
        reporter.flush()

    def _run_tasks(self, run: wire.Run, call: Callable[[Any], Any], items: Sequence[Any]) -> None:
        cell, reporter, tiny, clock = self._cell, self._reporter, self._reporter.tiny, time.monotonic_ns
        tasks = enumerate(items, run.lo)
        step, looked_ns = 1, 0
        while True:
            now_ns = clock()
            if now_ns >= reporter.flush_at_ns or len(tiny) >= TINY_MAX:
                reporter.flush(now_ns)
            if not run.timed:
                step = _next_step(step, now_ns - looked_ns if looked_ns else LOOK_NS)
                looked_ns = now_ns
            count = reporter.take(min(step, TINY_MAX - len(tiny)))
            if not count:
                return
            cell[1] = now_ns  # before the index: whoever reads between the two sees too young a task, never too old a one
            self._run_some(islice(tasks, count), call)

    def _run_some(self, tasks: Iterable[tuple[int, Any]], call: Callable[[Any], Any]) -> None:
        """All that is done for each task."""
        cell, seeder, reporter, current, tiny_types = self._cell, self._seeder, self._reporter, self._session, TINY
        append = reporter.tiny.append
        for index, item in tasks:
            cell[0] = index
            if seeder.active:
                seeder.seed(seeder.of(current.task[0], index))
            try:
                value = call(item)
                if current.nested:
                    current.finish_task(False)
            except BaseException as error:
                if isinstance(error, ChannelClosed):
                    raise
                self._failed(index, error)
                continue
            if type(value) in tiny_types:
                append(value)
            else:
                reporter.keep(index, value)
                del value

    def _failed(self, index: int, error: BaseException) -> None:
        if self._session.nested:
            with contextlib.suppress(Exception):
                self._session.finish_task(True)
        self._reporter.fail(index, error, error.__traceback__)

    def _function(self, number: int) -> Callable[..., Any]:
        function = self._functions[number]
        if type(function) is _Unloaded:
            function = serialize.load_function(function.data)
            self._functions[number] = function
        return function  # type: ignore[no-any-return]

    def _load(self, run: wire.Run, body: Any, function: Callable[..., Any]) -> tuple[Callable[[Any], Any], Sequence[Any]]:
        """The call to make and the items to make it with, from a segment loaded before if it is one."""
        lo, hi = run.lo - run.first, run.hi - run.first
        segment = self._known(run, body, lo, hi)
        if segment is None:
            segment = serialize.load_segment(self._map(run) if run.path else body)
            if len(segment.items) > hi - lo:
                self._segments.append((run, body, segment))
        items = segment.items
        if len(items) > hi - lo:
            part = items[lo:hi]
            if isinstance(items, list):  # each is used once: tasks may change their arguments, and memory comes back
                items[lo:hi] = [_USED] * (hi - lo)
            items = part
        if len(items) != hi - lo:
            raise serialize.SegmentError(f"tasks [{run.lo}, {run.hi}) are not in their segment")
        return segment.bind(function), items

    def _map(self, run: wire.Run) -> memoryview:
        """The Run's file. Shared memory is all there: it is mapped at once instead of a few pages at each touch."""
        view = serialize.map_file(run.path)
        if run.shared and isinstance(view.obj, mmap.mmap):
            self._mapped = view.obj
            with contextlib.suppress(OSError):
                view.obj.madvise(MADV_POPULATE_READ)
        return view

    def _unmap(self) -> bool:
        """Let go of shared memory; False if something still has it: a task kept its arguments."""
        mapping, self._mapped = self._mapped, None
        try:
            if mapping is not None:
                mapping.close()
        except BufferError:
            return False
        return True

    def _forked(self) -> None:
        self._forks += 1  # what it forked maps what we do

    def _known(self, run: wire.Run, body: Any, lo: int, hi: int) -> serialize.Segment | None:
        for other, data, segment in self._segments:
            if (
                (other.stage, other.first, other.path) == (run.stage, run.first, run.path)
                and data == body
                and not (isinstance(segment.items, list) and any(map(is_, segment.items[lo:hi], repeat(_USED))))
            ):
                return segment
        return None

    # ---- the clock ---------------------------------------------------------------------------------------------------

    def _clock(self) -> None:
        """Thread: looks every TICK_S while there is work, at what a long task would otherwise hold up."""
        idle = 0
        with contextlib.suppress(ChannelClosed):
            while True:
                idle = 0 if self._busy else idle + 1
                if idle >= IDLE_TICKS:
                    self._clock_runs.clear()
                    if not self._busy:
                        self._clock_runs.wait()
                    idle = 0
                time.sleep(TICK_S)
                self._prints.flush()
                if not self._busy:
                    continue
                self._reporter.flush_stale()
                self._reporter.give_back()
                self._take_waiting()


class _TaskSession(session.Session):
    """A worker's session. Which task runs is read from the progress cell: to say it twice would cost a trivial task a third."""

    def __init__(self, cell: memoryview, *args: Any) -> None:
        self._cell = cell
        super().__init__(*args)

    @property
    def task(self) -> tuple[int, int, int]:
        """(stage, index, attempt) of the task that runs; what was set while none does."""
        stage, index, attempt = self._set
        running = self._cell[0]
        return stage, index if running < 0 else running, attempt

    @task.setter
    def task(self, value: tuple[int, int, int]) -> None:
        self._set = value


def _next_step(step: int, elapsed_ns: int) -> int:
    """How many tasks to run until the next look at the clock, after `step` of them took so long."""
    if elapsed_ns < LOOK_NS // LOOK_GROWTH:
        return min(LOOK_TASKS_MAX, step * LOOK_GROWTH)
    return max(1, step * LOOK_NS // elapsed_ns) if elapsed_ns > LOOK_NS else step


class _Unloaded:
    """A function's pickle."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data


def _never() -> bool:
    return False


assert progress.CELL.size == 4 * struct.calcsize("q")
