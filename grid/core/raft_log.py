"""A member's log in memory, and the fold of journal records that it starts from.

Rules:
- indexes count from 1 without gaps; `term_at` knows every entry kept and the one before the first (the base);
- a snapshot replaces what it covers; some entries before it stay in memory for followers that are a moment behind;
- the configuration in force is the latest one in the log, committed or not; cutting the log falls back to the one before;
- what is committed is never cut: an attempt raises InvariantError.
"""

from __future__ import annotations

from collections.abc import Iterable

from grid.core.raft_limits import LOG_TRAIL_BYTES_MAX
from grid.core.raft_messages import Appended, Config, Entry, HardState, Kind, NodeId, Record, Snapshot


class InvariantError(Exception):
    """Something happened that the protocol's proof excludes: a bug, a journal that lost what it promised, or a lie."""


class Durable:
    """What a member's journal says: hard state, snapshot, log. A fold of the records in the order they were written.

    Invariants: entries are contiguous, beginning with snapshot.index + 1.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.hard = HardState()
        self.snapshot = Snapshot()
        self.entries: list[Entry] = []
        for record in records:
            self.apply(record)

    @property
    def last_index(self) -> int:
        """Of the log, the snapshot counted."""
        return self.snapshot.index + len(self.entries)

    def apply(self, record: Record) -> None:
        """One more record. Raises InvariantError when it can't follow the others: the journal is damaged."""
        match record:
            case HardState():
                if record.term < self.hard.term:
                    raise InvariantError(f"the journal goes back from term {self.hard.term} to {record.term}")
                self.hard = record
            case Appended():
                position = record.entries[0].index - self.snapshot.index - 1
                if not 0 <= position <= len(self.entries):
                    raise InvariantError(f"the journal has a gap before entry {record.entries[0].index}")
                self.entries[position:] = record.entries
            case Snapshot():
                if record.index < self.snapshot.index:
                    raise InvariantError(f"the journal goes back to a snapshot of entry {record.index}")
                keep = record.index - self.snapshot.index
                at_end = self.snapshot.term if keep == 0 else self.entries[keep - 1].term if keep <= len(self.entries) else 0
                held = at_end == record.term
                self.entries = self.entries[keep:] if held else []
                self.snapshot = record

    def records(self) -> tuple[Record, ...]:
        """The shortest journal that folds to this: what a journal is rewritten to."""
        entries: tuple[Record, ...] = (Appended(tuple(self.entries)),) if self.entries else ()
        snapshot: tuple[Record, ...] = (self.snapshot,) if self.snapshot.index else ()
        return (self.hard, *snapshot, *entries)


def founding(config: Config, leader: NodeId, data: bytes = b"", payloads: tuple[bytes, ...] = ()) -> tuple[Record, ...]:
    """What every first member's journal begins with: term 1, a vote for its appointed leader, the first configuration and
    state as a snapshot of entry 1, entries that follow it. The order matters: a journal cut in between promises less, not
    more."""
    entries = tuple(Entry(index, 1, Kind.DATA, payload) for index, payload in enumerate(payloads, 2))
    appended: tuple[Record, ...] = (Appended(entries),) if entries else ()
    return HardState(1, leader), Snapshot(1, 1, config, data), *appended


