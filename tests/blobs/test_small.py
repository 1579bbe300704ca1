"""Small blobs: in memory, spilled, dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grid.blobs.blob import (
    SMALL_BYTES_MAX,
    BlobMissing,
    StoreFull,
    blob_id,
)
from grid.blobs.small import OVERHEAD_BYTES
from grid.blobs.store import BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import bytes_of, content


def spilling(make: Callable[..., BlobStore], blobs: int, **options: int) -> BlobStore:
    return make(memory_bytes_max=blobs * (1000 + OVERHEAD_BYTES), **options)


async def test_small_blobs_are_bounded_in_memory_and_spill_into_few_files(make: Callable[..., BlobStore]) -> None:
    store = spilling(make, 100)
    blobs = [store.put_now([bytes_of(1000, seed)]) for seed in range(1000)]
    assert store.memory_bytes <= 102 * (1000 + OVERHEAD_BYTES)
    assert len(list((store.root / "packs").iterdir())) <= 10
    for seed, blob in enumerate(blobs):
        assert await store.read(blob, 0, 1000) == bytes_of(1000, seed)
    assert len(list((store.root / "packs").iterdir())) <= 10, "reading moves nothing"
    assert await content(store, blobs[0]) == bytes_of(1000)


async def test_put_now_is_for_small_blobs(make: Callable[..., BlobStore]) -> None:
    with pytest.raises(ValueError, match="small"):
        make().put_now([bytes(SMALL_BYTES_MAX), b"x"])


async def test_packs_go_with_their_last_blob(make: Callable[..., BlobStore]) -> None:
    store = spilling(make, 10)
    blobs = [store.put_now([bytes_of(1000, seed)], owner="job") for seed in range(100)]
    assert store.used_bytes > 0
    store.unpin("job")
    for blob in blobs:
        assert store.discard(blob)
    assert store.used_bytes == 0
    assert list((store.root / "packs").iterdir()) == []
    assert store.memory_bytes == 0


async def test_sparse_packs_are_compacted_when_room_is_short(make: Callable[..., BlobStore]) -> None:
    store = spilling(make, 20, quota_bytes=200_000)
    kept = {}
    for seed in range(2000):  # 2 MB through a store of 200 kB; every 40th is needed for ever
        owner = "" if seed % 40 else "job"
        blob = store.put_now([bytes_of(1000, seed)], owner=owner)
        if owner:
            kept[blob] = seed
    for blob, seed in kept.items():
        assert await store.read(blob, 0, 1000) == bytes_of(1000, seed)
    assert store.used_bytes <= 200_000


async def test_small_blobs_all_pinned_are_store_full(make: Callable[..., BlobStore]) -> None:
    store = spilling(make, 10, quota_bytes=50_000)

    def overfill() -> None:
        for seed in range(100):
            store.put_now([bytes_of(1000, seed)], owner="job")

    with pytest.raises(StoreFull):
        overfill()
    store.unpin("job")
    store.put_now([b"goes on"], owner="job")


async def test_full_disk_drops_small_blobs_nobody_needs(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = spilling(make, 10)
    needed = store.put_now([b"needed"], owner="job")
    disk.free_bytes = 0
    for seed in range(100):
        store.put_now([bytes_of(1000, seed)])
    assert store.memory_bytes <= 12 * (1000 + OVERHEAD_BYTES)
    assert await store.read(needed, 0, 6) == b"needed"


async def test_damaged_pack_is_missing_not_wrong(make: Callable[..., BlobStore]) -> None:
    store = spilling(make, 10)
    blobs = [store.put_now([bytes_of(1000, seed)]) for seed in range(30)]
    for pack in (store.root / "packs").iterdir():
        pack.chmod(0o600)
        pack.write_bytes(bytes(pack.stat().st_size))
    missing = 0
    for seed, blob in enumerate(blobs):
        try:
            assert await store.read(blob, 0, 1000) == bytes_of(1000, seed)
        except BlobMissing:
            missing += 1
            assert not store.has(blob)
    assert 10 <= missing < 30


async def test_small_blob_that_got_a_file_leaves_memory(make: Callable[..., BlobStore]) -> None:
    store = make()
    data = [b"one", b"two"]
    for each in data:
        store.put_now([each])
    blob = await store.put(data[0], durable=True)
    assert await content(store, blob_id(data[1])) == data[1]
    assert store.memory_bytes == 0
    assert await store.read(blob, 0, 3) == data[0]
    assert store.read_now(blob) is None
