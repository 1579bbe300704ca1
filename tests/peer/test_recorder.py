"""Facts enter the log in the order in which they happened, whatever has to be stored first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid import body as bodies
from grid import recorder
from grid.bell import Bell
from grid.blobs.blob import StoreFull, blob_id
from grid.blobs.store import BlobStore
from grid.core.bundle import StageOptions
from grid.core.errors import NotLeadingError
from grid.core.facts import DIGEST_BYTES, Ended, Output, RangeDone, SegmentsCut, Stored
from grid.core.job import JobId
from grid.core.ledger import StageState
from grid.recorder import ALONE_BYTES, COPY_S, INLINE_JOB_BYTES, INLINE_RANGE_BYTES, PACK_BYTES, LogRecorder

ME = PeerId(b"m" * 20)
JOB = JobId(b"j" * 32)
SLOW_US = 10_000_000
"""Dearer to make than to copy, whatever the size."""


class FakeReplica:
    """A log that commits at once."""

    def __init__(self) -> None:
        self.chronicle = SimpleNamespace(output_length={1: 0, 2: 0}, inline_bytes=0)
        self.facts: list[Any] = []
        self.told = Bell()
        self.leading = True

    def propose(self, facts: Sequence[Any], patient: bool = False) -> int:
        if not self.leading:
            raise NotLeadingError("not here")
        self.facts += facts
        self.told.ring()
        return len(self.facts)

    async def room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def committed(self, sequence: int, patient: bool = False) -> None:
        assert sequence == len(self.facts)
        await trio.lowlevel.checkpoint()


class World:
    """A recorder with its log and its store."""

    def __init__(self, folder: Path) -> None:
        self.replica = FakeReplica()
        self.store = BlobStore(folder / "blobs", 1 << 30)
        self.spool = bodies.Spool(folder / "spool")
        self.kept: list[tuple[bytes, int, float, list[PeerId]]] = []
        self.recorder = LogRecorder(
            JOB, ME, self.replica, self.store, self.spool, lambda *kept: self.kept.append(kept)  # type: ignore[arg-type]
        )

    def done(self, lo: int, data: bytes, elapsed_us: int = SLOW_US, pure: bool = True) -> None:
        stage = StageState(0, "f", True, StageOptions(pure=pure), bytes(32), 10)
        self.recorder.done(stage, lo, lo + 1, lo, data, ME, elapsed_us)

    async def stored(self, result: Any) -> bytes:
        assert isinstance(result, Stored)
        return await self.store.read(result.blob, result.offset, result.size)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def settled(world: World, count: int) -> None:
    with trio.fail_after(10):
        while len(world.replica.facts) < count:
            await world.replica.told.wait()


async def test_small_results_go_into_the_log_at_once(world: World) -> None:
    world.done(0, b"x" * INLINE_RANGE_BYTES)
    assert [fact.result for fact in world.replica.facts] == [b"x" * INLINE_RANGE_BYTES]


async def test_output_waits_for_the_results_that_the_driver_had_seen(world: World, nursery: trio.Nursery) -> None:
    large = bytes(range(256)) * 64
    world.done(0, large)
    await world.recorder.output(1, b"seen\n")
    world.done(1, b"small")
    assert world.replica.facts == []
    nursery.start_soon(world.recorder.run)
    await settled(world, 3)
    first, second, third = world.replica.facts
    assert await world.stored(first.result) == large
    assert second == Output(1, 0, b"seen\n")
    assert third.result == b"small"


async def test_several_results_share_a_blob(world: World, nursery: trio.Nursery) -> None:
    results = [bytes([number]) * (INLINE_RANGE_BYTES + number) for number in range(1, 9)]
    for number, data in enumerate(results):
        world.done(number, data)
    nursery.start_soon(world.recorder.run)
    await settled(world, len(results))
    assert [await world.stored(fact.result) for fact in world.replica.facts] == results
    assert len({fact.result.blob for fact in world.replica.facts}) == 1
    assert world.kept == [(world.replica.facts[0].result.blob, sum(map(len, results)), pytest.approx(80.0), [])]


async def test_results_that_come_one_by_one_share_a_blob_until_output_stands_behind_them(
    world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "GATHER_S", math.inf)
    nursery.start_soon(world.recorder.run)
    for number in range(3):
        world.done(number, bytes([number]) * (INLINE_RANGE_BYTES + 1))
        await trio.testing.wait_all_tasks_blocked()
    assert world.replica.facts == []
    await world.recorder.output(1, b"seen\n")
    await settled(world, 4)
    *facts, output = world.replica.facts
    assert len({fact.result.blob for fact in facts}) == 1
    assert output == Output(1, 0, b"seen\n")


async def test_enough_results_for_a_blob_wait_for_no_more(
    world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "GATHER_S", math.inf)
    nursery.start_soon(world.recorder.run)
    count = PACK_BYTES // (ALONE_BYTES - 1) + 1
    for number in range(count):
        world.done(number, bytes([number]) * (ALONE_BYTES - 1))
        await trio.testing.wait_all_tasks_blocked()
    await settled(world, count - 1)


async def test_a_large_result_is_a_blob_of_its_own(world: World, nursery: trio.Nursery) -> None:
    small, large = b"s" * (INLINE_RANGE_BYTES + 1), b"l" * ALONE_BYTES
    for number, data in enumerate((small, large, small)):
        world.done(number, data)
    nursery.start_soon(world.recorder.run)
    await settled(world, 3)
    facts = world.replica.facts
    assert [await world.stored(fact.result) for fact in facts] == [small, large, small]
    assert facts[1].result.blob_size == ALONE_BYTES


async def test_results_in_files_are_kept_though_their_owner_releases_them(world: World, nursery: trio.Nursery) -> None:
    data = b"f" * ALONE_BYTES
    file = world.spool.write("result", data)
    body = bodies.FileSlice(file, 0, len(data))
    file.owners = 1
    stage = StageState(0, "f", True, StageOptions(), bytes(32), 10)
    world.recorder.done(stage, 0, 1, 0, body, ME, SLOW_US)
    bodies.release(body)
    nursery.start_soon(world.recorder.run)
    await settled(world, 1)
    assert await world.stored(world.replica.facts[0].result) == data


async def test_what_is_cheaper_to_make_than_to_copy_is_not_kept(world: World) -> None:
    data = b"c" * PACK_BYTES
    world.done(0, data, elapsed_us=100)
    assert world.replica.facts[0].result is None


async def test_small_results_quicker_made_than_kept_are_not_kept(world: World, nursery: trio.Nursery) -> None:
    """Once their bytes don't fit into the log itself any more; those that took longer are."""
    data = b"c" * (INLINE_RANGE_BYTES + 1)
    quick_us = int(COPY_S * 1e6)
    world.done(0, data, elapsed_us=quick_us)
    world.done(1, data, elapsed_us=2 * quick_us)
    nursery.start_soon(world.recorder.run)
    await settled(world, 2)
    assert world.replica.facts[0].result is None
    assert await world.stored(world.replica.facts[1].result) == data


