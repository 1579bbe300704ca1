"""How a job's map stages were cut into segments the last time, so that a driver that runs anew cuts them alike.

The peer writes the file before it starts the driver (`write`) and names it in Setup.replay; the driver's n-th map of a given
(name, ordered) follows the n-th record of that key (`Record.take`). Segments that are cut where they were cut, of the same
items, have the same bytes, so their recorded results count. Rules: a record only says where to cut; a wrong or damaged one
costs time, never exactness. Submitted calls are matched one by one, wherever they are cut: their stages have no record.

The file is msgpack: a list of `StageCuts` in the order in which the stages were opened.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from itertools import groupby

import msgspec


class StageCuts(msgspec.Struct, array_like=True, frozen=True):
    """One stage. `runs`: (how many segments, tasks in each of them), in index order from task 0."""

    name: str
    ordered: bool
    parent_stage: int = -1  # -1: the driver's own
    parent_index: int = -1
    runs: tuple[tuple[int, int], ...] = ()


def stage_cuts(name: str, ordered: bool, counts: Iterable[int], parent: tuple[int, int] | None = None) -> StageCuts:
    """The record of a stage whose segments had so many tasks, in index order and without a gap from task 0 on."""
    runs = tuple((sum(1 for _ in group), count) for count, group in groupby(counts))
    return StageCuts(name, ordered, *(parent or (-1, -1)), runs)


def write(path: str | os.PathLike[str], stages: Iterable[StageCuts]) -> None:
    """Write the file. Raises OSError."""
    with open(path, "wb") as file:
        file.write(msgspec.msgpack.encode(list(stages)))


class Cuts:
    """Where one stage is to be cut. `left`: tasks that the segment at hand still lacks; 0: the record has ended."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        self._runs = deque((segments, tasks) for segments, tasks in runs if segments > 0 and tasks > 0)
        self._segments = 0
        self._tasks = 0
        self.left = 0
        self._next()

    def _next(self) -> None:
        if not self._segments and self._runs:
            self._segments, self._tasks = self._runs.popleft()
        self.left = self._tasks if self._segments else 0
        self._segments = max(0, self._segments - 1)

    def cut(self, count: int) -> None:
        """A segment of `count` tasks was cut: here, or too early because the producer paused."""
        while self.left and count >= self.left:
            count -= self.left
            self._next()
        if self.left:
            self.left -= count


class Record:
    """The stages of a replay file, each to be taken once."""

    def __init__(self, path: str) -> None:
        self._stages: dict[tuple[str, bool, int, int], deque[StageCuts]] = {}
        try:
            with open(path, "rb") as file:
                stages = msgspec.msgpack.decode(file.read(), type=list[StageCuts])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return
        for stage in stages:
            key = (stage.name, stage.ordered, stage.parent_stage, stage.parent_index)
            self._stages.setdefault(key, deque()).append(stage)

    def take(self, name: str, ordered: bool, parent_stage: int, parent_index: int) -> Cuts | None:
        """The cuts of the next stage of this key; None: it was never cut, or there is no record."""
        waiting = self._stages.get((name, ordered, parent_stage, parent_index))
        cuts = Cuts(waiting.popleft().runs) if waiting else None
        return cuts if cuts is not None and cuts.left else None
