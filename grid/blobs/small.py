"""Small blobs that nobody needs after a restart: in memory first, spilled many to a file.

A job of a million segments must not become a million files, so when the memory bound is reached the oldest blobs are
written together into one *pack* file. Rules this file keeps:

- at most `memory_bytes_max` in memory, overhead counted;
- a pack is written once, never changed, and unlinked with its last blob; packs do not outlive the process;
- what comes back from a pack is hashed again: a damaged blob is forgotten, never returned.

Disk bytes are accounted by the caller: methods return what they took or freed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import KeysView
from pathlib import Path

from grid.blobs.blob import BlobId, blob_id
from grid.blobs.disk import Disk, allocated, unlink_quietly, write_file

MEMORY_BYTES_MAX = 64 << 20
"""For all jobs of a peer together."""
PACK_BYTES = 8 << 20
"""Spilled at a time: a few milliseconds of writing."""
OVERHEAD_BYTES = 256
"""What an entry costs in memory beside its bytes (dict slots, two objects)."""
COMPACT_LIVE_FRACTION_MAX = 0.5
"""Packs less alive than this are worth rewriting when room is short."""
COMPACT_PACKS_MAX = 8
"""Rewritten at a time: at most 32 MiB of live blobs in memory meanwhile."""


class _Pack:
    __slots__ = ("live", "live_bytes", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.live: dict[BlobId, tuple[int, int]] = {}  # offset, length
        self.live_bytes = 0


class SmallBlobs:
    """See the module."""

    def __init__(self, folder: Path, disk: Disk, memory_bytes_max: int = MEMORY_BYTES_MAX) -> None:
        self._folder = folder
        self._disk = disk
        self._memory_bytes_max = memory_bytes_max
        self._memory: OrderedDict[BlobId, bytes] = OrderedDict()
        self._packed: dict[BlobId, _Pack] = {}
        self._packs: dict[int, _Pack] = {}
        self._next_pack = 0
        self.memory_bytes = 0

    def put(self, blob: BlobId, data: bytes) -> None:
        """Keep a blob in memory. The caller spills while `over`."""
        if blob not in self._memory and blob not in self._packed:
            self._memory[blob] = data
            self.memory_bytes += len(data) + OVERHEAD_BYTES

    def get(self, blob: BlobId) -> bytes | None:
        """The blob's bytes; None if it isn't here or its pack was damaged (then `drop` it). One small read at worst."""
        data = self._memory.get(blob)
        if data is not None:
            self._memory.move_to_end(blob)
            return data
        pack = self._packed.get(blob)
        return self._read(pack, blob) if pack else None

    @property
    def in_memory(self) -> KeysView[BlobId]:
        """Blobs that take no disk, least recently used first."""
        return self._memory.keys()

    @property
    def over(self) -> bool:
        """Whether memory is over its bound."""
        return self.memory_bytes > self._memory_bytes_max

    def spill(self) -> tuple[list[BlobId], int]:
        """Write the longest unused blobs into one pack; return them and the disk bytes taken. Raises OSError, unchanged."""
        batch: list[tuple[BlobId, bytes]] = []
        size = 0
        for blob, data in self._memory.items():
            batch.append((blob, data))
            size += len(data)
            if size >= PACK_BYTES:
                break
        pack = self._write(batch)
        for blob, data in batch:
            del self._memory[blob]
            self.memory_bytes -= len(data) + OVERHEAD_BYTES
        return [blob for blob, _ in batch], allocated(pack.size)

    def drop(self, blob: BlobId) -> int:
        """Forget a blob; return the disk bytes that freed."""
        data = self._memory.pop(blob, None)
        if data is not None:
            self.memory_bytes -= len(data) + OVERHEAD_BYTES
        pack = self._packed.pop(blob, None)
        if pack is None:
            return 0
        pack.live_bytes -= pack.live.pop(blob)[1]
        return 0 if pack.live else self._unlink(pack)

    def compact(self) -> int:
        """Rewrite packs that are mostly dead; return the disk bytes freed. Raises OSError, unchanged."""
        sparse = [p for p in self._packs.values() if p.live_bytes <= p.size * COMPACT_LIVE_FRACTION_MAX]
        sparse = sparse[:COMPACT_PACKS_MAX]
        if len(sparse) < 2:
            return 0
        batch = [(blob, data) for p in sparse for blob in p.live if (data := self._read(p, blob)) is not None]
        taken = allocated(self._write(batch).size) if batch else 0
        for pack in sparse:
            for blob in pack.live:
                if self._packed[blob] is pack:  # damaged, hence not moved
                    del self._packed[blob]
        return sum(self._unlink(p) for p in sparse) - taken

    def _write(self, batch: list[tuple[BlobId, bytes]]) -> _Pack:
        number = self._next_pack
        self._next_pack += 1
        pack = _Pack(self._folder / str(number))
        write_file(self._disk, pack.path, (b"".join(data for _, data in batch),), sync=False)
        for blob, data in batch:
            pack.live[blob] = (pack.size, len(data))
            pack.size += len(data)
            self._packed[blob] = pack
        pack.live_bytes = pack.size
        self._packs[number] = pack
        return pack

    def _read(self, pack: _Pack, blob: BlobId) -> bytes | None:
        offset, length = pack.live[blob]
        try:
            fd = self._disk.open(pack.path, os.O_RDONLY)
            try:
                data = self._disk.pread(fd, length, offset)
            finally:
                self._disk.close(fd)
        except OSError:
            return None
        return data if blob_id(data) == blob else None

    def _unlink(self, pack: _Pack) -> int:
        del self._packs[int(pack.path.name)]
        unlink_quietly(self._disk, pack.path)
        return allocated(pack.size)
