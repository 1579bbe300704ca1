"""How full the store's disk is: room is reserved before bytes are written, and made by deleting what may go.

Rule this file keeps: a reservation never takes `used_bytes` over `quota_bytes`, and ends either as the bytes of a
published file or given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from grid.blobs.blob import StoreFull
from grid.blobs.disk import Disk, allocated, is_full

T = TypeVar("T")


class Room:
    """Sizes are whole blocks (`allocated`). `sources` delete things, cheapest loss first: bytes wanted → bytes freed."""

    def __init__(self, folder: Path, quota_bytes: int, sources: Sequence[Callable[[int], int]]) -> None:
        self.folder = folder
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self._sources = sources

    def reserve(self, size: int) -> None:
        """Count `size` bytes as used, evicting if need be. Raises StoreFull."""
        over = self.used_bytes + size - self.quota_bytes
        if over > 0 and size <= self.quota_bytes:
            self.free(over)
        if self.used_bytes + size > self.quota_bytes:
            reason = f"{self.used_bytes} of its {self.quota_bytes} bytes are in use by live jobs; raise the quota"
            raise StoreFull(self.folder, size, reason)
        self.used_bytes += size

    def release(self, size: int) -> None:
        """Give bytes back."""
        self.used_bytes -= size

    def free(self, wanted: int) -> int:
        """Delete what may go until `wanted` bytes are freed; return the bytes freed."""
        freed = 0
        for source in self._sources:
            if freed < wanted:
                freed += source(wanted - freed)
        self.used_bytes -= freed
        return freed

    async def write(self, disk: Disk, size: int, write: Callable[[], T]) -> T:
        """Reserve room for a file of `size` bytes and run `write` in a thread; on a full disk evict and try once more.

        On success the reservation is the caller's; on any error it is given back. Raises StoreFull, OSError.
        """
        taken = allocated(size)
        self.reserve(taken)
        try:
            return await self.retry(disk, size, write)
        except BaseException:
            self.release(taken)
            raise

    async def retry(self, disk: Disk, size: int, write: Callable[[], T]) -> T:
        """Run `write` in a thread; where the disk is full make room and try once more. Raises StoreFull, OSError."""
        try:
            return await disk.run(write)
        except OSError as error:
            if not is_full(error):
                raise
        if self.free(allocated(size)):
            try:
                return await disk.run(write)
            except OSError as error:
                if not is_full(error):
                    raise
        raise self.disk_full(size)

    def disk_full(self, size: int) -> StoreFull:
        """The error for a disk with no space left."""
        return StoreFull(self.folder, size, "the disk is full; free some space on it")
