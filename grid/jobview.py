"""What a job shows to those who follow it: output so far, prints of tasks, progress, outcome; for live and for ended jobs.

Following is a long poll: "what is new after these positions?". A poll can be asked again of anybody who has the same bytes,
so a follower survives the loss of its peer's connection. Rules: logs and prints are bounded; output bytes never change.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import trio

from dht.core.identity import PeerId
from grid.bell import Bell
from grid.core import limits
from grid.core.job import FINAL, PENDING, Outcome
from grid.core.ranges import RangeSet

CHUNK_BYTES_MAX = 256 << 10
"""Bytes of one answer."""
PRINT_ENTRY_BYTES = 64
"""What one print costs beside its bytes: many tiny ones are bounded too."""
PROGRESS_S = 0.2
"""Progress alone ends a poll only after this time: it may change thousands of times a second."""


class JobLog:
    """An append-only file of output. Parts of it may be missing: what a replica did not see, or a crash took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = path.stat().st_size if path.exists() else 0
        self._sidecar = path.with_name(path.name + ".missing")
        self._missing = self._load_missing()
        self._unsynced = self.length > 0

    def _load_missing(self) -> RangeSet:
        try:
            return RangeSet((int(lo), int(hi)) for lo, hi in json.loads(self._sidecar.read_bytes()))
        except FileNotFoundError:
            return RangeSet()
        except (OSError, ValueError, TypeError):  # unreadable: better ask others for all of it than show what isn't so
            return RangeSet([(0, self.length)] if self.length else [])

    def _save_missing(self) -> None:
        """For the next start. On a full disk it stays unsaved: what the file lacks at its end is missing anyway."""
        with contextlib.suppress(OSError):
            if self._missing:
                new = self._sidecar.with_name(self._sidecar.name + ".new")
                new.write_text(json.dumps(list(self._missing)))
                os.replace(new, self._sidecar)
            else:
                self._sidecar.unlink(missing_ok=True)

    def append(self, data: bytes) -> None:
        """Raises OSError: the disk is full, or this would be more than a log may hold. Nothing was written then."""
        if self.length + len(data) > limits.LOG_BYTES_MAX:
            raise OSError(errno.EFBIG, f"it is more than {limits.LOG_BYTES_MAX >> 20} MiB")
        with self.path.open("ab") as file:
            file.write(data)
        self._unsynced = True
        self.length += len(data)

    def read(self, at: int, size: int) -> bytes:
        """Up to `size` bytes from position `at`, none beyond the first that is missing."""
        end = min(at + size, self.length)
        for lo, _ in self._missing.intersect(at, end) if 0 <= at < end else ():
            end = min(end, lo)
        if at >= end or at < 0:
            return b""
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(end - at)

    def write_at(self, at: int, data: bytes) -> None:
        """Bytes whose place is known: again, or after a gap. Raises OSError."""
        self.expect(at)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(at)
            file.write(data)
        self._unsynced = True
        if self._missing.remove(at, at + len(data)):
            self._save_missing()
        self.length = max(self.length, at + len(data))

    def expect(self, length: int) -> None:
        """It has this many bytes at least: those that are not here are missing."""
        if length > self.length:
            self._missing.add(self.length, length)
            self._save_missing()
            self.length = length

    def readable(self, at: int) -> bool:
        """Whether `read` from there returns something."""
        return 0 <= at < self.length and at not in self._missing

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of bytes that are not here."""
        return list(self._missing)

    def sync(self) -> None:
        """Have what was written on the disk. Raises OSError."""
        if self._unsynced:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            self._unsynced = False


class Prints:
    """The latest prints of tasks: a ring of bounded bytes, numbered from 0."""

    def __init__(self) -> None:
        self._lines: deque[tuple[PeerId, int, int, int, bytes]] = deque()
        self._bytes = 0
        self.next = 0

    def add(self, peer: PeerId, stage: int, index: int, fd: int, data: bytes) -> None:
        """One task's output, in order of arrival."""
        self._lines.append((peer, stage, index, fd, data))
        self._bytes += len(data) + PRINT_ENTRY_BYTES
        self.next += 1
        while self._bytes > limits.PRINT_BYTES_MAX and len(self._lines) > 1:
            self._bytes -= len(self._lines.popleft()[4]) + PRINT_ENTRY_BYTES

    def after(self, number: int, size: int) -> tuple[list[tuple[PeerId, int, int, int, bytes]], int]:
        """Entries from `number` on, up to `size` bytes; and the number after them."""
        first = self.next - len(self._lines)
        start = max(number, first)
        taken: list[tuple[PeerId, int, int, int, bytes]] = []
        for entry in islice(self._lines, start - first, None):
            if taken and size < len(entry[4]):
                break
            size -= len(entry[4])
            taken.append(entry)
        return taken, start + len(taken)

    def of_task(self, stage: int, index: int) -> bytes:
        """What is left of one task's prints."""
        return b"".join(data for _, s, i, _, data in self._lines if (s, i) == (stage, index))


