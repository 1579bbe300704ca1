"""Futures of submitted calls: concurrent.futures' own, that know how to hurry their call along and how to cancel it.

In a worker's main thread waiting on one reads the channel, by whatever way the caller waits: `result`,
`concurrent.futures.wait`, `as_completed`.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grid.api.session import Session
    from grid.api.submit_stage import SubmitStage


_settled = itertools.count()


class GridFuture(concurrent.futures.Future[Any]):
    """The future of task `index` of a stage. It is pending until it is done: where it runs is not told."""

    def __init__(self, stage: SubmitStage) -> None:
        super().__init__()
        self._stage = stage
        self._index = -1
        self.settled = -1
        """Its place among those of the session that are settled; -1: not yet."""
        if stage.session.worker:
            self._waiters = _Waiters(stage)

    def __hash__(self) -> int:
        return hash((self._stage.number, self._index))  # not its address: sets of futures are in the same order in every run

    def __eq__(self, other: object) -> bool:
        return self is other

    def result(self, timeout: float | None = None) -> Any:
        """As concurrent.futures.Future.result."""
        return super().result(self._hurry(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As concurrent.futures.Future.exception."""
        return super().exception(self._hurry(timeout))

    def _hurry(self, timeout_s: float | None) -> float:
        """Send the call, wait. Returns how long to wait after that: no longer."""
        if not self.done():
            self._stage.flush()
            self._stage.session.wait(self._condition, self.done, timeout_s)
        return 0

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        """As concurrent.futures.Future.add_done_callback."""
        if self._stage.session.worker and not self.done():
            self._stage.session.start_reader()
        super().add_done_callback(fn)

    def cancel(self) -> bool:
        """Cancel the call, also when it runs already; False if it is done."""
        if not self.withdraw():
            return False
        self._stage.cancel_one(self._index)
        return True

    def withdraw(self) -> bool:
        """Become cancelled without telling the grid; False if done."""
        with self._condition:
            first = not self.cancelled()
            if not super().cancel():
                return False
            if first:
                self.settled = next(_settled)
                self.set_running_or_notify_cancel()
        return True

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Give the result or the error, unless it was cancelled meanwhile."""
        if self.settled < 0:
            self.settled = next(_settled)
        try:
            if error is None:
                self.set_result(value)
            else:
                self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass


class _Waiters(list[Any]):
    """A future's list of waiters (see concurrent.futures._base), each made to wait as a worker must."""

    def __init__(self, stage: SubmitStage) -> None:
        super().__init__()
        self._stage = stage

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._stage.flush()
        if type(getattr(waiter, "event", None)) is threading.Event and not waiter.event.is_set():
            waiter.event = _PumpedEvent(self._stage.session)


class _PumpedEvent(threading.Event):
    """An event whose waiter reads the channel meanwhile."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def wait(self, timeout: float | None = None) -> bool:
        return self._session.wait(self._cond, self.is_set, timeout)  # type: ignore[attr-defined]
