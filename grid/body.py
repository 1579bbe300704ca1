"""Opaque bytes of arguments and results as a peer holds them: in memory, or as a slice of a file in a spool folder.

Rules: nothing here is ever unpickled; a file that several slices share goes when the last of them is released; a body is
read whole only when it is about to leave this machine or to enter a frame.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3


class SpoolFile:
    """A file with owners; unlinked when the last one releases it. `owned=False`: someone else's, never unlinked."""

    __slots__ = ("owned", "owners", "path")

    def __init__(self, path: str, owned: bool = True) -> None:
        self.path = path
        self.owned = owned
        self.owners = 0

    def release(self) -> None:
        """One owner less."""
        self.owners -= 1
        if self.owners <= 0 and self.owned:
            Path(self.path).unlink(missing_ok=True)


class SharedFile(SpoolFile):
    """Memory of a child, which it writes anew once we are through with it. We keep a descriptor: the child may end before.

    `released` is called once, when there is neither an owner nor a worker that it is lent to: with whether none of those still
    maps it. Made by a spool, which closes it at the job's end.
    """

    __slots__ = ("_fd", "_released", "clean", "lent", "size")

    def __init__(self, path: str, released: Callable[[bool], None]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise OSError(errno.EINVAL, f"{path} is no memory")
        super().__init__(f"/proc/{os.getpid()}/fd/{self._fd}", owned=False)
        self.size = status.st_size
        self._released = released
        self.lent = 0
        self.clean = True

    def release(self) -> None:
        self.owners -= 1
        self._settle()

    def give_back(self, clean: bool) -> None:
        """A worker that had it is through. clean: it maps it no longer."""
        self.lent -= 1
        self.clean = self.clean and clean
        self._settle()

    def _settle(self) -> None:
        if self.owners <= 0 and not self.lent and self._fd >= 0:
            self.close()
            self._released(self.clean)

    def close(self) -> None:
        """Nobody reads it any more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self.path = -1, ""  # the number may be another file's next


@dataclass(frozen=True, slots=True)
class FileSlice:
    """`length` bytes at `offset` of a file."""

    file: SpoolFile
    offset: int
    length: int

    @property
    def whole(self) -> bool:
        """The slice is all of its file."""
        return self.offset == 0 and os.stat(self.file.path).st_size == self.length


Body: TypeAlias = bytes | FileSlice


def whole_file(path: str, owned: bool = True) -> FileSlice:
    """A body that is all of a file. Raises FileNotFoundError."""
    file = SpoolFile(path, owned)
    file.owners = 1
    return FileSlice(file, 0, os.stat(path).st_size)


def size_of(body: Body) -> int:
    """In bytes."""
    return body.length if isinstance(body, FileSlice) else len(body)


def memory_of(body: Body) -> int:
    """Bytes that the body takes in this process."""
    return 0 if isinstance(body, FileSlice) else len(body)


def read(body: Body) -> bytes:
    """The bytes."""
    if isinstance(body, bytes):
        return body
    with open(body.file.path, "rb") as file:
        file.seek(body.offset)
        data = file.read(body.length)
    if len(data) != body.length:
        raise OSError(f"{body.file.path} is shorter than it was")
    return data


def release(body: Body) -> None:
    """The holder is done with it."""
    if isinstance(body, FileSlice):
        body.file.release()


def hash_of(body: Body) -> bytes:
    """BLAKE3, 32 bytes."""
    if isinstance(body, bytes):
        return blake3(body).digest()
    if body.whole:
        return blake3().update_mmap(body.file.path).digest()
    return blake3(read(body)).digest()


class Spool:
    """Numbered files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._shared: dict[str, SharedFile] = {}

    def share(self, path: str, released: Callable[[str, bool], None]) -> FileSlice:
        """A body that is all of a child's shared memory; `released(path, reusable)` is told its end. Raises OSError."""

        def end(reusable: bool) -> None:
            del self._shared[path]
            released(path, reusable)

        file = self._shared[path] = SharedFile(path, end)
        file.owners = 1
        return FileSlice(file, 0, file.size)

    def close(self) -> None:
        """The job is over here: let go of what was shared."""
        for file in self._shared.values():
            file.close()
        self._shared.clear()

    def path(self, kind: str) -> str:
        """A name that was not given before."""
        self._number += 1
        return str(self.folder / f"{kind}-{self._number}")

    def write(self, kind: str, data: bytes) -> SpoolFile:
        """A new file with this content; nobody owns it yet. Raises OSError (disk full) and leaves nothing then."""
        path = self.path(kind)
        try:
            Path(path).write_bytes(data)
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
        return SpoolFile(path)

    def link(self, path: str) -> str:
        """Another name, in this folder, for a file elsewhere (a copy where links can't be made)."""
        name = self.path("link")
        try:
            os.link(path, name)
        except OSError:
            shutil.copyfile(path, name)
        return name

    def own(self, body: FileSlice) -> FileSlice:
        """The same bytes in a file of their own; the slice is released. Raises OSError."""
        file = self.write("copy", read(body))
        file.owners = 1
        release(body)
        return FileSlice(file, 0, body.length)

    def as_file(self, body: Body) -> str:
        """The path of a file that holds just this body; written if need be (then the caller unlinks it, or the job's end)."""
        if isinstance(body, FileSlice) and body.whole:
            return body.file.path
        return self.write("copy", read(body)).path
