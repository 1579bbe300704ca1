"""What all stages share: how calls become segments and pages, credit, and what failures look like to the caller.

Rules this file keeps:

- pages of a stage are consecutive and sent under its lock, cut at SEGMENT_BYTES or one item; a map that is replayed is cut
  where it was cut before, for as long as that is on record;
- the first task of a stage leaves at once, later ones in company, none later than session.TICK_S;
- iterators and callbacks never run under a stage's lock; a map's items are pickled under it, it is reentrant;
- what arrived is kept as bytes until it is read; the peer gets credit when it is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable
from threading import Condition, RLock
from typing import Any

from grid.api import serialize, wire
from grid.api.errors import BY_KIND, GridError, RemoteTraceback, TaskError
from grid.api.replay import Cuts
from grid.api.session import Session

SEGMENT_BYTES = 64 << 10
"""A segment is the least that a thief fetches."""
CREDIT_BYTES = 128 << 10
"""Read bytes are reported once they are this many; a peer's window is several times as large."""


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
        self._cuts: Cuts | None = None
        """Where to cut, while that is on record."""
        self.number = session.open_stage(self, fn, name, ordered, options, kind)

    @property
    def idle(self) -> bool:
        """Whether nothing of it is under way."""
        return False

    def on_early(self, index: int, body: bytes) -> None:
        """A worker says what the peer will say, too: task `index` is done."""

    # ---- sending (under the lock) ------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Close the segment being written."""
        writer = self._writer
        if writer.count:
            parts, length = writer.finish()
            self._segments.append((parts, length, writer.count, writer.refs))
            self._segment_bytes += length
            self._writer = serialize.SegmentWriter(self._kind, self._table)
            if self._cuts is not None:
                self._cuts.cut(writer.count)
                if not self._cuts.left:
                    self._cuts = None

    def _send_page(self, final: bool = False, cut: bool = True) -> None:
        """Send the segments there are as one page; `final` closes the stage with it. `cut`: what is gathered, too."""
        if cut or self._cuts is None:
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
            self.session.expect(parts, size)
            path = self.session.share(parts, size)
            shared = bool(path)
            path = path or self.session.spool(parts)
            self.session.send(wire.Page(self.number, first, counts, lengths, refs, path, final, shared))
        else:
            self.session.send(wire.Page(self.number, first, counts, lengths, refs, "", final), *parts)

    def flush(self) -> None:
        """Send what waits, unless the peer says hold."""
        if self._writer.count or self._segments:
            with self._lock:
                if not self.held and not self.over and self.total is None:
                    self._send_page()

    # ---- what arrives ------------------------------------------------------------------------------------------------

    def on_result(self, lo: int, hi: int, body: bytes | bytearray, path: str, skip: int = 0) -> None:
        """Tasks [lo, hi) are done: values [skip, skip + hi - lo) of the segment."""
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
