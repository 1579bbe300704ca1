"""The grid as one process sees it: its channel, its stages, its requests. In a driver and, for nested calls, in a task.

Rules this file keeps:

- who reads the channel, `grid.api.reading` decides; `next_frame` gives a worker's own loop what is not for us;
- stages are told of what arrives by whoever read it, and never under the session's lock;
- a channel that is lost fails everything that waits, once, with one line.

For the worker's loop: set `session.task` before each task, take frames from `next_frame()`, and if `session.nested` is
true after a task, call `finish_task(failed)` before its result is reported.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grid.api import places, serialize, wire
from grid.api.channel import Channel, ChannelClosed
from grid.api.errors import GridError
from grid.api.reading import Reading
from grid.api.replay import Cuts, Record
from grid.api.shared import SharedMemory

if TYPE_CHECKING:
    from grid.api.stages import Stage

CAPTURED_BYTES_WARN = 10 << 20
"""A function this large is sent whole to every worker: worth a word."""
FLUSH_S = 0.002
"""How long a submitted call may wait for company when nobody waits for its result."""
TICK_S = 0.005
"""How long an item may wait while the generator it came from is slow to give the next."""
FUNCTIONS_MAX = 1024
"""Functions remembered by content, so that mapping the same one again doesn't send it again."""
EXPECT_BYTES = 8 << 20
"""A page from this size on takes milliseconds to write: time for an import."""
EARLY_STAGES_MAX = 8
"""With more stages open, whether they all rest costs more to see than is won."""
UNREAD_MAX = 16
"""Stages with errors that nobody read, of which the end of the script tells."""


