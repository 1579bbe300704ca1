"""Section 3.4 (and 9.6, 4.2.3): the sentences that state a rule of elections, each with its test."""

from __future__ import annotations

import math

import pytest

from grid.core import raft_effects as fx
from grid.core.errors import IllegalTransitionError
from grid.core.raft import Raft
from grid.core.raft_base import MOVES, Role
from grid.core.raft_messages import AppendEntries, RequestVote, TimeoutNow, VoteReply, config_of
from tests.raft.cluster import Cluster, Packet
from tests.raft.world import node

FIVE = config_of(node(n) for n in range(1, 6))


def sent(effects: list[fx.Effect], kind: type[object]) -> list[fx.Send]:
    return [effect for effect in effects if isinstance(effect, fx.Send) and isinstance(effect.message, kind)]


def lone(terms: list[int], term: int, members: int = 3, n: int = 1) -> Cluster:
    """One member of a group, with this log, and nobody else."""
    cluster = Cluster(check=False)
    cluster.add_log(node(n), config_of(node(m) for m in range(1, members + 1)), term, terms)
    return cluster


def test_restarted_member_is_follower() -> None:
    """"When servers start up, they begin as followers" (3.4): also who led before."""
    cluster = Cluster().found(3)
    cluster.stabilize()
    cluster.crash(node(1))
    assert cluster.restart(node(1)).role is Role.FOLLOWER
    assert cluster[1].leader is None


def test_follower_stays_while_it_hears_the_leader() -> None:
    """"A server remains in follower state as long as it receives valid RPCs from a leader" (3.4)."""
    cluster = Cluster().found(3)
    cluster.advance(20)
    assert [cluster[n].role for n in (1, 2, 3)] == [Role.LEADER, Role.FOLLOWER, Role.FOLLOWER]
    assert cluster[1].term == 1


def test_leader_sends_heartbeats_to_all() -> None:
    """"Leaders send periodic heartbeats (AppendEntries RPCs that carry no log entries) to all followers" (3.4)."""
    cluster = Cluster().found(5, learners=1)
    cluster.stabilize()
    cluster.now_s += 0.2
    beats = sent(cluster.tick(1), AppendEntries)
    assert [beat.to for beat in beats] == [node(n) for n in range(2, 7)]
    assert all(isinstance(beat.message, AppendEntries) and not beat.message.entries for beat in beats)


def test_election_timeout_starts_an_election() -> None:
    """"If a follower receives no communication over a period of time called the election timeout" it "begins an election"."""
    cluster = lone([1], 1)
    cluster.now_s = cluster[1].election_due_s - 0.001
    assert sent(cluster.tick(1), RequestVote) == []
    asked = sent(cluster.campaign(1), RequestVote)
    assert [send.to for send in asked] == [node(2), node(3)]


def test_election_timeouts_are_random_in_a_fixed_interval() -> None:
    """"election timeouts are chosen randomly from a fixed interval" (3.4), anew for each election."""
    cluster = lone([1], 1)
    spans = []
    for _ in range(200):
        before = cluster.now_s = cluster[1].election_due_s
        cluster.tick(1)
        spans.append(cluster[1].election_due_s - before)
    assert min(spans) >= 1.2
    assert max(spans) < 2.4
    assert max(spans) - min(spans) > 1.0
    assert len(set(spans)) == 200


def test_candidate_increments_term_votes_for_itself_and_asks_all() -> None:
    """"a follower increments its current term and transitions to candidate state. It then votes for itself and issues
    RequestVote RPCs in parallel to each of the other servers" (3.4), its vote on disk first (3.8)."""
    cluster = lone([1, 1], 3, members=5)
    cluster.campaign(1)
    cluster.wire.clear()
    cluster.receive(1, 2, VoteReply(4, True, pre=True))
    assert cluster[1].role is Role.PRE_CANDIDATE
    effects = cluster.receive(1, 3, VoteReply(4, True, pre=True))
    assert (cluster[1].role, cluster[1].term, cluster[1].vote) == (Role.CANDIDATE, 4, node(1))
    assert isinstance(effects[0], fx.Persist)
    assert cluster.disk(1).hard.vote == node(1)
    asked = sent(effects, RequestVote)
    assert [send.to for send in asked] == [node(n) for n in (2, 3, 4, 5)]
    assert {send.message for send in asked} == {RequestVote(4, 2, 1)}


