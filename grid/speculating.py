"""A leader's second copies of what runs too long: who gets them, and who is told to stop when one of the two is done.

The leader's own slots take some when they have nothing else (`due`), a thief for which there is nothing else gets others
(`offer`). Rules: nobody gets a copy of what it holds already; a task that waits for children of its own is left alone (its copy
would make them all again); the first result wins, as the ledger has it; the other holder is told to drop its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.deque import Work
from grid.core.ranges import Range, RangeSet
from grid.core.speculation import Late, Speculation, apart, share
from grid.giving import REF_BYTES, SEGMENTS_MAX

if TYPE_CHECKING:
    from grid.core.bundle import StageOptions
    from grid.core.ledger import StageState
    from grid.leader import Leader

SILENT_HEARTBEATS: Final = 2.5
"""A peer that missed two may be stopped; its claims stand until LEASE_S."""


class Speculator:
    """One leadership's. slots_of: how many tasks a peer runs at a time."""

    def __init__(self, leader: Leader, slots_of: Callable[[PeerId], int] = lambda peer: 1) -> None:
        self._leader = leader
        self._slots_of = slots_of
        self._table = Speculation()
        self._offers: list[Late] = []
        self._copied: dict[int, RangeSet] = {}
        self._drops: dict[PeerId, dict[int, RangeSet]] = {}

    # ---- what happens ----

    def finished(self, peer: PeerId, stage: int, tasks: int, elapsed_us: int) -> None:
        """A peer reported tasks done, new or not."""
        self._table.finished(peer, stage, tasks, elapsed_us / 1e6, trio.current_time())

    def settled(self, stage: int, lo: int, hi: int, by: PeerId | None) -> None:
        """Tasks got their final word, from `by` (None: nobody ran them). Call it before the claims forget them."""
        copied = self._copied.get(stage)
        if copied is None or not copied.touches(lo, hi):
            return
        copied.remove(lo, hi)
        if not copied:
            del self._copied[stage]
        claims = self._leader.claims
        for peer in claims.peers():
            if peer != by:
                for part in claims.held(peer, stage).intersect(lo, hi):
                    self._drops.setdefault(peer, {}).setdefault(stage, RangeSet()).add(*part)

    def drops(self) -> list[tuple[PeerId, tuple[tuple[int, tuple[Range, ...]], ...]]]:
        """Who is to be told that ranges it holds are done elsewhere: for a Drop each."""
        drops, self._drops = self._drops, {}
        return [(peer, tuple((stage, tuple(ranges)) for stage, ranges in table.items())) for peer, table in drops.items()]

    # ---- copies ----

    @property
    def offers(self) -> int:
        """Ranges that wait for somebody to run them a second time."""
        return len(self._offers)

    def due(self, now_s: float) -> list[Work]:
        """Once a heartbeat: look what is late; returns what the leader's own slots should run of it now."""
        leader = self._leader
        live = [stage for stage in leader.ledger.stages if stage.unsettled and stage.options.pure]
        for index in dict.fromkeys([*self._table.known, *self._copied]):
            if not leader.ledger.stage(index).unsettled:
                self._table.forget(index)
                self._copied.pop(index, None)
        self._table.observe(self._held(live), {peer: self._slots_of(peer) for peer in self._holders()}, now_s)
        idle = [stage.index for stage in live if not self._queued(stage.index)]
        self._offers = self._without_parents(self._table.late(idle, now_s))
        site = leader.site
        if not self._offers or not site.quiet or site.workshop.draining:
            return []
        return self._take(leader.me, site.workshop.tags, site.workshop.free)

    def offer(self, thief: PeerId, tags: Sequence[str], slots: int) -> list[Work]:
        """For a thief that would get nothing else; no more than fits into a grant."""
        return self._cut(self._take(thief, frozenset(tags), slots)) if self._offers else []

    def suspect(self, peer: PeerId) -> bool:
        """Whether a thief should not be sent there: the peer is silent, or finishes nothing, and may not answer."""
        now_s = trio.current_time()
        silent = self._leader.claims.silent_s(peer, now_s) > SILENT_HEARTBEATS * self._leader.claims.interval_s
        return silent or self._table.suspect(peer, now_s)

    def strange(self, thief: PeerId, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Cut queued works into what the thief may have, and what it claims already (it would get its own tasks back)."""
        return apart(works, self._leader.claims.table(thief))

    def _take(self, peer: PeerId, tags: frozenset[str], slots: int) -> list[Work]:
        """About as much as those slots do in two heartbeats."""
        if slots <= 0:
            return []
        mine: list[Late] = []
        others: list[Late] = []
        for late in self._offers:
            fits = late.holder != peer and tags.issuperset(self._options(late.work.stage).tags)
            (mine if fits else others).append(late)
        if not mine:
            return []
        each_s = self._table.median_s(mine[0].work.stage) or limits.GRAIN_S
        works, left = share(mine, max(1.0, slots * 2 * limits.HEARTBEAT_S / each_s))
        self._offers = sorted([*left, *others], key=lambda late: (late.since_s, late.work))
        for stage, lo, hi in works:
            self._copied.setdefault(stage, RangeSet()).add(lo, hi)
        return works

    def _cut(self, works: list[Work]) -> list[Work]:
        """The front of the works, as long as its segments fit into a grant; the next sweep offers the rest again."""
        kept: list[Work] = []
        count = size = 0
        for stage, lo, hi in works:
            for segment in self._leader.site.stages[stage].segments.overlapping(lo, hi):
                count += 1
                size += min(segment.size, limits.SEGMENT_INLINE_BYTES) + REF_BYTES * len(segment.refs)
                if count > SEGMENTS_MAX or (size > limits.GRANT_BYTES_MAX and kept):
                    return kept
                part = Work(stage, max(lo, segment.first), min(hi, segment.end))
                if kept and kept[-1].stage == stage and kept[-1].hi == part.lo:
                    kept[-1] = Work(stage, kept[-1].lo, part.hi)
                else:
                    kept.append(part)
        return kept

    def _options(self, stage: int) -> StageOptions:
        return self._leader.ledger.stage(stage).options

    # ---- what is held ----

    def _queued(self, stage: int) -> bool:
        """Whether tasks of the stage wait here for their first run."""
        deque = self._leader.site.deque
        copied = self._copied.get(stage)
        if copied is None:
            return deque.count(stage) > 0
        return not all(copied.covers(work.lo, work.hi) for work in deque.holds(stage, 0, limits.TASKS_MAX))

    def _holders(self) -> list[PeerId]:
        return [self._leader.me, *self._leader.claims.peers()]

    def _held(self, live: Sequence[StageState]) -> dict[PeerId, dict[int, list[Range]]]:
        """By peer and stage, without what is settled; of the own site only what a worker has, and does not wait for children."""
        leader = self._leader
        stages = {stage.index: stage for stage in live}
        own: dict[int, RangeSet] = {}
        for worker in leader.site.workers:
            for ticket in worker.tickets.values():
                if not worker.blocked and ticket.stage in stages and ticket.at < ticket.hi:
                    own.setdefault(ticket.stage, RangeSet()).add(ticket.at, ticket.hi)
        for index, copied in self._copied.items():  # copies that are queued, or on their way
            if index in stages:
                for work in leader.site.deque.holds(index, 0, limits.TASKS_MAX):
                    own.setdefault(index, RangeSet()).add(work.lo, work.hi)
                for work in leader.giving:
                    if work.stage == index:
                        own.setdefault(index, RangeSet()).update(copied.intersect(work.lo, work.hi))
        tables = {peer: leader.claims.table(peer) for peer in leader.claims.peers()}
        held: dict[PeerId, dict[int, list[Range]]] = {}
        for peer, table in {**tables, leader.me: own}.items():
            found: dict[int, list[Range]] = {}
            for index, ranges in table.items():
                stage = stages.get(index)
                if stage is not None:
                    inside = [(lo, min(hi, stage.declared)) for lo, hi in ranges if lo < stage.declared]
                    found[index] = [part for lo, hi in inside for part in stage.settled.gaps(lo, hi)]
            held[peer] = found
        return held

    def _without_parents(self, lates: list[Late]) -> list[Late]:
        """Leave out tasks whose children run: they are not slow, they wait."""
        if not lates:
            return []
        parents: dict[int, RangeSet] = {}
        for stage in self._leader.ledger.stages:
            if stage.parent is not None and not stage.complete:
                index, task = stage.parent
                parents.setdefault(index, RangeSet()).add(task, task + 1)
        if not parents:
            return lates
        return [Late(work, late.holder, late.since_s) for late in lates for work in apart([late.work], parents)[0]]