class JobView:
    """One job's public face on the peer that leads or archives it."""

    def __init__(self, folder: Path, clear: bool = False) -> None:
        if clear:
            for name in ("stdout", "stderr"):
                (folder / name).unlink(missing_ok=True)
                (folder / f"{name}.missing").unlink(missing_ok=True)
        self.stdout = JobLog(folder / "stdout")
        self.stderr = JobLog(folder / "stderr")
        self.prints = Prints()
        self.bell = Bell()
        self.state = PENDING
        self.outcome: Outcome | None = None
        self.version = 0

    def changed(self) -> None:
        """Something that a follower shows has changed."""
        self.version += 1
        self.bell.ring()

    def write(self, fd: int, data: bytes) -> None:
        """The driver wrote to its stdout (1) or stderr (2). Raises OSError."""
        self.log(fd).append(data)
        self.bell.ring()

    def write_at(self, fd: int, at: int, data: bytes) -> None:
        """As `write`, of a replicated job. Raises OSError."""
        self.log(fd).write_at(at, data)
        self.bell.ring()

    def sync(self) -> None:
        """Have the output on the disk. Raises OSError."""
        self.stdout.sync()
        self.stderr.sync()

    def log(self, fd: int) -> JobLog:
        """Of stdout (1) or stderr (2)."""
        return self.stdout if fd == 1 else self.stderr

    def finish(self, outcome: Outcome) -> None:
        """The job is over."""
        assert self.outcome is None
        self.outcome = outcome
        self.state = outcome.state
        self.changed()

    def _news(self, params: dict[str, Any]) -> bool:
        return bool(
            self.stdout.readable(params.get("stdout", -1))
            or self.stderr.readable(params.get("stderr", -1))
            or 0 <= params.get("print", -1) < self.prints.next
        )

    async def poll(self, params: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Wait (up to wait_s) for something after the given positions; return it. Position -1: not wanted."""
        wait_s = min(max(float(params.get("wait_s", 0.0)), 0.0), limits.POLL_S_MAX)
        with trio.move_on_after(wait_s):
            began_s = trio.current_time()
            while not self._news(params) and self.state not in FINAL:
                if self.version != params.get("seen", -1) and trio.current_time() - began_s >= PROGRESS_S:
                    break
                with trio.move_on_after(PROGRESS_S):
                    await self.bell.wait()
        return self._answer(params)

    def _answer(self, params: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        room = CHUNK_BYTES_MAX
        out_at, err_at, print_at = (int(params.get(name, -1)) for name in ("stdout", "stderr", "print"))
        out = self.stdout.read(out_at, room)
        err = self.stderr.read(err_at, room - len(out))
        lines, next_print = self.prints.after(print_at, room - len(out) - len(err)) if print_at >= 0 else ([], print_at)
        answer: dict[str, Any] = {
            "version": self.version,
            "state": self.state,
            "stdout": [out_at, len(out)],
            "stderr": [err_at, len(err)],
            "prints": [[stage, index, fd, peer.hex(), len(data)] for peer, stage, index, fd, data in lines],
            "print_next": next_print,
            "final": self.state in FINAL
            and out_at + len(out) >= (self.stdout.length if out_at >= 0 else -1)
            and err_at + len(err) >= (self.stderr.length if err_at >= 0 else -1)
            and (print_at < 0 or next_print >= self.prints.next),
        }
        if self.outcome is not None:
            answer["exit_code"] = self.outcome.exit_code
            answer["error"] = self.outcome.error
        return answer, out + err + b"".join(entry[4] for entry in lines)