class Session:
    """One process's end of a job. `on_other` (else `next_frame`) gets the frames that are not for a session."""

    def __init__(self, channel: Channel, setup: wire.Setup, on_other: Callable[[Any, Any], None] | None = None) -> None:
        self.channel = channel
        self.setup = setup
        self.worker = setup.role == "worker"
        self.task = (-1, -1, 0)
        """(stage, index, attempt) of the running task, as given in its Run; the worker's loop sets it."""
        self.nested = False
        """Whether the running task made stages."""
        self.pid = os.getpid()
        self.error: GridError | None = None
        self.closing = False
        self.early: socket.socket | None = None
        """In a driver: where workers of its machine send results that it alone waits for."""
        self._on_other = on_other
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.reading = Reading(self, channel, self._take)
        self._stages: dict[int, Stage] = {}
        self._stage_count = 0
        self._occurrence_task = self.task
        self._occurrence = 0
        self._functions: dict[bytes, tuple[int, str]] = {}
        self._function_count = 0
        self._request_count = 0
        self._requests: dict[int, wire.Reply | None] = {}
        self._replied = threading.Condition()
        self._spool_count = 0
        self._expected: dict[str, None] = {}
        self._shared = SharedMemory(setup.shared_bytes)
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # put() is safe even from a finaliser
        self._awake = False
        self._flusher: threading.Thread | None = None
        self._bursts: dict[Stage, None] = {}
        self._feeding: dict[Stage, None] = {}
        self._unread: list[Stage] = []
        self._comparisons: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._comparer: threading.Thread | None = None
        self._record: Record | None = None
        places.set_places(os.path.dirname(setup.script), setup.workdir)
        serialize.set_namespace(setup.job)
        if not self.worker:
            self.start_reader()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def start_reader(self) -> None:
        """Read the channel in a thread of its own from now on."""
        self.reading.start()

    def _take(self, message: Any, body: Any) -> None:
        if not self.dispatch(message, body):
            self._hand_on(message, body)

    def _hand_on(self, message: Any, body: Any) -> None:
        if self._on_other is not None:
            self._on_other(message, body)
        else:
            self._inbox.put((message, body))

    def next_frame(self) -> tuple[Any, bytes | bytearray]:
        """Wait for the next frame that is the worker's own (Function, Run, Stop...). Raises ChannelClosed."""
        while True:
            if self.reading.thread is not None or not self._inbox.empty():
                item = self._inbox.get()
                if isinstance(item, BaseException):
                    self._inbox.put(item)
                    raise item
                return item  # type: ignore[no-any-return]
            message, body = self.channel.receive()
            if not self.dispatch(message, body):
                return message, body

    def dispatch(self, message: Any, body: bytes | bytearray) -> bool:
        """Take in a frame; False if it is none of a session's."""
        kind = type(message)
        if kind is wire.Result:
            stage = self._stages.get(message.stage)
            if stage is not None:
                stage.on_result(message.lo, message.hi, body, message.path, message.skip)
            elif message.path:
                with contextlib.suppress(OSError):
                    os.unlink(message.path)
        elif kind is wire.Failure:
            stage = self._stages.get(message.stage)
            if stage is not None:
                stage.on_failure(message, body)
        elif kind is wire.Cancelled:
            stage = self._stages.get(message.stage)
            if stage is not None:
                stage.on_cancelled(message.lo, message.hi)
        elif kind is wire.Throttle:
            stage = self._stages.get(message.stage)
            if stage is not None:
                stage.on_throttle(message.hold)
        elif kind is wire.Released:
            self._shared.released(message.path, message.reusable)
        elif kind is wire.Reply:
            with self._replied:
                if message.id in self._requests:
                    self._requests[message.id] = message
                    self._replied.notify_all()
        elif kind is wire.Compare or kind is wire.CompareFunction:
            self._compare(message, body)
        else:
            return False
        return True

    def take_early(self) -> None:
        """Take a result that a worker sent here itself, if nothing else is waited for, which might come before it.

        The peer, which sends it too, has had it before: what this process says next, the peer hears after it.
        """
        if (early := self.early) is None:
            return
        try:
            data = early.recv(wire.EARLY.size + wire.EARLY_BYTES_MAX, socket.MSG_DONTWAIT)
            number, index = wire.EARLY.unpack_from(data)
        except (OSError, struct.error):  # nothing is there, or another thread closes this session
            return
        stage = self._stages.get(number)
        if stage is None or len(self._stages) > EARLY_STAGES_MAX:
            return
        if all(other is stage or other.idle for other in list(self._stages.values())):
            stage.on_early(index, data[wire.EARLY.size :])

    def _compare(self, message: Any, body: Any) -> None:
        """Answer in a thread that is there for it: what unpickles may take long."""
        self._comparisons.put((message, body))
        with self._lock:
            if self._comparer is None:
                self._comparer = threading.Thread(target=self._answer, name="grid-comparer", daemon=True)
                self._comparer.start()

    def _answer(self) -> None:
        from grid.api import compare

        with contextlib.suppress(GridError):
            while True:
                message, body = self._comparisons.get()
                if type(message) is wire.Compare:
                    ranges = compare.same_items(message, body)
                else:
                    ranges = ((0, 1),) if compare.same_function(message, body) else ()
                self.send(wire.Same(message.id, ranges))

    def lose(self, cause: BaseException) -> None:
        """The channel is gone: fail everything that waits for it."""
        with self._lock:
            if self.error is not None:
                return
            if isinstance(cause, wire.WireError):
                text = f"the peer speaks another version of the local protocol: {cause}"
            elif self.closing:
                text = "the grid's session is closed"
            else:
                text = "the grid went away in the middle of this job: its peer stopped or was killed"
            self.error = GridError(text)
            stages = list(self._stages.values())
        self._inbox.put(cause)
        with self._replied:
            self._replied.notify_all()
        for stage in stages:
            stage.fail(self.error)
        self._wake.put(None)

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, condition: threading.Condition, ready: Callable[[], object], timeout_s: float | None = None) -> bool:
        """Block until `ready()`, checked under `condition`, at most `timeout_s` seconds; return whether it is.

        In a worker's main thread the task's slot is given up meanwhile.
        """
        return self.reading.wait(condition, ready, timeout_s)

    def pump(self, until: Callable[[], object], deadline: float | None = None) -> bool:
        """Read and dispatch frames in this thread until `until()`; False at the deadline or when a reader took over."""
        return self.reading.pump(until, deadline)

    # ---- sending -----------------------------------------------------------------------------------------------------

    def send(self, message: wire.Message, *buffers: wire.Buffer) -> None:
        """Send a frame. Raises GridError when the peer is gone."""
        if self.error is not None:
            raise self.error
        try:
            self.channel.send(message, *buffers)
        except ChannelClosed as error:
            self.lose(error)
            assert self.error is not None
            raise self.error from None

    def request(self, make: Callable[[int], wire.Message], *buffers: wire.Buffer) -> wire.Reply:
        """Send `make(id)` and wait for its Reply. Raises GridError with the reply's error."""
        with self._replied:
            self._request_count += 1
            number = self._request_count
            self._requests[number] = None
        try:
            self.send(make(number), *buffers)
            self.reading.wait(self._replied, lambda: self._requests[number] or self.error, None, for_peer=True)
        finally:
            with self._replied:
                reply = self._requests.pop(number)
        if reply is None:
            raise self.error or GridError("the grid did not answer")
        if reply.error:
            raise GridError(reply.error)
        return reply

    def spool(self, parts: list[serialize.Buffer]) -> str:
        """Write the parts to a new file in the spool folder, for the peer to adopt; return its path."""
        with self._lock:
            self._spool_count += 1
            name = f"{self.setup.role}-{os.getpid()}-{self._spool_count}"
        path = os.path.join(self.setup.spool, name)
        try:
            with open(path, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part)
                    if view.nbytes:
                        view = view.cast("B")
                        while view.nbytes:
                            view = view[file.write(view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise GridError(f"can't write {path}: {error.strerror}: free some space on that disk") from error
        return path

    def expect(self, parts: list[serialize.Buffer], size: int) -> None:
        """Before a page is written that takes a while: have a worker import meanwhile what it will need."""
        if self.worker or size < EXPECT_BYTES:
            return
        found = serialize.modules_in(parts)
        with self._lock:
            new = tuple(name for name in found if name not in self._expected)
            self._expected.update(dict.fromkeys(new))
        if new:
            self.send(wire.Expect(new))

    def share(self, parts: list[serialize.Buffer], size: int) -> str:
        """Write the parts into memory that the peer and its workers can map; "" if there is none to be had: spool them."""
        return self._shared.write(parts, size)

    def put(self, parts: list[serialize.Buffer], size: int) -> str:
        """Store bytes as a blob; return its hex name."""
        if size <= wire.INLINE_BYTES_MAX:
            return self.request(wire.Put, *parts).text
        path = self.spool(parts)
        return self.request(lambda number: wire.Put(number, path)).text

    def define(self, function: Callable[..., Any]) -> tuple[int, tuple[str, ...]]:
        """Send a function unless the same bytes were sent before: its number, and the blobs it needs."""
        data = serialize.dump_function(function)
        refs: tuple[str, ...] = ()
        name = function_name(function)
        if len(data) > CAPTURED_BYTES_WARN:
            warnings.warn(
                f"{name} captures {len(data) / 1e6:.0f} MB that travel with it to every worker: "
                "pass large data through grid.put(...) and give the function the Ref as an argument",
                stacklevel=5,
            )
        if len(data) > wire.INLINE_BYTES_MAX:
            from grid.api.refs import StoredFunction

            refs = (self.put([data], len(data)),)
            data = serialize.dump_function(StoredFunction(refs[0], len(data)))
        with self._lock:
            known = self._functions.get(data)
            if known is not None:
                return known[0], refs
            number = self._function_count
            self._function_count += 1
            if len(self._functions) < FUNCTIONS_MAX:
                self._functions[data] = (number, name)
        self.send(wire.Define(number, name), data)
        return number, refs

    # ---- stages ------------------------------------------------------------------------------------------------------

    def open_stage(self, stage: Stage, fn: int, name: str, ordered: bool, options: wire.Options, kind: int = 0) -> int:
        """Number a new stage and declare it."""
        with self._lock:
            if self.error is not None:
                raise self.error
            number = self._stage_count
            self._stage_count += 1
            self._stages[number] = stage
            if self.task != self._occurrence_task:
                self._occurrence_task, self._occurrence = self.task, 0
            occurrence = self._occurrence
            self._occurrence += 1
            self.nested = self.worker
        parent_stage, parent_index, _ = self.task
        self.send(wire.Stage(number, fn, name, ordered, options, parent_stage, parent_index, occurrence, kind))
        return number

    def recorded_cuts(self, name: str, ordered: bool) -> Cuts | None:
        """Where the map that opens now was cut the last time."""
        if not self.setup.replay:
            return None
        with self._lock:
            if self._record is None:
                self._record = Record(self.setup.replay)
            return self._record.take(name, ordered, *self.task[:2])

    def close_stage(self, stage: Stage) -> None:
        """Forget a stage of which nothing more will be heard."""
        with self._lock:
            self._stages.pop(stage.number, None)
            self._feeding.pop(stage, None)

    def remember(self, stage: Stage) -> None:
        """A stage is over, tasks of it failed, and nobody has begun to read it: `finish` tells, if that stays so."""
        with self._lock:
            if len(self._unread) < UNREAD_MAX:
                self._unread.append(stage)

    def stages(self) -> list[Stage]:
        """The stages that are not over."""
        with self._lock:
            return list(self._stages.values())

    def flush_soon(self, stage: Stage) -> None:
        """Flush this stage within FLUSH_S or so, in the flusher's thread. Safe in a finaliser once the flusher runs."""
        self._bursts[stage] = None
        if not self._awake:
            self._awake = True
            self._wake.put(None)
            self.start_flusher()

    def flush_often(self, stage: Stage, on: bool) -> None:
        """Flush this stage every TICK_S while its generator is being read."""
        with self._lock:
            if on:
                self._feeding[stage] = None
            else:
                self._feeding.pop(stage, None)
        if on:
            self.flush_soon(stage)

    def start_flusher(self) -> None:
        """Have the flusher's thread run."""
        if self._flusher is None:
            with self._lock:
                if self._flusher is None:
                    self._flusher = threading.Thread(target=self._flush, name="grid-flusher", daemon=True)
                    self._flusher.start()

    def _flush(self) -> None:
        while True:
            self._wake.get()
            if self.error is not None:
                return
            time.sleep(TICK_S if self._feeding else FLUSH_S)
            self._awake = False
            stages = list(self._bursts)
            for stage in stages:
                self._bursts.pop(stage, None)
            with self._lock:
                stages += self._feeding
            with contextlib.suppress(GridError):
                for stage in stages:
                    stage.flush()
            if self._feeding and not self._awake:
                self._awake = True
                self._wake.put(None)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for all stages, as at a script's end; what nobody reads is dropped. Errors nobody saw go to stderr."""
        with self._lock:
            stages, self._unread = [*self._unread, *self._stages.values()], []
        for stage in stages:
            stage.finish()

    def cancel_all(self, reason: str) -> None:
        """Give up all stages, as when the script failed."""
        for stage in self.stages():
            with contextlib.suppress(GridError):
                stage.cancel(reason)

    def finish_task(self, failed: bool) -> None:
        """The running task returned or raised: wait for the stages it left, or cancel them. Resets `nested`."""
        if failed:
            self.cancel_all("the task that made it failed")
        self.finish()
        self.nested = False

    def close(self) -> None:
        """Close the channel."""
        self.closing = True
        self.channel.close()
        early, self.early = self.early, None
        if early is not None:
            early.close()


def function_name(function: Callable[..., Any]) -> str:
    """What people call this callable."""
    inner = function
    while not hasattr(inner, "__qualname__") and hasattr(inner, "func"):
        inner = inner.func
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return str(name).replace("<locals>.", "")


_current: Session | None = None
_starting = threading.RLock()


def attach(
    channel: Channel,
    setup: wire.Setup,
    on_other: Callable[[Any, Any], None] | None = None,
    make: Callable[..., Session] = Session,
) -> Session:
    """Make this process's session: its first frame was `setup`."""
    global _current
    _current = make(channel, setup, on_other)
    return _current


def detach() -> None:
    """Forget this process's session; the next call starts another."""
    global _current
    _current = None


def attached() -> Session | None:
    """This process's session, if it has one."""
    return _current


def current() -> Session:
    """This process's session; under plain `python job.py` the first call starts the embedded grid."""
    session = _current
    if session is not None and session.error is None:
        return session
    if session is not None and session.pid != os.getpid():
        raise GridError("this process was forked from one that uses the grid: call the grid from the first one")
    if session is not None and session.error is not None and not session.closing:
        raise session.error
    with _starting:
        if _current is not None and _current.error is None:
            return _current
        from grid.api.connect import start_embedded

        return start_embedded()


def _forked() -> None:
    if _current is not None:
        _current.error = GridError("this process was forked from one that uses the grid: call the grid from the first one")


os.register_at_fork(after_in_child=_forked)
