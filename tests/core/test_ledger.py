"""The ledger against a plain dict of tasks: settled once, counted once, nothing forgotten."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.errors import RefusedError
from grid.core.ledger import DIED, RAISED, Ledger, StageState
from grid.core.ranges import RangeSet

F = b"f" * 32
RETRIES = 2


def opened(tasks: int = 0, retries: int = 0) -> tuple[Ledger, StageState]:
    ledger = Ledger()
    options = StageOptions(retries=retries)
    stage = ledger.open_stage(name="f", ordered=True, options=options, function=F, function_size=3)
    if tasks:
        ledger.add_segments(0, 0, [(tasks, 10, ())])
    return ledger, stage


def test_stages_are_numbered_in_order_of_opening() -> None:
    ledger, first = opened()
    second = ledger.open_stage(
        name="g", ordered=False, options=StageOptions(), function=F, function_size=3, parent=(0, 1), occurrence=2
    )
    assert (first.index, second.index) == (0, 1)
    assert ledger.stage(1) is second
    for wrong in (-1, 2):
        with pytest.raises(RefusedError):
            ledger.stage(wrong)


def test_completion_of_another_function_changes_nothing() -> None:
    ledger, stage = opened(10)
    with pytest.raises(RefusedError):
        ledger.complete(0, b"g" * 32, 0, 10)
    with pytest.raises(RefusedError):
        ledger.fail(0, b"g" * 32, 0, RAISED)
    assert stage.unsettled == 10
    assert stage.done == stage.failed == 0


@pytest.mark.parametrize(("lo", "hi"), [(-1, 3), (3, 3), (5, 4), (8, 11), (10, 11)])
def test_completion_of_tasks_that_do_not_exist_changes_nothing(lo: int, hi: int) -> None:
    ledger, stage = opened(10)
    with pytest.raises(RefusedError):
        ledger.complete(0, F, lo, hi)
    assert stage.unsettled == 10


def test_partial_overlap_returns_only_what_is_new() -> None:
    ledger, stage = opened(10)
    assert ledger.complete(0, F, 3, 6) == [(3, 6)]
    assert ledger.complete(0, F, 1, 8) == [(1, 3), (6, 8)]
    assert ledger.complete(0, F, 1, 8) == []
    assert stage.done == 7


def test_failure_after_settling_is_no_news() -> None:
    ledger, stage = opened(4)
    ledger.complete(0, F, 0, 2)
    ledger.cancel(0, 2, 3)
    assert ledger.fail(0, F, 1, RAISED) is None
    assert ledger.fail(0, F, 2, DIED) is None
    assert stage.failed == 0


def test_task_that_raises_is_retried_as_often_as_the_stage_says() -> None:
    ledger, stage = opened(1, retries=2)
    assert [ledger.fail(0, F, 0, RAISED) for _ in range(4)] == [True, True, False, None]
    assert stage.failed == 1


def test_lost_worker_is_retried_whatever_the_retries_and_given_up_in_the_end() -> None:
    ledger, _ = opened(1, retries=0)
    answers = [ledger.fail(0, F, 0, DIED) for _ in range(limits.RETRIES_LOST_MAX + 1)]
    assert answers == [True] * limits.RETRIES_LOST_MAX + [False]


def test_deaths_do_not_use_up_the_retries_of_what_raises() -> None:
    ledger, _ = opened(1, retries=1)
    assert ledger.fail(0, F, 0, DIED) is True
    assert ledger.attempt(0, 0) == 1
    assert ledger.fail(0, F, 0, RAISED) is True
    assert ledger.attempt(0, 0) == 2
    assert ledger.fail(0, F, 0, RAISED) is False


@pytest.mark.parametrize("end", ["complete", "fail", "cancel", "cancel all"])
def test_failure_tables_hold_only_what_is_not_settled(end: str) -> None:
    ledger, stage = opened(100, retries=1)
    for task in range(100):
        ledger.fail(0, F, task, RAISED)
        ledger.fail(0, F, task, DIED)
    if end == "complete":
        ledger.complete(0, F, 0, 100)
    elif end == "cancel":
        ledger.cancel(0, 0, 100)
    elif end == "cancel all":
        ledger.cancel(0, 0, -1)
    else:
        for task in range(100):
            assert ledger.fail(0, F, task, RAISED) is False
    assert not stage.attempts
    assert not stage.lost
    assert ledger.attempt(0, 5) == 0


def test_page_that_does_not_continue_the_stage_changes_nothing() -> None:
    ledger, stage = opened(4)
    wrong: list[tuple[list[tuple[int, int, tuple[bytes, ...]]], int]] = [
        ([(2, 5, ())], 5),
        ([(2, 5, ())], 3),
        ([(2, 5, ()), (0, 5, ())], 4),
        ([(2, 5, ()), (1, -1, ())], 4),
    ]
    for pieces, first in wrong:
        with pytest.raises(RefusedError):
            ledger.add_segments(0, first, pieces)
    with pytest.raises(RefusedError):
        ledger.add_segments(0, 4, [(limits.TASKS_MAX, 1, ())])
    assert (stage.declared, len(stage.segments)) == (4, 1)
    assert ledger.add_segments(0, 4, [(2, 5, ()), (1, 3, ())]) == (4, 7)
    assert [segment.first for segment in stage.segments.overlapping(0, 99)] == [0, 4, 6]


def test_closed_stage_takes_no_page_and_no_other_total() -> None:
    ledger, stage = opened(4)
    with pytest.raises(RefusedError):
        ledger.close_stage(0, 5)
    ledger.close_stage(0, 4)
    ledger.close_stage(0, 4)
    with pytest.raises(RefusedError):
        ledger.close_stage(0, 3)
    with pytest.raises(RefusedError):
        ledger.add_segments(0, 4, [(1, 1, ())])
    assert not stage.complete
    ledger.complete(0, F, 0, 4)
    assert stage.complete


def test_stage_of_no_tasks_is_complete_once_closed() -> None:
    ledger, stage = opened()
    assert not stage.complete
    ledger.close_stage(0, 0)
    assert stage.complete
    assert ledger.missing(0) == []


def test_stage_that_is_closed_after_it_was_cancelled() -> None:
    """The child's pages and its Close may be on their way when the peer cancels."""
    ledger, stage = opened(4)
    ledger.complete(0, F, 1, 2)
    assert ledger.cancel(0, 0, -1) == [(0, 1), (2, 4)]
    assert stage.complete
    assert ledger.add_segments(0, 4, [(6, 1, ())]) == (4, 10)
    assert stage.complete, "what is declared after the cancel is settled at once"
    ledger.close_stage(0, 10)
    assert stage.complete
    assert ledger.complete(0, F, 0, 10) == []
    assert (stage.done, stage.failed, stage.unsettled) == (1, 0, 0)


