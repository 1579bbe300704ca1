"""Claims against a naive twin that counts, task by task, the sweeps in which nobody claimed it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.errors import RefusedError
from grid.core.liveness import Claims
from grid.core.ranges import RangeSet

A, B = PeerId(b"a" * 20), PeerId(b"b" * 20)
BEAT = limits.HEARTBEAT_S


def sweeps(claims: Claims, missing: dict[int, list[tuple[int, int]]], at_s: float, count: int) -> list[tuple[int, int, int]]:
    found = []
    for number in range(count):
        found += claims.sweep(missing, {}, at_s + number * BEAT)
    return found


def test_range_is_requeued_after_two_sweeps_without_a_claim() -> None:
    claims = Claims()
    missing = {0: [(0, 10)]}
    assert claims.sweep(missing, {}, 0.0) == []
    assert claims.sweep(missing, {}, BEAT) == [(0, 0, 10)]


def test_only_what_was_unclaimed_both_times_is_requeued() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 4)]}, 0.0)
    assert claims.sweep({0: [(0, 10)]}, {}, 0.0) == []
    claims.claim(A, {0: [(8, 10)]}, BEAT)
    assert claims.sweep({0: [(0, 10)]}, {}, BEAT) == [(0, 4, 8)]


def test_requeued_range_has_two_more_sweeps() -> None:
    """It is in the leader's own deque by then, or was given away at once."""
    claims = Claims()
    missing = {0: [(0, 10)]}
    assert sweeps(claims, missing, 0.0, 2) == [(0, 0, 10)]
    assert claims.sweep(missing, {}, 2 * BEAT) == []
    assert claims.sweep(missing, {}, 3 * BEAT) == [(0, 0, 10)]


def test_heartbeat_replaces_what_was_claimed_before() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 4)], 1: [(0, 2)]}, 0.0)
    claims.claim(A, {0: [(2, 6), (8, 9)]}, 0.1)
    assert list(claims.held(A, 0)) == [(2, 6), (8, 9)]
    assert not claims.held(A, 1)
    assert claims.total(A) == 5


def test_grant_counts_as_a_claim_before_the_first_heartbeat() -> None:
    claims = Claims()
    claims.grant(A, [(0, 0, 10)], 0.0)
    assert sweeps(claims, {0: [(0, 10)]}, 0.1, 4) == []


def test_silent_peer_claims_nothing_after_its_lease() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 10)]}, 0.0)
    missing = {0: [(0, 10)]}
    assert claims.sweep(missing, {}, limits.LEASE_S) == []
    assert claims.sweep(missing, {}, limits.LEASE_S + 0.1) == []
    assert claims.sweep(missing, {}, limits.LEASE_S + BEAT) == [(0, 0, 10)]
    assert claims.peers() == []


def test_lost_peer_that_comes_back_in_time_keeps_its_ranges() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 10)]}, 0.0)
    claims.lose(A)
    assert claims.sweep({0: [(0, 10)]}, {}, 0.1) == []
    claims.claim(A, {0: [(0, 10)]}, 0.2)
    assert sweeps(claims, {0: [(0, 10)]}, 0.6, 4) == []


def test_range_that_two_peers_claim_survives_the_loss_of_one() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 10)]}, 0.0)
    claims.claim(B, {0: [(5, 10)]}, 0.0)
    claims.lose(A)
    assert sweeps(claims, {0: [(0, 10)]}, 0.1, 2) == [(0, 0, 5)]


def test_own_ranges_are_not_requeued() -> None:
    claims = Claims()
    own = {0: RangeSet([(0, 5)])}
    claims.sweep({0: [(0, 10)]}, own, 0.0)
    assert claims.sweep({0: [(0, 10)]}, own, BEAT) == [(0, 5, 10)]


def test_settled_tasks_are_claimed_by_nobody() -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 10)]}, 0.0)
    claims.settle(0, 2, 4)
    assert list(claims.held(A, 0)) == [(0, 2), (4, 10)]
    assert claims.total(A) == 8


@pytest.mark.parametrize("wrong", [(5, 3), (3, 3), (-1, 2), (0, limits.TASKS_MAX + 1)])
def test_claim_of_what_is_no_range_changes_nothing(wrong: tuple[int, int]) -> None:
    claims = Claims()
    claims.claim(A, {0: [(0, 10)]}, 0.0)
    with pytest.raises(RefusedError):
        claims.claim(A, {0: [(0, 1), wrong]}, 0.1)
    assert claims.total(A) == 10


