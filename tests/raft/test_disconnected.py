"""A connection to the leader that broke hastens an election, and only that: the rules of voting stay as they are."""

from __future__ import annotations

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_limits import DOUBT_S, ELECTION_S
from grid.core.raft_messages import AppendEntries, RequestVote
from tests.raft.cluster import Cluster
from tests.raft.material import Chaos
from tests.raft.world import World, node


def led() -> Cluster:
    cluster = Cluster().found(3)
    cluster.stabilize()
    cluster.advance(0.5)
    return cluster


def disconnect(cluster: Cluster, n: int, other: int) -> None:
    cluster.handle(node(n), fx.Disconnected(node(other)))


def test_followers_that_lost_the_leader_elect_another_long_before_the_timeout() -> None:
    cluster = led()
    cluster.crash(node(1))
    disconnect(cluster, 2, 1)
    disconnect(cluster, 3, 1)
    assert cluster[2].election_due_s <= cluster.now_s + DOUBT_S
    cluster.elect(2, 2, 3)
    assert cluster.now_s < 0.5 + ELECTION_S
    assert cluster[2].term == 2


def test_one_broken_connection_does_not_disturb_a_leader_that_others_hear() -> None:
    cluster = led()
    disconnect(cluster, 2, 1)
    cluster.campaign(2)
    assert cluster[2].role is Role.PRE_CANDIDATE
    cluster.stabilize()
    assert cluster[1].role is Role.LEADER
    assert cluster[2].term == cluster[3].term == 1
    cluster.advance(0.5)
    assert cluster[2].leader == node(1)


def test_the_leader_heard_again_ends_the_doubt() -> None:
    cluster = led()
    disconnect(cluster, 2, 1)
    assert cluster[2].doubts_leader
    last = cluster[1].log.last_index
    cluster.receive(2, 1, AppendEntries(1, last, 1, last))
    assert not cluster[2].doubts_leader
    assert cluster[2].election_due_s >= cluster.now_s + ELECTION_S
    cluster.receive(2, 3, RequestVote(2, last, 1))
    assert cluster[2].term == 1
    assert cluster[2].vote == node(1)


def test_the_connection_of_another_member_means_nothing() -> None:
    cluster = led()
    due_s = cluster[2].election_due_s
    disconnect(cluster, 2, 3)
    assert cluster[2].election_due_s == due_s
    assert not cluster[2].doubts_leader


def test_a_member_that_voted_does_not_vote_again_because_a_connection_broke() -> None:
    cluster = led()
    cluster.now_s += 3 * ELECTION_S
    last = cluster[2].log.last_index
    cluster.receive(2, 3, RequestVote(2, last, 1))
    assert cluster[2].vote == node(3)
    disconnect(cluster, 2, 1)
    cluster.receive(2, 1, RequestVote(2, last, 1))
    assert cluster[2].vote == node(3)


class Nervous(World):
    """Members lose connections all the time, for no reason."""

    def disturb(self) -> None:
        super().disturb()
        if self.rng.random() < 0.05 and (alive := self.alive()):
            self.handle(self.rng.choice(alive), fx.Disconnected(node(self.rng.randrange(1, 6))))


def test_safety_holds_when_connections_break_at_random() -> None:
    terms = 0
    for seed in range(20):
        world = Nervous(seed, 5, Chaos(), Raft)
        world.run(1500)
        world.finish()
        terms = max(terms, *world.checker.leaders)
    assert terms > 5
