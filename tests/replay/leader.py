"""A small leader for tests of replay: real driver, real workers, one job, nothing lost and nothing moved.

`Run.play` runs a script to its end and keeps what its driver declared: functions, stages, segments as bytes, in what order
unordered results were delivered. Given the record of an earlier run it plays a new leader: what the driver declares again
gets its recorded result, unordered ones in the recorded order; what is not on record runs, and is listed in `reruns`.
"""

# ruff: noqa: ASYNC230, ASYNC240 - small files
from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from grid.api import replay, serialize, wire
from grid.worker.pool import Child, JobProcesses


def items_of(data: bytes) -> list[bytes]:
    """A segment's items as bytes, by its tables alone: (pickle, buffers) of each, joined."""
    _, _, _, chunks, buffers, classes = serialize.HEAD.unpack_from(data)
    tables = serialize.HEAD.size + serialize.CHUNK.size * chunks
    start = tables + serialize.BUFFER.size * buffers
    areas = deque(serialize.BUFFER.iter_unpack(data[tables:start]))
    start += classes
    items: list[bytes] = []
    for length, count, own in serialize.CHUNK.iter_unpack(data[serialize.HEAD.size : tables]):
        assert not count, "a batch of scalars has no items as bytes"
        item = data[start : start + length]
        for offset, size in [areas.popleft() for _ in range(own)]:
            item += data[offset : offset + size]
        items.append(item)
        start += length
    return items


@dataclass
class Settled:
    """Tasks [lo, hi) are done (`body`: the result segment, from task `first` on) or failed."""

    lo: int
    hi: int
    first: int
    body: bytes
    failure: wire.Failure | None = None


@dataclass
class Stage:
    """A stage as its child declared it."""

    maker: Child
    number: int
    function: bytes
    message: wire.Stage
    segments: list[tuple[int, int, bytes]] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    recorded: Stage | None = None
    wanted: bool = True

    @property
    def calls(self) -> bool:
        """Whether its tasks were submitted one by one."""
        return self.message.kind == serialize.CALL

    @property
    def counts(self) -> list[int]:
        """Tasks of each segment."""
        return [count for _, count, _ in self.segments]

    def find(self, index: int) -> Settled:
        """What became of a task."""
        return next(settled for settled in self.settled if settled.lo <= index < settled.hi)