async def test_impure_results_are_kept_however_cheap(world: World, nursery: trio.Nursery) -> None:
    data = b"c" * PACK_BYTES
    world.done(0, data, elapsed_us=100, pure=False)
    nursery.start_soon(world.recorder.run)
    await settled(world, 1)
    assert await world.stored(world.replica.facts[0].result) == data


async def test_the_log_itself_holds_so_much_and_no_more(world: World, nursery: trio.Nursery) -> None:
    nursery.start_soon(world.recorder.run)
    count = INLINE_JOB_BYTES // INLINE_RANGE_BYTES + 3
    for number in range(count):
        world.done(number, b"x" * INLINE_RANGE_BYTES)
    await settled(world, count)
    inline = [fact for fact in world.replica.facts if isinstance(fact.result, bytes)]
    assert len(inline) == INLINE_JOB_BYTES // INLINE_RANGE_BYTES


async def test_full_disk_is_a_result_without_bytes(world: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*buffers: bytes, durable: bool = False, owner: str = "") -> bytes:
        raise StoreFull(10, 10, "no room")

    monkeypatch.setattr(world.store, "put", full)
    world.done(0, b"x" * (INLINE_RANGE_BYTES + 1))
    await world.recorder.output(2, b"after")
    nursery.start_soon(world.recorder.run)
    await settled(world, 2)
    assert world.replica.facts == [RangeDone(0, 0, 1, 0, None, ME, SLOW_US), Output(2, 0, b"after")]


async def test_outcome_comes_last_even_when_the_storing_task_is_gone(world: World) -> None:
    world.done(0, b"x" * (INLINE_RANGE_BYTES + 1))
    await world.recorder.end(b"outcome")
    assert [type(fact) for fact in world.replica.facts] == [RangeDone, Ended]


async def test_lost_leadership_ends_with_an_error_and_says_nothing_more(world: World) -> None:
    world.replica.leading = False
    world.done(0, b"x")
    with pytest.raises(NotLeadingError):
        await world.recorder.end(b"outcome")
    assert world.replica.facts == []


async def test_arguments_are_kept_only_where_asked(world: World) -> None:
    world.recorder.segments(0, 0, [(2, 3, b"d" * 32)], b"abc")
    world.recorder.segments(0, 2, [(1, 3, b"e" * 32)], None)
    kept, dropped = world.replica.facts
    assert kept == SegmentsCut(0, 0, ((2, 3, b"d" * 16),), b"abc")
    assert dropped.arguments is None


async def test_a_large_segment_is_named_before_its_result_is_told(world: World, nursery: trio.Nursery) -> None:
    data = b"argument" * ALONE_BYTES
    file = world.spool.write("page", data)
    file.owners = 1
    body = bodies.FileSlice(file, 0, len(data))
    named: list[bytes] = []
    world.recorder.large_segment(0, 5, 1, body, named.append)
    world.done(5, b"small")
    bodies.release(body)
    assert world.replica.facts == []
    nursery.start_soon(world.recorder.run)
    await settled(world, 2)
    cut, done = world.replica.facts
    assert named == [bytes(blob_id(data))]
    assert cut == SegmentsCut(0, 5, ((1, len(data), named[0][:DIGEST_BYTES]),))
    assert done.result == b"small"
    assert file.owners == 0


async def test_the_outcome_waits_for_a_large_segment(world: World) -> None:
    file = world.spool.write("page", b"argument")
    file.owners = 1
    world.recorder.large_segment(0, 0, 1, bodies.FileSlice(file, 0, 8), lambda digest: None)
    await world.recorder.end(b"outcome")
    assert [type(fact) for fact in world.replica.facts] == [SegmentsCut, Ended]
