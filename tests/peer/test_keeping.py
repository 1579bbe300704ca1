"""Copies of a job's blobs on several peers: real stores, fetchers, keepers and custodians; the mesh is a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from dht.core.identity import PeerId
from grid import body as bodies
from grid import keeping
from grid.blobs.blob import CHUNK_BYTES, BlobId, BlobMissing
from grid.blobs.fetch import Fetcher
from grid.blobs.store import BlobStore
from grid.core import keeping as core
from grid.core.facts import Stored
from grid.core.job import JobId
from grid.core.messages import Have, Keep, Message
from grid.keeping import Custodian, Keeper, owner_of
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import GIB, bytes_of

JOB = JobId(b"j" * 32)
OTHER_JOB = JobId(b"k" * 32)
LATENCY_S = 0.005


class Machine:
    """One peer: its store and what it keeps."""

    def __init__(self, world: World, number: int, bytes_max: int) -> None:
        self.id = PeerId(bytes([number]) * 20)
        self.folder = world.folder / f"peer{number}"
        self.disk = FaultyDisk()
        self._world, self._bytes_max = world, bytes_max
        self.open()

    def open(self) -> None:
        """Also after a restart."""
        world = self._world
        self.store = BlobStore(self.folder, GIB, disk=cast(Any, self.disk))

        async def read(peer: PeerId, name: bytes, offset: int, length: int) -> bytes:
            return await world.read(self.id, peer, name, offset, length)

        self.read = read
        self.fetcher = Fetcher(self.store, read)
        self.custodian = Custodian(self.id, self.store, self.fetcher, self.post, self._bytes_max)

    def post(self, to: PeerId, message: Message) -> None:
        self._world.nursery.start_soon(self._world.deliver, self.id, to, message)

    def pinned(self, blob: bytes) -> bool:
        return self.store.has(BlobId(blob)) and self.store.pinned(BlobId(blob))


class World:
    """A leader's keeper (machine 0) and other machines; those not in `up` neither send nor get anything."""

    def __init__(self, nursery: trio.Nursery, folder: Path, machines: int = 5, bytes_max: int = GIB, copies: int = 3) -> None:
        self.nursery = nursery
        self.folder = folder
        self.machines = [Machine(self, number, bytes_max) for number in range(machines)]
        self.by_id = {machine.id: machine for machine in self.machines}
        self.ids = [machine.id for machine in self.machines]
        self.up = set(self.ids)
        self.stalled: set[PeerId] = set()
        self.keeps: list[tuple[PeerId, Keep]] = []
        self.copied: list[tuple[PeerId, PeerId]] = []
        self.lost: list[bytes] = []
        self.leader = self.machines[0]
        self.keeper = self.lead(self.leader, copies)

    def lead(self, machine: Machine, copies: int = 3) -> Keeper:
        self.leader = machine
        others = [peer for peer in self.ids if peer in self.up and peer != machine.id]
        self.keeper = Keeper(
            JOB, machine.id, machine.custodian, machine.post, others, self.ids[:3], machine.read, copies, self.lost.extend
        )
        return self.keeper

    async def deliver(self, by: PeerId, to: PeerId, message: Message) -> None:
        await trio.sleep(LATENCY_S)
        if not {by, to} <= self.up or to in self.stalled:
            return
        if isinstance(message, Keep):
            self.keeps.append((to, message))
            await self.by_id[to].custodian.answer_keep(by, message)
        elif isinstance(message, Have) and to == self.leader.id:
            self.keeper.have(by, message.blobs, message.refused)

    async def read(self, by: PeerId, of: PeerId, name: bytes, offset: int, length: int) -> bytes:
        await trio.sleep(LATENCY_S)
        if of in self.stalled:
            await trio.sleep_forever()
        if not {by, of} <= self.up:
            raise trio.BrokenResourceError("unreachable")
        data = await self.by_id[of].store.serve(name, offset, length)
        if data is None:
            raise BlobMissing(name.hex())
        if length > 1:
            self.copied.append((of, by))
        return data

    def down(self, *numbers: int) -> None:
        for number in numbers:
            self.up.discard(self.ids[number])
            self.keeper.down(self.ids[number])

    def back(self, number: int) -> None:
        self.up.add(self.ids[number])
        self.keeper.up(self.ids[number])

    def keeping(self, blob: bytes) -> list[int]:
        """Machines that are up and keep it."""
        return [n for n, machine in enumerate(self.machines) if machine.id in self.up and machine.pinned(blob)]

    async def until(self, condition: Callable[[], Any], limit_s: float = 5.0) -> None:
        """Virtual time: nothing happens between two looks that are this close."""
        with trio.fail_after(limit_s):
            while not condition():  # noqa: ASYNC110  # the time is virtual
                await trio.sleep(0.01)


