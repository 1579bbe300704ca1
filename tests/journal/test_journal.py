"""The journal on a sound disk: what it takes, refuses, shares and forgets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import trio
import trio.testing

from grid import journal as journal_module
from grid.blobs.disk import RealDisk
from grid.core.journal_records import DATA_BYTES_MAX, Cut, Entry, HardState, Snapshot
from grid.journal import Journal
from grid.journal_errors import (
    JournalBusy,
    JournalClosed,
    JournalDamaged,
    JournalExists,
    JournalFailed,
    JournalMissing,
)
from tests.journal.disks import MemoryDisk
from tests.journal.world import JOB, World

ALICE, BOB = b"a" * 20, b"b" * 20


def entries(first: int, last: int, term: int = 1, data: bytes = b"fact") -> list[Entry]:
    return [Entry(index, term, data) for index in range(first, last + 1)]


async def made(folder: Path, disk: MemoryDisk, term: int = 1) -> Journal:
    journal, recovered = await Journal.create(folder, JOB, disk, incarnation=7)
    assert (recovered.incarnation, recovered.entries, recovered.snapshot) == (7, [], None)
    await journal.set_hard_state(term, ALICE)
    return journal


async def test_on_a_real_disk_all_comes_back(folder: Path) -> None:
    disk = RealDisk()
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=3)
    await journal.set_hard_state(2, ALICE)
    await journal.append(entries(1, 5, term=1))
    await journal.compact(2, b"state at 2")
    await journal.append([Cut(5), *entries(5, 6, term=2)])
    await journal.close()
    for _ in range(2):
        journal, recovered = await Journal.open(folder, JOB, disk)
        assert recovered.incarnation == 3
        assert recovered.hard_state == journal.hard_state == HardState(2, ALICE)
        assert recovered.snapshot == Snapshot(2, 1, b"state at 2")
        assert recovered.entries == entries(3, 4) + entries(5, 6, term=2)
        assert (recovered.cut_bytes, recovered.repaired) == (0, ())
        status = [entry.stat() for entry in os.scandir(folder)]
        assert journal.bytes_used == sum(one.st_size for one in status)
        assert {one.st_mode & 0o777 for one in status} == {0o600}
        await journal.close()
    await Journal.destroy(folder, disk)
    assert not os.listdir(folder.parent)


async def test_a_cut_replaces_a_conflicting_suffix(world: World) -> None:
    await world.start()
    await world.vote(1, None)
    await world.append([*entries(1, 6)])
    await world.vote(2, BOB)
    assert world.journal
    await world.journal.truncate(4)
    assert world.journal.last_index == 3
    await world.journal.append(entries(4, 4, term=2))
    await world.journal.close()
    _, recovered = await Journal.open(world.folder, JOB, world.disk)
    assert recovered.entries == entries(1, 3) + entries(4, 4, term=2)


async def test_a_snapshot_keeps_what_agrees_and_drops_what_does_not(folder: Path, disk: MemoryDisk) -> None:
    """Raft, figure 13: entries that follow the snapshot's last one stay if the log has that one."""
    journal = await made(folder, disk, term=2)
    await journal.append(entries(1, 6))
    await journal.install_snapshot(4, 1, b"agrees")
    assert journal.last_index == 6
    await journal.install_snapshot(5, 2, b"differs")
    assert journal.last_index == 5
    await journal.install_snapshot(9, 2, b"ahead")
    await journal.append(entries(10, 10, term=2))
    await journal.close()
    _, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.snapshot == Snapshot(9, 2, b"ahead")
    assert recovered.entries == entries(10, 10, term=2)


