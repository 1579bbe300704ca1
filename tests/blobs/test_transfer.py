"""One transfer from holders that are slow, gone, mistaken or lying, in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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
    BlobUnavailable,
    blob_id,
    chunk_count,
)
from grid.blobs.fetch import Fetcher, Wanted
from grid.blobs.store import BlobStore
from grid.transport import errors as transport
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import GIB, bytes_of, content, leftovers
from tests.blobs.world import (
    BLOB,
    CHUNKS,
    DATA,
    A,
    B,
    Behaviour,
    C,
    World,
    gone,
    honest,
    lying_chunks,
    lying_list,
    lying_throughout,
    missing,
    short,
    stalled,
    stalled_after_list,
)

MakeStore = Callable[..., BlobStore]


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
