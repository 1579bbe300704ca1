"""Sections 3.3, 3.5, 3.7 and 10.2: the rules of terms and of log replication, each with its test."""

from __future__ import annotations

import pytest

from grid.core import raft_effects as fx
from grid.core import raft_limits as limits
from grid.core.raft_base import Role
from grid.core.raft_log import InvariantError
from grid.core.raft_messages import AppendEntries, AppendReply, Entry, Kind, RequestVote, TimeoutNow, config_of
from tests.raft.cluster import Cluster
from tests.raft.test_elections import lone, sent
from tests.raft.world import node


def led(voters: int = 3, learners: int = 0, check: bool = True) -> Cluster:
    """A group that n1 leads, at rest. check=False: where the test makes up answers that no disk stands for."""
    cluster = Cluster(check=check).found(voters, learners=learners)
    cluster.stabilize()
    return cluster


def data(index: int, term: int) -> Entry:
    return Entry(index, term, Kind.DATA, b"%d/%d" % (index, term))


# ---- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [AppendEntries(5, 1, 1, 1), RequestVote(5, 1, 1), AppendReply(5, False, 1), TimeoutNow(5)])
def test_larger_term_is_adopted(message: AppendEntries) -> None:
    """"if one server's current term is smaller than the other's, then it updates its current term to the larger value"
    (3.3), on disk before it answers."""
    cluster = lone([1], 1)
    cluster.receive(1, 2, message)
    assert cluster[1].term == 5
    assert cluster.disk(1).hard.term == 5


def test_stale_leader_reverts_to_follower() -> None:
    """"If a candidate or leader discovers that its term is out of date, it immediately reverts to follower state" (3.3)."""
    cluster = led()
    effects = cluster.receive(1, 2, AppendReply(3, False, 2))
    assert cluster[1].role is Role.FOLLOWER
    assert fx.SteppedDown(1, fx.Why.HIGHER_TERM) in effects


def test_stale_requests_are_rejected() -> None:
    """"If a server receives a request with a stale term number, it rejects the request" (3.3), and tells its term."""
    cluster = lone([1], 9)
    for request in (AppendEntries(8, 1, 1, 1), RequestVote(8, 9, 7), RequestVote(8, 9, 7, pre=True)):
        (effect,) = cluster.receive(1, 2, request)
        assert isinstance(effect, fx.Send)
        assert effect.message.term == 9
        assert not getattr(effect.message, "ok", False)
        assert not getattr(effect.message, "granted", False)
    assert cluster[1].leader is None


def test_two_leaders_of_one_term_are_noticed() -> None:
    """Election Safety broken by somebody: this member must not go on."""
    cluster = led()
    with pytest.raises(InvariantError, match="leads term 1 too"):
        cluster[1].handle(fx.Receive(node(2), node(1), AppendEntries(1, 1, 1, 1)), 0.0)


# ---- appending -------------------------------------------------------------------------------------------------------


def test_leader_appends_then_replicates_to_all() -> None:
    """"The leader appends the command to its log as a new entry, then issues AppendEntries RPCs in parallel" (3.5)."""
    cluster = led(5)
    effects = cluster.propose(1, b"x", b"y")
    assert effects[0] == fx.Proposed(1, 3, 4)
    appends = sent(effects, AppendEntries)
    assert [send.to for send in appends] == [node(n) for n in (2, 3, 4, 5)]
    assert {send.message.entries for send in appends if isinstance(send.message, AppendEntries)} == {
        (Entry(3, 1, Kind.DATA, b"x"), Entry(4, 1, Kind.DATA, b"y"))
    }


def test_own_disk_is_written_in_parallel() -> None:
    """"the leader can write to its disk in parallel with replicating to the followers" (10.2.1): entries leave first, and a
    lone voter's commitment comes after its write."""
    cluster = led(2)
    kinds = [type(effect) for effect in cluster.propose(1, b"x")]
    assert kinds.index(fx.Send) < kinds.index(fx.Persist)
    alone = Cluster().found(1)
    kinds = [type(effect) for effect in alone.propose(1, b"x")]
    assert kinds.index(fx.Persist) < kinds.index(fx.Commit)


def test_entry_is_committed_once_on_a_majority() -> None:
    """"A log entry is committed once the leader that created the entry has replicated it on a majority of the servers" (3.5)."""
    cluster = led(5, check=False)
    cluster.propose(1, b"x")
    cluster.wire.clear()
    cluster.receive(1, 2, AppendReply(1, True, 3))
    assert cluster[1].commit == 2
    assert fx.Commit((Entry(3, 1, Kind.DATA, b"x"),)) in cluster.receive(1, 3, AppendReply(1, True, 3))


