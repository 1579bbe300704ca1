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
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grid.blobs import disk as files
from grid.blobs.blob import (
    BLOB_BYTES_MAX,
    BLOB_ID_BYTES,
    CHUNK_BYTES,
    HASH_LIST_CHUNKS_MAX,
    HASH_LIST_SUFFIX,
    SMALL_BYTES_MAX,
    BlobId,
    BlobMissing,
    Buffer,
    StoreFull,
    blob_id,
    chunk_count,
    total_bytes,
)
from grid.blobs.disk import Disk, RealDisk, allocated, unlink_quietly
from grid.blobs.layout import Layout
from grid.blobs.pins import Pins
from grid.blobs.room import Room
from grid.blobs.small import MEMORY_BYTES_MAX, PACK_BYTES, SmallBlobs
from grid.blobs.writer import Writer

RESTART = "restart"
"""Owner of the pins on all that was found at the start."""
PARTIAL_AGE_S_MAX = 24 * 3600
"""A fetch not taken up again within a day is not worth its space."""
READ_BYTES_MAX = 16 << 20
"""One read; requests of others are 1 MiB."""
HASH_LISTS_MAX = 64
"""Answers remembered, as several thieves ask for the same: 16 MiB at worst."""


class _Entry:
    """A blob held. stamp: the file's mtime in ns when its content was last seen to match, None if it never was."""

    __slots__ = ("durable", "size", "small", "stamp")

    def __init__(self, size: int, *, small: bool, stamp: int | None = None) -> None:
        self.size = size
        self.small = small  # in memory or a pack, not in a file of its own
        self.stamp = stamp
        self.durable = False


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
        self._room = Room(root, quota_bytes, (self._free_partials, self._free_idle, self._free_packs))
        self._entries: dict[BlobId, _Entry] = {}
        self._idle: OrderedDict[BlobId, None] = OrderedDict()  # on disk and unpinned; least recently used first
        self._pins = Pins()
        self._partials: OrderedDict[BlobId, int] = OrderedDict()  # disk bytes of fetches nobody works on
        self._writing: set[BlobId] = set()
        self._hash_lists: OrderedDict[tuple[BlobId, int, int], bytes] = OrderedDict()
        self._keepers = 0
        self._layout = Layout(root, self.disk)
        self._small = SmallBlobs(self._layout.packs, self.disk, memory_bytes_max)
        for blob, status in self._layout.blobs():
            self._entries[blob] = _Entry(status.st_size, small=False)
            self._room.used_bytes += allocated(status.st_size)
            self._pins.add(RESTART, blob)
        for blob, status in self._layout.partials():
            if status.st_mtime < clock() - PARTIAL_AGE_S_MAX:
                unlink_quietly(self.disk, self._layout.partial(blob))
            else:
                self._partials[blob] = allocated(status.st_size)
                self._room.used_bytes += allocated(status.st_size)

    # ---- in ----

    async def put(self, *buffers: Buffer, durable: bool = False, owner: str = "") -> BlobId:
        """Store the concatenation of `buffers`, pinned for `owner` if one is given. Raises StoreFull, OSError.

        durable: it survives a power cut once this returns.
        """
        size = total_bytes(buffers)
        if size <= SMALL_BYTES_MAX and not durable:
            return self.put_now(buffers, owner)
        blob = await self.disk.run(blob_id, *buffers) if size > CHUNK_BYTES else blob_id(*buffers)
        synced = False
        if not await self.intact(blob):
            temp = self._layout.temp()
            await self._room.write(self.disk, size, lambda: files.write_file(self.disk, temp, buffers, sync=durable))
            synced = self._publish(temp, blob, size) and durable
        return await self._keep(blob, durable=durable, synced=synced, owner=owner)

    def put_now(self, buffers: Sequence[Buffer], owner: str = "") -> BlobId:
        """Store a small blob (at most SMALL_BYTES_MAX, else ValueError) without awaiting. Raises StoreFull, OSError.

        Once in a while it writes a pack of 8 MiB.
        """
        data = b"".join(buffers)
        if len(data) > SMALL_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes are no small blob")
        blob = blob_id(data)
        entry = self._entries.get(blob)
        if entry is not None and not entry.small and not self._unchanged(blob, entry):
            self._judge(blob, entry, self._hash_now(blob))
        if blob not in self._entries:
            while self._small.over:
                self._spill()
            self._small.put(blob, data)
            self._entries[blob] = _Entry(len(data), small=True)
        if owner:
            self.pin(owner, blob)
        self._touch(blob)
        return blob

    async def adopt(
        self, path: Path, durable: bool = False, owner: str = "", guard: bool = False, shared: bool = False
    ) -> BlobId:
        """Take over a file that someone wrote: hashed, then renamed into place (copied if it is on another file system or
        has other names). It is gone from `path` afterwards. Raises StoreFull (the file stays), OSError, ValueError (no
        regular file, or it changed meanwhile).

        guard: its writer isn't trusted and may still have it open; what is stored is a copy of our own. shared: under its
        other names it is only read from now on, so it need not be copied for their sake.
        """
        status = os.lstat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if size <= SMALL_BYTES_MAX and not durable:
            blob = self.put_now((files.read_range(self.disk, path, 0, size),), owner)
            self.disk.unlink(path)
            return blob
        temp = self._layout.temp()
        move = not guard and (shared or status.st_nlink == 1) and status.st_dev == self._layout.device
        blob = await self._room.write(
            self.disk, size, lambda: files.take_file(self.disk, path, temp, size, move=move, sync=durable)
        )
        synced = self._publish(temp, blob, size) and durable
        return await self._keep(blob, durable=durable, synced=synced, owner=owner)

    def open_writer(self, blob: BlobId, size: int) -> Writer:
        """Begin, or take up again, the fetch of a blob chunk by chunk. Raises StoreFull, OSError, ValueError."""
        if not 0 <= size <= BLOB_BYTES_MAX:
            raise ValueError(f"no blob has {size} bytes")
        if blob in self._writing:
            raise RuntimeError("this blob has a writer already")
        room, taken = self._room, allocated(size)
        room.release(self._partials.pop(blob, 0))
        room.reserve(taken)

        async def publish(path: Path, durable: bool, owner: str) -> None:
            synced = self._publish(path, blob, size) and durable
            await self._keep(blob, durable=durable, synced=synced, owner=owner)

        def ended(published: bool, kept: bool) -> None:
            self._writing.discard(blob)
            if kept:
                self._partials[blob] = taken
            elif not published:
                room.release(taken)

        try:
            writer = Writer(self.disk, room, self._layout.partial(blob), blob, size, publish, ended)
        except BaseException:
            room.release(taken)
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

    async def intact(self, blob: BlobId) -> bool:
        """Whether the blob is held and its file is what it should be; a damaged one is dropped."""
        entry = self._entries.get(blob)
        if entry is None or entry.small or self._unchanged(blob, entry):
            return entry is not None
        self._judge(blob, entry, await self.disk.run(self._hash_now, blob))
        return blob in self._entries

    async def path(self, blob: BlobId) -> Path | None:
        """A read-only file with the blob's content; None if it isn't held, or was damaged (then it is dropped).

        It stays until the blob is evicted: pin first. Raises StoreFull, OSError where a small blob needs a file first.
        """
        if not await self.intact(blob) or not await self._in_file(blob):
            return None
        self._touch(blob)
        return self._layout.path(blob)

    async def read(self, blob: BlobId, offset: int, length: int) -> bytes:
        """Bytes of a blob. Raises BlobMissing, or ValueError for a range that isn't inside it or is over 16 MiB."""
        if not await self.intact(blob):
            raise BlobMissing(blob.hex())
        size = self._entries[blob].size
        if offset < 0 or not 0 <= length <= READ_BYTES_MAX or offset + length > size:
            raise ValueError(f"[{offset}, {offset + length}) is no range of a blob of {size} bytes")
        self._touch(blob)
        data = self.read_now(blob)
        if data is not None:
            return data[offset : offset + length]
        return await self._from_file(blob, files.read_range, offset, length)

    def read_now(self, blob: BlobId) -> bytes | None:
        """All of a small blob if it is in memory or in a pack, else None."""
        entry = self._entries.get(blob)
        if entry is None or not entry.small:
            return None
        data = self._small.get(blob)
        if data is None:
            self._forget(blob)  # its pack was damaged
        return data

    async def chunk_hashes(self, blob: BlobId, first: int = 0, count: int = HASH_LIST_CHUNKS_MAX) -> bytes:
        """BLAKE3 of `count` chunks from `first` on (fewer at the end), 32 bytes each. Raises BlobMissing, ValueError."""
        if first < 0 or not 0 < count <= HASH_LIST_CHUNKS_MAX:
            raise ValueError(f"{count} chunks from {first} on are no part of a list")
        if not await self.intact(blob):
            raise BlobMissing(blob.hex())
        size = self._entries[blob].size
        last = min(first + count, chunk_count(size))
        if chunk_count(size) <= 1 or first >= last:
            return blob if first < last else b""
        key = (blob, first, last)
        hashes = self._hash_lists.get(key)
        if hashes is None:
            hashes = self._hash_lists[key] = await self._from_file(blob, files.hash_chunks, size, first, last)
            if len(self._hash_lists) > HASH_LISTS_MAX:
                self._hash_lists.popitem(last=False)
        return hashes

    async def serve(self, name: bytes, offset: int, length: int) -> bytes | None:
        """Answer another peer's read of a blob, or of its `hash_list_name`; None for what isn't here or makes no sense."""
        try:
            if len(name) == BLOB_ID_BYTES:
                return await self.read(BlobId(name), offset, length) if length <= CHUNK_BYTES else None
            if name[BLOB_ID_BYTES:] != HASH_LIST_SUFFIX or offset % BLOB_ID_BYTES or length % BLOB_ID_BYTES:
                return None
            blob = BlobId(name[:BLOB_ID_BYTES])
            hashes = await self.chunk_hashes(blob, offset // BLOB_ID_BYTES, length // BLOB_ID_BYTES)
            return hashes if len(hashes) == length else None
        except (BlobMissing, ValueError):
            return None

    # ---- keeping ----

    def pin(self, owner: str, blob: BlobId) -> None:
        """Keep a blob (held already, or as soon as it is) while `owner` wants it. Idempotent."""
        self._pins.add(owner, blob)
        self._idle.pop(blob, None)

    async def secure(self, blob: BlobId, owner: str) -> None:
        """Pin a blob that is held and see it through to the platter: it survives a power cut once this returns.

        Raises BlobMissing (it isn't held, or was damaged), StoreFull, OSError.
        """
        if not await self.intact(blob):
            raise BlobMissing(blob.hex())
        await self._keep(blob, durable=True, synced=False, owner=owner)

    def unpin(self, owner: str, blob: BlobId | None = None) -> None:
        """Drop one pin of `owner`, or all of them. What nobody pins may be evicted from now on."""
        for freed in self._pins.drop(owner, blob):
            self._touch(freed)

    def pinned(self, blob: BlobId) -> bool:
        """Whether anybody pins the blob."""
        return blob in self._pins

    def discard(self, blob: BlobId) -> bool:
        """Delete a blob unless it is pinned; whether it is gone."""
        if blob not in self._pins:
            self._forget(blob)
        return blob not in self._entries

    def leave_free(self, wanted: int) -> int:
        """Delete what nobody pins until the disk has so many free bytes, or none of it is left; return what is free then.

        The quota is a share of what was free at the start: since then others may have filled the disk.
        """
        free = self.disk.available_bytes(self.root)
        while free < wanted and self._room.free(wanted - free):
            free = self.disk.available_bytes(self.root)
        return free

    @property
    def quota_bytes(self) -> int:
        """Disk bytes it may take."""
        return self._room.quota_bytes

    @property
    def used_bytes(self) -> int:
        """Disk bytes taken (whole blocks), reservations included."""
        return self._room.used_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of small blobs in memory."""
        return self._small.memory_bytes

    def __iter__(self) -> Iterator[BlobId]:
        """Every blob held. The store must not change meanwhile."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # ---- files ----

    def _publish(self, temp: Path, blob: BlobId, size: int) -> bool:
        """Give a whole file, whose room is reserved, its name; whether it became the blob's file.

        Not awaiting: no eviction can come in between. A file that is there already stays, unless it is not known to be
        good (then ours, which is, takes its place).
        """
        entry = self._entries.get(blob)
        if entry is not None and not entry.small and self._unchanged(blob, entry):
            unlink_quietly(self.disk, temp)
            self._room.release(allocated(size))
            return False
        try:
            stamp = os.stat(temp).st_mtime_ns
            self.disk.replace(temp, self._layout.path(blob))
        except OSError:
            unlink_quietly(self.disk, temp)
            self._room.release(allocated(size))
            raise
        if entry is not None:
            self._room.release(self._small.drop(blob) if entry.small else allocated(entry.size))
        self._entries[blob] = _Entry(size, small=False, stamp=stamp)
        self._touch(blob)
        return True

    async def _keep(self, blob: BlobId, *, durable: bool, synced: bool, owner: str) -> BlobId:
        """Pin what was published just now or long ago, and see it through to the platter. synced: its content is there."""
        if owner:
            self.pin(owner, blob)
        self._touch(blob)
        if durable:
            self._keepers += 1
            keeper = f"keeper {self._keepers}"  # no eviction before it is durable
            self.pin(keeper, blob)
            try:
                await self._sync(blob, synced)
            finally:
                self.unpin(keeper)
        return blob

    async def _sync(self, blob: BlobId, synced: bool) -> None:
        if not await self._in_file(blob):
            raise BlobMissing(blob.hex())
        entry, path = self._entries[blob], self._layout.path(blob)
        if not entry.durable:
            if not synced:
                await self.disk.run(files.sync_file, self.disk, path)
            await self.disk.run(files.sync_folder, self.disk, path.parent)
            entry.durable = True

    async def _in_file(self, blob: BlobId) -> bool:
        """See to it that a blob has a file of its own; False if it got lost."""
        entry = self._entries.get(blob)
        if entry is None or not entry.small:
            return entry is not None
        data = self.read_now(blob)
        if data is None:
            return False
        temp = self._layout.temp()
        await self._room.write(self.disk, len(data), lambda: files.write_file(self.disk, temp, (data,), sync=False))
        self._publish(temp, blob, len(data))
        return True

    async def _from_file(self, blob: BlobId, read: Callable[..., bytes], *args: int) -> bytes:
        try:
            return await self.disk.run(lambda: read(self.disk, self._layout.path(blob), *args))
        except OSError:
            self._forget(blob)
            raise BlobMissing(blob.hex()) from None

    def _unchanged(self, blob: BlobId, entry: _Entry) -> bool:
        try:
            status = os.stat(self._layout.path(blob), follow_symlinks=False)
        except OSError:
            return False
        return entry.stamp == status.st_mtime_ns and entry.size == status.st_size

    def _hash_now(self, blob: BlobId) -> int | None:
        """The mtime of a file whose content matches its name, else None. Runs in threads."""
        path = self._layout.path(blob)
        try:
            stamp = os.stat(path, follow_symlinks=False).st_mtime_ns
            return stamp if files.hash_file(self.disk, path) == blob else None
        except OSError:
            return None

    def _judge(self, blob: BlobId, entry: _Entry, stamp: int | None) -> None:
        if stamp is not None:
            entry.stamp = stamp
        elif self._entries.get(blob) is entry:
            self._forget(blob)

    # ---- room ----

    def _touch(self, blob: BlobId) -> None:
        if blob in self._entries and blob not in self._pins and blob not in self._small.in_memory:
            self._idle[blob] = None
            self._idle.move_to_end(blob)

    def _forget(self, blob: BlobId) -> None:
        self._room.release(self._delete(blob))

    def _delete(self, blob: BlobId) -> int:
        """Delete a blob; return the disk bytes that freed (the caller gives them back)."""
        entry = self._entries.pop(blob, None)
        self._idle.pop(blob, None)
        if entry is None:
            return 0
        if entry.small:
            return self._small.drop(blob)
        unlink_quietly(self.disk, self._layout.path(blob))
        return allocated(entry.size)

    def _spill(self) -> None:
        """Move the oldest small blobs from memory to disk; where there is no room, drop those nobody pins."""
        reserved = allocated(min(self._small.memory_bytes, PACK_BYTES + SMALL_BYTES_MAX))
        try:
            self._room.reserve(reserved)
            try:
                spilled, taken = self._small.spill()
            except OSError as error:
                raise (self._room.disk_full(reserved) if files.is_full(error) else error) from None
            finally:
                self._room.release(reserved)
        except StoreFull:
            unpinned = [blob for blob in self._small.in_memory if blob not in self._pins]
            if not unpinned:
                raise
            for blob in unpinned:
                self._forget(blob)
            return
        self._room.used_bytes += taken
        for blob in spilled:
            self._touch(blob)

    def _free_partials(self, wanted: int) -> int:
        freed = 0
        while freed < wanted and self._partials:
            blob, size = self._partials.popitem(last=False)
            unlink_quietly(self.disk, self._layout.partial(blob))
            freed += size
        return freed

    def _free_idle(self, wanted: int) -> int:
        freed = 0
        while freed < wanted and self._idle:
            freed += self._delete(next(iter(self._idle)))
        return freed

    def _free_packs(self, wanted: int) -> int:
        try:
            return self._small.compact()
        except OSError:
            return 0  # no room to make room
