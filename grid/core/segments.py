"""Segments of one stage, found by task number. No I/O.

A segment is what arguments are pickled, moved and released by; a range of tasks may begin or end inside one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tasks [first, first + count): one piece of pickled arguments of `size` bytes."""

    first: int
    count: int
    size: int
    refs: tuple[bytes, ...] = ()

    @property
    def end(self) -> int:
        """One past its last task."""
        return self.first + self.count


class SegmentTable:
    """Sorted by first task; segments never overlap. A leader's table has no gaps, a thief's may."""

    __slots__ = ("_firsts", "_gone", "_segments")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._segments: list[Segment] = []
        self._gone = 0  # at the front, removed: tasks end about in order, and a list's front is dear to delete

    def __len__(self) -> int:
        return len(self._segments) - self._gone

    def fits(self, segment: Segment) -> bool:
        """Whether `add` is allowed: the segment is here already, or overlaps none."""
        same = self.at(segment.first)
        if same is not None:
            return (same.first, same.count) == (segment.first, segment.count)
        return not self.overlapping(segment.first, segment.end)

    def add(self, segment: Segment) -> None:
        """Adding the same segment again changes nothing. An overlap with another one is the caller's bug."""
        if not len(self):
            self._compact()
        if not self._firsts or segment.first > self._firsts[-1]:
            assert not self._segments or self._segments[-1].end <= segment.first
            self._firsts.append(segment.first)
            self._segments.append(segment)
            return
        at = bisect_left(self._firsts, segment.first, self._gone)
        if at < len(self._firsts) and self._firsts[at] == segment.first:
            assert self._segments[at].count == segment.count
            return
        assert self.fits(segment)
        self._firsts.insert(at, segment.first)
        self._segments.insert(at, segment)

    def remove(self, first: int) -> None:
        """Forget the segment that begins at `first`, if it is here."""
        at = bisect_left(self._firsts, first, self._gone)
        if at == len(self._firsts) or self._firsts[at] != first:
            return
        if at > self._gone:
            del self._firsts[at], self._segments[at]
            return
        self._gone += 1
        if self._gone > 32 and 2 * self._gone > len(self._firsts):
            self._compact()

    def _compact(self) -> None:
        del self._firsts[: self._gone], self._segments[: self._gone]
        self._gone = 0

    def at(self, index: int) -> Segment | None:
        """The segment with task `index`, or None."""
        position = bisect_right(self._firsts, index, self._gone) - 1
        if position < self._gone or self._segments[position].end <= index:
            return None
        return self._segments[position]

    def overlapping(self, lo: int, hi: int) -> list[Segment]:
        """The segments that hold some task of [lo, hi), in order."""
        start = max(self._gone, bisect_right(self._firsts, lo, self._gone) - 1)
        end = bisect_left(self._firsts, hi, self._gone)
        return [segment for segment in self._segments[start:end] if segment.end > lo]
