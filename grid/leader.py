"""The leader of one job: it takes stages from the driver, settles tasks, and hands ranges to its own site and to thieves.

It is the `Uplink` of the site on its own peer; what thieves send reaches the same methods through `grid.outreach`.
Rules:
- a task is settled once (the ledger decides), and what was settled reaches its producer once, in the stage's order;
- all here is synchronous: a frame from a worker has reached the driver's channel when the handler returns;
- argument bytes over the memory bound are on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.deque import DequeFull, Work
from grid.core.errors import RefusedError
from grid.core.job import JobId
from grid.core.ledger import Ledger, StageState
from grid.core.liveness import Claims
from grid.core.ranges import RangeSet
from grid.core.segments import Segment
from grid.producer import Item, Producer
from grid.site import Site
from grid.siteworker import SiteWorker

OVERFLOW_RANGES_MIN = 1024
"""Ranges in the deque below which what did not fit into it moves in."""


@dataclass(slots=True)
class PeerTally:
    """What one peer did for the job: tasks settled by it, executed in all, received by stealing."""

    done: int = 0
    executed: int = 0
    stolen: int = 0


class Leader:
    """One job's leadership on this peer. `site` is set by whoever opens it, before the first frame."""

    site: Site

    def __init__(
        self,
        job: JobId,
        me: PeerId,
        defaults: StageOptions,
        spool: bodies.Spool,
        printed: Callable[[PeerId, int, int, int, bytes], None],
        worked: Callable[[], None] = lambda: None,
    ) -> None:
        self.job = job
        self.me = me
        self.defaults = defaults
        self.spool = spool
        self.ledger = Ledger()
        self.claims = Claims()
        self.tallies: dict[PeerId, PeerTally] = {me: PeerTally()}
        self.argument_bytes = 0
        self.bell = Bell()
        self._argument_memory = 0
        self._owners: dict[int, Producer] = {}
        self._children: dict[object, Producer] = {}
        self._overflow: deque[Work] = deque()
        self._print = printed
        self._worked = worked
        self.functions: dict[bytes, Body] = {}
        self.cancelled_listeners: list[Callable[[int, int, int], None]] = []
        self.throttled: set[Producer] = set()
        self.giving: list[Work] = []

    def changed(self) -> None:
        """Progress for whoever watches."""
        self.bell.ring()

    # ---- stages ----

    def open_stage(
        self,
        producer: Producer,
        function: tuple[bytes, Body, str],
        name: str,
        ordered: bool,
        options: StageOptions,
        parent: tuple[int, int] | None,
        occurrence: int,
    ) -> StageState:
        """Called by the producer."""
        digest, body, _ = function
        stage = self.ledger.open_stage(
            name=name,
            ordered=ordered,
            options=options,
            function=digest,
            function_size=bodies.size_of(body),
            parent=parent,
            occurrence=occurrence,
        )
        self.functions.setdefault(digest, body)
        self._owners[stage.index] = producer
        self.site.add_stage(stage.index, options, self.site.add_function(digest, body))
        self.changed()
        return stage

    def add_page(self, stage: StageState, first: int, pieces: list[tuple[int, int, tuple[bytes, ...]]], body: Body) -> None:
        """Declare a page's tasks and queue them."""
        lo, hi = self.ledger.add_segments(stage.index, first, pieces)
        if lo == hi or stage.cancelled:
            bodies.release(body)
            return
        total = bodies.size_of(body)
        if isinstance(body, bytes) and self._argument_memory + total > limits.ARGUMENT_MEMORY_BYTES_MAX:
            body = FileSlice(self.spool.write("page", body), 0, total)
        offset = 0
        if isinstance(body, FileSlice):
            body.file.owners = len(pieces)
        at = lo
        for count, length, refs in pieces:
            piece: Body
            if isinstance(body, FileSlice):
                piece = FileSlice(body.file, body.offset + offset, length)
            else:
                piece = body if length == total else body[offset : offset + length]
                self._argument_memory += length
            self.argument_bytes += length
            self.site.hold(stage.index, Segment(at, count, length, refs), piece)
            at += count
            offset += length
        self._push(Work(stage.index, lo, hi), head=stage.parent is not None)
        self._worked()
        self.changed()

    def _push(self, work: Work, head: bool = False) -> None:
        try:
            self.site.push([work], head)
        except DequeFull:
            self._overflow.append(work)

    def take_back(self, work: Work) -> int:
        """A thief hands queued tasks back. Returns how many of them were still to be done."""
        stage = self.ledger.stage(work.stage)
        if not 0 <= work.lo < work.hi <= stage.declared:
            raise RefusedError(f"stage {work.stage} has {stage.declared} tasks, not [{work.lo}, {work.hi})")
        parts = stage.settled.gaps(work.lo, work.hi)
        for lo, hi in parts:
            self._push(Work(work.stage, lo, hi), head=True)
        return sum(hi - lo for lo, hi in parts)

    # ---- uplink of the own site ----

    def result(self, stage: int, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        """See `Uplink.result`."""
        self.complete(self.me, stage, self.ledger.stage(stage).function, lo, hi, lo, body)

    def failure(self, stage: int, failure: wire.Failed, exception: bytes) -> None:
        """See `Uplink.failure`."""
        self.fail(self.me, stage, self.ledger.stage(stage).function, failure, exception)

    def printed(self, message: wire.Print, data: bytes) -> None:
        """See `Uplink.printed`."""
        self.print_from(self.me, message.stage, message.index, message.fd, data)

    def relay(self, worker: SiteWorker, message: wire.Message, body: Body) -> None:
        """See `Uplink.relay`."""

        def post(answer: wire.ToChild, data: Body) -> None:
            post_body(self.spool, worker.post, answer, data)

        try:
            self.relay_from(worker, post, message, body)
        except RefusedError as error:
            worker.end(str(error))

    def relay_closed(self, worker: SiteWorker) -> None:
        """See `Uplink.relay_closed`."""
        self.close_child(worker)

    def returned(self, stage: int, lo: int, hi: int) -> None:
        """See `Uplink.returned`: nothing to do. What has no segment any more is settled, the rest the next sweeps requeue."""

    # ---- from anywhere ----

    def print_from(self, peer: PeerId, stage: int, index: int, fd: int, data: bytes) -> None:
        """A task on a peer wrote something."""
        self._print(peer, stage, index, fd, data)

    def relay_from(self, key: object, post: Callable[[wire.ToChild, Body], None], message: wire.Message, body: Body) -> None:
        """A frame of a task's child stages. Raises RefusedError."""
        producer = self._children.get(key)
        if producer is None:
            producer = self._children[key] = Producer(self, post, nested=True)
        producer.handle(message, body)

    def close_child(self, key: object) -> None:
        """The task's process is gone."""
        producer = self._children.pop(key, None)
        if producer is not None:
            producer.close()

    def close_children(self, which: Callable[[object], bool]) -> list[object]:
        """Close the producers whose keys match: their peer is gone. Returns the keys."""
        keys = [key for key in self._children if which(key)]
        for key in keys:
            self.close_child(key)
        return keys

    def complete(self, peer: PeerId, index: int, function: bytes, lo: int, hi: int, first: int, body: Body) -> int:
        """A peer finished tasks [lo, hi). Returns how many of them were new. Raises RefusedError."""
        stage = self.ledger.stage(index)
        new = self.ledger.complete(index, function, lo, hi)
        tally = self.tallies.setdefault(peer, PeerTally())
        tally.executed += hi - lo
        if not new:
            bodies.release(body)
            return 0
        if isinstance(body, FileSlice):
            body.file.owners += len(new) - 1
        count = 0
        for a, b in new:
            self._owners[index].settle(stage, a, b, Item(body, first))
            count += b - a
            self._settled(stage, a, b, elsewhere=peer != self.me)
        tally.done += count
        self.changed()
        return count

    def fail(self, peer: PeerId, index: int, function: bytes, failure: wire.Failed, exception: bytes) -> None:
        """A task failed on a peer: run it again, or tell its producer. Raises RefusedError."""
        stage = self.ledger.stage(index)
        self.tallies.setdefault(peer, PeerTally()).executed += 1
        again = self.ledger.fail(index, function, failure.index, failure.kind)
        if again is None:
            return
        if again:
            self.site.stages[index].attempts[failure.index] = self.ledger.attempt(index, failure.index)
            self._push(Work(index, failure.index, failure.index + 1), head=True)
            return
        self._owners[index].settle(stage, failure.index, failure.index + 1, Item(None, 0, failure, exception))
        self._settled(stage, failure.index, failure.index + 1, elsewhere=peer != self.me)
        self.changed()

    def cancel(self, index: int, lo: int, hi: int) -> None:
        """Tasks [lo, hi) (hi = -1: all) are no longer wanted."""
        stage = self.ledger.stage(index)
        for a, b in self.ledger.cancel(index, lo, hi):
            for listener in self.cancelled_listeners:
                listener(index, a, b)
            self._owners[index].settle(stage, a, b, Item())
            self._settled(stage, a, b, elsewhere=True)
        self.changed()

    def _settled(self, stage: StageState, lo: int, hi: int, elsewhere: bool) -> None:
        if elsewhere:
            self.site.drop(stage.index, lo, hi)
        self.claims.settle(stage.index, lo, hi)
        table = self.site.stages[stage.index].held
        for segment in stage.segments.overlapping(lo, hi):
            held = table.get(segment.first)
            if held is not None and stage.settled.covers(segment.first, segment.end):
                self.argument_bytes -= segment.size
                if held.body is not None:
                    self._argument_memory -= bodies.memory_of(held.body)
                self.site.forget(stage.index, segment.first, segment.end)
                stage.segments.remove(segment.first)
        while self._overflow and len(self.site.deque) < OVERFLOW_RANGES_MIN:
            index, a, b = self._overflow.popleft()
            for part in self.ledger.stage(index).settled.gaps(a, b):
                self._push(Work(index, *part))
        if self.throttled:
            for producer in list(self.throttled):
                producer.relax()

    # ---- housekeeping ----

    def sweep(self, now_s: float) -> list[Work]:
        """Once a heartbeat: requeue what nobody claims any more; returns it."""
        missing = {stage.index: self.ledger.missing(stage.index) for stage in self.ledger.stages if stage.unsettled}
        own = self.site.held()
        for work in [*self._overflow, *self.giving]:
            own.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        requeued = [Work(*lost) for lost in self.claims.sweep(missing, own, now_s)]
        for work in requeued:
            self._push(work, head=True)
        if requeued:
            self._worked()
        return requeued

    @property
    def unsettled(self) -> int:
        """Tasks declared and not settled."""
        return sum(stage.unsettled for stage in self.ledger.stages)


def post_body(spool: bodies.Spool, post: Callable[[wire.ToChild, bytes], None], message: wire.ToChild, body: Body) -> None:
    """Send a frame to a local child, its body inline where it fits, else as a file that the child then owns."""
    if bodies.size_of(body) <= wire.INLINE_BYTES_MAX and not (isinstance(body, FileSlice) and body.whole):
        post(message, bodies.read(body))
        bodies.release(body)
        return
    assert isinstance(message, wire.Result)
    if isinstance(body, FileSlice) and body.whole:
        mine = body.file.owned and body.file.owners <= 1  # else others need it: a result of which only parts were new
        path = body.file.path if mine else spool.link(body.file.path)
        if not mine:
            bodies.release(body)
    else:
        path = spool.as_file(body)
        bodies.release(body)
    post(wire.Result(message.stage, message.lo, message.hi, path, message.first), b"")
