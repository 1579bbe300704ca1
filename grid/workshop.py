"""A peer's slots and who may use them: every site of every job on this machine shares them fairly.

Rules: `pump` is the only place where work is handed to workers; it never waits, and may be called from anywhere at any
time; the job with the fewest busy slots goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from grid.site import Site
    from grid.worker.pool import WorkerPool

TIMEOUT_CHECK_S = 0.05
"""How late a task's time limit may be noticed."""
REST_CHECK_S = 5.0
"""How often idle workers are looked for."""


class Workshop:
    """Slots, the worker pool, the sites."""

    def __init__(self, pool: WorkerPool, slots: int, tags: tuple[str, ...] = ()) -> None:
        assert slots >= 0
        self.tags = frozenset(tags)
        self.pool = pool
        self.slots = slots
        self.sites: list[Site] = []
        self.hungry: list[Callable[[], None]] = []
        """Told after each pump: slots may have come free."""
        self.timed = trio.Event()
        """Set by a site that got a stage with a time limit."""
        self.draining = False
        self._pumping = False
        self._again = False
        self._turn = 0
        self._turns: dict[Site, int] = {}  # when each was served last: of equals, the one that waited longest is next

    @property
    def busy(self) -> int:
        """Slots in use."""
        return sum(site.busy for site in self.sites)

    @property
    def free(self) -> int:
        """Slots that wait for work."""
        return max(0, self.slots - self.busy)

    def pump(self) -> None:
        """Hand out what can be handed out now."""
        if self._pumping:
            self._again = True
            return
        self._pumping = True
        try:
            while True:
                self._again = False
                self._share()
                if not self._again:
                    break
        finally:
            self._pumping = False
        for tell in self.hungry:
            tell()

    def _share(self) -> None:
        if self.draining:
            return
        waiting = [site for site in self.sites if site.deque]
        free = self.free
        while free > 0 and waiting:
            site = min(waiting, key=lambda s: (s.busy, self._turns.get(s, 0)))
            used = site.feed(free)
            if used > 0:
                self._turn += 1
                self._turns[site] = self._turn
            else:
                waiting.remove(site)
            free -= used
        waiting = [site for site in self.sites if site.deque]
        least = min((site.busy for site in waiting), default=0)
        for site in waiting:
            if site.busy <= least:  # else its slots would never come free for a job that has fewer
                site.feed_ahead()
        if len(self._turns) > len(self.sites):
            self._turns = {site: turn for site, turn in self._turns.items() if site in self.sites}

    async def watch(self) -> None:
        """Time limits and idle workers, until cancelled."""
        rested_s = trio.current_time()
        while True:
            if any(site.has_timeouts for site in self.sites):
                await trio.sleep(TIMEOUT_CHECK_S)
            else:
                self.timed = trio.Event()
                with trio.move_on_after(REST_CHECK_S):
                    await self.timed.wait()
            for site in self.sites:
                if site.has_timeouts:
                    site.crew.check_timeouts()
            now_s = trio.current_time()
            if now_s - rested_s >= REST_CHECK_S:
                rested_s = now_s
                for site in self.sites:
                    site.crew.rest(now_s)
