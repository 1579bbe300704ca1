"""Who claims which ranges of a job: what nobody claims any more runs again.

Moves between peers need no accounting (DESIGN, section 7): each peer's heartbeat lists what it holds, and replaces what it
listed before. Rules:
- a range is requeued when no live peer claimed it in CLAIM_MISSED_MAX consecutive sweeps, a heartbeat apart;
- a peer that is gone, or silent for LEASE_HEARTBEATS, claims nothing;
- a grant counts as the thief's claim from the moment it is given, so that the first heartbeat may come late.
No I/O; `now` is an argument, in seconds of a clock that counts suspend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.errors import RefusedError
from grid.core.ranges import RangeSet

StageRanges = Mapping[int, Iterable[tuple[int, int]]]


class Claims:
    """The claim table of one job's leader, its own peer not included."""

    def __init__(self) -> None:
        self.interval_s = limits.HEARTBEAT_S
        """Between heartbeats of one peer, as the leader asked for it."""
        self._held: dict[PeerId, dict[int, RangeSet]] = {}
        self._heard_s: dict[PeerId, float] = {}
        self._suspects: dict[int, list[RangeSet]] = {}

    def pace(self) -> float:
        """How often each peer should be heard, in seconds: less often the more there are. In steps of two, never shorter again:
        those who were not told yet must not be taken for lost.
        """
        while self.interval_s * limits.CLAIMANTS_MAX < len(self._heard_s) * limits.HEARTBEAT_S:
            self.interval_s *= 2
        return self.interval_s

    def peers(self) -> list[PeerId]:
        """Peers that claim something or were heard lately."""
        return list(self._heard_s)

    def held(self, peer: PeerId, stage: int) -> RangeSet:
        """What the peer claims of a stage."""
        return self._held.get(peer, {}).get(stage, RangeSet())

    def table(self, peer: PeerId) -> Mapping[int, RangeSet]:
        """All that the peer claims, by stage."""
        return self._held.get(peer, {})

    def silent_s(self, peer: PeerId, now_s: float) -> float:
        """Seconds since the peer's last heartbeat; infinite if there was none."""
        return now_s - self._heard_s.get(peer, -math.inf)

    def total(self, peer: PeerId) -> int:
        """Tasks the peer claims."""
        return sum(ranges.count for ranges in self._held.get(peer, {}).values())

    def claim(self, peer: PeerId, held: StageRanges, now_s: float) -> None:
        """A heartbeat: replaces what the peer claimed before. Raises RefusedError on what is no range of tasks."""
        table: dict[int, RangeSet] = {}
        for stage, ranges in held.items():
            ranges_held = table.setdefault(stage, RangeSet())
            for lo, hi in ranges:
                if not 0 <= lo < hi <= limits.TASKS_MAX:
                    raise RefusedError(f"[{lo}, {hi}) is no range of tasks")
                ranges_held.add(lo, hi)
        self._held[peer] = table
        self._heard_s[peer] = now_s

    def grant(self, peer: PeerId, works: Iterable[tuple[int, int, int]], now_s: float) -> None:
        """Ranges (stage, lo, hi) were handed to the peer."""
        table = self._held.setdefault(peer, {})
        for stage, lo, hi in works:
            table.setdefault(stage, RangeSet()).add(lo, hi)
        self._heard_s[peer] = now_s

    def settle(self, stage: int, lo: int, hi: int) -> None:
        """Tasks got their final word: nobody holds them."""
        for table in self._held.values():
            ranges = table.get(stage)
            if ranges is not None:
                ranges.remove(lo, hi)

    def lose(self, peer: PeerId) -> None:
        """The peer is gone: it claims nothing. What it held is requeued by the coming sweeps unless others claim it."""
        self._held.pop(peer, None)
        self._heard_s.pop(peer, None)

    def sweep(
        self, missing: Mapping[int, Iterable[tuple[int, int]]], own: Mapping[int, RangeSet], now_s: float
    ) -> list[tuple[int, int, int]]:
        """Once a heartbeat: given all unsettled ranges and what the leader's own peer holds, return what to requeue."""
        for peer, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > self.interval_s * limits.LEASE_HEARTBEATS:
                self.lose(peer)
        requeue: list[tuple[int, int, int]] = []
        suspects: dict[int, list[RangeSet]] = {}
        for stage, ranges in missing.items():
            orphans = RangeSet()
            for lo, hi in ranges:
                orphans.add(lo, hi)
            for claimed in [own.get(stage), *(table.get(stage) for table in self._held.values())]:
                if claimed is not None:
                    for lo, hi in claimed:
                        orphans.remove(lo, hi)
            if not orphans.count:
                continue
            history = [orphans, *self._suspects.get(stage, [])][: limits.CLAIM_MISSED_MAX]
            if len(history) == limits.CLAIM_MISSED_MAX:
                lost = list(orphans)
                for earlier in history[1:]:
                    lost = [part for lo, hi in lost for part in earlier.intersect(lo, hi)]
                requeue += [(stage, lo, hi) for lo, hi in lost]
                for lo, hi in lost:
                    orphans.remove(lo, hi)
            suspects[stage] = history
        self._suspects = suspects
        return requeue