async def put(machine: Machine, size: int = 1000, seed: int = 0, owner: str = "") -> Stored:
    data = bytes_of(size, seed)
    blob = bytes(await machine.store.put(data, owner=owner))
    return Stored(blob, size, 0, size, (machine.id,))


@pytest.fixture
def world(nursery: trio.Nursery, tmp_path: Path, autojump_clock: MockClock) -> World:
    made = World(nursery, tmp_path)
    nursery.start_soon(made.keeper.run)
    return made


# ---- copies ---------------------------------------------------------------------------------------------------------------


async def test_dear_result_gets_a_second_holder_and_a_cheap_one_does_not(world: World, autojump_clock: MockClock) -> None:
    dear, cheap = await put(world.leader, 1000, 1), await put(world.leader, 1000, 2)
    world.keeper.made(dear.blob, 1000, 5.0)
    world.keeper.made(cheap.blob, 1000, 1e-6)
    await world.until(lambda: len(world.keeping(dear.blob)) == 2)
    await trio.sleep(5.0)
    assert len(world.keeping(dear.blob)) == 2
    assert world.keeping(cheap.blob) == [0]


async def test_helper_that_made_a_result_is_its_second_holder_without_a_copy(world: World, autojump_clock: MockClock) -> None:
    here = await put(world.leader, 300_000)
    await put(world.machines[4], 300_000)
    world.keeper.made(here.blob, 300_000, 5.0, holders=[world.ids[4]])
    await world.until(lambda: world.keeping(here.blob) == [0, 4])
    assert world.copied == []


async def test_what_is_said_to_be_kept_survives_a_power_cut(world: World, autojump_clock: MockClock) -> None:
    small = await put(world.leader, 1000)  # in memory as yet
    large = await put(world.leader, 3 * CHUNK_BYTES)
    for stored in (small, large):
        world.keeper.add(stored.blob, stored.blob_size, vital=True)
    await world.until(lambda: all(len(world.keeper.holders(each.blob)) == 3 for each in (small, large)))
    for number in (0, 1, 2):
        machine = world.machines[number]
        machine.disk.lose_power()
        machine.open()
        assert await machine.store.intact(BlobId(small.blob))
        assert await machine.store.intact(BlobId(large.blob))


async def test_lost_holder_is_replaced_within_a_second(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.leader)
    world.keeper.made(stored.blob, stored.size, 5.0)
    await world.until(lambda: len(world.keeping(stored.blob)) == 2)
    holder = world.keeping(stored.blob)[1]
    world.down(holder)
    await world.until(lambda: len(world.keeping(stored.blob)) == 2, 1.0)
    assert holder not in world.keeping(stored.blob)


async def test_vital_blobs_are_kept_by_the_replicas(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.leader)
    world.keeper.add(stored.blob, stored.size, vital=True)
    await world.until(lambda: len(world.keeper.holders(stored.blob)) == 3)
    assert world.keeping(stored.blob) == [0, 1, 2]
    world.down(1)
    await world.until(lambda: len(world.keeping(stored.blob)) == 3)
    world.keeper.set_replicas([world.ids[0], world.ids[4]])


