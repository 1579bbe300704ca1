"""Stages: how calls become segments and pages, and how results come back to who waits for them.

Rules this file keeps:

- pages of a stage are consecutive and sent under its lock, cut at SEGMENT_BYTES or one item;
- the first task of a stage leaves at once, later ones in company, none later than session.TICK_S;
- iterators and callbacks never run under a stage's lock; a map's items are pickled under it, it is reentrant;
- what arrived is kept as bytes until it is read; the peer gets credit when it is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Condition, RLock
from typing import Any

from grid.api import serialize, wire
from grid.api.errors import BY_KIND, GridError, RemoteTraceback, TaskError
from grid.api.futures import GridFuture
from grid.api.session import FLUSH_S, Session

SEGMENT_BYTES = 64 << 10
"""A segment is the least that a thief fetches."""
SEGMENT_TASKS_MAX = 16_384
"""Tasks in a segment whose arguments take almost no bytes."""
PAGE_BYTES = 512 << 10
"""A page of small segments is sent when it has grown to this, well under wire.INLINE_BYTES_MAX."""
CREDIT_BYTES = 128 << 10
"""Read bytes are reported once they are this many; a peer's window is several times as large."""
PENDING_BYTES_MAX = 64 << 20
"""Submitted calls kept back while the peer says hold; more make `submit` wait."""


def exception_of(failure: wire.Failure, body: bytes | bytearray) -> BaseException:
    """Return what a task's failure looks like to the caller: its own exception, or one of ours; with its traceback."""
    error = serialize.load_exception(body)
    if isinstance(error, Exception):
        pass
    elif failure.kind == "cancelled":
        return concurrent.futures.CancelledError(failure.message)
    else:
        text = failure.message
        if failure.kind == "raised":
            text = f"{failure.type_name}: {text}" if text else failure.type_name
        error = BY_KIND.get(failure.kind, TaskError)(text)
    if failure.traceback:
        error.__cause__ = RemoteTraceback(failure.traceback)
    return error


class Stage:
    """What both kinds share: sending pages, credit, the end. `total` is None while more calls may come."""

    def __init__(
        self, session: Session, function: Callable[..., Any], name: str, ordered: bool, options: wire.Options, kind: int
    ) -> None:
        fn, self._function_refs = session.define(function)
        self.session = session
        self.name = name
        self.sent = 0
        """Tasks added so far; those in pages sent are `_flushed`."""
        self.total: int | None = None
        self.held = False
        self.over = False
        self._kind = kind
        self._table = serialize.ClassTable()
        self._lock = RLock()
        self.changed = Condition(self._lock)
        self._writer = serialize.SegmentWriter(kind, self._table)
        self._segments: list[tuple[list[serialize.Buffer], int, int, tuple[str, ...]]] = []
        self._segment_bytes = 0
        self._flushed = 0
        self._flushed_at = 0.0
        self._settled = 0
        self._credit = 0
        self.number = session.open_stage(self, fn, name, ordered, options)

    # ---- sending (under the lock) ------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Close the segment being written."""
        writer = self._writer
        if writer.count:
            parts, length = writer.finish()
            self._segments.append((parts, length, writer.count, writer.refs))
            self._segment_bytes += length
            self._writer = serialize.SegmentWriter(self._kind, self._table)

    def _send_page(self, final: bool = False) -> None:
        """Send the segments there are as one page; `final` closes the stage with it."""
        self._cut()
        segments = self._segments
        if not segments:
            if final:
                self.total = self._flushed
                self.session.send(wire.Close(self.number, self.total))
            return
        self._segments = []
        size, self._segment_bytes = self._segment_bytes, 0
        parts = [part for segment in segments for part in segment[0]]
        counts = tuple(segment[2] for segment in segments)
        lengths = tuple(segment[1] for segment in segments)
        refs: tuple[tuple[str, ...], ...] = ()
        if self._function_refs or any(segment[3] for segment in segments):
            refs = tuple((*self._function_refs, *segment[3]) for segment in segments)
        first = self._flushed
        self._flushed += sum(counts)
        if final:
            self.total = self._flushed
        self._flushed_at = time.monotonic()
        if size > wire.INLINE_BYTES_MAX:
            path = self.session.spool(parts)
            self.session.send(wire.Page(self.number, first, counts, lengths, refs, path, final))
        else:
            self.session.send(wire.Page(self.number, first, counts, lengths, refs, "", final), *parts)

    def flush(self) -> None:
        """Send what waits, unless the peer says hold."""
        if self._writer.count or self._segments:
            with self._lock:
                if not self.held and not self.over and self.total is None:
                    self._send_page()

    # ---- what arrives ------------------------------------------------------------------------------------------------

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str) -> None:
        """Tasks [lo, hi) are done."""
        raise NotImplementedError

    def on_failure(self, failure: wire.Failure, body: bytes | bytearray) -> None:
        """A task failed for good."""
        raise NotImplementedError

    def on_cancelled(self, lo: int, hi: int) -> None:
        """Nothing more comes of these tasks."""
        raise NotImplementedError

    def on_throttle(self, hold: bool) -> None:
        """The peer wants no pages for now, or wants them again."""
        with self.changed:
            self.held = hold
            self.changed.notify_all()
        if not hold:
            self.session.flush_soon(self)

    def fail(self, error: GridError) -> None:
        """The grid is gone."""
        raise NotImplementedError

    def cancel(self, reason: str) -> None:
        """Nobody wants what is left of the stage."""
        raise NotImplementedError

    def finish(self) -> None:
        """No more calls come and nobody reads any more: wait until the stage is over."""
        raise NotImplementedError

    def _give_credit(self, size: int) -> None:
        with self._lock:
            self._credit += size
            if self._credit < CREDIT_BYTES or self.session.error is not None:
                return
            size, self._credit = self._credit, 0
        with contextlib.suppress(GridError):
            self.session.send(wire.Consumed(self.number, size))


