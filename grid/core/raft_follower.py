"""The follower's part of a consensus member: taking entries and snapshots from the leader.

Rules (sections of the dissertation):
- new entries are refused unless the entry before them is here, with its term (3.5); what conflicts with the leader is cut,
  what merely comes late cuts nothing;
- an answer that says "I have it" leaves after the disk has it (3.8);
- a snapshot's chunks are taken in order; what it covers is committed (5.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grid.core.raft_base import RaftBase
from grid.core.raft_effects import ApplySnapshot, Point
from grid.core.raft_messages import (
    Appended,
    AppendEntries,
    AppendReply,
    Entry,
    InstallSnapshot,
    NodeId,
    Snapshot,
    SnapshotReply,
)


@dataclass(slots=True)
class Incoming:
    """A snapshot that is arriving. Invariant: data holds its first len(data) bytes, of this leader's snapshot."""

    key: tuple[int, int, int, int]  # the leader's term, index, last_term, total_bytes
    data: bytearray = field(default_factory=bytearray)


class Following(RaftBase):
    """A member with what a follower needs."""

    incoming: Incoming | None
    """At most one, dropped with the term."""

    def _append_entries(self, sender: NodeId, message: AppendEntries) -> None:
        """The legitimate leader's entries: this member follows it already."""
        previous, entries = message.prev_index, message.entries
        if previous < self.log.base_index:  # all up to base_index are committed, so they agree
            entries = tuple(entry for entry in entries if entry.index > self.log.base_index)
            matches, previous = True, min(self.log.base_index, previous + len(message.entries))
        else:
            matches = self.log.term_at(previous) == message.prev_term
        if not matches:
            self._refuse_entries(sender, message)
            return
        new = self._new_entries(entries)
        if new:
            self.log.append(new, self.commit)
            self._persist(Point.PERSIST_FOLLOWER_ENTRIES, (Appended(new),))
        last = entries[-1].index if entries else previous
        self._commit_to(min(message.commit, last))
        self._send(Point.SEND_APPEND_REPLY, sender, AppendReply(self.term, True, last, sent_us=message.sent_us))

    def _new_entries(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """From the first entry on that is not here: "it ignores those entries" that are (3.7)."""
        for position, entry in enumerate(entries):
            if self.log.term_at(entry.index) != entry.term:
                return entries[position:]
        return ()

    def _refuse_entries(self, sender: NodeId, message: AppendEntries) -> None:
        """Say where the logs may still agree: the leader's terms before prev_index are not above prev_term."""
        hint = self.log.agree_at_most(message.prev_index, message.prev_term)
        reply = AppendReply(
            self.term, False, message.prev_index, hint, self.log.term_at(hint) or 0, sent_us=message.sent_us
        )
        self._send(Point.SEND_APPEND_REPLY, sender, reply)

    def _install_snapshot(self, sender: NodeId, message: InstallSnapshot) -> None:
        """A chunk of the legitimate leader's snapshot."""
        if message.index <= self.commit or self.log.term_at(message.index) == message.last_term:
            self.incoming = None  # all of it is here: what it covers is final, what follows it stays
            self._commit_to(message.index)
            self._send(Point.SEND_APPEND_REPLY, sender, AppendReply(self.term, True, self.commit, sent_us=message.sent_us))
            return
        key = (message.term, message.index, message.last_term, message.total_bytes)
        if self.incoming is None or self.incoming.key != key:
            self.incoming = Incoming(key)
        data = self.incoming.data
        if message.offset == len(data):
            data += message.data
        if len(data) < message.total_bytes:
            reply = SnapshotReply(self.term, message.index, len(data), sent_us=message.sent_us)
            self._send(Point.SEND_SNAPSHOT_REPLY, sender, reply)
            return
        self.incoming = None
        snapshot = Snapshot(message.index, message.last_term, message.config, bytes(data))
        self._persist(Point.PERSIST_INSTALLED_SNAPSHOT, (snapshot,))
        self.log.install(snapshot)
        self.commit = snapshot.index
        self._snapshot_asked = False
        self._emit(ApplySnapshot(snapshot))
        self._send(Point.SEND_APPEND_REPLY, sender, AppendReply(self.term, True, message.index, sent_us=message.sent_us))
