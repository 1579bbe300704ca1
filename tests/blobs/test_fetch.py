"""Who may ask: callers that share a transfer, batches, full disks; in virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from dht.core.identity import PeerId
from grid.blobs import transfer
from grid.blobs.blob import (
    CHUNK_BYTES,
    BlobId,
    BlobMissing,
    BlobUnavailable,
    StoreFull,
    blob_id,
)
from grid.blobs.fetch import FETCHES_MAX, Fetcher, Wanted
from grid.blobs.store import BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import GIB, bytes_of, leftovers
from tests.blobs.world import (
    BLOB,
    CHUNKS,
    DATA,
    A,
    B,
    World,
    gone,
    honest,
    stalled,
)

MakeStore = Callable[..., BlobStore]


@pytest.fixture
def store(make: MakeStore) -> BlobStore:
    return make()


# ---- sharing ----


async def test_callers_share_one_transfer(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=honest)
    fetcher = Fetcher(store, world.read)
    paths = []

    async def call(owner: str) -> None:
        paths.append(await fetcher.fetch(BLOB, len(DATA), world.holders, owner=owner))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(call, str(number))
    assert len(set(paths)) == 1
    assert len(world.asked) == CHUNKS
    for number in range(5):
        assert store.pinned(BLOB)
        store.unpin(str(number))
    assert not store.pinned(BLOB)
    assert fetcher._shared == {}


async def test_cancelled_caller_does_not_cancel_the_other(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=honest)
    world.latency_s = 1.0
    fetcher = Fetcher(store, world.read)
    done = []

    async def call(patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            done.append((await fetcher.fetch(BLOB, len(DATA), world.holders)).read_bytes() == DATA)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, 2.5)  # the list after 1 s, four chunks after 2 s, then cancelled
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(call, 100)
    assert done == [True]
    offsets = Counter(offset for _, offset in world.asked)
    assert sorted(offsets) == [i * CHUNK_BYTES for i in range(CHUNKS)]
    assert sum(offsets.values()) == CHUNKS + 2, "only what was under way is asked for again"


async def test_waiting_callers_do_not_repeat_a_failure(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=stalled)
    fetcher = Fetcher(store, world.read)
    failures = []

    async def call() -> None:
        with pytest.raises(BlobUnavailable) as caught:
            await fetcher.fetch(blob_id(b"x"), 1, world.holders)
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(call)
    assert len(failures) == 10
    assert world.asked_of(A) == transfer.FAILURES_MAX


async def test_waiting_caller_with_other_holders_tries_them(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(b"x", a=gone, b=honest)
    fetcher = Fetcher(store, world.read)

    async def fail() -> None:
        with pytest.raises(BlobUnavailable):
            await fetcher.fetch(blob_id(b"x"), 1, [A])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await trio.testing.wait_all_tasks_blocked()
        await fetcher.fetch(blob_id(b"x"), 1, [B])


# ---- batches and full disks ----


async def test_batch_is_bounded_and_tells_what_is_missing(store: BlobStore, autojump_clock: MockClock) -> None:
    blobs = {blob_id(bytes_of(100, seed)): bytes_of(100, seed) for seed in range(100)}
    peak = running = 0

    async def read(peer: PeerId, name: bytes, offset: int, length: int) -> bytes:
        nonlocal peak, running
        running += 1
        peak = max(peak, running)
        await trio.sleep(0.1)
        running -= 1
        if name not in blobs:
            raise BlobMissing
        return blobs[BlobId(name)]

    lost = blob_id(b"lost")
    failed = await Fetcher(store, read).fetch_many([Wanted(b, 100, [A]) for b in [*blobs, lost]], owner="job")
    assert list(failed) == [lost]
    assert failed[lost].tried == {A: "does not hold it"}
    assert peak == FETCHES_MAX
    assert all(store.has(blob) and store.pinned(blob) for blob in blobs)


async def test_full_store_is_told_before_anything_is_sent(make: MakeStore, autojump_clock: MockClock) -> None:
    store = make(quota_bytes=CHUNK_BYTES)
    world = World(a=honest)
    with pytest.raises(StoreFull):
        await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert world.asked == []
    with pytest.raises(StoreFull):
        await Fetcher(store, world.read).fetch_many([Wanted(BLOB, len(DATA), world.holders)])


async def test_full_disk_in_the_middle_leaves_nothing(store: BlobStore, disk: FaultyDisk, autojump_clock: MockClock) -> None:
    disk.free_bytes = 3 * CHUNK_BYTES
    world = World(a=honest, b=honest)
    with pytest.raises(StoreFull, match="the disk is full"):
        await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert leftovers(store) == []
    assert store.used_bytes == 0
    disk.free_bytes = GIB
    await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)


async def test_absurd_size_is_refused(store: BlobStore, autojump_clock: MockClock) -> None:
    for size in (-1, 1 << 60):
        with pytest.raises(ValueError, match="no blob"):
            await Fetcher(store, World().read).fetch(BLOB, size, [A])


async def test_two_stores_serve_each_other(
    tmp_path_factory: pytest.TempPathFactory, store: BlobStore, disk: FaultyDisk, autojump_clock: MockClock
) -> None:
    others = {peer: BlobStore(tmp_path_factory.mktemp("other"), GIB, disk=disk) for peer in (A, B)}
    for other in others.values():
        await other.put(DATA)

    async def read(peer: PeerId, name: bytes, offset: int, length: int) -> bytes:
        data = await others[peer].serve(name, offset, length)
        if data is None:
            raise BlobMissing
        return data

    assert (await Fetcher(store, read).fetch(BLOB, len(DATA), list(others))).read_bytes() == DATA
