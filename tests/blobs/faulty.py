"""A disk that fills up, fails and loses power, on real files; everything runs inline, so that virtual time works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from grid.blobs.blob import Buffer
from grid.blobs.disk import FILE_MODE, RealDisk


class FaultyDisk(RealDisk):
    """free_bytes: how much may yet be written. broken: operations that fail with EIO. write_bytes_max: longest write."""

    def __init__(self) -> None:
        super().__init__()
        self.free_bytes: float = float("inf")
        self.broken: set[str] = set()
        self.write_bytes_max = 1 << 30
        self.log: list[str] = []
        self._paths: dict[int, Path] = {}
        self._dirty: set[Path] = set()
        self._renamed: dict[Path, Path] = {}  # target: source, not safe before the folder is synced

    async def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return fn(*args)

    def _do(self, operation: str, path: Path) -> None:
        self.log.append(f"{operation} {path.parent.name if operation == 'replace' else path.name}")
        if operation in self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int:
        self._do("open", path)
        fd = super().open(path, flags, mode)
        self._paths[fd] = path
        return fd

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._do("pread", self._paths[fd])
        return super().pread(fd, length, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        path = self._paths[fd]
        self._do("pwrite", path)
        self._dirty.add(path)
        part = memoryview(data)[: self.write_bytes_max]
        if self.free_bytes <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().pwrite(fd, part[: int(min(len(part), self.free_bytes))], offset)
        self.free_bytes -= written
        return written

    def fsync(self, fd: int) -> None:
        path = self._paths[fd]
        self._do("fsync", path)
        super().fsync(fd)
        self._dirty.discard(path)
        for target in [t for t in self._renamed if t.parent == path]:
            del self._renamed[target]

    def replace(self, source: Path, target: Path) -> None:
        self._do("replace", target)
        super().replace(source, target)
        self._renamed[target] = source
        if source in self._dirty:
            self._dirty.remove(source)
            self._dirty.add(target)

    def unlink(self, path: Path) -> None:
        size = path.stat().st_size
        super().unlink(path)
        self.free_bytes += size

    def lose_power(self) -> None:
        """What was not synced is lost: content becomes zeroes, names vanish."""
        for path in self._dirty:
            if path.exists():
                size = path.stat().st_size
                path.chmod(0o600)
                path.write_bytes(bytes(size))
        for target in self._renamed:
            target.unlink(missing_ok=True)
