"""Sets of task numbers (or chunk numbers) as sorted, disjoint, half-open integer ranges.

Rules this file keeps:

- no two stored ranges touch or overlap: `[0, 3)` and `[3, 5)` are always held as `[0, 5)`;
- every operation costs O(log n + ranges touched) comparisons (plus the memory move of a list splice);
- no I/O, no time, no randomness.

A million finished tasks are usually a handful of ranges, so facts about tasks are kept and sent in this form.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""(lo, hi): the integers lo <= i < hi."""

COMPACT_RANGES_MAX = 1 << 20
"""More ranges than this in one message is a broken or hostile sender; honest ones are cut into several messages."""
INDEX_MAX = 1 << 62
"""Largest index a decoded set may hold: it stays an int64 for everyone."""


class RangeSet:
    """A mutable set of integers. All ranges are half open; an empty range is a no-op, a reversed one a ValueError."""

    __slots__ = ("_count", "_highs", "_lows")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        self._count = 0
        for lo, hi in ranges:
            self.add(lo, hi)

    # ---- change ----

    def add(self, lo: int, hi: int) -> list[Range]:
        """Add [lo, hi); return what was missing before, in order."""
        highs = self._highs
        if lo < hi and (not highs or lo >= highs[-1]):  # behind all there is, as tasks mostly come
            if highs and lo == highs[-1]:
                highs[-1] = hi
            else:
                self._lows.append(lo)
                highs.append(hi)
            self._count += hi - lo
            return [(lo, hi)]
        added = self.gaps(lo, hi)
        if not added:
            return added
        # All ranges that touch [lo, hi), also those that merely end at lo or begin at hi, become one.
        first = bisect_left(self._highs, lo)
        last = bisect_right(self._lows, hi)
        if first < last:
            lo = min(lo, self._lows[first])
            hi = max(hi, self._highs[last - 1])
        self._lows[first:last] = [lo]
        self._highs[first:last] = [hi]
        self._count += sum(high - low for low, high in added)
        return added

    def remove(self, lo: int, hi: int) -> list[Range]:
        """Remove [lo, hi); return what was really there, in order."""
        removed = self.intersect(lo, hi)
        if not removed:
            return removed
        first, last = self._overlapping(lo, hi)
        lows, highs = [], []
        if self._lows[first] < lo:
            lows.append(self._lows[first])
            highs.append(lo)
        if hi < self._highs[last - 1]:
            lows.append(hi)
            highs.append(self._highs[last - 1])
        self._lows[first:last] = lows
        self._highs[first:last] = highs
        self._count -= sum(high - low for low, high in removed)
        return removed

    def update(self, other: Iterable[Range]) -> None:
        """Add every range of `other`."""
        for lo, hi in other:
            self.add(lo, hi)

    def clear(self) -> None:
        self._lows.clear()
        self._highs.clear()
        self._count = 0

    # ---- look ----

    def contains(self, index: int) -> bool:
        at = bisect_right(self._lows, index) - 1
        return at >= 0 and index < self._highs[at]

    __contains__ = contains

    def covers(self, lo: int, hi: int) -> bool:
        """Whether all of [lo, hi) is in the set (an empty range always is)."""
        if lo >= hi:
            return _checked(lo, hi)
        at = bisect_right(self._lows, lo) - 1
        return at >= 0 and hi <= self._highs[at]

    def touches(self, lo: int, hi: int) -> bool:
        """Whether any of [lo, hi) is in the set."""
        first, last = self._overlapping(lo, hi)
        return first < last

    def gaps(self, lo: int, hi: int) -> list[Range]:
        """The parts of [lo, hi) that are missing, in order."""
        missing = []
        start = lo
        for low, high in self.intersect(lo, hi):
            if start < low:
                missing.append((start, low))
            start = high
        if start < hi:
            missing.append((start, hi))
        return missing

    def intersect(self, lo: int, hi: int) -> list[Range]:
        """The parts of [lo, hi) that are in the set, in order."""
        first, last = self._overlapping(lo, hi)
        return [(max(lo, self._lows[i]), min(hi, self._highs[i])) for i in range(first, last)]

    def first_gap(self, start: int = 0) -> int:
        """The smallest integer >= start that is not in the set."""
        at = bisect_right(self._lows, start) - 1
        return self._highs[at] if at >= 0 and start < self._highs[at] else start

    @property
    def count(self) -> int:
        """How many integers are in the set."""
        return self._count

    @property
    def ranges(self) -> int:
        """How many ranges the set is made of: its cost in memory and on the wire."""
        return len(self._lows)

    def __iter__(self) -> Iterator[Range]:
        """The ranges in order. The set must not change meanwhile."""
        return zip(self._lows, self._highs, strict=True)

    def indexes(self) -> Iterator[int]:
        """Every integer in order."""
        for lo, hi in self:
            yield from range(lo, hi)

    def __bool__(self) -> bool:
        return bool(self._lows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._lows == other._lows and self._highs == other._highs

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({list(self)!r})"

    def copy(self) -> RangeSet:
        twin = RangeSet()
        twin._lows = self._lows.copy()
        twin._highs = self._highs.copy()
        twin._count = self._count
        return twin

    # ---- messages ----

    def to_compact(self) -> tuple[int, ...]:
        """(lo, length, gap, length, gap, length, …): small numbers, which msgpack makes short. Empty set: ()."""
        out: list[int] = []
        end = 0
        for lo, hi in self:
            out += (lo - end, hi - lo)
            end = hi
        return tuple(out)

    @classmethod
    def from_compact(cls, deltas: Sequence[int]) -> RangeSet:
        """The inverse of `to_compact`, for numbers from others: ValueError unless it is exactly what that would make.

        Only sets of non-negative integers below INDEX_MAX are accepted, so at most one encoding exists for each set.
        """
        if len(deltas) % 2 or len(deltas) > 2 * COMPACT_RANGES_MAX:
            raise ValueError(f"{len(deltas)} numbers are no compact range set")
        found = cls()
        end = 0
        for at in range(0, len(deltas), 2):
            gap, length = deltas[at], deltas[at + 1]
            if gap < (1 if at else 0) or length < 1 or gap > INDEX_MAX or length > INDEX_MAX:
                raise ValueError("ranges are not in order")
            lo = end + gap
            end = lo + length
            if end > INDEX_MAX:
                raise ValueError("index out of bounds")
            found._lows.append(lo)
            found._highs.append(end)
            found._count += length
        return found

    def _overlapping(self, lo: int, hi: int) -> tuple[int, int]:
        """Positions [first, last) of the stored ranges that share an integer with [lo, hi)."""
        if lo >= hi:
            _checked(lo, hi)
            return 0, 0
        return bisect_right(self._highs, lo), bisect_left(self._lows, hi)


def _checked(lo: int, hi: int) -> bool:
    if lo > hi:
        raise ValueError(f"reversed range [{lo}, {hi})")
    return True
