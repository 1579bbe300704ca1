"""Who reads a session's channel, and how threads wait for what comes over it.

Rules this file keeps:

- one thread reads at a time: who holds `lock`. Two readers could each take the frame that the other one waits for;
- a worker has no reader's thread until it needs one: its main thread, which runs the tasks, reads while it waits. The first
  wait in another thread, or the first callback on a future, starts a reader for good;
- a driver's reader stands back when what it read was all that the one waiting thread wanted: a script that goes on from result to
  result then reads its own frames, which spares each of them a switch between threads. It steps in again when nobody has read
  for LEND_S, or as soon as others wait;
- an interrupt (SIGINT's KeyboardInterrupt) comes before or behind a frame, never within; where other handlers might raise, the
  main thread leaves reading to the reader.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions take long: they make enumerations of all
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from grid.api import wire
from grid.api.channel import Channel, ChannelClosed

if TYPE_CHECKING:
    from grid.api.session import Session

PUMP_STEP_S = 0.05
"""How late who pumps may notice that another thread took over reading; between tasks, when nothing waits, IDLE_STEP_S."""
IDLE_STEP_S = 1.0
LEND_S = 0.005
"""How long frames may lie unread after the last wait that read them, until the reader's thread sees to them."""
_MAY_RAISE = (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals whose handlers, where a script set any, may raise in the midst of a frame."""

Ready = Callable[[], object]


class Reading:
    """One session's. `take` is given each frame."""

    def __init__(self, session: Session, channel: Channel, take: Callable[[Any, Any], None]) -> None:
        self.lock = threading.RLock()
        self.thread: threading.Thread | None = None
        self._session = session
        self._channel = channel
        self._take = take
        self._main = threading.main_thread()
        self._starting = threading.Lock()
        self._waits = 0  # of the main thread, one within the other
        self._waiting: dict[int, Ready] = {}  # threads that wait and don't read, and for what
        self._lent = False
        self._parked = False  # the reader's thread waits until whoever reads now has done so
        self._call = threading.Event()  # for it
        self._left_s = 0.0
        self._open = False  # whoever borrows is between two frames: an interrupt may come
        self._interrupted = False

    # ---- the reader's thread ----

    def start(self) -> None:
        """Read the channel in a thread of its own from now on."""
        with self._starting:
            if self.thread is None and self._session.error is None:
                self.thread = threading.Thread(target=self._read, name="grid-reader", daemon=True)
                self.thread.start()

    def _read(self) -> None:
        with self.lock:  # who pumps has seen us and leaves
            try:
                while True:
                    self._take(*self._channel.receive())
                    if len(self._waiting) == 1 and not self._session.worker and self._is_enough():
                        self._stand_back()
            except (ChannelClosed, wire.WireError) as error:
                self._session.lose(error)

    def _is_enough(self) -> bool:
        try:
            (ready,) = self._waiting.values()
        except (ValueError, RuntimeError):  # it is no longer alone, or gone
            return False
        return bool(ready())

    def _stand_back(self) -> None:
        """Let others read; return, with the lock, when it is this thread's turn again."""
        self._call.clear()
        self._lent = True
        self.lock.release()
        try:
            while True:
                called = self._call.wait(None if self._parked else LEND_S)
                self._call.clear()
                self._parked = False
                if self._waiting and called:
                    self.lock.acquire()
                    return
                if self.lock.acquire(blocking=False):
                    if time.monotonic() - self._left_s >= LEND_S:
                        return
                    self.lock.release()
                    continue
                self._parked = True
                if self.lock.acquire(blocking=False):  # it was left meanwhile: nobody may have seen that we are parked
                    self._parked = False
                    self.lock.release()
        finally:
            self._lent = False

    # ---- waiting ----

    def wait(self, condition: threading.Condition, ready: Ready, timeout_s: float | None, for_peer: bool = False) -> bool:
        """Block until `ready()`, checked under `condition`, at most `timeout_s` seconds; return whether it is.

        In a worker's main thread the task's slot is given up meanwhile, unless the wait is for the peer alone (`for_peer`): other
        workers in its place would soon wait for the same.
        """
        with condition:
            if ready():
                return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._session.worker:
            if threading.current_thread() is self._main:
                with contextlib.nullcontext() if for_peer else self.blocking():
                    return self.pump(ready, deadline, PUMP_STEP_S) or self._wait(condition, ready, deadline)
            self.start()
        elif self._lent and self._borrow(ready, deadline):
            return True
        return self._wait(condition, ready, deadline)

    def _wait(self, condition: threading.Condition, ready: Ready, deadline: float | None) -> bool:
        key = threading.get_ident()
        self._waiting[key] = ready
        try:
            with condition:
                return bool(condition.wait_for(ready, None if deadline is None else deadline - time.monotonic()))
        finally:
            self._waiting.pop(key, None)

    def pump(self, until: Ready, deadline: float | None = None, step_s: float = IDLE_STEP_S) -> bool:
        """Read in this thread until `until()`; False at the deadline or when a reader took over, noticed after `step_s`."""
        if self.thread is not None:
            return bool(until())
        with self.lock:
            while not until():
                if self.thread is not None or self._session.error is not None:
                    return bool(until())
                left_s = step_s if deadline is None else deadline - time.monotonic()
                if not self._channel.ready(min(step_s, max(0.0, left_s))):
                    if left_s <= 0:
                        return bool(until())
                    continue
                if not self._take_one():
                    return bool(until())
            return True

    def _take_one(self) -> bool:
        """False: the channel is lost."""
        try:
            self._take(*self._channel.receive())
        except (ChannelClosed, wire.WireError) as error:
            self._session.lose(error)
            return False
        return True

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """In a worker's main thread: the running task waits meanwhile, its slot is free. Elsewhere nothing."""
        session = self._session
        if not session.worker or threading.current_thread() is not self._main:
            yield
            return
        self._waits += 1
        if self._waits == 1:
            session.send(wire.Waiting(True))
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits and session.error is None:
                session.send(wire.Waiting(False))

    # ---- a driver's threads that read for themselves ----

    def _borrow(self, ready: Ready, deadline: float | None) -> bool:
        """Read while the reader stands back, until `ready()`. False: somebody else reads, may not here, or the time is up."""
        main = threading.current_thread() is self._main
        before = _signal.getsignal(signal.SIGINT) if main else None
        if main and (before is not signal.default_int_handler or any(map(callable, map(_signal.getsignal, _MAY_RAISE)))):
            return False
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if main:
                _signal.signal(signal.SIGINT, self._interrupt)
            found = self._read_until(ready, deadline)
        finally:
            self._open = False
            if main:
                _signal.signal(signal.SIGINT, before)
            self._left_s = time.monotonic()
            self.lock.release()
            if self._parked or self._waiting:
                self._call.set()
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt
        return found

    def _read_until(self, ready: Ready, deadline: float | None) -> bool:
        while not ready():
            left_s = PUMP_STEP_S if deadline is None else min(PUMP_STEP_S, deadline - time.monotonic())
            if left_s < 0 or self._interrupted or self._session.error is not None:
                return bool(ready())
            self._open = True
            there = self._channel.ready(left_s, self._session.early)
            self._open = False
            if there:
                self._take_one()
            else:
                self._session.take_early()
        return True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            signal.default_int_handler(number, frame)
        self._interrupted = True
