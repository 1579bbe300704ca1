"""The blob store of a peer: content-named files under `root/ab/cdef…`, small blobs in memory until they spill.

Rules this file keeps:

- a file gets its final name only when it is whole: written under `tmp/`, fsynced where durability was promised,
  renamed, folder fsynced; what a crash left in `tmp/` and `packs/` is removed at the next start;
- content is checked before its first use after a restart, and again whenever the file changed under us: what does not
  match its name is dropped, never returned;
- the quota evicts least recently used blobs nobody pinned. Pinned ones (a live job's) never go: StoreFull instead. After
  a restart all blobs found are pinned by RESTART until the peer has read its jobs again and calls `unpin(RESTART)`;
- blobs up to SMALL_BYTES_MAX that need not survive a restart stay in memory, bounded, and spill many to a file (small.py).

State changes happen only on trio's thread, between awaits; threads see nothing but files. One process a root.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from grid.blobs import blob as names
from grid.blobs.blob import CHUNK_BYTES, SMALL_BYTES_MAX, BlobId, BlobMissing, Buffer, blob_id, chunk_count, chunk_span
from grid.blobs.disk import (
    Disk,
    RealDisk,
    allocated,
    hash_file,
    hash_mapped,
    is_full,
    sync_folder,
    unlink_quietly,
    write_all,
    write_file,
)
from grid.blobs.room import Room
from grid.blobs.small import MEMORY_BYTES_MAX, SmallBlobs
from grid.blobs.writer import Writer

T = TypeVar("T")

RESTART = "restart"
"""Owner of the pins on all that was found at the start."""
PARTIAL_AGE_S_MAX = 24 * 3600
"""A fetch not taken up again within a day is not worth its space."""
READ_BYTES_MAX = 16 << 20
"""One read; requests of others are 1 MiB."""
HASH_LIST_CHUNKS_MAX = 8192
"""Chunk hashes in one answer: 256 KiB."""
HASH_LISTS_MAX = 64
"""Answers remembered, as several thieves ask for the same: 16 MiB at worst."""


class _Entry:
    """A blob held. stamp: the file's mtime in ns when its content was last seen to match; 0 never, -1 not in a file."""

    __slots__ = ("durable", "size", "stamp")

    def __init__(self, size: int, stamp: int, *, durable: bool) -> None:
        self.size = size
        self.stamp = stamp
        self.durable = durable


IN_SMALL = -1


