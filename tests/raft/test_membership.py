"""Chapter 4: changes of members, each rule with its test."""

from __future__ import annotations

import pytest

from grid.core import raft_effects as fx
from grid.core import raft_limits as limits
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_check import Violation
from grid.core.raft_messages import AppendEntries, Config, Entry, Kind, NodeId, RequestVote, config_of, encode
from tests.raft.cluster import Cluster
from tests.raft.planted import ChangesBeforeNoop
from tests.raft.test_elections import sent
from tests.raft.test_replication import led
from tests.raft.world import node


def ids(*numbers: int) -> list[NodeId]:
    return [node(n) for n in numbers]


def refused(effects: list[fx.Effect]) -> fx.Why | None:
    return next((effect.why for effect in effects if isinstance(effect, fx.Refused)), None)


def with_newcomer(n: int = 4) -> Cluster:
    """A group of three with n4 as a caught-up learner."""
    cluster = led()
    cluster.add(node(n))
    cluster.change(1, ids(1, 2, 3), ids(n))
    cluster.stabilize()
    cluster.advance(0.4)
    return cluster


def test_configuration_takes_effect_when_it_is_appended() -> None:
    """"The new configuration takes effect on each server as soon as it is added to that server's log" (4.1)."""
    cluster = led()
    cluster.change(1, ids(1, 2))
    assert cluster[1].log.config.voters == tuple(ids(1, 2))
    assert cluster[2].log.config.voters == tuple(ids(1, 2, 3))
    cluster.stabilize()
    assert cluster[2].log.config.voters == tuple(ids(1, 2))


def test_new_majority_commits_the_change() -> None:
    """"a majority of the new configuration is used to determine the C_new entry's commitment" (4.1)."""
    cluster = with_newcomer()
    cluster.change(1, ids(1, 2, 3, 4))
    index = cluster[1].log.last_index
    cluster.deliver(lambda packet: packet.to == node(2))
    cluster.deliver(lambda packet: packet.sender == node(2))
    assert cluster[1].commit == index - 1  # two of three would do, two of four don't
    cluster.deliver(lambda packet: packet.to == node(4))
    cluster.deliver(lambda packet: packet.sender == node(4))
    assert cluster[1].commit == index


def test_only_one_voter_at_a_time() -> None:
    """"only one server can be added or removed from the cluster at a time" (4.1)."""
    cluster = led(5)
    for voters in (ids(1, 2, 3), ids(3), ids(1, 2, 3, 6), ids(2, 3, 4, 6, 7)):
        assert refused(cluster.change(1, voters)) is fx.Why.ONE_AT_A_TIME
    assert refused(cluster.change(1, ids(1, 2, 3, 4), [])) is None


def test_next_change_waits_for_the_last() -> None:
    """"not beginning a new change until the previous change's entry has committed" (4.1)."""
    cluster = led(5)
    assert refused(cluster.change(1, ids(1, 2, 3, 4))) is None
    assert refused(cluster.change(1, ids(1, 2, 3))) is fx.Why.CHANGE_PENDING
    cluster.stabilize()
    assert refused(cluster.change(1, ids(1, 2, 3))) is None


def test_no_change_before_an_own_entry_is_committed() -> None:
    """The correction of July 2015: a leader must not append C_new until it has committed an entry of its own term."""
    cluster = led(5)
    cluster.crash(node(1))
    cluster.now_s += 3
    cluster.campaign(2)
    cluster.deliver()
    cluster.deliver()
    cluster.deliver()
    cluster.deliver()
    assert cluster[2].role is Role.LEADER
    assert refused(cluster.change(2, ids(2, 3, 4, 5))) is fx.Why.NO_OWN_COMMIT
    cluster.stabilize()
    assert refused(cluster.change(2, ids(2, 3, 4, 5))) is None


def test_falls_back_when_the_change_is_cut() -> None:
    """"a server must be prepared to fall back to the previous configuration in its log" (4.1)."""
    cluster = led(3)
    cluster.isolate(1)
    cluster.change(1, ids(1, 2))
    cluster.advance(5)
    leader = next(n for n in (2, 3) if cluster[n].role is Role.LEADER)
    assert cluster[leader].log.config.voters == tuple(ids(1, 2, 3))
    assert cluster[1].log.config.voters == tuple(ids(1, 2))
    cluster.blocked.clear()
    cluster.advance(1)
    assert cluster[1].log.config.voters == tuple(ids(1, 2, 3))


