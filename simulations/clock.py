"""The world's clock: stands still while anything can run, then jumps to the next deadline.

What `trio.testing.MockClock(autojump_threshold=0)` does, without asking the real clock at each look. Rules: starts at 0; a world
in which nothing is left to wait for breaks (trio would look for I/O for ever).
"""

from __future__ import annotations

import math

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT

IDLE_MAX = 1_000
"""Looks at pipes, one after the other, with nothing there."""
FOR_EVER_S = 999_999.0
"""To trio's I/O: don't wake for a deadline, the clock jumps there."""


class WorldClock(trio.abc.Clock):
    """One run's."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._idle = 0

    def start_clock(self) -> None:
        """See `trio.abc.Clock`."""
        GLOBAL_RUN_CONTEXT.runner.clock_autojump_threshold = 0

    def current_time(self) -> float:
        """See `trio.abc.Clock`."""
        return self.now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """See `trio.abc.Clock`."""
        return 0.0 if deadline <= self.now_s else FOR_EVER_S

    def _autojump(self) -> None:
        """Called by trio when nothing can run."""
        deadline = GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
        if deadline < math.inf:
            self.now_s, self._idle = max(self.now_s, deadline), 0
            return
        self._idle += 1  # trio is about to look at its pipes
        if self._idle > IDLE_MAX:
            raise AssertionError("nothing in this world waits for any time: it stands still")
