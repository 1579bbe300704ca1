"""Sections 3.10 and 6.2: handing over, and stepping down when no majority is heard."""

from __future__ import annotations

import math

from grid.core import raft_effects as fx
from grid.core.raft_base import Role
from grid.core.raft_messages import AppendReply, RequestVote, TimeoutNow
from tests.raft.cluster import Cluster
from tests.raft.test_elections import sent
from tests.raft.test_membership import refused
from tests.raft.test_replication import led
from tests.raft.world import node


def transfer(cluster: Cluster, n: int, target: int | None) -> list[fx.Effect]:
    return cluster.handle(node(n), fx.Transfer(node(target) if target else None))


def test_handing_over_refuses_proposals() -> None:
    """"The prior leader stops accepting new client requests" (3.10)."""
    cluster = led()
    transfer(cluster, 1, 2)
    assert refused(cluster.propose(1, b"x")) is fx.Why.TRANSFERRING
    assert refused(cluster.change(1, [node(1), node(2)])) is fx.Why.TRANSFERRING


def test_target_gets_the_whole_log_first() -> None:
    """"The prior leader fully updates the target server's log to match its own" (3.10)."""
    cluster = led()
    cluster.propose(1, b"x")
    cluster.drop(lambda packet: packet.to == node(2))
    assert not sent(transfer(cluster, 1, 2), TimeoutNow)
    cluster.advance(0.3)
    assert cluster[2].role is Role.LEADER
    assert cluster.terms(2) == [1, 1, 1, 2]


def test_target_stands_at_once_and_asks_nobody_first() -> None:
    """TimeoutNow "has the same effect as the target server's election timer firing" (3.10)."""
    cluster = led()
    transfer(cluster, 1, 2)
    cluster.deliver()
    asked = [packet.message for packet in cluster.wire]
    assert asked == [RequestVote(2, 2, 1, force=True)] * 2
    cluster.stabilize()
    assert cluster[2].role is Role.LEADER
    assert cluster[1].role is Role.FOLLOWER


def test_handing_over_is_given_up_after_an_election_timeout() -> None:
    """"If leadership transfer does not complete after about an election timeout, the prior leader aborts the transfer and
    resumes accepting client requests" (3.10)."""
    cluster = led()
    cluster.crash(node(2))
    transfer(cluster, 1, 2)
    cluster.advance(1.1)
    assert refused(cluster.propose(1, b"x")) is fx.Why.TRANSFERRING
    cluster.advance(0.3)
    assert refused(cluster.propose(1, b"x")) is None


def test_best_follower_is_chosen_when_none_is_named() -> None:
    cluster = led(5)
    cluster.isolate(2, 3, 4)
    cluster.propose(1, b"x")
    cluster.stabilize()
    transfer(cluster, 1, None)
    assert cluster[1].transfer_to == node(5)


def test_nobody_to_hand_over_to() -> None:
    cluster = led(1, learners=1)
    assert refused(transfer(cluster, 1, None)) is fx.Why.NO_TARGET
    assert refused(transfer(cluster, 1, 2)) is fx.Why.NO_TARGET
    assert refused(transfer(led(), 1, 1)) is fx.Why.NO_TARGET
    assert refused(transfer(led(), 2, 3)) is fx.Why.NOT_LEADER
    twice = led()
    twice.crash(node(2))
    transfer(twice, 1, 2)
    assert refused(transfer(twice, 1, 3)) is fx.Why.TRANSFERRING


def test_timeout_now_from_a_stranger_or_an_old_leader_is_ignored() -> None:
    cluster = led()
    assert sent(cluster.receive(2, 3, TimeoutNow(1)), RequestVote) == []
    cluster.crash(node(1))
    cluster.now_s += 3
    cluster.elect(3)
    assert sent(cluster.receive(2, 1, TimeoutNow(1)), RequestVote) == []
    assert cluster[2].term == 2


def test_leader_steps_down_without_a_majority() -> None:
    """"a leader in Raft steps down if an election timeout elapses without a successful round of heartbeats to a majority of
    its cluster" (6.2), and says nothing more."""
    cluster = led(5)
    cluster.isolate(1, 2)
    cluster.advance(1.5)
    assert cluster[1].role is Role.FOLLOWER
    cluster.wire.clear()
    cluster.now_s = cluster[1].election_due_s - 0.01
    assert sent(cluster.tick(1), object) == []


def test_leader_with_a_majority_stays() -> None:
    cluster = led(5)
    cluster.isolate(4, 5)
    cluster.advance(10)
    assert cluster[1].role is Role.LEADER


def test_one_way_cut_does_not_block_an_election() -> None:
    """n1's heartbeats arrive, the answers don't: it must fall silent, or nobody else would ever stand."""
    cluster = led()
    cluster.blocked |= {(node(2), node(1)), (node(3), node(1))}
    cluster.advance(6)
    assert {cluster[2].role, cluster[3].role} == {Role.LEADER, Role.FOLLOWER}
    assert cluster[1].role is not Role.LEADER


def test_sleeper_acts_on_nothing_when_it_wakes() -> None:
    """A process stopped for a minute steps down before it does anything else, whatever wakes it: no timer needs to fire."""
    for event in (fx.Propose((b"x",)), fx.Tick(), fx.Receive(node(2), node(1), AppendReply(1, True, 2))):
        cluster = led()
        cluster.now_s += 60
        effects = cluster.handle(node(1), event)
        assert effects[0] == fx.SteppedDown(1, fx.Why.LOST_QUORUM)
        assert sent(effects, object) == []


def test_lease_counts_from_when_the_question_left() -> None:
    """An answer that took long proves little: quorum_until_s is an election timeout after the answered message was sent."""
    cluster = led()
    cluster.now_s = 0.2
    cluster.tick(1)
    cluster.now_s = 1.0
    cluster.stabilize()
    assert cluster[1].quorum_until_s() == 0.2 + 1.2
    assert cluster[2].quorum_until_s() == -math.inf
    cluster.receive(1, 2, AppendReply(1, True, 2, sent_us=10**15))  # nobody answers from the future
    assert cluster[1].quorum_until_s() == 1.0 + 1.2


def test_lone_voter_never_loses_its_majority() -> None:
    assert Cluster().found(1)[1].quorum_until_s() == math.inf
