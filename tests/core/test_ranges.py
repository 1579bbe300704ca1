"""RangeSet against a plain set of integers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grid.core.ranges import INDEX_MAX, RangeSet

BOUND = 40
pairs = st.tuples(st.integers(0, BOUND), st.integers(0, BOUND)).map(lambda p: (min(p), max(p)))


def expand(ranges: list[tuple[int, int]]) -> list[int]:
    return [i for lo, hi in ranges for i in range(lo, hi)]


class SetTwin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = RangeSet()
        self.twin: set[int] = set()

    @rule(pair=pairs)
    def add(self, pair: tuple[int, int]) -> None:
        wanted = [i for i in range(*pair) if i not in self.twin]
        assert expand(self.real.add(*pair)) == wanted
        self.twin.update(wanted)

    @rule(pair=pairs)
    def remove(self, pair: tuple[int, int]) -> None:
        wanted = [i for i in range(*pair) if i in self.twin]
        assert expand(self.real.remove(*pair)) == wanted
        self.twin.difference_update(wanted)

    @rule(pair=pairs)
    def look(self, pair: tuple[int, int]) -> None:
        span = range(*pair)
        assert expand(self.real.gaps(*pair)) == [i for i in span if i not in self.twin]
        assert expand(self.real.intersect(*pair)) == [i for i in span if i in self.twin]
        assert self.real.covers(*pair) == all(i in self.twin for i in span)
        assert self.real.first_gap(pair[0]) == next(i for i in range(pair[0], BOUND + 2) if i not in self.twin)

    @rule()
    def swap_for_a_copy(self) -> None:
        old = self.real
        self.real = old.copy()
        old.add(0, BOUND)
        old.remove(1, 3)

    @invariant()
    def same(self) -> None:
        ranges = list(self.real)
        assert expand(ranges) == sorted(self.twin)
        assert list(self.real.indexes()) == sorted(self.twin)
        assert all(lo < hi for lo, hi in ranges)
        assert all(a[1] < b[0] for a, b in pairwise(ranges)), "touching ranges must be merged"
        assert self.real.count == len(self.twin)
        assert self.real.ranges == len(ranges)
        assert bool(self.real) == bool(self.twin)
        assert [i in self.real for i in range(BOUND)] == [i in self.twin for i in range(BOUND)]
        assert RangeSet.from_compact(self.real.to_compact()) == self.real


TestSetTwin = SetTwin.TestCase
TestSetTwin.settings = settings(deadline=None)


@given(st.lists(pairs))
def test_order_of_adds_does_not_matter(ranges: list[tuple[int, int]]) -> None:
    assert RangeSet(ranges) == RangeSet(reversed(ranges))


@given(st.lists(st.integers(-3, 6), max_size=8))
def test_decode_refuses_all_but_the_one_encoding(deltas: list[int]) -> None:
    try:
        found = RangeSet.from_compact(deltas)
    except ValueError:
        return
    assert found.to_compact() == tuple(deltas)


@pytest.mark.parametrize("deltas", [(1,), (0, 0), (0, 2, 0, 1), (-1, 2), (0, INDEX_MAX + 1), (INDEX_MAX, 1), (3, -1)])
def test_decode_refuses(deltas: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ranges|index|numbers"):
        RangeSet.from_compact(deltas)


def test_reversed_range_is_an_error_and_changes_nothing() -> None:
    held = RangeSet([(0, 5)])
    for operation in (held.add, held.remove, held.gaps, held.intersect, held.covers):
        with pytest.raises(ValueError, match="reversed"):
            operation(3, 2)
    assert list(held) == [(0, 5)]


def test_compact_form_is_deltas() -> None:
    assert RangeSet([(5, 10), (12, 13)]).to_compact() == (5, 5, 2, 1)
    assert RangeSet().to_compact() == ()


def test_touches_is_whether_they_share_an_integer() -> None:
    ranges = RangeSet([(2, 4), (8, 10)])
    for lo in range(12):
        for hi in range(lo, 12):
            assert ranges.touches(lo, hi) == bool(ranges.intersect(lo, hi))