@pytest.mark.parametrize(("voters", "needed"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_majority_of_the_full_cluster_wins(voters: int, needed: int) -> None:
    """"A candidate wins an election if it receives votes from a majority of the servers in the full cluster for the same
    term" (3.4): a vote repeated counts once, a stranger's does not count."""
    cluster = lone([1], 1, members=voters)
    cluster.campaign(1)
    for n in range(2, needed + 2):
        cluster.receive(1, n, VoteReply(2, True, pre=True))
    for n in range(2, needed + 1):
        cluster.receive(1, n, VoteReply(2, True))
        cluster.receive(1, n, VoteReply(2, True))
        cluster.receive(1, 9, VoteReply(2, True))
    if needed:
        assert cluster[1].role is Role.CANDIDATE
        cluster.receive(1, needed + 1, VoteReply(2, True))
    assert cluster[1].role is Role.LEADER


def test_votes_of_another_term_do_not_count() -> None:
    """… "for the same term" (3.4)."""
    cluster = lone([1], 1)
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(2, True, pre=True))
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(3, True, pre=True))
    assert cluster[1].term == 3
    cluster.receive(1, 2, VoteReply(2, True))
    assert cluster[1].role is Role.CANDIDATE


def test_one_vote_a_term_first_come_first_served() -> None:
    """"Each server will vote for at most one candidate in a given term, on a first-come-first-served basis" (3.4)."""
    cluster = lone([1], 1, members=5)
    first = cluster.receive(1, 2, RequestVote(2, 1, 1))
    second = cluster.receive(1, 3, RequestVote(2, 1, 1))
    again = cluster.receive(1, 2, RequestVote(2, 1, 1))
    assert [send.message for send in (first[1], second[0], again[0]) if isinstance(send, fx.Send)] == [
        VoteReply(2, True),
        VoteReply(2, False),
        VoteReply(2, True),
    ]
    cluster.receive(1, 3, RequestVote(3, 1, 1))
    assert cluster[1].vote == node(3)


def test_new_leader_asserts_itself_at_once() -> None:
    """"It then sends heartbeat messages to all of the other servers to establish its authority" (3.4): its no-op."""
    cluster = lone([1], 1)
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(2, True, pre=True))
    effects = cluster.receive(1, 2, VoteReply(2, True))
    assert [send.to for send in sent(effects, AppendEntries)] == [node(2), node(3)]


@pytest.mark.parametrize("term", [2, 3])
def test_candidate_returns_to_follower_for_a_leader_of_its_term_or_later(term: int) -> None:
    """"If the leader's term … is at least as large as the candidate's current term, then the candidate recognizes the leader
    as legitimate and returns to follower state" (3.4)."""
    cluster = lone([1], 1)
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(2, True, pre=True))
    cluster.receive(1, 3, AppendEntries(term, 1, 1, 1))
    assert (cluster[1].role, cluster[1].term, cluster[1].leader) == (Role.FOLLOWER, term, node(3))


def test_candidate_rejects_a_leader_of_an_earlier_term() -> None:
    """"If the term in the RPC is smaller than the candidate's current term, then the candidate rejects the RPC and continues
    in candidate state" (3.4)."""
    cluster = lone([1], 4)
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(5, True, pre=True))
    effects = cluster.receive(1, 3, AppendEntries(4, 1, 1, 1))
    assert cluster[1].role is Role.CANDIDATE
    assert [(send.to, getattr(send.message, "ok", None), send.message.term) for send in effects if isinstance(send, fx.Send)] == [
        (node(3), False, 5)
    ]