class BlobStore:
    """Blobs on this machine. `clock` (wall seconds) dates abandoned fetches only. Blocks while it lists `root`."""

    def __init__(
        self,
        root: Path,
        quota_bytes: int,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
    ) -> None:
        self.root = root
        self.disk: Disk = disk or RealDisk()
        self._entries: dict[BlobId, _Entry] = {}
        self._pins: dict[str, set[BlobId]] = {}
        self._pin_counts: dict[BlobId, int] = {}
        self._partials: OrderedDict[BlobId, int] = OrderedDict()  # disk bytes of fetches that nobody works on
        self._writing: set[BlobId] = set()
        self._hash_lists: OrderedDict[tuple[BlobId, int, int], bytes] = OrderedDict()
        self._next_temp = 0
        self.room = Room(root, quota_bytes, self._evict, self._sweep)
        self._small = SmallBlobs(root / "packs", self.disk, memory_bytes_max)
        self._make_folders()
        self._index(clock())

    # ---- in ----

    async def put(self, *buffers: Buffer, durable: bool = False, owner: str = "") -> BlobId:
        """Store the concatenation of `buffers`, pinned for `owner` if one is given. Raises StoreFull, OSError.

        durable: it survives a power cut once this returns.
        """
        size = names.total_bytes(buffers)
        if size <= SMALL_BYTES_MAX and not durable:
            return self.put_now(buffers, owner=owner)
        blob = await self.disk.run(blob_id, *buffers) if size > CHUNK_BYTES else blob_id(*buffers)
        if not await self._intact(blob, in_file=True):
            temp = self._temp()
            await self._with_room(size, lambda: write_file(self.disk, temp, buffers, sync=durable))
            self._publish(temp, blob, size)
        return await self._finish(blob, durable=durable, owner=owner)

    def put_now(self, buffers: Sequence[Buffer], owner: str = "") -> BlobId:
        """Store a small blob (at most SMALL_BYTES_MAX, else ValueError) without awaiting. Raises StoreFull.

        Now and then this writes a pack of 8 MiB.
        """
        data = b"".join(buffers)
        if len(data) > SMALL_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes are no small blob")
        blob = blob_id(data)
        entry = self._entries.get(blob)
        if entry is None or not entry.stamp:
            self._forget(blob)  # a file of unknown content, from before the restart
            while self._small.over:
                self._spill()
            self._small.put(blob, data)
            self._entries[blob] = _Entry(len(data), IN_SMALL, durable=False)
        if owner:
            self.pin(owner, blob)
        self._touch(blob)
        return blob

    async def adopt(self, path: Path, durable: bool = False, owner: str = "", guard: bool = False) -> BlobId:
        """Take over a file someone else wrote: hashed and renamed into place (copied if it is on another file system,
        or has other names). The file at `path` is gone afterwards. Raises StoreFull, OSError, ValueError (no regular
        file, or it changed meanwhile); then the file may be gone too.

        guard: the writer is not trusted and may still have the file open: what is stored is a copy of our own.
        """
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        temp = self._temp()
        move = not guard and status.st_nlink == 1 and status.st_dev == self._device
        blob = await self._with_room(status.st_size, lambda: self._take(path, temp, status.st_size, move, durable))
        if self._known(blob):
            unlink_quietly(self.disk, temp)
            self.room.release(allocated(status.st_size))
        else:
            self._publish(temp, blob, status.st_size)
        return await self._finish(blob, durable=durable, owner=owner)

    def open_writer(self, blob: BlobId, size: int) -> Writer:
        """Begin or take up again the fetch of a blob, chunk by chunk. One writer a blob. Raises StoreFull, OSError."""
        if not 0 <= size <= names.BLOB_BYTES_MAX:
            raise ValueError(f"no blob has {size} bytes")
        if blob in self._writing:
            raise RuntimeError("this blob has a writer already")
        self.room.release(self._partials.pop(blob, 0))
        self.room.reserve(allocated(size))
        try:
            writer = Writer(self, blob, size, self.root / "partial" / blob.hex())
        except BaseException:
            self.room.release(allocated(size))
            raise
        self._writing.add(blob)
        return writer

    # ---- out ----

    def has(self, blob: BlobId) -> bool:
        """Whether the blob is held (its content may yet turn out to be damaged)."""
        return blob in self._entries

    def size(self, blob: BlobId) -> int | None:
        """Bytes of a blob that is held, else None."""
        entry = self._entries.get(blob)
        return entry.size if entry else None

    async def path(self, blob: BlobId) -> Path | None:
        """A read-only file with the blob's content; None if it isn't held or was damaged (then it is dropped).

        The path is good until the blob is evicted: pin it. Raises StoreFull, OSError if a small blob needs a file first.
        """
        if not await self._intact(blob):
            return None
        entry = self._entries[blob]
        if entry.stamp == IN_SMALL and not await self._to_file(blob):
            return None
        self._touch(blob)
        return self._path(blob)

    async def read(self, blob: BlobId, offset: int, length: int) -> bytes:
        """Bytes of a blob. Raises BlobMissing, or ValueError for a range that is not inside it (or over 16 MiB)."""
        entry = self._entries.get(blob)
        if entry is None or not await self._intact(blob):
            raise BlobMissing(blob.hex())
        if offset < 0 or not 0 <= length <= READ_BYTES_MAX or offset + length > entry.size:
            raise ValueError(f"[{offset}, {offset + length}) is not a range of a blob of {entry.size} bytes")
        self._touch(blob)
        data = self.read_now(blob)
        if data is not None:
            return data[offset : offset + length]
        try:
            data = await self.disk.run(self._read_file, blob, offset, length)
        except OSError:
            data = b""
        if len(data) != length:
            self._forget(blob)
            raise BlobMissing(blob.hex())
        return data

    def read_now(self, blob: BlobId) -> bytes | None:
        """All of a small blob if that needs no waiting (it is in memory or in a pack), else None."""
        entry = self._entries.get(blob)
        if entry is None or entry.stamp != IN_SMALL:
            return None
        data = self._small.get(blob)
        if data is None:
            self._forget(blob)  # its pack was damaged
        return data

    async def chunk_hashes(self, blob: BlobId, first: int = 0, count: int = HASH_LIST_CHUNKS_MAX) -> bytes:
        """BLAKE3 of each of `count` chunks from `first` on, 32 bytes each, fewer at the end. Raises BlobMissing, ValueError."""
        if first < 0 or not 0 < count <= HASH_LIST_CHUNKS_MAX:
            raise ValueError(f"{count} chunks from {first} on is no part of a list")
        if not await self._intact(blob):
            raise BlobMissing(blob.hex())
        key = (blob, first, count)
        hashes = self._hash_lists.get(key)
        if hashes is None:
            size = self._entries[blob].size
            data = self.read_now(blob)
            if data is not None:
                hashes = b"" if first or not data else blob_id(data)
            else:
                last = min(first + count, chunk_count(size))
                hashes = await self.disk.run(self._hash_chunks, blob, size, first, last)
            self._hash_lists[key] = hashes
            if len(self._hash_lists) > HASH_LISTS_MAX:
                self._hash_lists.popitem(last=False)
        return hashes

    # ---- keeping ----

    def pin(self, owner: str, blob: BlobId) -> None:
        """Keep a blob (held already, or as soon as it is) while `owner` wants it. Idempotent."""
        pins = self._pins.setdefault(owner, set())
        if blob not in pins:
            pins.add(blob)
            self._pin_counts[blob] = self._pin_counts.get(blob, 0) + 1
            self.room.idle.pop(blob, None)

    def unpin(self, owner: str, blob: BlobId | None = None) -> None:
        """Drop one pin of `owner`, or all. What nobody pins may be evicted from now on."""
        pins = self._pins.get(owner, set())
        dropped = pins & {blob} if blob is not None else set(pins)
        pins -= dropped
        if not pins:
            self._pins.pop(owner, None)
        for each in dropped:
            self._pin_counts[each] -= 1
            if not self._pin_counts[each]:
                del self._pin_counts[each]
                self._touch(each)

    def pinned(self, blob: BlobId) -> bool:
        return blob in self._pin_counts

    def discard(self, blob: BlobId) -> bool:
        """Delete a blob unless it is pinned; whether it is gone."""
        if blob not in self._pin_counts:
            self._forget(blob)
        return blob not in self._entries

    @property
    def used_bytes(self) -> int:
        """Disk bytes taken, reservations included."""
        return self.room.used_bytes

    def __iter__(self) -> Iterator[BlobId]:
        """Every blob held. The store must not change meanwhile."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # ---- start ----

    def _make_folders(self) -> None:
        for scratch in ("tmp", "packs"):
            shutil.rmtree(self.root / scratch, ignore_errors=True)
        for folder in ("tmp", "packs", "partial", *(f"{i:02x}" for i in range(256))):
            (self.root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._device = os.stat(self.root / "tmp").st_dev
        sync_folder(self.disk, self.root)

    def _index(self, now_s: float) -> None:
        found: list[tuple[float, BlobId, int]] = []
        for number in range(256):
            shard = f"{number:02x}"
            with os.scandir(self.root / shard) as files:
                for file in files:
                    try:
                        blob = names.blob_id_from_hex(shard + file.name)
                    except ValueError:
                        continue  # not ours: left alone
                    if file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        found.append((status.st_mtime, blob, status.st_size))
        for _, blob, size in sorted(found):
            self._entries[blob] = _Entry(size, 0, durable=False)
            self.room.used_bytes += allocated(size)
            self.pin(RESTART, blob)
        for path in sorted((self.root / "partial").iterdir(), key=lambda p: p.lstat().st_mtime):
            if path.lstat().st_mtime < now_s - PARTIAL_AGE_S_MAX:
                unlink_quietly(self.disk, path)
            else:
                size = allocated(path.lstat().st_size)
                self._partials[names.blob_id_from_hex(path.name)] = size
                self.room.used_bytes += size

    # ---- room ----

    async def _with_room(self, size: int, write: Callable[[], T]) -> T:
        """Reserve, write in a thread; on a full disk evict and try once more. On any error nothing stays reserved."""
        return await with_room(self.room, self.disk, size, write)

    def _spill(self) -> None:
        reserved = allocated(self._small.memory_bytes)  # more than a pack can take
        reserved = min(reserved, allocated(SMALL_BYTES_MAX) + (8 << 20))
        self.room.reserve(reserved)
        try:
            spilled, taken = self._small.spill()
        except OSError as error:
            if is_full(error):
                raise self.room.disk_full(reserved) from None
            raise
        finally:
            self.room.release(reserved)
        self.room.used_bytes += taken
        for blob in spilled:
            self._touch(blob)

    def _sweep(self, wanted: int) -> int:
        """Free what is no blob: fetches nobody works on, dead parts of packs."""
        freed = 0
        while freed < wanted and self._partials:
            blob, size = self._partials.popitem(last=False)
            unlink_quietly(self.disk, self.root / "partial" / blob.hex())
            freed += size
        return freed

    def _evict(self, blob: BlobId) -> int:
        return 0

    # ---- entries ----

    def _path(self, blob: BlobId) -> Path:
        name = blob.hex()
        return self.root / name[:2] / name[2:]
