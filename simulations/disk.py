"""A disk in memory that loses power: what was not synced survives sector by sector, in no order, or not at all.

Names survive in the order in which they changed, up to some point, or surely once their folder was synced. A failed fsync
forgets what was to be written, as Linux does: it can still be read, is lost at the next power cut, and no later fsync tells.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from grid.blobs.blob import Buffer
from grid.blobs.disk import FILE_MODE

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SECTOR_BYTES = 512


class Inode:
    """A file: what is read, what is on the platter, and the writes between the two."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.platter = bytearray()
        self.writes: list[tuple[int, bytes]] = []

    def sync(self) -> None:
        for offset, data in self.writes:
            overlay(self.platter, offset, data)
        self.writes.clear()

    def lose_power(self, rng: random.Random) -> None:
        chance = rng.choice((0.0, 0.5, 0.9, 1.0))
        pieces: dict[int, list[tuple[int, bytes]]] = {}
        for offset, data in self.writes:
            for start, part in sectors(offset, data):
                pieces.setdefault(start // SECTOR_BYTES, []).append((start, part))
        for writes in pieces.values():  # a sector as it was at some moment
            for start, part in writes[: len(writes) if rng.random() < chance else rng.randrange(len(writes))]:
                overlay(self.platter, start, part)
        if self.writes and len(self.seen) > len(self.platter) and rng.random() < 0.5:
            self.platter.extend(bytes(rng.randint(0, len(self.seen) - len(self.platter))))
        self.writes.clear()
        self.seen = bytearray(self.platter)


def overlay(target: bytearray, offset: int, data: bytes) -> None:
    target.extend(bytes(max(0, offset - len(target))))
    target[offset : offset + len(data)] = data


def sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    stop = offset + len(data)
    edges = (offset, *range((offset // SECTOR_BYTES + 1) * SECTOR_BYTES, stop, SECTOR_BYTES), stop)
    return [(start, data[start - offset : end - offset]) for start, end in itertools.pairwise(edges)]


class MemoryDisk:
    """free_bytes: how far files may yet grow. broken: operations that fail, with their errno. gate: holds every run back.

    write_bytes_max: of one call, at least a sector.
    """

    def __init__(self) -> None:
        self.names: dict[Path, Inode] = {}
        self.safe_names: dict[Path, Inode] = {}
        self.changes: list[dict[Path, Inode]] = []  # all names after each change not yet synced
        self.fds: dict[int, Inode | Path] = {}
        self.numbers = itertools.count(3)
        self.free_bytes: float = float("inf")
        self.broken: dict[str, int] = {}
        self.write_bytes_max = 1 << 30
        self.calls: list[str] = []
        self.gate: trio.Event | None = None

    async def run(self, fn: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        return fn(*args)

    def _do(self, operation: str) -> None:
        self.calls.append(operation)
        if operation in self.broken:
            raise OSError(self.broken[operation], os.strerror(self.broken[operation]))

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int:
        self._do("open")
        fd = next(self.numbers)
        if flags & os.O_DIRECTORY:
            self.fds[fd] = path
            return fd
        if path not in self.names:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            self.names[path] = Inode()
            self._changed()
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self.fds[fd] = self.names[path]
        return fd

    def close(self, fd: int) -> None:
        del self.fds[fd]

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._do("pread")
        return bytes(self._file(fd).seen[offset : offset + length])

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._do("pwrite")
        inode, part = self._file(fd), bytes(data)
        if len(part) > self.write_bytes_max:  # a short write ends with a sector, as page caches take pages
            part = part[: (offset + self.write_bytes_max) // SECTOR_BYTES * SECTOR_BYTES - offset]
        room = len(inode.seen) - offset + self.free_bytes
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = part[: int(min(len(part), room))]
        self.free_bytes -= max(0, offset + len(part) - len(inode.seen))
        overlay(inode.seen, offset, part)
        inode.writes.append((offset, part))
        return len(part)

    def fsync(self, fd: int) -> None:
        found = self.fds[fd]
        if isinstance(found, Path):
            self._do("fsync folder")
            self.safe_names = dict(self.names)
            self.changes.clear()
            return
        try:
            self._do("fsync")
        except OSError:
            found.writes.clear()
            raise
        found.sync()

    def replace(self, source: Path, target: Path) -> None:
        self._do("replace")
        self._forget(target)
        self.names[target] = self.names.pop(source)
        self._changed()

    def unlink(self, path: Path) -> None:
        self._do("unlink")
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._forget(path)
        self._changed()

    def _forget(self, path: Path) -> None:
        if old := self.names.pop(path, None):
            self.free_bytes += len(old.seen)

    def _file(self, fd: int) -> Inode:
        found = self.fds[fd]
        assert isinstance(found, Inode)
        return found

    def _changed(self) -> None:
        self.changes.append(dict(self.names))

    # ---- what befalls it -----------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """The process dies: what it wrote stays."""
        self.fds.clear()

    def lose_power(self, rng: random.Random) -> None:
        self.fds.clear()
        self.names = dict(rng.choice([self.safe_names, *self.changes]))
        self.safe_names = dict(self.names)
        self.changes.clear()
        for inode in {id(inode): inode for inode in self.names.values()}.values():
            inode.lose_power(rng)

    def content(self, path: Path) -> bytes:
        return bytes(self.names[path].seen)

    def put(self, path: Path, content: bytes) -> None:
        """Someone else changes a file, lastingly."""
        inode = self.names[path]
        inode.seen, inode.platter, inode.writes = bytearray(content), bytearray(content), []

    def flip(self, path: Path, bit: int) -> None:
        content = bytearray(self.names[path].seen)
        content[bit // 8] ^= 1 << bit % 8
        self.put(path, bytes(content))


@dataclass
class Pace:
    """How a host's disk behaves just now. Chances are of one fsync; times are of one run of the journal."""

    latency_s: float = 0.0005
    jitter_s: float = 0.001
    stall: float = 0.0
    stall_s: float = 1.0
    failure: float = 0.0


ROOMY_BYTES = 1 << 40
"""Free on each disk here: full ones have tests of their own."""


class LifeDisk:
    """One life of a process on its host's disk. Once the process is dead nothing it still does gets there."""

    def __init__(self, disk: MemoryDisk, rng: random.Random, pace: Pace, synced: Callable[[int], None]) -> None:
        self.dead = False
        self._disk = disk
        self._rng = rng
        self._pace = pace
        self._synced = synced

    async def run(self, fn: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        pace = self._pace
        wait_s = pace.latency_s + self._rng.random() * pace.jitter_s
        if pace.stall and self._rng.random() < pace.stall:
            wait_s += self._rng.random() * pace.stall_s
        await trio.sleep(wait_s)
        self._check()
        return fn(*args)

    def _check(self) -> None:
        if self.dead:
            raise OSError(errno.EIO, "the machine is off")

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int:
        self._check()
        return self._disk.open(path, flags, mode)

    def close(self, fd: int) -> None:
        if fd in self._disk.fds:
            self._disk.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._check()
        return self._disk.pread(fd, length, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._check()
        return self._disk.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._check()
        if self._pace.failure and self._rng.random() < self._pace.failure:
            found = self._disk.fds[fd]
            if isinstance(found, Inode):
                found.writes.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._disk.fsync(fd)
        self._synced(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._check()
        self._disk.replace(source, target)

    def unlink(self, path: Path) -> None:
        self._check()
        self._disk.unlink(path)

    def available_bytes(self, folder: Path) -> int:
        return ROOMY_BYTES