async def test_compaction_keeps_a_long_log_small(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    largest = 0
    for index in range(1, 400):
        await journal.append(entries(index, index, data=bytes(30_000)))
        largest = max(largest, journal.bytes_used)
        if journal.wants_compact:
            await journal.compact(index, bytes(100_000))
    assert largest < journal_module.COMPACT_BYTES_MIN + 200_000
    assert sum(len(inode.seen) for inode in disk.names.values()) == journal.bytes_used


async def test_a_log_longer_than_one_piece_is_rewritten_whole(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    facts = [Entry(index, 1, bytes([index]) * 500_000) for index in range(1, 9)]
    await journal.append(facts)
    await journal.compact(1, bytes(3_000_000))
    await journal.close()
    _, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.entries == facts[1:]
    assert recovered.snapshot == Snapshot(1, 1, bytes(3_000_000))


async def test_what_no_raft_server_does_is_refused(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk, term=3)
    await journal.append(entries(1, 3, term=2))
    before = dict.fromkeys(disk.names), disk.calls.count("pwrite")
    refused = [
        (journal.set_hard_state(2, None), "term 2"),
        (journal.set_hard_state(3, BOB), "term 3"),
        (journal.set_hard_state(3, None), "term 3"),
        (journal.set_hard_state(4, b"v" * 65), "not a peer's id"),
        (journal.append(entries(4, 4, term=4)), "was not stored"),
        (journal.append(entries(5, 5, term=2)), "does not follow"),
        (journal.append([*entries(4, 4, term=3), *entries(6, 6, term=3)]), "does not follow"),
        (journal.append(entries(4, 4, term=1)), "less than"),
        (journal.append(entries(4, 4, term=2, data=bytes(DATA_BYTES_MAX + 1))), "has .* bytes"),
        (journal.truncate(4), "no entry 4"),
        (journal.truncate(0), "no entry 0"),
        (journal.compact(4, b""), "no entry 4"),
        (journal.compact(0, b""), "older"),
        (journal.install_snapshot(9, 4, b""), "was not stored"),
    ]
    for call, why in refused:
        with pytest.raises(ValueError, match=why):
            await call
    assert (dict.fromkeys(disk.names), disk.calls.count("pwrite")) == before
    await journal.append(entries(4, 4, term=3))
    await journal.set_hard_state(3, ALICE)


async def test_appends_that_wait_share_one_fsync(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    disk.calls.clear()
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(append_next, journal)
        await trio.testing.wait_all_tasks_blocked()
        assert journal.last_index == 0
        disk.gate.set()
    assert journal.last_index == 100
    assert disk.calls.count("fsync") == 2  # the first went alone, the 99 that came meanwhile together


async def append_next(journal: Journal) -> None:
    """Append an entry at the next index that nobody has taken."""
    index = journal._staged.last_index + 1
    await journal.append(entries(index, index))


async def test_calls_take_effect_in_their_order(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    disk.gate = trio.Event()
    calls = (
        (journal.append, entries(1, 4)),
        (journal.set_hard_state, 2, BOB),
        (journal.append, entries(5, 5, term=2)),
        (journal.compact, 5, b"five"),
        (journal.append, entries(6, 7, term=2)),
        (journal.truncate, 7),
        (journal.close,),
    )
    async with trio.open_nursery() as nursery:
        for call, *arguments in calls:
            nursery.start_soon(call, *arguments)
            await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    _, recovered = await Journal.open(folder, JOB, disk)
    assert recovered.hard_state == HardState(2, BOB)
    assert recovered.snapshot == Snapshot(5, 2, b"five")
    assert recovered.entries == entries(6, 6, term=2)


async def test_a_cancelled_append_keeps_its_place_and_holds_nobody_up(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.append, entries(1, 1))
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await journal.append(entries(2, 2))
        assert scope.cancelled_caught
        nursery.start_soon(journal.set_hard_state, 2, None)
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert journal.last_index == 2
    assert journal.hard_state == HardState(2, None)


async def test_a_cancelled_writer_finishes_its_step(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.append, entries(1, 1))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        disk.gate.set()
    assert journal.last_index == 1
    await journal.append(entries(2, 2))


async def test_too_much_waiting_is_refused(folder: Path, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "WAITING_BYTES_MAX", 1000)
    journal = await made(folder, disk)
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for index in (1, 2):  # one is being written; one larger than the bound may wait, alone
            nursery.start_soon(journal.append, entries(index, index, data=bytes(2000)))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(JournalBusy):
            await journal.append(entries(3, 3))
        disk.gate.set()
    await journal.append(entries(3, 3))
    assert journal.last_index == 3


async def test_large_batches_are_cut(folder: Path, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BATCH_BYTES_MAX", 1000)
    journal = await made(folder, disk)
    disk.calls.clear()
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(append_next, journal)
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert journal.last_index == 9
    assert disk.calls.count("fsync") == 2


async def test_closed_is_closed(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    await journal.close()
    await journal.close()
    assert disk.fds == {}
    for call in (journal.append(entries(1, 1)), journal.set_hard_state(5, None), journal.compact(1, b"")):
        with pytest.raises(JournalClosed):
            await call


async def test_create_never_overwrites(folder: Path, disk: MemoryDisk) -> None:
    await (await made(folder, disk)).close()
    with pytest.raises(JournalExists):
        await Journal.create(folder, JOB, disk, incarnation=8)
    disk.unlink(folder / "log")
    with pytest.raises(JournalExists):
        await Journal.create(folder, JOB, disk, incarnation=8)
    with pytest.raises(JournalMissing):
        await Journal.open(folder, JOB, disk)
    await Journal.destroy(folder, disk)
    await Journal.destroy(folder, disk)
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=8)
    await journal.close()
    assert disk.fds == {}
    with pytest.raises(ValueError, match="job"):
        await Journal.create(folder, b"", disk, incarnation=1)


async def test_a_missing_file_is_a_missing_journal(folder: Path, disk: MemoryDisk) -> None:
    with pytest.raises(JournalMissing):
        await Journal.open(folder, JOB, disk)
    await (await made(folder, disk)).close()
    disk.unlink(folder / "state")
    with pytest.raises(JournalDamaged, match="missing"):
        await Journal.open(folder, JOB, disk)
    assert disk.fds == {}


async def test_anothers_journal_is_not_taken_for_ours(folder: Path, disk: MemoryDisk) -> None:
    await (await made(folder, disk)).close()
    with pytest.raises(JournalDamaged, match="another job"):
        await Journal.open(folder, b"k" * 32, disk)
    other, _ = await Journal.create(folder.parent / "other", JOB, disk, incarnation=8)
    await other.close()
    disk.put(folder / "log", disk.content(folder.parent / "other" / "log"))
    with pytest.raises(JournalDamaged, match="belong together"):
        await Journal.open(folder, JOB, disk)


async def test_an_older_copy_of_a_file_is_damage(folder: Path, disk: MemoryDisk) -> None:
    journal = await made(folder, disk)
    old = {path: disk.content(path) for path in list(disk.names)}
    await journal.set_hard_state(2, BOB)
    await journal.append(entries(1, 1, term=2))
    newer = {path: disk.content(path) for path in list(disk.names)}
    await journal.compact(1, b"")
    await journal.close()
    newest = {path: disk.content(path) for path in list(disk.names)}
    for name, copies, why in (
        ("state", old, "vote is older"),
        ("log", old, "older file"),
        ("log", newer, "older file"),
    ):
        for path, content in newest.items():
            disk.put(path, content)
        disk.put(folder / name, copies[folder / name])
        with pytest.raises(JournalDamaged, match=why):
            await Journal.open(folder, JOB, disk)


async def test_a_newer_format_is_no_damage(folder: Path, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.journal_files.FORMAT", 2)
    await (await made(folder, disk)).close()
    monkeypatch.undo()
    with pytest.raises(JournalFailed, match=re.escape("a newer version")):
        await Journal.open(folder, JOB, disk)
