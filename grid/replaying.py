"""A later leadership's way through what is recorded already: stages go on, results come from the record, the rest runs.

The driver starts anew and makes the same calls (DESIGN, section 6; what matches is grid/core/replay.py's). Rules:
- what is recorded is delivered, never run again, as long as its bytes are to be had: inline, or from a blob that some peer holds;
- results of unordered stages reach the driver in the order in which they were recorded, until the driver stops to wait for
  something else;
- for GRACE_S after the takeover recorded tasks that are not done wait for their holders to claim them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from grid import body as bodies
from grid.api import replay as cuts
from grid.api import wire
from grid.api.serialize import CALL
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.deque import Work
from grid.core.facts import DIGEST_BYTES, RangeDone, Stored, TaskFailed, Where
from grid.core.items import kind_of
from grid.core.ranges import RangeSet
from grid.core.replay import Differing, Replay, Reuse
from grid.producer import Item

if TYPE_CHECKING:
    from grid.core.bundle import StageOptions
    from grid.core.chronicle import Chronicle
    from grid.core.ledger import StageState
    from grid.keeping import Keeper
    from grid.leader import Leader
    from grid.recorder import LogRecorder

GRACE_S: Final = 0.4
"""For helpers to hear of the new leader and claim what they hold, so that it does not run twice."""
RECALLS_MAX: Final = 8
"""Recorded results fetched from other peers at once."""
COMPARE_S: Final = 5.0
"""For the driver to compare a segment's items; it may be busy with the script."""
QUIET_SWEEPS_MAX: Final = 2
"""Heartbeats in which neither the driver said nor its tasks did anything, after which the recorded order is given up."""
log = logging.getLogger(__name__)

Table = list[tuple[int, int, bytes]]
"""(count, size, BLAKE3) a segment."""


@dataclass(frozen=True, slots=True)
class _Comparing:
    """Tasks [first, first + count): their arguments' bytes now, and what was recorded."""

    stage: StageState
    first: int
    count: int
    new: bytes
    old: Where


