"""Memory that a driver shares with its peer and the workers there, for pages too large for a frame.

A page's bytes are copied once, into pages of memory that are warm where an earlier page was there: a fresh page costs the kernel
more than the copy does. The memory has no name in a file system, so nothing is left of it after a crash: others open it by its
descriptor in /proc. Rules this file keeps:

- what was sent is not touched before the peer says that nobody maps it (`Released`); then it is written anew, or given up;
- all of it, in use or kept for later, is at most the bytes that the peer allowed; what is kept and not used goes soon;
- a block whose writing was interrupted (SIGINT) stays as it is: threads may be writing to it;
- where there is none to be had (another system, no room), `write` says so before anything was written.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

BLOCKS_MAX = 64
"""Each is a descriptor here and in the peer."""
SPARES_MAX = 4
"""Kept for later: one or two are under way in a script that waits for its results."""
SPARE_S = 5.0
"""A spare that was not used for so long is given back to the machine."""
STEP_BYTES = 16 << 20
"""Copied without letting other threads run."""
COPIERS_MAX = 4
"""Threads that copy at once: few fill a machine's memory bandwidth, one does not."""
PARALLEL_BYTES_MIN = 8 << 20
"""Below this starting a thread costs more than it saves."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14. Where memory is short it is an error, where touching it would be the end of the process."""


class SharedMemory:
    """A driver's blocks. Safe to use from several threads."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd") else 0
        self._lock = threading.Lock()
        self._sent: dict[str, _Block] = {}
        self._spares: list[_Block] = []  # the one used last is last: its pages are the most likely to be in a cache
        self._sweeping = False

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in (*self._sent.values(), *self._spares))

    def write(self, parts: list[Buffer], size: int) -> str:
        """Copy the parts into a block and return its path; "" if there is none to be had."""
        if size > self.bytes_max:
            return ""
        with self._lock:
            block = self._take(size)
        if block is None:
            return ""
        try:
            block.write(parts)
        except (OSError, ValueError):  # no room, or a system that can't
            self.released(block.path, False)
            return ""
        return block.path

    def released(self, path: str, reusable: bool) -> None:
        """The peer is done with a block."""
        with self._lock:
            block = self._sent.pop(path, None)
            if block is None:
                return
            if not reusable or len(self._spares) >= SPARES_MAX:
                block.close()
                return
            block.since_s = time.monotonic()
            self._spares.append(block)
            if not self._sweeping:
                self._sweeping = True
                threading.Thread(target=self._sweep, name="grid-shared", daemon=True).start()

    def _take(self, size: int) -> _Block | None:
        """A block that is to have this size, the warmest there is, or a new one."""
        block = self._spares.pop() if self._spares else None
        while self._spares and self.size + size > self.bytes_max:
            self._spares.pop(0).close()
        if self.size + size > self.bytes_max or len(self._sent) >= BLOCKS_MAX:
            if block is not None:
                block.close()
            return None
        if block is None:
            try:
                block = _Block()
            except OSError:
                return None
        block.size = size
        self._sent[block.path] = block
        return block

    def _sweep(self) -> None:
        """Thread: gives up spares, until none is left."""
        while True:
            time.sleep(SPARE_S / 2)
            with self._lock:
                before_s = time.monotonic() - SPARE_S
                while self._spares and self._spares[0].since_s < before_s:
                    self._spares.pop(0).close()
                if not self._spares:
                    self._sweeping = False
                    return


class _Block:
    """A piece of shared memory, mapped here from its second use on."""

    def __init__(self) -> None:
        self.size = 0
        self.since_s = 0.0
        self._length = 0
        self._map: mmap.mmap | None = None
        self._fd = os.memfd_create("grid-page")
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, parts: list[Buffer]) -> None:
        """Be the parts, one after the other, which are `size` bytes together. Raises OSError, ValueError."""
        if self._length:
            self._fit()
        at = 0
        for part in parts:
            if not memoryview(part).nbytes:
                continue
            source = memoryview(part).cast("B")
            if self._map is None:
                self._fill(at, source)
            else:
                _copy(self._map, at, source)
            at += len(source)
        assert at == self.size
        self._length = at

    def _fill(self, at: int, source: memoryview) -> None:
        """Copy into memory that is not there yet: written to, it need not be cleared first."""
        done = 0
        while done < len(source):
            with source[done : done + STEP_BYTES] as piece:
                done += os.pwrite(self._fd, piece, at + done)

    def _fit(self) -> None:
        """Have exactly `size` bytes mapped, of which every page is there."""
        there = 0
        if self._map is None:
            os.ftruncate(self._fd, self.size)
            self._map = mmap.mmap(self._fd, self.size)
        elif len(self._map) != self.size:
            there = min(len(self._map), self.size) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.resize(self.size)
        else:
            return
        for at in range(there, self.size, STEP_BYTES):
            self._map.madvise(MADV_POPULATE_WRITE, at, min(STEP_BYTES, self.size - at))

    def close(self) -> None:
        """Give it back to the machine (as soon as nobody else maps it)."""
        if self._map is not None:
            self._map.close()
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _copy(target: mmap.mmap, at: int, source: memoryview) -> None:
    size = len(source)
    if size < PARALLEL_BYTES_MIN or source.readonly:  # whose address is not to be had
        with memoryview(target) as view:
            for start in range(0, size, STEP_BYTES):
                with source[start : start + STEP_BYTES] as piece:
                    view[at + start : at + start + len(piece)] = piece
        return
    import ctypes

    ends = ctypes.c_char.from_buffer(target, at), ctypes.c_char.from_buffer(source)

    def move(start: int, ends: tuple[ctypes.c_char, ctypes.c_char] = ends) -> None:
        """While `ends` live, the memory stays: an interrupt may end the caller before the other threads."""
        to, origin = map(ctypes.addressof, ends)
        ctypes.memmove(to + start, origin + start, min(share, size - start))

    share = -(-size // min(COPIERS_MAX, os.cpu_count() or 1))
    others = [threading.Thread(target=move, args=(start,)) for start in range(share, size, share)]
    for other in others:
        other.start()
    move(0)
    for other in others:
        other.join()
