"""The stage of one call of map: what `grid.api.feed` adds to, and the generator that its caller reads.

Rules this file keeps: what arrives stays bytes until it is read; a generator that was never begun may be dropped, one that
was begun and is closed cancels the rest, wherever the garbage collector closes it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grid.api import serialize, wire
from grid.api.errors import GridError
from grid.api.replay import Cuts
from grid.api.session import FLUSH_S, Session
from grid.api.stages import SEGMENT_BYTES, Stage, exception_of, open_results

SEGMENT_TASKS_MAX = 16_384
"""Tasks in a segment whose arguments take almost no bytes."""
STALL_S = 0.1
"""A replayed segment whose rest the input doesn't give within this time is cut where it is: somebody may wait for its results."""
PAGE_BYTES = 512 << 10
"""A page of small segments is sent when it has grown to this, well under wire.INLINE_BYTES_MAX."""


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
        self._cuts = session.recorded_cuts(name, ordered)
        self._seen = (-1, 0.0)
        """Replay: how many tasks there were at a look, and when their number had last changed."""
        session.start_flusher()

    # ---- feeding -----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the item just added ended a segment."""
        return not self._writer.count

    def add(self, item: Any) -> None:
        """Freeze and add one item; a full segment is cut, and sent when it is time. Raises what pickling raised."""
        with self._lock:
            if self._cuts is not None:
                self._add_recorded(item, self._cuts)
                return
            writer = self._writer
            writer.add(item)
            self.sent += 1
            if writer.size >= SEGMENT_BYTES or writer.count >= SEGMENT_TASKS_MAX:
                self._cut()
                self.send_soon()

    def _add_recorded(self, item: Any, cuts: Cuts) -> None:
        """Add an item and cut where it was cut, or before a segment that differs has no end or keeps the caller's memory."""
        writer = self._writer
        before = writer.size
        writer.add(item)
        self.sent += 1
        if writer.count >= cuts.left or writer.size >= min(2 * SEGMENT_BYTES, before + SEGMENT_BYTES):
            self._cut()
            self.send_soon()

    @property
    def recorded(self) -> int:
        """Tasks that the segment at hand lacks to be what it was the last time; 0: nothing is known of that."""
        cuts = self._cuts
        return 0 if cuts is None else max(0, cuts.left - self._writer.count)

    @property
    def gathered(self) -> int:
        """Tasks of the segment at hand."""
        return self._writer.count

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
            left = len(self.run)
            while left and not self.over:
                writer = self._writer
                lacking = self.recorded
                values = self.run[: min(left, lacking or left)]
                count = len(values)
                left -= count
                if not writer.count and count == (lacking or SEGMENT_TASKS_MAX // 2):
                    writer.add_batch(values)
                else:
                    writer.add_scalars(values)
                del self.run[:count]
                self.sent += count
                full = writer.size >= SEGMENT_BYTES or writer.count >= SEGMENT_TASKS_MAX // 2
                if count == lacking or (full and not lacking):
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
                self._send_page(cut=False)

    # ---- what arrives ------------------------------------------------------------------------------------------------

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str, skip: int = 0) -> None:
        size = len(body)
        if path:
            with contextlib.suppress(OSError):
                size = os.stat(path).st_size
        self._arrive(lo, hi, (hi - lo, body, path, size, skip), size)

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
                count, body, path, _, skip = event
                values = serialize.load_results(open_results(body, path), skip, skip + count)
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
        """Wait for the next (count, body, path, size, skip) or exception; None at the end."""
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
        if self._cuts is None:
            super().flush()
        elif self._writer.count or self._segments:
            self._flush_recorded()

    def _flush_recorded(self) -> None:
        """Replay: send the segments that are what they were; the one at hand only if the input gives no more of it."""
        with self._lock:
            if self.held or self.over or self.total is not None:
                return
            now, (seen, since) = time.monotonic(), self._seen
            if seen != self.sent:
                self._seen = self.sent, now
            stalled = seen == self.sent and now - since > STALL_S
            if self._segments or stalled:
                self._send_page(cut=stalled)
            wait = bool(self._writer.count)
        if wait:
            self.session.flush_soon(self)

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