def test_split_vote_times_out_into_a_new_term() -> None:
    """"each candidate will time out and start a new election by incrementing its term" (3.4)."""
    cluster = lone([1], 1, members=4)
    cluster.campaign(1)
    cluster.receive(1, 2, VoteReply(2, True, pre=True))
    cluster.receive(1, 3, VoteReply(2, True, pre=True))
    cluster.receive(1, 2, VoteReply(2, True))
    cluster.campaign(1)
    assert (cluster[1].role, cluster[1].term) == (Role.PRE_CANDIDATE, 2)
    cluster.receive(1, 2, VoteReply(3, True, pre=True))
    cluster.receive(1, 3, VoteReply(3, True, pre=True))
    assert (cluster[1].role, cluster[1].term) == (Role.CANDIDATE, 3)


def test_denied_by_a_majority_returns_to_follower() -> None:
    cluster = lone([1], 1)
    cluster.campaign(1)
    roles = []
    for n in (2, 3):
        cluster.receive(1, n, VoteReply(1, False, pre=True))
        roles.append(cluster[1].role)
    assert roles == [Role.PRE_CANDIDATE, Role.FOLLOWER]


def test_pre_candidate_keeps_its_term() -> None:
    """"a candidate only increments its term if it first learns from a majority of the cluster that they would be willing to
    grant the candidate their votes" (9.6)."""
    cluster = lone([1], 7)
    for _ in range(5):
        cluster.campaign(1)
    assert cluster[1].term == 7
    assert cluster.disk(1).hard.term == 7


def test_pre_vote_is_no_vote() -> None:
    """Granting it changes neither term nor vote, nor the voter's election timer; so several may be granted."""
    cluster = lone([1], 1)
    due_s = cluster[1].election_due_s
    effects = cluster.receive(1, 2, RequestVote(2, 1, 1, pre=True)) + cluster.receive(1, 3, RequestVote(5, 1, 1, pre=True))
    assert [send.message for send in effects if isinstance(send, fx.Send)] == [VoteReply(2, True, True), VoteReply(5, True, True)]
    assert not any(isinstance(effect, fx.Persist) for effect in effects)
    assert (cluster[1].term, cluster[1].vote, cluster[1].election_due_s) == (1, None, due_s)


@pytest.mark.parametrize(
    ("last_index", "last_term", "fine"), [(3, 2, True), (4, 2, True), (1, 3, True), (2, 2, False), (9, 1, False)]
)
@pytest.mark.parametrize("pre", [False, True])
def test_vote_only_for_a_log_at_least_as_up_to_date(last_index: int, last_term: int, fine: bool, pre: bool) -> None:
    """"the voter denies its vote if its own log is more up-to-date than that of the candidate": "the log with the later
    term is more up-to-date"; of the same term "whichever log is longer" (3.6.1). The voter's ends with 3/2."""
    cluster = lone([1, 1, 2], 2)
    effects = cluster.receive(1, 2, RequestVote(9, last_index, last_term, pre))
    (reply,) = sent(effects, VoteReply)
    assert isinstance(reply.message, VoteReply)
    assert reply.message.granted is fine


@pytest.mark.parametrize("pre", [False, True])
def test_no_vote_while_a_leader_is_heard(pre: bool) -> None:
    """"if a server receives a RequestVote request within the minimum election timeout of hearing from a current leader, it
    does not update its term or grant its vote" (4.2.3); for pre-votes, (9.6)."""
    cluster = lone([1], 1)
    cluster.receive(1, 2, AppendEntries(1, 1, 1, 1))
    cluster.now_s += 1.19
    effects = cluster.receive(1, 3, RequestVote(2, 5, 1, pre))
    assert not any(isinstance(send.message, VoteReply) and send.message.granted for send in effects if isinstance(send, fx.Send))
    assert (cluster[1].term, cluster[1].leader) == (1, node(2))
    cluster.now_s += 0.02
    effects = cluster.receive(1, 3, RequestVote(2, 5, 1, pre))
    assert any(isinstance(send.message, VoteReply) and send.message.granted for send in effects if isinstance(send, fx.Send))


def test_leader_itself_ignores_candidates_while_it_is_heard() -> None:
    cluster = Cluster().found(3)
    cluster.stabilize()
    assert cluster.receive(1, 3, RequestVote(9, 9, 8)) == []
    assert (cluster[1].role, cluster[1].term) == (Role.LEADER, 1)