def test_learners_do_not_count() -> None:
    cluster = led(3, learners=2, check=False)
    cluster.propose(1, b"x")
    cluster.wire.clear()
    for n in (4, 5, 4, 9):
        cluster.receive(1, n, AppendReply(1, True, 3))
    assert cluster[1].commit == 2
    cluster.receive(1, 2, AppendReply(1, True, 3))
    assert cluster[1].commit == 3


def test_commit_index_travels_with_heartbeats() -> None:
    """"it includes that index in future AppendEntries RPCs (including heartbeats) so that the other servers eventually find
    out" (3.5), and they apply "in log order"."""
    cluster = led()
    cluster.propose(1, b"x", b"y")
    cluster.stabilize()
    assert cluster[2].commit == 2
    cluster.advance(0.2)
    assert [entry.index for entry in cluster.boxes[node(2)].applied] == [2, 3, 4]


def test_follower_commits_no_further_than_it_matches() -> None:
    """min(leaderCommit, index of last new entry) (figure 3.1): a heartbeat vouches for nothing after its prev_index."""
    cluster = lone([1, 1, 1], 1)
    cluster.receive(1, 2, AppendEntries(2, 2, 1, 3))
    assert cluster[1].commit == 2


def test_leader_retries_until_all_store_all() -> None:
    """"if network packets are lost, the leader retries AppendEntries RPCs indefinitely" (3.5)."""
    cluster = led()
    cluster.propose(1, b"x")
    cluster.drop()
    for _ in range(3):
        cluster.now_s += 0.2
        cluster.tick(1)
        cluster.drop()
        cluster.receive(1, 2, AppendReply(1, True, 2, sent_us=int(cluster.now_s * 1e6)))
        cluster.drop()
    cluster.advance(0.5)
    assert cluster.terms(3) == cluster.terms(1) == [1, 1, 1]


def test_entry_before_must_match() -> None:
    """"If the follower does not find an entry in its log with the same index and term, then it refuses the new entries"."""
    cluster = lone([1, 1, 2], 3)
    for previous, term in ((4, 2), (3, 3), (2, 2)):
        effects = cluster.receive(1, 2, AppendEntries(3, previous, term, 1, (data(previous + 1, 3),)))
        (reply,) = sent(effects, AppendReply)
        assert isinstance(reply.message, AppendReply)
        assert (reply.message.ok, reply.message.index) == (False, previous)
    assert cluster.terms(1) == [1, 1, 2]


def test_conflicting_entries_are_overwritten() -> None:
    """"conflicting entries in follower logs will be overwritten with entries from the leader's log" (3.5)."""
    cluster = lone([1, 1, 2, 2, 2], 2)
    cluster.receive(1, 2, AppendEntries(3, 2, 1, 1, (data(3, 3),)))
    assert cluster.terms(1) == [1, 1, 3]
    assert [entry.term for entry in cluster.disk(1).entries] == [1, 3]


def test_matching_entries_are_kept() -> None:
    """"if a follower receives an AppendEntries request that includes log entries already present in its log, it ignores those
    entries" (3.7): one that comes late cuts nothing that came after it."""
    cluster = lone([1, 1, 1, 1], 1)
    effects = cluster.receive(1, 2, AppendEntries(1, 1, 1, 1, (data(2, 1),)))
    assert cluster.terms(1) == [1, 1, 1, 1]
    assert not any(isinstance(effect, fx.Persist) for effect in effects)
    (reply,) = sent(effects, AppendReply)
    assert isinstance(reply.message, AppendReply)
    assert reply.message.index == 2  # it vouches for what it was sent, not for what follows


def test_repeated_requests_have_the_same_effect() -> None:
    """"Raft RPCs have the same effect if repeated" (3.7)."""
    cluster = lone([1], 1)
    message = AppendEntries(2, 1, 1, 2, (data(2, 2), data(3, 2)))
    first = cluster.receive(1, 2, message)
    second = cluster.receive(1, 2, message)
    assert sent(first, AppendReply)[0].message == sent(second, AppendReply)[0].message
    assert cluster.terms(1) == [1, 2, 2]


def test_committed_entries_are_never_cut() -> None:
    cluster = lone([1, 1, 1], 1)
    cluster.receive(1, 2, AppendEntries(1, 3, 1, 3))
    with pytest.raises(InvariantError, match="committed"):
        cluster[1].handle(fx.Receive(node(3), node(1), AppendEntries(2, 1, 1, 1, (data(2, 2),))), 0.0)


def test_next_index_begins_after_the_last_entry() -> None:
    """"it initializes all nextIndex values to the index just after the last one in its log" (3.5)."""
    cluster = Cluster()
    config = config_of(node(n) for n in (1, 2, 3))
    for n in (1, 2, 3):
        cluster.add_log(node(n), config, 3, [1, 1, 2])
    cluster.campaign(1)
    cluster.stabilize()
    first = next(line for line in cluster.lines if "Append t4" in line)
    assert "after 3/2" in first


