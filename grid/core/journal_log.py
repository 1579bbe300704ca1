"""A Raft log as a journal tells it: the fold of its records, and a reader of whole files.

Rules (Ongaro's dissertation, 3.5, 3.6 and 5): indexes have no gap; terms never fall; a conflicting suffix is cut before what
replaces it is appended; a snapshot stands for all entries up to its index. What breaks them is a ValueError: from a caller
a fault, in a file damage. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grid.core.journal_frames import Buffer, Ending, Frame, JournalReader
from grid.core.journal_records import Cut, Entry, Header, Mark, Record, Snapshot, from_frame


@dataclass(slots=True)
class Outline:
    """A log without its data: the snapshot's place, and the entries' terms by runs of (first index, term)."""

    base_index: int = 0
    base_term: int = 0
    last_index: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> Outline:
        return Outline(self.base_index, self.base_term, self.last_index, list(self.runs))

    @property
    def last_term(self) -> int:
        return self.runs[-1][1] if self.runs else self.base_term

    def term_at(self, index: int) -> int | None:
        """The term of the entry, or of the snapshot, at `index`; None if the log knows it not."""
        if index == self.base_index:
            return self.base_term
        if not self.base_index < index <= self.last_index:
            return None
        return next(term for first, term in reversed(self.runs) if first <= index)

    def apply(self, record: Record) -> None:
        """ValueError, and no change, if the record doesn't follow."""
        if isinstance(record, Cut):
            if not self.base_index < record.index <= self.last_index:
                raise ValueError(f"no entry {record.index} to cut at: the log has {self.base_index + 1} to {self.last_index}")
            self.last_index = record.index - 1
            while self.runs and self.runs[-1][0] >= record.index:
                self.runs.pop()
            return
        index, term = record.index, record.term
        if index != self.last_index + 1:
            raise ValueError(f"entry {index} does not follow entry {self.last_index}")
        if term < max(self.last_term, 1):
            raise ValueError(f"entry {index} has term {term}, less than the term before it")
        if term != self.last_term or not self.runs:
            self.runs.append((index, term))
        self.last_index = index

    def rebase(self, index: int, term: int) -> None:
        """A snapshot up to `index`. Entries after it stay if the log has that entry, with that term (Raft, figure 13, 6 to 7)."""
        if index <= self.base_index or term < max(self.base_term, 1):
            raise ValueError(f"a snapshot at {index} is older than the one at {self.base_index}")
        if self.term_at(index) == term:
            kept = [(max(first, index + 1), run) for first, run in self.runs]
            ends = [first for first, _ in self.runs[1:]] + [self.last_index + 1]
            self.runs = [run for run, end in zip(kept, ends, strict=True) if end > index + 1]
        else:
            self.runs = []
            self.last_index = index
        self.base_index, self.base_term = index, term


class Log:
    """What a file's records come to."""

    def __init__(self) -> None:
        self.outline = Outline()
        self.snapshot: Snapshot | None = None
        self.entries: list[Entry] = []

    def apply(self, record: Entry | Cut | Snapshot) -> None:
        """ValueError if the record doesn't follow those before it."""
        if isinstance(record, Snapshot):
            self.outline.rebase(record.index, record.term)
            self.snapshot = record
            count = self.outline.last_index - record.index
            self.entries = self.entries[len(self.entries) - count :]
            return
        self.outline.apply(record)
        if isinstance(record, Cut):
            del self.entries[self.outline.last_index - self.outline.base_index :]
        else:
            self.entries.append(record)


class LogReader:
    """Is fed a log file from its start; holds what can be trusted of it."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.log = Log()
        self._reader = JournalReader()
        self._nonsense = ""

    def feed(self, data: Buffer) -> None:
        for frame in self._reader.feed(data):
            if not self._nonsense:
                self._take(frame)

    def finish(self, mark: Mark | None = None) -> Ending:
        """The verdict; of a mark only what it says of this very file counts."""
        good = self._reader.good_bytes
        if self._nonsense:
            return Ending("damaged", good, self._nonsense)
        if mark is None or self.header is None or mark.generation < self.header.generation:
            return self._reader.finish()
        if mark.generation > self.header.generation:
            return Ending("damaged", good, "an older file stands in the place of a newer one")
        return self._reader.finish(mark.synced_bytes)

    def _take(self, frame: Frame) -> None:
        try:
            record = from_frame(frame)
            if isinstance(record, Header) == (self.header is not None):
                raise ValueError("it doesn't begin with its one header")
            if isinstance(record, Header):
                self.header = record
            else:
                self.log.apply(record)
        except ValueError as error:
            self._nonsense = str(error)