class RaftLog:
    """The log of one member. base ≤ snapshot.index ≤ last_index; configs: (index, Config) of CONFIG entries kept after
    the snapshot, ascending."""

    def __init__(self, durable: Durable) -> None:
        self.snapshot = durable.snapshot
        self.trail_bytes_max = LOG_TRAIL_BYTES_MAX
        self._base_index = durable.snapshot.index
        self._base_term = durable.snapshot.term
        self._entries: list[Entry] = list(durable.entries)
        self._configs = [(entry.index, entry.config) for entry in self._entries if entry.kind is Kind.CONFIG]
        self.bytes_after_snapshot = sum(entry.size_bytes for entry in self._entries)

    @property
    def base_index(self) -> int:
        """The entry before the first that is kept."""
        return self._base_index

    @property
    def last_index(self) -> int:
        """Of the last entry, or of the snapshot."""
        return self._base_index + len(self._entries)

    @property
    def last_term(self) -> int:
        """Of the last entry, or of the snapshot."""
        return self._entries[-1].term if self._entries else self._base_term

    @property
    def config(self) -> Config:
        """The latest configuration in the log: the one in force (section 4.1)."""
        return self._configs[-1][1] if self._configs else self.snapshot.config

    @property
    def config_index(self) -> int:
        """Where it stands."""
        return self._configs[-1][0] if self._configs else self.snapshot.index

    def config_at(self, index: int) -> Config:
        """The configuration that was the latest at `index`, from the snapshot on."""
        for position, config in reversed(self._configs):
            if position <= index:
                return config
        return self.snapshot.config

    def configs_from(self, index: int) -> list[Config]:
        """All that were in force since the log ended at `index`."""
        return [self.config_at(index), *(config for position, config in self._configs if position > index)]

    def term_at(self, index: int) -> int | None:
        """The term of an entry, None when it is not kept (any more or yet)."""
        position = index - self._base_index
        if not 0 <= position <= len(self._entries):
            return None
        return self._entries[position - 1].term if position else self._base_term

    def slice(self, first: int, last: int) -> tuple[Entry, ...]:
        """Entries [first, last], all of which must be kept."""
        if not self._base_index < first or last > self.last_index:
            raise InvariantError(f"entries {first} to {last} are asked for, {self._base_index + 1} to {self.last_index} are kept")
        return tuple(self._entries[first - self._base_index - 1 : last - self._base_index])

    def batch(self, first: int, entries_max: int, bytes_max: int) -> tuple[Entry, ...]:
        """Entries from `first` on within both limits, but at least one if there is one."""
        start = first - self._base_index - 1
        batch = self._entries[start : start + entries_max]
        size = 0
        for number, entry in enumerate(batch):
            size += entry.size_bytes
            if size > bytes_max and number:
                return tuple(batch[:number])
        return tuple(batch)

    def up_to_date(self, last_term: int, last_index: int) -> bool:
        """Whether a log that ends there is at least as up-to-date as this one (section 3.6.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def agree_at_most(self, index: int, term: int) -> int:
        """The last index ≤ `index` whose term is ≤ `term`: logs whose term at `index` is `term` can't agree later.

        Terms only grow along a log. base_index - 1 (at least 0) when even the base is of a later term.
        """
        index = min(index, self.last_index)
        while index > self._base_index:
            entry_term = self.term_at(index)
            if entry_term is not None and entry_term <= term:
                return index
            index -= 1
        if index == self._base_index and self._base_term > term:
            return max(0, index - 1)
        return index

    def append(self, entries: tuple[Entry, ...], commit: int) -> None:
        """Put entries in, cutting what stood from the first one's index on. Nothing up to `commit` may be cut."""
        first = entries[0].index
        if first <= commit or not self._base_index < first <= self.last_index + 1:
            raise InvariantError(f"entries from {first} on would replace committed ones or leave a gap ({commit=})")
        position = first - self._base_index - 1
        self.bytes_after_snapshot -= sum(entry.size_bytes for entry in self._entries[position:])
        self._entries[position:] = entries
        while self._configs and self._configs[-1][0] >= first:
            self._configs.pop()
        for entry in entries:
            self.bytes_after_snapshot += entry.size_bytes
            if entry.kind is Kind.CONFIG:
                self._configs.append((entry.index, entry.config))

    def compact(self, snapshot: Snapshot) -> None:
        """The state after a committed entry of this log is on disk: entries up to it may go, but for a short trail."""
        if self.term_at(snapshot.index) != snapshot.term:
            raise InvariantError(f"a snapshot of entry {snapshot.index} is not of this log")
        self.bytes_after_snapshot = 0
        keep = trail_bytes = 0
        for entry in reversed(self._entries):
            if entry.index > snapshot.index:
                self.bytes_after_snapshot += entry.size_bytes
            else:
                trail_bytes += entry.size_bytes
                if trail_bytes > self.trail_bytes_max:
                    break
            keep += 1
        drop = len(self._entries) - keep
        if drop:
            self._base_index, self._base_term = self._entries[drop - 1].index, self._entries[drop - 1].term
            del self._entries[:drop]
        self._configs = [(index, config) for index, config in self._configs if index > snapshot.index]
        self.snapshot = snapshot

    def install(self, snapshot: Snapshot) -> None:
        """A leader's snapshot that this log has no entry for: the whole log is superseded (section 5.1)."""
        self._base_index, self._base_term = snapshot.index, snapshot.term
        self._entries, self._configs, self.bytes_after_snapshot = [], [], 0
        self.snapshot = snapshot
