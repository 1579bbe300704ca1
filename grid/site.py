"""A job's place on one peer: the ranges it holds, the workers that run them, what they need at hand.

The same on the leader's peer (where pages arrive from the driver) and on a thief's (where grants bring ranges). Rules:
- every range the site was given is at all times in exactly one of: the deque, a fetch, a worker's ticket, or reported;
- a worker gets bundles of about GRAIN_S; a second one ahead only while tasks are short;
- the site never opens a body and never decides whether a failed task runs again: it reports to its `Uplink`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.deque import DequeFull, RangeDeque, Work
from grid.core.job import JobId
from grid.core.plan import Pace
from grid.core.ranges import RangeSet
from grid.core.segments import Segment, SegmentTable
from grid.crew import Crew, Requests
from grid.siteworker import SiteWorker, Ticket

if TYPE_CHECKING:
    from grid.worker.pool import JobProcesses
    from grid.workshop import Workshop


class Uplink(Protocol):
    """The way to the job's leader. All calls return at once and keep their order."""

    def result(self, stage: int, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        """Tasks [lo, hi) are done; body: one result segment whose first value is task lo's."""

    def failure(self, stage: int, failure: wire.Failed, exception: bytes) -> None:
        """A task failed here; exception: pickled, or empty."""

    def printed(self, message: wire.Print, data: bytes) -> None:
        """A task wrote something."""

    def relay(self, worker: SiteWorker, message: wire.Message, body: Body) -> None:
        """A frame about stages that a task made."""

    def relay_closed(self, worker: SiteWorker) -> None:
        """The worker with stages of its own is gone."""

    def disputed(self) -> None:
        """The driver may have had a result from a worker here that was settled by another peer's."""

    def returned(self, stage: int, lo: int, hi: int) -> None:
        """The site can't run these (a blob is not to be had, its deque is full); it holds them no more."""


@dataclass(slots=True)
class Held:
    """A segment at hand or to be fetched."""

    segment: Segment
    body: Body | None
    blob: bytes = b""
    holders: tuple[PeerId, ...] = ()
    ready: bool = False  # body and refs are here
    digest: bytes = b""  # BLAKE3 of the bytes, where it is known already; `blob` only names what can be fetched
    error: str = ""  # why it could not be fetched
    copy: bodies.SpoolFile | None = None  # a file with the same bytes, for workers


@dataclass(slots=True)
class SiteStage:
    """What the site knows of a stage."""

    index: int
    options: StageOptions
    fn: int
    pace: Pace = field(default_factory=Pace)
    held: dict[int, Held] = field(default_factory=dict)  # by first
    segments: SegmentTable = field(default_factory=SegmentTable)
    attempts: dict[int, int] = field(default_factory=dict)  # of tasks that failed before and wait here
    early: int = -1  # the driver's number for it, while it seems to wait for one task alone, which was never elsewhere

    def alike(self, at: int, hi: int) -> int:
        """Where the run of tasks from `at` on ends that are on the same attempt: a retried task runs alone."""
        if not self.attempts:
            return hi
        return at + 1 if at in self.attempts else min((i for i in self.attempts if at < i < hi), default=hi)


class Site:
    """One job on this peer."""

    def __init__(
        self,
        job: JobId,
        workshop: Workshop,
        processes: JobProcesses,
        spool: bodies.Spool,
        uplink: Uplink,
        nursery: trio.Nursery,
        fetch: Callable[[SiteStage, Held], Awaitable[None]],
        requests: Requests,
    ) -> None:
        self.job = job
        self.workshop = workshop
        self.spool = spool
        self.uplink = uplink
        self.deque = RangeDeque()
        self.stages: dict[int, SiteStage] = {}
        self.functions: list[Body | None] = []
        self.closed = False
        self.has_timeouts = False  # some stage here limits its tasks' time
        self.crew = Crew(self, processes, nursery, requests)
        self._nursery = nursery
        self._fetch = fetch
        self._fetching: dict[tuple[int, int], list[Work]] = {}
        self._function_numbers: dict[bytes, int] = {}
        self._function_hashes: list[bytes] = []
        self._paces: dict[int, Pace] = {}  # of the latest stage of each function
        self._ticket = 0

    # ---- what comes in ----

    def add_function(self, function: bytes, body: Body | None) -> int:
        """The number of the function with this hash; body None: it comes later."""
        number = self._function_numbers.get(function)
        if number is None:
            number = self._function_numbers[function] = len(self.functions)
            self._function_hashes.append(function)
            self.functions.append(body)
        elif body is not None and self.functions[number] is None:
            self.functions[number] = body
        return number

    def function_hash(self, stage: int) -> bytes:
        """BLAKE3 of the stage's function."""
        return self._function_hashes[self.stages[stage].fn]

    def add_stage(self, index: int, options: StageOptions, fn: int) -> SiteStage:
        """Ranges of this stage may be pushed from now on."""
        stage = self.stages.get(index)
        if stage is None:
            stage = SiteStage(index, options, fn, Pace(self._paces.get(fn)))
            self.stages[index] = stage
            self._paces[fn] = stage.pace
            if options.task_timeout_s:
                self.has_timeouts = True
                self.workshop.timed.set()
        return stage

    def hold(
        self,
        stage: int,
        segment: Segment,
        body: Body | None,
        blob: bytes = b"",
        holders: tuple[PeerId, ...] = (),
        digest: bytes = b"",
    ) -> None:
        """A segment's bytes, or where they are to be had."""
        held = self.stages[stage].held
        self.stages[stage].segments.add(segment)
        known = held.get(segment.first)
        if known is None:
            ready = body is not None and not segment.refs
            held[segment.first] = Held(segment, body, blob, holders, ready, digest=digest or blob)
        elif known.body is None:  # the older holders may be gone
            known.body, known.blob, known.holders = body, blob, holders
            known.ready = body is not None and not segment.refs

    def push(self, works: list[Work], head: bool = False, early: int = -1) -> None:
        """Ranges to run; early: the driver's number for their stage, if their result may go to it at once. Raises DequeFull."""
        for work in reversed(works) if head else works:
            self.stages[work.stage].early = early
            (self.deque.push_head if head else self.deque.push_tail)(work)
        self.workshop.pump()

    def put_back(self, work: Work) -> None:
        """Work that was here before is to run first."""
        self.stages[work.stage].early = -1  # a thief may have run it meanwhile
        try:
            self.deque.push_head(work)
        except DequeFull:
            self.uplink.returned(*work)

    def drop(self, stage: int, lo: int, hi: int) -> None:
        """These tasks are settled elsewhere or cancelled: forget them, stop those that run long."""
        self.deque.remove(stage, lo, hi)
        attempts = self.stages[stage].attempts
        for index in range(lo, hi) if hi - lo < len(attempts) else list(attempts):
            if lo <= index < hi:
                attempts.pop(index, None)
        for works in self._fetching.values():
            works[:] = [part for work in works for part in without(work, stage, lo, hi)]
        for worker in self.crew.workers:
            running = worker.running
            for ticket in worker.tickets.values():
                if ticket.stage != stage or ticket.at >= hi or lo >= ticket.hi:
                    continue
                if ticket.dropped is None:
                    ticket.dropped = RangeSet()
                ticket.dropped.add(max(lo, ticket.lo), min(hi, ticket.hi))
                if not ticket.dropped.covers(ticket.at, ticket.hi):
                    continue
                if ticket is not running:
                    worker.post(wire.Revoke(ticket.number))
                elif self._runs_long(stage):
                    worker.end("dropped")

    def forget(self, stage: int, lo: int, hi: int) -> None:
        """Release segments that lie in [lo, hi) as a whole."""
        known = self.stages[stage]
        for segment in known.segments.overlapping(lo, hi):
            if lo <= segment.first and segment.end <= hi:
                known.segments.remove(segment.first)
                held = known.held.pop(segment.first)
                if held.body is not None:
                    bodies.release(held.body)
                if held.copy is not None:
                    held.copy.release()

    # ---- what it holds ----

    def held(self) -> dict[int, RangeSet]:
        """Every range that is here and not reported."""
        table: dict[int, RangeSet] = {}

        def add(stage: int, lo: int, hi: int) -> None:
            if lo < hi:
                table.setdefault(stage, RangeSet()).add(lo, hi)

        for work in self.deque.ranges():
            add(*work)
        for works in self._fetching.values():
            for work in works:
                add(*work)
        for worker in self.crew.workers:
            for ticket in worker.tickets.values():
                add(ticket.stage, ticket.at, ticket.hi)
        return table

    @property
    def workers(self) -> list[SiteWorker]:
        """Its worker processes."""
        return self.crew.workers

    @property
    def quiet(self) -> bool:
        """Nothing waits here for a worker."""
        return not self.deque and not self._fetching

    @property
    def in_hand(self) -> int:
        """Tasks that its workers have and have not reported."""
        return sum(ticket.hi - ticket.at for worker in self.crew.workers for ticket in worker.tickets.values())

    @property
    def busy(self) -> int:
        """Slots in use."""
        return sum(worker.slots for worker in self.crew.workers)

    @property
    def blocked(self) -> int:
        """Workers that wait for children of their tasks."""
        return sum(worker.blocked for worker in self.crew.workers)

    def remaining_s(self) -> float:
        """Time its queued tasks take one slot; infinite while a pace is unknown."""
        total = 0.0
        for index in self.deque.stages():
            pace = self.stages[index].pace.per_task_s
            if pace is None:
                return math.inf
            total += pace * self.deque.count(index)
        return total

    def seconds_per_task(self, stage: int) -> float:
        """For a steal's halves; 0 when unknown."""
        return self.stages[stage].pace.per_task_s or 0.0

    # ---- giving work to workers ----

    def feed(self, free: int) -> int:
        """Use up to `free` slots; returns how many were taken. Called by the workshop only."""
        if self.closed or not self.deque:
            return 0
        idle = next((w for w in self.crew.workers if w.idle), None)
        if idle is None:
            while self.crew.starting < min(free, self.deque.total) and self.blocked < limits.WORKERS_BLOCKED_MAX:
                self.crew.start_worker()
            return 0
        before = idle.slots
        self._assign(idle, free)
        return idle.slots - before

    def feed_ahead(self) -> None:
        """A second bundle for workers whose tasks are short. Called by the workshop once no slot is free."""
        for worker in self.crew.workers:
            if not self.deque:
                return
            if 0 < len(worker.tickets) < limits.TICKETS_AHEAD and not (worker.blocked or worker.nests or worker.gone):
                last = next(reversed(worker.tickets.values()))
                if not self._runs_long(last.stage):
                    self._assign(worker, worker.slots, ahead=True)

    def _assign(self, worker: SiteWorker, free: int, ahead: bool = False) -> None:
        def count_of(stage: int) -> int:
            known = self.stages[stage]
            if self.functions[known.fn] is None or min(known.options.cpus, self.workshop.slots) > free:
                return 0
            if known.options.tags and not self.workshop.tags.issuperset(known.options.tags):
                return 0
            if ahead and self._runs_long(stage):
                return 0
            return known.pace.grain(self.deque.count(stage), self.workshop.slots)

        given = 0
        while not given and len(self._fetching) < limits.PREFETCH_SEGMENTS:
            work = self.deque.take_head(count_of)
            if work is None:
                return
            stage = self.stages[work.stage]
            for segment, part in self.pieces(work):
                at = part.lo
                while at < part.hi:
                    same = Work(work.stage, at, stage.alike(at, part.hi))
                    given += self._give(worker, same, segment)
                    at = same.hi

    def pieces(self, work: Work) -> list[tuple[Segment, Work]]:
        """`work` cut at its segments. What has none (it was settled meanwhile) is returned to the uplink."""
        found: list[tuple[Segment, Work]] = []
        at = work.lo
        for segment in self.stages[work.stage].segments.overlapping(work.lo, work.hi):
            if at < segment.first:
                self.uplink.returned(work.stage, at, segment.first)
            part = Work(work.stage, max(at, segment.first), min(work.hi, segment.end))
            found.append((segment, part))
            at = part.hi
        if at < work.hi:
            self.uplink.returned(work.stage, at, work.hi)
        return found

    def _give(self, worker: SiteWorker, work: Work, segment: Segment) -> int:
        stage = self.stages[work.stage]
        held = stage.held[segment.first]
        if not held.ready:
            key = (work.stage, segment.first)
            if key in self._fetching:  # perhaps with nothing that waits for it: all was dropped
                self._fetching[key].append(work)
            else:
                self._fetching[key] = [work]
                self._nursery.start_soon(self._prepare, stage, held)
            return 0
        assert held.body is not None
        self._ticket += 1
        worker.run(Ticket(self._ticket, work.stage, work.lo, work.hi, work.lo, stage.fn), stage, held, self)
        return 1

    async def _prepare(self, stage: SiteStage, held: Held) -> None:
        """Fetch what a segment lacks, then put its ranges back to the head of the deque."""
        key = (stage.index, held.segment.first)
        try:
            await self._fetch(stage, held)
            held.ready = held.body is not None
        finally:
            works = self._fetching.pop(key)
        for work in reversed(works):
            if held.ready:
                self.put_back(work)
            else:
                self.uplink.returned(*work)
        self.workshop.pump()

    def _runs_long(self, stage: int) -> bool:
        pace = self.stages[stage].pace.per_task_s
        return pace is None or pace > limits.GRAIN_S


def without(work: Work, stage: int, lo: int, hi: int) -> list[Work]:
    """What remains of `work` when these tasks are taken from it."""
    if work.stage != stage or hi <= work.lo or work.hi <= lo:
        return [work]
    parts = [Work(stage, work.lo, lo), Work(stage, hi, work.hi)]
    return [part for part in parts if part.lo < part.hi]