def open_results(body: bytes | bytearray, path: str) -> bytes | bytearray | memoryview:
    """Return a result segment's bytes; a file's are mapped, and its name is given up."""
    if not path:
        return body
    data = serialize.map_file(path)
    with contextlib.suppress(OSError):
        os.unlink(path)
    return data


class SubmitStage(Stage):
    """Calls of one function that were submitted one by one."""

    def __init__(self, session: Session, function: Callable[..., Any], name: str, options: wire.Options) -> None:
        self._futures: dict[int, GridFuture] = {}
        super().__init__(session, function, name, False, options, serialize.CALL)
        self._first_at = 0.0
        session.start_flusher()

    @property
    def idle(self) -> bool:
        """Whether all its calls are done."""
        return not self._futures

    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GridFuture | None:
        """Freeze the arguments and send the call, soon; None: it is closed. Raises what pickling raised, GridError."""
        future = GridFuture(self)
        item = serialize.pickle_call(args, kwargs, self._table)
        large = False
        if type(item) is not bytes:
            assert isinstance(item, serialize.Pickled)
            large = item.size > wire.INLINE_BYTES_MAX
            if not large:
                item.freeze()
        if self.held and self._segment_bytes > PENDING_BYTES_MAX:
            self.session.wait(self.changed, lambda: not self.held or self.over)
        with self._lock:
            if self.session.error is not None:
                raise self.session.error
            if self.over or self.total is not None:
                return None
            if large and not self.held:
                self._send_page()
            future._index = index = self.sent
            self.sent = index + 1
            self._futures[index] = future
            writer = self._writer
            writer.add_pickled(item)
            if large and self.held:
                assert isinstance(item, serialize.Pickled)
                item.freeze()
            now = time.monotonic()
            if writer.count == 1:
                self._first_at = now
                due = large or len(self._futures) == 1 or now - self._flushed_at > FLUSH_S
            else:
                due = large or writer.size >= SEGMENT_BYTES or now - self._first_at > FLUSH_S
            if due:
                if self.held:
                    self._cut()
                else:
                    self._send_page()
                return future
            first = writer.count == 1
        if first:
            self.session.flush_soon(self)
        return future

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str) -> None:
        futures = [self._futures.pop(index, None) for index in range(lo, hi)]
        if any(futures):
            data = open_results(body, path)
            self._give_credit(len(data))
            try:
                values = serialize.load_results(data)
            except Exception:
                self._settle_singly(futures, data)
            else:
                for future, value in zip(futures, values, strict=True):
                    if future is not None:
                        future.settle(value)
        if not self._futures:
            self._notify_idle()

    def _settle_singly(self, futures: list[GridFuture | None], data: serialize.Buffer) -> None:
        """One of these results can't be loaded here: only its own future may suffer."""
        for offset, future in enumerate(futures):
            if future is not None:
                try:
                    value = serialize.load_results(data, offset, offset + 1)[0]
                except Exception as error:
                    future.settle(None, error)
                else:
                    future.settle(value)

    def _notify_idle(self) -> None:
        with self.changed:
            if self.total is not None and not self.over:
                self.over = True
                self.session.close_stage(self)
            self.changed.notify_all()

    def on_failure(self, failure: wire.Failure, body: bytes | bytearray) -> None:
        future = self._futures.pop(failure.index, None)
        if future is not None:
            future.settle(None, exception_of(failure, body))
        if not self._futures:
            self._notify_idle()

    def on_cancelled(self, lo: int, hi: int) -> None:
        indexes = (
            range(lo, hi)
            if 0 <= hi - lo <= len(self._futures)
            else [index for index in list(self._futures) if index >= lo and (hi < 0 or index < hi)]
        )
        for index in indexes:
            future = self._futures.pop(index, None)
            if future is not None:
                future.withdraw()
        self._notify_idle()

    def cancel_one(self, index: int) -> None:
        """Nobody wants this call any more."""
        if self._futures.pop(index, None) is None or self.session.error is not None:
            return
        with contextlib.suppress(GridError):
            self.flush()
            self.session.send(wire.Cancel(self.number, index, index + 1, "cancelled by the script"))
        if not self._futures:
            self._notify_idle()

    def fail(self, error: GridError) -> None:
        with self.changed:
            self.over = True
            futures = list(self._futures.values())
            self._futures.clear()
            self.changed.notify_all()
        for future in futures:
            future.settle(None, error)

    def cancel(self, reason: str) -> None:
        with self.changed:
            if self.over:
                return
            self.over = True
            futures = list(self._futures.values())
            self._futures.clear()
            self.changed.notify_all()
        self.session.close_stage(self)
        for future in futures:
            future.withdraw()
        self.session.send(wire.Cancel(self.number, 0, -1, reason))

    def close(self) -> None:
        """No more calls come; those under way go on."""
        with self._lock:
            if self.total is None and not self.over:
                self._send_page(final=True)
                if not self._futures:
                    self._notify_idle()

    def finish(self) -> None:
        if self.over:
            return
        self.flush()
        while self._writer.count or self._segments:  # held back
            self.session.wait(self.changed, lambda: not self.held or self.over)
            if self.over:
                return
            self.flush()
        self.session.wait(self.changed, lambda: not self._futures or self.over)
        self.close()


