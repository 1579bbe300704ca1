"""The properties that make consensus what it is, checked from outside over all members of one group: for simulations.

Figure 3.2 of the dissertation, and what stands behind it: Election Safety, Leader Append-Only, Log Matching, Leader
Completeness, State Machine Safety; one vote a term; terms, commit indexes and journals never go back; what is committed is on
a majority's disks at that moment. `Checker` is told of each effect when it has been carried out (what was only decided, and
lost in a crash, did not happen) and raises Violation at once. A log's identity up to an entry is one hash over all of it, so
that each check costs the entries that are new, not the log. What a journal held before it was lost counts as held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from grid.core.raft_base import RaftBase, Role
from grid.core.raft_effects import ApplySnapshot, BecameLeader, Commit, Effect, Event, Persist, Receive, Send
from grid.core.raft_election import adopts_term
from grid.core.raft_log import Durable
from grid.core.raft_messages import Appended, Entry, HardState, Kind, NodeId, Record, Snapshot, VoteReply


class Violation(Exception):
    """A property does not hold. The message names it."""


@dataclass(slots=True)
class History:
    """One log as hashes: chain[i] stands for entry base + i and all before it. The base's own is chain[0]."""

    base: int = 0
    chain: list[bytes] = field(default_factory=lambda: [b""])

    @property
    def last(self) -> int:
        """The last entry's index."""
        return self.base + len(self.chain) - 1

    def at(self, index: int) -> bytes | None:
        """The log's identity up to an entry, None if it isn't in the history."""
        return self.chain[index - self.base] if self.base <= index <= self.last else None


def _link(before: bytes, entry: Entry) -> bytes:
    head = b"%d %d %d " % (entry.index, entry.term, entry.kind)
    return hashlib.blake2b(before + head + entry.data, digest_size=16).digest()


