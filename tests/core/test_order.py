"""The order of delivery that a replay keeps."""

from __future__ import annotations

import random

from grid.core.order import Offer, Order
from grid.core.ranges import RangeSet


def order(*turns: tuple[int, int]) -> Order[str]:
    return Order(RangeSet(turns))


def items(offers: list[Offer[str]]) -> str:
    return "".join(offer.item for offer in offers)


def test_nothing_recorded_passes_at_once() -> None:
    empty = order()
    assert empty.over
    assert items(empty.offer(0, 0, 5, "a")) == "a"


def test_results_wait_for_lower_turns() -> None:
    kept = order((0, 6))
    kept.place(0, 0, 4, 2)
    kept.place(1, 0, 2, 0)
    assert items(kept.offer(0, 2, 4, "c")) == ""
    assert items(kept.offer(0, 0, 2, "b")) == ""
    assert kept.held == 2
    assert kept.next_turn == 0
    assert items(kept.offer(1, 0, 2, "a")) == "abc"
    assert kept.over
    assert items(kept.offer(0, 9, 10, "z")) == "z"


def test_new_results_come_behind_all_recorded_ones() -> None:
    kept = order((0, 2))
    kept.place(0, 0, 2, 0)
    assert items(kept.offer(0, 5, 6, "y")) == ""
    assert items(kept.offer(0, 4, 5, "z")) == ""
    assert items(kept.offer(0, 0, 1, "a")) == "a"
    assert items(kept.offer(0, 1, 2, "b")) == "byz"


def test_turn_that_can_not_come_blocks_until_it_is_given_up() -> None:
    kept = order((0, 4))
    kept.place(0, 0, 2, 1)  # turns 0 and 3: the driver does not make these calls
    assert items(kept.offer(0, 1, 2, "b") + kept.offer(0, 7, 8, "n") + kept.offer(0, 0, 1, "a")) == ""
    assert items(kept.give_up()) == "abn"
    assert kept.over
    assert not kept.held
    assert items(kept.offer(0, 8, 9, "z")) == "z"
    assert kept.give_up() == []


def test_struck_tasks_are_not_waited_for() -> None:
    kept = order((0, 4))
    kept.place(0, 0, 4, 0)
    assert items(kept.offer(0, 3, 4, "d")) == ""
    assert items(kept.strike(0, 0, 2)) == ""
    assert items(kept.strike(0, 2, 3)) == "d"
    assert items(kept.strike(5, 0, 9)) == ""


def test_struck_turns_without_tasks() -> None:
    kept = order((0, 3))
    kept.place(0, 0, 1, 2)
    assert items(kept.offer(0, 0, 1, "c")) == ""
    kept.strike_turns([(0, 2)])
    assert items(kept.ready()) == "c"


def test_offer_after_it_was_struck_still_passes_once() -> None:
    """Cancelled too late: its result was on its way."""
    kept = order((0, 2))
    kept.place(0, 0, 2, 0)
    kept.strike(0, 0, 1)
    assert items(kept.offer(0, 0, 1, "a")) == "a"
    assert items(kept.offer(0, 1, 2, "b")) == "b"


def test_range_is_cut_where_its_turns_are() -> None:
    kept = order((0, 9))
    kept.place(0, 2, 4, 5)
    kept.place(0, 4, 6, 0)
    assert kept.cuts(0, 0, 8) == [(0, 2, -1), (2, 4, 5), (4, 6, 0), (6, 8, -1)]
    assert kept.cuts(0, 3, 5) == [(3, 4, 6), (4, 5, 0)]
    assert kept.cuts(1, 0, 3) == [(0, 3, -1)]
    kept.place(0, 3, 5, 7)  # declared anew
    assert kept.cuts(0, 2, 6) == [(2, 3, 5), (3, 5, 7), (5, 6, 1)]


def test_any_order_of_offers_gives_the_recorded_one() -> None:
    for seed in range(50):
        dice = random.Random(seed)
        kept: Order[int] = Order(RangeSet([(0, 30)]))
        turns = dice.sample(range(30), 30)
        for task, turn in enumerate(turns):
            kept.place(task % 3, task, task + 1, turn)
        delivered: list[int] = []
        for task in dice.sample(range(33), 33):
            delivered += [offer.item for offer in kept.offer(task % 3, task, task + 1, turns[task] if task < 30 else 100)]
        assert delivered == [*range(30), 100, 100, 100]
        assert kept.over
