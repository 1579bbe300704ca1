"""Chapter 5: compaction and InstallSnapshot, each rule with its test."""

from __future__ import annotations

import random

import pytest

from grid.core import raft_effects as fx
from grid.core import raft_limits as limits
from grid.core.raft_log import Durable, InvariantError, RaftLog
from grid.core.raft_messages import (
    Appended,
    AppendReply,
    Entry,
    HardState,
    InstallSnapshot,
    Kind,
    Snapshot,
    SnapshotReply,
    config_of,
)
from tests.raft.cluster import Cluster
from tests.raft.test_elections import lone, sent
from tests.raft.test_membership import ids, refused
from tests.raft.test_replication import led
from tests.raft.world import SmallRaft, node

THREE = config_of(node(n) for n in (1, 2, 3))


def compact(cluster: Cluster, n: int, data: bytes = b"state", index: int | None = None) -> list[fx.Effect]:
    cluster[n].log.trail_bytes_max = 0
    return cluster.handle(node(n), fx.Compacted(cluster[n].commit if index is None else index, data))


def chunk(term: int, index: int, last_term: int, offset: int, total: int, data: bytes) -> InstallSnapshot:
    return InstallSnapshot(term, index, last_term, THREE, offset, total, data)


def test_only_committed_entries_are_compacted() -> None:
    """A snapshot covers "just the committed entries in its log" (5.1)."""
    cluster = led()
    cluster.propose(1, b"x")
    assert refused(compact(cluster, 1, index=3)) is fx.Why.BAD_SNAPSHOT
    assert refused(compact(cluster, 1, index=1)) is fx.Why.BAD_SNAPSHOT
    assert refused(compact(cluster, 1, index=2)) is None


def test_snapshot_keeps_index_term_and_configuration() -> None:
    """"the index and term of the last entry included in the snapshot and the latest configuration as of that index" (5.1)."""
    cluster = led(4)
    cluster.change(1, ids(1, 2, 3))
    cluster.stabilize()
    cluster.propose(1, b"x")
    cluster.stabilize()
    cluster.change(1, ids(1, 2))
    effects = compact(cluster, 1, index=4)
    assert isinstance(effects[0], fx.Persist)
    assert effects[0].records == (Snapshot(4, 1, config_of(ids(1, 2, 3)), b"state"),)
    assert cluster[1].log.config.voters == tuple(ids(1, 2))


def test_restart_from_snapshot_and_log() -> None:
    """"A volatile state machine must be recovered after restarts by reapplying log entries (after applying the latest
    snapshot)" (3.8)."""
    cluster = led()
    cluster.propose(1, b"x", b"y")
    cluster.stabilize()
    compact(cluster, 1, index=3)
    cluster.crash(node(1))
    cluster.restart(node(1))
    assert fx.ApplySnapshot(Snapshot(3, 1, THREE, b"state")) in cluster.boxes[node(1)].effects
    cluster.advance(5)
    assert [entry.index for entry in cluster.boxes[node(1)].applied][:1] == [4]


def test_snapshot_only_when_the_log_is_gone() -> None:
    """"Leaders resort to sending a snapshot only when they have already discarded the next log entry needed" (5.1)."""
    cluster = led()
    cluster.crash(node(3))
    cluster.propose(1, b"x")
    cluster.stabilize()
    cluster.handle(node(1), fx.Compacted(3, b"state"))  # the trail stays
    cluster.restart(node(3))
    cluster.advance(0.4)
    assert cluster[3].commit == 3
    assert not any("Snapshot" in line for line in cluster.lines)