TASKS = 12
ranges = st.lists(st.tuples(st.integers(0, TASKS - 1), st.integers(1, 4)), max_size=3)


def to_ranges(drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(lo, min(TASKS, lo + size)) for lo, size in drawn]


def members(drawn: list[tuple[int, int]]) -> set[int]:
    return {task for lo, hi in drawn for task in range(lo, hi)}


class Naive(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = Claims()
        self.now_s = 0.0
        self.claimed: dict[PeerId, set[int]] = {}
        self.heard_s: dict[PeerId, float] = {}
        self.wanted = set(range(TASKS))
        self.own: set[int] = set()
        self.missed = dict.fromkeys(range(TASKS), 0)

    @rule(peer=st.sampled_from([A, B]), drawn=ranges)
    def claim(self, peer: PeerId, drawn: list[tuple[int, int]]) -> None:
        self.real.claim(peer, {0: to_ranges(drawn)}, self.now_s)
        self.claimed[peer] = members(to_ranges(drawn))
        self.heard_s[peer] = self.now_s

    @rule(peer=st.sampled_from([A, B]), drawn=ranges)
    def grant(self, peer: PeerId, drawn: list[tuple[int, int]]) -> None:
        self.real.grant(peer, [(0, lo, hi) for lo, hi in to_ranges(drawn)], self.now_s)
        self.claimed.setdefault(peer, set()).update(members(to_ranges(drawn)))
        self.heard_s[peer] = self.now_s

    @rule(peer=st.sampled_from([A, B]))
    def lose(self, peer: PeerId) -> None:
        self.real.lose(peer)
        self.claimed.pop(peer, None)
        self.heard_s.pop(peer, None)

    @rule(task=st.integers(0, TASKS - 1))
    def settle(self, task: int) -> None:
        self.wanted.discard(task)
        self.real.settle(0, task, task + 1)
        for held in self.claimed.values():
            held.discard(task)

    @rule(drawn=ranges)
    def hold(self, drawn: list[tuple[int, int]]) -> None:
        self.own = members(to_ranges(drawn))

    @rule(step_s=st.sampled_from([BEAT, BEAT, BEAT, 2.0]))
    def sweep(self, step_s: float) -> None:
        self.now_s += step_s
        for peer in [peer for peer, heard_s in self.heard_s.items() if self.now_s - heard_s > limits.LEASE_S]:
            del self.heard_s[peer], self.claimed[peer]
        missing = RangeSet((task, task + 1) for task in self.wanted)
        own = RangeSet((task, task + 1) for task in self.own)
        got = self.real.sweep({0: list(missing)} if missing else {}, {0: own}, self.now_s)
        claimed = self.own.union(*self.claimed.values())
        expected = set()
        for task in range(TASKS):
            self.missed[task] = self.missed[task] + 1 if task in self.wanted and task not in claimed else 0
            if self.missed[task] == limits.CLAIM_MISSED_MAX:
                self.missed[task] = 0
                expected.add(task)
        assert members([(lo, hi) for _, lo, hi in got]) == expected

    @invariant()
    def same(self) -> None:
        assert set(self.real.peers()) == set(self.heard_s)
        for peer in (A, B):
            assert set(self.real.held(peer, 0).indexes()) == self.claimed.get(peer, set())


TestNaive = Naive.TestCase
TestNaive.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_many_claimants_are_heard_less_often_and_kept_longer() -> None:
    claims = Claims()
    peers = [PeerId(number.to_bytes(20, "big")) for number in range(4 * limits.CLAIMANTS_MAX)]
    assert claims.pace() == limits.HEARTBEAT_S
    for peer in peers:
        claims.claim(peer, {0: [(0, 1)]}, 100.0)
    assert claims.pace() == 4 * limits.HEARTBEAT_S
    assert len(peers) / claims.interval_s <= limits.CLAIMANTS_MAX / limits.HEARTBEAT_S  # the leader's load stays
    claims.sweep({}, {}, 100.0 + 1.5 * limits.LEASE_S)
    assert len(claims.peers()) == len(peers)
    claims.sweep({}, {}, 100.0 + 4 * limits.LEASE_S + 0.1)
    assert claims.peers() == []
    assert claims.pace() == 4 * limits.HEARTBEAT_S  # whoever comes back may not have been told otherwise
