"""The disk as the blob store sees it: a seam where a simulated world tears writes, fails and fills up.

Calls follow `os`: they block, raise OSError, and may write less than asked. `run` is where slow ones go: a thread on a
real disk, inline in a simulation. Threads here never touch the store's own state.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

import trio
from blake3 import blake3

from grid.blobs.blob import PARALLEL_HASH_BYTES_MIN, BlobId, Buffer, chunk_span

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DISK_THREADS_MAX = 4
"""Blocking disk calls at once: enough to keep a disk busy, few enough to leave the cores to the workers."""
FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FILE_MODE = 0o444
"""Published blobs are read-only: users' processes map them."""
READ_BYTES = 1 << 20
WRITE_BYTES_MAX = 64 << 20
"""One write call; Linux itself stops at 2 GiB."""


BLOCK_BYTES = 4096


def allocated(size: int) -> int:
    """Bytes a file of this size takes on a usual file system; what quotas count."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class Disk(Protocol):
    """What may fail. All else (listing, stat, making folders) is done with `os` directly."""

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int: ...

    def close(self, fd: int) -> None: ...

    def pread(self, fd: int, length: int, offset: int) -> bytes: ...

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int: ...

    def fsync(self, fd: int) -> None: ...

    def replace(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...

    def available_bytes(self, folder: Path) -> int: ...

    async def run(self, fn: Callable[[Unpack[Ts]], T], *args: *Ts) -> T: ...


class RealDisk:
    """The operating system's disk."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(DISK_THREADS_MAX)

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def available_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    async def run(self, fn: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        return await trio.to_thread.run_sync(fn, *args, limiter=self._limiter)


def is_full(error: OSError) -> bool:
    return error.errno in FULL_ERRORS


def write_all(disk: Disk, fd: int, data: Buffer, offset: int) -> int:
    """Write all of `data` at `offset`; return the offset after it."""
    with memoryview(data) as view, view.cast("B") as flat:
        done = 0
        while done < len(flat):
            with flat[done : done + WRITE_BYTES_MAX] as part:
                done += disk.pwrite(fd, part, offset + done)
    return offset + done


def write_file(disk: Disk, path: Path, buffers: tuple[Buffer, ...], *, sync: bool) -> None:
    """Create `path` with this content; on any error it does not exist afterwards."""
    fd = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            offset = 0
            for buffer in buffers:
                offset = write_all(disk, fd, buffer, offset)
            if sync:
                disk.fsync(fd)
        finally:
            disk.close(fd)
    except BaseException:
        unlink_quietly(disk, path)
        raise


def hash_file(disk: Disk, path: Path) -> BlobId:
    """BLAKE3 of a file by plain reads: a bad sector or a file that shrinks is an OSError or a wrong hash, not a SIGBUS."""
    hasher = blake3()
    fd = disk.open(path, os.O_RDONLY)
    try:
        offset = 0
        while data := disk.pread(fd, READ_BYTES, offset):
            hasher.update(data)
            offset += len(data)
    finally:
        disk.close(fd)
    return BlobId(hasher.digest())


def hash_mapped(path: Path, size: int) -> BlobId:
    """BLAKE3 of a file through a map, on all cores: twice as fast, for files that nobody shrinks meanwhile."""
    hasher = blake3(max_threads=blake3.AUTO if size >= PARALLEL_HASH_BYTES_MIN else 1)
    return BlobId(hasher.update_mmap(path).digest())


def read_range(disk: Disk, path: Path, offset: int, length: int) -> bytes:
    """Exactly these bytes of a file; OSError if it is shorter. Never waits for the writer of a pipe."""
    fd = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return _read_exactly(disk, fd, offset, length)
    finally:
        disk.close(fd)


def hash_chunks(disk: Disk, path: Path, size: int, first: int, last: int) -> bytes:
    """BLAKE3 of chunks [first, last) of a file, 32 bytes each; OSError if it is shorter."""
    hashes = bytearray()
    fd = disk.open(path, os.O_RDONLY)
    try:
        for index in range(first, last):
            offset, length = chunk_span(size, index)
            hashes += blake3(_read_exactly(disk, fd, offset, length)).digest()
    finally:
        disk.close(fd)
    return bytes(hashes)


def take_file(disk: Disk, path: Path, temp: Path, size: int, *, move: bool, sync: bool) -> BlobId:
    """Turn someone's file of `size` bytes into a read-only one at `temp`, renamed or copied; return its hash.

    Raises OSError, or ValueError if it is no regular file of that size; it stands at `path` again then.
    """
    try:
        if move:
            disk.replace(path, temp)
            _check_regular(temp, size)  # before anything follows a link: only we reach it now
            os.chmod(temp, FILE_MODE)
            found = hash_mapped(temp, size)
        else:
            found = _copy_hashed(disk, path, temp, size)
        _check_regular(temp, size)
        if sync:
            sync_file(disk, temp)
        if not move:
            disk.unlink(path)
    except BaseException:
        if move:
            with suppress(OSError):
                disk.replace(temp, path)
        unlink_quietly(disk, temp)
        raise
    return found


def _check_regular(path: Path, size: int) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise ValueError("the file changed while it was stored")


def _copy_hashed(disk: Disk, path: Path, temp: Path, size: int) -> BlobId:
    hasher = blake3()
    source = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        target = disk.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            offset = 0
            while offset < size and (data := disk.pread(source, min(READ_BYTES, size - offset), offset)):
                hasher.update(data)
                offset = write_all(disk, target, data, offset)
        finally:
            disk.close(target)
    finally:
        disk.close(source)
    return BlobId(hasher.digest())


def _read_exactly(disk: Disk, fd: int, offset: int, length: int) -> bytes:
    data = disk.pread(fd, length, offset)
    while len(data) < length:
        more = disk.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, "file is shorter than it was")
        data += more
    return data


def sync_file(disk: Disk, path: Path) -> None:
    """Make a file's content survive a power cut."""
    fd = disk.open(path, os.O_RDONLY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def sync_folder(disk: Disk, folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    fd = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def unlink_quietly(disk: Disk, path: Path) -> None:
    """Unlink where failing to is no news: the next start cleans up."""
    with suppress(OSError):
        disk.unlink(path)
