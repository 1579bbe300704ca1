"""The leader's part of a consensus member: appending, replicating, committing, changing members, handing over.

Rules (section numbers are of Ongaro's dissertation):
- a leader never overwrites or deletes entries in its log (3.5); the first entry of its term is a no-op (6.4);
- only entries of its own term are committed by counting copies (3.6.2);
- it leads only while a majority answers: else it steps down, and says nothing more (6.2);
- members change one voter at a time, each change after the last one is committed and after an entry of the leader's own
  term is (4.1, and the correction published on raft-dev in July 2015);
- entries leave for followers while the leader's own disk writes them (10.2.1): nothing counts its copy before it is there.
"""

from __future__ import annotations

import math

from grid.core.raft_base import RaftBase, Role
from grid.core.raft_effects import Point, Proposed, Refused, TransferAborted, Why
from grid.core.raft_limits import (
    APPEND_BYTES_MAX,
    APPEND_ENTRIES_MAX,
    CATCH_UP_ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    ENTRY_OVERHEAD_BYTES,
    PROPOSAL_ENTRIES_MAX,
    SNAPSHOT_CHUNK_BYTES,
    UNCOMMITTED_BYTES_MAX,
)
from grid.core.raft_messages import (
    Appended,
    AppendEntries,
    AppendReply,
    Config,
    Entry,
    InstallSnapshot,
    Kind,
    NodeId,
    SnapshotReply,
    TimeoutNow,
)
from grid.core.raft_messages import encode as encode_value
from grid.core.raft_progress import Mode, Progress