async def test_many_blobs_travel_in_few_messages(world: World, autojump_clock: MockClock) -> None:
    for number in range(100):
        stored = await put(world.leader, 1000, number)
        world.keeper.made(stored.blob, 1000, 1.0)
    await world.until(lambda: sum(len(machine.store) for machine in world.machines[1:]) == 100)
    assert len(world.keeps) < 40


# ---- durability -----------------------------------------------------------------------------------------------------------


async def test_durable_returns_once_a_majority_of_the_replicas_keeps_all(world: World, autojump_clock: MockClock) -> None:
    blobs = {}
    for number in range(4):
        stored = await put(world.leader, 200_000, number, owner="submit:1")
        blobs[stored.blob] = stored.size
    world.stalled.add(world.ids[1])
    assert await world.keeper.durable(blobs, world.ids[:3], 5.0)
    assert all({0, 2} <= set(world.keeping(blob)) for blob in blobs)


async def test_durable_is_false_while_no_majority_can_be_reached(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.leader)
    world.down(1, 2)
    began_s = trio.current_time()
    assert not await world.keeper.durable({stored.blob: stored.size}, world.ids[:3], 5.0)
    assert trio.current_time() - began_s == pytest.approx(5.0)
    world.back(2)
    assert await world.keeper.durable({stored.blob: stored.size}, world.ids[:3], 5.0)


async def test_durable_counts_peers_that_keep_all_not_blobs_that_somebody_keeps(world: World, autojump_clock: MockClock) -> None:
    first, second = await put(world.leader, 1000, 1), await put(world.leader, 1000, 2)
    blobs = {first.blob: 1000, second.blob: 1000}
    for number, stored in ((1, first), (2, second)):  # each replica has the other's blob not, and takes none
        await put(world.machines[number], 1000, 1 if stored is first else 2)
        world.machines[number].custodian.bytes_max = 1000
    assert not await world.keeper.durable(blobs, [world.ids[1], world.ids[2]], 5.0)
    world.machines[1].custodian.bytes_max = world.machines[2].custodian.bytes_max = GIB
    assert await world.keeper.durable(blobs, [world.ids[1], world.ids[2]], 120.0)


# ---- the custodian --------------------------------------------------------------------------------------------------------


