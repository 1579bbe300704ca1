"""A blob that arrives chunk by chunk, in any order, and can be taken up again after a crash.

Rules this file keeps:

- the file stands under `partial/` until all of it hashes to the blob's name, only then it is renamed into the store;
- which chunks are there is not written down anywhere: after a restart the file is compared with the list of chunk
  hashes, so a torn or lost write is merely a chunk that is missing;
- chunks are numbered as `chunk_span` has them; a chunk is written only if it has the hash it should have.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from blake3 import blake3

from grid.blobs.blob import BLOB_ID_BYTES, BadBlob, BlobId, chunk_count, chunk_span
from grid.blobs.disk import FILE_MODE, Disk, hash_file, unlink_quietly, write_all
from grid.blobs.room import Room
from grid.core.ranges import RangeSet


class Writer:
    """From `BlobStore.open_writer`. End it by `publish`, `close` (what is there stays for later) or `discard`."""

    def __init__(
        self,
        disk: Disk,
        room: Room,
        path: Path,
        blob: BlobId,
        size: int,
        publish: Callable[[Path, bool, str], Awaitable[None]],
        ended: Callable[[bool, bool], None],
    ) -> None:
        self.blob = blob
        self.size = size
        self.chunks = chunk_count(size)
        self.have = RangeSet()  # chunks that are on disk and good
        self._disk = disk
        self._room = room
        self._path = path
        self._publish = publish
        self._ended = ended
        self._fresh = not path.exists()  # nothing to find there
        self._fd = disk.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._fd, size)

    async def recheck(self, hashes: bytes) -> None:
        """Make `have` the chunks on disk that match this list (32 bytes a chunk)."""
        if len(hashes) != self.chunks * BLOB_ID_BYTES:
            raise ValueError("not a list of this blob's chunk hashes")
        self.have.clear()
        if not self._fresh:
            self.have.update(await self._disk.run(self._matching, hashes))

    async def write(self, index: int, data: bytes, digest: bytes) -> bool:
        """Write one chunk if its hash is `digest`; False if it isn't. Raises StoreFull, OSError.

        Other writes may be under way in threads: whoever began them ends the writer once all are through.
        """
        offset, length = chunk_span(self.size, index)
        if len(data) != length:
            return False
        good = await self._room.retry(self._disk, length, lambda: self._write(offset, data, digest))
        if good:
            self._fresh = False
            self.have.add(index, index + 1)
        return good

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self.have.covers(0, self.chunks)

    async def publish(self, durable: bool = False, owner: str = "") -> None:
        """Check all of it against the blob's name and make it part of the store. Raises BadBlob (still open), OSError."""
        found = await self._disk.run(self._whole, durable)
        if found != self.blob:
            self.have.clear()
            raise BadBlob(f"{found.hex()[:12]} came for blob {self.blob.hex()[:12]}")
        self._shut()
        self._ended(True, False)
        await self._publish(self._path, durable, owner)

    def close(self) -> None:
        """End for now; chunks that are there are kept for the next writer. Idempotent."""
        if self._fd >= 0:
            self._shut()
            keep = bool(self.have)
            if not keep:
                unlink_quietly(self._disk, self._path)
            self._ended(False, keep)

    def discard(self) -> None:
        """End and delete. Idempotent."""
        self.have.clear()
        self.close()

    def _shut(self) -> None:
        self._disk.close(self._fd)
        self._fd = -1

    def _write(self, offset: int, data: bytes, digest: bytes) -> bool:
        if blake3(data).digest() != digest:
            return False
        write_all(self._disk, self._fd, data, offset)
        return True

    def _whole(self, durable: bool) -> BlobId:
        found = hash_file(self._disk, self._path)
        if found == self.blob:
            os.fchmod(self._fd, FILE_MODE)
            if durable:
                self._disk.fsync(self._fd)
        return found

    def _matching(self, hashes: bytes) -> list[tuple[int, int]]:
        found = []
        for index in range(self.chunks):
            offset, length = chunk_span(self.size, index)
            data = self._disk.pread(self._fd, length, offset)
            at = index * BLOB_ID_BYTES
            if len(data) == length and blake3(data).digest() == hashes[at : at + BLOB_ID_BYTES]:
                found.append((index, index + 1))
        return found