def test_chunks_are_sent_in_order_and_are_signs_of_life() -> None:
    """"Each chunk is sent in order", and "gives the follower a sign of life with each chunk" (5.1)."""
    cluster = Cluster(kind=SmallRaft).found(3)
    cluster.stabilize()
    cluster.crash(node(3))
    cluster.propose(1, b"x")
    cluster.stabilize()
    compact(cluster, 1, b"0123456789")
    raft = cluster.restart(node(3))
    cluster.lines.clear()
    cluster.now_s = 0.4
    cluster.tick(1)
    cluster.stabilize()
    chunks = [line for line in cluster.lines if "Snapshot t1" in line]
    assert [line.split("bytes ")[1] for line in chunks] == ["0..3 of 10", "3..6 of 10", "6..9 of 10", "9..10 of 10"]
    assert raft.leader_heard_s == 0.4
    assert raft.log.snapshot.data == b"0123456789"


def test_lost_and_repeated_chunks() -> None:
    """A chunk that is not the next one changes nothing, and the answer says which is."""
    cluster = lone([1], 1)

    def answer(message: InstallSnapshot) -> object:
        (send,) = sent(cluster.receive(1, 2, message), object)
        return send.message

    assert answer(chunk(2, 9, 2, 3, 6, b"def")) == SnapshotReply(2, 9, 0)
    assert answer(chunk(2, 9, 2, 0, 6, b"abc")) == SnapshotReply(2, 9, 3)
    assert answer(chunk(2, 9, 2, 0, 6, b"abc")) == SnapshotReply(2, 9, 3)
    assert answer(chunk(2, 10, 2, 0, 6, b"ABC")) == SnapshotReply(2, 10, 3)  # another snapshot: begun anew
    assert answer(chunk(2, 10, 2, 3, 6, b"DEF")) == AppendReply(2, True, 10)
    assert cluster[1].log.snapshot.data == b"ABCDEF"


def test_new_term_drops_a_half_snapshot() -> None:
    cluster = lone([1], 1)
    cluster.receive(1, 2, chunk(2, 9, 2, 0, 6, b"abc"))
    (send,) = sent(cluster.receive(1, 3, chunk(3, 9, 2, 3, 6, b"xyz")), object)
    assert send.message == SnapshotReply(3, 9, 0)


def test_snapshot_supersedes_the_log() -> None:
    """"the follower discards its entire log; it is all superseded by the snapshot" (5.1), on disk before it answers."""
    cluster = lone([1, 1, 2, 2], 2)
    effects = cluster.receive(1, 2, chunk(3, 3, 3, 0, 1, b"s"))
    kinds = [type(effect) for effect in effects if not isinstance(effect, fx.WakeAt | fx.LeaderKnown)]
    assert kinds == [fx.Persist, fx.Persist, fx.ApplySnapshot, fx.Send]
    assert (cluster[1].log.last_index, cluster[1].log.last_term, cluster[1].commit) == (3, 3, 3)
    assert cluster.disk(1).entries == []


def test_snapshot_of_a_prefix_keeps_the_rest() -> None:
    """"log entries covered by the snapshot are deleted but entries following the snapshot are still valid and must be
    retained" (5.1): here nothing is even written, but what it covers is final now."""
    cluster = lone([1, 1, 2, 2], 2)
    effects = cluster.receive(1, 2, chunk(2, 3, 2, 0, 1, b"s"))
    assert not any(isinstance(effect, fx.Persist) for effect in effects)
    assert (cluster[1].log.last_index, cluster[1].commit) == (4, 3)


def test_old_snapshot_changes_nothing() -> None:
    cluster = lone([1, 1], 1)
    cluster.receive(1, 2, chunk(2, 9, 2, 0, 1, b"s"))
    (send,) = sent(cluster.receive(1, 2, chunk(2, 5, 2, 0, 1, b"o")), object)
    assert send.message == AppendReply(2, True, 9)
    assert cluster[1].log.snapshot.index == 9


