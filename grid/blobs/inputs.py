"""A job's input files on this peer: extracted from their packs below one folder when a task first opens them.

Rules this file keeps:

- a file is at its place whole, read-only, and only after its pack was verified; asking again costs a stat;
- a pack is extracted by one task at a time; with a file come, bounded, those that others wait for and its neighbours in the pack,
  as they are wanted next;
- names come from a checked manifest (manifest.py), files are written without following links (extract.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from grid.blobs.blob import BlobId, StoreFull
from grid.blobs.disk import is_full
from grid.blobs.extract import Extractor
from grid.blobs.manifest import InputFile, Manifest, Pack
from grid.blobs.store import BlobStore

NEIGHBOURS_MAX = 256
"""Files extracted together: about 20 ms."""
NEIGHBOURS_BYTES_MAX = 16 << 20
"""No neighbour is extracted beyond this: it would delay the file that was asked for."""


class BlobPaths(Protocol):
    """Where packs come from: the job's data, or anything with holders to ask."""

    def path(self, blob: bytes, size: int, /) -> Awaitable[Path]:
        """A verified file with the blob, fetched if need be, that stays while the job does."""


class InputTree:
    """Made by `open`."""

    def __init__(self, store: BlobStore, blobs: BlobPaths, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._store = store
        self._blobs = blobs
        self._done: set[str] = set()  # extracted by this process: what stood there before is not trusted
        self._locks: dict[BlobId, trio.Lock] = {}
        self._waiting: dict[BlobId, dict[str, None]] = {}  # files asked for and not extracted, while somebody extracts others

    @classmethod
    async def open(cls, store: BlobStore, blobs: BlobPaths, manifest: Path, folder: Path) -> InputTree:
        """Read the manifest, make the folder. Raises ValueError (not a manifest we would follow), OSError."""
        checked = await store.disk.run(Manifest.read, manifest)
        await store.disk.run(lambda: folder.mkdir(parents=True, exist_ok=True))
        return cls(store, blobs, checked, folder)

    async def materialize(self, name: str) -> Path:
        """The path of an input file, made if need be.

        Raises FileNotFoundError (not in the manifest), StoreFull, OSError, and whatever the pack's fetch raises.
        """
        file = self.manifest.files.get(name)
        if file is None:
            raise FileNotFoundError(f"{name!r} is not among the job's input files: add it with --file")
        pack = self.manifest.packs[file.pack]
        if name not in self._done:
            self._waiting.setdefault(pack.blob, {})[name] = None
        async with self._locks.setdefault(pack.blob, trio.Lock()):
            if not (name in self._done and self._present(file)):
                path = await self._blobs.path(pack.blob, pack.size)
                await self._extract(pack, path, self._with_neighbours(pack, file))
        return self.folder / name

    async def prefetch(self, blob: bytes) -> None:
        """Bring a pack here; any other blob's name is none of our business. Raises what its fetch raises."""
        pack = self.manifest.packs.get(BlobId(blob))
        if pack is not None:
            await self._blobs.path(pack.blob, pack.size)

    def _present(self, file: InputFile) -> bool:
        """Whether what we extracted is still there. Not in a thread: that would cost fifty times the stat."""
        try:
            status = os.lstat(self.folder / file.name)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == file.size and not status.st_mode & 0o222

    def _with_neighbours(self, pack: Pack, file: InputFile) -> list[InputFile]:
        """The file, what others wait for, and what follows in the pack; of these what wasn't extracted yet."""
        wanted = {file.name: file}
        room = NEIGHBOURS_BYTES_MAX - file.size
        start = pack.positions[file.name]
        asked = self._waiting.get(pack.blob, {})
        waiting = sorted(map(pack.positions.__getitem__, asked))
        for at in (*waiting, *range(start + 1, min(start + 1 + NEIGHBOURS_MAX, len(pack.files)))):
            other = pack.files[at]
            if other.name in self._done or other.name in wanted:
                continue
            room -= other.size
            if room < 0 or len(wanted) > NEIGHBOURS_MAX:
                break
            wanted[other.name] = other
        for name in wanted:
            asked.pop(name, None)
        return list(wanted.values())

    async def _extract(self, pack: Pack, path: Path, wanted: list[InputFile]) -> None:
        try:
            await self._store.disk.run(_extract, self.folder, path, wanted, pack.is_one_file)
        except OSError as error:
            if is_full(error):
                raise StoreFull(self.folder, sum(f.size for f in wanted), "the disk is full; free some space") from None
            raise
        self._done.update(file.name for file in wanted)


def _extract(folder: Path, path: Path, wanted: Sequence[InputFile], whole: bool) -> None:
    extractor = Extractor(folder)
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for file in wanted:
                extractor.extract(path, source, file, whole=whole)
        finally:
            os.close(source)
    finally:
        extractor.close()
