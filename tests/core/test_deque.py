"""RangeDeque against a plain list of tasks: nothing lost, nothing doubled, order kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grid.core.deque import DequeFull, RangeDeque, Work

Task = tuple[int, int]
stages = st.integers(0, 2)
works = st.builds(lambda s, a, b: Work(s, min(a, b), max(a, b)), stages, st.integers(0, 30), st.integers(0, 30))
SECONDS = {0: 1.0, 1: 0.25, 2: 5.0}
SEGMENT = 4


def tasks(parts: list[Work]) -> list[Task]:
    return [(w.stage, i) for w in parts for i in range(w.lo, w.hi)]


def to_segment(stage: int, index: int) -> int:
    return round(index / SEGMENT) * SEGMENT


class ListTwin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = RangeDeque()
        self.twin: list[Task] = []

    def missing(self, work: Work) -> list[Task]:
        return [t for t in tasks([work]) if t not in self.twin]

    @rule(work=works)
    def push_tail(self, work: Work) -> None:
        new = self.missing(work)
        assert tasks(self.real.push_tail(work)) == new
        self.twin = self.twin + new

    @rule(work=works)
    def push_head(self, work: Work) -> None:
        new = self.missing(work)
        assert tasks(self.real.push_head(work)) == new
        self.twin = new + self.twin

    @rule(counts=st.fixed_dictionaries({0: st.integers(0, 9), 1: st.integers(0, 9), 2: st.integers(0, 9)}))
    def take_head(self, counts: dict[int, int]) -> None:
        work = self.real.take_head(counts.__getitem__)
        first = next((t for t in self.twin if counts[t[0]]), None)
        if work is None:
            assert first is None
            return
        got = tasks([work])
        assert got[0] == first
        assert 1 <= len(got) <= counts[work.stage]
        at = self.twin.index(got[0])
        assert self.twin[at : at + len(got)] == got, "a range must not jump over others"
        del self.twin[at : at + len(got)]

    @rule(fraction=st.floats(0.05, 1.0), limit=st.integers(1, 12), rounded=st.booleans(), avoid=st.none() | stages)
    def steal_tail(self, fraction: float, limit: int, rounded: bool, avoid: int | None) -> None:
        candidates = [t for t in self.twin if t[0] != avoid]
        total_s = sum(SECONDS[s] for s, _ in candidates)
        held = len(self.real)
        got = self.real.steal_tail(
            SECONDS.__getitem__, fraction, to_segment if rounded else None, limit, lambda stage: stage != avoid
        )
        assert len(got) <= limit
        stolen = tasks(got)
        assert bool(stolen) == bool(candidates)
        assert stolen == candidates[len(candidates) - len(stolen) :], "only from the tail, in order"
        slack_s = max(SECONDS.values()) * (1 + (SEGMENT if rounded else 0))
        assert sum(SECONDS[s] for s, _ in stolen) <= fraction * total_s + slack_s
        if limit >= held:
            assert sum(SECONDS[s] for s, _ in stolen) >= fraction * total_s - slack_s
        self.twin = [t for t in self.twin if t not in stolen]

    @rule(work=works)
    def remove(self, work: Work) -> None:
        gone = [t for t in tasks([work]) if t in self.twin]
        assert tasks(self.real.holds(*work)) == gone
        assert sorted(tasks(self.real.remove(*work))) == gone
        self.twin = [t for t in self.twin if t not in gone]

    @invariant()
    def same(self) -> None:
        order = list(self.real)
        assert tasks(order) == self.twin
        assert len(order) == len(self.real)
        assert self.real.total == len(self.twin)
        assert bool(self.real) == bool(self.twin)
        for stage in SECONDS:
            assert self.real.count(stage) == sum(1 for s, _ in self.twin if s == stage)
        assert sorted(self.real.stages()) == sorted({s for s, _ in self.twin})
        claimed = self.real.ranges()
        assert tasks(claimed) == sorted(self.twin)
        assert all(a.stage != b.stage or a.hi < b.lo for a, b in pairwise(claimed))


TestListTwin = ListTwin.TestCase
TestListTwin.settings = settings(deadline=None)


def loaded(*parts: Work) -> RangeDeque:
    held = RangeDeque()
    for part in parts:
        held.push_tail(part)
    return held


def test_steal_is_half_of_the_time_not_of_the_count() -> None:
    held = loaded(Work(0, 0, 100), Work(1, 0, 100))
    got = held.steal_tail(lambda stage: 9.0 if stage else 1.0)
    assert got == [Work(1, 44, 100)]  # 500 s of 1000 s are 55.6 of the long tasks


def test_steal_goes_on_into_the_next_range() -> None:
    held = loaded(Work(0, 0, 100), Work(1, 0, 100))
    got = held.steal_tail(lambda stage: 1.0 if stage else 9.0)
    assert got == [Work(0, 56, 100), Work(1, 0, 100)]
    assert list(held) == [Work(0, 0, 56)]


def test_steal_splits_on_segments() -> None:
    held = loaded(Work(0, 0, 100))
    assert held.steal_tail(lambda _: 1.0, boundaries=lambda stage, index: 64) == [Work(0, 64, 100)]


def test_steal_inside_one_segment_splits_it() -> None:
    held = loaded(Work(0, 10, 20))
    assert held.steal_tail(lambda _: 1.0, boundaries=lambda stage, index: 0) == [Work(0, 15, 20)]


def test_steal_the_only_task() -> None:
    held = loaded(Work(0, 7, 8))
    assert held.steal_tail(lambda _: 0.0) == [Work(0, 7, 8)]
    assert held.steal_tail(lambda _: 0.0) == []


def test_steal_with_no_estimate_is_half_of_the_count() -> None:
    assert loaded(Work(0, 0, 100)).steal_tail(lambda _: 0.0) == [Work(0, 50, 100)]


def test_steal_is_bounded_in_ranges() -> None:
    held = loaded(*(Work(0, 2 * i, 2 * i + 1) for i in range(100)))
    assert len(held.steal_tail(lambda _: 1.0, limit_ranges=10)) == 10
    assert held.total == 90


def test_child_stage_first() -> None:
    held = loaded(Work(0, 0, 10))
    held.push_head(Work(1, 0, 2))
    assert [held.take_head(lambda _: 5) for _ in range(3)] == [Work(1, 0, 2), Work(0, 0, 5), Work(0, 5, 10)]


def test_full_deque_refuses_and_keeps_what_it_has() -> None:
    held = RangeDeque(ranges_max=2)
    held.push_tail(Work(0, 0, 1))
    held.push_tail(Work(0, 2, 3))
    with pytest.raises(DequeFull):
        held.push_tail(Work(0, 4, 5))
    with pytest.raises(DequeFull):
        held.push_head(Work(0, 1, 5))
    assert list(held) == [Work(0, 0, 1), Work(0, 2, 3)]
    assert held.remove(0, 0, 1) == [Work(0, 0, 1)]
    assert held.push_tail(Work(0, 4, 5)) == [Work(0, 4, 5)]


def test_removal_may_split_a_full_deque() -> None:
    held = RangeDeque(ranges_max=1)
    held.push_tail(Work(0, 0, 10))
    assert held.remove(0, 4, 6) == [Work(0, 4, 6)]
    assert list(held) == [Work(0, 0, 4), Work(0, 6, 10)]


def test_reversed_work_is_an_error() -> None:
    with pytest.raises(ValueError, match="reversed"):
        RangeDeque().push_tail(Work(0, 3, 2))
