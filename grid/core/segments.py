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

    __slots__ = ("_firsts", "_segments")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._segments: list[Segment] = []

    def __len__(self) -> int:
        return len(self._segments)

    def add(self, segment: Segment) -> None:
        """Adding the same segment again changes nothing. An overlap with another one is the caller's bug."""
        if not self._firsts or segment.first > self._firsts[-1]:
            assert not self._segments or self._segments[-1].end <= segment.first
            self._firsts.append(segment.first)
            self._segments.append(segment)
            return
        at = bisect_left(self._firsts, segment.first)
        if at < len(self._firsts) and self._firsts[at] == segment.first:
            assert self._segments[at].count == segment.count
            return
        self._firsts.insert(at, segment.first)
        self._segments.insert(at, segment)

    def remove(self, first: int) -> None:
        """Forget the segment that begins at `first`, if it is here."""
        at = bisect_left(self._firsts, first)
        if at < len(self._firsts) and self._firsts[at] == first:
            del self._firsts[at], self._segments[at]

    def at(self, index: int) -> Segment | None:
        """The segment with task `index`, or None."""
        position = bisect_right(self._firsts, index) - 1
        if position < 0 or self._segments[position].end <= index:
            return None
        return self._segments[position]

    def overlapping(self, lo: int, hi: int) -> list[Segment]:
        """The segments that hold some task of [lo, hi), in order."""
        start = max(0, bisect_right(self._firsts, lo) - 1)
        end = bisect_left(self._firsts, hi)
        return [segment for segment in self._segments[start:end] if segment.end > lo]
