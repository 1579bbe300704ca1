"""Who is chosen, what a survey leads to, which branch goes on."""

from __future__ import annotations

import itertools

import pytest

from dht.core.identity import PeerId
from grid.core import choice
from grid.core.mandate import Branch
from grid.core.messages import Surveyed
from grid.core.raft_messages import NodeId, config_of
from grid.core.recovery import Standing, Step, judge, wins

A, B, C, D, E = (NodeId(bytes([65 + n]) * 20, n + 1) for n in range(5))


def has(node: NodeId, last_term: int = 1, last_index: int = 5, led: bool = False, final: bool = False) -> Surveyed:
    return Surveyed(node.incarnation, 1, last_term, last_index, led, final)


# ---- choice ------------------------------------------------------------------------------------------------------------

AGES = {PeerId(node.peer): 100.0 - number for number, node in enumerate((A, B, C, D, E))}


def test_the_submitter_comes_first_then_the_oldest() -> None:
    assert choice.choose(PeerId(A.peer), AGES, 3) == [A.peer, E.peer, D.peer]


def test_in_a_small_grid_everybody_is_chosen() -> None:
    assert set(choice.choose(PeerId(C.peer), AGES)) == set(AGES)


def test_ties_of_age_go_by_id() -> None:
    assert choice.by_age(dict.fromkeys(reversed(AGES), 1.0)) == sorted(AGES)


def test_newcomers_are_no_members_and_not_shunned() -> None:
    assert choice.newcomers(AGES, [PeerId(E.peer)], [PeerId(D.peer)]) == [C.peer, B.peer, A.peer]


def test_an_age_in_the_future_counts_as_just_started_and_garbage_too() -> None:
    assert choice.started_s(choice.hello_info(50.0), 100.0) == 50.0
    assert choice.started_s(choice.hello_info(500.0), 100.0) == 100.0
    assert choice.started_s(b"", 100.0) == choice.started_s(b"\xff\x00", 100.0) == 100.0
    assert choice.started_s(choice.hello_info(50.0, leaving=True), 100.0) is None


# ---- the survey --------------------------------------------------------------------------------------------------------

FIVE = config_of([A, B, C, D, E])


def test_a_reachable_majority_elects_and_nobody_branches() -> None:
    assert judge(A, (1, 5), FIVE, {B: has(B), C: has(C)}, False).step is Step.WAIT


def test_a_minority_branches_by_its_most_advanced_survivor() -> None:
    assert judge(A, (1, 5), FIVE, {B: has(B, 1, 6)}, False).step is Step.FOLLOW
    assert judge(B, (1, 6), FIVE, {A: has(A, 1, 5)}, False).step is Step.OPEN
    verdict = judge(A, (2, 1), FIVE, {B: has(B, 1, 6)}, False)
    assert verdict.step is Step.OPEN
    assert verdict.missing == (C, D, E)


def test_of_equal_survivors_the_lowest_id_branches() -> None:
    assert judge(A, (1, 5), FIVE, {B: has(B)}, False).step is Step.OPEN
    assert judge(B, (1, 5), FIVE, {A: has(A)}, False).opener == A


def test_a_peer_that_lost_its_journal_counts_for_nothing() -> None:
    answers = {B: has(B), C: Surveyed(0), D: Surveyed(D.incarnation + 1, last_term=9)}
    assert judge(A, (1, 5), FIVE, answers, False).step is Step.OPEN


@pytest.mark.parametrize(("answer", "step"), [(has(B, led=True), Step.WAIT), (has(B, led=True, final=True), Step.FINAL)])
def test_who_is_led_or_done_stops_the_others(answer: Surveyed, step: Step) -> None:
    assert judge(A, (9, 9), FIVE, {B: answer}, False).step is step
    assert judge(A, (9, 9), FIVE, {B: answer}, True).step is step


def test_a_strict_job_waits_for_its_majority() -> None:
    assert judge(A, (1, 5), FIVE, {B: has(B)}, True).step is Step.STRICT


def test_a_learner_that_alone_is_left_carries_on() -> None:
    config = config_of([A, B], [C])
    assert judge(C, (1, 5), config, {}, False).step is Step.OPEN


def test_exactly_one_of_those_who_see_each_other_opens() -> None:
    ends = {A: (1, 5), B: (2, 3), C: (2, 3)}
    steps = [
        judge(me, end, FIVE, {node: has(node, *other) for node, other in ends.items() if node != me and node != C}, False).step
        for me, end in ends.items()
        if me != C
    ]
    assert sorted(step.value for step in steps) == ["follow", "open"]


# ---- meetings ----------------------------------------------------------------------------------------------------------

ROOT = Branch()
ONE = Branch(b"1", (b"",), 2, 7)
TWO = Branch(b"2", (b"",), 2, 7)
DEEP = Branch(b"0", (b"", b"2"), 3, 1, ((2, 7),))


@pytest.mark.parametrize(
    ("winner", "loser"),
    [
        ((ROOT, 2, 1, False), (ROOT, 1, 9, False)),
        ((ROOT, 2, 2, False), (ROOT, 2, 1, False)),
        ((ROOT, 1, 1, True), (ROOT, 2, 1, False)),
        ((ONE, 1, 1, False), (ROOT, 2, 7, False)),
        ((ROOT, 2, 8, False), (ONE, 9, 9, False)),
        ((ONE, 1, 1, True), (ROOT, 3, 1, False)),  # it has been shown
        ((ROOT, 1, 1, True), (ONE, 9, 9, True)),
        ((ONE, 1, 1, True), (ROOT, 2, 7, False)),
        ((ONE, 1, 1, False), (TWO, 9, 9, False)),
        ((ONE, 1, 1, False), (DEEP, 9, 9, False)),
        ((DEEP, 1, 1, False), (TWO, 3, 1, False)),
        ((ROOT, 2, 8, False), (DEEP, 9, 9, False)),
        ((DEEP, 1, 1, False), (ROOT, 2, 7, False)),
        ((TWO, 1, 1, True), (ONE, 9, 9, False)),
        ((ONE, 1, 1, True), (TWO, 9, 9, True)),
    ],
)
def test_one_of_two_histories_wins(winner: Standing, loser: Standing) -> None:
    assert wins(winner, loser)
    assert not wins(loser, winner)


def test_a_branch_of_a_branch_knows_what_each_of_its_ancestors_had() -> None:
    child = ROOT.child(1, 5, b"", b"x", 2, 7)
    grandchild = child.child(1, 9, b"", b"y", 3, 1)
    assert (grandchild.base(b""), grandchild.base(child.name)) == ((2, 7), (3, 1))
    with pytest.raises(ValueError, match="not in tuple"):
        child.base(b"?")


def test_no_two_histories_beat_each_other_and_none_itself() -> None:
    standings = [
        (branch, epoch, version, final)
        for branch in (ROOT, ONE, TWO, DEEP)
        for epoch in (1, 2, 3)
        for version in (1, 7, 8)
        for final in (False, True)
    ]
    for a, b in itertools.product(standings, repeat=2):
        assert not (wins(a, b) and wins(b, a))
        if a[0].name != b[0].name:
            assert wins(a, b) or wins(b, a)
