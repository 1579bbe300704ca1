"""Facts on their way into the log: order, batches, back-pressure, what a lost leadership leaves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.core import facts
from grid.core.facts import AnyFact, Output, Told
from grid.core.raft_limits import ENTRY_BYTES_MAX
from grid.replica_batch import BATCH_BYTES, BATCH_DELAY_S, BATCH_ENTRIES, BATCH_FACTS, BUSY_RETRY_S, PATIENCE_S, Batch


def told(count: int, size: int = 1) -> list[AnyFact]:
    return [Told(str(number).zfill(size)) for number in range(count)]


def test_the_first_facts_leave_at_once_and_the_next_wait_for_company() -> None:
    batch = Batch()
    assert batch.due_s() == math.inf
    assert batch.add(told(3), 10.0) == 3
    assert batch.due_s() == -math.inf
    batch.proposed(2, batch.entries())
    batch.add(told(1), 10.0)
    batch.add(told(1), 10.01)
    assert batch.due_s() == 10.0 + BATCH_DELAY_S
    batch.applied(2)
    assert batch.committed == 3
    assert batch.due_s() == -math.inf


def test_facts_that_nobody_waits_for_wait_for_company() -> None:
    batch = Batch()
    batch.add(told(1), 10.0, patient=True)
    batch.add(told(1), 10.1, patient=True)
    assert batch.due_s() == 10.0 + PATIENCE_S, "none longer than the first"
    batch.add(told(1), 10.1)
    assert batch.due_s() == -math.inf, "they leave with one that is waited for"
    batch.proposed(2, batch.entries())
    batch.add(told(1), 20.0, patient=True)
    assert batch.due_s() == 20.0 + PATIENCE_S


def test_who_waits_for_a_fact_hurries_it() -> None:
    batch = Batch()
    number = batch.add(told(2), 10.0, patient=True)
    assert batch.waits(number)
    assert not batch.waits(0)
    batch.hurry(10.0)
    assert batch.due_s() == -math.inf
    batch.proposed(2, batch.entries())
    assert not batch.waits(number)
    batch.hurry(10.0)
    assert batch.due_s() == math.inf, "nothing waits here any more"
    batch.add(told(1), 10.0, patient=True)
    batch.hurry(10.0)
    assert batch.due_s() == 10.0 + BATCH_DELAY_S, "behind what is on its way"


def test_many_patient_facts_fill_a_batch() -> None:
    batch = Batch()
    batch.add(told(3, BATCH_BYTES // 2), 0.0, patient=True)
    assert batch.due_s() == -math.inf


def test_a_full_batch_waits_for_nothing() -> None:
    batch = Batch()
    batch.add(told(1), 0.0)
    batch.proposed(1, batch.entries())
    batch.add(told(3, BATCH_BYTES // 2), 0.0)
    assert batch.due_s() == -math.inf


def test_a_core_that_is_busy_is_asked_again_later_or_after_a_commit() -> None:
    batch = Batch()
    batch.add(told(1), 0.0)
    batch.proposed(1, batch.entries())
    batch.add(told(1), 0.0)
    batch.refused(5.0)
    assert batch.due_s() == 5.0 + BUSY_RETRY_S
    batch.applied(1)
    assert batch.due_s() == -math.inf


def test_what_a_leadership_did_not_commit_is_lost_for_ever_and_nothing_else() -> None:
    batch = Batch()
    batch.add(told(2), 0.0)
    batch.proposed(1, batch.entries())
    batch.applied(1)
    batch.add(told(2), 0.0)
    batch.lose()
    assert batch.add(told(2), 0.0) == 6
    batch.proposed(7, batch.entries())
    batch.applied(7)
    assert [batch.is_lost(number) for number in range(1, 7)] == [False, False, True, True, False, False]
    assert batch.committed == 6


def test_a_fact_too_large_for_an_entry_takes_none_of_its_batch() -> None:
    batch = Batch()
    with pytest.raises(ValueError, match="bytes"):
        batch.add([Told("a"), Output(1, 0, bytes(ENTRY_BYTES_MAX))], 0.0)
    assert batch.issued == batch.pending_bytes == 0


@given(st.lists(st.lists(st.integers(0, 100_000), min_size=1, max_size=40), max_size=8))
def test_entries_hold_all_facts_in_their_order(sizes: list[list[int]]) -> None:
    batch = Batch()
    said: list[AnyFact] = []
    for part in sizes:
        new: list[AnyFact] = [Output(1, len(said) + number, bytes(size)) for number, size in enumerate(part)]
        said += new
        assert batch.add(new, 0.0) == len(said)
    entries = batch.entries()
    found = [fact for payload, _ in entries for fact in facts.decode(payload)]
    assert found == said
    assert all(len(payload) <= max(BATCH_BYTES + 5, 100_100) for payload, _ in entries)
    ends = [last for _, last in entries]
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == len(said)


@pytest.mark.parametrize("count", [1, 15, 16, 65, 2_000_000])
def test_a_batch_of_any_size_has_the_bytes_of_the_codec(count: int) -> None:
    batch = Batch()
    batch.add([Told("")] * count, 0.0)
    payloads = [payload for payload, _ in batch.entries()]
    assert len(payloads) <= BATCH_ENTRIES
    counts = [len(facts.decode(payload)) for payload in payloads]
    assert sum(counts) == count
    assert payloads == [facts.encode([Told("")] * each) for each in counts]
    assert max(counts) <= max(BATCH_FACTS, count // BATCH_ENTRIES + 1)
