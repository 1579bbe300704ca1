"""Which running ranges go out a second time near a stage's end, so that no slow, paused or half-dead peer holds it up.

Rules (DESIGN, section 7; after MapReduce's backup tasks and LATE's "longest remaining first"):
- only where nothing of the stage is queued at the leader, only ranges of pure stages, and never where two peers have them;
- a range is late when its holder, at the stage's median pace, would have been through with it SLOWNESS times: since it got the
  range, or since the last task before it was settled; or when the holder finished nothing at all for STUCK_S though it claims
  short tasks. Nothing is late before MIN_S, nor while nothing of its stage was finished;
- those that are out longest come first, at most RANGES_MAX at once.
What is held is told once a heartbeat (`observe`): a range is as old as the observation that first showed it at its holder.
No I/O; time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.deque import Work
from grid.core.ranges import Range, RangeSet

SLOWNESS: Final = 2.0
"""Times the median before a range counts as late: tasks of one stage often differ by less, seldom by more."""
MIN_S: Final = 0.5
"""A range that is out for less is left alone: moving it costs about as much, and claims come this often."""
STUCK_S: Final = limits.LEASE_S
"""A peer that reports nothing finished for so long while it claims short tasks has stopped working, whatever it says."""
STUCK_TASKS: Final = 4
"""It is given the time of this many tasks, if that is longer."""
SUSPECT_S: Final = 1.0
"""After so long (and the time of STUCK_TASKS tasks) without a finished task nobody is sent there to steal: it may not answer."""
SAMPLES_MAX: Final = 65
"""Latest reports of a stage whose median counts."""
RANGES_MAX: Final = 32
"""Ranges out for the second time at once: copies must not become the job's main work."""

Held = Mapping[PeerId, Mapping[int, Iterable[Range]]]
"""What each peer holds of each stage; ranges of one peer are disjoint and in order."""


@dataclass(slots=True)
class _Piece:
    """Tasks [lo, hi) of one stage at one peer. It came as [first, …) at first_s; its front moved last at since_s."""

    lo: int
    hi: int
    first: int
    first_s: float
    since_s: float


@dataclass(frozen=True, slots=True)
class Late:
    """A range that should go out again, to anybody but its holder."""

    work: Work
    holder: PeerId
    since_s: float


