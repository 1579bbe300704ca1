"""Where the store's files stand: `root/ab/cdef…` blobs, `partial/` unfinished fetches, `tmp/` and `packs/` scratch.

Scratch is emptied at the start; nothing that was not put there by a store is ever deleted or looked into.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from grid.blobs.blob import BlobId, blob_id_from_hex
from grid.blobs.disk import Disk, sync_folder

SHARDS = tuple(f"{number:02x}" for number in range(256))
"""One folder for each first byte, all made at once: a million blobs are 4,000 files a folder."""


class Layout:
    """Paths under `root`. Making one creates the folders and empties scratch; raises OSError."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self.packs = root / "packs"
        self._tmp = root / "tmp"
        self._partial = root / "partial"
        self._temps = 0
        for scratch in (self._tmp, self.packs):
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in (self._tmp, self.packs, self._partial, *(root / shard for shard in SHARDS)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.device = os.stat(self._tmp).st_dev
        sync_folder(disk, root)

    def path(self, blob: BlobId) -> Path:
        """The file of a blob."""
        name = blob.hex()
        return self.root / name[:2] / name[2:]

    def partial(self, blob: BlobId) -> Path:
        """The file of a fetch that isn't finished."""
        return self._partial / blob.hex()

    def temp(self) -> Path:
        """A new name for a file that is being written."""
        self._temps += 1
        return self._tmp / str(self._temps)

    def blobs(self) -> list[tuple[BlobId, os.stat_result]]:
        """Every blob's file, oldest first."""
        found = [each for shard in SHARDS for each in _named_files(self.root / shard, shard)]
        return sorted(found, key=lambda each: each[1].st_mtime_ns)

    def partials(self) -> list[tuple[BlobId, os.stat_result]]:
        """Every unfinished fetch's file, oldest first."""
        return sorted(_named_files(self._partial, ""), key=lambda each: each[1].st_mtime_ns)


def _named_files(folder: Path, prefix: str) -> Iterator[tuple[BlobId, os.stat_result]]:
    with os.scandir(folder) as found:
        for file in found:
            if file.is_file(follow_symlinks=False):
                try:
                    blob = blob_id_from_hex(prefix + file.name)
                except ValueError:
                    continue  # not ours
                yield blob, file.stat(follow_symlinks=False)
