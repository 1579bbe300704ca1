"""From a leadership's deeds to facts in the job's replicated log, in the order in which they happened.

Rules:
- order is kept: a fact whose bytes must first be stored holds back what was said after it, so that the driver's output never
  enters the log before what the driver had seen;
- small bytes go into the log itself, up to a budget a job; others into blobs, several results in one; what is cheaper to make
  again than to copy, and pure, is not kept at all;
- nothing here waits or fails: what can't be kept (a full disk) is recorded as done without bytes, a replay runs it again.
A job without replicas (the embedded grid, `grid.connect`) has the base class, which keeps nothing.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.blobs.blob import StoreFull
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.errors import NotLeadingError
from grid.core.facts import (
    DIGEST_BYTES,
    AnyFact,
    Ended,
    Output,
    RangeCancelled,
    RangeDone,
    Redo,
    SegmentsCut,
    StageClosed,
    StageOpened,
    Stored,
    TaskFailed,
    Told,
    Where,
)
from grid.keeping import owner_of

if TYPE_CHECKING:
    from grid.blobs.store import BlobStore
    from grid.core.job import JobId
    from grid.core.ledger import StageState
    from grid.replica import Replica

INLINE_RANGE_BYTES: Final = 4 << 10
"""Result or argument bytes of one range that go into the log itself: about what naming a blob and fetching it would cost."""
INLINE_JOB_BYTES: Final = 4 << 20
"""Such bytes of one job: a ledger stays a few MB, its snapshots cost as much."""
PACK_BYTES: Final = 4 << 20
"""Of results in one blob."""
ALONE_BYTES: Final = 1 << 20
"""A result from this size on is a blob of its own. What a blob costs two peers besides its bytes (files, fsyncs, messages) is as
much as this many bytes cost."""
GATHER_S: Final = 0.1
"""How long results may wait for company in a blob, while nothing that stands behind them is to be shown (cf. PATIENCE_S)."""
ARGUMENTS_KEPT_BYTES_MAX: Final = 64 << 20
"""Argument bytes of one job that are kept for comparing with those of a replay; beyond it differing segments run again."""
COPY_BYTES_PER_S: Final = 100e6
"""What a gigabit network copies. Results of pure tasks that were made faster than that are made again when they are needed."""
COPY_S: Final = 0.002
"""What keeping the results of a range costs besides, however few they are: hash, files, flushes and messages took three peers so
much of their processors' time, measured with ranges of 5,000 integers."""
OUTPUT_BYTES_MAX: Final = 64 << 10
"""Of output in one fact."""
OUTPUT_CHECK_BYTES: Final = 1 << 20
"""Between two looks at how much of the disk is free: the job's log still has to take its outcome."""
PATIENT: Final = (StageOpened, SegmentsCut, StageClosed, RangeDone, TaskFailed, RangeCancelled)
"""Facts that nobody waits for until something is shown, which then takes them along: facts keep their order."""
Kept = Callable[[bytes, int, float, list[PeerId]], None]
log = logging.getLogger(__name__)


class Recorder:
    """Keeps nothing. The methods are those of `LogRecorder`."""

    keeps = False
    """Whether segment digests are wanted."""

    async def flushed(self) -> None:
        """Return when all that was said is on a majority's disks, without hurrying it. Raises NotLeadingError."""

    def stage(self, stage: StageState) -> None:
        """A stage was opened."""

    def segments(self, stage: int, first: int, pieces: Sequence[tuple[int, int, bytes]], data: bytes | None) -> None:
        """Tasks from `first` on: (count, size, BLAKE3) a segment; data: the segments' bytes, if they are at hand."""

    def large_segment(self, stage: int, first: int, count: int, body: FileSlice, named: Callable[[bytes], None]) -> None:
        """A segment that is not hashed yet; body: stays the caller's. named: told its BLAKE3 before the log is."""

    def closed(self, stage: int, total: int) -> None:
        """No task follows."""

    def done(
        self,
        stage: StageState,
        lo: int,
        hi: int,
        first: int,
        body: Body,
        peer: PeerId,
        elapsed_us: int,
        stored: Stored | None = None,
    ) -> None:
        """Tasks [lo, hi) are done; body: their result segment, stays the caller's. stored: it is a blob already."""

    def again(self, fact: AnyFact) -> None:
        """A fact of an earlier epoch, said anew at another place."""

    def failed(self, stage: int, failure: wire.Failed, exception: bytes, peer: PeerId) -> None:
        """A task failed for good."""

    def cancelled(self, stage: int, lo: int, hi: int) -> None:
        """Tasks are not wanted any more; hi = -1: all, and what comes."""

    def redo(self, stage: int, lo: int, hi: int) -> None:
        """No copy of these results is to be had."""


