"""What a job's leader knows of its stages: which tasks exist, which are done, which failed, what may run again.

A pure fold of facts: `open_stage`, `add_segments`, `close_stage`, `complete`, `fail`, `cancel`. Rules:
- a task is settled once (done, failed for good, or cancelled) and never again: `complete` returns only what is new;
- completions count only under the function the stage declares;
- everything is kept by ranges: a million tasks that finish in order cost one interval.
No I/O, no clock. A replicated log can carry these calls as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.errors import RefusedError
from grid.core.ranges import RangeSet
from grid.core.segments import Segment, SegmentTable

RAISED: Final = "raised"
DIED: Final = "died"
TIMEOUT: Final = "timeout"
MEMORY: Final = "memory"
UNPICKLABLE: Final = "unpicklable"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

LOST_KINDS: Final = frozenset({DIED})
"""Failures that say nothing about the task: it runs again up to RETRIES_LOST_MAX times, whatever the job's retries."""


@dataclass(slots=True)
class StageState:
    """One stage. Invariants: settled ⊆ [0, declared); total is None until closed, then equals declared (or less, cancelled)."""

    index: int
    name: str
    ordered: bool
    options: StageOptions
    function: bytes
    function_size: int
    parent: tuple[int, int] | None = None
    occurrence: int = 0
    segments: SegmentTable = field(default_factory=SegmentTable)
    declared: int = 0
    total: int | None = None
    settled: RangeSet = field(default_factory=RangeSet)
    done: int = 0
    failed: int = 0
    cancelled: bool = False
    attempts: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)

    @property
    def unsettled(self) -> int:
        """Declared tasks with no final word yet."""
        return self.declared - self.settled.count

    @property
    def complete(self) -> bool:
        """No task of it can come or run any more."""
        return self.total is not None and self.settled.count >= self.declared