class Leading(RaftBase):
    """A member with what a leader needs; all of it empty while it does not lead."""

    progress: dict[NodeId, Progress]
    """One for each other member of the configuration in force, while leading."""
    transfer_to: NodeId | None
    """Who is to take over; proposals are refused meanwhile."""
    append_entries_max = APPEND_ENTRIES_MAX
    snapshot_chunk_bytes = SNAPSHOT_CHUNK_BYTES
    """These two by name, so that a simulation can make them small."""

    def _stop_leading(self) -> None:
        self.progress = {}
        self.transfer_to = None
        self._transfer_until_s = math.inf
        self._heartbeat_due_s = math.inf
        self._noop_index = 0
        self._uncommitted_bytes = 0

    def _due_s(self) -> float:
        if self.role is not Role.LEADER:
            return super()._due_s()
        return self._heartbeat_due_s if self.progress else math.inf

    def _lead(self) -> None:
        """Elected or appointed: all entries before are kept as they are, a no-op comes first."""
        self._move(Role.LEADER)
        self._announce_leadership()
        self.election_due_s = math.inf
        self._heartbeat_due_s = self._now_s + self.timing.heartbeat_s
        self._uncommitted_bytes = sum(entry.size_bytes for entry in self.log.slice(self.commit + 1, self.log.last_index))
        self._track_members()
        self._noop_index = self.log.last_index + 1
        self._append((Entry(self._noop_index, self.term, Kind.NOOP),))

    def _track_members(self) -> None:
        """Follow the configuration in force: forget who left, get to know who came."""
        members = self.log.config.members
        self.progress = {
            node: self.progress.get(node) or Progress(self.log.last_index + 1, self._now_s)
            for node in members
            if node != self.node
        }

    # ---- quorum ------------------------------------------------------------------------------------------------------

    def quorum_until_s(self) -> float:
        """Until when a majority surely followed this leader, by its own clock; -inf when it does not lead.

        Counted from when the messages left that a majority has answered: a lease for stopping in time (granting nothing),
        never for reading.
        """
        if self.role is not Role.LEADER:
            return -math.inf
        voters = self.log.config.voters
        times = sorted((math.inf if node == self.node else self.progress[node].contact_s for node in voters), reverse=True)
        return times[self.log.config.quorum - 1] + self.timing.election_s

    def _check_quorum(self) -> None:
        """Step down when a majority was not heard for an election timeout: whatever woke the process first."""
        if self.role is Role.LEADER and self._now_s >= self.quorum_until_s():
            self._become_follower(self.term, None, Why.LOST_QUORUM)

    def _heard(self, progress: Progress, sent_us: int) -> None:
        progress.contact_s = max(progress.contact_s, min(sent_us / 1e6, self._now_s))

    # ---- appending ---------------------------------------------------------------------------------------------------

    def _propose(self, payloads: tuple[bytes, ...]) -> None:
        size = sum(map(len, payloads)) + ENTRY_OVERHEAD_BYTES * len(payloads)
        why = None
        if self.role is not Role.LEADER:
            why = Why.NOT_LEADER
        elif self.transfer_to is not None:
            why = Why.TRANSFERRING
        elif not 0 < len(payloads) <= PROPOSAL_ENTRIES_MAX or any(len(data) > ENTRY_BYTES_MAX for data in payloads):
            why = Why.TOO_LARGE
        elif self._uncommitted_bytes and self._uncommitted_bytes + size > UNCOMMITTED_BYTES_MAX:
            why = Why.BUSY
        if why:
            self._emit(Refused(why))
            return
        first = self.log.last_index + 1
        self._emit(Proposed(self.term, first, first + len(payloads) - 1))
        self._append(tuple(Entry(index, self.term, Kind.DATA, data) for index, data in enumerate(payloads, first)))

    def _append(self, entries: tuple[Entry, ...]) -> None:
        """Put new entries at the end: on their way to the followers first, then to the own disk, then maybe final."""
        self._require(entries[0].index == self.log.last_index + 1, "a leader only appends")
        self.log.append(entries, self.commit)
        self._uncommitted_bytes += sum(entry.size_bytes for entry in entries)
        if any(entry.kind is Kind.CONFIG for entry in entries):
            self._track_members()
        self._persist_hard()
        for node, progress in self.progress.items():
            self._replicate(node, progress)
        self._persist(Point.PERSIST_LEADER_ENTRIES, (Appended(entries),))
        self._advance_commit()

    def _replicate(self, node: NodeId, progress: Progress) -> None:
        """Send what the follower lacks, as far as its window allows."""
        while not progress.blocked() and progress.next <= self.log.last_index:
            if progress.next <= self.log.base_index:
                self._begin_snapshot(node, progress)
                return
            entries = self.log.batch(progress.next, self.append_entries_max, APPEND_BYTES_MAX)
            self._send_entries(Point.SEND_APPEND, node, progress, entries)
            progress.sent(entries)

    def _send_entries(self, point: Point, node: NodeId, progress: Progress, entries: tuple[Entry, ...]) -> None:
        previous = progress.next - 1
        previous_term = self.log.term_at(previous)
        assert previous_term is not None  # previous ≥ base_index
        self._send(point, node, AppendEntries(self.term, previous, previous_term, self.commit, entries, self._now_us()))

    def _now_us(self) -> int:
        """The clock as it is sent, never later than the clock: who echoes it proves contact no later than it was."""
        return max(0, math.floor(self._now_s * 1e6))

    def _lead_tick(self) -> None:
        """Heartbeats, resends, and the end of a handover's patience."""
        if self._now_s >= self._transfer_until_s and self.transfer_to is not None:
            self._emit(TransferAborted(self.transfer_to))
            self.transfer_to, self._transfer_until_s = None, math.inf
        if self._now_s < self._heartbeat_due_s:
            return
        self._heartbeat_due_s = self._now_s + self.timing.heartbeat_s
        for node, progress in self.progress.items():
            if progress.mode is not Mode.SNAPSHOT and progress.next <= self.log.base_index:
                self._begin_snapshot(node, progress)
            elif progress.mode is Mode.SNAPSHOT:
                self._send_chunk(node, progress)
            else:
                self._send_entries(Point.SEND_HEARTBEAT, node, progress, ())

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _append_reply(self, sender: NodeId, reply: AppendReply) -> None:
        progress = self.progress.get(sender)
        if self.role is not Role.LEADER or progress is None:
            return
        self._heard(progress, reply.sent_us)
        if not reply.ok:
            self._refused(sender, progress, reply)
            return
        if reply.index > self.log.last_index:
            return  # no follower of this leader can say so
        if progress.snapshot is not None and reply.index < min(progress.snapshot.index, self.log.base_index):
            return  # still too far behind for the log
        progress.matched(reply.index)
        self._require(progress.match < progress.next <= self.log.last_index + 1, f"{sender} is followed wrongly: {progress}")
        self._advance_commit()
        if self.role is Role.LEADER:
            self._replicate(sender, progress)
            self._maybe_hand_over()

    def _refused(self, sender: NodeId, progress: Progress, reply: AppendReply) -> None:
        """The follower lacks the entry before those sent, or holds another one there: go back, by its hint."""
        if reply.index <= progress.match or progress.mode is Mode.SNAPSHOT:
            return  # an old answer: the logs agree there by now
        if reply.index != progress.next - 1 and (progress.mode is Mode.PROBE or reply.index >= progress.next):
            return  # not of the last probe
        agree = self.log.agree_at_most(min(reply.hint_index, reply.index - 1), reply.hint_term)
        progress.probe(agree + 1)
        self._replicate(sender, progress)

    def _advance_commit(self) -> None:
        """Commit what a majority of voters has on disk, if it ends in this term."""
        last, config = self.log.last_index, self.log.config
        copies = sorted(last if node == self.node else self.progress[node].match for node in config.voters)
        index = copies[-config.quorum]
        if index > self.commit and self._committable(index):
            first = self.commit + 1
            self._commit_to(index)
            self._uncommitted_bytes -= sum(entry.size_bytes for entry in self.log.slice(first, index))
            if self.node not in self.log.config.voters and self.log.config_index <= index:
                self._become_follower(self.term, None, Why.REMOVED)

    def _committable(self, index: int) -> bool:
        """"Only log entries from the leader's current term are committed by counting replicas" (3.6.2)."""
        return self.log.term_at(index) == self.term

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def _begin_snapshot(self, node: NodeId, progress: Progress) -> None:
        progress.give_snapshot(self.log.snapshot)
        self._send_chunk(node, progress)

    def _send_chunk(self, node: NodeId, progress: Progress) -> None:
        snapshot = progress.snapshot
        assert snapshot is not None  # mode is SNAPSHOT
        data = snapshot.data[progress.offset : progress.offset + self.snapshot_chunk_bytes]
        total = len(snapshot.data)
        chunk = InstallSnapshot(
            self.term, snapshot.index, snapshot.term, snapshot.config, progress.offset, total, data, self._now_us()
        )
        self._send(Point.SEND_SNAPSHOT_CHUNK, node, chunk)

    def _snapshot_reply(self, sender: NodeId, reply: SnapshotReply) -> None:
        progress = self.progress.get(sender)
        if self.role is not Role.LEADER or progress is None:
            return
        self._heard(progress, reply.sent_us)
        snapshot = progress.snapshot
        if snapshot is None or snapshot.index != reply.index or reply.offset >= max(1, len(snapshot.data)):
            return
        advanced = reply.offset > progress.offset
        progress.offset = reply.offset  # an answer that goes back is repeated by the next heartbeat, not in a storm
        if advanced:
            self._send_chunk(sender, progress)

    # ---- members -----------------------------------------------------------------------------------------------------

    def _change(self, config: Config) -> None:
        why = self._change_refusal(config)
        if why:
            self._emit(Refused(why))
            return
        index = self.log.last_index + 1
        self._emit(Proposed(self.term, index, index))
        self._append((Entry(index, self.term, Kind.CONFIG, encode_value(config)),))

    def _change_refusal(self, config: Config) -> Why | None:
        """Why the configuration can't be appended now, if it can't."""
        now = self.log.config
        added = set(config.voters) - set(now.voters)
        if self.role is not Role.LEADER:
            return Why.NOT_LEADER
        if self.transfer_to is not None:
            return Why.TRANSFERRING
        if config.fault():
            return Why.BAD_CONFIG
        if config == now:
            return Why.NO_CHANGE
        if self.log.config_index > self.commit:
            return Why.CHANGE_PENDING
        if not self._own_commit():
            return Why.NO_OWN_COMMIT
        if len(added) + len(set(now.voters) - set(config.voters)) > 1:
            return Why.ONE_AT_A_TIME
        return None if all(map(self.caught_up, added)) else Why.NOT_CAUGHT_UP

    def _own_commit(self) -> bool:
        """Whether an entry of this term is committed: before, a change could overlap one of an earlier leader's."""
        return self.commit >= self._noop_index

    def caught_up(self, node: NodeId) -> bool:
        """Whether a learner lacks so little, and answers, that making it a voter holds nothing up (4.2.1)."""
        progress = self.progress.get(node)
        if progress is None or self._now_s - progress.contact_s >= self.timing.election_s:
            return False
        return progress.mode is Mode.REPLICATE and progress.match + CATCH_UP_ENTRIES_MAX >= self.log.last_index

    # ---- handing over ------------------------------------------------------------------------------------------------

    def _transfer(self, target: NodeId | None) -> None:
        if self.role is not Role.LEADER:
            self._emit(Refused(Why.NOT_LEADER))
            return
        voters = [node for node in self.log.config.voters if node in self.progress]
        if target is None:
            fresh = [node for node in voters if self._now_s - self.progress[node].contact_s < self.timing.election_s]
            target = max(fresh, key=lambda node: self.progress[node].match, default=None)
        if target not in voters or target is None:
            self._emit(Refused(Why.NO_TARGET))
            return
        if self.transfer_to not in (None, target):
            self._emit(Refused(Why.TRANSFERRING))
            return
        self.transfer_to = target
        self._transfer_until_s = self._now_s + self.timing.election_s
        self._replicate(target, self.progress[target])
        self._maybe_hand_over()

    def _maybe_hand_over(self) -> None:
        """Tell the target to stand once it has the whole log (3.10)."""
        if self.transfer_to in self.progress and self.progress[self.transfer_to].match == self.log.last_index:
            self._send(Point.SEND_TIMEOUT_NOW, self.transfer_to, TimeoutNow(self.term))
