"""Shared by the blob tests."""

from __future__ import annotations

import random
from pathlib import Path

from grid.blobs.blob import SMALL_BYTES_MAX, BlobId
from grid.blobs.disk import allocated
from grid.blobs.store import BlobStore

GIB = 1 << 30
BIG = SMALL_BYTES_MAX + 1
"""The smallest size that gets a file at once."""


def bytes_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def leftovers(store: BlobStore) -> list[str]:
    return [str(p.relative_to(store.root)) for name in ("tmp", "partial") for p in (store.root / name).iterdir()]


async def content(store: BlobStore, blob: BlobId) -> bytes:
    path = await store.path(blob)
    assert path is not None
    return path.read_bytes()


def bytes_on_disk(root: Path) -> int:
    return sum(allocated(p.stat().st_size) for p in root.rglob("*") if p.is_file())