def test_follower_is_brought_into_line_in_few_steps() -> None:
    """A follower 2,000 entries of other terms off costs two refusals, not 2,000 (the hint of 3.5, both ways)."""
    cluster = Cluster()
    config = config_of(node(n) for n in (1, 2, 3))
    cluster.add_log(node(1), config, 5, [1] + [2] * 10 + [5] * 2000)
    cluster.add_log(node(2), config, 5, [1] + [2] * 10 + [5] * 2000)
    cluster.add_log(node(3), config, 4, [1] + [2] * 5 + [3] * 1000 + [4] * 1500)
    cluster.elect(1)
    cluster.advance(0.4)
    assert cluster.terms(3) == cluster.terms(1)
    assert sum("n3->n1 AppendReply t6 no" in line for line in cluster.lines) <= 3


# ---- batches and windows ---------------------------------------------------------------------------------------------


def test_appends_are_pipelined_within_bounds() -> None:
    """"the leader treats the next index for each follower optimistically" (10.2.2), up to a window."""
    cluster = led()
    for _ in range(limits.INFLIGHT_APPENDS_MAX + 5):
        cluster.propose(1, b"x")
    to_two = [packet for packet in cluster.wire if packet.to == node(2)]
    assert len(to_two) == limits.INFLIGHT_APPENDS_MAX
    cluster.stabilize()
    assert cluster.terms(2) == cluster.terms(1)
    assert max(len(p.message.entries) for p in to_two if isinstance(p.message, AppendEntries)) == 1


def test_appends_are_batched_within_bounds() -> None:
    cluster = led(check=False)
    cluster.crash(node(3))
    for _ in range(30):
        cluster.propose(1, *[b"x" * 100_000] * 5)
        cluster.stabilize(1, 2)
    cluster.propose(1, b"y" * limits.ENTRY_BYTES_MAX)
    cluster.stabilize(1, 2)
    cluster.propose(1, *[b"z"] * 3000)
    cluster.stabilize(1, 2)
    cluster.drop()
    cluster.restart(node(3))
    sizes = []
    for _ in range(200):
        cluster.now_s += 0.05
        cluster.tick(1)
        flying = [p.message for p in cluster.wire if p.to == node(3) and isinstance(p.message, AppendEntries)]
        sizes += [(len(m.entries), sum(e.size_bytes for e in m.entries)) for m in flying]
        assert sum(size for m in flying for size in [sum(e.size_bytes for e in m.entries)]) <= 2 * limits.INFLIGHT_BYTES_MAX
        cluster.deliver()
    assert cluster[3].log.last_index == cluster[1].log.last_index
    assert all(size <= limits.APPEND_BYTES_MAX or count == 1 for count, size in sizes)
    assert max(count for count, _ in sizes) == limits.APPEND_ENTRIES_MAX


def test_full_window_reopens_after_lost_answers() -> None:
    cluster = led()
    for _ in range(20):
        cluster.propose(1, b"x")
    cluster.deliver(lambda packet: packet.to == node(2))
    cluster.drop()
    cluster.advance(0.6)
    assert cluster.terms(2) == cluster.terms(1)


@pytest.mark.parametrize(
    ("payloads", "why"),
    [
        ((), fx.Why.TOO_LARGE),
        ((b"x" * (limits.ENTRY_BYTES_MAX + 1),), fx.Why.TOO_LARGE),
        ((b"",) * (limits.PROPOSAL_ENTRIES_MAX + 1), fx.Why.TOO_LARGE),
    ],
)
def test_proposals_are_bounded(payloads: tuple[bytes, ...], why: fx.Why) -> None:
    cluster = led()
    assert cluster.propose(1, *payloads) == [fx.Refused(why)]
    assert cluster[1].log.last_index == 2


def test_leader_pushes_back_while_a_majority_is_slow() -> None:
    cluster = led()
    payload = b"x" * limits.ENTRY_BYTES_MAX
    taken = 0
    while isinstance(cluster.propose(1, payload)[0], fx.Proposed):
        taken += 1
    assert taken == limits.UNCOMMITTED_BYTES_MAX // (len(payload) + limits.ENTRY_OVERHEAD_BYTES)
    assert cluster.propose(1, payload) == [fx.Refused(fx.Why.BUSY)]
    cluster.stabilize()
    assert isinstance(cluster.propose(1, payload)[0], fx.Proposed)


def test_followers_refuse_proposals() -> None:
    cluster = led()
    assert cluster.propose(2, b"x") == [fx.Refused(fx.Why.NOT_LEADER)]


@pytest.mark.parametrize("index", [99, 10**9])
def test_acknowledgement_of_what_does_not_exist_is_ignored(index: int) -> None:
    cluster = led()
    cluster.propose(1, b"x")
    cluster.drop()
    assert not any(isinstance(effect, fx.Commit) for effect in cluster.receive(1, 2, AppendReply(1, True, index)))
    assert cluster[1].commit == 2
