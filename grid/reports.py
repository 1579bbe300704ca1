"""What a helper of a job has finished, until a leader has taken it: reports in, signed batches out.

Rules:
- a batch is kept until its leader acknowledges it; batches are numbered within a session, and a new leader gets all that is
  unacknowledged in a new session of its own, signed for its epoch;
- each report names the function and the arguments' segment it was made from, as they were when it was made: a later leader
  may have declared other ones;
- what is reported and not acknowledged is claimed (`ranges`); large results are blobs that stay here (`Shelf`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from dht.core import codec
from dht.core.identity import Identity
from grid import body as bodies
from grid.bell import Bell
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.bundle import COMPLETION_DOMAIN, Completion, ResultRange, Signed, TaskFailure, sign
from grid.core.deque import Work
from grid.core.job import JobId
from grid.core.messages import Completed
from grid.core.ranges import RangeSet

if TYPE_CHECKING:
    from grid.blobs.store import BlobStore
    from grid.jobdata import JobData

UNACKNOWLEDGED_MAX: Final = 256
"""Completion batches without the leader's word; then workers' reports wait here and claims keep the ranges ours."""
RESULTS_MAX: Final = 4_096
"""Ranges in one batch."""
FAILURES_MAX: Final = 64
"""Failed tasks in one batch: each may carry a traceback."""
SHELF_BLOBS_MAX: Final = 1 << 16
"""Result blobs kept for later leaders, of all jobs: about 10 MB of names."""


class Shelf:
    """Result blobs that stay here although a leader has taken them: a later leader may need them. The oldest go first."""

    def __init__(self, store: BlobStore, bytes_max: int) -> None:
        self.used_bytes = 0
        self._store = store
        self._bytes_max = bytes_max
        self._kept: OrderedDict[tuple[JobId, bytes], int] = OrderedDict()

    def keep(self, job: JobId, blob: bytes, size: int) -> None:
        """The blob stays until the job is over, or newer ones need the room."""
        if (job, blob) in self._kept:
            return
        self._kept[job, blob] = size
        self.used_bytes += size
        self._store.pin(_owner(job), blob)  # type: ignore[arg-type]
        while self._kept and (self.used_bytes > self._bytes_max or len(self._kept) > SHELF_BLOBS_MAX):
            self._drop(*next(iter(self._kept)))

    def blobs(self, job: JobId) -> list[bytes]:
        """What is kept of a job."""
        return [blob for owner, blob in self._kept if owner == job]

    def clear(self, job: JobId) -> None:
        """The job is over."""
        for blob in self.blobs(job):
            self._drop(job, blob)

    def _drop(self, job: JobId, blob: bytes) -> None:
        self.used_bytes -= self._kept.pop((job, blob))
        self._store.unpin(_owner(job), blob)  # type: ignore[arg-type]


def _owner(job: JobId) -> str:
    return f"results:{job.hex()}"


class _Result(NamedTuple):
    stage: int
    function: bytes
    segment: bytes
    lo: int
    hi: int
    body: Body
    elapsed_us: int


@dataclass(slots=True)
class _Sent:
    message: Completed
    ranges: list[Work]
    blobs: list[bytes]


class Reports:
    """One job's finished work on a helper. The caller sends what `next` makes."""

    def __init__(self, job: JobId, epoch: int, data: JobData, identity: Identity, shelf: Shelf | None = None) -> None:
        self.job = job
        self.epoch = epoch
        self.bell = Bell()
        """There is something to send."""
        self.taken = Bell()
        """The leader acknowledged something."""
        self.word_s = trio.current_time()
        """When the leader last acknowledged something, or what it did not was sent again."""
        self._data = data
        self._identity = identity
        self._shelf = shelf
        self._results: deque[_Result] = deque()
        self._failures: deque[TaskFailure] = deque()
        self._waiting: dict[int, RangeSet] = {}
        self._again: deque[_Sent] = deque()  # what an earlier leader did not acknowledge
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._number = 0
        self._offered = 0  # batches up to this number an earlier leader had, too
        self._session = int(self.word_s * 1e6)

    # ---- in ----

    def result(self, stage: int, function: bytes, segment: bytes, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        """Tasks [lo, hi) are done."""
        self._results.append(_Result(stage, function, segment, lo, hi, body, elapsed_us))
        self._wait_for(stage, lo, hi)

    def failure(self, failure: TaskFailure) -> None:
        """A task failed here."""
        self._failures.append(failure)
        self._wait_for(failure.stage, failure.index, failure.index + 1)

    def _wait_for(self, stage: int, lo: int, hi: int) -> None:
        self._waiting.setdefault(stage, RangeSet()).add(lo, hi)
        self.bell.ring()

    # ---- state ----

    @property
    def ready(self) -> bool:
        """Something is to be sent, and may be."""
        return bool(self._results or self._failures or self._again) and len(self._sent) < UNACKNOWLEDGED_MAX

    @property
    def settled(self) -> bool:
        """The leader has acknowledged everything."""
        return not (self._waiting or self._again or self._sent)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Everything reported and not acknowledged."""
        for stage, ranges in self._waiting.items():
            for lo, hi in ranges:
                yield stage, lo, hi
        for sent in (*self._sent.values(), *self._again):
            yield from sent.ranges

    def offered(self) -> Iterator[tuple[int, int, int]]:
        """What is finished and the present leader can't know yet: no need to run it for that one."""
        for stage, ranges in self._waiting.items():
            for lo, hi in ranges:
                yield stage, lo, hi
        for sent in (*self._again, *(sent for number, sent in self._sent.items() if number <= self._offered)):
            yield from sent.ranges

    def unacknowledged(self) -> list[Completed]:
        """Batches that were sent and are kept, oldest first."""
        return [sent.message for sent in self._sent.values()]

    # ---- leaders ----

    def accepted(self, number: int, session: int) -> None:
        """The leader's word; of another session than this one it means nothing."""
        if session != self._session:
            return
        self.word_s = trio.current_time()
        for each in [known for known in self._sent if known <= number]:
            sent = self._sent.pop(each)
            for blob in sent.blobs:
                self._data.store.unpin(self._data.owner, blob)  # type: ignore[arg-type]
        self.taken.ring()
        self.bell.ring()  # there may be room for a batch

    def renew(self, epoch: int) -> None:
        """Another leader: it is to get everything that none has acknowledged."""
        self._again.extendleft(reversed(self._sent.values()))
        self._sent.clear()
        self.epoch = epoch
        self._number = self._offered = 0
        self._session = max(self._session + 1, int(trio.current_time() * 1e6))
        self.word_s = trio.current_time()
        self.bell.ring()

    # ---- out ----

    async def next(self) -> tuple[Completed, list[Work]]:
        """The next batch, signed, and the ranges in it. Only while `ready`; once begun it can't be cancelled halfway."""
        with trio.CancelScope(shield=True):
            made = await (self._repeat() if self._again else self._batch())
        return made  # noqa: RET504  # the scope could have swallowed a cancellation, for all mypy knows

    async def _repeat(self) -> tuple[Completed, list[Work]]:
        """Batches that an earlier leader had, as few as they fit in: a leader that just took over waits for all of them."""
        sent = _Sent(Completed(Signed(b"", b"", b"")), [], [])
        results: list[ResultRange] = []
        failures: list[TaskFailure] = []
        size = 0
        while self._again:
            payload = self._again[0].message.signed.payload
            size += len(payload)
            if sent.ranges and size > limits.COMPLETION_BYTES_MAX:
                break
            old = codec.decode(payload, Completion)
            fits = len(results) + len(old.results) <= RESULTS_MAX and len(failures) + len(old.failures) <= FAILURES_MAX
            if sent.ranges and not fits:
                break
            earlier = self._again.popleft()
            results += old.results
            failures += old.failures
            sent.ranges += earlier.ranges
            sent.blobs += earlier.blobs
        self._keep(sent, tuple(results), tuple(failures))
        self._offered = self._number
        await trio.lowlevel.checkpoint()
        return sent.message, sent.ranges

    async def _batch(self) -> tuple[Completed, list[Work]]:
        """Sign the oldest reports as one completion."""
        results: list[ResultRange] = []
        failures: list[TaskFailure] = []
        blobs: list[bytes] = []
        ranges: list[Work] = []
        inline_bytes = 0
        while self._results and inline_bytes < limits.COMPLETION_BYTES_MAX and len(results) < RESULTS_MAX:
            stage, function, segment, lo, hi, body, elapsed_us = self._results.popleft()
            size = bodies.size_of(body)
            inline, blob = b"", b""
            if size <= limits.RESULT_INLINE_BYTES:
                inline = bodies.read(body)
                inline_bytes += size
                bodies.release(body)
            else:
                blob = await self._store(body)
                blobs.append(blob)
                if self._shelf is not None:
                    self._shelf.keep(self.job, blob, size)
            results.append(ResultRange(stage, function, lo, hi, lo, inline, blob, size, elapsed_us, segment))
            ranges.append(Work(stage, lo, hi))
        while self._failures and len(failures) < FAILURES_MAX and inline_bytes < limits.COMPLETION_BYTES_MAX:
            failures.append(self._failures.popleft())
            inline_bytes += _size_of(failures[-1])
        ranges += [Work(failure.stage, failure.index, failure.index + 1) for failure in failures]
        for work in ranges:
            waiting = self._waiting.get(work.stage)
            if waiting is not None:
                waiting.remove(work.lo, work.hi)
                if not waiting:
                    del self._waiting[work.stage]
        sent = _Sent(Completed(Signed(b"", b"", b"")), ranges, blobs)
        self._keep(sent, tuple(results), tuple(failures))
        return sent.message, ranges

    def _keep(self, sent: _Sent, results: tuple[ResultRange, ...], failures: tuple[TaskFailure, ...]) -> None:
        if not self._sent:
            self.word_s = trio.current_time()
        self._number += 1
        completion = Completion(self.job, self.epoch, self._number, results, failures, self._session)
        sent.message = Completed(sign(completion, COMPLETION_DOMAIN, self._identity))
        self._sent[self._number] = sent

    async def _store(self, body: Body) -> bytes:
        if isinstance(body, FileSlice) and body.whole and body.file.owned:
            return await self._data.put(body.file.path, b"")
        return await self._data.put("", bodies.read(body))

    async def collect(self) -> list[Completed]:
        """Everything that no leader has acknowledged, for one that leads here: the place may close then."""
        self.renew(self.epoch)
        collected: list[Completed] = []
        while self._again or self._results or self._failures:
            collected.append((await self.next())[0])
        return collected


def _size_of(failure: TaskFailure) -> int:
    """In bytes, about."""
    return len(failure.message.encode()) + len(failure.traceback.encode()) + len(failure.exception) + 256
