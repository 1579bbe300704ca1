"""A job at a peer that does not lead it: the way to the leader, and the ranges taken from others.

Rules:
- completions are kept until the leader acknowledges them (`grid.reports`), and resent when its connection returns or it is
  silent for RESEND_S;
- a heartbeat claims all that is held here: queued, running, finished and not acknowledged, on its way to a thief;
- a worker whose task waits for children ends when the leader's connection does: its frames may be lost;
- when another peer leads (`follow`), what is queued and running goes on, what is finished is offered to it; declarations of
  the old epoch are forgotten, and where the new leader declares a stage or cuts a segment otherwise, what is here of it goes.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.bundle import Declaration, SegmentRef, Signed, TaskFailure, check_declaration, check_grant, segment_name
from grid.core.deque import DequeFull, Work
from grid.core.errors import FencedError, RefusedError
from grid.core.job import JobId
from grid.core.messages import (
    Accepted,
    Beat,
    Claims,
    Drop,
    Give,
    GrantTaken,
    Have,
    Message,
    Nothing,
    Printed,
    Relay,
    RelayClosed,
    Steal,
)
from grid.core.ranges import RangeSet
from grid.core.segments import Segment
from grid.giving import Giver
from grid.jobdata import JobData
from grid.outreach import decode_frame
from grid.reports import Reports, Shelf
from grid.site import Site
from grid.siteworker import SiteWorker

if TYPE_CHECKING:
    from grid.post import PostOffice

RESENT_MAX: Final = 4
"""Batches sent again at once when the leader is silent: the oldest, which hold back its word on all later ones."""
BLOBS_TOLD_MAX: Final = 4_096
"""Blobs that tasks stored here of which a new leader is told: the latest."""
REPLACE_S: Final = 2.0
"""For workers to end that run what a new leader declares otherwise: they are killed, and buried within milliseconds."""


class Remote:
    """The thief's end of one job: the `Uplink` of its site."""

    site: Site

    def __init__(
        self,
        job: JobId,
        epoch: int,
        leader: PeerId,
        data: JobData,
        identity: Identity,
        me: PeerId,
        post: PostOffice,
        *,
        branch: bytes = b"",
        shelf: Shelf | None = None,
    ) -> None:
        self.job = job
        self.epoch = epoch
        self.branch = branch
        self.leader = leader
        self.tags: tuple[str, ...] = ()
        self.heard_s = trio.current_time()
        self.blocked = ""
        self.reports = Reports(job, epoch, data, identity, shelf)
        self._data = data
        data.stored = self._stored
        self._identity = identity
        self._me = me
        self._post = post
        self._declarations: dict[int, Signed] = {}
        self._functions: dict[int, bytes] = {}
        self._inherited: set[tuple[int, int]] = set()  # (stage, first) of segments that an earlier leader's grants brought
        self._told: deque[bytes] = deque(maxlen=BLOBS_TOLD_MAX)
        self._prints: list[tuple[int, int, int, bytes]] = []
        self._print_bytes = 0
        self._print_dropped = 0
        self._interval_s = limits.HEARTBEAT_S
        self._claimed_s = -math.inf
        self.giver: Giver

    def attach(self, site: Site) -> None:
        """The site whose uplink this is."""
        self.site = site
        declared = self._declarations.__contains__
        self.giver = Giver(site, self._data, self._identity, self.epoch, self._declaration, declared)

    def _declaration(self, stage: int) -> Signed:
        signed = self._declarations.get(stage)
        if signed is None:
            raise FencedError(f"stage {stage} was declared in an epoch that is over")
        return signed

    # ---- leaders ----

    def follow(self, leader: PeerId, branch: bytes, epoch: int) -> None:
        """Another peer leads, or the same one anew: go over to it without stopping."""
        if (leader, branch, epoch) == (self.leader, self.branch, self.epoch):
            return
        self.disconnected()
        self._interval_s = limits.HEARTBEAT_S
        self.leader, self.branch, self.epoch = leader, branch, epoch
        self.giver.epoch = epoch
        self.heard_s = trio.current_time()
        self._declarations.clear()
        self._inherited = {(stage.index, first) for stage in self.site.stages.values() for first in stage.held}
        told = list(self._told)
        for at in range(0, len(told), limits.HAVE_MAX):  # before what may name them
            self._post.post(leader, Have(self.job, tuple(told[at : at + limits.HAVE_MAX])))
        self._claim()
        self.reports.renew(epoch)
        self.site.workshop.pump()

    def _stored(self, blob: bytes) -> None:
        self._told.append(blob)
        self._post.post(self.leader, Have(self.job, (blob,)))

    # ---- work that comes in ----

    def ask(self, slots: int) -> Steal:
        """The question to a victim."""
        known = RangeSet()
        for stage in self._declarations:
            known.add(stage, stage + 1)
        return Steal(self.job, self.epoch, slots, self.tags, tuple(known)[:64])

    async def take(self, giver: PeerId, give: Give) -> int:
        """A grant arrived. Returns its number of tasks. Raises RefusedError, BadSignature, CodecError: nothing was taken."""
        functions = dict(give.functions)
        for signed in give.declarations:
            declaration = check_declaration(signed, self.job, self.epoch, self.leader)
            code = functions.get(declaration.function)
            if code is not None and bodies.hash_of(code) != declaration.function:
                raise RefusedError("a function that is not what was signed")
            await self._declare(giver, signed, declaration, code)
        grant, works = check_grant(give.grant, giver, self._me, self.job, self.epoch)
        if len(give.inline) != len(grant.segments):
            raise RefusedError("the grant's table doesn't match its bytes")
        for ref, inline in zip(grant.segments, give.inline, strict=True):
            if ref.stage not in self._declarations:
                raise RefusedError(f"stage {ref.stage} was never declared")
            if inline and bodies.hash_of(inline) != ref.blob:
                raise RefusedError("a segment that is not what was signed")
        await self._make_room(grant.segments)
        for ref, inline in zip(grant.segments, give.inline, strict=True):
            segment = Segment(ref.first, ref.count, ref.size, ref.refs)
            self.site.hold(ref.stage, segment, inline or None, ref.blob, (giver, self.leader))
            self._inherited.discard((ref.stage, ref.first))
        for stage, index, attempt in grant.attempts:
            if stage in self.site.stages:
                self.site.stages[stage].attempts[index] = attempt
        for stage, pace_us in grant.pace_us:
            if stage in self.site.stages:
                self.site.stages[stage].pace.hint(pace_us / 1e6)
        self.giver.came_back(works)
        fresh = self._new(works)
        try:
            self.site.push(fresh)
        except DequeFull:  # what is not held here nobody claims: it runs elsewhere
            self.site.workshop.pump()
        if fresh != works:
            self._release_segments(works)
        if giver != self.leader:
            self._claim()  # before the giver stops claiming it
        self._post.post(giver, GrantTaken(self.job, grant.number))
        return sum(work.hi - work.lo for work in works)

    def _new(self, works: list[Work]) -> list[Work]:
        """Without what is here already: a new leader grants what it doesn't know yet to be held."""
        mine = self.site.held()
        for stage, lo, hi in (*self.giver.held(), *self.reports.offered()):
            mine.setdefault(stage, RangeSet()).add(lo, hi)
        return [Work(w.stage, *part) for w in works for part in mine.get(w.stage, RangeSet()).gaps(w.lo, w.hi)]

    async def _declare(self, giver: PeerId, signed: Signed, declaration: Declaration, code: bytes | None) -> None:
        """A stage as the present leader has it. One of that number which an earlier leader had otherwise goes."""
        stage, function = declaration.stage, declaration.function
        fn = self.site.add_function(function, code)
        if self.site.functions[fn] is None:
            path = await self._data.path(function, declaration.function_size, [giver, self.leader])
            self.site.add_function(function, bodies.whole_file(str(path), owned=False))
        if self._functions.get(stage, function) != function:
            await self._replace(stage, 0, limits.TASKS_MAX)
        self._check_epoch(declaration.epoch)
        if self._functions.get(stage, function) != function:
            self.site.stages.pop(stage, None)
        self.site.add_stage(stage, declaration.options, fn).options = declaration.options
        if len(self._declarations) >= limits.DECLARATIONS_KEPT_MAX:
            self._forget_stages()
        self._declarations[stage] = signed  # known only now: a giver would not send the function again
        self._functions[stage] = function

    async def _make_room(self, refs: tuple[SegmentRef, ...]) -> None:
        """Let segments go that an earlier leader cut otherwise than these. Raises RefusedError if one isn't an earlier one's."""
        epoch = self.epoch
        others: list[tuple[int, Segment]] = []
        for ref in refs:
            stage = self.site.stages[ref.stage]
            for known in stage.segments.overlapping(ref.first, ref.first + ref.count):
                same_cut = (known.first, known.count) == (ref.first, ref.count)
                if same_cut and stage.held[known.first].blob == ref.blob:
                    continue
                if (ref.stage, known.first) not in self._inherited:
                    raise RefusedError("a segment that is cut otherwise than one that is here")
                others.append((ref.stage, known))
        for index, segment in others:
            await self._replace(index, segment.first, segment.end)
        self._check_epoch(epoch)

    def _check_epoch(self, epoch: int) -> None:
        """Raises FencedError: the leader has changed while something was waited for."""
        if epoch != self.epoch:
            raise FencedError(f"epoch {epoch} is over")

    async def _replace(self, stage: int, lo: int, hi: int) -> None:
        """Nothing here may go on with these tasks as they were: forget what waits, end what runs. Raises RefusedError."""
        if stage not in self.site.stages:
            return
        self.site.drop(stage, lo, hi)
        with trio.move_on_after(REPLACE_S):
            while running := [worker for worker in self.site.workers if _runs(worker, stage, lo, hi)]:
                running[0].end("dropped")
                await running[0].child.exited.wait()
                await trio.lowlevel.checkpoint()  # the crew buries it after what it had reported
            self.site.forget(stage, lo, hi)
            return
        raise RefusedError("tasks run here that were declared otherwise")

    def _forget_stages(self) -> None:
        held = self.held()
        for stage in [stage for stage in self._declarations if stage not in held]:
            del self._declarations[stage]

    # ---- uplink of the own site ----

    def result(self, stage: int, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        """See `Uplink.result`."""
        self.reports.result(stage, self._functions[stage], self._segment(stage, lo), lo, hi, body, elapsed_us)

    def failure(self, stage: int, failure: wire.Failed, exception: bytes) -> None:
        """See `Uplink.failure`."""
        told = TaskFailure(
            stage,
            self._functions[stage],
            failure.index,
            failure.kind,
            failure.type_name,
            failure.message.encode(errors="replace")[: limits.TEXT_MAX].decode(errors="ignore"),
            failure.traceback.encode(errors="replace")[-limits.TEXT_MAX :].decode(errors="ignore"),
            exception if len(exception) <= limits.RESULT_INLINE_BYTES else b"",
            failure.elapsed_us,
            self._segment(stage, failure.index),
        )
        self.reports.failure(told)

    def _segment(self, stage: int, index: int) -> bytes:
        """The hash of the arguments' segment that a task is in; it is held as long as the task is."""
        known = self.site.stages[stage]
        segment = known.segments.at(index)
        return segment_name(segment.first, known.held[segment.first].blob) if segment is not None else b""

    def printed(self, message: wire.Print, data: bytes) -> None:
        """See `Uplink.printed`."""
        if self._print_bytes + len(data) > limits.PRINT_BYTES_PER_S * limits.HEARTBEAT_S:
            self._print_dropped += len(data)
            return
        self._print_bytes += len(data)
        self._prints.append((message.stage, message.index, message.fd, data))
        self.reports.bell.ring()

    def relay(self, worker: SiteWorker, message: wire.Message, body: Body) -> None:
        """See `Uplink.relay`."""
        self._post.post_frame(self.leader, self._data, self.job, worker.token, message, body)

    def relay_closed(self, worker: SiteWorker) -> None:
        """See `Uplink.relay_closed`."""
        self._post.post(self.leader, RelayClosed(self.job, worker.token))

    def disputed(self) -> None:
        """See `Uplink.disputed`: the driver is not here."""

    def returned(self, stage: int, lo: int, hi: int) -> None:
        """See `Uplink.returned`: what is claimed no more the leader requeues."""

    # ---- messages ----

    async def steal(self, thief: PeerId, steal: Steal) -> Message:
        """Another thief asks here."""
        found = await self.giver.give(thief, steal) if steal.epoch == self.epoch else None
        if found is None:
            return Nothing((self.leader,), fence=self.epoch)
        return found[0]

    async def handle(self, peer: PeerId, message: Message) -> None:
        """One message about this job. Raises RefusedError."""
        if isinstance(message, GrantTaken):
            self._release_segments(self.giver.taken(peer, message.number))
            return
        if peer != self.leader:
            raise RefusedError("only the job's leader may say that")
        self.heard_s = trio.current_time()
        match message:
            case Accepted(number=number, session=session):
                self.reports.accepted(number, session)
            case Beat(interval_ms=interval_ms):
                self._interval_s = min(max(interval_ms / 1e3, limits.HEARTBEAT_S), limits.JOB_FORGET_S)
            case Drop(ranges=ranges):
                works = [Work(stage, *part) for stage, parts in ranges for part in parts if stage in self.site.stages]
                for work in works:
                    if work.lo < work.hi:
                        self.site.drop(*work)
                self._release_segments([work for work in works if work.lo < work.hi])
            case Relay():
                await self._relay(message)
            case RelayClosed(token=token, why=why):
                for worker in self.site.workers:
                    if worker.token == token and worker.nests:
                        worker.end(why or "dropped")
            case _:
                raise RefusedError(f"a thief takes no {type(message).__name__}")

    async def _relay(self, message: Relay) -> None:
        worker = next((w for w in self.site.workers if w.token == message.token), None)
        frame = decode_frame(message.header, wire.to_child_decoder)
        if worker is None:
            return
        if message.blob:
            path = await self._data.path(message.blob, message.size, [self.leader])
            if isinstance(frame, wire.Result):
                copy = self.site.spool.link(str(path))
                frame = wire.Result(frame.stage, frame.lo, frame.hi, copy, frame.skip)
        worker.post(frame, message.body)  # type: ignore[arg-type]

    # ---- sending ----

    async def run(self) -> None:
        """Send completions, prints and claims until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_completions)
            while True:
                self._tidy()
                if trio.current_time() - self._claimed_s > self._interval_s - limits.HEARTBEAT_S / 2:
                    self._claim()
                await trio.sleep(limits.HEARTBEAT_S)

    def _tidy(self) -> None:
        """Each heartbeat: what was not answered is said again, or taken back."""
        now_s = trio.current_time()
        self.giver.expire(now_s)
        unacknowledged = self.reports.unacknowledged()
        if unacknowledged and now_s - self.reports.word_s > limits.RESEND_S:
            self.reports.word_s = now_s
            for message in unacknowledged[:RESENT_MAX]:
                self._post.post(self.leader, message)
        self._print_bytes = 0
        self._send_prints()

    def _claim(self) -> None:
        self._claimed_s = trio.current_time()
        table = self.held()
        self._forget_segments(table)
        held = tuple((stage, tuple(ranges)) for stage, ranges in table.items())
        have, self._data.fetched = self._data.fetched[: limits.HAVE_MAX], self._data.fetched[limits.HAVE_MAX :]
        workshop = self.site.workshop
        self._post.post(self.leader, Claims(self.job, self.epoch, held, workshop.slots, workshop.busy, tuple(have), self.blocked))

    def _forget_segments(self, held: dict[int, RangeSet]) -> None:
        """Let go of segments whose tasks were dropped while they ran: nobody reports those."""
        nothing = RangeSet()
        for stage in self.site.stages.values():
            mine = held.get(stage.index, nothing)
            for each in list(stage.held.values()):
                if not mine.touches(each.segment.first, each.segment.end):
                    self.site.forget(stage.index, each.segment.first, each.segment.end)

    def _send_prints(self) -> None:
        """Before the completions of the tasks that printed: the job may end with them."""
        if self._prints or self._print_dropped:
            self._post.post(self.leader, Printed(self.job, tuple(self._prints), self._print_dropped))
        self._prints, self._print_dropped = [], 0

    def held(self) -> dict[int, RangeSet]:
        """Every range that is ours as long as the leader has not acknowledged it."""
        table = self.site.held()
        for work in self.giver.held():
            table.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        for stage, lo, hi in self.reports.ranges():
            table.setdefault(stage, RangeSet()).add(lo, hi)
        return table

    async def settled(self) -> None:
        """Return once the leader has acknowledged all that was finished here."""
        while not self.reports.settled:
            await self.reports.taken.wait()

    async def _send_completions(self) -> None:
        reports = self.reports
        while True:
            if not reports.ready:
                await reports.bell.wait()
                if self._prints and not reports.ready:
                    self._send_prints()
                continue
            batch, ranges = await reports.next()
            self._release_segments(ranges)
            self._send_prints()
            self._post.post(self.leader, batch)
            await trio.sleep(limits.COMPLETION_DELAY_S)

    def _release_segments(self, ranges: list[Work]) -> None:
        """Let segments go of which nothing is held here any more, not even on its way to a thief."""
        held = self.site.held()
        for work in self.giver.held():
            held.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        nothing = RangeSet()
        for work in ranges:
            if work.stage not in self.site.stages:
                continue
            mine = held.get(work.stage, nothing)
            for segment in self.site.stages[work.stage].segments.overlapping(work.lo, work.hi):
                if not mine.touches(segment.first, segment.end):
                    self.site.forget(work.stage, segment.first, segment.end)

    def reconnected(self) -> None:
        """The leader is there again: say everything again that it did not acknowledge."""
        for message in self.reports.unacknowledged():
            self._post.post(self.leader, message)

    def disconnected(self) -> None:
        """The leader's connection ended."""
        for worker in list(self.site.workers):
            if worker.nests:
                worker.end("dropped")


def _runs(worker: SiteWorker, stage: int, lo: int, hi: int) -> bool:
    return any(ticket.stage == stage and ticket.lo < hi and lo < ticket.hi for ticket in worker.tickets.values())