def test_snapshot_overtaken_by_the_next() -> None:
    """The follower has the snapshot that is being sent, the leader's log begins after it: the next snapshot must follow."""
    cluster = led()
    cluster.crash(node(3))
    cluster.propose(1, b"x")
    cluster.stabilize()
    compact(cluster, 1)
    cluster.restart(node(3))
    cluster.now_s = 0.2
    cluster.tick(1)
    for _ in range(2):
        cluster.deliver()
    cluster.deliver(lambda packet: packet.to == node(3))  # the snapshot of entry 3; its answer gets lost
    cluster.drop()
    cluster.propose(1, b"y", b"z")
    cluster.stabilize(1, 2)
    compact(cluster, 1)
    cluster.drop()
    cluster.advance(1)
    assert cluster[3].commit == 5


def test_log_asks_for_a_snapshot_once() -> None:
    cluster = Cluster().found(1)
    wanted = 0
    for _ in range(3 * limits.LOG_BYTES_SNAPSHOT // 500_000):
        wanted += sum(isinstance(effect, fx.SnapshotWanted) for effect in cluster.propose(1, b"x" * 500_000))
    assert wanted == 1
    compact(cluster, 1, index=5)
    assert any(isinstance(effect, fx.SnapshotWanted) for effect in cluster.propose(1, b"x"))
    compact(cluster, 1)
    assert not any(isinstance(effect, fx.SnapshotWanted) for effect in cluster.propose(1, b"x"))


def test_trail_is_bounded() -> None:
    log = RaftLog(Durable((HardState(1), Snapshot(1, 1, THREE))))
    for index in range(2, 12):
        log.append((Entry(index, 1, Kind.DATA, b"x" * 300_000),), 0)
    log.compact(Snapshot(10, 1, THREE, b"state"))
    assert log.last_index - log.base_index == 1 + limits.LOG_TRAIL_BYTES_MAX // 300_064
    assert log.bytes_after_snapshot == 300_064


def test_too_large_a_snapshot_is_refused() -> None:
    cluster = led()
    assert refused(compact(cluster, 1, b"x" * (limits.SNAPSHOT_BYTES_MAX + 1))) is fx.Why.BAD_SNAPSHOT


# ---- journals --------------------------------------------------------------------------------------------------------


def test_journal_rewritten_is_the_same_journal() -> None:
    """records() folds to the same state, whatever was written: cuts, snapshots, entries after them."""
    rng = random.Random(5)
    for _ in range(200):
        journal = Durable()
        term = 1
        for _ in range(rng.randrange(1, 12)):
            term += rng.random() < 0.3
            base, last = journal.snapshot.index, journal.last_index
            match rng.randrange(3):
                case 0:
                    journal.apply(HardState(term, node(rng.randrange(3))))
                case 1:
                    first = rng.randrange(base + 1, last + 2)
                    entries = tuple(Entry(i, term, Kind.DATA, b"%d" % i) for i in range(first, first + rng.randrange(1, 4)))
                    journal.apply(Appended(entries))
                case 2:
                    index = rng.randrange(base, last + 3)
                    at = index - base - 1
                    known = journal.entries[at].term if 0 <= at < len(journal.entries) else term
                    journal.apply(Snapshot(max(index, 1), known, THREE, b"s%d" % index))
        again = Durable(journal.records())
        assert (again.hard, again.snapshot, again.entries) == (journal.hard, journal.snapshot, journal.entries)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ((HardState(3), HardState(2)), "term 3 to 2"),
        ((Snapshot(1, 1, THREE), Appended((Entry(3, 1),))), "gap before entry 3"),
        ((Snapshot(4, 1, THREE), Snapshot(3, 1, THREE)), "snapshot of entry 3"),
        ((Snapshot(4, 1, THREE), Appended((Entry(4, 1),))), "gap"),
    ],
)
def test_damaged_journal_is_noticed(records: tuple[HardState | Appended | Snapshot, ...], why: str) -> None:
    with pytest.raises(InvariantError, match=why):
        Durable(records)


def test_log_of_a_later_term_than_the_hard_state_is_damaged() -> None:
    with pytest.raises(InvariantError, match="later term"):
        Cluster(check=False).add(node(1), HardState(1), Snapshot(1, 2, THREE))
