"""Where a replay pickles other bytes: only what really differs is different (real processes)."""

from __future__ import annotations

import pytest

from tests.replay.conftest import Play
from tests.replay.leader import Run, Stage

pytestmark = pytest.mark.real

BY_ADDRESS = """
import grid, time
class A: pass
class B: pass
class C: pass
class D: pass
KINDS = {A, B, C, D, int, None, len, time.sleep}   # in the order of their addresses
def name(kind): return getattr(kind, "__name__", str(kind))
def work(item):
    n, kinds = item
    return n, sorted(map(name, kinds)), len(KINDS)
print(list(grid.map(work, [(n, set(KINDS)) for n in range(30)])))
"""

CLOCK = """
import grid, time
STARTED = time.time()
def work(item): return item[0] * 2
items = [(n, [STARTED] if n % 10 == 3 else [f"text{n}"], {n: (n, 1.5)}) for n in range(40)]
print(list(grid.map(work, items)))
"""


def ask_of_each_segment(run: Run) -> None:
    """Have the driver compare each map's segment whose bytes differ, and its function, with what is on record."""

    def compare(run: Run, stage: Stage, first: int) -> None:
        assert run.earlier is not None
        (recorded,) = run.earlier.stages
        (old,) = [data for at, _, data in recorded.segments if at == first]
        (count, new) = next((count, data) for at, count, data in stage.segments if at == first)
        run.ask_function(recorded.function, stage.function)
        run.ask(old, new, stage.number, first, count)

    run.compare = compare


def answered(run: Run) -> tuple[bool, set[int]]:
    """Whether the functions are the same, and which items."""
    answers = list(run.same.values())
    functions, items = answers[::2], answers[1::2]
    indexes = {index for ranges in items for lo, hi in ranges for index in range(lo, hi)}
    return all(ranges == ((0, 1),) for ranges in functions), indexes


async def test_order_of_addresses_is_no_difference(play: Play) -> None:
    first = await play(BY_ADDRESS)
    for _ in range(2):
        again = await play(BY_ADDRESS, first, prepare=ask_of_each_segment)
        assert again.stdout == first.stdout
        if again.maps == first.maps:  # once in a while the addresses are in the same order
            continue
        same, indexes = answered(again)
        assert same
        assert indexes == {index for _, index in again.reruns}


async def test_clock_in_arguments_makes_only_those_items_differ(play: Play) -> None:
    first = await play(CLOCK)
    again = await play(CLOCK, first, prepare=ask_of_each_segment)
    assert again.maps != first.maps
    same, indexes = answered(again)
    assert same
    assert {index for _, index in again.reruns} - indexes == {3, 13, 23, 33}


async def test_clock_in_the_function_makes_it_another(play: Play) -> None:
    source = CLOCK.replace("return item[0] * 2", "return item[0] * 2, len([STARTED])").replace("[STARTED] if", "[0] if")
    first = await play(source)
    again = await play(source, first, prepare=ask_of_each_segment)
    same, indexes = answered(again)
    assert not same
    assert indexes == set(range(40))
