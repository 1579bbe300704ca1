"""Whom a thief asks, and when."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import JobId
from grid.core.stealing import Ask, Thief, Wait

J, K = JobId(b"j" * 32), JobId(b"k" * 32)
LEADER, A, B, C = (PeerId(name * 20) for name in (b"l", b"a", b"b", b"c"))


def thief(*jobs: JobId) -> Thief:
    made = Thief(random.Random(1))
    for job in jobs:
        made.job_known(job, LEADER, True, 0.0)
    return made


def victim(made: Thief, now_s: float) -> PeerId | None:
    decision = made.next(now_s, lambda job: 2)
    return decision.victim if isinstance(decision, Ask) else None


def test_new_job_is_asked_for_at_once_and_at_its_leader() -> None:
    assert thief(J).next(0.0, lambda job: 3) == Ask(J, LEADER, 3)


def test_no_job_no_ask() -> None:
    assert thief().next(0.0, lambda job: 3) == Wait(None)


def test_one_ask_of_a_job_at_a_time() -> None:
    made = thief(J)
    assert victim(made, 0.0) == LEADER
    assert made.next(5.0, lambda job: 2) == Wait(None)
    made.granted(J, 5.0)
    assert victim(made, 5.0) == LEADER


def test_no_ask_without_a_free_slot() -> None:
    made = thief(J)
    assert made.next(0.0, lambda job: 0) == Wait(None)
    assert victim(made, 0.0) == LEADER


def test_backoff_doubles_up_to_its_bound() -> None:
    made = thief(J)
    now_s, pauses = 0.0, []
    for _ in range(12):
        assert victim(made, now_s) == LEADER
        made.refused(J, (), now_s)
        decision = made.next(now_s, lambda job: 2)
        assert isinstance(decision, Wait)
        assert decision.until_s is not None
        pauses.append(decision.until_s - now_s)
        assert victim(made, decision.until_s - 1e-6) is None
        now_s = decision.until_s
    assert pauses[0] <= 1.5 * limits.STEAL_BACKOFF_S
    assert all(0.5 * limits.STEAL_BACKOFF_S_MAX <= pause <= 1.5 * limits.STEAL_BACKOFF_S_MAX for pause in pauses[-4:])


def test_grant_ends_the_backoff() -> None:
    made = thief(J)
    for _ in range(8):
        victim(made, 1e6)
        made.refused(J, (), 0.0)
    assert victim(made, 1e6) == LEADER
    made.granted(J, 1e6)
    victim(made, 1e6)
    made.refused(J, (), 1e6)
    assert victim(made, 1e6 + 1.5 * limits.STEAL_BACKOFF_S) == LEADER


def test_poke_ends_the_backoff() -> None:
    made = thief(J)
    victim(made, 0.0)
    made.refused(J, (), 0.0)
    assert victim(made, 0.001) is None
    made.poked(J, LEADER, 0.001)
    assert victim(made, 0.001) == LEADER


def test_poke_that_overtakes_the_answer_is_not_forgotten() -> None:
    """The leader answered "nothing" and had work a moment later."""
    made = thief(J)
    victim(made, 0.0)
    made.poked(J, LEADER, 0.0)
    made.refused(J, (), 0.001)
    assert victim(made, 0.001) == LEADER
    made.refused(J, (), 0.002)
    assert victim(made, 0.002) is None, "one poke, one ask"


def test_poke_of_another_holder_is_asked_first() -> None:
    made = thief(J)
    made.poked(J, A, 0.0)
    assert victim(made, 0.0) == A


def test_news_of_work_ends_the_backoff_and_other_news_do_not() -> None:
    made = thief(J)
    victim(made, 0.0)
    made.refused(J, (), 0.0)
    made.job_known(J, LEADER, False, 0.001)
    assert victim(made, 0.001) is None
    made.job_known(J, LEADER, True, 0.001)
    assert victim(made, 0.001) == LEADER


def test_hints_are_asked_one_after_the_other_without_a_pause() -> None:
    made = thief(J)
    assert victim(made, 0.0) == LEADER
    made.refused(J, (A, LEADER, B, A), 0.0)
    assert victim(made, 0.0) == A
    made.refused(J, (), 0.0)
    assert victim(made, 0.0) == B
    made.refused(J, (), 0.0)
    assert victim(made, 0.0) is None, "all have been asked: now the backoff"


def test_hints_of_hints_are_not_followed() -> None:
    """Two peers that name each other would keep a thief busy for ever."""
    made = thief(J)
    victim(made, 0.0)
    made.refused(J, (A,), 0.0)
    assert victim(made, 0.0) == A
    made.refused(J, (A, B), 0.0)
    assert victim(made, 0.0) is None


def test_hints_are_bounded() -> None:
    made = thief(J)
    victim(made, 0.0)
    made.refused(J, tuple(PeerId(bytes([n]) * 20) for n in range(100)), 0.0)
    asked = 0
    while victim(made, 0.0) is not None:
        made.refused(J, (), 0.0)
        asked += 1
    assert asked == limits.HINTS_MAX


def test_jobs_take_turns() -> None:
    made = thief(J, K)
    order = []
    for turn in range(6):
        decision = made.next(float(turn), lambda job: 1)
        assert isinstance(decision, Ask)
        order.append(decision.job)
        made.granted(decision.job, float(turn))
    assert order == [J, K] * 3


def test_job_that_gives_nothing_does_not_stand_in_the_way_of_another() -> None:
    made = thief(J, K)
    assert made.next(0.0, lambda job: 1) == Ask(J, LEADER, 1)
    made.refused(J, (), 0.0)
    assert made.next(0.0, lambda job: 1) == Ask(K, LEADER, 1)


def test_job_that_is_over_is_not_asked_for() -> None:
    made = thief(J)
    victim(made, 0.0)
    made.job_gone(J)
    made.refused(J, (A,), 0.0)
    made.granted(J, 0.0)
    made.poked(J, A, 0.0)
    assert made.jobs() == []
    assert victim(made, 9.0) is None


def test_new_leader_is_asked() -> None:
    made = thief(J)
    victim(made, 0.0)
    made.refused(J, (A,), 0.0)
    made.job_known(J, C, False, 0.0)
    assert victim(made, 0.0) == C


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order: one ask a job, never before its time, and none forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.real = Thief(random.Random(3))
        self.now_s = 0.0
        self.under_way: set[JobId] = set()
        self.known: set[JobId] = set()

    jobs = st.sampled_from([J, K])
    peers = st.sampled_from([A, B, LEADER])

    @rule(job=jobs, work=st.booleans())
    def news(self, job: JobId, work: bool) -> None:
        self.real.job_known(job, LEADER, work, self.now_s)
        self.known.add(job)

    @rule(job=jobs)
    def gone(self, job: JobId) -> None:
        self.real.job_gone(job)
        self.known.discard(job)
        self.under_way.discard(job)

    @rule(job=jobs, by=peers)
    def poke(self, job: JobId, by: PeerId) -> None:
        self.real.poked(job, by, self.now_s)

    @rule(job=jobs, hints=st.lists(peers, max_size=3), granted=st.booleans())
    def answer(self, job: JobId, hints: list[PeerId], granted: bool) -> None:
        if job in self.under_way:
            self.under_way.discard(job)
            if granted:
                self.real.granted(job, self.now_s)
            else:
                self.real.refused(job, tuple(hints), self.now_s)

    @rule(step_s=st.floats(0, 0.1))
    def ask(self, step_s: float) -> None:
        self.now_s += step_s
        decision = self.real.next(self.now_s, lambda job: 1)
        if isinstance(decision, Ask):
            assert decision.job in self.known - self.under_way
            self.under_way.add(decision.job)
        else:
            idle = self.known - self.under_way
            assert (decision.until_s is None) == (not idle)
            if decision.until_s is not None:
                assert self.now_s < decision.until_s <= self.now_s + 1.5 * limits.STEAL_BACKOFF_S_MAX


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
