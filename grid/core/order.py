"""The order in which a replay delivers the results of the driver's unordered stages: as the record has it.

Results are delivered by their turns (grid/core/chronicle.py). Rules:
- a result with a turn waits until everything with a lower turn was delivered or struck off, whether it was offered or not: a
  deterministic driver declares all of it, and what was lost runs again;
- a result without one is new, the record ended before it: it waits until all turns are over;
- `strike` takes off what the driver does not want any more (that it was cancelled need not be offered). When the rest can't
  come, for the script took another course, `give_up` delivers what waits, by turn and then as it came, and from then on
  everything passes at once.
Whoever drives this gives up when nothing was delivered for a while though nothing recorded runs. No I/O, no clock.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from grid.core.ranges import Range, RangeSet
from grid.core.rangetable import RangeTable

T = TypeVar("T")


class Offer(NamedTuple, Generic[T]):
    """A result of tasks [lo, hi) of a stage."""

    stage: int
    lo: int
    hi: int
    item: T


class Order(Generic[T]):
    """Stages and tasks go by their present numbers; `place` says which turns they have."""

    def __init__(self, turns: RangeSet) -> None:
        self._expected = turns
        self._places: dict[int, RangeTable] = {}
        self._waiting: list[tuple[int, int, Offer[T]]] = []  # a heap: turn, number of the offer
        self._new: list[Offer[T]] = []
        self._offers = 0

    @property
    def over(self) -> bool:
        """Everything passes."""
        return not self._expected

    @property
    def held(self) -> int:
        """Offers that wait."""
        return len(self._waiting) + len(self._new)

    @property
    def next_turn(self) -> int:
        """The turn it waits for; -1: none."""
        return next(iter(self._expected))[0] if self._expected else -1

    def place(self, stage: int, lo: int, hi: int, turn: int) -> None:
        """Tasks [lo, hi) of this stage have the turns from `turn` on. The last word counts."""
        places = self._places.setdefault(stage, RangeTable())
        places.cut(lo, hi)
        places.put(lo, hi, (turn - lo, 0, 0, 0, 0, 0, 0), None)

    def cuts(self, stage: int, lo: int, hi: int) -> list[tuple[int, int, int]]:
        """[lo, hi) in parts of consecutive turns: (lo, hi, turn), turn -1 for new ones. What should be offered one by one."""
        places = self._places.get(stage)
        parts = []
        for row in places.between(lo, hi) if places is not None else ():
            if lo < row.lo:
                parts.append((lo, row.lo, -1))
            parts.append((row.lo, row.hi, row.columns[0] + row.lo))
            lo = row.hi
        if lo < hi:
            parts.append((lo, hi, -1))
        return parts

    def offer(self, stage: int, lo: int, hi: int, item: T) -> list[Offer[T]]:
        """Tasks [lo, hi) are settled: returns what may be delivered now, in order. A range of several cuts goes by its first."""
        offer = Offer(stage, lo, hi, item)
        if not self._expected:
            return [offer]
        turn = self.cuts(stage, lo, hi)[0][2]
        if turn < 0:
            self._new.append(offer)
            return []
        self._offers += 1
        heappush(self._waiting, (turn, self._offers, offer))
        return self.ready()

    def strike(self, stage: int, lo: int, hi: int) -> list[Offer[T]]:
        """Nobody waits for these tasks any more. Returns what may be delivered now (also of them, where it was offered)."""
        for a, b, turn in self.cuts(stage, lo, hi):
            if turn >= 0:
                self._expected.remove(turn, turn + b - a)
        return self.ready()

    def strike_turns(self, turns: list[Range]) -> None:
        """Nothing has these turns any more. Call `ready` afterwards."""
        for lo, hi in turns:
            self._expected.remove(lo, hi)

    def give_up(self) -> list[Offer[T]]:
        """The recorded order can't be kept: returns all that waits, and lets everything pass from now on."""
        self._expected.clear()
        return self.ready()

    def ready(self) -> list[Offer[T]]:
        """What may be delivered now, in order."""
        out: list[Offer[T]] = []
        while self._waiting and (not self._expected or self._waiting[0][0] <= self.next_turn):
            _, _, offer = heappop(self._waiting)
            for lo, hi, turn in self.cuts(offer.stage, offer.lo, offer.hi):
                if turn >= 0:
                    self._expected.remove(turn, turn + hi - lo)
            out.append(offer)
        if not self._expected:
            out += self._new
            self._new = []
            self._places = {}
        return out