class Run:
    """One run of a script. `processes` are the job's, its script and folders are in `setup`."""

    def __init__(self, processes: JobProcesses, setup: wire.Setup, earlier: Run | None = None, workers: int = 2) -> None:
        self.setup = setup
        self.stages: list[Stage] = []
        """The driver's own, in the order in which they were opened."""
        self.order: list[tuple[Stage, Settled]] = []
        """Results of unordered stages, as delivered."""
        self.reruns: list[tuple[str, int]] = []
        self.compare: Callable[[Run, Stage, int], Any] | None = None
        self.stdout = self.stderr = ""
        self.status: int | None = None
        self.same: dict[int, tuple[tuple[int, int], ...]] = {}
        """Answers to what was asked with Compare and CompareFunction."""
        self.earlier = earlier
        self._processes = processes
        self._workers = workers
        self._all: list[Stage] = []
        self._own: dict[tuple[int, int], Stage] = {}
        self._functions: dict[tuple[int, int], bytes] = {}
        self._work: deque[tuple[Stage, int, int, bytes]] = deque()
        self._held: list[tuple[Stage, int, int, bytes]] = []
        """What differs runs once the driver has said whether it does."""
        self._bell = trio.Event()
        self._tickets = 0
        self._blobs: dict[str, bytes] = {}
        self._pool: dict[tuple[bytes, bytes], deque[tuple[Stage, int]]] = {}
        self._pending: dict[tuple[int, int], tuple[Stage, Settled]] = {}
        self._ahead: deque[tuple[Stage, Settled]] = deque()
        self._done: set[tuple[int, int]] = set()
        self._asked = 0
        if earlier is not None:
            self._load(earlier)

    def _load(self, earlier: Run) -> None:
        cuts = [
            replay.stage_cuts(stage.message.name, stage.message.ordered, stage.counts)
            for stage in earlier.stages
            if not stage.calls
        ]
        path = Path(self.setup.spool) / "replay"
        replay.write(path, cuts)
        self.setup = msgspec.structs.replace(self.setup, replay=str(path))
        self._blobs = earlier._blobs
        self._ahead = deque(earlier.order)
        for stage in earlier.stages:
            if stage.calls:
                for first, _, data in stage.segments:
                    for index, item in enumerate(items_of(data), first):
                        self._pool.setdefault((stage.function, item), deque()).append((stage, index))

    @property
    def items(self) -> Counter[tuple[bytes, bytes]]:
        """(function, item) of all calls submitted, and how often."""
        return Counter(
            (stage.function, item)
            for stage in self.stages
            if stage.calls
            for _, _, data in stage.segments
            for item in items_of(data)
        )

    @property
    def maps(self) -> list[tuple[bytes, str, bool, list[tuple[int, int, bytes]]]]:
        """What the maps declared, byte for byte."""
        return [
            (stage.function, stage.message.name, stage.message.ordered, stage.segments)
            for stage in self.stages
            if not stage.calls
        ]

    async def play(self) -> None:
        """Run the script to its end."""
        folder = Path(self.setup.spool)
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            driver = await self._processes.start_driver(self.setup, stdin=None, stdout=out.fileno(), stderr=err.fileno())
            async with trio.open_nursery() as nursery:
                for _ in range(self._workers):
                    nursery.start_soon(self._serve_worker, nursery)
                async for message, body in driver.frames:
                    self._take(driver, message, body)
                await driver.exited.wait()
                nursery.cancel_scope.cancel()
        self.status = driver.status
        self.stdout, self.stderr = (folder / "stdout").read_text(), (folder / "stderr").read_text()

    # ---- what children say -------------------------------------------------------------------------------------------

    def _take(self, child: Child, message: Any, body: bytes) -> bool:
        """A frame of a session's; False if it is a worker's."""
        match message:
            case wire.Define(fn, _):
                self._functions[id(child), fn] = body
            case wire.Stage():
                self._open(child, message)
            case wire.Page():
                self._page(self._own[id(child), message.stage], message, body)
            case wire.Cancel(number, lo, hi):
                self._own[id(child), number].wanted &= hi >= 0
                child.post(wire.Cancelled(number, lo, hi))
            case wire.Put(number, path):
                data = body or Path(path).read_bytes()
                name = hashlib.blake2b(data, digest_size=32).hexdigest()
                self._blobs[name] = data
                child.post(wire.Reply(number, text=name))
            case wire.Fetch(number, ref, _):
                known = Path(self.setup.spool) / ref
                known.write_bytes(self._blobs[ref])
                child.post(wire.Reply(number, path=str(known)))
            case wire.Same(number, ranges):
                self.same[number] = ranges
                if len(self.same) == self._asked:
                    self._work += self._held
                    self._held.clear()
                    self._bell.set()
            case wire.Close() | wire.Consumed() | wire.Print() | wire.Waiting():
                pass
            case _:
                return False
        return True

    def _open(self, child: Child, message: wire.Stage) -> None:
        stage = Stage(child, message.stage, self._functions[id(child), message.fn], message)
        self._own[id(child), message.stage] = stage
        self._all.append(stage)
        if message.parent_stage < 0:
            self.stages.append(stage)

    def _match(self, stage: Stage, first: tuple[int, int, bytes]) -> Stage | None:
        """The recorded map that begins as this one does, else the first one left of this function."""
        assert self.earlier is not None
        taken = {id(other.recorded) for other in self.stages}
        left = [
            other
            for other in self.earlier.stages
            if (other.function, other.message.ordered, other.calls) == (stage.function, stage.message.ordered, False)
            and id(other) not in taken
        ]
        return next((other for other in left if first in other.segments), left[0] if left else None)

    def _page(self, stage: Stage, page: wire.Page, body: bytes) -> None:
        data = Path(page.path).read_bytes() if page.path else body
        if page.path:
            os.unlink(page.path)
        first, offset = page.first, 0
        for count, length in zip(page.counts, page.lengths, strict=True):
            self._segment(stage, first, count, data[offset : offset + length])
            first += count
            offset += length
        self._bell.set()
        self._deliver()

    def _segment(self, stage: Stage, first: int, count: int, data: bytes) -> None:
        stage.segments.append((first, count, data))
        if self.earlier is None or stage.message.parent_stage >= 0:
            self._work.append((stage, first, first + count, data))
        elif stage.calls:
            for index, item in enumerate(items_of(data), first):
                waiting = self._pool.get((stage.function, item))
                if waiting:
                    source, at = waiting.popleft()
                    self._reuse(stage, index, source, at)
                else:
                    self._rerun(stage, index, index + 1, data)
        else:
            if not first:
                stage.recorded = self._match(stage, (first, count, data))
            source_map = stage.recorded
            if source_map is None or (first, count, data) not in source_map.segments:
                if self.compare is not None:
                    self.compare(self, stage, first)
                self._rerun(stage, first, first + count, data)
                return
            for settled in source_map.settled:
                if first <= settled.lo < first + count:
                    self._pending[id(source_map), settled.lo] = stage, settled

    def _rerun(self, stage: Stage, lo: int, hi: int, data: bytes) -> None:
        self.reruns += [(stage.message.name, index) for index in range(lo, hi)]
        (self._held if self.compare is not None else self._work).append((stage, lo, hi, data))

    def _reuse(self, stage: Stage, index: int, source: Stage, at: int) -> None:
        """Task `at` of the recorded stage is task `index` of this one now."""
        settled = source.find(at)
        moved = Settled(index, index + 1, index - (at - settled.first), settled.body, settled.failure)
        self._pending[id(source), at] = stage, moved

    def ask(self, old: bytes, new: bytes, stage: int, first: int, count: int) -> None:
        """Have the driver compare two segments."""
        self._asked += 1
        self.stages[0].maker.post(wire.Compare(self._asked, stage, first, count, len(old)), old + new)

    def ask_function(self, old: bytes, new: bytes) -> None:
        """Have the driver compare two functions."""
        self._asked += 1
        self.stages[0].maker.post(wire.CompareFunction(self._asked, len(old)), old + new)

    # ---- results -----------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Give the driver what is on record: unordered results in their order, ordered ones at once."""
        for (source, lo), (stage, settled) in list(self._pending.items()):
            if stage.message.ordered:
                del self._pending[source, lo]
                self._settle(stage, settled)
        while self._ahead:
            recorded, was = self._ahead[0]
            indexes = range(was.lo, was.hi) if recorded.calls else (was.lo,)
            for index in indexes:
                found = self._pending.pop((id(recorded), index), None)
                if found is not None:
                    self._settle(*found)
                    self._done.add((id(recorded), index))
            if any((id(recorded), index) not in self._done for index in indexes):
                return
            self._ahead.popleft()

    def _settle(self, stage: Stage, settled: Settled) -> None:
        stage.settled.append(settled)
        if stage.message.parent_stage < 0 and not stage.message.ordered:
            self.order.append((stage, settled))
        if not stage.wanted:
            return
        if settled.failure is not None:
            failure = msgspec.structs.replace(settled.failure, stage=stage.number, index=settled.lo)
            stage.maker.post(failure, settled.body)
        else:
            stage.maker.post(wire.Result(stage.number, settled.lo, settled.hi, "", settled.lo - settled.first), settled.body)

    # ---- workers -----------------------------------------------------------------------------------------------------

    async def _serve_worker(self, nursery: trio.Nursery) -> None:
        child = await self._processes.start_worker()
        sent: dict[bytes, int] = {}
        while True:
            while not self._work:
                self._bell = trio.Event()
                await self._bell.wait()
            stage, lo, hi, data = self._work.popleft()
            if stage.function not in sent:
                sent[stage.function] = len(sent)
                await child.send(wire.Function(sent[stage.function]), stage.function)
            self._tickets += 1
            first = next(first for first, count, _ in stage.segments if first <= lo < first + count)
            run = wire.Run(self._tickets, self._all.index(stage), sent[stage.function], first, lo, hi)
            await child.send(run, data)
            await self._until_final(child, stage, nursery)

    async def _until_final(self, child: Child, stage: Stage, nursery: trio.Nursery) -> None:
        async for message, body in child.frames:
            if isinstance(message, wire.Waiting) and message.blocked:
                nursery.start_soon(self._serve_worker, nursery)
            if self._take(child, message, body):
                continue
            if isinstance(message, wire.Done):
                data = Path(message.path).read_bytes() if message.path else body
                self._settle(stage, Settled(message.lo, message.hi, message.lo, data))
            elif isinstance(message, wire.Failed):
                kind = wire.Failure(-1, message.index, message.kind, message.type_name, message.message, message.traceback)
                self._settle(stage, Settled(message.index, message.index + 1, message.index, body, kind))
            if getattr(message, "final", False):
                return
        raise AssertionError("a worker ended")
