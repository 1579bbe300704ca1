"""One journal, a naive twin of it, and all that may befall them.

The twin knows what was acknowledged, and what else a crash may leave: of the call that was under way all or nothing.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from grid.core.journal_records import NEVER_VOTED, Cut, Entry, HardState, Snapshot
from grid.journal import Journal
from grid.journal_errors import JournalFailed, JournalFull, Recovered
from tests.journal.disks import MemoryDisk

JOB = b"j" * 32


class Crash(BaseException):
    """The process died here."""


class Content(NamedTuple):
    """A log as the twin has it: a snapshot or none, and entries."""

    snapshot: Snapshot | None = None
    entries: tuple[Entry, ...] = ()

    @property
    def last_index(self) -> int:
        return self.entries[-1].index if self.entries else self.snapshot.index if self.snapshot else 0

    @property
    def base_index(self) -> int:
        return self.snapshot.index if self.snapshot else 0

    def term_at(self, index: int) -> int | None:
        terms = {entry.index: entry.term for entry in self.entries}
        if self.snapshot:
            terms[self.snapshot.index] = self.snapshot.term
        return terms.get(index)

    def with_records(self, records: list[Entry | Cut]) -> Content:
        entries = list(self.entries)
        for record in records:
            if isinstance(record, Cut):
                entries = [entry for entry in entries if entry.index < record.index]
            else:
                entries.append(record)
        return Content(self.snapshot, tuple(entries))

    def with_snapshot(self, snapshot: Snapshot) -> Content:
        fits = self.term_at(snapshot.index) == snapshot.term
        return Content(snapshot, tuple(entry for entry in self.entries if fits and entry.index > snapshot.index))


EMPTY = Content()


@dataclass(frozen=True)
class Twin:
    """What is acknowledged, and what else may be found after a crash."""

    hard: HardState = NEVER_VOTED
    log: Content = EMPTY
    hards: frozenset[HardState] = frozenset()
    logs: frozenset[Content] = frozenset()


def log_of(recovered: Recovered) -> Content:
    return Content(recovered.snapshot, tuple(recovered.entries))


class World:
    """Calls go to journal and twin; `journal` is None while the process is down."""

    def __init__(self, folder: Path, disk: MemoryDisk | None = None) -> None:
        self.folder = folder
        self.disk = disk or MemoryDisk()
        self.journal: Journal | None = None
        self.twin: Twin | None = None  # None before a create was acknowledged
        self.incarnation = 0
        self.crash_at = ""
        self.points: list[str] = []
        self.crashes = 0

    def at(self, point: str) -> None:
        self.points.append(point)
        if point == self.crash_at:
            self.crash_at = ""
            raise Crash(point)

    async def start(self) -> None:
        """Create the journal, or open it and hold what it says against the twin."""
        assert self.journal is None
        try:
            if self.twin is None:
                await Journal.destroy(self.folder, self.disk)
                self.incarnation += 1
                self.journal, _ = await Journal.create(self.folder, JOB, self.disk, incarnation=self.incarnation, at=self.at)
                self.twin = Twin()
                return
            self.journal, recovered = await Journal.open(self.folder, JOB, self.disk, at=self.at)
        except (Crash, JournalFull, JournalFailed, OSError):
            self.crashes += 1
            assert not self.disk.fds
            return
        assert recovered.incarnation == self.incarnation
        hard, log = recovered.hard_state, log_of(recovered)
        assert hard in {self.twin.hard} | self.twin.hards
        assert log in {self.twin.log} | self.twin.logs
        assert recovered.repaired == ()
        self.twin = Twin(hard, log)
        self.check()

    def check(self) -> None:
        """The journal knows of itself what the twin knows."""
        if self.journal is not None and self.twin is not None:
            assert self.journal.hard_state == self.twin.hard
            assert self.journal.last_index == self.twin.log.last_index

    async def vote(self, term: int, vote: bytes | None) -> None:
        journal, twin = self._up()
        after = HardState(term, vote)
        may_be = replace(twin, hards=twin.hards | {after})
        if await self._try(journal.set_hard_state(term, vote), may_be):
            self.twin = replace(twin, hard=after, hards=frozenset())
        self.check()

    async def append(self, records: list[Entry | Cut]) -> None:
        journal, twin = self._up()
        await self._change_log(journal.append(records), twin.log.with_records(records))

    async def install(self, snapshot: Snapshot) -> None:
        journal, twin = self._up()
        await self._change_log(
            journal.install_snapshot(snapshot.index, snapshot.term, snapshot.data), twin.log.with_snapshot(snapshot)
        )

    async def compact(self, index: int, data: bytes) -> None:
        journal, twin = self._up()
        term = twin.log.term_at(index)
        assert term is not None
        await self._change_log(journal.compact(index, data), twin.log.with_snapshot(Snapshot(index, term, data)))

    def _up(self) -> tuple[Journal, Twin]:
        assert self.journal is not None
        assert self.twin is not None
        return self.journal, self.twin

    async def _change_log(self, call: Any, after: Content) -> None:
        assert self.twin
        may_be = replace(self.twin, logs=self.twin.logs | {after})
        if await self._try(call, may_be):
            self.twin = replace(self.twin, log=after, logs=frozenset())
        self.check()

    async def _try(self, call: Any, may_be: Twin) -> bool:
        try:
            await call
        except JournalFull:
            self.twin = may_be
            return False
        except (Crash, JournalFailed):
            self.twin = may_be
            self.kill()
            return False
        return True

    def kill(self) -> None:
        self.crashes += 1
        self.journal = None
        self.disk.kill()

    def lose_power(self, rng: random.Random) -> None:
        self.crashes += 1
        self.journal = None
        self.disk.lose_power(rng)

    async def close(self) -> None:
        if self.journal is not None:
            journal, self.journal = self.journal, None
            await journal.close()
            assert not self.disk.fds

    # ---- at random -----------------------------------------------------------------------------------------------------------

    async def act(self, rng: random.Random) -> None:
        """One call, with what it needs to be a legal one."""
        assert self.twin
        log, hard = self.twin.log, self.twin.hard
        kind = rng.choice(("vote", "append", "append", "append", "cut", "compact", "install"))
        if kind == "vote" or hard.term == 0:
            return await self.vote(hard.term + rng.randint(1, 2), rng.choice((None, b"a" * 20, b"b" * 20)))
        if kind == "cut" and log.entries:
            first = rng.randint(log.base_index + 1, log.last_index)
            return await self.append([Cut(first), *self._entries(rng, first)])
        if kind == "compact" and log.entries:
            return await self.compact(rng.randint(log.base_index + 1, log.last_index), rng.randbytes(rng.choice((3, 700))))
        if kind == "install":
            index = log.last_index + rng.randint(1, 3)
            return await self.install(Snapshot(index, hard.term, rng.randbytes(rng.choice((3, 2000)))))
        return await self.append(self._entries(rng, log.last_index + 1))

    def _entries(self, rng: random.Random, first: int) -> list[Entry | Cut]:
        assert self.twin
        count, size = rng.choice(((1, 20), (3, 40), (2, 1500), (1, 2500)))
        return [Entry(index, self.twin.hard.term, rng.randbytes(size)) for index in range(first, first + count)]

    async def misfortune(self, rng: random.Random, points: tuple[str, ...]) -> None:
        """What may befall a machine."""
        match rng.randrange(7):
            case 0:
                self.kill()
            case 1:
                self.lose_power(rng)
            case 2:
                await self.close()
            case 3:
                self.crash_at = rng.choice((*points, *["journal.append.written"] * (len(points) // 4)))  # the richest one
            case 4:
                self.disk.free_bytes = rng.choice((0, 10, 300, 1000))
            case 5:
                self.disk.broken = {rng.choice(("pwrite", "fsync", "fsync folder", "replace", "open", "pread")): errno.EIO}
            case _:
                self.disk.broken = {"fsync": errno.ENOSPC}

    def heal(self) -> None:
        self.disk.broken.clear()
        self.disk.free_bytes = float("inf")


async def torture(seed: int, folder: Path, points: tuple[str, ...], steps: int = 60) -> World:
    """A random life; raises AssertionError or JournalDamaged if the journal breaks its word."""
    rng = random.Random(seed)
    world = World(folder)
    world.disk.write_bytes_max = rng.choice((1 << 30, 1000, 512))
    world.crash_at = rng.choice((*points, *[""] * len(points)))
    for _ in range(steps):
        if rng.random() < 0.15:
            world.heal()
        if world.journal is None:
            if rng.random() < 0.5:
                world.lose_power(rng)
            await world.start()
        elif rng.random() < 0.2:
            await world.misfortune(rng, points)
        else:
            await world.act(rng)
    world.heal()
    world.crash_at = ""
    for _ in range(2):
        world.lose_power(rng)
        await world.start()
    await world.close()
    return world
