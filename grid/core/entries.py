"""Reading a stage's record for a replay: what is said of a range of tasks, whichever table says it. No I/O."""

from __future__ import annotations

from typing import NamedTuple

from grid.core import limits
from grid.core.facts import TaskFailed, Where
from grid.core.records import Done, Piece, StageRecord


class Entry(NamedTuple):
    """Recorded tasks [lo, hi) of a stage. turn: of `lo`; -1: none. what: (first, result, peer, elapsed_us), a failure, or None:
    no copy is left.
    """

    stage: int
    lo: int
    hi: int
    turn: int
    what: tuple[int, Where, bytes, int] | TaskFailed | None

    def part(self, lo: int, hi: int) -> Entry:
        return Entry(self.stage, lo, hi, self.turn if self.turn < 0 else self.turn + lo - self.lo, self.what)

    def is_followed_by(self, other: Entry) -> bool:
        """Whether both are one range of one result."""
        if (self.stage, self.hi) != (other.stage, other.lo) or isinstance(self.what, TaskFailed) or self.what != other.what:
            return False
        return other.turn == (self.turn if self.turn < 0 else self.turn + self.hi - self.lo)


def first_segment(record: StageRecord) -> tuple[int, bytes] | None:
    piece = record.segments.starting(0)
    return None if piece is None else (piece.count, piece.digest)


def known_count(record: StageRecord) -> int:
    """Tasks of which something is recorded, be it only that no copy of their results is left: their turns are to be taken."""
    tables = (record.results, record.left_results, record.lost)
    return sum(table.count for table in tables if table is not None) + len(record.failures)


def pieces(record: StageRecord, lo: int = 0, hi: int = limits.TASKS_MAX) -> list[Piece]:
    """Segments that hold some of [lo, hi), also what is left of voided ones."""
    return [*record.segments.of(lo, hi), *(record.left_segments.of(lo, hi) if record.left_segments is not None else ())]


def entries(record: StageRecord, lo: int = 0, hi: int = limits.TASKS_MAX) -> list[Entry]:
    """What is recorded of [lo, hi), also of what is left of voided segments, in order of the tasks."""
    dones: list[Done] = record.results.of(lo, hi)
    if record.left_results is not None:
        dones += record.left_results.of(lo, hi)
    stage = record.index
    found = [Entry(stage, a, b, turn, (first, result, peer, us)) for a, b, first, result, peer, us, turn in dones]
    if record.lost is not None:
        found += [Entry(stage, done.lo, done.hi, done.turn, None) for done in record.lost.of(lo, hi)]
    for a, b in record.failed.intersect(lo, hi) if record.failed else ():
        facts = map(record.failures.__getitem__, range(a, b))
        found += [Entry(stage, fact.index, fact.index + 1, fact.turn, fact) for fact in facts]
    if record.lost is not None or record.failed or record.left_results is not None:
        found.sort(key=lambda entry: entry.lo)
    return found