class MapStage(Stage):
    """One call of map: fed by `grid.api.feed`, read by the generator that `results` returns."""

    def __init__(
        self,
        session: Session,
        function: Callable[..., Any],
        name: str,
        ordered: bool,
        options: wire.Options,
        kind: int,
        return_exceptions: bool,
    ) -> None:
        self.input_error: BaseException | None = None
        """What the iterable raised, or pickling an item: raised after the results of the items before it."""
        self.ordered = ordered
        self.reading = False
        self.delivered = 0
        """Tasks whose results were read."""
        self.run: list[Any] = []
        """Numbers taken from the iterator; the feeder appends, `take_run` takes away."""
        self._return_exceptions = return_exceptions
        self._absorbing = False
        self._discarding = False
        self._unwanted = False
        self._failed = 0
        self._failed_unseen = False
        self._first_failure: BaseException | None = None
        self._arrived: deque[Any] = deque()
        self._waiting: dict[int, Any] = {}
        super().__init__(session, function, name, ordered, options, kind)
        session.start_flusher()

    # ---- feeding -----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the item just added ended a segment."""
        return not self._writer.count

    def add(self, item: Any) -> None:
        """Freeze and add one item; a full segment is cut, and sent when it is time. Raises what pickling raised."""
        with self._lock:
            writer = self._writer
            writer.add(item)
            self.sent += 1
            if writer.size >= SEGMENT_BYTES or writer.count >= SEGMENT_TASKS_MAX:
                self._cut()
                self.send_soon()

    def add_batch(self, items: Sequence[Any]) -> int:
        """Add a segment of items that can't change; return its bytes."""
        with self._lock:
            if self._writer.count:
                self._cut()
            self._writer.add_batch(items)
            self.sent += len(items)
            size = self._writer.size
            self._cut()
            self.send_soon()
        return size

    def take_run(self) -> None:
        """Pickle the numbers gathered in `run`."""
        with self._lock:
            count = len(self.run)
            if count and not self.over:
                writer = self._writer
                writer.add_batch(self.run[:count])
                del self.run[:count]
                self.sent += count
                if writer.size >= SEGMENT_BYTES or writer.count >= SEGMENT_TASKS_MAX // 2:
                    self._cut()

    def send_soon(self) -> None:
        """Send the page if it is large, late, or still shares memory with the caller's objects."""
        with self._lock:
            if self.over or not (self._segments or self._writer.count):
                return
            shared = bool(self._segments) and len(self._segments[-1][0]) > 1
            if self.held and not shared:
                return
            if shared or self._segment_bytes >= PAGE_BYTES or time.monotonic() - self._flushed_at > FLUSH_S:
                self._send_page()

    # ---- what arrives ------------------------------------------------------------------------------------------------

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str) -> None:
        size = len(body)
        if path:
            with contextlib.suppress(OSError):
                size = os.stat(path).st_size
        self._arrive(lo, hi, (hi - lo, body, path, size), size)

    def on_failure(self, failure: wire.Failure, body: bytes | bytearray) -> None:
        self._failed_unseen = True
        self._arrive(failure.index, failure.index + 1, exception_of(failure, body), 0)

    def _arrive(self, lo: int, hi: int, event: Any, size: int) -> None:
        with self.changed:
            if self._discarding or self.over:
                self._drop(event)
            elif not self.ordered:
                self._arrived.append(event)
            elif lo == self.delivered + self._queued:
                self._arrived.append(event)
                self._queued += hi - lo
                while self._waiting and (more := self._waiting.pop(self.delivered + self._queued, None)) is not None:
                    self._arrived.append(more)
                    self._queued += 1 if isinstance(more, BaseException) else more[0]
            else:
                self._waiting[lo] = event
            self._settled += hi - lo
            credit = self._absorbing or self._discarding
            self._check_over()
            self.changed.notify_all()
        if credit and size:
            self._give_credit(size)

    _queued = 0
    """Ordered: tasks in `_arrived`."""

    def _drop(self, event: Any) -> None:
        if isinstance(event, BaseException):
            self._failed += 1
            self._first_failure = self._first_failure or event
        elif event[2]:
            with contextlib.suppress(OSError):
                os.unlink(event[2])

    def _check_over(self) -> None:
        if self.total is not None and self._settled >= self.total and not self.over:
            self.over = True
            self.session.close_stage(self)
            if self._failed_unseen and not self.reading:
                self.session.remember(self)

    def on_cancelled(self, lo: int, hi: int) -> None:
        with self.changed:
            if hi < 0 or self.total is None or hi >= self.total or hi - lo > 1:
                self._end(concurrent.futures.CancelledError(f"{self.name} was cancelled"))
            else:
                self._arrive(lo, hi, concurrent.futures.CancelledError(f"{self.name} was cancelled"), 0)

    def fail(self, error: GridError) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self.changed:
            if not self.over:
                self.over = True
                if error is not None and self.input_error is None:
                    self.input_error = error
            self.changed.notify_all()
        self.session.close_stage(self)

    def closed(self, error: BaseException | None) -> None:
        """The input has ended; `error`: because it raised."""
        with self.changed:
            if self.over:
                return
            self.take_run()
            self.input_error = error
            self._send_page(final=True)
            self._check_over()
            self.changed.notify_all()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def results(self, deadline: float | None = None) -> Iterator[Any]:
        """The generator that the caller reads. `deadline` (monotonic): TimeoutError when a result isn't there by then."""
        self.reading = True
        try:
            while True:
                event = self._take(deadline)
                if event is None:
                    break
                if isinstance(event, BaseException):
                    if not self._return_exceptions:
                        raise event
                    yield event
                    continue
                _, body, path, _ = event
                values = serialize.load_results(open_results(body, path))
                del event, body
                yield from values
                del values
            if self.input_error is not None:
                raise self.input_error
        except GeneratorExit:
            # Perhaps the garbage collector's doing, in the middle of anything: leave it to the flusher.
            self._unwanted = True
            self.session.flush_soon(self)
            raise
        except BaseException:
            self.cancel("an error was raised and the rest is not wanted")
            raise

    def _take(self, deadline: float | None) -> Any:
        """Wait for the next (count, body, path, size) or exception; None at the end."""
        arrived = self._arrived
        if not arrived:
            if deadline is None:
                self.session.wait(self.changed, lambda: arrived or self.over)
            elif not self.session.wait(self.changed, lambda: arrived or self.over, deadline - time.monotonic()):
                raise TimeoutError(f"no result of {self.name} in time")
        with self.changed:
            if not arrived:
                return None
            event = arrived.popleft()
            count = 1 if isinstance(event, BaseException) else event[0]
            self.delivered += count
            if self.ordered:
                self._queued -= count
            self.changed.notify_all()
        if not isinstance(event, BaseException) and not self._absorbing:
            self._give_credit(event[3])
        return event

    # ---- the end -----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self._unwanted and not self.over:
            self.cancel("its results are not wanted any more")
            return
        if self.run:
            self.take_run()
        super().flush()

    def cancel(self, reason: str) -> None:
        with self.changed:
            if self.over:
                return
            self._end(concurrent.futures.CancelledError(f"{self.name} was cancelled: {reason}"))
            while self._arrived:
                self._drop(self._arrived.popleft())
            for event in self._waiting.values():
                self._drop(event)
            self._waiting.clear()
        with contextlib.suppress(GridError):
            self.session.send(wire.Cancel(self.number, 0, -1, reason))

    def absorb(self) -> None:
        """Wait until the stage is over, keeping what arrives for a later reader."""
        with self.changed:
            self._absorbing = True
            size = sum(event[3] for event in self._arrived if not isinstance(event, BaseException))
        self._give_credit(size)
        self.session.wait(self.changed, lambda: self.over)

    def finish(self) -> None:
        if self.reading:
            self.cancel("the script ended before it read all results")
            return
        size = 0
        with self.changed:
            self._discarding = True
            for event in [*self._arrived, *self._waiting.values()]:
                size += 0 if isinstance(event, BaseException) else event[3]
                self._drop(event)
            self._arrived.clear()
            self._waiting.clear()
        self._give_credit(size)
        self.session.wait(self.changed, lambda: self.over)
        if self._failed or self.input_error is not None:
            self._tell()

    def _tell(self) -> None:
        """Say on stderr what failed unseen."""
        import sys

        error = self._first_failure or self.input_error
        what = f"{self._failed} tasks of {self.name}" if self._failed else f"the input of {self.name}"
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"grid: {what} failed and nobody read the results; the first error: {first}", file=sys.stderr)
