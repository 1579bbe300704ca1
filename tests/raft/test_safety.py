"""Sections 3.6 and 3.8: what makes it safe, and what must be on disk when, each rule with its test."""

from __future__ import annotations

import pytest

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_check import Violation, matching
from grid.core.raft_messages import (
    Appended,
    AppendEntries,
    AppendReply,
    Entry,
    HardState,
    Kind,
    RequestVote,
    VoteReply,
    config_of,
)
from tests.raft.cluster import Cluster
from tests.raft.planted import CommitsOldTerms
from tests.raft.test_elections import lone
from tests.raft.test_replication import data, led
from tests.raft.world import SmallRaft, node

FIVE = config_of(node(n) for n in range(1, 6))


def figure_8(kind: type[Raft]) -> Cluster:
    """Figure 3.7 (c): n1 leads term 4, and entry 2 of term 2 is on n1, n2 and n3, which n1 knows; its no-op is on n1 alone."""
    cluster = Cluster(kind=kind)
    for n, terms in ((1, [1, 2]), (2, [1, 2]), (3, [1]), (4, [1]), (5, [1, 3])):
        cluster.add_log(node(n), FIVE, 3, terms)
    cluster.isolate(5)
    cluster.campaign(1)
    for _ in range(4):
        cluster.deliver()
    cluster.drop(lambda packet: isinstance(packet.message, AppendEntries) and packet.to in (node(2), node(4)))
    for _ in range(4):
        cluster.deliver(lambda packet: node(3) in (packet.sender, packet.to))
    cluster.receive(1, 2, AppendReply(4, True, 2))
    return cluster


def test_old_terms_are_not_committed_by_counting() -> None:
    """"Raft never commits log entries from previous terms by counting replicas" (3.6.2, figure 3.7)."""
    cluster = figure_8(SmallRaft)
    assert cluster[1].progress[node(2)].match == cluster[1].progress[node(3)].match == 2
    assert cluster.terms(3) == [1, 2]
    assert cluster[1].commit == 1


def test_own_entry_commits_all_before_it() -> None:
    """"once an entry from the current term has been committed in this way, then all prior entries are committed indirectly"."""
    cluster = figure_8(SmallRaft)
    cluster.stabilize(1, 2, 3)
    assert cluster[1].commit == 3


