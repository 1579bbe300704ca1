"""A stage of calls that are submitted one by one.

Rules this file keeps: the first call of a burst leaves at once from the calling thread, later ones in company; a call's
arguments are frozen before `submit` returns; futures are settled outside the stage's lock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from grid.api import serialize, wire
from grid.api.errors import GridError
from grid.api.futures import GridFuture
from grid.api.session import FLUSH_S, Session
from grid.api.stages import SEGMENT_BYTES, Stage, exception_of, open_results

PENDING_BYTES_MAX = 64 << 20
"""Submitted calls kept back while the peer says hold; more make `submit` wait."""


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

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str, skip: int = 0) -> None:
        futures = [self._futures.pop(index, None) for index in range(lo, hi)]
        data = open_results(body, path)
        self._give_credit(len(data))
        if any(futures):
            try:
                values = serialize.load_results(data, skip, skip + len(futures))
            except Exception:
                self._settle_singly(futures, data, skip)
            else:
                for future, value in zip(futures, values, strict=True):
                    if future is not None:
                        future.settle(value)
        if not self._futures:
            self._notify_idle()

    def on_early(self, index: int, body: bytes) -> None:
        if len(self._futures) != 1 or index not in self._futures:
            return
        try:
            value = serialize.load_results(body, 0, 1)[0]
        except Exception:  # the peer's frame will say it again
            return
        future = self._futures.pop(index, None)
        if future is not None:
            future.settle(value)
        if not self._futures:
            self._notify_idle()

    def _settle_singly(self, futures: list[GridFuture | None], data: serialize.Buffer, skip: int) -> None:
        """One of these results can't be loaded here: only its own future may suffer."""
        for offset, future in enumerate(futures, start=skip):
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
