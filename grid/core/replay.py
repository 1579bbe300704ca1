"""What of a job's record a driver that is started anew may take over: stages, results, the order of delivery.

Rules this file keeps:
- a stage goes on with a recorded stage of the same function, ordered or not, of the same parent; each recorded one once;
- a segment recorded alike (same stage, first task, count, digest) has its recorded results;
- of other segments, submitted calls match item by item (grid/core/items.py): first what was recorded under the same number, then
  anything recorded of calls of that function (and parent), lowest turn first, whatever stage, cut or thread it came in;
- the result of a call is taken once: of n recorded equal calls n have theirs, in whatever order they come;
- items of other kinds match by their place alone; where their bytes differ the driver compares them (`Differing`, `compared`).
The record is a copy: the chronicle goes on changing. No I/O: bytes in blobs are asked for by `needed_for`, given by `supply`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import msgspec

from grid.api.serialize import CALL
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.entries import Entry, entries, first_segment, known_count, pieces
from grid.core.facts import RangeDone, Stored, TaskFailed
from grid.core.items import Keys, kind_of
from grid.core.order import Offer, Order
from grid.core.pool import Arguments, Call, Pool
from grid.core.ranges import Range, RangeSet
from grid.core.records import StageRecord

Parent: TypeAlias = tuple[int, int] | None
Kind: TypeAlias = tuple[bytes, bool, Parent]
"""Of a stage: function, whether ordered, parent."""


class Reuse(NamedTuple):
    """Tasks [lo, hi) have a recorded result: `result`, cut to what was tasks from `source_first` on of stage `result.stage`.

    fact: what records it under the present numbers, unless the segment was recorded alike.
    """

    lo: int
    hi: int
    result: RangeDone | TaskFailed
    source_first: int
    fact: RangeDone | TaskFailed


@dataclass(frozen=True, slots=True)
class Differing:
    """Recorded tasks [lo, hi) of the segment [first, first + count) whose bytes differ from those at the same place now."""

    lo: int
    hi: int
    first: int
    count: int
    arguments: bytes | Stored
    results: tuple[RangeDone | TaskFailed, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """same: recorded alike, no fact is needed. cancelled: of a segment recorded alike, what the driver did not want any more."""

    same: bool
    reuse: list[Reuse] = field(default_factory=list)
    compare: list[Differing] = field(default_factory=list)
    cancelled: list[Range] = field(default_factory=list)


class Replay:
    """One epoch's look at what earlier ones recorded."""

    def __init__(self, chronicle: Chronicle) -> None:
        self._stages = {index: stage.copy() for index, stage in sorted(chronicle.stages.items())}
        self._kinds: dict[int, Kind] = {}
        self._free: dict[Kind, list[int]] = {}
        self._arguments = Arguments()
        self._pools: dict[tuple[bytes, Parent], Pool] = {}
        self._used: dict[int, RangeSet] = {}
        self._used_turns = RangeSet()
        self._strayed: dict[int, RangeSet] = {}
        self._siblings: dict[Kind, list[int]] = {}
        self._called: set[int] = set()
        self._passed: dict[tuple[bytes, Parent], int] = {}
        turns = RangeSet()
        for index, stage in self._stages.items():
            kind = self._kinds[index] = (stage.function, stage.ordered, stage.parent)
            self._free.setdefault(kind, []).append(index)
            self._siblings.setdefault(kind, []).append(index)
            for entry in entries(stage) if stage.queues else ():
                if entry.what is not None:
                    turns.add(entry.turn, entry.turn + entry.hi - entry.lo)
        for stage in self._stages.values():
            if stage.lost is not None:
                turns.update(self._lost(stage, turns))
        self.order: Order[Any] = Order(turns)

    def _lost(self, stage: StageRecord, turns: RangeSet) -> list[Range]:
        """The turns of tasks whose results no one has. Those recorded elsewhere since are forgotten here."""
        assert stage.lost is not None
        found: list[Range] = []
        for lost in list(stage.lost.all()):
            end = lost.turn + lost.hi - lost.lo
            found += turns.gaps(lost.turn, end)
            for a, b in turns.intersect(lost.turn, end):
                lo, hi = lost.lo + a - lost.turn, lost.lo + b - lost.turn
                stage.lost.cut(lo, hi)
                self._strayed.setdefault(stage.index, RangeSet()).add(lo, hi)
        return found

    # ---- stages ----

    def open(
        self,
        function: bytes,
        name: str,
        ordered: bool,
        parent: Parent,
        options: StageOptions,
        first: tuple[int, bytes] | None,
    ) -> int | None:
        """The recorded stage that this one goes on with: the one whose first segment is `first` (count, digest), else the
        lowest. None: it is new, tell its number by `opened`. An empty stage (`first` is None) goes on with an empty one only.
        """
        free = self._free.get((function, ordered, parent), [])
        for index in free:
            if first_segment(self._stages[index]) == first:
                free.remove(index)
                return index
        return free.pop(0) if free and first is not None else None

    def opened(self, stage: int, function: bytes, ordered: bool, parent: Parent) -> None:
        """A stage that is not in the record has this number."""
        self._kinds[stage] = (function, ordered, parent)

    # ---- segments ----

    def is_alike(self, stage: int, first: int, count: int, digest: bytes) -> bool:
        """Whether this segment was recorded, at this place."""
        record = self._stages.get(stage)
        piece = record.segments.starting(first) if record is not None else None
        return piece is not None and (piece.count, piece.digest) == (count, digest)

    def segment(self, stage: int, first: int, count: int, digest: bytes, data: bytes | None) -> Verdict:
        """Tasks [first, first + count) are declared now. data: the segment's bytes, if they are at hand; without them only a
        single item matches elsewhere. What `needed_for` names should be at hand. Tasks that `reuse` leaves out are to be run.
        """
        record = self._stages.get(stage)
        end = first + count
        known = entries(record, first, end) if record is not None else []
        cancelled = record.cancelled_ranges.intersect(first, end) if record is not None else []
        alike = self.is_alike(stage, first, count, digest)
        is_call = self._is_call(stage, count, data)
        if is_call:
            self._called.add(stage)
        if alike and not (is_call and self._looks_elsewhere(stage, first, end)):
            return Verdict(True, self._take(stage, [(entry.lo, entry) for entry in known]), [], cancelled)
        reuse: list[Reuse] = []
        keys = self._arguments.keys_of(count, digest, data) if is_call else None
        if keys is not None:
            reuse = self._take(stage, self._match(stage, first, keys))
            own = sum(one.hi - one.lo for one in reuse if (one.result.stage, one.source_first) == (stage, one.lo))
            if alike and own == sum(one.hi - one.lo for one in reuse) == sum(entry.hi - entry.lo for entry in known):
                return Verdict(True, reuse, [], cancelled)
            unused = sum(entry.hi - entry.lo for entry in known if not self._is_used(entry))
            function, _, parent = self._kinds[stage]
            self._passed[function, parent] = self._passed.get((function, parent), 0) + unused
        compare = list(_differing(record, first, end, reuse)) if record is not None else []
        if record is not None and not compare and data and not is_call:
            self._strike(record, first, end)
        return Verdict(False, reuse, compare)

    def _is_call(self, stage: int, count: int, data: bytes | None) -> bool:
        """Whether a segment may match elsewhere."""
        return stage in self._kinds and not self._kinds[stage][1] and (kind_of(data) == CALL if data else count == 1)

    def _looks_elsewhere(self, stage: int, lo: int, hi: int) -> bool:
        """Whether tasks that were recorded alike have no result, or one that is taken, and some equal call's may be free."""
        record = self._stages[stage]
        known = entries(record, lo, hi)
        if any(map(self._is_used, known)) or (stage in self._strayed and self._strayed[stage].touches(lo, hi)):
            return True
        settled = sum(entry.hi - entry.lo for entry in known)
        if settled + sum(b - a for a, b in record.cancelled_ranges.intersect(lo, hi)) == hi - lo:
            return False
        function, _, parent = self._kinds[stage]
        return self._passed.get((function, parent), 0) > 0 or any(
            known_count(self._stages[index]) > (self._used[index].count if index in self._used else 0)
            for index in self._siblings[function, False, parent]
            if index != stage
        )

    def compared(self, stage: int, first: int, count: int, equal: Iterable[Range]) -> list[Reuse]:
        """The driver compared what `segment` found differing: tasks `equal` are what was recorded under their numbers.

        For the others' turns nobody waits any more: `order.ready()` says what that sets free.
        """
        record = self._stages.get(stage)
        if record is None:
            return []
        parts = RangeSet((max(lo, first), min(hi, first + count)) for lo, hi in equal if lo < first + count and first < hi)
        reuse = self._take(stage, [(entry.lo, entry) for lo, hi in parts for entry in entries(record, lo, hi)])
        self._strike(record, first, first + count)
        return reuse

    def cancel(self, stage: int, lo: int, hi: int) -> list[Offer[Any]]:
        """The driver wants tasks [lo, hi) no more; hi = -1: all, those declared later too. Returns what may be delivered now."""
        record = self._stages.get(stage)
        if hi < 0 and record is not None:
            self._strike(record, 0, limits.TASKS_MAX)
        return self.order.strike(stage, lo, hi if hi >= 0 else limits.TASKS_MAX)

    def close(self, stage: int, total: int) -> list[Offer[Any]]:
        """No task follows: of a map, nothing more that was recorded comes. Returns what may be delivered now."""
        record = self._stages.get(stage)
        if record is not None and stage not in self._called:
            self._strike(record, total, limits.TASKS_MAX)
        return self.order.ready()

    def unused(self, cancelled: Container[int]) -> int:
        """Recorded results of the driver's own calls that nothing took, though there were bytes to take; but for stages that
        were cancelled: how far a script gets before that is a matter of time. Nor submitted calls: a leader that died in the
        midst of its replay may have recorded one of them at two places, which is no other call.
        """
        unused = 0
        for index, stage in self._stages.items():
            if stage.parent is None and index not in cancelled and index not in self._called:
                bare = sum(done.hi - done.lo for done in stage.results.all() if done.result is None)
                used = self._used[index].count if index in self._used else 0
                unused += max(0, stage.results.count + len(stage.failures) - bare - used)
        return unused

    # ---- arguments ----

    def needed(self) -> list[Stored]:
        """All arguments of calls that lie in blobs and were not supplied. Neighbours in one blob come as one."""
        return self._lacking(None)

    def needed_for(self, stage: int, first: int, count: int, digest: bytes, data: bytes | None) -> list[Stored]:
        """What to fetch and `supply` before `segment` is called with the same arguments: mostly nothing."""
        if not self._is_call(stage, count, data):
            return []
        if self.is_alike(stage, first, count, digest) and not self._looks_elsewhere(stage, first, first + count):
            return []
        return self._lacking(self._kinds[stage])

    def _lacking(self, kind: Kind | None) -> list[Stored]:
        found: list[Stored] = []
        for index in self._stages if kind is None else self._siblings.get(kind, ()):
            record = self._stages[index]
            for piece in pieces(record) if not record.ordered else ():
                where = piece.arguments
                if piece.count == 1 or not isinstance(where, Stored) or self._arguments.is_settled(where):
                    continue
                last = found[-1] if found else None
                if last is not None and last.blob == where.blob and last.offset + last.size == where.offset:
                    found[-1] = msgspec.structs.replace(last, size=last.size + where.size)
                else:
                    found.append(where)
        return found

    def supply(self, stored: Stored, data: bytes | None) -> None:
        """The bytes that were asked for; None: they can't be had, what is in them won't match."""
        self._arguments.supply(stored, data)
        self._pools.clear()

    # ---- matching ----

    def _match(self, stage: int, first: int, keys: list[Keys]) -> Iterator[tuple[int, Entry]]:
        """(task, what was recorded of an equal one); neighbours that are neighbours in one result stay together."""
        here = self._here(stage, first, first + len(keys))
        run: tuple[int, Entry] | None = None
        for task, own in enumerate(keys, first):
            known, entry = here.get(task, ((), None))
            if entry is None or set(own).isdisjoint(known) or self._is_used(entry):
                entry = self._elsewhere(stage, own)
                if entry is None:
                    continue
            self._note(entry)
            if run is not None and run[0] + run[1].hi - run[1].lo == task and run[1].is_followed_by(entry):
                run = (run[0], run[1]._replace(hi=entry.hi))
                continue
            if run is not None:
                yield run
            run = (task, entry)
        if run is not None:
            yield run

    def _here(self, stage: int, lo: int, hi: int) -> dict[int, tuple[Keys, Entry]]:
        """What is recorded of calls under these numbers, by number."""
        found: dict[int, tuple[Keys, Entry]] = {}
        record = self._stages.get(stage)
        for piece in pieces(record, lo, hi) if record is not None else ():
            keys = self._arguments.keys(piece)
            if keys is not None:
                for entry in entries(self._stages[stage], max(lo, piece.lo), min(hi, piece.hi)):
                    for task in range(entry.lo, entry.hi):
                        found[task] = (keys[task - piece.first], entry.part(task, task + 1))
        return found

    def _elsewhere(self, stage: int, keys: Keys) -> Entry | None:
        function, _, parent = self._kinds[stage]
        pool = self._pools.get((function, parent))
        if pool is None:
            pool = self._pools[function, parent] = Pool(self._calls(function, parent))
        call = pool.take(keys, self._is_call_used)
        return None if call is None else entries(self._stages[call.stage], call.task, call.task + 1)[0]

    def _calls(self, function: bytes, parent: Parent) -> Iterator[tuple[Keys, Call]]:
        for index in self._siblings.get((function, False, parent), ()):
            record = self._stages[index]
            for piece in pieces(record):
                keys = self._arguments.keys(piece)
                if keys is not None:
                    for entry in entries(record, piece.lo, piece.hi):
                        for task in range(entry.lo, entry.hi):
                            turn = entry.turn if entry.turn < 0 else entry.turn + task - entry.lo
                            yield keys[task - piece.first], Call(turn, index, task)

    def _is_call_used(self, call: Call) -> bool:
        return call.turn in self._used_turns or (call.stage in self._used and call.task in self._used[call.stage])

    def _is_used(self, entry: Entry) -> bool:
        """Whether some of it was taken."""
        if entry.turn >= 0 and self._used_turns.touches(entry.turn, entry.turn + entry.hi - entry.lo):
            return True
        return entry.stage in self._used and self._used[entry.stage].touches(entry.lo, entry.hi)

    def _note(self, entry: Entry) -> None:
        """It is taken."""
        self._used.setdefault(entry.stage, RangeSet()).add(entry.lo, entry.hi)
        if entry.turn >= 0:
            self._used_turns.add(entry.turn, entry.turn + entry.hi - entry.lo)

    def _take(self, stage: int, matched: Iterable[tuple[int, Entry]]) -> list[Reuse]:
        """Tasks from that number on are what the entry was recorded of."""
        reuse: list[Reuse] = []
        for lo, entry in matched:
            hi = lo + entry.hi - entry.lo
            self._note(entry)
            if entry.turn >= 0:
                self.order.place(stage, lo, hi, entry.turn)
            if isinstance(entry.what, TaskFailed):
                failed_again = msgspec.structs.replace(entry.what, stage=stage, index=lo)
                reuse.append(Reuse(lo, hi, entry.what, entry.lo, failed_again))
            elif entry.what is not None and entry.what[1] is not None:
                result = RangeDone(entry.stage, entry.lo, entry.hi, *entry.what, entry.turn)
                again = msgspec.structs.replace(result, stage=stage, lo=lo, hi=hi, first=result.first + lo - entry.lo)
                reuse.append(Reuse(lo, hi, result, entry.lo, again))
        return reuse

    def _strike(self, record: StageRecord, lo: int, hi: int) -> None:
        """What is recorded of these tasks, and was not taken, won't come."""
        for entry in entries(record, lo, hi):
            if entry.turn >= 0:
                self.order.strike_turns(self._used_turns.gaps(entry.turn, entry.turn + entry.hi - entry.lo))


def _differing(record: StageRecord, lo: int, hi: int, reuse: list[Reuse]) -> Iterator[Differing]:
    """Recorded under the numbers [lo, hi), to be compared: where nothing was matched, and there are bytes to compare with."""
    open_ = RangeSet(((lo, hi),))
    for one in reuse:
        open_.remove(one.lo, one.hi)
    for piece in pieces(record, lo, hi):
        if piece.arguments is None:
            continue
        for a, b in open_.intersect(max(lo, piece.lo), min(hi, piece.hi)):
            results: list[RangeDone | TaskFailed] = []
            for entry in entries(record, a, b):
                if isinstance(entry.what, TaskFailed):
                    results.append(entry.what)
                elif entry.what is not None and entry.what[1] is not None:
                    results.append(RangeDone(record.index, entry.lo, entry.hi, *entry.what, entry.turn))
            if results:
                yield Differing(a, b, piece.first, piece.count, piece.arguments, tuple(results))