class Checker:
    """The group's history. One for each group (each branch); members are named by node id."""

    def __init__(self) -> None:
        self.leaders: dict[int, NodeId] = {}
        self.entries: dict[int, Entry] = {}  # committed ones, for comparing with a serial run
        self.committed_last = 0
        self._committed: dict[int, bytes] = {}  # index → the log's identity up to it
        self._committed_in: dict[int, int] = {}  # term → how far its leader committed
        self._known: dict[tuple[int, int], bytes] = {}  # (index, term) → identity: Log Matching
        self._votes: dict[tuple[NodeId, int], NodeId] = {}
        self._disks: dict[NodeId, History] = {}
        self._hard: dict[NodeId, HardState] = {}
        self._applied: dict[NodeId, int] = {}
        self._seen: dict[NodeId, tuple[int, int]] = {}  # (term, commit) of the running process

    # ---- what happens ------------------------------------------------------------------------------------------------

    def started(self, node: NodeId, durable: Durable) -> None:
        """A process began from this journal."""
        disk = self._disks.setdefault(node, History())
        if disk.last != durable.last_index or self._hard.get(node, HardState()) != durable.hard:
            raise Violation(f"journal: {node} restarts without what it wrote: {durable.hard}, {durable.last_index} entries")
        self._applied.pop(node, None)
        self._seen.pop(node, None)

    def torn(self, node: NodeId, records: Iterable[Record]) -> None:
        """Of a Persist only these records got to the disk; the process died."""
        for record in records:
            self._on_disk(node, record)

    def did(self, raft: RaftBase, effect: Effect) -> None:
        """The effect was carried out (a Persist: is on disk)."""
        self._state(raft)
        match effect:
            case Persist():
                for record in effect.records:
                    if isinstance(record, Appended):
                        self._appending(raft, record)
                    self._on_disk(raft.node, record)
            case Send(message=VoteReply(granted=True, pre=False) as reply):
                self._vote(raft.node, reply.term, effect.to)
            case BecameLeader():
                self._elected(raft, effect.term)
            case Commit():
                self._commit(raft, effect.entries)
            case ApplySnapshot():
                self._snapshot(raft.node, effect.snapshot)
            case _:
                pass

    def decided(self, raft: RaftBase, event: Event, effects: Iterable[Effect]) -> None:
        """What `handle` returned, before it is carried out: rules whose breach would take a rare schedule to do harm."""
        stale = isinstance(event, Receive) and event.message.term < raft.term and adopts_term(event.message)
        for effect in effects:
            if isinstance(effect, Commit) and raft.role is Role.LEADER and effect.entries[-1].term != raft.term:
                raise Violation(f"commitment: {raft!r} counts copies of entry {effect.entries[-1].index}, of another term")
            if isinstance(effect, Commit) or (isinstance(effect, Persist) and isinstance(effect.records[0], Appended)):
                if stale:
                    raise Violation(f"terms: {raft!r} takes what a leader of an earlier term says")
                if isinstance(effect, Persist):
                    self._changing(raft, effect.records)

    def _changing(self, raft: RaftBase, records: tuple[Record, ...]) -> None:
        is_change = any(isinstance(r, Appended) and r.entries[0].kind is Kind.CONFIG for r in records)
        if raft.role is Role.LEADER and is_change and raft.log.term_at(raft.commit) != raft.term:
            raise Violation(f"members change before an entry of term {raft.term} is committed: {raft!r}")

    # ---- the properties ----------------------------------------------------------------------------------------------

    def _state(self, raft: RaftBase) -> None:
        term, commit = self._seen.get(raft.node, (0, 0))
        if raft.term < term or raft.commit < commit or raft.commit > raft.log.last_index:
            raise Violation(f"{raft!r} went back from term {term}, commit {commit}, or committed what it has not")
        self._seen[raft.node] = raft.term, raft.commit

    def _appending(self, raft: RaftBase, record: Appended) -> None:
        first = record.entries[0]
        own = raft.role is Role.LEADER and first.term == raft.term
        if own and first.index <= self._disks[raft.node].last:
            raise Violation(f"Leader Append-Only: {raft!r} replaces entry {first.index}")
        if first.index <= self._applied.get(raft.node, 0):
            raise Violation(f"State Machine Safety: {raft!r} replaces entry {first.index}, which it applied")

    def _vote(self, voter: NodeId, term: int, candidate: NodeId) -> None:
        first = self._votes.setdefault((voter, term), candidate)
        if first != candidate:
            raise Violation(f"one vote a term: {voter} votes for {candidate} in term {term}, after {first}")

    def _elected(self, raft: RaftBase, term: int) -> None:
        first = self.leaders.setdefault(term, raft.node)
        if first != raft.node:
            raise Violation(f"Election Safety: term {term} is led by {raft.node} and by {first}")
        self._vote(raft.node, term, raft.node)
        last = max((index for earlier, index in self._committed_in.items() if earlier < term), default=0)
        if last and self._disks[raft.node].at(last) != self._committed[last]:
            raise Violation(f"Leader Completeness: {raft!r} lacks entries committed in an earlier term (up to {last})")

    def _commit(self, raft: RaftBase, entries: tuple[Entry, ...]) -> None:
        history, applied = self._disks[raft.node], self._applied.get(raft.node)
        if applied is not None and entries[0].index != applied + 1:
            raise Violation(f"State Machine Safety: {raft!r} applies entry {entries[0].index} after {applied}")
        last = self._applied[raft.node] = entries[-1].index
        for entry in entries:
            identity = history.at(entry.index)
            if identity is None:
                raise Violation(f"durability: {raft!r} applies entry {entry.index}, which its disk lacks")
            if self._committed.setdefault(entry.index, identity) != identity:
                raise Violation(f"State Machine Safety: {raft!r} applies another entry {entry.index} than others did")
            self.entries.setdefault(entry.index, entry)
        self.committed_last = max(self.committed_last, last)
        if raft.role is Role.LEADER:
            self._committed_in[raft.term] = last
            configs = raft.log.configs_from(last)
            if not any(sum(self._holds(node, last) for node in config.voters) >= config.quorum for config in configs):
                raise Violation(f"durability: entry {last} is committed but not on a majority's disks")

    def _holds(self, node: NodeId, index: int) -> bool:
        """Whether the committed log up to index is on the node's disk, as entries or in a snapshot."""
        history = self._disks.get(node)
        if history is None or index > history.last:
            return False
        return index < history.base or history.at(index) == self._committed[index]

    def _snapshot(self, node: NodeId, snapshot: Snapshot) -> None:
        if snapshot.index > max(self.committed_last, 1):
            raise Violation(f"State Machine Safety: {node} applies a snapshot of uncommitted entry {snapshot.index}")
        self._applied[node] = snapshot.index

    # ---- histories ---------------------------------------------------------------------------------------------------

    def _on_disk(self, node: NodeId, record: Record) -> None:
        if isinstance(record, HardState):
            before = self._hard.get(node, HardState())
            if record.term < before.term or (record.term == before.term and before.vote not in (None, record.vote)):
                raise Violation(f"one vote a term: {node} goes from {before} to {record}")
            self._hard[node] = record
        else:
            self._extend(self._disks.setdefault(node, History()), record)

    def _extend(self, history: History, record: Appended | Snapshot) -> None:
        """Follow one record, and check Log Matching for what is new."""
        if isinstance(record, Snapshot):
            identity = self._known.setdefault((record.index, record.term), b"snapshot %d" % record.index)
            if history.at(record.index) != identity:
                history.base, history.chain = record.index, [identity]
            return
        first = record.entries[0].index
        before = history.at(first - 1)
        if before is None:
            raise Violation(f"Log Matching: a gap before entry {first}")
        del history.chain[first - history.base :]
        for entry in record.entries:
            before = _link(before, entry)
            if self._known.setdefault((entry.index, entry.term), before) != before:
                raise Violation(f"Log Matching: two logs differ up to entry {entry.index} of term {entry.term}")
            history.chain.append(before)


def matching(logs: Iterable[RaftBase]) -> None:
    """Log Matching by its definition, pair by pair, entry by entry: slow, for small groups and for trusting Checker."""
    members = list(logs)
    for position, one in enumerate(members):
        for other in members[position + 1 :]:
            _match_pair(one, other)


def _match_pair(one: RaftBase, other: RaftBase) -> None:
    agreed = False
    for index in range(min(one.log.last_index, other.log.last_index), max(one.log.base_index, other.log.base_index), -1):
        same_term = one.log.term_at(index) == other.log.term_at(index)
        if agreed and not same_term:
            raise Violation(f"Log Matching: {one!r} and {other!r} agree after entry {index} and not there")
        if same_term and one.log.slice(index, index) != other.log.slice(index, index):
            raise Violation(f"Log Matching: {one!r} and {other!r} hold different entries {index} of one term")
        agreed = agreed or same_term