async def test_share_for_kept_blobs_does_not_count_what_is_in_use_anyway(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[3]
    helper.custodian.bytes_max = 2500
    blobs = []
    for number in range(4):
        stored = await put(world.leader, 1000, number)
        blobs.append((stored.blob, 1000))
    kept = [await helper.custodian.keep(JOB, blob, size, [world.leader.id]) for blob, size in blobs]
    assert kept == [True, True, False, False]
    assert helper.custodian.kept_bytes == 2000
    mine = await put(helper, 1000, 3, owner="job")
    assert await helper.custodian.keep(JOB, mine.blob, 1000)
    helper.custodian.release(JOB)
    assert helper.custodian.kept_bytes == 0
    assert not helper.pinned(blobs[0][0])
    assert helper.pinned(mine.blob)


async def test_blob_of_another_size_than_said_is_refused(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[3]
    stored = await put(helper, 1000)
    assert not await helper.custodian.keep(JOB, stored.blob, 999)
    assert not await helper.custodian.keep(JOB, stored.blob, -1)
    assert helper.custodian.kept_bytes == 0


async def test_full_disk_is_answered_with_a_refusal_and_another_peer_takes_it(world: World, autojump_clock: MockClock) -> None:
    for machine in world.machines[1:4]:
        machine.disk.free_bytes = 0
    stored = await put(world.leader, 300_000)
    world.keeper.made(stored.blob, 300_000, 5.0)
    await world.until(lambda: world.keeping(stored.blob) == [0, 4], 10.0)


async def test_release_ends_fetches_under_way_and_late_orders_pin_nothing(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[3]
    stored = await put(world.leader, 300_000)
    world.stalled.add(world.leader.id)
    done: list[bool] = []

    async def keep() -> None:
        done.append(await helper.custodian.keep(JOB, stored.blob, 300_000, [world.leader.id]))

    world.nursery.start_soon(keep)
    await trio.sleep(0.5)
    assert helper.custodian.jobs() == [JOB]
    helper.custodian.release(JOB)
    await trio.sleep(0.01)
    assert done == [False]
    world.stalled.clear()
    assert not await helper.custodian.keep(JOB, stored.blob, 300_000, [world.leader.id])
    assert helper.custodian.jobs() == []
    assert helper.custodian.kept_bytes == 0
    assert await helper.custodian.keep(OTHER_JOB, stored.blob, 300_000, [world.leader.id])


async def test_released_job_that_was_only_silent_may_come_back(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[3]
    stored = await put(helper)
    assert await helper.custodian.keep(JOB, stored.blob, stored.size)
    helper.custodian.release(JOB, final=False)
    assert not helper.pinned(stored.blob)
    assert await helper.custodian.keep(JOB, stored.blob, stored.size)


async def test_outcome_files_stay_when_the_job_is_over(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[1]
    file, result = await put(helper, 1000, 1), await put(helper, 1000, 2)
    for stored in (file, result):
        assert await helper.custodian.keep(JOB, stored.blob, 1000)
    helper.custodian.release(JOB, outcome=[file.blob])
    assert helper.pinned(file.blob)
    assert not helper.pinned(result.blob)
    helper.store.unpin(f"outcome:{JOB.hex()}")
    assert not helper.pinned(file.blob)


async def test_pins_are_rebuilt_after_a_restart_for_jobs_that_go_on(world: World, autojump_clock: MockClock) -> None:
    helper = world.machines[1]
    kept, stale = await put(helper, 100_000, 1), await put(helper, 100_000, 2)
    assert await helper.custodian.keep(JOB, kept.blob, 100_000)
    assert await helper.custodian.keep(OTHER_JOB, stale.blob, 100_000)
    helper.open()
    assert helper.custodian.restore(JOB, [(kept.blob, 100_000), (b"?" * 32, 5)]) == 1
    helper.store.unpin("restart")
    assert helper.pinned(kept.blob)
    assert not helper.pinned(stale.blob)
    assert helper.custodian.kept_bytes == 100_000
    helper.custodian.release(JOB)
    assert helper.custodian.kept_bytes == 0


async def test_too_many_orders_at_once_are_refused(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "WAITING_MAX", 2)
    helper = world.machines[3]
    blobs = [((await put(world.leader, 1000, number)).blob, 1000) for number in range(3)]
    answers: list[Have] = []
    helper.custodian._post = lambda peer, message: answers.append(message)  # type: ignore[arg-type]
    await helper.custodian.answer_keep(world.leader.id, Keep(JOB, tuple(blobs)))
    assert {blob for answer in answers for blob in answer.refused} == {blobs[2][0]}
    assert {blob for answer in answers for blob in answer.blobs} == {blobs[0][0], blobs[1][0]}


# ---- a later leader -------------------------------------------------------------------------------------------------------


async def test_new_leader_fetches_from_recorded_holders(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.machines[4], 3 * CHUNK_BYTES + 5)
    body = await world.keeper.fetch(stored)
    assert body is not None
    assert bodies.read(body) == bytes_of(3 * CHUNK_BYTES + 5)
    assert world.leader.pinned(stored.blob)
    part = Stored(stored.blob, stored.blob_size, 10, 100, stored.peers)
    assert await world.keeper.fetch(part) == bytes_of(3 * CHUNK_BYTES + 5)[10:110]


async def test_new_leader_finds_the_copy_that_no_fact_tells_of(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.leader)
    world.keeper.made(stored.blob, stored.size, 5.0)
    await world.until(lambda: len(world.keeping(stored.blob)) == 2)
    second = world.keeping(stored.blob)[1]
    later = next(machine for n, machine in enumerate(world.machines) if n not in (0, second))
    world.down(0)
    keeper = world.lead(later)
    assert await keeper.fetch(stored) == bytes_of(1000)


async def test_later_leader_that_lacks_what_the_job_needs_gets_it_from_a_replica(
    world: World, autojump_clock: MockClock
) -> None:
    stored = await put(world.machines[2])
    world.keeper.add(stored.blob, stored.size, vital=True)
    await world.until(lambda: world.keeping(stored.blob) == [0, 1, 2])


async def test_recorded_results_get_their_second_holder_under_a_later_leader(world: World, autojump_clock: MockClock) -> None:
    alone, paired = await put(world.machines[4], 1000, 1), await put(world.leader, 1000, 2)
    world.keeper.made(paired.blob, 1000, 5.0)
    await world.until(lambda: len(world.keeping(paired.blob)) == 2)
    second = world.keeping(paired.blob)[1]
    world.copied.clear()
    keeper = world.lead(next(machine for n, machine in enumerate(world.machines) if n not in (0, second, 4)))
    world.nursery.start_soon(keeper.run)
    keeper.recorded([alone, paired])
    await world.until(lambda: all(len(keeper.holders(each.blob)) == 2 for each in (alone, paired)))
    assert 4 in world.keeping(alone.blob)
    assert len(world.copied) <= 2


async def test_what_tasks_stored_gets_a_second_copy(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.machines[4], 1000)
    world.keeper.have(world.ids[4], (stored.blob,), (), (1000,))
    world.keeper.have(world.ids[4], (b"?" * 32,), (), (-1,))
    await world.until(lambda: len(world.keeping(stored.blob)) == 2)
    assert 4 in world.keeping(stored.blob)
    assert world.keeper.holders(b"?" * 32) == []


async def test_dead_and_stalled_holders_cost_little_time(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.machines[4])
    world.stalled |= {world.ids[1], world.ids[2]}
    world.down(3)
    named = Stored(stored.blob, 1000, 0, 1000, tuple(world.ids[1:4]))
    began_s = trio.current_time()
    assert await world.keeper.fetch(named) == bytes_of(1000)
    assert trio.current_time() - began_s < 2 * keeping.ASK_S + 1.0
    more = await put(world.machines[4], 1000, 7)
    began_s = trio.current_time()
    assert await world.keeper.fetch(Stored(more.blob, 1000, 0, 1000, tuple(world.ids[1:4]))) == bytes_of(1000, 7)
    assert trio.current_time() - began_s < 1.0  # whom nothing was heard of is asked last


async def test_bytes_that_nobody_has_are_none_within_seconds(world: World, autojump_clock: MockClock) -> None:
    began_s = trio.current_time()
    assert await world.keeper.fetch(Stored(b"?" * 32, 1000, 0, 1000, (world.ids[3],))) is None
    assert trio.current_time() - began_s < 3 * keeping.ASK_S
    assert await world.keeper.fetch(Stored(b"?" * 32, 10, 5, 10)) is None
    assert await world.keeper.fetch(Stored(b"?" * 32, 10, 5, 0)) == b""


async def test_blob_of_dead_peers_only_is_told_lost_once(world: World, autojump_clock: MockClock) -> None:
    stored = await put(world.machines[4])
    world.down(4)
    world.keeper.add(stored.blob, stored.size, copies=2, holders=[world.ids[4]])
    await world.until(lambda: world.lost == [stored.blob], 3 * core.LOST_AFTER_S)
    await trio.sleep(120.0)
    assert world.lost == [stored.blob]
    world.back(4)
    await world.until(lambda: len(world.keeping(stored.blob)) == 2, core.SHUN_S + 5.0)


async def test_owner_of_kept_blobs_has_the_jobs_name() -> None:
    assert owner_of(JOB) == f"kept:{JOB.hex()}"