def test_entries_are_taken_from_a_leader_outside_the_configuration() -> None:
    """"A server accepts AppendEntries requests from a leader that is not part of the server's latest configuration" (4.1)."""
    cluster = Cluster(check=False)
    cluster.add(node(9))
    cluster.receive(9, 1, AppendEntries(3, 0, 0, 0, (Entry(1, 1, Kind.CONFIG, encode(config_of(ids(1, 2)))),)))
    assert cluster[9].leader == node(1)
    assert cluster[9].log.config.voters == tuple(ids(1, 2))


def test_vote_for_a_candidate_outside_the_configuration() -> None:
    """"A server also grants its vote to a candidate that is not part of the server's latest configuration" (4.1); and who is
    no voter by its own configuration votes when asked, for the candidate knows better."""
    cluster = led(2, learners=1)
    cluster.now_s += 3
    for voter in (2, 3):
        (effect,) = sent(cluster.receive(voter, 8, RequestVote(5, 9, 4)), object)
        assert effect.message.term == 5
        assert getattr(effect.message, "granted", False)


def test_newcomer_gets_the_log_before_it_counts() -> None:
    """"a new server joins the cluster as a non-voting member" (4.2.1); who has not caught up is not made a voter."""
    cluster = led()
    cluster.add(node(4))
    assert refused(cluster.change(1, ids(1, 2, 3, 4))) is fx.Why.NOT_CAUGHT_UP
    cluster.change(1, ids(1, 2, 3), ids(4))
    cluster.stabilize()
    assert cluster[1].log.config.quorum == 2
    cluster.advance(0.4)
    assert cluster.terms(4)[1:] == cluster.terms(1)[1:]
    assert refused(cluster.change(1, ids(1, 2, 3, 4))) is None


def test_learner_that_lags_or_is_gone_is_not_made_a_voter() -> None:
    """"The leader should also abort the change if the new server is unavailable or is so slow that it will never catch up"."""
    cluster = with_newcomer()
    cluster.crash(node(4))
    cluster.propose(1, *[b"x"] * (limits.CATCH_UP_ENTRIES_MAX + 1))
    cluster.stabilize()
    assert refused(cluster.change(1, ids(1, 2, 3, 4))) is fx.Why.NOT_CAUGHT_UP
    cluster.restart(node(4))
    cluster.advance(0.4)
    assert cluster[1].caught_up(node(4))
    cluster.crash(node(4))
    cluster.advance(1.4)
    assert refused(cluster.change(1, ids(1, 2, 3, 4))) is fx.Why.NOT_CAUGHT_UP


def test_removed_leader_steps_down_when_its_removal_is_committed() -> None:
    """"a leader that is removed from the configuration steps down once the C_new entry is committed" (4.2.2)."""
    cluster = led()
    cluster.change(1, ids(2, 3))
    roles = []
    for n in (2, 3):
        cluster.stabilize(1, n)
        roles.append(cluster[1].role)
    assert roles == [Role.LEADER, Role.FOLLOWER]
    cluster.advance(4)
    assert {cluster[2].role, cluster[3].role} == {Role.LEADER, Role.FOLLOWER}


def test_removed_leader_does_not_count_itself() -> None:
    """"it replicates log entries but does not count itself in majorities" (4.2.2)."""
    cluster = led()
    cluster.change(1, ids(2, 3))
    cluster.deliver()
    effects = [packet for packet in cluster.wire if packet.sender == node(2)]
    cluster.deliver(lambda packet: packet in effects)
    assert cluster[1].commit == 2  # n1 and n2 have it: one of two


def test_removed_member_may_be_needed_to_lead() -> None:
    """"a server that is not part of its own latest configuration should still start new elections" (4.2.2, figure 4.7)."""
    cluster = led(2)
    cluster.change(1, ids(2))
    cluster.drop()
    cluster.crash(node(1))
    cluster.restart(node(1))
    cluster.advance(8)
    assert cluster[2].role is Role.LEADER
    assert cluster[2].log.config.voters == (node(2),)
    assert cluster[1].role is Role.FOLLOWER