class Ledger:
    """The stages of one job."""

    def __init__(self, next_stage: int = 0) -> None:
        """next_stage: number of the first stage that no earlier leader opened."""
        self.next_stage = next_stage
        self._stages: dict[int, StageState] = {}
        self._live: dict[int, StageState] = {}  # those not complete, and some that became so since it was asked

    @property
    def unsettled(self) -> int:
        """Tasks declared and not settled. Costs what is under way, not what a long job has behind it: each pump asks."""
        for index in [index for index, stage in self._live.items() if stage.complete]:
            del self._live[index]
        return sum(stage.unsettled for stage in self._live.values())

    @property
    def stages(self) -> Collection[StageState]:
        """Those opened, in the order of opening."""
        return self._stages.values()

    def stage(self, index: int) -> StageState:
        """Raises RefusedError for a stage that was never opened."""
        stage = self._stages.get(index)
        if stage is None:
            raise RefusedError(f"the job has no stage {index}")
        return stage

    def open_stage(
        self,
        *,
        name: str,
        ordered: bool,
        options: StageOptions,
        function: bytes,
        function_size: int,
        parent: tuple[int, int] | None = None,
        occurrence: int = 0,
        index: int | None = None,
    ) -> StageState:
        """A stage: `index`, which an earlier leader opened, or a new one, numbered in the order of opening."""
        if len(self._stages) >= limits.STAGES_MAX:
            raise RefusedError(f"a job can have {limits.STAGES_MAX} stages")
        if index is None:
            index = self.next_stage
            self.next_stage += 1
        assert index < self.next_stage
        assert index not in self._stages
        stage = StageState(index, name, ordered, options, function, function_size, parent, occurrence)
        self._stages[index] = self._live[index] = stage
        return stage

    def add_segments(self, index: int, first: int, pieces: list[tuple[int, int, tuple[bytes, ...]]]) -> tuple[int, int]:
        """Declare tasks from `first` on: (count, size in bytes, refs) a segment. Returns the new range [lo, hi)."""
        stage = self.stage(index)
        if stage.total is not None and not stage.cancelled:
            raise RefusedError(f"stage {index} is closed")
        if first != stage.declared:
            raise RefusedError(f"stage {index} goes on at task {stage.declared}, not {first}")
        if any(count <= 0 or size < 0 for count, size, _ in pieces):
            raise RefusedError("a segment without tasks")
        if first + sum(count for count, _, _ in pieces) > limits.TASKS_MAX:
            raise RefusedError("too many tasks in one stage")
        at = first
        for count, size, refs in pieces:
            if not stage.cancelled:
                stage.segments.add(Segment(at, count, size, refs))
            at += count
        stage.declared = at
        if stage.cancelled:
            stage.settled.add(first, at)
        return first, at

    def close_stage(self, index: int, total: int) -> None:
        """No task follows. Closing twice with the same total is harmless."""
        stage = self.stage(index)
        if total != stage.declared or (stage.total is not None and stage.total != total and not stage.cancelled):
            raise RefusedError(f"stage {index} was declared with {stage.declared} tasks, not {total}")
        stage.total = total

    def complete(self, index: int, function: bytes, lo: int, hi: int) -> list[tuple[int, int]]:
        """Tasks [lo, hi) are done; returns the parts of it that were not settled before. Raises RefusedError."""
        stage = self.stage(index)
        if function != stage.function:
            raise RefusedError(f"a completion of another function than stage {index} declares")
        if not 0 <= lo < hi <= stage.declared:
            raise RefusedError(f"stage {index} has {stage.declared} tasks, not [{lo}, {hi})")
        new = stage.settled.add(lo, hi)
        stage.done += sum(b - a for a, b in new)
        _forget_failures(stage, lo, hi)
        return new

    def fail(self, index: int, function: bytes, task: int, kind: str) -> bool | None:
        """Task failed once. True: run it again; False: it failed for good now; None: it was settled before."""
        stage = self.stage(index)
        if function != stage.function:
            raise RefusedError(f"a failure of another function than stage {index} declares")
        if not 0 <= task < stage.declared:
            raise RefusedError(f"stage {index} has {stage.declared} tasks, not {task}")
        if task in stage.settled:
            return None
        table, allowed = (stage.lost, limits.RETRIES_LOST_MAX) if kind in LOST_KINDS else (stage.attempts, stage.options.retries)
        table[task] = table.get(task, 0) + 1
        if table[task] <= allowed:
            return True
        stage.settled.add(task, task + 1)
        stage.failed += 1
        _forget_failures(stage, task, task + 1)
        return False

    def attempt(self, index: int, task: int) -> int:
        """How often the task was begun and failed; 0 again once it is settled."""
        stage = self.stage(index)
        return stage.attempts.get(task, 0) + stage.lost.get(task, 0)

    def cancel(self, index: int, lo: int, hi: int) -> list[tuple[int, int]]:
        """Settle what is not settled of [lo, hi); hi = -1: all, and what is declared later too. Returns the new parts."""
        stage = self.stage(index)
        if hi < 0:
            stage.cancelled = True
            if stage.total is None:
                stage.total = stage.declared
            hi = stage.declared
        lo, hi = max(lo, 0), min(hi, stage.declared)
        if lo >= hi:
            return []
        _forget_failures(stage, lo, hi)
        return stage.settled.add(lo, hi)

    def missing(self, index: int) -> list[tuple[int, int]]:
        """Declared tasks that are not settled."""
        stage = self.stage(index)
        return list(stage.settled.gaps(0, stage.declared)) if stage.declared else []


def _forget_failures(stage: StageState, lo: int, hi: int) -> None:
    """Settled tasks need no count of their failures: the tables stay as small as what is under way."""
    for table in (stage.attempts, stage.lost):
        if table:
            for task in range(lo, hi) if hi - lo <= len(table) else [task for task in table if lo <= task < hi]:
                table.pop(task, None)
