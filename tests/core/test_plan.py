"""Pace and grain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.core import limits
from grid.core.plan import EXPECTED_S, GROWTH, SHARE_S_MIN, Pace


def test_unknown_pace_starts_with_one_task() -> None:
    pace = Pace()
    assert pace.per_task_s is None
    assert pace.grain(1000, 4) == 1


def test_one_lucky_short_task_proves_little() -> None:
    pace = Pace()
    pace.record(1, 1e-7)
    assert pace.grain(1_000_000, 4) == GROWTH
    pace.record(GROWTH, GROWTH * 1e-7)
    assert pace.grain(1_000_000, 4) == GROWTH**2


def test_grain_is_about_grain_s_of_work() -> None:
    pace = Pace()
    for _ in range(20):
        pace.record(1000, 1.0)
    assert pace.grain(1_000_000, 4) == pytest.approx(limits.GRAIN_S * 1000, abs=1)


def test_long_tasks_go_one_by_one() -> None:
    pace = Pace()
    pace.record(1, 10.0)
    assert pace.grain(100, 4) == 1


def test_near_the_end_every_worker_gets_a_share() -> None:
    pace = Pace()
    pace.record(1000, 1.0)
    assert pace.grain(16, 4) == 2
    assert pace.grain(1, 4) == 1


def test_no_share_is_smaller_than_what_handing_it_out_costs() -> None:
    pace = Pace()
    pace.record(1000, 0.001)
    assert pace.grain(5000, 4) == 625
    assert pace.grain(1600, 4) == SHARE_S_MIN * 1e6
    assert pace.grain(16, 4) == 16


def test_tasks_of_no_measurable_time() -> None:
    pace = Pace()
    pace.record(100_000, 0.0)
    assert pace.per_task_s is not None
    assert pace.per_task_s > 0
    assert pace.grain(1 << 30, 1) == limits.GRAIN_TASKS_MAX


def test_pace_follows_a_stage_whose_tasks_change() -> None:
    pace = Pace()
    for _ in range(50):
        pace.record(50, limits.GRAIN_S)
    for _ in range(20):
        pace.record(1, limits.GRAIN_S)
    assert pace.per_task_s == pytest.approx(limits.GRAIN_S, rel=0.2)


def test_another_peers_measure_counts_until_one_is_made_here() -> None:
    pace = Pace()
    pace.hint(0.001)
    assert pace.per_task_s == 0.001
    assert pace.grain(10_000, 4) == 50
    pace.hint(5.0)
    assert pace.per_task_s == 0.001
    for _ in range(30):
        pace.record(1, 1.0)
    assert pace.per_task_s == pytest.approx(1.0, rel=0.05)


def test_stage_begins_with_what_an_earlier_one_lets_expect() -> None:
    earlier = Pace()
    earlier.record(1000, 1.0)
    pace = Pace(earlier)
    assert pace.per_task_s is None, "it is no measure"
    assert pace.grain(1000, 2) == EXPECTED_S * 1000
    assert Pace(pace).grain(1000, 2) == EXPECTED_S * 1000, "nor does one between them that ran nothing"
    pace.record(1, 1.0)
    assert pace.grain(1000, 2) == 1


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_hint_that_says_nothing(wrong: float) -> None:
    pace = Pace()
    pace.hint(wrong)
    assert pace.per_task_s is None


@given(
    st.lists(st.tuples(st.integers(1, 1 << 17), st.floats(0, 1e4)), max_size=20),
    st.integers(1, 1 << 40),
    st.integers(0, 1000),
)
def test_grain_is_always_from_one_to_what_there_is(records: list[tuple[int, float]], remaining: int, workers: int) -> None:
    pace = Pace()
    largest = 0
    for tasks, elapsed_s in records:
        pace.record(tasks, elapsed_s)
        largest = max(largest, tasks)
    grain = pace.grain(remaining, workers)
    assert 1 <= grain <= min(remaining, limits.GRAIN_TASKS_MAX)
    assert grain <= max(1, largest * GROWTH)