class Speculation:
    """One job's running ranges, as its leader knows them."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._pieces: dict[int, dict[PeerId, list[_Piece]]] = {}  # by stage
        self._busy_s: dict[PeerId, float] = {}  # since when the peer holds something and finished nothing
        self._slots: Mapping[PeerId, int] = {}

    @property
    def known(self) -> list[int]:
        """Stages of which something is remembered; `forget` those that are over."""
        return list(dict.fromkeys([*self._samples, *self._pieces]))

    # ---- what happens ----

    def finished(self, peer: PeerId, stage: int, tasks: int, elapsed_s: float, now_s: float) -> None:
        """A peer reported tasks done, which took `elapsed_s` of one slot's time."""
        if tasks > 0 and elapsed_s >= 0:
            self._samples.setdefault(stage, deque(maxlen=SAMPLES_MAX)).append(elapsed_s / tasks)
            self._medians.pop(stage, None)
        if peer in self._busy_s:
            self._busy_s[peer] = now_s

    def forget(self, stage: int) -> None:
        """The stage is over."""
        self._samples.pop(stage, None)
        self._medians.pop(stage, None)
        self._pieces.pop(stage, None)

    def observe(self, held: Held, slots: Mapping[PeerId, int], now_s: float) -> None:
        """What is held and not settled, everywhere, of the stages that may run twice: replaces what was known.

        slots: how many tasks a peer runs at a time; 1 where that is not known.
        """
        pieces: dict[int, dict[PeerId, list[_Piece]]] = {}
        for peer, stages in held.items():
            for stage, ranges in stages.items():
                before = self._pieces.get(stage, {}).get(peer, ())
                found = list(_moved(before, ranges, self._busy_s.get(peer, now_s), now_s))
                if found:
                    pieces.setdefault(stage, {})[peer] = found
        self._pieces = pieces
        self._slots = dict(slots)
        holders = dict.fromkeys(peer for peers in pieces.values() for peer in peers)
        self._busy_s = {peer: self._busy_s.get(peer, now_s) for peer in holders}

    # ---- what is late ----

    def median_s(self, stage: int) -> float | None:
        """Seconds a task, None while nothing was reported."""
        known = self._medians.get(stage)
        samples = self._samples.get(stage)
        if known is None and samples:
            known = self._medians[stage] = median(samples)
        return known

    def late(self, stages: Iterable[int], now_s: float) -> list[Late]:
        """Ranges of these stages (of which nothing is queued) that should go out again; those out longest first."""
        found: list[Late] = []
        out = sum(self._twice(stage).ranges for stage, peers in self._pieces.items() if len(peers) > 1)
        for stage in stages:
            each_s = self.median_s(stage)
            twice: RangeSet | None = None
            for peer, pieces in self._pieces.get(stage, {}).items() if each_s is not None else ():
                assert each_s is not None
                depth = sum(piece.hi - piece.lo for piece in pieces) / max(1, self._slots.get(peer, 1))
                for piece in pieces:
                    if self._is_late(piece, peer, each_s, depth, now_s):
                        twice = self._twice(stage) if twice is None else twice
                        for lo, hi in twice.gaps(piece.lo, piece.hi):
                            found.append(Late(Work(stage, lo, hi), peer, piece.first_s))
        found.sort(key=lambda each: (each.since_s, each.work))
        return found[: max(0, RANGES_MAX - out)]

    def suspect(self, peer: PeerId, now_s: float) -> bool:
        """Whether the peer holds something and finished nothing for longer than it should take."""
        idle_s = now_s - self._busy_s.get(peer, now_s)
        if idle_s <= SUSPECT_S:
            return False
        paces = [self.median_s(stage) for stage, peers in self._pieces.items() if peer in peers]
        return all(each_s is not None and idle_s > STUCK_TASKS * each_s for each_s in paces)

    def _is_late(self, piece: _Piece, peer: PeerId, each_s: float, depth: float, now_s: float) -> bool:
        """depth: tasks that each slot of the peer has before it, this piece's among them."""
        front_s, whole_s = now_s - piece.since_s, now_s - piece.first_s
        if front_s > max(SLOWNESS * each_s * max(piece.hi - piece.lo, depth), MIN_S):
            return True
        slow_s = max(SLOWNESS * each_s * max(piece.hi - piece.first, depth), MIN_S)
        if whole_s > slow_s and front_s > SLOWNESS * each_s:
            return True
        idle_s = now_s - self._busy_s.get(peer, now_s)
        return min(idle_s, front_s) > max(STUCK_S, STUCK_TASKS * each_s)

    def _twice(self, stage: int) -> RangeSet:
        """What more than one peer holds."""
        edges: list[tuple[int, int]] = []
        for pieces in self._pieces.get(stage, {}).values():
            for piece in pieces:
                edges += ((piece.lo, 1), (piece.hi, -1))
        edges.sort()
        twice = RangeSet()
        depth = begin = 0
        for at, step in edges:
            if depth >= 2 and at > begin:
                twice.add(begin, at)
            depth += step
            begin = at
        return twice


def apart(works: Iterable[Work], held: Mapping[int, RangeSet]) -> tuple[list[Work], list[Work]]:
    """Cut works into what is not in `held` and what is, both in order: nobody gets a copy of what it runs already."""
    free: list[Work] = []
    own: list[Work] = []
    for stage, lo, hi in works:
        ranges = held.get(stage)
        if ranges is None:
            free.append(Work(stage, lo, hi))
            continue
        free += [Work(stage, *part) for part in ranges.gaps(lo, hi)]
        own += [Work(stage, *part) for part in ranges.intersect(lo, hi)]
    return free, own


def share(works: Sequence[Late], tasks: float) -> tuple[list[Work], list[Late]]:
    """About so many tasks from the front, one at least, and what is left."""
    taken: list[Work] = []
    for at, late in enumerate(works):
        stage, lo, hi = late.work
        if taken and tasks < 1:
            return taken, list(works[at:])
        cut = min(hi, lo + max(1, int(tasks)))
        taken.append(Work(stage, lo, cut))
        tasks -= cut - lo
        if cut < hi:
            return taken, [Late(Work(stage, cut, hi), late.holder, late.since_s), *works[at + 1 :]]
    return taken, []


def _moved(before: Iterable[_Piece], ranges: Iterable[Range], reported_s: float, now_s: float) -> Iterator[_Piece]:
    """A peer's pieces of a stage now, with what is known from before.

    reported_s: when the peer finished something last. A front that another peer's copy settled since is no progress.
    """
    old = list(before)
    at = 0
    for lo, hi in ranges:
        start = lo
        while start < hi:
            while at < len(old) and old[at].hi <= start:
                at += 1
            if at == len(old) or old[at].lo >= hi:
                yield _Piece(start, hi, start, now_s, now_s)
                break
            piece = old[at]
            if start < piece.lo:
                yield _Piece(start, piece.lo, start, now_s, now_s)
                start = piece.lo
            end = min(hi, piece.hi)
            since_s = max(piece.since_s, reported_s) if start > piece.lo else piece.since_s
            yield _Piece(start, end, piece.first, piece.first_s, since_s)
            start = end
