"""Members that enlisted empty are brought up by the appointed leader; a branch begins with entries nobody had committed."""

from __future__ import annotations

import random

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_log import Durable
from grid.core.raft_messages import RequestVote, config_of
from tests.raft.cluster import Box, Cluster
from tests.raft.world import node


def founded_by_one(payloads: tuple[bytes, ...] = ()) -> Cluster:
    """n1 founds; n2 and n3 have empty journals."""
    cluster = Cluster()
    for n in (2, 3):
        raft, effects = Raft.restart(node(n), Durable(), random.Random(n), 0.0)
        cluster.boxes[node(n)] = Box(raft)
        cluster.carry_out(node(n), effects)
    config = config_of(node(n) for n in (1, 2, 3))
    raft, effects = Raft.found(node(1), config, node(1), random.Random(1), 0.0, b"state", payloads=payloads)
    cluster.boxes[node(1)] = Box(raft)
    cluster.carry_out(node(1), effects)
    return cluster


def test_empty_members_get_the_founding_from_the_leader() -> None:
    cluster = founded_by_one()
    cluster.advance(0.5)
    assert cluster[1].role is Role.LEADER
    for n in (2, 3):
        assert cluster[n].log.snapshot.data == b"state"
        assert cluster[n].commit == cluster[1].commit == 2


def test_an_empty_member_never_stands() -> None:
    cluster = founded_by_one()
    cluster.crash(node(1))
    cluster.drop()
    cluster.advance(30)
    assert cluster[2].term == cluster[3].term == 0


def test_nobody_else_can_be_elected_in_the_first_term() -> None:
    cluster = founded_by_one()
    cluster.advance(0.5)
    cluster.crash(node(1))
    cluster.advance(10)
    assert {cluster[2].role, cluster[3].role} == {Role.LEADER, Role.FOLLOWER}
    assert cluster[2].term > 1
    assert cluster.checker is not None
    assert cluster.checker.leaders[1] == node(1)


def test_a_member_that_is_still_empty_helps_no_stale_candidate() -> None:
    cluster = founded_by_one()
    cluster.stabilize(1, 2)
    cluster.propose(1, b"a")
    cluster.stabilize(1, 2)
    assert cluster[1].commit == 3
    effects = cluster.receive(2, 3, RequestVote(2, 0, 0))
    assert not any(isinstance(effect, fx.Send) and getattr(effect.message, "granted", False) for effect in effects)


def test_entries_of_the_founding_are_committed_with_the_leaders_first_own() -> None:
    cluster = founded_by_one((b"a", b"b"))
    assert cluster[1].commit == 1
    cluster.advance(0.5)
    for n in (1, 2, 3):
        assert [entry.data for entry in cluster.boxes[node(n)].applied] == [b"a", b"b", b""]
        assert cluster.terms(n) == [1, 1, 1, 1]
