"""Fetching from holders that are slow, gone, mistaken or lying, in virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from dht.core.identity import PeerId
from grid.blobs import transfer
from grid.blobs.blob import (
    BLOB_ID_BYTES,
    CHUNK_BYTES,
    SMALL_BYTES_MAX,
    BlobId,
    BlobMissing,
    BlobUnavailable,
    StoreFull,
    blob_id,
    chunk_count,
)
from grid.blobs.fetch import FETCHES_MAX, Fetcher, Wanted
from grid.blobs.store import BlobStore
from grid.transport import errors as transport
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import GIB, bytes_of, content, leftovers

MakeStore = Callable[..., BlobStore]
Behaviour = Callable[["World", bytes, int, int], Awaitable[bytes]]

CHUNKS = 6
DATA = bytes_of((CHUNKS - 1) * CHUNK_BYTES + 777)
BLOB = blob_id(DATA)
OTHER = bytes(len(DATA))
A, B, C, D = (PeerId(bytes([n]) * 20) for n in range(1, 5))


def hashes_of(data: bytes) -> bytes:
    return b"".join(blob_id(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES))


LISTS = {DATA: hashes_of(DATA), OTHER: hashes_of(OTHER)}


def answer(data: bytes, name: bytes, offset: int, length: int) -> bytes:
    source = data if len(name) == BLOB_ID_BYTES else LISTS.get(data) or hashes_of(data)
    return source[offset : offset + length]


async def honest(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(world.data, name, offset, length)


async def lying_chunks(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(world.data if len(name) > BLOB_ID_BYTES else OTHER, name, offset, length)


async def lying_list(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(OTHER if len(name) > BLOB_ID_BYTES else world.data, name, offset, length)


async def lying_throughout(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(OTHER, name, offset, length)


async def short(world: World, name: bytes, offset: int, length: int) -> bytes:
    return answer(world.data, name, offset, length)[:-1]


async def missing(world: World, name: bytes, offset: int, length: int) -> bytes:
    raise transport.BlobMissing(A, name)


async def gone(world: World, name: bytes, offset: int, length: int) -> bytes:
    raise trio.BrokenResourceError("connection reset\nby peer")


async def stalled(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def stalled_after_list(world: World, name: bytes, offset: int, length: int) -> bytes:
    return await (honest if len(name) > BLOB_ID_BYTES else stalled)(world, name, offset, length)


class World:
    """Peers by behaviour, and what they were asked for."""

    def __init__(self, data: bytes = DATA, **peers: Behaviour) -> None:
        self.data = data
        self.latency_s = 0.01
        self.peers = dict(zip((A, B, C, D), peers.values(), strict=False))
        self.asked: list[tuple[PeerId, int]] = []  # chunks only: peer, offset
        self.in_flight: Counter[PeerId] = Counter()
        self.peak = 0

    async def read(self, peer: PeerId, name: bytes, offset: int, length: int) -> bytes:
        assert 0 < length <= CHUNK_BYTES
        if len(name) == BLOB_ID_BYTES:
            self.asked.append((peer, offset))
        self.in_flight[peer] += 1
        self.peak = max(self.peak, self.in_flight.total())
        try:
            return await self.peers[peer](self, name, offset, length)
        finally:
            self.in_flight[peer] -= 1

    @property
    def holders(self) -> list[PeerId]:
        return list(self.peers)

    def asked_of(self, peer: PeerId) -> int:
        return sum(1 for each, _ in self.asked if each == peer)


@pytest.fixture
def store(make: MakeStore) -> BlobStore:
    return make()


# ---- one chunk ----


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES_MAX, CHUNK_BYTES])
async def test_one_chunk_comes_from_the_first_holder(store: BlobStore, size: int, autojump_clock: MockClock) -> None:
    data = bytes_of(size)
    world = World(data, a=honest, b=honest)
    path = await Fetcher(store, world.read).fetch(blob_id(data), size, world.holders)
    assert path.read_bytes() == data
    assert world.asked == ([(A, 0)] if size else [])


async def test_ensure_leaves_small_blobs_in_memory(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(b"small", a=honest)
    await Fetcher(store, world.read).ensure(blob_id(b"small"), 5, world.holders, owner="job")
    assert store.used_bytes == 0
    assert store.read_now(blob_id(b"small")) == b"small"
    assert store.pinned(blob_id(b"small"))


async def test_what_is_here_is_not_fetched(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=gone)
    await store.put(DATA)
    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders, owner="job")
    assert path.read_bytes() == DATA
    assert store.pinned(BLOB)
    assert world.asked == []


@pytest.mark.parametrize("bad", [lying_throughout, short, missing, gone, stalled])
async def test_one_chunk_comes_from_the_next_holder(store: BlobStore, bad: Behaviour, autojump_clock: MockClock) -> None:
    data = bytes_of(100)
    world = World(data, a=bad, b=honest)
    with trio.fail_after(6):
        await Fetcher(store, world.read).fetch(blob_id(data), 100, world.holders)
    assert world.asked == [(A, 0), (B, 0)]


async def test_failing_holder_is_asked_again(store: BlobStore, autojump_clock: MockClock) -> None:
    answers = itertools.chain([gone, gone], itertools.repeat(honest))

    async def recovering(world: World, name: bytes, offset: int, length: int) -> bytes:
        return await next(answers)(world, name, offset, length)

    world = World(b"x", a=recovering)
    await Fetcher(store, world.read).fetch(blob_id(b"x"), 1, world.holders)
    assert world.asked_of(A) == 3


async def test_nobody_has_it(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=missing, b=gone, c=lying_throughout)
    with pytest.raises(BlobUnavailable) as caught:
        await Fetcher(store, world.read).fetch(blob_id(b"x"), 1, world.holders)
    assert caught.value.blob == blob_id(b"x")
    assert caught.value.tried == {
        A: "does not hold it",
        B: "BrokenResourceError: connection reset",
        C: "sent other bytes than those of the blob",
    }
    assert "\n" not in str(caught.value)
    with pytest.raises(BlobUnavailable, match="no holder is known"):
        await Fetcher(store, world.read).fetch(blob_id(b"x"), 1, [])


async def test_more_holders_are_looked_for(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=missing, b=gone, c=honest)
    lookups: list[BlobId] = []

    async def more(blob: BlobId) -> Sequence[PeerId]:
        lookups.append(blob)
        return [A, B] if len(lookups) == 1 else [C]

    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), [A], more_holders=more)
    assert path.read_bytes() == DATA
    assert lookups == [BLOB, BLOB]


async def test_more_holders_are_not_looked_for_without_end(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=missing)
    lookups: list[BlobId] = []

    async def more(blob: BlobId) -> Sequence[PeerId]:
        lookups.append(blob)
        return [A]

    with pytest.raises(BlobUnavailable):
        await Fetcher(store, world.read).fetch(BLOB, len(DATA), [], more_holders=more)
    assert len(lookups) == transfer.MORE_HOLDERS_ROUNDS_MAX


# ---- many chunks ----


async def test_chunks_come_from_several_holders_at_once(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=honest, b=honest, c=honest)
    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders, owner="job")
    assert path.read_bytes() == DATA
    assert store.pinned(BLOB)
    assert sorted(offset for _, offset in world.asked) == [i * CHUNK_BYTES for i in range(CHUNKS)], "each once"
    assert len({peer for peer, _ in world.asked}) > 1
    assert world.peak > 2
    assert leftovers(store) == []


async def test_chunks_in_flight_are_bounded(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=honest, b=honest, c=honest)
    fetcher = Fetcher(store, world.read, chunks_in_flight_max=2)
    await fetcher.fetch(BLOB, len(DATA), world.holders)
    assert world.peak == 2


async def test_faster_holders_do_more(store: BlobStore, autojump_clock: MockClock) -> None:
    async def slow(world: World, name: bytes, offset: int, length: int) -> bytes:
        await trio.sleep(0.5)
        return await honest(world, name, offset, length)

    data = bytes_of(40 * CHUNK_BYTES)
    world = World(data, a=honest, b=slow)
    await Fetcher(store, world.read).fetch(blob_id(data), len(data), world.holders)
    assert world.asked_of(A) > 3 * world.asked_of(B) > 0


@pytest.mark.parametrize("bad", [lying_chunks, lying_list, lying_throughout, short, missing, gone])
@pytest.mark.parametrize("bad_is_first", [True, False])
async def test_one_bad_holder_changes_nothing(
    store: BlobStore, bad: Behaviour, bad_is_first: bool, autojump_clock: MockClock
) -> None:
    world = World(a=bad, b=honest, c=honest) if bad_is_first else World(a=honest, b=honest, c=bad)
    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert path.read_bytes() == DATA
    assert leftovers(store) == []


async def test_holder_whose_chunk_lies_is_asked_no_more(store: BlobStore, autojump_clock: MockClock) -> None:
    data = bytes_of(40 * CHUNK_BYTES)
    world = World(data, a=honest, b=lying_throughout)
    await Fetcher(store, world.read).fetch(blob_id(data), len(data), world.holders)
    assert world.asked_of(B) <= transfer.CHUNKS_PER_HOLDER


async def test_false_list_voids_what_it_said_of_others(store: BlobStore, autojump_clock: MockClock) -> None:
    """A gives a list and chunks of other bytes: B looks like the liar, until the whole has the wrong hash."""
    world = World(a=lying_throughout, b=honest)
    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert path.read_bytes() == DATA
    assert world.asked_of(B) >= CHUNKS


async def test_only_liars(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=lying_throughout, b=lying_chunks, c=lying_list)
    with pytest.raises(BlobUnavailable) as caught:
        await Fetcher(store, world.read).fetch(BLOB, len(DATA), [A, B])
    assert "false list" in caught.value.tried[A]
    assert set(caught.value.tried) == {A, B}
    assert leftovers(store) == []
    assert store.used_bytes == 0


@pytest.mark.parametrize("bad", [stalled, stalled_after_list])
async def test_stalled_holder_delays_nobody_for_long(store: BlobStore, bad: Behaviour, autojump_clock: MockClock) -> None:
    world = World(a=honest, b=bad, c=honest)
    start_s = trio.current_time()
    await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert trio.current_time() - start_s < 3 * transfer.OVERDUE_S


async def test_all_stalled(store: BlobStore, autojump_clock: MockClock) -> None:
    world = World(a=stalled_after_list, b=stalled)
    with trio.fail_after(300), pytest.raises(BlobUnavailable, match="took over"):
        await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)


async def test_holder_lost_and_back_within_seconds(store: BlobStore, autojump_clock: MockClock) -> None:
    """A connection that breaks with many chunks under way is one failure, not many."""
    broken = False

    async def breaking(world: World, name: bytes, offset: int, length: int) -> bytes:
        nonlocal broken
        await trio.sleep(0.01)
        if len(name) == BLOB_ID_BYTES and not broken:
            await trio.sleep(0.1 - trio.current_time() % 0.1)
            broken = True
            raise trio.BrokenResourceError
        return await honest(world, name, offset, length)

    world = World(a=breaking)
    path = await Fetcher(store, world.read).fetch(BLOB, len(DATA), world.holders)
    assert path.read_bytes() == DATA


async def test_transfer_is_taken_up_after_a_restart(make: MakeStore, autojump_clock: MockClock) -> None:
    left = 3

    async def dying(world: World, name: bytes, offset: int, length: int) -> bytes:
        nonlocal left
        if len(name) == BLOB_ID_BYTES:
            left -= 1
            if left < 0:
                raise transport.PeerUnreachable(A, "it is gone")
        return await honest(world, name, offset, length)

    first = World(a=dying)
    with pytest.raises(BlobUnavailable, match="it is gone"):
        await Fetcher(make(), first.read).fetch(BLOB, len(DATA), first.holders)
    second = World(a=honest)
    store = make()
    await Fetcher(store, second.read).fetch(BLOB, len(DATA), second.holders)
    assert len(second.asked) == CHUNKS - 3
    assert await content(store, BLOB) == DATA


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


# ---- anything goes ----

BEHAVIOURS = [honest, lying_chunks, lying_list, lying_throughout, short, missing, gone, stalled, stalled_after_list]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(BEHAVIOURS), min_size=1, max_size=4))
def test_any_mix_of_holders(tmp_path_factory: pytest.TempPathFactory, behaviours: list[Behaviour]) -> None:
    """One honest holder is enough; without one, the content is right or there is none."""

    async def run() -> None:
        store = BlobStore(tmp_path_factory.mktemp("mix"), GIB, disk=FaultyDisk())
        world = World(**{str(n): behaviour for n, behaviour in enumerate(behaviours)})
        assert chunk_count(len(DATA)) == CHUNKS
        failed = await Fetcher(store, world.read).fetch_many([Wanted(BLOB, len(DATA), world.holders)])
        if failed:
            assert honest not in behaviours
            assert set(failed[BLOB].tried) == set(world.holders)
            assert not store.has(BLOB)
        else:
            assert await content(store, BLOB) == DATA
            assert leftovers(store) == []

    trio.run(run, clock=MockClock(autojump_threshold=0))