def test_forced_request_is_heard_beside_a_leader() -> None:
    """"Those RequestVote requests can include a special flag": "I have permission to disrupt the leader" (4.2.3)."""
    cluster = Cluster(check=False).found(3)
    cluster.stabilize()
    cluster.receive(1, 3, RequestVote(2, 9, 1, force=True))
    assert (cluster[1].role, cluster[1].term, cluster[1].vote) == (Role.FOLLOWER, 2, node(3))


def test_partitioned_member_does_not_disturb_when_it_is_back() -> None:
    """"when it rejoins the cluster, it still won't be able to increment its term, since the other servers will have been
    receiving regular heartbeats" (9.6)."""
    cluster = Cluster().found(3)
    cluster.stabilize()
    cluster.isolate(3)
    cluster.advance(30)
    cluster.blocked.clear()
    cluster.campaign(3)
    cluster.tick(1)
    cluster.stabilize()
    assert (cluster[1].role, cluster[1].term, cluster[3].leader) == (Role.LEADER, 1, node(1))


def test_learner_never_stands() -> None:
    """A non-voting member "is not yet counted towards majorities for voting or commitment purposes" (4.2.1)."""
    cluster = Cluster().found(2, learners=1)
    cluster.stabilize()
    cluster.isolate(3)
    cluster.advance(30)
    assert cluster[3].role is Role.FOLLOWER
    assert [wake.time_s for wake in cluster.boxes[node(3)].effects if isinstance(wake, fx.WakeAt)] in ([], [math.inf])
    assert cluster.receive(3, 1, TimeoutNow(1)) == []


def test_appointed_leader_leads_term_1_and_never_again_without_election() -> None:
    """The founding is the election of term 1; who restarts is elected like others."""
    cluster = Cluster().found(3)
    assert cluster[1].role is Role.LEADER
    assert all(cluster.disk(n).hard.vote == node(1) for n in (1, 2, 3))
    assert all(cluster.disk(n).hard.term == 1 for n in (1, 2, 3))
    cluster.crash(node(1))
    cluster.drop()
    cluster.restart(node(1))
    cluster.elect(1)
    assert cluster[1].term == 2


def test_founding_needs_a_leader_that_votes() -> None:
    with pytest.raises(ValueError, match="founded"):
        Cluster().found(3, leader=4)


def test_transitions_outside_the_table_raise() -> None:
    for start in Role:
        for end in Role:
            raft = lone([1], 1)[1]
            raft.role = start
            if (start, end) in MOVES:
                raft._move(end)
                assert raft.role is end
            else:
                with pytest.raises(IllegalTransitionError):
                    raft._move(end)


def test_lone_voter_needs_nobody() -> None:
    cluster = Cluster().found(1)
    cluster.propose(1, b"x")
    assert cluster[1].commit == 3
    cluster.crash(node(1))
    cluster.restart(node(1))
    cluster.tick(1)
    assert cluster[1].role is Role.LEADER
    assert [entry.data for entry in cluster.boxes[node(1)].applied if entry.data] == [b"x"]


def test_message_for_another_incarnation_is_not_heard() -> None:
    cluster = lone([1], 1)
    raft = cluster[1]
    assert isinstance(raft, Raft)
    assert raft.handle(fx.Receive(node(2), node(1, 1), AppendEntries(5, 1, 1, 1)), 0.0) == []
    assert raft.handle(fx.Receive(node(1), node(1), AppendEntries(5, 1, 1, 1)), 0.0) == []
    assert raft.term == 1


def test_late_prevote_answers_do_not_count_for_an_election() -> None:
    cluster = Cluster().found(3)
    cluster.stabilize()
    cluster.crash(node(1))
    cluster.campaign(2)
    cluster.deliver(lambda packet: packet.sender == node(2))
    answers = [packet for packet in cluster.wire if isinstance(packet.message, VoteReply)]
    cluster.deliver()
    cluster.wire.extend(answers)
    cluster.deliver(lambda packet: isinstance(packet.message, VoteReply) and packet.message.pre)
    assert cluster[2].role is Role.CANDIDATE
    assert isinstance(cluster.wire[0], Packet)
