"""What a worker reports: results gathered into segments (Done), failures one by one (Failed).

Results of a Run leave in index order and cover it exactly once; the frame that reaches its end is `final`. A result waits
for company until FLUSH_S have passed or FLUSH_BYTES gathered. The worker's clock thread flushes too, so that a task that takes
long doesn't hold back its predecessors' results: `tiny` is appended to without the lock, all else is done under it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import traceback
import types
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from grid.api import serialize, wire
from grid.api.errors import GridError
from grid.api.session import Session
from grid.worker.prints import Prints

FLUSH_NS: Final = 50_000_000
"""Results are reported at least this often."""
GIVE_BACK_NS: Final = 250_000_000
"""A Run that takes so long, several times what bundles are made for, was expected to be shorter: what is not begun goes back,
for whoever is free."""
FLUSH_BYTES: Final = 48 << 10
"""And when they are this large: with what a last small one adds, still under the 64 KiB that travel inside messages.
Also so low that no result with an out-of-band buffer, which would still be the task's memory, is held back."""
INLINE_BYTES_MAX: Final = 128 << 10
"""A larger segment is a file, which the peer hands on by its name. Through the channel each byte would be copied twice more, by
the one process that all results pass, and a segment larger than a socket's buffer wakes both ends several times."""
TINY_MAX: Final = 1 << 14
"""Scalars in one segment (at most 9 bytes each, but for huge integers)."""
TEXT_MAX: Final = 64 << 10
"""Characters of a traceback or message."""
TINY: Final = frozenset({int, float, bool, type(None)})
"""Results that take next to no room and can't change: gathered without a look."""
assert FLUSH_BYTES <= serialize.OUT_OF_BAND_BYTES
assert FLUSH_BYTES < INLINE_BYTES_MAX <= wire.INLINE_BYTES_MAX

_LAZY = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_OWN_CODE = str(Path(__file__).parents[1])


