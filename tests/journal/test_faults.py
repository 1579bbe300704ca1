"""The journal on a machine that crashes, loses power, fills up, and on a disk that fails or rots."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from grid.core.journal_records import BLOCK_BYTES, BLOCK_STRIDE_BYTES, MARK, Cut, Entry, HardState, Snapshot
from grid.journal import Journal
from grid.journal_errors import JournalDamaged, JournalError, JournalFailed, JournalFull, Recovered
from grid.journal_files import POINTS, STATE_BYTES, JournalFiles, no_fault
from tests.journal.disks import MemoryDisk
from tests.journal.world import JOB, Content, Crash, World, log_of, torture

ALICE, BOB = b"a" * 20, b"b" * 20
LOST = {"kill": None, "power 1": 1, "power 2": 2, "power 3": 3, "power 4": 4}


def entry(index: int, term: int = 1, size: int = 8) -> Entry:
    return Entry(index, term, bytes([index]) * size)


async def live(world: World) -> None:
    """A short life that meets every point."""
    await world.start()
    calls: tuple[tuple[Callable[..., Awaitable[None]], *tuple[Any, ...]], ...] = (
        (world.vote, 1, ALICE),
        (world.append, [entry(1), entry(2)]),
        (world.compact, 1, b"one" * 300),
        (world.append, [entry(3, size=1500)]),
        (world.vote, 2, BOB),
        (world.append, [Cut(3), entry(3, term=2)]),
        (world.install, Snapshot(9, 2, b"nine")),
    )
    for call, *arguments in calls:
        if world.journal is None:
            return
        await call(*arguments)
    await world.close()
    await world.start()


async def revive(world: World, lost: str) -> None:
    if (seed := LOST[lost]) is not None:
        world.lose_power(random.Random(seed))
    world.journal = None
    world.disk.kill()
    await world.start()
    assert world.journal is not None
    if world.twin and world.twin.hard.term:
        await world.append([entry(world.twin.log.last_index + 1, world.twin.hard.term)])
    await world.close()


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_every_point_loses_nothing_acknowledged(world: World, point: str, lost: str) -> None:
    """At the first, second, … time that the point is met, until a life passes without meeting it again."""
    times = 0
    while True:
        times += 1
        fresh = World(world.folder.parent / f"{times}")
        left = times

        def at(name: str, fresh: World = fresh) -> None:
            nonlocal left
            left -= name == point
            if left == 0 and name == point:
                raise Crash(name)

        fresh.at = at  # type: ignore[method-assign, assignment]
        await live(fresh)
        if left > 0:
            break
        await revive(fresh, lost)
    assert times > 1


async def test_a_life_meets_every_point_and_no_other(world: World) -> None:
    await live(world)
    assert set(world.points) == set(POINTS)


@pytest.mark.parametrize("seed", range(150))
async def test_random_lives(folder: Path, seed: int) -> None:
    world = await torture(seed, folder, POINTS)
    assert world.crashes


@pytest.mark.parametrize("lost", LOST)
async def test_many_writers_lose_nothing_acknowledged(folder: Path, disk: MemoryDisk, lost: str) -> None:
    """Group commit under fire: of all entries that were acknowledged, in any task, none is missing."""
    rng = random.Random(lost)
    countdown = 0

    def at(point: str) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise Crash(point)

    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1, at=at)
    await journal.set_hard_state(1, None)
    acknowledged: set[int] = set()
    last = 0

    async def write(journal: Journal, count: int) -> None:
        nonlocal last
        try:
            for _ in range(count):
                last += 1
                index = last
                await journal.append([Entry(index, 1, rng.randbytes(rng.randrange(300)))])
                acknowledged.add(index)
        except (Crash, JournalFailed):
            pass

    for _ in range(30):
        countdown = rng.randrange(3, 60)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(write, journal, 5)
        countdown = 0
        if (seed := LOST[lost]) is not None:
            disk.lose_power(random.Random(seed))
        disk.kill()
        journal, recovered = await Journal.open(folder, JOB, disk, at=at)
        last = journal.last_index
        assert acknowledged <= {found.index for found in recovered.entries}
        acknowledged = {found.index for found in recovered.entries}
    assert last > 100


# ---- rot ---------------------------------------------------------------------------------------------------------------------


async def small_journal(folder: Path, disk: MemoryDisk) -> tuple[Path, Path, Recovered]:
    """Its log, its state, and what was acknowledged. Process killed, nothing lost."""
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, ALICE)
    await journal.append([entry(1), entry(2)])
    await journal.compact(1, b"one")
    await journal.set_hard_state(3, BOB)
    await journal.append([Cut(2), entry(2, 3)])
    await journal.append([entry(3, 3), entry(4, 3)])
    acknowledged = Recovered(1, HardState(3, BOB), Snapshot(1, 1, b"one"), [entry(2, 3), entry(3, 3), entry(4, 3)])
    disk.kill()
    return folder / "log", folder / "state", acknowledged


def opened(folder: Path, disk: MemoryDisk) -> Recovered | None:
    """What is recovered, or None if damage is reported; the disk is as before."""
    names = dict(disk.names)
    contents = {path: disk.content(path) for path in names}
    try:
        files, recovered = JournalFiles.open(folder, JOB, disk, no_fault)
    except JournalDamaged:
        return None
    files.close()
    disk.names = names
    for path, content in contents.items():
        disk.put(path, content)
    return recovered


@pytest.mark.parametrize("marked", [True, False])
async def test_every_flip_in_the_log_is_damage(folder: Path, disk: MemoryDisk, marked: bool) -> None:
    log, state, acknowledged = await small_journal(folder, disk)
    if not marked:
        disk.put(state, disk.content(state)[: MARK * BLOCK_STRIDE_BYTES] + bytes(BLOCK_BYTES))
    assert opened(folder, disk) == acknowledged
    content = disk.content(log)
    for bit in range(len(content) * 8):
        disk.flip(log, bit)
        assert opened(folder, disk) is None
        disk.put(log, content)


async def test_every_flip_in_the_state_is_survived(folder: Path, disk: MemoryDisk) -> None:
    _, state, acknowledged = await small_journal(folder, disk)
    content = disk.content(state)
    assert len(content) == STATE_BYTES
    repairs = 0
    for place in range(3):
        for bit in range(BLOCK_BYTES * 8):
            disk.flip(state, place * BLOCK_STRIDE_BYTES * 8 + bit)
            recovered = opened(folder, disk)
            assert recovered is not None
            repairs += bool(recovered.repaired)
            recovered.repaired = ()
            assert recovered == acknowledged
            disk.put(state, content)
    assert repairs == 2 * BLOCK_BYTES * 8


async def test_a_bad_slot_is_repaired(folder: Path, disk: MemoryDisk) -> None:
    _, state, _ = await small_journal(folder, disk)
    for place in (0, 1, 0):
        disk.flip(state, place * BLOCK_STRIDE_BYTES * 8 + 99)
        journal, recovered = await Journal.open(folder, JOB, disk)
        assert recovered.repaired == ("one of the two copies of the vote was bad",)
        assert recovered.hard_state == HardState(3, BOB)
        await journal.close()
    journal, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.repaired == ()
    await journal.close()


async def test_two_bad_slots_are_damage_and_the_entries_are_salvaged(folder: Path, disk: MemoryDisk) -> None:
    _, state, acknowledged = await small_journal(folder, disk)
    disk.flip(state, 99)
    disk.flip(state, BLOCK_STRIDE_BYTES * 8 + 99)
    with pytest.raises(JournalDamaged, match="both copies of the vote are bad") as caught:
        await Journal.open(folder, JOB, disk)
    assert caught.value.salvaged is not None
    assert log_of(caught.value.salvaged) == log_of(acknowledged)
    assert caught.value.salvaged.hard_state == HardState()
    assert disk.fds == {}


async def test_what_stands_before_the_damage_is_salvaged(folder: Path, disk: MemoryDisk) -> None:
    log, _, _ = await small_journal(folder, disk)
    disk.flip(log, len(disk.content(log)) * 8 - 99)
    with pytest.raises(JournalDamaged) as caught:
        await Journal.open(folder, JOB, disk)
    assert caught.value.salvaged is not None
    assert log_of(caught.value.salvaged) == Content(Snapshot(1, 1, b"one"), (entry(2, 3),))


async def test_a_truncated_log_is_damage_a_torn_write_is_cut(folder: Path, disk: MemoryDisk) -> None:
    """What was synced may not be missing; what was not may end anywhere."""
    log, _, acknowledged = await small_journal(folder, disk)
    content = disk.content(log)
    for length in range(len(content)):
        disk.put(log, content[:length])
        assert opened(folder, disk) is None
        disk.put(log, content[:length] + bytes(len(content) - length))
        assert opened(folder, disk) is None
    for point in ("journal.append.written", "journal.append.synced"):
        disk.put(log, content)

        def at(name: str, point: str = point) -> None:
            if name == point:
                raise Crash(name)

        files, _ = JournalFiles.open(folder, JOB, disk, at)
        synced = disk.content(log)
        with pytest.raises(Crash):
            files.append([entry(5, 3, size=700), entry(6, 3)])
        disk.kill()
        longer = disk.content(log)
        for length in range(len(synced), len(longer)):
            for rest in (b"", bytes(len(longer) - length), bytes(9000)):
                disk.put(log, longer[:length] + rest)
                recovered = opened(folder, disk)
                assert recovered is not None
                assert recovered.cut_bytes == length + len(rest) - len(synced)
                assert log_of(recovered) == log_of(acknowledged)
        disk.put(log, longer)
        recovered = opened(folder, disk)
        assert recovered is not None
        assert recovered.entries == [*acknowledged.entries, entry(5, 3, size=700), entry(6, 3)]
        disk.put(log, content)
        log, _, acknowledged = await small_journal(folder.parent / point, disk)
        folder, content = folder.parent / point, disk.content(log)


async def test_rot_is_found_when_the_log_is_rewritten(folder: Path, disk: MemoryDisk) -> None:
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, None)
    await journal.append([entry(1), entry(2)])
    disk.names[folder / "log"].seen[-30] ^= 1
    with pytest.raises(JournalDamaged):
        await journal.compact(1, b"one")
    with pytest.raises(JournalDamaged):
        await journal.append([entry(3)])
    await journal.close()
    assert disk.fds == {}


# ---- a full disk, a failing disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_bytes", [0, 1, 100, 600])
async def test_a_full_disk_takes_nothing_and_works_again(world: World, free_bytes: int) -> None:
    await world.start()
    await world.vote(1, ALICE)
    await world.append([entry(1)])
    world.disk.free_bytes = free_bytes
    assert world.journal
    for _ in range(2):
        with pytest.raises(JournalFull, match="the disk is full"):
            await world.journal.append([entry(2, size=700)])
        with pytest.raises(JournalFull):
            await world.journal.compact(1, bytes(700))
    assert world.journal.last_index == 1
    await world.vote(2, BOB)  # takes no room
    assert world.journal.hard_state == HardState(2, BOB)
    world.heal()
    await world.append([entry(2, 2)])
    world.lose_power(random.Random(1))
    await world.start()
    assert world.twin
    assert world.twin.log == Content(None, (entry(1), entry(2, 2)))


async def test_what_waits_behind_a_refused_append_is_refused_too(folder: Path, disk: MemoryDisk) -> None:
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, None)
    disk.free_bytes = 0
    disk.gate = trio.Event()
    refused: list[int] = []

    async def write(index: int) -> None:
        try:
            await journal.append([entry(index)])
        except JournalFull:
            refused.append(index)

    async with trio.open_nursery() as nursery:
        for index in (1, 2, 3):
            nursery.start_soon(write, index)
            await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert sorted(refused) == [1, 2, 3]
    assert journal.last_index == 0
    disk.free_bytes = float("inf")
    await journal.append([entry(1)])


async def test_a_full_disk_at_open_is_no_damage(folder: Path, disk: MemoryDisk) -> None:
    _, _, acknowledged = await small_journal(folder, disk)
    disk.free_bytes = 10
    with pytest.raises(JournalFull):
        await Journal.open(folder, JOB, disk)
    assert disk.fds == {}
    disk.free_bytes = float("inf")
    assert opened(folder, disk) == acknowledged


async def test_a_vote_that_found_no_room_halfway_spoils_only_one_slot(folder: Path, disk: MemoryDisk) -> None:
    """As on file systems that copy on write: overwriting needs room."""
    await small_journal(folder, disk)
    journal, _ = await Journal.open(folder, JOB, disk)
    for writes_before in (0, 1, 1, 0, 1):
        real, left = disk.pwrite, writes_before

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                real(fd, data[:100], offset)  # noqa: B023
                raise OSError(errno.ENOSPC, "no room")
            return real(fd, data, offset)  # noqa: B023

        disk.pwrite = pwrite  # type: ignore[method-assign, assignment]
        with pytest.raises(JournalFull):
            await journal.set_hard_state(journal.hard_state.term + 1, ALICE)
        disk.pwrite = real  # type: ignore[method-assign]
        recovered = opened(folder, disk)
        assert recovered is not None
        assert recovered.hard_state in ((3, BOB), (4, ALICE))
    await journal.set_hard_state(4, BOB)
    await journal.close()
    recovered = opened(folder, disk)
    assert recovered is not None
    assert recovered.hard_state == HardState(4, BOB)
    assert recovered.repaired == ()


@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
async def test_a_failing_disk_ends_the_journal_and_keeps_what_was_acknowledged(world: World, operation: str) -> None:
    await world.start()
    await world.vote(1, ALICE)
    await world.append([entry(1)])
    journal = world.journal
    assert journal
    world.disk.broken = {operation: errno.EIO}
    with pytest.raises(JournalFailed, match="appending to a journal failed: Input/output error"):
        await journal.append([entry(2)])
    world.disk.broken.clear()
    calls: list[JournalError] = []
    for call in (journal.append([entry(2)]), journal.set_hard_state(2, None), journal.compact(1, b"")):
        with pytest.raises(JournalFailed) as caught:
            await call
        calls.append(caught.value)
    assert len({id(error) for error in calls}) == 3
    await journal.close()
    assert world.disk.fds == {}


async def test_after_a_failed_fsync_nothing_in_the_page_cache_is_believed(folder: Path, disk: MemoryDisk) -> None:
    """The unacknowledged entry can be read and was never written: once `open` tells of it, it must last."""
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, None)
    disk.broken = {"fsync": errno.EIO}
    with pytest.raises(JournalFailed):
        await journal.append([entry(1)])
    await journal.close()
    disk.broken.clear()
    journal, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.entries == [entry(1)]
    disk.lose_power(random.Random(1))
    journal, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.entries == [entry(1)]


async def test_a_full_disk_told_at_the_fsync_leads_to_a_new_file(folder: Path, disk: MemoryDisk) -> None:
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, None)
    await journal.append([entry(1)])
    disk.broken = {"fsync": errno.ENOSPC}
    with pytest.raises(JournalFull):
        await journal.append([entry(2)])
    disk.broken.clear()
    disk.calls.clear()
    await journal.append([entry(2), entry(3)])
    assert "replace" in disk.calls
    disk.lose_power(random.Random(2))
    _, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.entries == [entry(1), entry(2), entry(3)]


async def test_a_vote_whose_fsync_failed_ends_the_journal(folder: Path, disk: MemoryDisk) -> None:
    await small_journal(folder, disk)
    journal, _ = await Journal.open(folder, JOB, disk)
    disk.broken = {"fsync": errno.ENOSPC}
    with pytest.raises(JournalFailed):
        await journal.set_hard_state(9, ALICE)
    disk.broken.clear()
    with pytest.raises(JournalFailed):
        await journal.append([entry(5, 3)])
    await journal.close()
    assert disk.fds == {}


@pytest.mark.parametrize("operation", ["open", "pread", "pwrite", "fsync", "replace", "fsync folder"])
async def test_a_disk_that_fails_at_open_or_create_is_no_damage(folder: Path, disk: MemoryDisk, operation: str) -> None:
    _, _, acknowledged = await small_journal(folder, disk)
    disk.broken = {operation: errno.EIO}
    with pytest.raises(JournalFailed):
        await Journal.open(folder, JOB, disk)
    if operation != "pread":
        with pytest.raises(JournalFailed):
            await Journal.create(folder.parent / "other", JOB, disk, incarnation=1)
    assert disk.fds == {}
    disk.broken.clear()
    assert opened(folder, disk) == acknowledged
