"""Whom a thief asks, and when."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import JobId
from grid.core.stealing import Ask, Referrals, Thief, Wait

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


def test_who_will_poke_is_not_asked_again_at_once() -> None:
    made = thief(J)
    assert victim(made, 0.0) == LEADER
    made.refused(J, (), 0.0, parked=True)
    assert victim(made, 0.49 * limits.STEAL_PARKED_S) is None
    made.poked(J, LEADER, 0.01)
    assert victim(made, 0.01) == LEADER
    made.refused(J, (A,), 0.01, parked=True)
    assert victim(made, 0.01) == A, "who was named meanwhile is asked without a pause"
    made.refused(J, (), 0.01)
    assert victim(made, 0.01 + 1.5 * limits.STEAL_BACKOFF_S) == LEADER, "who has no work and pokes nobody"


def test_leader_that_many_ask_is_asked_less_often() -> None:
    """A thousand peers without work would ask their leader a thousand times a second."""
    made = thief(J)
    now_s, asks = 0.0, 0
    while now_s < 80:
        assert victim(made, now_s) == LEADER
        made.paced(J, 8.0)
        made.refused(J, (), now_s)
        decision = made.next(now_s, lambda job: 2)
        assert isinstance(decision, Wait)
        assert decision.until_s is not None
        now_s, asks = decision.until_s, asks + 1
    assert 10 <= asks <= 10 + 80 / 4
    made.poked(J, LEADER, now_s - 0.1)
    assert victim(made, now_s - 0.1) == LEADER


@pytest.mark.parametrize(("told_s", "most_s"), [(0.0, limits.STEAL_BACKOFF_S_MAX), (1e9, limits.JOB_FORGET_S), (-1.0, 1.0)])
def test_what_a_leader_asks_for_has_its_bounds(told_s: float, most_s: float) -> None:
    made = thief(J)
    now_s = 0.0
    for _ in range(16):
        assert victim(made, now_s) == LEADER
        made.paced(J, told_s)
        made.refused(J, (), now_s)
        before_s, now_s = now_s, now_s + 1.5 * most_s
    assert victim(made, before_s + 0.4 * most_s) is None
    assert victim(made, now_s) == LEADER


def test_pace_of_another_than_the_leader_does_not_count() -> None:
    made = thief(J)
    assert victim(made, 0.0) == LEADER
    made.refused(J, (A,), 0.0)
    assert victim(made, 0.0) == A
    made.paced(J, 8.0)
    for n in range(12):
        made.refused(J, (), 10.0 * n)
        assert victim(made, 10.0 * n + 1.5 * limits.STEAL_BACKOFF_S_MAX) == LEADER


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


PEERS = [PeerId(random.Random(n).randbytes(20)) for n in range(200)]


def referrals(surplus: dict[PeerId, int]) -> Referrals:
    made = Referrals(lambda peer: surplus.get(peer, 0))
    for peer in surplus:
        made.heard(peer)
    return made


def test_only_who_has_something_to_give_is_named() -> None:
    surplus = {A: 4, B: 0, C: -1}
    made = referrals(surplus)
    assert made.choose(LEADER, 0.0) == (A,)
    assert made.choose(A, 0.0) == (), "not to itself"
    surplus[A] = 0
    assert made.choose(LEADER, 0.0) == ()


def test_holder_is_not_named_to_more_thieves_than_it_can_serve() -> None:
    """A thousand peers look for work and one has some: it is not asked a thousand times."""
    made = referrals({A: 1000})
    named = sum(made.choose(thief, 0.0) == (A,) for thief in PEERS)
    assert named == 10
    made.heard(A)
    assert sum(made.choose(thief, 0.0) == (A,) for thief in PEERS) == 10, "its heartbeat says what it has now"


def test_holder_that_is_silent_is_named_again_after_a_while() -> None:
    made = referrals({A: 1})
    assert made.choose(B, 0.0) == (A,)
    assert made.choose(C, limits.REFERRAL_S) == ()
    assert made.choose(C, limits.REFERRAL_S + 0.01) == (A,)


def test_who_is_not_allowed_is_not_named() -> None:
    made = referrals({A: 9, B: 9})
    assert made.choose(C, 0.0, lambda peer: peer != A) == (B,)


def test_thief_is_sent_to_the_same_few_who_are_sent_to_it() -> None:
    """All have as much: each is drawn to about ten of two hundred, its partners to it."""
    surplus = dict.fromkeys(PEERS, 1 << 20)
    partners: dict[PeerId, set[PeerId]] = {peer: set() for peer in PEERS}
    asked: Counter[PeerId] = Counter()
    made = referrals(surplus)
    for turn in range(10):
        for thief in PEERS:
            made.heard(thief)
            victim = made.choose(thief, turn * 2 * limits.REFERRAL_S)[0]
            partners[thief].add(victim)
            partners[victim].add(thief)
            asked[victim] += 1
    sizes = sorted(len(each) for each in partners.values())
    assert sizes[len(sizes) // 2] <= 4
    assert sizes[-1] <= 12
    assert max(asked.values()) <= 60, "and nobody is everybody's"


def test_who_has_much_more_is_found_by_all() -> None:
    made = referrals({**dict.fromkeys(PEERS, 2), A: 1 << 20})
    assert all(made.choose(thief, 2.0 * limits.REFERRAL_S * n)[0] == A for n, thief in enumerate(PEERS))


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
