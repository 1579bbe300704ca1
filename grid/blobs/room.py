"""How full the store's disk is: reservations made before bytes are written, least recently used blobs that may go.

Rule this file keeps: `used_bytes` is never over `quota_bytes` after a reservation (a quota smaller than what was found
at the start merely refuses more); every reservation ends as the bytes of a published file or is given back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from grid.blobs.blob import BlobId, StoreFull


class Room:
    """Quota and eviction order. `evict(blob)` deletes one blob; `sweep(bytes)` frees what is no blob; both return bytes freed."""

    def __init__(
        self, folder: Path, quota_bytes: int, evict: Callable[[BlobId], int], sweep: Callable[[int], int]
    ) -> None:
        self.folder = folder
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self.idle: OrderedDict[BlobId, None] = OrderedDict()  # on disk, unpinned; least recently used first
        self._evict = evict
        self._sweep = sweep

    def reserve(self, size: int) -> None:
        """Count `size` bytes as used, evicting if need be. Raises StoreFull, and then nothing was evicted in vain... mostly."""
        over = self.used_bytes + size - self.quota_bytes
        if over > 0:
            if size <= self.quota_bytes:
                self.free(over)
            if self.used_bytes + size > self.quota_bytes:
                raise self.full(size)
        self.used_bytes += size

    def release(self, size: int) -> None:
        self.used_bytes -= size

    def free(self, wanted: int) -> int:
        """Evict until `wanted` bytes are freed or nothing idle is left; return the bytes freed."""
        freed = self._sweep(wanted)
        while freed < wanted and self.idle:
            blob, _ = self.idle.popitem(last=False)
            freed += self._evict(blob)
        self.used_bytes -= freed
        return freed

    def full(self, size: int) -> StoreFull:
        return StoreFull(
            self.folder,
            size,
            f"{self.used_bytes} of its {self.quota_bytes} bytes are used and nothing more can be evicted; raise the quota",
        )

    def disk_full(self, size: int) -> StoreFull:
        return StoreFull(self.folder, size, "the disk is full; free some space on it")
