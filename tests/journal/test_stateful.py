"""Hypothesis looks for a life in which journal and twin part."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from grid.core.journal_records import Cut, Entry, Snapshot
from grid.journal_files import POINTS
from tests.journal.world import World

VOTES = st.sampled_from((None, b"a" * 20, b"b" * 20))
SIZES = st.lists(st.sampled_from((0, 1, 30, 460, 512, 1500)), min_size=1, max_size=4)
SEEDS = st.integers(0, 1 << 20)


def up(machine: JournalLives) -> bool:
    return machine.world.journal is not None


def has_term(machine: JournalLives) -> bool:
    return up(machine) and machine.world.twin is not None and machine.world.twin.hard.term > 0


def has_entries(machine: JournalLives) -> bool:
    return has_term(machine) and machine.world.twin is not None and bool(machine.world.twin.log.entries)


class JournalLives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.parent = Path(tempfile.mkdtemp())
        self.world = World(self.parent / "journal")

    def teardown(self) -> None:
        shutil.rmtree(self.parent)

    def do(self, call: Callable[..., Any], *arguments: Any) -> None:
        trio.run(call, *arguments)

    def entries(self, first: int, sizes: list[int]) -> list[Entry]:
        assert self.world.twin
        term = self.world.twin.hard.term
        return [Entry(index, term, bytes([index % 256]) * size) for index, size in enumerate(sizes, first)]

    @initialize(write_bytes_max=st.sampled_from((1 << 30, 600)), point=st.sampled_from(("", *POINTS)))
    def begin(self, write_bytes_max: int, point: str) -> None:
        self.world.disk.write_bytes_max = write_bytes_max
        self.world.crash_at = point
        self.do(self.world.start)

    @precondition(lambda self: not up(self))
    @rule()
    def start(self) -> None:
        self.do(self.world.start)

    @precondition(up)
    @rule(more=st.integers(1, 2), vote=VOTES)
    def vote(self, more: int, vote: bytes | None) -> None:
        assert self.world.twin
        self.do(self.world.vote, self.world.twin.hard.term + more, vote)

    @precondition(has_term)
    @rule(sizes=SIZES)
    def append(self, sizes: list[int]) -> None:
        assert self.world.twin
        self.do(self.world.append, self.entries(self.world.twin.log.last_index + 1, sizes))

    @precondition(has_entries)
    @rule(sizes=SIZES, data=st.data())
    def replace_suffix(self, sizes: list[int], data: st.DataObject) -> None:
        assert self.world.twin
        log = self.world.twin.log
        first = data.draw(st.integers(log.base_index + 1, log.last_index))
        self.do(self.world.append, [Cut(first), *self.entries(first, sizes)])

    @precondition(has_entries)
    @rule(size=st.sampled_from((0, 20, 3000)), data=st.data())
    def compact(self, size: int, data: st.DataObject) -> None:
        assert self.world.twin
        log = self.world.twin.log
        index = data.draw(st.integers(log.base_index + 1, log.last_index))
        self.do(self.world.compact, index, b"c" * size)

    @precondition(has_term)
    @rule(more=st.integers(-3, 3), size=st.sampled_from((0, 20, 3000)))
    def install(self, more: int, size: int) -> None:
        assert self.world.twin
        log = self.world.twin.log
        index = max(log.base_index + 1, log.last_index + more)
        self.do(self.world.install, Snapshot(index, self.world.twin.hard.term, b"i" * size))

    @precondition(up)
    @rule()
    def close(self) -> None:
        self.do(self.world.close)

    @rule()
    def kill(self) -> None:
        self.world.kill()

    @rule(seed=SEEDS)
    def lose_power(self, seed: int) -> None:
        self.world.lose_power(random.Random(seed))

    @rule(point=st.sampled_from(POINTS))
    def crash_soon(self, point: str) -> None:
        self.world.crash_at = point

    @rule(free_bytes=st.sampled_from((0, 10, 300, 1000)))
    def fill_up(self, free_bytes: int) -> None:
        self.world.disk.free_bytes = free_bytes

    @rule(
        operation=st.sampled_from(("open", "pread", "pwrite", "fsync", "replace", "fsync folder")),
        number=st.sampled_from((errno.EIO, errno.ENOSPC)),
    )
    def fail(self, operation: str, number: int) -> None:
        self.world.disk.broken = {operation: number}

    @rule()
    def heal(self) -> None:
        self.world.heal()


JournalLives.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestJournalLives = JournalLives.TestCase
