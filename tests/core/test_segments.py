"""The segment table against a plain list."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grid.core.segments import Segment, SegmentTable


def table(*cuts: tuple[int, int]) -> SegmentTable:
    made = SegmentTable()
    for first, end in cuts:
        made.add(Segment(first, end - first, 1))
    return made


def test_gaps_have_no_segment() -> None:
    made = table((0, 4), (10, 20))
    assert made.at(3) == Segment(0, 4, 1)
    assert made.at(4) is None
    assert made.at(10) == Segment(10, 10, 1)
    assert made.at(20) is None
    assert made.overlapping(4, 10) == []
    assert [s.first for s in made.overlapping(3, 11)] == [0, 10]


def test_segment_that_is_cut_otherwise_does_not_fit() -> None:
    made = table((0, 4), (10, 20))
    assert made.fits(Segment(0, 4, 99)), "the same tasks again"
    assert made.fits(Segment(4, 6, 1))
    for first, count in ((0, 3), (0, 5), (3, 1), (3, 9), (9, 2), (19, 1), (8, 40)):
        assert not made.fits(Segment(first, count, 1))


def test_removal_in_order_of_many() -> None:
    made = SegmentTable()
    for first in range(10_000):
        made.add(Segment(first, 1, 1))
    for first in range(9_990):
        made.remove(first)
        assert made.at(first) is None
    assert len(made) == 10
    assert [s.first for s in made.overlapping(0, 10_000)] == list(range(9_990, 10_000))


def test_emptied_table_takes_segments_before_its_former_ones() -> None:
    """A thief's ranges come in any order."""
    made = table((50, 60))
    made.remove(50)
    made.add(Segment(10, 5, 1))
    made.add(Segment(50, 10, 1))
    assert [s.first for s in made.overlapping(0, 99)] == [10, 50]


class ListTwin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = SegmentTable()
        self.twin: dict[int, Segment] = {}

    @rule(first=st.integers(0, 60), count=st.integers(1, 6))
    def add(self, first: int, count: int) -> None:
        segment = Segment(first, count, 1)
        clash = [s for s in self.twin.values() if s.first < segment.end and first < s.end and s != segment]
        assert self.real.fits(segment) == (not clash)
        if not clash:
            self.real.add(segment)
            self.twin[first] = segment

    @rule(first=st.integers(0, 60))
    def remove(self, first: int) -> None:
        self.real.remove(first)
        self.twin.pop(first, None)

    @rule()
    def remove_first(self) -> None:
        if self.twin:
            first = min(self.twin)
            self.real.remove(first)
            del self.twin[first]

    @rule(lo=st.integers(0, 66), size=st.integers(1, 30))
    def overlapping(self, lo: int, size: int) -> None:
        expected = [s for _, s in sorted(self.twin.items()) if s.first < lo + size and lo < s.end]
        assert self.real.overlapping(lo, lo + size) == expected

    @invariant()
    def same(self) -> None:
        assert len(self.real) == len(self.twin)
        for index in range(67):
            assert self.real.at(index) == next((s for s in self.twin.values() if s.first <= index < s.end), None)


TestListTwin = ListTwin.TestCase
TestListTwin.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