class Reporter:
    """The answers to one worker's Runs."""

    def __init__(self, session: Session, prints: Prints, early: socket.socket | None = None) -> None:
        self.tiny: list[Any] = []
        """Append results of TINY types here; `keep` others."""
        self.flush_at_ns = 0
        """When the next flush is due."""
        self._session = session
        self._prints = prints
        self._early = early
        self._lock = threading.RLock()
        self._run = wire.Run(-1, -1, -1, 0, 0, 0)
        self._lo = 0
        self._hi = 0
        self._begun = 0
        self._began_ns = 0
        self._since_ns = 0
        self._writer = serialize.ResultWriter()

    def begin(self, run: wire.Run) -> None:
        """The next results are this Run's, from its first task on."""
        with self._lock:
            self._run = run
            self._lo = self._begun = run.lo
            self._hi = run.hi
            self._began_ns = self._since_ns = time.monotonic_ns()
            self.flush_at_ns = self._since_ns + FLUSH_NS

    def take(self, count: int) -> int:
        """So many tasks more are begun, or as many as are left."""
        with self._lock:
            count = min(count, self._hi - self._begun)
            self._begun += count
            return count

    @property
    def last(self) -> int:
        """The last task begun."""
        return self._begun - 1

    def give_back(self) -> None:
        """Called by the clock: return what is not begun of a Run that takes too long."""
        with self._lock:
            now_ns = time.monotonic_ns()
            if self._run.lo < self._begun < self._hi and now_ns - self._began_ns > GIVE_BACK_NS:
                self._hi = self._begun
                returned = wire.Returned(self._run.ticket, self._hi, (now_ns - self._since_ns) // 1000)
                self._session.channel.send(returned)

    def keep(self, index: int, value: Any) -> None:
        """Add the result of task `index`; if it can't be sent, report that instead."""
        with self._lock:
            if self.tiny:
                self._gather()
            setup, stage = self._session.setup, self._run.stage
            serialize.set_namespace(f"{setup.job}/{stage}/{index}")
            try:
                self._writer.add(value)
            except BaseException as error:
                if isinstance(value, _LAZY):
                    self.fail(index, error, None)
                    with contextlib.suppress(BaseException):
                        value.close()  # type: ignore[union-attr]
                elif isinstance(error, MemoryError):
                    self.fail(index, error, None)
                else:
                    text = f"the task's result, of type {_type_name(value)}, can't be sent: {error}"
                    self._fail(index, "unpicklable", type(error).__name__, text, "")
                return
            if self._writer.size >= FLUSH_BYTES:
                self.flush()

    def flush(self, now_ns: int = 0) -> None:
        """Report the results gathered so far."""
        with self._lock:
            self._prints.flush()
            if self.tiny:
                self._gather()
            count = self._writer.count
            now_ns = now_ns or time.monotonic_ns()
            self.flush_at_ns = now_ns + FLUSH_NS
            if not count:
                return
            lo, self._lo = self._lo, self._lo + count
            writer, self._writer = self._writer, serialize.ResultWriter()
            elapsed_us = (now_ns - self._since_ns) // 1000
            self._since_ns = now_ns
            parts, size = writer.finish()
            path = ""
            if size > INLINE_BYTES_MAX:
                try:
                    path, parts = self._session.spool(parts), []
                except GridError as error:
                    for index in range(lo, lo + count):
                        self._send_failure(index, "failed", "GridError", str(error), "", b"", elapsed_us // count)
                    return
            run, final = self._run, lo + count == self._hi
            early = run.early >= 0 and final and size <= wire.EARLY_BYTES_MAX and now_ns - run.given_ns < wire.EARLY_NS
            self._session.channel.send(wire.Done(run.ticket, lo, lo + count, elapsed_us, final, path, early), *parts)
            if early:
                self._send_early(run, parts)

    def _send_early(self, run: wire.Run, parts: list[serialize.Buffer]) -> None:
        """The peer has the result; the driver, which waits for nothing else, need not wait for it. If this fails, it does."""
        if self._early is not None:
            with contextlib.suppress(OSError):
                self._early.send(b"".join((wire.EARLY.pack(run.early, run.lo), *parts)), socket.MSG_DONTWAIT)

    def flush_stale(self) -> None:
        """Called by the clock: report what waits although its time has come."""
        if time.monotonic_ns() >= self.flush_at_ns:
            self.flush()

    def fail(self, index: int, error: BaseException, trace: TracebackType | None) -> None:
        """Report that task `index` raised."""
        if isinstance(error, SystemExit):
            code = "" if error.code is None else repr(error.code)
            self._fail(index, "raised", "SystemExit", f"called sys.exit({code})", _format(error, trace))
        elif isinstance(error, KeyboardInterrupt):
            self._fail(index, "raised", "KeyboardInterrupt", "interrupted by SIGINT", _format(error, trace))
        else:
            body = serialize.dump_exception(error)
            self._fail(index, "raised", type(error).__qualname__, _message(error), _format(error, trace), body)

    def fail_all(self, kind: str, error: BaseException, message: str) -> None:
        """Report that no task of the Run can be run."""
        text = _format(error, error.__traceback__)
        body = serialize.dump_exception(error) if kind == "raised" else b""
        for index in range(self._run.lo, self._run.hi):
            self._fail(index, kind, type(error).__qualname__, message, text, body)

    def _fail(self, index: int, kind: str, type_name: str, message: str, trace: str, body: bytes = b"") -> None:
        with self._lock:
            self.flush()
            now_ns = time.monotonic_ns()
            elapsed_us = (now_ns - self._since_ns) // 1000
            self._since_ns = now_ns
            self._lo = index + 1
            self._send_failure(index, kind, type_name, message[:TEXT_MAX], trace, body, elapsed_us)

    def _send_failure(
        self, index: int, kind: str, type_name: str, message: str, trace: str, body: bytes, elapsed_us: int
    ) -> None:
        final = index + 1 == self._hi
        failed = wire.Failed(self._run.ticket, index, kind, type_name, message, trace, elapsed_us, final)
        self._session.channel.send(failed, body)

    def _gather(self) -> None:
        """Move scalars into the segment. The main thread may append meanwhile: what it adds stays for the next time."""
        values = self.tiny[:]
        self._writer.add_batch(values)
        del self.tiny[: len(values)]


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return f"<{type(error).__name__} whose str() fails>"


def _format(error: BaseException, trace: TracebackType | None) -> str:
    """The traceback as text, from the user's first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
        trace = trace.tb_next
    try:
        text = "".join(traceback.TracebackException(type(error), error, trace).format())
    except Exception:
        text = f"{type(error).__qualname__}: (its traceback can't be formatted)\n"
    if len(text) > TEXT_MAX:
        text = f"{text[: TEXT_MAX // 2]}\n[...]\n{text[-TEXT_MAX // 2 :]}"
    return text
