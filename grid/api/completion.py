"""concurrent.futures' `as_completed` and `wait` for a driver: they tell of futures in the order of their completion.

The standard ones give those that are done already in the order of their addresses, and as many as happen to be done by now.
A driver that is replayed gets recorded results in the recorded order, but sooner: what it makes of them must not depend on
how soon. So `as_completed` begins with those done first, and `wait` until the first is done returns that one alone.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import _base as _standard
from typing import Any

from grid.api.futures import GridFuture

_base: Any = _standard  # what as_completed is made of has no public name

WINDOW_MAX = 1024
"""Futures from which on `wait` returns all that are done: one by one it would take quadratic time."""

_standard_wait = concurrent.futures.wait
_standard_as_completed = concurrent.futures.as_completed


def install() -> None:
    """Put them in the standard ones' place."""
    for module in (concurrent.futures, _base):
        for function in (wait, as_completed):
            setattr(module, function.__name__, function)


def _settled(future: Any) -> int:
    number: int = future.settled
    return number


def wait(fs: Iterable[Any], timeout: float | None = None, return_when: str = concurrent.futures.ALL_COMPLETED) -> Any:
    """As concurrent.futures.wait; FIRST_COMPLETED returns the one future of the grid that was done first."""
    futures = set(fs)
    result = _standard_wait(futures, timeout, return_when)
    if (
        return_when == concurrent.futures.FIRST_COMPLETED
        and len(result.done) > 1
        and len(futures) <= WINDOW_MAX
        and all(type(future) is GridFuture for future in futures)
    ):
        first = min(result.done, key=_settled)
        return type(result)({first}, futures - {first})
    return result


def as_completed(fs: Iterable[Any], timeout: float | None = None) -> Iterator[Any]:
    """As concurrent.futures.as_completed; the grid's futures always in the order of their completion."""
    futures = set(fs)
    if not all(type(future) is GridFuture for future in futures):
        return _standard_as_completed(futures, timeout)
    return _as_completed(futures, timeout)


def _as_completed(futures: set[Any], timeout: float | None) -> Iterator[Any]:
    deadline = None if timeout is None else time.monotonic() + timeout
    total = len(futures)
    with _base._AcquireFutures(futures):
        finished = sorted((future for future in futures if future.done()), key=_settled)
        waiter = _base._create_and_install_waiters(futures, _base._AS_COMPLETED)
    try:
        while True:
            finished.reverse()
            while finished:  # nothing here may keep alive what was yielded
                futures.remove(finished[-1])
                with finished[-1]._condition:
                    finished[-1]._waiters.remove(waiter)
                yield finished.pop()
            if not futures:
                return
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                raise TimeoutError(f"{len(futures)} (of {total}) futures unfinished")
            waiter.event.wait(left)
            with waiter.lock:
                finished, waiter.finished_futures = waiter.finished_futures, []
                waiter.event.clear()
    finally:
        for future in futures:
            with future._condition:
                future._waiters.remove(waiter)
