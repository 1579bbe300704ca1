"""How much work goes where at once: the pace of each stage as measured, and the grain that follows from it.

Rules: the grain aims at GRAIN_S of work a bundle; an unknown pace starts with one task, or with what an earlier stage of the
same function lets expect, and grows at most GROWTH-fold; near the end every worker gets a share, but none shorter than what
handing it out costs. Deterministic; no clock: durations are arguments.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from grid.core import limits

GROWTH: Final = 16
"""A new bundle has at most so many times the tasks of the largest one measured: one lucky short task proves little."""
SHARE_S_MIN: Final = 0.0005
"""A share near a stage's end is worth at least so much work: two processes wake up for it and two messages are sent, which
costs about as much. Smaller ones balanced less than they cost."""
EXPECTED_S: Final = 0.005
"""Work in a bundle while all that is known is how long an earlier stage took. Where that misleads, the worker gives back what it
has not begun (grid/worker/child.py)."""
DECAY: Final = 0.7
"""Weight that earlier measurements keep when a new one of GRAIN_S comes in: the pace follows a stage whose tasks change."""


class Pace:
    """Seconds a task of one stage, as a decaying ratio of work to tasks."""

    __slots__ = ("_expected_s", "_seconds", "_tasks", "largest")

    def __init__(self, earlier: Pace | None = None) -> None:
        """earlier: of a stage of the same function."""
        self._expected_s: float | None = None if earlier is None else earlier.per_task_s or earlier._expected_s
        self._seconds = 0.0
        self._tasks = 0.0
        self.largest = 0

    def record(self, tasks: int, elapsed_s: float) -> None:
        """`tasks` took `elapsed_s` of one worker's time."""
        assert tasks > 0
        assert elapsed_s >= 0
        weight = DECAY ** min(4.0, elapsed_s / limits.GRAIN_S + tasks / limits.GRAIN_TASKS_MAX)
        self._seconds = self._seconds * weight + elapsed_s
        self._tasks = self._tasks * weight + tasks
        self.largest = max(self.largest, tasks)

    def hint(self, per_task_s: float) -> None:
        """What another peer measured; counts only until something is measured here."""
        if self._tasks == 0 and per_task_s > 0:
            self._tasks = 1.0
            self._seconds = per_task_s
            self.largest = max(1, int(limits.GRAIN_S / per_task_s))

    @property
    def per_task_s(self) -> float | None:
        """None while nothing is known; never 0."""
        if self._tasks == 0:
            return None
        return max(self._seconds / self._tasks, 1e-8)

    def grain(self, remaining: int, workers: int) -> int:
        """Tasks for the next bundle, when `remaining` are queued for about `workers` workers."""
        assert remaining > 0
        per_task_s = self.per_task_s
        known = per_task_s is not None
        per_task_s = per_task_s or self._expected_s
        if per_task_s is None:
            return 1
        wanted = min(limits.GRAIN_S / per_task_s, self.largest * GROWTH) if known else EXPECTED_S / per_task_s
        fair = max(ceil(remaining / (2 * max(workers, 1))), SHARE_S_MIN / per_task_s)
        return max(1, int(min(wanted, fair, limits.GRAIN_TASKS_MAX, remaining)))
