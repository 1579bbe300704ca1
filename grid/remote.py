"""A job at a peer that does not lead it: the way to the leader, and the ranges taken from others.

Rules:
- completions are kept until the leader acknowledges them, and resent when its connection returns or it is silent for RESEND_S;
- a heartbeat claims all that is held here: queued, running, finished and not acknowledged, on its way to a thief;
- a worker whose task waits for children ends when the leader's connection does: its frames may be lost.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.bundle import COMPLETION_DOMAIN, Completion, ResultRange, Signed, TaskFailure, check_declaration, check_grant, sign
from grid.core.deque import DequeFull, Work
from grid.core.errors import RefusedError
from grid.core.job import JobId
from grid.core.messages import (
    Accepted,
    Claims,
    Completed,
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
from grid.site import Site
from grid.siteworker import SiteWorker

if TYPE_CHECKING:
    from grid.post import PostOffice

RESENT_MAX = 4
"""Batches sent again at once when the leader is silent: the oldest, which hold back its word on all later ones."""
UNACKNOWLEDGED_MAX = 256
"""Completion batches without the leader's word; then workers' reports wait here and claims keep the ranges ours."""


@dataclass(slots=True)
class _Sent:
    message: Completed
    ranges: list[Work]
    blobs: list[bytes]


class Remote:
    """The thief's end of one job: the `Uplink` of its site."""

    site: Site

    def __init__(
        self, job: JobId, epoch: int, leader: PeerId, data: JobData, identity: Identity, me: PeerId, post: PostOffice
    ) -> None:
        self.job = job
        self.epoch = epoch
        self.leader = leader
        self.tags: tuple[str, ...] = ()
        self.heard_s = trio.current_time()
        self.blocked = ""
        self._data = data
        data.stored = lambda blob: post.post(leader, Have(job, (blob,)))
        self._identity = identity
        self._me = me
        self._post = post
        self._declarations: dict[int, Signed] = {}
        self._functions: dict[int, bytes] = {}
        self._results: deque[tuple[int, int, int, Body, int]] = deque()
        self._failures: deque[TaskFailure] = deque()
        self._waiting: dict[int, RangeSet] = {}
        self._bell = Bell()
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._acknowledged = Bell()
        self._number = 0
        self._session = int(trio.current_time() * 1e6)
        self._word_s = self.heard_s  # when the leader last said that it took completions, or they were sent again
        self._prints: list[tuple[int, int, int, bytes]] = []
        self._print_bytes = 0
        self._print_dropped = 0
        self.giver: Giver

    def attach(self, site: Site) -> None:
        """The site whose uplink this is."""
        self.site = site
        self.giver = Giver(site, self._data, self._identity, self.epoch, self._declarations.__getitem__)

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
            fn = self.site.add_function(declaration.function, code)
            self.site.add_stage(declaration.stage, declaration.options, fn)
            if self.site.functions[fn] is None:
                path = await self._data.path(declaration.function, declaration.function_size, [giver, self.leader])
                self.site.add_function(declaration.function, bodies.whole_file(str(path), owned=False))
            if len(self._declarations) >= limits.DECLARATIONS_KEPT_MAX:
                self._forget_stages()
            self._declarations[declaration.stage] = signed  # known only now: a giver would not send the function again
            self._functions[declaration.stage] = declaration.function
        grant, works = check_grant(give.grant, giver, self._me, self.job, self.epoch)
        if len(give.inline) != len(grant.segments):
            raise RefusedError("the grant's table doesn't match its bytes")
        segments = [Segment(ref.first, ref.count, ref.size, ref.refs) for ref in grant.segments]
        for ref, segment, inline in zip(grant.segments, segments, give.inline, strict=True):
            if ref.stage not in self._functions:
                raise RefusedError(f"stage {ref.stage} was never declared")
            if not self.site.stages[ref.stage].segments.fits(segment):
                raise RefusedError("a segment that is cut otherwise than one that is here")
            if inline and bodies.hash_of(inline) != ref.blob:
                raise RefusedError("a segment that is not what was signed")
        for ref, segment, inline in zip(grant.segments, segments, give.inline, strict=True):
            self.site.hold(ref.stage, segment, inline or None, ref.blob, (giver, self.leader))
        for stage, index, attempt in grant.attempts:
            if stage in self.site.stages:
                self.site.stages[stage].attempts[index] = attempt
        for stage, pace_us in grant.pace_us:
            if stage in self.site.stages:
                self.site.stages[stage].pace.hint(pace_us / 1e6)
        try:
            self.site.push(works)
        except DequeFull:  # what is not held here nobody claims: it runs elsewhere
            self.site.workshop.pump()
        if giver != self.leader:
            self._claim()  # before the giver stops claiming it
        self._post.post(giver, GrantTaken(self.job, grant.number))
        return sum(work.hi - work.lo for work in works)

    def _forget_stages(self) -> None:
        held = self.held()
        for stage in [stage for stage in self._declarations if stage not in held]:
            del self._declarations[stage]

    # ---- uplink of the own site ----

    def result(self, stage: int, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        """See `Uplink.result`."""
        self._results.append((stage, lo, hi, body, elapsed_us))
        self._wait_for(stage, lo, hi)

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
        )
        self._failures.append(told)
        self._wait_for(stage, failure.index, failure.index + 1)

    def _wait_for(self, stage: int, lo: int, hi: int) -> None:
        self._waiting.setdefault(stage, RangeSet()).add(lo, hi)
        self._bell.ring()

    def printed(self, message: wire.Print, data: bytes) -> None:
        """See `Uplink.printed`."""
        if self._print_bytes + len(data) > limits.PRINT_BYTES_PER_S * limits.HEARTBEAT_S:
            self._print_dropped += len(data)
            return
        self._print_bytes += len(data)
        self._prints.append((message.stage, message.index, message.fd, data))
        self._bell.ring()

    def relay(self, worker: SiteWorker, message: wire.Message, body: Body) -> None:
        """See `Uplink.relay`."""
        self._post.post_frame(self.leader, self._data, self.job, worker.token, message, body)

    def relay_closed(self, worker: SiteWorker) -> None:
        """See `Uplink.relay_closed`."""
        self._post.post(self.leader, RelayClosed(self.job, worker.token))

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
            case Accepted(number=number, session=session) if session == self._session:
                self._word_s = self.heard_s
                for sent in [n for n in self._sent if n <= number]:
                    self._drop_sent(self._sent.pop(sent))
                self._acknowledged.ring()
            case Drop(ranges=ranges):
                works = [Work(stage, *part) for stage, parts in ranges for part in parts if stage in self.site.stages]
                for work in works:
                    if work.lo < work.hi:
                        self.site.drop(*work)
                self._release_segments([work for work in works if work.lo < work.hi])
            case Accepted():
                pass  # of an earlier session
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
                frame = wire.Result(frame.stage, frame.lo, frame.hi, copy, frame.first)
        worker.post(frame, message.body)  # type: ignore[arg-type]

    # ---- sending ----

    async def run(self) -> None:
        """Send completions, prints and claims until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_completions)
            while True:
                self._claim()
                await trio.sleep(limits.HEARTBEAT_S)

    def _claim(self) -> None:
        now_s = trio.current_time()
        self.giver.expire(now_s)
        if self._sent and now_s - self._word_s > limits.RESEND_S:
            self._word_s = now_s
            for sent in list(self._sent.values())[:RESENT_MAX]:
                self._post.post(self.leader, sent.message)
        held = tuple((stage, tuple(ranges)) for stage, ranges in self.held().items())
        have, self._data.fetched = self._data.fetched[: limits.HAVE_MAX], self._data.fetched[limits.HAVE_MAX :]
        workshop = self.site.workshop
        self._post.post(self.leader, Claims(self.job, self.epoch, held, workshop.slots, workshop.busy, tuple(have), self.blocked))
        self._print_bytes = 0
        self._send_prints()

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
        for stage, ranges in self._waiting.items():
            table.setdefault(stage, RangeSet()).update(ranges)
        for sent in self._sent.values():
            for work in sent.ranges:
                table.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        return table

    async def settled(self) -> None:
        """Return once the leader has acknowledged all that was finished here."""
        while self._results or self._failures or self._sent:
            await self._acknowledged.wait()

    async def _send_completions(self) -> None:
        while True:
            while len(self._sent) >= UNACKNOWLEDGED_MAX:
                await self._acknowledged.wait()
            if not self._results and not self._failures:
                await self._bell.wait()
                if self._prints and not self._results:
                    self._send_prints()
                continue
            batch = await self._batch()
            self._send_prints()
            self._post.post(self.leader, batch)
            await trio.sleep(limits.COMPLETION_DELAY_S)

    async def _batch(self) -> Completed:
        """Sign the oldest reports as one completion."""
        results: list[ResultRange] = []
        sent = _Sent(None, [], [])  # type: ignore[arg-type]
        inline_bytes = 0
        while self._results and inline_bytes < limits.COMPLETION_BYTES_MAX and len(results) < 4096:
            stage, lo, hi, body, elapsed_us = self._results.popleft()
            size = bodies.size_of(body)
            inline, blob = b"", b""
            if size <= limits.RESULT_INLINE_BYTES:
                inline = bodies.read(body)
                inline_bytes += size
                bodies.release(body)
            else:
                blob = await self._store(body)
                sent.blobs.append(blob)
            results.append(ResultRange(stage, self._functions[stage], lo, hi, lo, inline, blob, size, elapsed_us))
            sent.ranges.append(Work(stage, lo, hi))
        failures: list[TaskFailure] = []
        while self._failures and len(failures) < 64 and inline_bytes < limits.COMPLETION_BYTES_MAX:
            failures.append(self._failures.popleft())
            inline_bytes += _size_of(failures[-1])
        sent.ranges += [Work(failure.stage, failure.index, failure.index + 1) for failure in failures]
        for work in sent.ranges:
            waiting = self._waiting[work.stage]
            waiting.remove(work.lo, work.hi)
            if not waiting:
                del self._waiting[work.stage]
        if not self._sent:
            self._word_s = trio.current_time()
        self._number += 1
        completion = Completion(self.job, self.epoch, self._number, tuple(results), tuple(failures), self._session)
        sent.message = Completed(sign(completion, COMPLETION_DOMAIN, self._identity))
        self._sent[self._number] = sent
        self._release_segments(sent.ranges)
        return sent.message

    async def _store(self, body: Body) -> bytes:
        if isinstance(body, FileSlice) and body.whole and body.file.owned:
            return await self._data.put(body.file.path, b"")
        return await self._data.put("", bodies.read(body))

    def _release_segments(self, ranges: list[Work]) -> None:
        """Let segments go of which nothing is held here any more, not even on its way to a thief."""
        held = self.site.held()
        for work in self.giver.held():
            held.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        nothing = RangeSet()
        for work in ranges:
            mine = held.get(work.stage, nothing)
            for segment in self.site.stages[work.stage].segments.overlapping(work.lo, work.hi):
                if not mine.touches(segment.first, segment.end):
                    self.site.forget(work.stage, segment.first, segment.end)

    def _drop_sent(self, sent: _Sent) -> None:
        for blob in sent.blobs:
            self._data.store.unpin(self._data.owner, blob)  # type: ignore[arg-type]

    def reconnected(self) -> None:
        """The leader is there again: say everything again that it did not acknowledge."""
        for sent in self._sent.values():
            self._post.post(self.leader, sent.message)

    def disconnected(self) -> None:
        """The leader's connection ended."""
        for worker in list(self.site.workers):
            if worker.nests:
                worker.end("dropped")


def _size_of(failure: TaskFailure) -> int:
    """In bytes, about."""
    return len(failure.message.encode()) + len(failure.traceback.encode()) + len(failure.exception) + 256
