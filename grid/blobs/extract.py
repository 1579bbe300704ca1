"""Files cut out of a pack, written below one folder and nowhere else.

Rules this file keeps: no link is followed on the way to a file (jobs may write in that folder), each file appears under its
name whole and read-only, or not at all. Everything here blocks; it runs in threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from grid.blobs.disk import FILE_MODE
from grid.blobs.manifest import InputFile

try:
    import fcntl
except ImportError:  # pragma: no cover - not on POSIX
    fcntl = None  # type: ignore[assignment]

COPY_BYTES = 1 << 20
REFLINK = 0x40049409
"""ioctl FICLONE of Linux: the new file shares the old one's blocks, copy on write."""
CANT_COPY_HERE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
_numbers = count(1)


class Extractor:
    """Writes files below `folder`, which must exist. Good for one thread; close it."""

    def __init__(self, folder: Path) -> None:
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._parent_name = ""
        self._parent = os.dup(self._root)

    def close(self) -> None:
        """Release the folders."""
        os.close(self._parent)
        os.close(self._root)

    def extract(self, pack: Path, source: int, file: InputFile, *, whole: bool) -> None:
        """Write one file; `source` is the open pack, `whole` says that it holds nothing else. Raises OSError."""
        name = self._enter(file.name)
        temp = f".grid-{next(_numbers)}.tmp"
        try:
            if not (whole and self._share(pack, source, temp)):
                self._copy(source, file, temp)
            os.replace(temp, name, src_dir_fd=self._root, dst_dir_fd=self._parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp, dir_fd=self._root)
            raise

    def _enter(self, name: str) -> str:
        """Make and open the folder of a file; return the rest of its name."""
        folder, _, last = name.rpartition("/")
        if folder != self._parent_name:
            opened = os.dup(self._root)
            try:
                for part in folder.split("/") if folder else ():
                    opened = _step(opened, part)
            except BaseException:
                os.close(opened)
                raise
            os.close(self._parent)
            self._parent, self._parent_name = opened, folder
        return last

    def _share(self, pack: Path, source: int, temp: str) -> bool:
        """Reflink, else hard link."""
        if fcntl is not None:
            with self._create(temp) as target:
                try:
                    fcntl.ioctl(target, REFLINK, source)
                    return True
                except OSError:
                    os.unlink(temp, dir_fd=self._root)
        try:
            os.link(pack, temp, dst_dir_fd=self._root, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _copy(self, source: int, file: InputFile, temp: str) -> None:
        with self._create(temp) as target:
            at, end = file.offset, file.offset + file.size
            in_kernel = hasattr(os, "copy_file_range")
            while at < end:
                try:
                    copied = _copy_some(source, target, at, end - at, in_kernel=in_kernel)
                except OSError as error:
                    if not in_kernel or error.errno not in CANT_COPY_HERE:
                        raise
                    in_kernel = False
                    continue
                if not copied:
                    raise OSError(errno.EIO, f"the pack ends before input file {file.name}")
                at += copied

    @contextmanager
    def _create(self, temp: str) -> Iterator[int]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        target = os.open(temp, flags, FILE_MODE, dir_fd=self._root)
        try:
            yield target
        finally:
            os.close(target)


def _step(folder: int, part: str) -> int:
    """Go one folder down, made if need be; the old descriptor is closed on success."""
    with suppress(FileExistsError):
        os.mkdir(part, 0o755, dir_fd=folder)
    inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    os.close(folder)
    return inner


def _copy_some(source: int, target: int, at: int, length: int, *, in_kernel: bool) -> int:
    if in_kernel:
        return os.copy_file_range(source, target, length, offset_src=at)
    data = os.pread(source, min(length, COPY_BYTES), at)
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return written
