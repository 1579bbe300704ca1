"""Results on their way to a reader: each once, in order, under credit."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grid.core.delivery import Delivery

CREDIT = 10


def sent(delivery: Delivery[str]) -> list[tuple[int, int, str]]:
    return list(delivery.ready())


def test_ordered_results_wait_for_their_predecessors() -> None:
    delivery: Delivery[str] = Delivery(True)
    delivery.add(2, 4, 1, "b")
    assert sent(delivery) == []
    delivery.add(0, 2, 1, "a")
    assert sent(delivery) == [(0, 2, "a"), (2, 4, "b")]
    assert sent(delivery) == []
    assert delivery.empty


def test_unordered_results_go_as_they_come() -> None:
    delivery: Delivery[str] = Delivery(False)
    delivery.add(2, 4, 1, "b")
    delivery.add(0, 2, 1, "a")
    assert sent(delivery) == [(2, 4, "b"), (0, 2, "a")]


def test_credit_holds_results_back_until_they_are_consumed() -> None:
    delivery: Delivery[str] = Delivery(True, CREDIT)
    for n in range(5):
        delivery.add(n, n + 1, 4, str(n))
    assert [item for _, _, item in sent(delivery)] == ["0", "1", "2"]
    delivery.consumed(1)
    assert sent(delivery) == []
    delivery.consumed(3)
    assert [item for _, _, item in sent(delivery)] == ["3"]


def test_one_item_may_be_larger_than_the_credit() -> None:
    delivery: Delivery[str] = Delivery(True, CREDIT)
    delivery.add(0, 1, 1000, "a")
    delivery.add(1, 2, 0, "b")
    assert [item for _, _, item in sent(delivery)] == ["a"]
    delivery.consumed(1000)
    assert [item for _, _, item in sent(delivery)] == ["b"]


def test_what_costs_nothing_is_not_counted() -> None:
    """Failures and cancellations of a million tasks."""
    delivery: Delivery[str] = Delivery(True, CREDIT)
    for n in range(100):
        delivery.add(n, n + 1, 0, "x")
    assert len(sent(delivery)) == 100


def test_consuming_more_than_was_sent_gives_no_credit_in_advance() -> None:
    delivery: Delivery[str] = Delivery(True, CREDIT)
    delivery.consumed(1_000_000)
    for n in range(4):
        delivery.add(n, n + 1, 5, str(n))
    assert len(sent(delivery)) == 2


def test_waiting_items_come_in_the_order_to_spill_them() -> None:
    ordered: Delivery[str] = Delivery(True)
    unordered: Delivery[str] = Delivery(False)
    for delivery in (ordered, unordered):
        for lo in (5, 9, 7):
            delivery.add(lo, lo + 1, 1, str(lo))
    assert list(ordered.waiting()) == ["9", "7", "5"]
    assert list(unordered.waiting()) == ["7", "9", "5"]


class Twin(RuleBasedStateMachine):
    ordered = True

    def __init__(self) -> None:
        super().__init__()
        self.real: Delivery[int] = Delivery(self.ordered, CREDIT)
        self.added: list[tuple[int, int, int]] = []  # lo, hi, size: the item is its position here
        self.out: list[tuple[int, int, int]] = []
        self.consumed_bytes = 0
        self.pool = list(range(0, 90, 3))

    @rule(data=st.data(), size=st.integers(0, 25))
    def add(self, data: st.DataObject, size: int) -> None:
        if self.pool:
            lo = self.pool.pop(data.draw(st.integers(0, min(4, len(self.pool) - 1))))
            self.added.append((lo, lo + 3, size))
            self.real.add(lo, lo + 3, size, len(self.added) - 1)

    @rule(size=st.integers(0, 30))
    def consume(self, size: int) -> None:
        size = min(size, self.underway)
        self.real.consumed(size)
        self.consumed_bytes += size

    @property
    def underway(self) -> int:
        return sum(self.added[item][2] for _, _, item in self.out) - self.consumed_bytes

    @rule()
    def send(self) -> None:
        for entry in self.real.ready():
            assert self.underway < CREDIT, "sent without credit"
            self.out.append(entry)
        if self.underway < CREDIT:
            waiting = set(range(len(self.added))) - {item for _, _, item in self.out}
            if self.ordered:
                at = self.out[-1][1] if self.out else 0
                assert at not in {self.added[item][0] for item in waiting}, "held back though there is credit"
            else:
                assert not waiting

    @invariant()
    def once_and_in_order(self) -> None:
        items = [item for _, _, item in self.out]
        assert len(items) == len(set(items))
        assert all((lo, hi) == self.added[item][:2] for lo, hi, item in self.out)
        if self.ordered:
            at = 0
            for lo, hi, _ in self.out:
                assert lo == at
                at = hi
        else:
            assert items == sorted(items)
        assert sorted(self.real.waiting()) == sorted(set(range(len(self.added))) - set(items))
        assert self.real.empty == (len(items) == len(self.added))


class UnorderedTwin(Twin):
    ordered = False


TestOrdered = Twin.TestCase
TestOrdered.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
TestUnordered = UnorderedTwin.TestCase
TestUnordered.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