class LogRecorder(Recorder):
    """The recorder of a replicated job. `run` stores what does not go into the log itself."""

    keeps = True

    def __init__(
        self,
        job: JobId,
        me: PeerId,
        replica: Replica,
        store: BlobStore,
        spool: bodies.Spool,
        kept: Kept | None = None,
    ) -> None:
        """kept: told each blob stored for results, its size in bytes, the seconds it took to make, and who else has it."""
        self.owner = owner_of(job)
        self.length = dict(replica.chronicle.output_length)
        self.lost = False
        self._me = me
        self._replica = replica
        self._store = store
        self._spool = spool
        self._kept = kept or (lambda blob, size, made_s, holders: None)
        self._queue: deque[AnyFact | _Unstored | _Unnamed] = deque()
        self._inline_bytes = replica.chronicle.inline_bytes
        self._argument_bytes = 0
        self._unstored_bytes = 0
        self._hurried = 0  # facts in the queue for which somebody waits
        self._bell = Bell()
        self._storing = trio.Lock()
        self._sequence = 0
        self._unchecked_bytes = 0
        self._said = 0
        self._proposed = 0
        self._passed_on = Bell()

    # ---- saying ----

    def _say(self, fact: AnyFact | _Unstored | _Unnamed) -> None:
        self._said += 1
        if not self._queue and not isinstance(fact, _WAITING):
            self._propose([fact], patient=isinstance(fact, PATIENT))
            return
        first = not self._queue
        self._queue.append(fact)
        if isinstance(fact, _Unstored):
            self._unstored_bytes += fact.size
        elif not isinstance(fact, (*PATIENT, _Unnamed)):
            self._hurried += 1
        if first or not self._gathering:
            self._bell.ring()

    def _propose(self, facts: list[AnyFact], patient: bool) -> None:
        if self.lost:
            return
        try:
            self._sequence = self._replica.propose(facts, patient=patient)
            self._proposed += len(facts)
        except NotLeadingError:
            self.lost = True
        self._passed_on.ring()

    async def flushed(self) -> None:
        said = self._said
        while self._proposed < said and not self.lost:
            await self._passed_on.wait()
        if self.lost:
            raise NotLeadingError("another peer leads the job")
        await self._replica.committed(self._sequence, patient=True)

    def _where(self, data: bytes) -> Where:
        """Bytes in the log itself, while the budget lasts."""
        if len(data) > INLINE_RANGE_BYTES or self._inline_bytes + len(data) > INLINE_JOB_BYTES:
            return None
        self._inline_bytes += len(data)
        return data

    def stage(self, stage: StageState) -> None:
        self._say(
            StageOpened(stage.index, stage.function, stage.function_size, stage.name, stage.ordered, stage.options, stage.parent)
        )

    def segments(self, stage: int, first: int, pieces: Sequence[tuple[int, int, bytes]], data: bytes | None) -> None:
        short = tuple((count, size, digest[:DIGEST_BYTES]) for count, size, digest in pieces)
        alone = all(count == 1 for count, _, _ in pieces)  # whose digests tell them apart
        if data is None or alone or self._argument_bytes + len(data) > ARGUMENTS_KEPT_BYTES_MAX:
            self._say(SegmentsCut(stage, first, short))
            return
        self._argument_bytes += len(data)
        where = self._where(data)
        if where is not None:
            self._say(SegmentsCut(stage, first, short, where))
        else:
            self._say(_Unstored(data, len(data), 0.0, lambda stored: SegmentsCut(stage, first, short, stored)))

    def large_segment(self, stage: int, first: int, count: int, body: FileSlice, named: Callable[[bytes], None]) -> None:
        body.file.owners += 1
        self._say(_Unnamed(stage, first, count, body, named))

    def closed(self, stage: int, total: int) -> None:
        self._say(StageClosed(stage, total))

    def done(
        self,
        stage: StageState,
        lo: int,
        hi: int,
        first: int,
        body: Body,
        peer: PeerId,
        elapsed_us: int,
        stored: Stored | None = None,
    ) -> None:
        index, size, made_s = stage.index, bodies.size_of(body), elapsed_us / 1e6

        def fact(where: Where) -> RangeDone:
            return RangeDone(index, lo, hi, first, where, peer, elapsed_us)

        where = self._where(bodies.read(body)) if size <= INLINE_RANGE_BYTES else None
        if where is not None:
            self._say(fact(where))
        elif stage.options.pure and made_s < COPY_S + size / COPY_BYTES_PER_S:
            self._say(fact(None))
        elif stored is not None:
            self._store.pin(self.owner, stored.blob)  # type: ignore[arg-type]
            self._kept(stored.blob, stored.blob_size, made_s, [PeerId(holder) for holder in stored.peers if holder != self._me])
            self._say(fact(stored))
        else:
            if isinstance(body, FileSlice):
                body.file.owners += 1
            self._say(_Unstored(body, size, made_s, fact))

    def again(self, fact: AnyFact) -> None:
        self._say(fact)

    def failed(self, stage: int, failure: wire.Failed, exception: bytes, peer: PeerId) -> None:
        message, traceback = failure.message[: limits.TEXT_MAX], failure.traceback[-limits.TEXT_MAX :]
        self._say(TaskFailed(stage, failure.index, failure.kind, failure.type_name, message, traceback, exception, peer))

    def cancelled(self, stage: int, lo: int, hi: int) -> None:
        self._say(RangeCancelled(stage, lo, hi))

    def redo(self, stage: int, lo: int, hi: int) -> None:
        self._say(Redo(stage, lo, hi))

    def told(self, key: str) -> None:
        """The user is told what `key` names, once."""
        self._say(Told(key))

    async def output(self, fd: int, data: bytes) -> None:
        """The driver wrote this. Waits while too much is not on a majority's disks. Raises OSError: over the bound."""
        if self.length[fd] + len(data) > limits.LOG_BYTES_MAX:
            raise OSError(errno.EFBIG, f"it is more than {limits.LOG_BYTES_MAX >> 20} MiB")
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes >= OUTPUT_CHECK_BYTES:
            self._unchecked_bytes = 0
            if self._store.leave_free(limits.FREE_BYTES_MIN) < limits.FREE_BYTES_MIN:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for at in range(0, len(data), OUTPUT_BYTES_MAX):
            part = data[at : at + OUTPUT_BYTES_MAX]
            self._say(Output(fd, self.length[fd], part))
            self.length[fd] += len(part)
        if not self.lost:
            await self._replica.room()

    def note(self, line: bytes) -> None:
        """A line of the grid's own on the driver's stderr."""
        self._say(Output(2, self.length[2], line))
        self.length[2] += len(line)

    def lose(self) -> None:
        """The log is not led here any more: nothing is said from now on."""
        self.lost = True
        self._passed_on.ring()

    async def end(self, outcome: bytes, shown: bytes = b"") -> None:
        """Return once the outcome is final. Raises NotLeadingError: it may be, or not."""
        self._say(Ended(outcome, shown))
        while self._queue and not self.lost:  # `run` may have ended
            await self._store_some()
            self._flush()
        if self.lost:
            raise NotLeadingError("another peer leads the job")
        await self._replica.committed(self._sequence)

    # ---- storing ----

    async def run(self) -> None:
        """Store what waits, until cancelled."""
        while True:
            while not self._queue:
                await self._bell.wait()
            await self._gather()
            await self._store_some()
            self._flush()

    @property
    def _gathering(self) -> bool:
        """Whether what is to be stored may wait for company."""
        return not self._hurried and self._unstored_bytes < PACK_BYTES

    async def _gather(self) -> None:
        first = self._queue[0]
        if isinstance(first, _Unstored):
            with trio.move_on_at(first.since_s + GATHER_S):
                while self._queue and self._gathering:
                    await self._bell.wait()

    def _flush(self) -> None:
        facts: list[AnyFact] = []
        while self._queue and not isinstance(self._queue[0], _WAITING):
            facts.append(self._queue.popleft())  # type: ignore[arg-type]
        if facts:
            hurried = sum(not isinstance(fact, PATIENT) for fact in facts)
            self._hurried -= hurried
            self._propose(facts, patient=not hurried)

    async def _store_some(self) -> None:
        """Make blobs of what waits first: a large one alone, small ones together. Or hash it, if it is a segment."""
        async with self._storing:
            if self._queue and isinstance(first := self._queue[0], _Unnamed):
                self._queue[0] = await self._name(first)
            elif self._queue and isinstance(self._queue[0], _Unstored):
                await self._store_first()

    async def _store_first(self) -> None:
        chosen: list[int] = []
        total = 0
        for at, item in enumerate(self._queue):
            if not isinstance(item, _Unstored):
                continue
            if chosen and (item.size >= ALONE_BYTES or total + item.size > PACK_BYTES):
                break
            chosen.append(at)
            total += item.size
            if item.size >= ALONE_BYTES:
                break
        items = [self._queue[at] for at in chosen]
        stored = await self._store_items([item for item in items if isinstance(item, _Unstored)])
        for at, item, where in zip(chosen, items, stored, strict=True):
            assert isinstance(item, _Unstored)
            self._queue[at] = item.fact(where)
            self._unstored_bytes -= item.size

    async def _name(self, segment: _Unnamed) -> SegmentsCut:
        try:
            digest = await self._store.disk.run(bodies.hash_of, segment.body)
        finally:
            bodies.release(segment.body)
        segment.named(digest)
        return SegmentsCut(segment.stage, segment.first, ((segment.count, segment.body.length, digest[:DIGEST_BYTES]),))

    async def _store_items(self, items: list[_Unstored]) -> list[Stored | None]:
        total = sum(item.size for item in items)
        try:
            if len(items) == 1 and isinstance(body := items[0].body, FileSlice) and body.whole:
                name = Path(self._spool.link(body.file.path))
                blob = bytes(await self._store.adopt(name, owner=self.owner, shared=True))
            else:
                parts = [bodies.read(item.body) for item in items]
                blob = bytes(await self._store.put(*parts, durable=True, owner=self.owner))
        except (OSError, StoreFull) as error:
            log.warning("results can't be kept for a later leader: %s", error)
            return [None] * len(items)
        finally:
            for item in items:
                bodies.release(item.body)
        self._kept(blob, total, sum(item.made_s for item in items), [])
        found: list[Stored | None] = []
        at = 0
        for item in items:
            found.append(Stored(blob, total, at, item.size, (self._me,)))
            at += item.size
        return found


class _Unnamed:
    """A large segment that is not hashed yet."""

    __slots__ = ("body", "count", "first", "named", "stage")

    def __init__(self, stage: int, first: int, count: int, body: FileSlice, named: Callable[[bytes], None]) -> None:
        self.stage = stage
        self.first = first
        self.count = count
        self.body = body
        self.named = named


class _Unstored:
    """A fact whose bytes are not stored yet."""

    __slots__ = ("body", "fact", "made_s", "since_s", "size")

    def __init__(self, body: Body, size: int, made_s: float, fact: Callable[[Stored | None], AnyFact]) -> None:
        self.body = body
        self.size = size
        self.made_s = made_s
        self.fact = fact
        self.since_s = trio.current_time()


_WAITING: Final = (_Unstored, _Unnamed)
