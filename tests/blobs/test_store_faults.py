"""The blob store when the disk is full or fails, after restarts and power cuts."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.blobs.blob import (
    SMALL_BYTES_MAX,
    BlobMissing,
    StoreFull,
    blob_id,
)
from grid.blobs.disk import allocated
from grid.blobs.store import RESTART, BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import BIG, bytes_of, bytes_on_disk, content, leftovers


async def test_full_disk_leaves_nothing_half_written(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    disk.free_bytes = BIG // 2
    for durable in (False, True):
        with pytest.raises(StoreFull, match="the disk is full"):
            await store.put(bytes_of(BIG), durable=durable)
    with pytest.raises(StoreFull, match="the disk is full"):
        await store.put(bytes_of(BIG // 2 + 1), durable=True)
    assert leftovers(store) == []
    assert store.used_bytes == 0
    assert len(store) == 0
    disk.free_bytes = BIG
    await store.put(bytes_of(BIG))


async def test_full_disk_evicts_and_tries_again(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    old = await store.put(bytes_of(BIG, 0))
    disk.free_bytes = BIG // 2
    new = await store.put(bytes_of(BIG, 1))
    assert not store.has(old)
    assert await content(store, new) == bytes_of(BIG, 1)


@pytest.mark.parametrize("operation", ["open", "pwrite", "fsync", "replace"])
async def test_failing_disk_is_an_error_and_leaves_nothing(
    make: Callable[..., BlobStore], disk: FaultyDisk, operation: str, tmp_path: Path
) -> None:
    store = make()
    disk.broken = {operation}
    with pytest.raises(OSError, match="Input/output") as caught:
        await store.put(bytes_of(BIG), durable=True)
    assert caught.value.errno == errno.EIO
    disk.broken = set()
    assert leftovers(store) == []
    assert store.used_bytes == 0
    blob = await store.put(bytes_of(BIG), durable=True)
    assert await content(store, blob) == bytes_of(BIG)


@pytest.mark.parametrize("operation", ["open", "fsync", "replace"])
async def test_failing_adopt_loses_no_file(
    make: Callable[..., BlobStore], disk: FaultyDisk, operation: str, tmp_path: Path
) -> None:
    store = make()
    spool = tmp_path / "spool"
    spool.write_bytes(bytes_of(BIG))
    disk.broken = {operation}
    with pytest.raises(OSError, match="Input/output"):
        await store.adopt(spool, durable=True)
    disk.broken = set()
    assert store.used_bytes == 0
    if operation == "replace":
        assert spool.exists()
    spool.write_bytes(bytes_of(BIG))
    await store.adopt(spool, durable=True)


async def test_unreadable_blob_is_dropped(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    blob = await store.put(bytes_of(BIG))
    disk.broken = {"pread"}
    with pytest.raises(BlobMissing):
        await store.read(blob, 0, 1)
    assert not store.has(blob)
    assert store.used_bytes == 0


# ---- restart and power loss ----


async def test_restart_finds_blobs_and_cleans_up(make: Callable[..., BlobStore]) -> None:
    store = make()
    kept = [await store.put(bytes_of(BIG, 1)), await store.put(b"small", durable=True)]
    lost = await store.put(b"in memory only")
    (store.root / "tmp" / "7").write_bytes(b"half")
    (store.root / "packs" / "0").write_bytes(b"pack")
    (store.root / "00" / "README").write_bytes(b"not ours")
    used = store.used_bytes
    store = make()
    assert sorted(store) == sorted(kept)
    assert not store.has(lost)
    assert store.used_bytes == used
    assert leftovers(store) == []
    assert list((store.root / "packs").iterdir()) == []
    assert (store.root / "00" / "README").exists()
    assert await store.read(kept[1], 0, 5) == b"small"


async def test_restart_keeps_all_until_jobs_are_read_again(make: Callable[..., BlobStore]) -> None:
    quota = 2 * allocated(BIG)
    store = make(quota_bytes=quota)
    blobs = [await store.put(bytes_of(BIG, seed)) for seed in range(2)]
    store = make(quota_bytes=quota)
    with pytest.raises(StoreFull):
        await store.put(bytes_of(BIG, 2))
    store.pin("job", blobs[0])
    store.unpin(RESTART)
    await store.put(bytes_of(BIG, 2))
    assert [store.has(blob) for blob in blobs] == [True, False]


async def test_durable_put_survives_power_loss(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    blobs = [
        await store.put(bytes_of(BIG, 1), durable=True),
        await store.put(b"small", durable=True),
    ]
    for first in (False, True):  # made durable afterwards
        data = bytes_of(BIG, 2) if first else b"small too"
        await store.put(data)
        blobs.append(await store.put(data, durable=True))
    disk.lose_power()
    store = make()
    assert sorted(store) == sorted(blobs)
    for blob in blobs:
        assert blob_id(await content(store, blob)) == blob


async def test_durable_adopt_survives_power_loss(tmp_path: Path, make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    spool = tmp_path / "spool"
    spool.write_bytes(bytes_of(BIG))
    blob = await store.adopt(spool, durable=True)
    assert [line for line in disk.log if line.startswith(("fsync", "replace"))][-3:] == [
        f"fsync {1}",
        f"replace {blob.hex()[:2]}",
        f"fsync {blob.hex()[:2]}",
    ]
    disk.lose_power()
    assert await content(make(), blob) == bytes_of(BIG)


async def test_torn_blob_is_dropped_at_first_use(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    store = make()
    blob = await store.put(bytes_of(BIG))
    disk._renamed.clear()  # the name made it to the disk, the content didn't
    disk.lose_power()
    store = make()
    assert store.has(blob)
    assert await store.path(blob) is None
    assert not store.has(blob)
    assert store.used_bytes == 0
    assert await content(store, await store.put(bytes_of(BIG))) == bytes_of(BIG)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("use", ["path", "read", "serve", "chunk_hashes", "put", "put_now"])
async def test_flipped_bit_is_found_by_every_use(make: Callable[..., BlobStore], restart: bool, use: str) -> None:
    store = make()
    data = bytes_of(SMALL_BYTES_MAX)
    blob = await store.put(data, durable=True)
    path = await store.path(blob)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, (1, 1))
    if restart:
        store = make()
    if use == "path":
        assert await store.path(blob) is None
    elif use == "read":
        with pytest.raises(BlobMissing):
            await store.read(blob, 0, 1)
    elif use == "serve":
        assert await store.serve(blob, 0, 1) is None
    elif use == "chunk_hashes":
        with pytest.raises(BlobMissing):
            await store.chunk_hashes(blob)
    else:
        await store.put(data, durable=True) if use == "put" else store.put_now([data])
        assert await store.read(blob, 0, len(data)) == data
        assert await content(store, blob) == data
        return
    assert not store.has(blob)


async def test_adopted_file_takes_the_place_of_a_damaged_one(make: Callable[..., BlobStore], tmp_path: Path) -> None:
    store = make()
    blob = await store.put(bytes_of(BIG))
    path = await store.path(blob)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"short now")
    spool = tmp_path / "spool"
    spool.write_bytes(bytes_of(BIG))
    await store.adopt(spool)
    assert await content(store, blob) == bytes_of(BIG)
    assert store.used_bytes == bytes_on_disk(store.root)


# ---- anything goes ----


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.booleans()), max_size=40), st.integers(0, 400_000))
def test_any_history_keeps_the_books(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]], quota: int
) -> None:
    """Whatever is put, pinned, dropped: used_bytes is what is on disk, pinned content is all there, nothing is wrong."""
    root = tmp_path_factory.mktemp("history")
    sizes = [0, 10, 5000, SMALL_BYTES_MAX, BIG, 100_000]
    data = [bytes_of(size, size) for size in sizes]

    async def run() -> None:
        store = BlobStore(root, quota, disk=FaultyDisk(), memory_bytes_max=20_000)
        pinned: set[int] = set()
        for action, which, flag in steps:
            blob = blob_id(data[which])
            try:
                if action <= 2:
                    await store.put(data[which], durable=flag, owner="job" if action == 2 else "")
                    if action == 2:
                        pinned.add(which)
                elif action == 3:
                    store.unpin("job", blob)
                    pinned.discard(which)
                elif action == 4:
                    store.discard(blob)
                elif action == 5:
                    await store.path(blob)
                elif store.has(blob):
                    assert await store.read(blob, 0, sizes[which]) == data[which]
            except StoreFull:
                pass
            assert store.used_bytes == bytes_on_disk(root) <= quota
            for each in pinned:
                assert await store.read(blob_id(data[each]), 0, sizes[each]) == data[each]

    trio.run(run)


async def test_many_tasks_at_once_on_a_real_disk(tmp_path: Path) -> None:
    """Threads, evictions and doubles together: contents are right, the books too, nothing is left over."""
    store = BlobStore(tmp_path, 20 * allocated(BIG), memory_bytes_max=20_000)
    data = [bytes_of(size, seed) for seed in range(8) for size in (500, 5000, BIG, 2 * BIG)]

    async def use(seed: int) -> None:
        rng = random.Random(seed)
        owner = str(seed)
        for number in range(40):
            each = rng.choice(data)
            try:
                if rng.random() < 0.3:
                    spool = tmp_path / "tmp" / f"spool-{seed}-{number}"
                    spool.write_bytes(each)
                    blob = await store.adopt(spool, owner=owner)
                else:
                    blob = await store.put(each, durable=rng.random() < 0.2, owner=owner)
                assert await store.read(blob, 0, len(each)) == each
                if rng.random() < 0.3:
                    assert await content(store, blob) == each
            except StoreFull:
                (tmp_path / "tmp" / f"spool-{seed}-{number}").unlink(missing_ok=True)
            store.unpin(owner)

    async with trio.open_nursery() as nursery:
        for seed in range(8):
            nursery.start_soon(use, seed)
    assert leftovers(store) == []
    assert store.used_bytes == bytes_on_disk(tmp_path)
    assert store.used_bytes <= 20 * allocated(BIG)