def test_cancel_of_some_tasks_leaves_the_stage_open() -> None:
    ledger, stage = opened(4)
    assert ledger.cancel(0, 2, 9) == [(2, 4)]
    assert ledger.cancel(0, 7, 9) == []
    assert ledger.cancel(0, -5, 1) == [(0, 1)]
    assert not stage.cancelled
    ledger.add_segments(0, 4, [(1, 1, ())])
    assert ledger.missing(0) == [(1, 2), (4, 5)]


def test_a_million_tasks_in_order_cost_one_interval() -> None:
    ledger, stage = opened(1_000_000)
    for lo in range(0, 1_000_000, 1000):
        ledger.complete(0, F, lo, lo + 1000)
    assert stage.settled.ranges == 1


class DictTwin(RuleBasedStateMachine):
    """state[task]: None while it is wanted, else done, failed or cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.stage = opened(0, RETRIES)
        self.state: dict[int, str | None] = {}
        self.raised: dict[int, int] = {}
        self.died: dict[int, int] = {}
        self.all_cancelled = False
        self.closed = False

    def settle(self, lo: int, hi: int, word: str) -> list[tuple[int, int]]:
        new = RangeSet()
        for task in range(max(0, lo), min(hi, len(self.state))):
            if self.state[task] is None:
                self.state[task] = word
                new.add(task, task + 1)
        return list(new)

    @precondition(lambda self: not self.closed)
    @rule(counts=st.lists(st.integers(1, 5), max_size=3))
    def page(self, counts: list[int]) -> None:
        first = len(self.state)
        assert self.ledger.add_segments(0, first, [(c, 1, ()) for c in counts]) == (first, first + sum(counts))
        for task in range(first, first + sum(counts)):
            self.state[task] = "cancelled" if self.all_cancelled else None

    @rule()
    def close(self) -> None:
        self.ledger.close_stage(0, len(self.state))
        self.closed = True

    @rule(a=st.integers(-2, 40), b=st.integers(-2, 40))
    def complete(self, a: int, b: int) -> None:
        if not 0 <= a < b <= len(self.state):
            with pytest.raises(RefusedError):
                self.ledger.complete(0, F, a, b)
            return
        assert self.ledger.complete(0, F, a, b) == self.settle(a, b, "done")

    @rule(task=st.integers(-1, 40), kind=st.sampled_from([RAISED, DIED]))
    def fail(self, task: int, kind: str) -> None:
        if task not in self.state:
            with pytest.raises(RefusedError):
                self.ledger.fail(0, F, task, kind)
            return
        again = self.ledger.fail(0, F, task, kind)
        if self.state[task] is not None:
            assert again is None
            return
        counts, allowed = (self.died, limits.RETRIES_LOST_MAX) if kind == DIED else (self.raised, RETRIES)
        counts[task] = counts.get(task, 0) + 1
        assert again is (counts[task] <= allowed)
        if not again:
            self.state[task] = "failed"

    @rule(a=st.integers(-2, 40), b=st.integers(0, 40))
    def cancel_some(self, a: int, b: int) -> None:
        assert self.ledger.cancel(0, a, b) == self.settle(a, b, "cancelled")

    @rule()
    def cancel_all(self) -> None:
        assert self.ledger.cancel(0, 0, -1) == self.settle(0, len(self.state), "cancelled")
        self.all_cancelled = True

    @invariant()
    def same(self) -> None:
        words = list(self.state.values())
        stage = self.stage
        assert stage.declared == len(words)
        assert (stage.done, stage.failed) == (words.count("done"), words.count("failed"))
        wanted = [task for task, word in self.state.items() if word is None]
        assert stage.unsettled == self.ledger.unsettled == len(wanted)
        assert [task for lo, hi in self.ledger.missing(0) for task in range(lo, hi)] == wanted
        assert stage.complete == ((self.closed or self.all_cancelled) and not wanted)
        assert all(self.ledger.attempt(0, t) == self.raised.get(t, 0) + self.died.get(t, 0) for t in wanted)
        assert set(stage.attempts) | set(stage.lost) <= set(wanted)


TestDictTwin = DictTwin.TestCase
TestDictTwin.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