def test_removed_member_does_not_disturb() -> None:
    """"while a leader is able to get heartbeats to its cluster, it will not be deposed by larger term numbers" (4.2.3)."""
    cluster = led(4)
    cluster.isolate(4)
    cluster.change(1, ids(1, 2, 3))
    cluster.stabilize()
    cluster.blocked.clear()
    cluster.advance(20)
    assert (cluster[1].role, cluster[1].term) == (Role.LEADER, 1)


def test_lost_journal_comes_back_as_another_incarnation() -> None:
    """"If a server loses any of its persistent state, it cannot safely rejoin the cluster with its prior identity" (3.8)."""
    cluster = led()
    cluster.propose(1, b"x")
    cluster.stabilize()
    cluster.crash(node(3))
    fresh = node(3, 1)
    cluster.add(fresh)
    cluster.change(1, ids(1, 2), [fresh])
    cluster.stabilize()
    cluster.advance(0.4)
    raft = cluster.boxes[fresh].raft
    assert raft is not None
    assert raft.log.last_index == cluster[1].log.last_index
    assert refused(cluster.change(1, [*ids(1, 2), fresh])) is None
    cluster.stabilize()
    cluster.crash(node(1))
    cluster.advance(5)
    assert cluster[2].role is Role.LEADER or raft.role is Role.LEADER


def test_one_incarnation_of_a_peer_at_a_time() -> None:
    cluster = led()
    both = Config(tuple(sorted(ids(1, 2, 3))), (node(3, 1),))
    assert refused(cluster.handle(node(1), fx.Change(both))) is fx.Why.BAD_CONFIG


@pytest.mark.parametrize("config", [Config(), Config((node(2), node(1))), Config((node(1),), (node(1),))])
def test_bad_configurations_are_refused(config: Config) -> None:
    cluster = led()
    assert refused(cluster.handle(node(1), fx.Change(config))) is fx.Why.BAD_CONFIG


def test_no_change_is_refused() -> None:
    cluster = led()
    assert refused(cluster.change(1, ids(1, 2, 3))) is fx.Why.NO_CHANGE
    assert refused(cluster.change(2, ids(1, 2))) is fx.Why.NOT_LEADER


def test_group_shrinks_to_one_and_grows_again() -> None:
    cluster = led()
    for voters in (ids(1, 2), ids(1)):
        cluster.change(1, voters)
        cluster.stabilize()
    cluster.crash(node(2))
    cluster.propose(1, b"alone")
    assert cluster[1].commit == cluster[1].log.last_index
    cluster.change(1, ids(1), ids(3))
    cluster.advance(0.6)
    assert refused(cluster.change(1, ids(1, 3))) is None
    cluster.stabilize()
    assert cluster[1].commit == cluster[3].log.last_index


def overlapping_changes(kind: type[Raft]) -> tuple[Cluster, fx.Why | None]:
    """The schedule of the correction. n1 adds n5, which only n1 and n5 hear of; n2, elected by the old four, removes n1, which
    only n3 hears of; then n1 stands with n4 and n5, a majority of its five."""
    cluster = Cluster(kind=kind).found(4, learners=1)
    cluster.stabilize()
    cluster.isolate(1, 5)
    cluster.change(1, ids(1, 2, 3, 4, 5))
    cluster.stabilize()
    cluster.now_s += 3
    cluster.campaign(2)
    for _ in range(4):
        cluster.deliver()
    assert cluster[2].role is Role.LEADER
    why = refused(cluster.change(2, ids(2, 3, 4)))
    cluster.drop(lambda packet: packet.to == node(4))
    cluster.stabilize(2, 3)
    cluster.drop()
    cluster.blocked.clear()
    cluster.isolate(2, 3)
    cluster.now_s += 3
    cluster.tick(1)
    while cluster[1].role is not Role.LEADER:
        cluster.campaign(1)
        cluster.stabilize()
    return cluster, why


def test_overlapping_changes_are_prevented() -> None:
    cluster, why = overlapping_changes(Raft)
    assert why is fx.Why.NO_OWN_COMMIT
    assert cluster[1].role is Role.LEADER
    assert cluster[2].commit == 1  # nothing it has was committed, so nothing is lost


def test_overlapping_changes_lose_committed_entries_without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: two majorities that don't meet, and the checker sees what it costs."""
    with pytest.raises(Violation, match="members change before"):
        overlapping_changes(ChangesBeforeNoop)
    monkeypatch.setattr(Cluster, "rules", False)
    with pytest.raises(Violation, match="Leader Completeness"):
        overlapping_changes(ChangesBeforeNoop)