class Replaying:
    """One leadership's replay. Its tasks run in `nursery`."""

    def __init__(
        self,
        chronicle: Chronicle,
        leader: Leader,
        recorder: LogRecorder,
        keeper: Keeper | None,
        nursery: trio.Nursery,
        tell: Callable[[str, str], None] = lambda key, text: None,
    ) -> None:
        """tell: one line for the user, once a job: (what it is about, text)."""
        self._tell = tell
        self._comparing: dict[int, _Comparing] = {}
        self._replay = Replay(chronicle)
        self._leader = leader
        self._recorder = recorder
        self._keeper = keeper
        self._nursery = nursery
        self._recalls = trio.Semaphore(RECALLS_MAX)
        self._recalling: dict[int, Work] = {}
        self._recall_count = 0
        self._compared = 0
        self._later: list[Work] | None = []
        self._totals = {index: stage.total for index, stage in chronicle.stages.items()}
        self._bare: dict[int, RangeSet] = {}
        """Tasks recorded as done whose bytes nobody kept."""
        for index, stage in chronicle.stages.items():
            bare = RangeSet((done.lo, done.hi) for done in stage.results.all() if done.result is None)
            if bare:
                self._bare[index] = bare
        self._quiet_sweeps = 0
        self._seen = (-1, -1)
        self.frames = 0
        """Of the driver: whether it says something."""
        nursery.start_soon(self._end_grace)

    def write_cuts(self, path: str, chronicle: Chronicle) -> None:
        """Tell the driver where its maps were cut. Raises OSError."""
        found: list[cuts.StageCuts] = []
        for _, stage in sorted(chronicle.stages.items()):
            pieces = list(stage.segments.all())
            calls = not stage.ordered and any(
                isinstance(piece.arguments, bytes) and kind_of(piece.arguments) == CALL for piece in pieces
            )
            if stage.parent is None and pieces and not calls:
                found.append(cuts.stage_cuts(stage.name, stage.ordered, [piece.count for piece in pieces]))
        cuts.write(path, found)

    async def prepare(self) -> None:
        """Bring here what is needed to tell calls apart. Call before the driver starts."""
        if self._keeper is None:
            return
        async with trio.open_nursery() as nursery:
            for stored in self._replay.needed():
                nursery.start_soon(self._supply, stored, self._keeper)

    async def _supply(self, stored: Stored, keeper: Keeper) -> None:
        async with self._recalls:
            body = await keeper.fetch(stored)
            if body is not None:
                self._replay.supply(stored, bodies.read(body))
                bodies.release(body)

    # ---- declaring ----

    def open(
        self,
        function: bytes,
        name: str,
        ordered: bool,
        parent: tuple[int, int] | None,
        options: StageOptions,
        first: tuple[int, bytes] | None,
    ) -> int | None:
        """The number of the recorded stage that this one is; None: a new one. first: (count, BLAKE3)."""
        short = (first[0], first[1][:DIGEST_BYTES]) if first is not None else None
        return self._replay.open(function, name, ordered, parent, options, short)

    def opened(self, stage: StageState) -> None:
        """A new stage has this number."""
        self._replay.opened(stage.index, stage.function, stage.ordered, stage.parent)

    def is_closed(self, stage: int, total: int) -> bool:
        """Whether the record has it so."""
        return self._totals.get(stage) == total

    def declare(self, stage: StageState, lo: int, table: Table, data: bytes | None) -> list[Work]:
        """A page is declared: settle what is recorded of it; returns what must run now."""
        at, offset = lo, 0
        differing: list[tuple[int, int]] = []  # (first, number in the table)
        doubtful: list[_Comparing] = []
        reuses: list[tuple[Reuse, bool]] = []
        cancelled: list[tuple[int, int]] = []
        for number, (count, size, digest) in enumerate(table):
            piece = data[offset : offset + size] if data is not None and size <= limits.SEGMENT_INLINE_BYTES else None
            verdict = self._replay.segment(stage.index, at, count, digest[:DIGEST_BYTES], piece)
            if not verdict.same:
                differing.append((at, number))
            reuses += [(reuse, verdict.same) for reuse in verdict.reuse]
            cancelled += verdict.cancelled
            if verdict.compare:
                doubtful += self._doubt(stage, at, count, piece, verdict.compare)
            at += count
            offset += size
        self._record(stage.index, differing, table, data)
        for reuse, same in reuses:
            if not same:
                self._recorder.again(reuse.fact)
        for reuse, _ in reuses:
            self._take(stage, reuse)
        for a, b in cancelled:
            self._leader.cancel(stage.index, a, b)
        for one in doubtful:
            self._compare(one)
        busy = RangeSet((work.lo, work.hi) for work in self._busy() if work.stage == stage.index)
        parts = [part for gap in stage.settled.gaps(lo, stage.declared) for part in busy.gaps(*gap)]
        works = [Work(stage.index, *part) for part in parts]
        for part in parts:
            for bare in self._bare[stage.index].intersect(*part) if stage.index in self._bare else ():
                self._recorder.redo(stage.index, *bare)
        if self._later is None:
            return [part for work in works for part in self._unclaimed(stage, work)]
        self._later += works
        return []

    def _unclaimed(self, stage: StageState, work: Work) -> list[Work]:
        """What of it is not done and no helper has since an earlier epoch."""
        parts = RangeSet(stage.settled.gaps(work.lo, work.hi))
        for peer in self._leader.claims.peers():
            for part in self._leader.claims.held(peer, work.stage):
                parts.remove(*part)
        return [Work(work.stage, *part) for part in parts]

    def _record(self, stage: int, differing: list[tuple[int, int]], table: Table, data: bytes | None) -> None:
        """Tell the log of the segments that it does not have so, in runs."""
        offsets = [0]
        for _, size, _ in table:
            offsets.append(offsets[-1] + size)
        start = 0
        while start < len(differing):
            end = start + 1
            while end < len(differing) and differing[end][1] == differing[end - 1][1] + 1:
                end += 1
            first, number = differing[start]
            last = differing[end - 1][1]
            run = table[number : last + 1]
            self._recorder.segments(stage, first, run, data[offsets[number] : offsets[last + 1]] if data is not None else None)
            start = end

    # ---- taking from the record ----

    def _take(self, stage: StageState, reuse: Reuse) -> None:
        result = reuse.result
        if isinstance(result, TaskFailed):
            failure = wire.Failed(0, reuse.lo, result.kind, result.type_name, result.message, result.traceback, 0, False)
            self._leader.recorded_failure(stage, failure, result.exception)
            return
        skip = reuse.source_first - result.first
        if isinstance(result.result, bytes):
            self._leader.recorded(stage, reuse.lo, reuse.hi, skip, result.result, result.peer)
        elif isinstance(result.result, Stored) and self._keeper is not None:
            self._recall_count += 1
            self._recalling[self._recall_count] = Work(stage.index, reuse.lo, reuse.hi)
            self._nursery.start_soon(self._recall, self._recall_count, stage, reuse, skip, result.result, result)

    async def _recall(self, number: int, stage: StageState, reuse: Reuse, skip: int, stored: Stored, result: RangeDone) -> None:
        """Fetch a recorded result; what nobody holds any more runs again."""
        assert self._keeper is not None
        body: Body | None = None
        try:
            async with self._recalls:
                body = await self._keeper.fetch(stored)
        except Exception as error:  # the disk is full, say: making it again needs no less
            log.warning("a recorded result can't be had: %s", error)
        work = self._recalling.pop(number)
        if body is not None:
            self._leader.recorded(stage, work.lo, work.hi, skip, body, result.peer)
            return
        self._recorder.redo(stage.index, reuse.lo, reuse.hi)
        self._leader.run_again(work)

    # ---- comparing ----

    def _doubt(
        self, stage: StageState, first: int, count: int, new: bytes | None, differing: list[Differing]
    ) -> list[_Comparing]:
        """What the driver is to compare of a segment whose bytes are not those recorded at its place."""
        alike = [each for each in differing if (each.first, each.count) == (first, count) and each.arguments is not None]
        if new is None or not alike:
            self._differs(stage, first, count, [])
            return []
        return [_Comparing(stage, first, count, new, alike[0].arguments)]

    def _compare(self, one: _Comparing) -> None:
        self._compared += 1
        self._comparing[self._compared] = one
        self._nursery.start_soon(self._ask, self._compared, one)

    async def _ask(self, number: int, one: _Comparing) -> None:
        """Put the question to the driver; without an answer in time all of it runs."""
        old = one.old if isinstance(one.old, bytes) else b""
        if isinstance(one.old, Stored) and self._keeper is not None:
            async with self._recalls:
                body = await self._keeper.fetch(one.old)
            if body is not None:
                old = bodies.read(body)
                bodies.release(body)
        if old and self._leader.compare(number, one.stage, one.first, one.count, old, one.new):
            await trio.sleep(COMPARE_S)
        if number in self._comparing:
            self.same(number, ())

    def same(self, number: int, ranges: Sequence[tuple[int, int]]) -> None:
        """The driver's answer: these tasks have the arguments that were recorded, in other bytes."""
        one = self._comparing.pop(number, None)
        if one is None:
            return
        self._differs(one.stage, one.first, one.count, ranges)
        self._leader.run_again(Work(one.stage.index, one.first, one.first + one.count))

    def _differs(self, stage: StageState, first: int, count: int, equal: Sequence[tuple[int, int]]) -> None:
        for reuse in self._replay.compared(stage.index, first, count, equal):
            self._recorder.again(reuse.fact)
            self._take(stage, reuse)
        for offer in self._replay.order.ready():
            self._leader.deliver(*offer)

    def end(self) -> None:
        """The script has ended: say it if it did not make all the calls that it had made before."""
        cancelled = {stage.index for stage in self._leader.ledger.stages if stage.cancelled}
        unused = self._replay.unused(cancelled)
        if unused:
            what = f"{unused} result{'s' * (unused != 1)} of before were of no use"
            self._tell("calls", f"the script made other calls when it was run anew after its leader was lost: {what}")

    def _busy(self) -> list[Work]:
        """Ranges whose results may yet come from the record."""
        comparing = [Work(one.stage.index, one.first, one.first + one.count) for one in self._comparing.values()]
        return [*self._recalling.values(), *comparing]

    def in_order(self, stage: int, lo: int, hi: int, item: Item) -> list[tuple[int, int, int, Item]]:
        """Results of an unordered stage that the driver may have now."""
        order = self._replay.order
        if order.over:
            return [(stage, lo, hi, item)]
        parts = order.cuts(stage, lo, hi)
        if isinstance(item.body, FileSlice):
            item.body.file.owners += len(parts) - 1
        found: list[tuple[int, int, int, Item]] = []
        for a, b, _ in parts:
            part = Item(item.body, item.skip + a - lo, item.failure, item.exception)
            found += order.offer(stage, a, b, part)
        return found

    def strike(self, stage: int, lo: int, hi: int) -> list[tuple[int, int, int, Item]]:
        """The driver does not wait for these tasks any more (hi = -1: for none of the stage): what others may go now."""
        return list(self._replay.order.strike(stage, lo, limits.TASKS_MAX if hi < 0 else hi))

    # ---- waiting ----

    def held(self) -> list[Work]:
        """Ranges that are neither queued nor claimed, and not lost."""
        return [*self._busy(), *(self._later or ())]

    async def _end_grace(self) -> None:
        await trio.sleep(GRACE_S)
        works, self._later = self._later or [], None
        for work in works:
            for part in self._unclaimed(self._leader.ledger.stage(work.stage), work):
                self._leader.run_again(part, first=False)

    def sweep(self) -> list[tuple[int, int, int, Item]]:
        """Once a heartbeat: gives the recorded order up when the driver waits for something that does not come in it."""
        order = self._replay.order
        done = sum(stage.settled.count for stage in self._leader.ledger.stages)
        seen = (self.frames, done)
        idle = not self._busy() and self._leader.unsettled == 0
        self._quiet_sweeps = self._quiet_sweeps + 1 if seen == self._seen and idle and order.held else 0
        self._seen = seen
        if self._quiet_sweeps < QUIET_SWEEPS_MAX:
            return []
        log.info("the driver takes another course than before: results go to it as they come")
        return list(order.give_up())
