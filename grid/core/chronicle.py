"""What a job's replicas know: the fold of the facts that its log committed.

Rules this file keeps:
- the same facts give the same state and the same bytes of `snapshot`, also when the fold was snapshotted and restored midway;
- a committed fact never raises: what makes no sense is ignored and counted, what comes too late is ignored;
- a task is done, failed or cancelled once: the first fact counts, until it is declared anew or `Redo` opens it again;
- the results of a driver's unordered stages have *turns*: numbers that grow as they are recorded, and stay theirs when they are
  recorded again elsewhere or made again. By them a replay repeats the order of delivery.
No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from grid.core import chronicle_snapshot, facts, limits, records
from grid.core.facts import AnyFact, Stored, Where
from grid.core.ranges import Range
from grid.core.rangetable import Row
from grid.core.records import NUMBER_MAX, Names, Results, Segments, StageRecord

FDS: Final = (1, 2)
OUTPUT_KEPT_BYTES: Final = 4 << 20
"""Of a driver's output in its record: most jobs write less. Longer output is fetched from another replica."""
TOLD_MAX: Final = 10_000
"""Things said once: far more than any job has to say."""


class Chronicle:
    """inline_bytes: results and arguments that the record itself holds. tallies: tasks done by each peer. ignored: facts that
    made no sense. done_count: tasks whose results are known.
    """

    def __init__(self) -> None:
        self.stages: dict[int, StageRecord] = {}
        self.next_stage = 0
        self.output_length: dict[int, int] = dict.fromkeys(FDS, 0)
        self.output: dict[int, bytearray] = {fd: bytearray() for fd in FDS}
        """The first OUTPUT_KEPT_BYTES of both: who is brought up by a snapshot has them; of more only the length is told."""
        self.outcome: bytes | None = None
        self.told: set[str] = set()
        self.tallies: dict[bytes, int] = {}
        self.inline_bytes = 0
        self.done_count = 0
        self.next_turn = 0
        self.ignored = 0
        self.names = Names()
        self._apply: dict[type, Callable[[Any], bool]] = {
            facts.StageOpened: self._opened,
            facts.SegmentsCut: self._cut,
            facts.StageClosed: self._closed,
            facts.RangeDone: self._done,
            facts.TaskFailed: self._failed,
            facts.RangeCancelled: self._cancelled,
            facts.Redo: self._redo,
            facts.Output: self._output,
            facts.Ended: self._ended,
            facts.Told: self._told,
        }

    def apply(self, fact: AnyFact) -> None:
        """The next committed fact."""
        if not self._apply[type(fact)](fact):
            self.ignored += 1

    def snapshot(self) -> bytes:
        """All of it."""
        return chronicle_snapshot.encode(self)

    @classmethod
    def restore(cls, data: bytes) -> Chronicle:
        """Raises CodecError unless `snapshot` made it."""
        return chronicle_snapshot.restore(data, cls())

    def blobs(self) -> Iterator[Stored]:
        """Each blob that results or kept arguments lie in, once, as a whole."""
        used: dict[int, None] = {}
        for stage in self.stages.values():
            for table, column in ((stage.segments, 3), (stage.results, 1), (stage.left_segments, 3), (stage.left_results, 1)):
                for row in table or ():
                    used[row.columns[column]] = None
        used.pop(records.NOWHERE, None)
        for number in used:
            blob, size, peers = self.names.blobs[number]
            yield Stored(blob, size, 0, size, peers)

    def results_in(self, blob: bytes) -> list[tuple[int, int, int]]:
        """(stage, lo, hi) of the results that lie in that blob: what runs again when no copy of it is left."""
        numbers = {number for number, named in enumerate(self.names.blobs) if named[0] == blob}
        if not numbers:
            return []
        return [
            (stage.index, row.lo, row.hi)
            for stage in self.stages.values()
            for table in (stage.results, stage.left_results)
            for row in table or ()
            if row.columns[1] in numbers
        ]

    # ---- stages ----

    def _opened(self, fact: facts.StageOpened) -> bool:
        if fact.stage in self.stages or not 0 <= fact.stage < NUMBER_MAX:
            return False
        self.stages[fact.stage] = StageRecord(
            self.names,
            fact.stage,
            fact.function,
            fact.function_size,
            fact.name,
            fact.ordered,
            fact.options,
            fact.parent,
        )
        self.next_stage = max(self.next_stage, fact.stage + 1)
        return True

    def _cut(self, fact: facts.SegmentsCut) -> bool:
        stage = self.stages.get(fact.stage)
        if stage is None or not fact.pieces or not _sane(fact.arguments):
            return False
        end, total = fact.first, 0
        for count, size, digest in fact.pieces:
            if count <= 0 or not 0 <= size < NUMBER_MAX or len(digest) != facts.DIGEST_BYTES:
                return False
            end += count
            total += size
        if fact.first < 0 or end > limits.TASKS_MAX:
            return False
        if stage.left_segments is not None or not stage.segments.is_free(fact.first, end):
            before = stage.weight
            self._void(stage, fact.first, end)
            self.inline_bytes += stage.weight - before
        if stage.total is not None and end > stage.total:
            stage.total = None
        given = fact.arguments if fact.arguments is not None and _length(fact.arguments) == total else None
        if isinstance(given, bytes):
            self.inline_bytes += total
        at, offset = fact.first, 0
        for count, size, digest in fact.pieces:
            arguments = _part(given, offset, size) if given is not None else None
            stage.segments.record(at, at + count, at, count, size, digest, arguments)
            at += count
            offset += size
        stage.declared.add(fact.first, end)
        if stage.cancelled:
            stage.cancelled_ranges.add(fact.first, end)
        return True

    def _closed(self, fact: facts.StageClosed) -> bool:
        stage = self.stages.get(fact.stage)
        if stage is None or not 0 <= fact.total <= limits.TASKS_MAX:
            return False
        before = stage.weight
        self._void(stage, fact.total, limits.TASKS_MAX)
        stage.total = fact.total
        self.inline_bytes += stage.weight - before
        return True

    def _void(self, stage: StageRecord, lo: int, hi: int) -> None:
        """[lo, hi) is declared anew: forget the segments that it overlaps, whole. Their tasks outside of it are put by."""
        for table in (stage.left_segments, stage.left_results):
            if table is not None:
                table.cut(lo, hi)
        overlapped = stage.segments.overlapping(lo, hi)
        if not overlapped:
            return
        first, last = overlapped[0].lo, overlapped[-1].hi
        stage.declared.remove(first, last)
        stage.cancelled_ranges.remove(first, last)
        if stage.lost is not None:
            stage.lost.cut(first, last)
        for lo_failed, hi_failed in stage.failed.remove(first, last):
            for index in range(lo_failed, hi_failed):
                del stage.failures[index]
        self._forget(stage.results.between(first, last), stage)
        for a, b in ((first, lo), (hi, last)):
            if a < b:
                if stage.left_segments is None or stage.left_results is None:
                    stage.left_segments, stage.left_results = Segments(self.names), Results(self.names)
                for row in stage.segments.cut(a, b):
                    stage.left_segments.put(*row)
                for row in stage.results.cut(a, b):
                    stage.left_results.put(*row)
        stage.segments.cut(first, last)
        stage.results.cut(first, last)

    def _forget(self, rows: list[Row], stage: StageRecord) -> None:
        """Their tasks are not done any more."""
        for row in rows:
            done = stage.results.read(row)
            self.done_count -= done.hi - done.lo
            self.tallies[done.peer] -= done.hi - done.lo
            if not self.tallies[done.peer]:
                del self.tallies[done.peer]

    # ---- tasks ----

    def _done(self, fact: facts.RangeDone) -> bool:
        stage = self.stages.get(fact.stage)
        lo, hi, result = fact.lo, fact.hi, fact.result
        if stage is None or not 0 <= lo < hi <= limits.TASKS_MAX or not -NUMBER_MAX < fact.first <= lo or not _sane(result):
            return False
        if not 0 <= fact.elapsed_us < NUMBER_MAX:
            return False
        parts: list[Range] = [(lo, hi)]
        if stage.failed or stage.cancelled_ranges or not stage.declared.covers(lo, hi) or not stage.results.is_free(lo, hi):
            parts = self._open_parts(stage, lo, hi, fact.turn)
            if not parts:
                return stage.declared.covers(lo, hi)
        size = len(result) if isinstance(result, bytes) else 0
        for a, b in parts:
            for c, d, turn in self._turns(stage, lo, a, b, fact.turn):
                stage.results.record(c, d, fact.first, result, fact.peer, fact.elapsed_us, turn)
                self.inline_bytes += size
            self.done_count += b - a
            self.tallies[fact.peer] = self.tallies.get(fact.peer, 0) + b - a
        return True

    def _open_parts(self, stage: StageRecord, lo: int, hi: int, turn: int) -> list[Range]:
        """The parts of [lo, hi) that are declared and neither done nor failed nor cancelled. What has its turn already was done
        before it was cancelled.
        """
        parts = [gap for a, b in stage.declared.intersect(lo, hi) for gap in stage.results.gaps(a, b)]
        if stage.failed:
            parts = [gap for a, b in parts for gap in stage.failed.gaps(a, b)]
        if stage.cancelled_ranges:
            if turn >= 0 and stage.queues:
                for a, b in parts:
                    stage.cancelled_ranges.remove(a, b)
            else:
                parts = [gap for a, b in parts for gap in stage.cancelled_ranges.gaps(a, b)]
        return parts

    def _turns(self, stage: StageRecord, lo: int, a: int, b: int, turn: int) -> list[tuple[int, int, int]]:
        """Give the tasks [a, b) of [lo, …) their turns: (from, to, turn) in order."""
        if stage.ordered or stage.parent is not None:
            return [(a, b, -1)]
        if stage.lost is None and turn < 0:
            return [(a, b, self._next_turn(b - a))]
        if 0 <= turn < NUMBER_MAX // 2:
            self.next_turn = max(self.next_turn, turn + b - lo)
            if stage.lost is not None:
                stage.lost.cut(a, b)
            return [(a, b, turn + a - lo)]
        given = []
        if stage.lost is not None:
            for row in stage.lost.cut(a, b):
                lost = stage.lost.read(row)
                if a < lost.lo:
                    given.append((a, lost.lo, self._next_turn(lost.lo - a)))
                given.append((lost.lo, lost.hi, lost.turn))
                a = lost.hi
        if a < b:
            given.append((a, b, self._next_turn(b - a)))
        return given

    def _next_turn(self, count: int) -> int:
        turn = self.next_turn
        self.next_turn += count
        return turn

    def _failed(self, fact: facts.TaskFailed) -> bool:
        stage = self.stages.get(fact.stage)
        if stage is None or fact.index not in stage.declared:
            return False
        if not self._open_parts(stage, fact.index, fact.index + 1, fact.turn):
            return True
        ((_, _, turn),) = self._turns(stage, fact.index, fact.index, fact.index + 1, fact.turn)
        stage.failed.add(fact.index, fact.index + 1)
        stage.failures[fact.index] = fact if fact.turn == turn else msgspec.structs.replace(fact, turn=turn)
        return True

    def _cancelled(self, fact: facts.RangeCancelled) -> bool:
        stage = self.stages.get(fact.stage)
        if stage is None or fact.lo < 0 or not -1 <= fact.hi <= limits.TASKS_MAX or -1 < fact.hi <= fact.lo:
            return False
        hi = fact.hi if fact.hi >= 0 else limits.TASKS_MAX
        if fact.hi < 0:
            stage.cancelled = True
        if fact.lo < hi:
            for a, b in self._open_parts(stage, fact.lo, hi, -1):
                stage.cancelled_ranges.add(a, b)
        return True

    def _redo(self, fact: facts.Redo) -> bool:
        stage = self.stages.get(fact.stage)
        if stage is None or not 0 <= fact.lo < fact.hi <= limits.TASKS_MAX:
            return False
        before = stage.weight
        rows = stage.results.cut(fact.lo, fact.hi)
        self._forget(rows, stage)
        if stage.left_results is not None:
            stage.left_results.cut(fact.lo, fact.hi)
        if stage.queues and rows:
            if stage.lost is None:
                stage.lost = Results(self.names)
            for row in rows:
                lost = stage.results.read(row)
                stage.lost.record(lost.lo, lost.hi, 0, None, lost.peer, 0, lost.turn)
        self.inline_bytes += stage.weight - before
        return True

    # ---- the job ----

    def _output(self, fact: facts.Output) -> bool:
        if self.output_length.get(fact.fd) != fact.at:
            return False
        self.output_length[fact.fd] += len(fact.data)
        kept = self.output[fact.fd]
        if len(kept) == fact.at and sum(map(len, self.output.values())) + len(fact.data) <= OUTPUT_KEPT_BYTES:
            kept += fact.data
        return True

    def _ended(self, fact: facts.Ended) -> bool:
        if self.outcome is None:
            self.outcome = fact.outcome
        return True

    def _told(self, fact: facts.Told) -> bool:
        if len(self.told) >= TOLD_MAX:
            return False
        self.told.add(fact.key)
        return True


def _sane(where: Where) -> bool:
    """Whether a blob's numbers are such as its bytes could have."""
    if not isinstance(where, Stored):
        return True
    return 0 <= where.offset <= where.offset + where.size <= where.blob_size < NUMBER_MAX and where.size >= 0


def _length(where: Where) -> int:
    return where.size if isinstance(where, Stored) else len(where or b"")


def _part(where: Where, offset: int, size: int) -> Where:
    if isinstance(where, Stored):
        return Stored(where.blob, where.blob_size, where.offset + offset, size, where.peers)
    return None if where is None else where[offset : offset + size]
