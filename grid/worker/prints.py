"""A worker's sys.stdout and sys.stderr: what a task prints becomes Print frames that carry its stage and index.

Text waits for company until the task changes, PRINT_FLUSH_BYTES have gathered, or the worker's clock ticks. What one task
may print is bounded; C code and subprocesses write to descriptors 1 and 2, pipes that the peer reads.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Final

from grid.api import wire

PRINT_FLUSH_BYTES: Final = 8 << 10
"""A frame's worth."""
TASK_PRINT_BYTES_MAX: Final = 1 << 20
"""Of one task; more is a mistake that would drown everyone else's prints."""

TOO_MUCH: Final = b"\n[this task printed more than 1 MiB: the rest is dropped]\n"

Tag = tuple[int, int, int]
"""(stage, index, attempt) of the task that prints."""


class Prints:
    """Gathers what is printed and sends it."""

    def __init__(self, send: Callable[[wire.Print, bytes], None], running: Callable[[], Tag]) -> None:
        self._send = send
        self._running = running
        self._lock = threading.RLock()  # a finalizer that prints may run while we hold it
        self._tag = running()
        self._fd = 1
        self._pending = bytearray()
        self._left = TASK_PRINT_BYTES_MAX

    def install(self) -> None:
        """Put streams that end here in place of sys.stdout and sys.stderr."""
        sys.stdout = self._stream(1)
        sys.stderr = self._stream(2)
        os.register_at_fork(after_in_child=_restore)

    def _stream(self, fd: int) -> io.TextIOWrapper:
        raw = _Raw(self, fd)
        return io.TextIOWrapper(raw, "utf-8", "backslashreplace", newline="\n", write_through=True)

    def write(self, fd: int, data: bytes) -> None:
        """Take what a task printed to descriptor `fd`."""
        with self._lock:
            tag = self._running()
            if tag != self._tag:
                self.flush()
                self._tag = tag
                self._left = TASK_PRINT_BYTES_MAX
            if fd != self._fd:
                self.flush()
                self._fd = fd
            if self._left <= 0:
                return
            self._pending += data
            self._left -= len(data)
            if self._left <= 0:
                self._pending += TOO_MUCH
            if len(self._pending) >= PRINT_FLUSH_BYTES:
                self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if not self._pending:
            return
        with self._lock:
            data, self._pending = bytes(self._pending), bytearray()
            stage, index, _ = self._tag
            for start in range(0, len(data), wire.INLINE_BYTES_MAX):
                self._send(wire.Print(stage, index, self._fd), data[start : start + wire.INLINE_BYTES_MAX])


class _Raw(io.BufferedIOBase):
    """The binary stream below sys.stdout or sys.stderr."""

    def __init__(self, prints: Prints, fd: int) -> None:
        self._prints = prints
        self._fd = fd
        self.name = "<stdout>" if fd == 1 else "<stderr>"

    def writable(self) -> bool:
        return True

    def write(self, data: wire.Buffer) -> int:  # type: ignore[override]
        copy = bytes(data)
        self._prints.write(self._fd, copy)
        return len(copy)

    def flush(self) -> None:
        """Nothing: whoever flushes after each character would send a frame for each."""

    def fileno(self) -> int:
        return self._fd


def _restore() -> None:
    """In a process that a task forked: print to the pipes."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(fd, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True))