def test_counting_old_copies_loses_a_committed_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why (figure 3.7, d1): with the rule left out, n5 wins and overwrites what n1 called committed. The checker sees it."""

    class Broken(CommitsOldTerms, SmallRaft):
        pass

    def disaster() -> None:
        cluster = figure_8(Broken)
        assert cluster[1].commit == 2
        cluster.drop()
        cluster.crash(node(1))
        cluster.blocked.clear()
        cluster.now_s += 5
        for _ in range(2):
            cluster.campaign(5)
            cluster.stabilize()

    with pytest.raises(Violation, match="counts copies"):
        disaster()
    monkeypatch.setattr(Cluster, "rules", False)
    with pytest.raises(Violation, match="Leader Completeness"):
        disaster()


def test_only_who_has_all_committed_entries_is_elected() -> None:
    """"all the committed entries from previous terms are present on each new leader from the moment of its election" (3.6)."""
    cluster = led(5)
    cluster.isolate(4, 5)
    cluster.propose(1, b"x")
    cluster.stabilize()
    cluster.crash(node(1))
    cluster.blocked.clear()
    cluster.now_s += 3
    for n in (4, 5):
        cluster.campaign(n)
        cluster.stabilize()
        assert cluster[n].term == 1
    cluster.elect(2)
    assert cluster.terms(2) == [1, 1, 1, 2]


def test_leader_never_overwrites_its_own_log() -> None:
    """"Leader Append-Only: a leader never overwrites or deletes entries in its log" (figure 3.2)."""
    cluster = Cluster()
    for n, terms in ((1, [1, 2, 2, 2]), (2, [1]), (3, [1, 3, 3])):
        cluster.add_log(node(n), config_of(node(m) for m in (1, 2, 3)), 3, terms)
    cluster.elect(3, 2, 3)
    assert cluster.terms(3)[:3] == [1, 3, 3]
    cluster.stabilize()
    assert cluster.terms(1) == cluster.terms(3)


def test_leader_begins_with_a_noop() -> None:
    """"having each leader commit a blank no-op entry into the log at the start of its term" (6.4)."""
    cluster = led()
    cluster.crash(node(1))
    cluster.now_s += 3
    cluster.elect(2)
    assert cluster[2].log.slice(3, 3) == (Entry(3, 2, Kind.NOOP),)
    assert cluster[2].commit == 3


# ---- the disk --------------------------------------------------------------------------------------------------------


def order(effects: list[fx.Effect]) -> list[str]:
    return [str(e.point) if isinstance(e, fx.Persist | fx.Send) else type(e).__name__ for e in effects]


def test_vote_is_on_disk_before_it_is_told() -> None:
    """"each server persists its current term and vote; this is necessary to prevent the server from voting twice" (3.8)."""
    effects = lone([1], 1).receive(1, 2, RequestVote(2, 1, 1))
    assert order(effects)[:2] == ["persist.vote", "send.vote"]
    assert isinstance(effects[0], fx.Persist)
    assert effects[0].records == (HardState(2, node(2)),)


def test_vote_survives_a_restart() -> None:
    cluster = lone([1], 1)
    cluster.receive(1, 2, RequestVote(2, 1, 1))
    cluster.crash(node(1))
    cluster.restart(node(1))
    (effect,) = cluster.receive(1, 3, RequestVote(2, 1, 1))
    assert isinstance(effect, fx.Send)
    assert effect.message == VoteReply(2, False)


def test_entries_are_on_disk_before_they_are_acknowledged() -> None:
    """"Each server also persists new log entries before they are counted towards the entries' commitment" (3.8)."""
    effects = lone([1], 1).receive(1, 2, AppendEntries(2, 1, 1, 2, (data(2, 2),)))
    assert order(effects)[:5] == [
        "LeaderKnown", "persist.term", "persist.follower-entries", "Commit", "send.append-reply"
    ]


def test_crash_before_the_write_acknowledges_nothing() -> None:
    cluster = led()
    cluster.propose(1, b"x")
    cluster.drop(lambda packet: packet.to == node(3))
    two = cluster[2]
    packet = cluster.wire.pop()
    two.handle(fx.Receive(packet.sender, packet.to, packet.message), cluster.now_s)  # and dies before any effect
    cluster.crash(node(2))
    cluster.restart(node(2))
    assert cluster.terms(2) == [1, 1]
    assert cluster[1].commit == 2


def test_commit_index_is_relearnt() -> None:
    """"The most interesting example is the commit index, which can safely be reinitialized to zero on a restart" (3.8)."""
    cluster = led()
    cluster.propose(1, b"x")
    cluster.stabilize()
    for n in (1, 2, 3):
        cluster.crash(node(n))
    for n in (1, 2, 3):
        cluster.restart(node(n))
    assert [cluster[n].commit for n in (1, 2, 3)] == [1, 1, 1]
    cluster.advance(5)
    assert [cluster[n].commit for n in (1, 2, 3)] == [4, 4, 4]
    assert all([entry.index for entry in cluster.boxes[node(n)].applied] == [2, 3, 4] for n in (1, 2, 3))


def test_deposed_leaders_entries_do_not_replace_newer_ones() -> None:
    """… "or replacing log entries from a newer leader with those from a deposed leader" (3.8): also after a restart."""
    cluster = lone([1], 1)
    cluster.receive(1, 3, AppendEntries(3, 1, 1, 1, (data(2, 3),)))
    cluster.crash(node(1))
    cluster.restart(node(1))
    cluster.receive(1, 2, AppendEntries(2, 1, 1, 1, (data(2, 2),)))
    assert cluster.terms(1) == [1, 3]


def test_log_matching_helper_sees_a_difference() -> None:
    """If two entries in different logs have the same index and term, the logs are identical up to there (figure 3.2)."""
    config = config_of(node(n) for n in (1, 2))
    cluster = Cluster(check=False)
    one = cluster.add_log(node(1), config, 3, [1, 1, 2, 3])
    two = cluster.add_log(node(2), config, 3, [1, 1, 2])
    matching([one, two])
    odd = cluster.add_log(node(2), config, 3, [1, 2, 2])
    with pytest.raises(Violation, match="agree after"):
        matching([one, odd])
    other = cluster.add(node(2), HardState(3), Appended((Entry(1, 1), Entry(2, 1, Kind.DATA, b"other"))))
    with pytest.raises(Violation, match="different entries"):
        matching([one, other])
