"""The leader of one job: it takes stages from the driver, settles tasks, and hands ranges to its own site and to thieves.

It is the `Uplink` of the site on its own peer; what thieves send reaches the same methods through `grid.outreach`.
Rules:
- a task is settled once (the ledger decides), and what was settled reaches its producer once, in the stage's order;
- all here is synchronous: a frame from a worker has reached the driver's channel when the handler returns;
- argument bytes over the memory bound are on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.bundle import StageOptions, segment_name
from grid.core.deque import DequeFull, Work
from grid.core.errors import RefusedError
from grid.core.job import JobId
from grid.core.ledger import Ledger, StageState
from grid.core.liveness import Claims
from grid.core.ranges import RangeSet
from grid.core.segments import Segment
from grid.producer import Item, Producer
from grid.recorder import Recorder
from grid.site import Site
from grid.siteworker import SiteWorker

if TYPE_CHECKING:
    from grid.core.facts import Stored
    from grid.replaying import Replaying
    from grid.speculating import Speculator

DIGEST_THREADS_BYTES = 1 << 20
"""A segment from this size on is hashed on all cores."""
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
        recorder: Recorder | None = None,
        next_stage: int = 0,
    ) -> None:
        self.recorder = recorder or Recorder()
        self.replaying: Replaying | None = None
        self.speculator: Speculator | None = None
        self.early = False
        """The driver takes results from workers of this machine, too, if it waits for nothing else; not while it is replayed."""
        self.on_disputed: Callable[[], None] = lambda: None
        self.job = job
        self.me = me
        self.defaults = defaults
        self.spool = spool
        self.ledger = Ledger(next_stage)
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
        self.declared_listeners: list[Callable[[int], None]] = []

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
        first: tuple[int, bytes] | None = None,
    ) -> StageState:
        """Called by the producer. first: (count, digest) of the stage's first segment, where a replay needs it."""
        digest, body, _ = function
        index = self.replaying.open(digest, name, ordered, parent, options, first) if self.replaying else None
        stage = self.ledger.open_stage(
            name=name,
            ordered=ordered,
            options=options,
            function=digest,
            function_size=bodies.size_of(body),
            parent=parent,
            occurrence=occurrence,
            index=index,
        )
        if index is None:
            self.recorder.stage(stage)
            if self.replaying is not None:
                self.replaying.opened(stage)
        self.functions.setdefault(digest, body)
        self._owners[stage.index] = producer
        self.site.add_stage(stage.index, options, self.site.add_function(digest, body))
        self.changed()
        return stage

    def digests(self, lengths: Sequence[int], body: Body) -> list[bytes]:
        """BLAKE3 of each segment of a page; nothing when nobody will ask for it, or not yet (`add_page`)."""
        if not self.recorder.keeps or (self.replaying is None and len(lengths) == 1 and isinstance(body, FileSlice)):
            return []
        if len(lengths) == 1:
            return [bodies.hash_of(body)]
        data = memoryview(bodies.read(body))
        found: list[bytes] = []
        at = 0
        for length in lengths:
            threads = blake3.AUTO if length >= DIGEST_THREADS_BYTES else 1
            found.append(blake3(data[at : at + length], max_threads=threads).digest())
            at += length
        return found

    def add_page(
        self,
        stage: StageState,
        first: int,
        pieces: list[tuple[int, int, tuple[bytes, ...]]],
        body: Body,
        digests: list[bytes],
        made_as: int = -1,
    ) -> None:
        """Declare a page's tasks and queue them. digests: what `digests` returned for it; made_as: the driver's number
        for it, if its calls are submitted one by one."""
        lo, hi = self.ledger.add_segments(stage.index, first, pieces)
        if lo == hi or stage.cancelled:
            bodies.release(body)
            return
        total = bodies.size_of(body)
        data = body if isinstance(body, bytes) else None
        if isinstance(body, bytes) and self._argument_memory + total > limits.ARGUMENT_MEMORY_BYTES_MAX:
            body = FileSlice(self.spool.write("page", body), 0, total)
        offset = 0
        if isinstance(body, FileSlice):
            body.file.owners = len(pieces)
        at = lo
        for number, (count, length, refs) in enumerate(pieces):
            piece: Body
            if isinstance(body, FileSlice):
                piece = FileSlice(body.file, body.offset + offset, length)
            else:
                piece = body if length == total else body[offset : offset + length]
                self._argument_memory += length
            self.argument_bytes += length
            digest = digests[number] if digests else b""
            blob = digest if length <= limits.SEGMENT_INLINE_BYTES else b""
            self.site.hold(stage.index, Segment(at, count, length, refs), piece, blob, digest=digest)
            at += count
            offset += length
        if digests and self.replaying is not None:
            table = _table(pieces, digests)
            for work in self._replay(self.replaying, stage, lo, table, data):
                self._push(work, head=stage.parent is not None)
        else:
            alone = self.early and made_as >= 0 and self.ledger.unsettled == 1
            self._push(Work(stage.index, lo, hi), head=stage.parent is not None, early=made_as if alone else -1)
            if digests:  # a worker has begun meanwhile; what it says is heard after this call
                self.recorder.segments(stage.index, lo, _table(pieces, digests), data)
            elif self.recorder.keeps and isinstance(body, FileSlice):
                self._name_later(stage, lo, body)
        self._worked()
        self.changed()

    def _name_later(self, stage: StageState, first: int, body: FileSlice) -> None:
        """A large segment is hashed while a worker, which needs no name for it, reads it."""
        held = self.site.stages[stage.index].held[first]

        def named(digest: bytes) -> None:
            held.digest = digest

        self.recorder.large_segment(stage.index, first, held.segment.count, body, named)

    def _replay(
        self, replaying: Replaying, stage: StageState, lo: int, table: list[tuple[int, int, bytes]], data: bytes | None
    ) -> list[Work]:
        """Find a page in the record; returns what of it must run."""
        works = replaying.declare(stage, lo, table, data)
        for listener in self.declared_listeners:
            listener(stage.index)  # results that came before their tasks were declared settle some of them
        return [Work(stage.index, *part) for work in works for part in stage.settled.gaps(work.lo, work.hi)]

    def close_stage(self, stage: StageState, total: int) -> None:
        """No task follows. Raises RefusedError."""
        known = stage.total
        self.ledger.close_stage(stage.index, total)
        if known is None and not (self.replaying is not None and self.replaying.is_closed(stage.index, total)):
            self.recorder.closed(stage.index, total)
        self.changed()

    def _push(self, work: Work, head: bool = False, early: int = -1) -> None:
        try:
            self.site.push([work], head, early)
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
        self.complete(self.me, stage, self.ledger.stage(stage).function, lo, hi, lo, body, elapsed_us)

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

    def disputed(self) -> None:
        """See `Uplink.disputed`."""
        self.on_disputed()

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

    def check_segment(self, index: int, task: int, name: bytes) -> None:
        """Raises RefusedError when the task's arguments are declared, and not as the segment of this name."""
        segment = self.ledger.stage(index).segments.at(task)
        held = self.site.stages[index].held.get(segment.first) if segment is not None else None
        if segment is None or held is None or not (held.digest or self.recorder.keeps):
            return
        if not held.digest and held.body is not None:  # it is being hashed
            held.digest = bodies.hash_of(held.body)
        if segment_name(segment.first, held.digest) != name:
            raise RefusedError(f"task {task} of stage {index} has other arguments in this epoch")

    def complete(
        self,
        peer: PeerId,
        index: int,
        function: bytes,
        lo: int,
        hi: int,
        first: int,
        body: Body,
        elapsed_us: int = 0,
        stored: Stored | None = None,
    ) -> int:
        """A peer finished tasks [lo, hi). Returns how many of them were new. Raises RefusedError."""
        stage = self.ledger.stage(index)
        if peer != self.me:
            self.site.crew.hear()  # the driver may act on it already: then it counts
        new = self.ledger.complete(index, function, lo, hi)
        tally = self.tallies.setdefault(peer, PeerTally())
        tally.executed += hi - lo
        if self.speculator is not None:
            self.speculator.finished(peer, index, hi - lo, elapsed_us)
        if not new:
            bodies.release(body)
            return 0
        if isinstance(body, FileSlice):
            body.file.owners += len(new) - 1
        count = 0
        deliver_first = isinstance(body, bytes)  # the driver can go on meanwhile; a file would be its own then
        if deliver_first:
            self._deliver(stage, new, first, body)
        for a, b in new:
            share_us = elapsed_us * (b - a) // (hi - lo)
            self.recorder.done(stage, a, b, first, body, peer, share_us, stored)
            count += b - a
        if not deliver_first:
            self._deliver(stage, new, first, body)
        for a, b in new:
            if peer != self.me:
                self.site.crew.contest(index, a, b)
            self._settled(stage, a, b, elsewhere=peer != self.me, by=peer)
        tally.done += count
        self.changed()
        return count

    def _deliver(self, stage: StageState, new: list[tuple[int, int]], first: int, body: Body) -> None:
        """Give results to who made the stage. What it says next is heard after this call: the facts still come first."""
        for a, b in new:
            self._owners[stage.index].settle(stage, a, b, Item(body, a - first))

    def recorded(self, stage: StageState, lo: int, hi: int, skip: int, body: Body, peer: bytes) -> None:
        """Tasks [lo, hi) were done in an earlier epoch: their results are the body's values after the first `skip`."""
        new = self.ledger.complete(stage.index, stage.function, lo, hi)
        if not new:
            bodies.release(body)
            return
        if isinstance(body, FileSlice):
            body.file.owners += len(new) - 1
        for a, b in new:
            self.tallies.setdefault(PeerId(peer), PeerTally()).done += b - a
            self._owners[stage.index].settle(stage, a, b, Item(body, skip + a - lo))
            self._settled(stage, a, b, elsewhere=True)
        self.changed()

    def recorded_failure(self, stage: StageState, failure: wire.Failed, exception: bytes) -> None:
        """The task failed for good in an earlier epoch."""
        index = failure.index
        if index in stage.settled:
            return
        stage.settled.add(index, index + 1)
        stage.failed += 1
        self._owners[stage.index].settle(stage, index, index + 1, Item(None, 0, failure, exception))
        self._settled(stage, index, index + 1, elsewhere=True)
        self.changed()

    def compare(self, number: int, stage: StageState, first: int, count: int, old: bytes, new: bytes) -> bool:
        """Have the stage's child compare two segments; False: it can't."""
        return self._owners[stage.index].compare(number, stage.index, first, count, old, new)

    def deliver(self, index: int, lo: int, hi: int, item: Item) -> None:
        """What waited for its turn goes to its child."""
        self._owners[index].deliver(index, lo, hi, item)

    def run_again(self, work: Work, first: bool = True) -> None:
        """Queue what of a range is not settled; first: before all else."""
        for part in self.ledger.stage(work.stage).settled.gaps(work.lo, work.hi):
            self._push(Work(work.stage, *part), head=first)
        self._worked()

    def fail(self, peer: PeerId, index: int, function: bytes, failure: wire.Failed, exception: bytes) -> None:
        """A task failed on a peer: run it again, or tell its producer. Raises RefusedError."""
        stage = self.ledger.stage(index)
        if peer != self.me:
            self.site.crew.hear()  # as in `complete`
        self.tallies.setdefault(peer, PeerTally()).executed += 1
        again = self.ledger.fail(index, function, failure.index, failure.kind)
        if again is None:
            return
        if again:
            self.site.stages[index].attempts[failure.index] = self.ledger.attempt(index, failure.index)
            self._push(Work(index, failure.index, failure.index + 1), head=True)
            return
        if peer != self.me:
            self.site.crew.contest(index, failure.index, failure.index + 1)
        self.recorder.failed(index, failure, exception, peer)
        self._owners[index].settle(stage, failure.index, failure.index + 1, Item(None, 0, failure, exception))
        self._settled(stage, failure.index, failure.index + 1, elsewhere=peer != self.me)
        self.changed()

    def cancel(self, index: int, lo: int, hi: int, record: bool = False) -> None:
        """Tasks [lo, hi) (hi = -1: all) are no longer wanted; record: because the script said so."""
        stage = self.ledger.stage(index)
        if record:
            self.recorder.cancelled(index, lo, hi)
        for a, b in self.ledger.cancel(index, lo, hi):
            for listener in self.cancelled_listeners:
                listener(index, a, b)
            self._owners[index].settle(stage, a, b, Item())
            self._settled(stage, a, b, elsewhere=True)
        if self.replaying is not None and record:
            for number, a, b, item in self.replaying.strike(index, lo, hi):
                self.deliver(number, a, b, item)
        self.changed()

    def _settled(self, stage: StageState, lo: int, hi: int, elsewhere: bool, by: PeerId | None = None) -> None:
        if elsewhere:
            self.site.drop(stage.index, lo, hi)
        if self.speculator is not None:
            self.speculator.settled(stage.index, lo, hi, by)
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
        for work in [*self._overflow, *self.giving, *(self.replaying.held() if self.replaying else ())]:
            own.setdefault(work.stage, RangeSet()).add(work.lo, work.hi)
        if self.replaying is not None:
            for late in self.replaying.sweep():
                self.deliver(*late)
        requeued = [Work(*lost) for lost in self.claims.sweep(missing, own, now_s)]
        for work in requeued:
            self._push(work, head=True)
        if requeued:
            self._worked()
        return requeued

    @property
    def unsettled(self) -> int:
        """Tasks declared and not settled."""
        return self.ledger.unsettled


def _table(pieces: list[tuple[int, int, tuple[bytes, ...]]], digests: list[bytes]) -> list[tuple[int, int, bytes]]:
    """(count, size, BLAKE3) a segment."""
    return [(count, size, digest) for (count, size, _), digest in zip(pieces, digests, strict=True)]


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
    post(wire.Result(message.stage, message.lo, message.hi, path, message.skip), b"")
