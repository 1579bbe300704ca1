"""The blob store on a real folder: what goes in comes out, what is pinned stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from grid.blobs.blob import (
    BLOB_ID_BYTES,
    CHUNK_BYTES,
    SMALL_BYTES_MAX,
    BlobMissing,
    StoreFull,
    blob_id,
    blob_id_from_hex,
    hash_list_name,
)
from grid.blobs.disk import allocated
from grid.blobs.store import RESTART, BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import BIG, GIB, bytes_of, content, leftovers


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES_MAX, BIG, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("durable", [False, True])
async def test_put_is_read_back(tmp_path: Path, size: int, durable: bool) -> None:
    store = BlobStore(tmp_path, GIB)
    data = bytes_of(size)
    blob = await store.put(memoryview(data)[: size // 2], data[size // 2 :], durable=durable)
    assert blob == blob_id(data)
    assert store.has(blob)
    assert store.size(blob) == size
    assert await store.read(blob, 0, size) == data
    assert await store.read(blob, size // 3, size // 3) == data[size // 3 : 2 * (size // 3)]
    assert await content(store, blob) == data
    assert leftovers(store) == []


async def test_published_files_are_read_only(make: Callable[..., BlobStore]) -> None:
    store = make()
    for blob in [await store.put(bytes_of(BIG)), await store.put(b"x", durable=True), await store.put(b"small")]:
        path = await store.path(blob)
        assert path is not None
        assert path.stat().st_mode & 0o777 == 0o444


async def test_what_nobody_pins_goes_while_others_fill_the_disk(tmp_path: Path) -> None:
    class Crowded(FaultyDisk):
        def available_bytes(self, folder: Path) -> int:
            return 100 * BIG - sum(allocated(file.stat().st_size) for file in folder.rglob("*") if file.is_file()) - others

    others = 0
    store = BlobStore(tmp_path, GIB, disk=Crowded())
    blobs = [await store.put(bytes([number]) * BIG, owner="job" if number == 3 else "") for number in range(5)]
    begun = store.leave_free(90 * BIG)
    assert begun >= 90 * BIG
    assert all(store.has(blob) for blob in blobs)
    others = begun - 2 * BIG
    assert store.leave_free(2 * BIG) == 2 * BIG
    assert all(store.has(blob) for blob in blobs)
    assert store.leave_free(2 * BIG + 1) >= 2 * BIG + 1
    assert [store.has(blob) for blob in blobs] == [False, True, True, True, True]  # the one unused for longest went
    assert store.leave_free(100 * BIG) < 100 * BIG
    assert [store.has(blob) for blob in blobs] == [False, False, False, True, False]
    assert store.used_bytes == allocated(BIG)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_file_with_other_names_is_copied_unless_they_are_only_read(tmp_path: Path, shared: bool) -> None:
    store = BlobStore(tmp_path / "store", GIB)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.write_bytes(bytes_of(BIG))
    ours.hardlink_to(theirs)
    blob = await store.adopt(ours, durable=True, shared=shared)
    assert blob == blob_id(bytes_of(BIG))
    assert not ours.exists()
    path = await store.path(blob)
    assert path is not None
    assert path.samefile(theirs) == shared
    theirs.unlink()
    assert await content(store, blob) == bytes_of(BIG)


async def test_same_content_is_stored_once(make: Callable[..., BlobStore]) -> None:
    store = make()
    blobs = set()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(lambda: store.put(bytes_of(BIG)))
    blobs.add(await store.put(bytes_of(BIG)))
    assert len(store) == len(blobs) == 1
    assert store.used_bytes == allocated(BIG)
    assert leftovers(store) == []


async def test_short_writes_are_continued(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    disk.write_bytes_max = 1000
    store = make()
    data = bytes_of(BIG)
    assert await content(store, await store.put(data)) == data


async def test_read_outside_is_an_error(make: Callable[..., BlobStore]) -> None:
    store = make()
    blob = await store.put(b"abc")
    for offset, length in [(-1, 2), (0, 4), (3, 1), (0, -1)]:
        with pytest.raises(ValueError, match="range"):
            await store.read(blob, offset, length)
    with pytest.raises(BlobMissing):
        await store.read(blob_id(b"other"), 0, 1)
    assert await store.path(blob_id(b"other")) is None


async def test_serve_answers_peers_and_never_raises(make: Callable[..., BlobStore]) -> None:
    store = make()
    data = bytes_of(2 * CHUNK_BYTES + 5)
    blob = await store.put(data)
    assert await store.serve(blob, CHUNK_BYTES, CHUNK_BYTES) == data[CHUNK_BYTES : 2 * CHUNK_BYTES]
    hashes = b"".join(blob_id(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES))
    name = hash_list_name(blob)
    assert await store.serve(name, 0, 3 * BLOB_ID_BYTES) == hashes
    assert await store.serve(name, BLOB_ID_BYTES, BLOB_ID_BYTES) == hashes[BLOB_ID_BYTES : 2 * BLOB_ID_BYTES]
    small = await store.put(b"abc")
    assert await store.serve(hash_list_name(small), 0, BLOB_ID_BYTES) == small
    for bad_name, offset, length in [
        (b"", 0, 1),
        (blob[:-1], 0, 1),
        (blob + b"?", 0, 32),
        (blob_id(b"?"), 0, 1),
        (blob, 0, CHUNK_BYTES + 1),
        (blob, len(data), 1),
        (blob, -1, 1),
        (name, 1, 32),
        (name, 0, 33),
        (name, 0, 0),
        (name, 0, 4 * 32),
        (name, -32, 32),
        (name, 0, 1 << 40),
    ]:
        assert await store.serve(bad_name, offset, length) is None


def test_blob_names() -> None:
    blob = blob_id(b"x")
    assert blob_id_from_hex(blob.hex()) == blob
    for text in ["", blob.hex()[:-1], blob.hex().upper(), "../" + blob.hex()[3:], "é" * 64]:
        with pytest.raises(ValueError, match="no blob name"):
            blob_id_from_hex(text)


# ---- adopt ----


@pytest.mark.parametrize("size", [0, 10, BIG, 3 * CHUNK_BYTES + 7])
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("guard", [False, True])
async def test_adopt_takes_the_file_over(tmp_path: Path, size: int, durable: bool, guard: bool) -> None:
    store = BlobStore(tmp_path / "blobs", GIB)
    data = bytes_of(size)
    spool = tmp_path / "spool"
    spool.write_bytes(data)
    blob = await store.adopt(spool, durable=durable, guard=guard)
    assert blob == blob_id(data)
    assert not spool.exists()
    assert await content(store, blob) == data
    path = await store.path(blob)
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o444
    assert leftovers(store) == []
    assert store.used_bytes == allocated(size)


async def test_adopt_moves_and_guarded_copies(tmp_path: Path, make: Callable[..., BlobStore]) -> None:
    store = make()
    for guard in (False, True):
        spool = tmp_path / "spool"
        spool.write_bytes(bytes_of(BIG, guard))
        with spool.open("r+b") as still_open:
            path = await store.path(await store.adopt(spool, guard=guard))
            assert path is not None
            assert (path.stat().st_ino == os.fstat(still_open.fileno()).st_ino) is not guard


async def test_adopt_file_with_another_name_copies(tmp_path: Path, make: Callable[..., BlobStore]) -> None:
    store = make()
    spool, twin = tmp_path / "spool", tmp_path / "twin"
    spool.write_bytes(bytes_of(BIG))
    os.link(spool, twin)
    path = await store.path(await store.adopt(spool))
    assert path is not None
    assert path.stat().st_ino != twin.stat().st_ino


async def test_adopt_from_another_file_system(make: Callable[..., BlobStore]) -> None:
    shm = Path("/dev/shm")
    store = make()
    if not os.access(shm, os.W_OK) or os.stat(shm).st_dev == os.stat(store.root).st_dev:
        pytest.skip("there is no second file system")
    spool = shm / f"grid-test-{os.getpid()}"
    spool.write_bytes(bytes_of(BIG))
    try:
        assert await content(store, await store.adopt(spool)) == bytes_of(BIG)
        assert not spool.exists()
    finally:
        spool.unlink(missing_ok=True)


async def test_adopt_refuses_what_is_no_file(tmp_path: Path, make: Callable[..., BlobStore]) -> None:
    store = make()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes_of(BIG))
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "blobs"):
        with pytest.raises(ValueError, match="regular file"):
            await store.adopt(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        await store.adopt(tmp_path / "nothing")
    assert secret.stat().st_mode & 0o200
    assert store.used_bytes == 0


async def test_adopt_of_a_known_blob_leaves_one_file(tmp_path: Path, make: Callable[..., BlobStore]) -> None:
    store = make()
    await store.put(bytes_of(BIG))
    spool = tmp_path / "spool"
    spool.write_bytes(bytes_of(BIG))
    await store.adopt(spool, durable=True)
    assert store.used_bytes == allocated(BIG)
    assert not spool.exists()
    assert leftovers(store) == []


async def test_adopt_into_a_full_store_leaves_the_file(tmp_path: Path, make: Callable[..., BlobStore]) -> None:
    store = make(quota_bytes=BIG)
    spool = tmp_path / "spool"
    spool.write_bytes(bytes_of(2 * BIG))
    with pytest.raises(StoreFull):
        await store.adopt(spool)
    assert spool.read_bytes() == bytes_of(2 * BIG)


# ---- quota ----


async def test_quota_evicts_the_least_recently_used(make: Callable[..., BlobStore]) -> None:
    store = make(quota_bytes=3 * allocated(BIG))
    a, b, c = [await store.put(bytes_of(BIG, seed)) for seed in range(3)]
    await store.read(a, 0, 1)
    d = await store.put(bytes_of(BIG, 3))
    assert [store.has(blob) for blob in (a, b, c, d)] == [True, False, True, True]
    assert await store.path(b) is None
    assert store.used_bytes == 3 * allocated(BIG)


async def test_quota_never_evicts_pinned(make: Callable[..., BlobStore]) -> None:
    store = make(quota_bytes=2 * allocated(BIG))
    a = await store.put(bytes_of(BIG, 0), owner="job")
    b = await store.put(bytes_of(BIG, 1), owner="job")
    store.pin("other", b)
    with pytest.raises(StoreFull, match=r"blobs for \d+ bytes: .* raise the quota") as caught:
        await store.put(bytes_of(BIG, 2))
    assert "\n" not in str(caught.value)
    assert str(store.root) in str(caught.value)
    assert leftovers(store) == []
    store.unpin("job")
    await store.put(bytes_of(BIG, 2))
    assert not store.has(a)
    assert store.has(b)
    assert store.pinned(b)
    assert not store.discard(b)
    store.unpin("other", b)
    assert store.discard(b)
    assert store.used_bytes == allocated(BIG)


async def test_pin_comes_before_the_blob(make: Callable[..., BlobStore]) -> None:
    store = make(quota_bytes=allocated(BIG))
    store.pin("job", blob_id(bytes_of(BIG)))
    blob = await store.put(bytes_of(BIG))
    with pytest.raises(StoreFull):
        await store.put(bytes_of(BIG, 1))
    assert store.has(blob)


async def test_too_large_for_the_quota_evicts_nothing(make: Callable[..., BlobStore]) -> None:
    store = make(quota_bytes=2 * allocated(BIG))
    blob = await store.put(bytes_of(BIG))
    with pytest.raises(StoreFull):
        await store.put(bytes_of(4 * BIG))
    assert store.has(blob)


# ---- figures ----


async def test_adopt_and_hash_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints; asserts no time."""
    store = BlobStore(tmp_path / "blobs", GIB)
    spool = tmp_path / "spool"
    block = bytes_of(1 << 20)
    with spool.open("wb") as file:
        for _ in range(300):
            file.write(block)

    async def measure(what: str, size_mb: int, step: Callable[[], object]) -> None:
        start = time.perf_counter()
        result = step()
        if hasattr(result, "__await__"):
            await result
        elapsed = time.perf_counter() - start
        with capsys.disabled():
            print(f"\n  {what}: {size_mb / elapsed:,.0f} MB/s ({elapsed * 1e3:.1f} ms)", end="")

    await measure("adopt 300 MB", 300, lambda: store.adopt(spool))
    blob = next(iter(store))
    store = BlobStore(tmp_path / "blobs", GIB)
    await measure("first use after a restart", 300, lambda: store.path(blob))
    path = await store.path(blob)
    assert path is not None
    os.link(path, spool)
    store.unpin(RESTART)
    assert store.discard(blob)
    await measure("adopt 300 MB, guarded copy", 300, lambda: store.adopt(spool, guard=True))
    assert store.has(blob)
    big = bytes(64 << 20)
    await measure("put 64 MB", 64, lambda: store.put(big))
    small = [bytes_of(1000, seed) for seed in range(5000)]
    await measure("5,000 small puts of 1 kB", 5, lambda: [store.put_now([each]) for each in small])
