"""One job on the peer that leads it, from its spec to its outcome.

Set up the place, run the driver, serve its stages, keep its output, gather the files it left, write the outcome once.
Rules: whatever goes wrong the job gets an outcome, which is on disk before anyone is told; the driver's bytes go through
this peer (pipes), so that what is shown is what is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import BadSignature, PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.errors import GridError, NotLeadingError, RefusedError, in_one_line
from grid.core.job import (
    CANCELLED,
    FAILED,
    FINISHED,
    RUNNING,
    BlobRef,
    JobId,
    JobSpec,
    Outcome,
    OutputFile,
    transition,
)
from grid.core.output import Replayed
from grid.describing import describe
from grid.jobdata import JobData
from grid.jobplace import JobPlace, Services, open_place
from grid.jobview import JobView
from grid.leader import Leader
from grid.producer import Producer
from grid.recorder import LogRecorder
from grid.worker import memory

if TYPE_CHECKING:
    from grid.core.messages import Message
    from grid.keeping import Keeper
    from grid.outreach import Outreach
    from grid.replica import Replica
    from grid.worker.pool import Child

PIPE_BYTES = 64 << 10
OUTCOME_COPIES_S = 120.0
"""For a majority to hold the files that the driver left; after it the job ends with what copies there are."""
EARLY_MESSAGES_MAX = 10_000
"""Held while a job's place opens (up to seconds, where an environment has to be built); what is lost is sent again."""
OUTPUT_LINGER_S = 2.0
"""For output after the driver's end: a process that it left behind may hold its pipes open for ever."""
EXIT_TIMEOUT = 124
"""As timeout(1) has it."""

log = logging.getLogger(__name__)


class LeadJob:
    """A job led here. `run` returns when it is final."""

    def __init__(
        self,
        job: JobId,
        spec: JobSpec,
        services: Services,
        reach: Callable[[LeadJob, JobPlace, trio.Nursery], Outreach | None] = lambda lead, place, nursery: None,
        epoch: int = 1,
        replica: Replica | None = None,
        view: JobView | None = None,
    ) -> None:
        """replica: this peer's, which leads the job's log in `epoch`; None: the job is nowhere but here."""
        self.job = job
        self.spec = spec
        self.epoch = epoch
        self.replica = replica
        self.keeper: Keeper | None = None
        self.abandoned = False
        self.ended = trio.Event()
        """Set by whoever applies the log: the outcome is final and the view knows it."""
        self.early: deque[tuple[PeerId, Message]] = deque()
        """What came before the job's place was open; first of all, what this peer had finished for the leader before."""
        self._told: set[str] = set()
        self.folder = services.jobs / job.hex()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.view = view or JobView(self.folder, clear=True)
        self.outreach: Outreach | None = None
        self.place: JobPlace | None = None
        self.leader: Leader | None = None
        self._services = services
        self._reach = reach
        self._scope = trio.CancelScope()
        self._ending: tuple[str, int | None, str, str] | None = None
        self._driver: Child | None = None
        self._recorder: LogRecorder | None = None
        self._last = trio.CancelScope(shield=True)  # around what must be said before the end, whoever ends the rest
        self.news: Callable[[], None] = lambda: None

    # ---- life ----

    async def run(self) -> None:
        """Lead the job to its outcome, or until it is another's to lead: then nothing is told."""
        outcome = Outcome(FAILED, None, "the peer that led the job stopped")
        try:
            with self._scope:
                outcome = await self._run()
        except Exception as error:  # a fault of ours or of the disk is the job's outcome, not the peer's end
            log.exception("job %s", self.job.hex()[:8])
            outcome = Outcome(FAILED, None, in_one_line(error))
        except BaseException:
            if self.replica is None:
                self._finish(outcome)
            raise
        if not self.abandoned:
            await self._settle(outcome)

    def abandon(self) -> None:
        """The job's log is not led here any more: stop at once, say nothing."""
        self.abandoned = True
        if self._recorder is not None:
            self._recorder.lose()
        self._scope.cancel()
        self._last.cancel()

    def end(self, state: str, exit_code: int | None, why: str, code: str = "failed") -> None:
        """End the job now: cancelled by its owner, over its time, or broken."""
        if self._ending is None and self.view.outcome is None:
            self._ending = (state, exit_code, why, code)
            self._scope.cancel()

    async def _conclude(self, place: JobPlace, leader: Leader, nursery: trio.Nursery) -> Outcome:
        """Run the driver and finish: nobody waits for the outcome while folders are removed, unless they fill the disk."""
        outcome = Outcome(FAILED, None, "the peer that led the job stopped", code="leader-stopped")
        try:
            outcome = await self._drive(place, leader, nursery)
        except trio.Cancelled:
            if self._ending is None or self.abandoned or self._ending[3] == "disk":  # which the place's end gives room again
                raise
            await self._settle(outcome)
            raise
        if self._services.store.leave_free(limits.FREE_BYTES_MIN) >= limits.FREE_BYTES_MIN:
            await self._settle(outcome)
        elif outcome.state == FAILED and outcome.files and self._ending is None:
            why = outcome.error or "the disk is full: what files the script left are not kept"
            self._ending = (FAILED, outcome.exit_code, why, "disk")
        return outcome

    async def _settle(self, outcome: Outcome) -> None:
        """Make it the job's outcome, for good: on this disk, or on a majority's. The first call counts."""
        recorder = self._recorder
        if self.replica is None:
            self._finish(outcome)
        elif self.view.outcome is None and not self._last.cancel_called:
            with self._last:
                if recorder is None:  # it ended before its place was open
                    recorder = LogRecorder(
                        self.job, self._services.me, self.replica, self._services.store, bodies.Spool(self.folder / "spool")
                    )
                outcome = self._final(outcome, recorder.length)
                if self.keeper is not None and outcome.files:
                    files = {bytes(file.blob.id): file.blob.size for file in outcome.files}
                    await self.keeper.durable(files, self.replica.voters, OUTCOME_COPIES_S)
                with contextlib.suppress(NotLeadingError):
                    await recorder.end(codec.encode(outcome), json.dumps(self.describe()).encode())
                    await self.ended.wait()

    def _finish(self, outcome: Outcome) -> None:
        """Write the outcome and tell it. The first call counts."""
        view = self.view
        if view.outcome is not None:
            return
        outcome = self._final(outcome, {1: view.stdout.length, 2: view.stderr.length})
        try:
            write_record(self.folder / "outcome", codec.encode(outcome))
        except OSError as error:  # what can't be kept must not be told: after a restart it would read otherwise
            why = f"the job's outcome can't be written: {in_one_line(error)}"
            outcome = Outcome(FAILED, None, why, outcome.ended_s, (), outcome.stdout_bytes, outcome.stderr_bytes, code="disk")
        view.finish(outcome)
        self.news()

    def disk_failed(self, error: OSError) -> None:
        """This machine's disk takes no more of the job's output."""
        self.end(FAILED, None, f"the job's output can't be kept: {error.strerror or error}", "disk")

    def _final(self, outcome: Outcome, length: Mapping[int, int]) -> Outcome:
        if self._ending is not None:
            state, exit_code, why, code = self._ending
            files = outcome.files
            if code == "disk":  # what the script left would only keep it full
                self._services.store.unpin(f"outcome:{self.job.hex()}")
                for file in files:
                    self._services.store.discard(file.blob.id)  # type: ignore[arg-type]
                files = ()
            outcome = Outcome(state, exit_code, why, files=files, code=code)
        return Outcome(
            transition(self.view.state, outcome.state),
            outcome.exit_code,
            outcome.error,
            time.time(),
            outcome.files,
            length[1],
            length[2],
            recovered=self.replica is not None and bool(self.replica.branch.name),
            signal=outcome.signal,
            code=outcome.code or ("failed" if outcome.error else ""),
        )

    async def _run(self) -> Outcome:
        spec = self.spec
        defaults = StageOptions(
            spec.options.retries,
            spec.options.task_timeout_s,
            spec.options.cpus,
            spec.options.memory_bytes,
            spec.options.tags,
        )
        recorded = self.replica.chronicle if self.replica is not None else None
        leader = self.leader = Leader(
            self.job,
            self._services.me,
            defaults,
            bodies.Spool(self.folder / "spool"),
            self._printed,
            self._worked,
            next_stage=recorded.next_stage if recorded is not None else 0,
        )
        async with trio.open_nursery() as nursery:
            try:
                data = JobData(self.job, self._services.store, self._services.fetcher, self.find)
                async with open_place(self.job, spec, self._services, leader, data, self.epoch, nursery) as place:
                    leader.site = place.site
                    leader.spool = place.spool
                    self.place = place
                    if self.replica is not None:
                        self._record(self.replica, leader, place, nursery)
                    self.outreach = self._reach(self, place, nursery)
                    if self.outreach is not None:
                        nursery.start_soon(self.outreach.run)
                        nursery.start_soon(self._take_early, self.outreach)
                    else:
                        nursery.start_soon(self._sweep)
                    nursery.start_soon(self._tell_progress)
                    if self.view.state != RUNNING:
                        self.view.state = transition(self.view.state, RUNNING)
                    self.view.changed()
                    self.news()
                    return await self._conclude(place, leader, nursery)
            except (GridError, OSError) as error:
                return Outcome(FAILED, None, str(error))
            except Exception as error:
                if hasattr(error, "hint") or type(error).__name__ in ("EnvironmentFailed", "WorkerStartError"):
                    return Outcome(FAILED, None, str(error))
                raise
            finally:
                nursery.cancel_scope.cancel()

    def _record(self, replica: Replica, leader: Leader, place: JobPlace, nursery: trio.Nursery) -> None:
        """Have the log told what happens; and what it says already happen again."""
        keeper = self.keeper
        recorder = self._recorder = LogRecorder(
            self.job, self._services.me, replica, self._services.store, place.spool, keeper.made if keeper is not None else None
        )
        leader.recorder = recorder
        nursery.start_soon(recorder.run)
        if replica.chronicle.stages:
            from grid.replaying import Replaying

            leader.replaying = Replaying(replica.chronicle, leader, recorder, keeper, nursery, self.tell)
            cuts = place.spool.path("cuts")
            leader.replaying.write_cuts(cuts, replica.chronicle)
            place.setup = msgspec.structs.replace(place.setup, replay=cuts)

    def hold(self, peer: PeerId, message: Message) -> None:
        """A message for a leadership whose place is not open yet: helpers of an earlier one report at once."""
        if len(self.early) < EARLY_MESSAGES_MAX:
            self.early.append((peer, message))

    async def _take_early(self, outreach: Outreach) -> None:
        while self.early:
            peer, message = self.early.popleft()
            try:
                await outreach.handle(peer, message)
            except (GridError, BadSignature, CodecError) as error:
                log.debug("job %s: an early message is of no use: %s", self.job.hex()[:8], error)

    def copies_lost(self, blobs: list[bytes]) -> None:
        """No peer that answers holds these: what a replay would need of them has to be made again."""
        recorder, replica = self._recorder, self.replica
        if recorder is None or replica is None:
            return
        for blob in blobs:
            for stage, lo, hi in replica.chronicle.results_in(blob):
                recorder.redo(stage, lo, hi)

    async def find(self, blob: bytes) -> list[PeerId]:
        """Peers that may hold a blob of the job, likely ones first."""
        found = self.outreach.holders(blob) if self.outreach is not None else []
        if self.keeper is not None:
            found = [*found, *self.keeper.holders(blob)]
        if self.replica is not None:
            found = [*found, *self.replica.voters]
        return [peer for peer in dict.fromkeys(found) if peer != self._services.me]

    async def _sweep(self) -> None:
        assert self.leader is not None
        while True:
            await trio.sleep(limits.HEARTBEAT_S)
            self.leader.sweep(trio.current_time())

    async def _tell_progress(self) -> None:
        assert self.leader is not None
        while True:
            await self.leader.bell.wait()
            self.view.changed()
            await trio.sleep(0.05)

    def _worked(self) -> None:
        if self.outreach is not None:
            self.outreach.poke()

    def _printed(self, peer: PeerId, stage: int, index: int, fd: int, data: bytes) -> None:
        self.view.prints.add(peer, stage, index, fd, data)
        self.view.bell.ring()

    # ---- the driver ----

    async def _drive(self, place: JobPlace, leader: Leader, nursery: trio.Nursery) -> Outcome:
        spec = self.spec
        if spec.options.timeout_s:
            gone_s = max(0.0, time.time() - spec.created_s) if self.epoch > 1 else 0.0
            nursery.start_soon(self._time_out, max(0.0, spec.options.timeout_s - gone_s))
        for _ in range(min(2, self._services.workshop.free)):
            place.site.crew.start_worker()
        if leader.replaying is not None:
            await leader.replaying.prepare()
        stdin = await self._open_stdin(place)
        pipes = [os.pipe(), os.pipe()]
        try:
            setup = msgspec.structs.replace(place.setup, shared_bytes=shared_bytes())
            driver = self._driver = await place.processes.start_driver(setup, stdin=stdin, stdout=pipes[0][1], stderr=pipes[1][1])
        finally:
            for _, write in pipes:
                os.close(write)
            if stdin is not None:
                os.close(stdin)
        async with trio.open_nursery() as output:
            for fd, (read, _) in enumerate(pipes, start=1):
                output.start_soon(self._copy_output, fd, read, place)
            leader.early = driver.takes_early and leader.replaying is None
            leader.on_disputed = self._disputed
            broken = await serve_driver(driver, leader, place, nursery)
            await driver.exited.wait()
            if leader.replaying is not None and not broken:
                leader.replaying.end()
            output.cancel_scope.deadline = trio.current_time() + OUTPUT_LINGER_S
        status = driver.status if driver.status is not None else 1
        exit_code = status if status >= 0 else 128 - status
        signal = max(0, -status)
        if broken:
            return Outcome(FAILED, exit_code, broken)
        if driver.why == "memory":
            return Outcome(FAILED, exit_code, "the script used more memory than this machine could give it", code="memory")
        files, error = await self._gather(place)
        if error:
            return Outcome(FAILED, exit_code or 1, error, files=files)
        return Outcome(FINISHED if exit_code == 0 else FAILED, exit_code, files=files, signal=signal)

    def _disputed(self) -> None:
        """Needs a worker that stood still for half a second between its last look at the clock and the sending of its result."""
        self.end(FAILED, None, "a task ran twice, and its script may have seen the result that did not count: submit it again")

    async def _open_stdin(self, place: JobPlace) -> int | None:
        if self.spec.stdin is None:
            return None
        path = await place.data.path(self.spec.stdin.id, self.spec.stdin.size)
        return os.open(path, os.O_RDONLY)

    async def _copy_output(self, fd: int, pipe: int, place: JobPlace) -> None:
        recorder, shown = self._recorder, self.view.log(fd)
        replayed = Replayed(recorder.length[fd] if recorder is not None else 0, shown.read)
        async with trio.lowlevel.FdStream(pipe) as stream:
            while data := await stream.receive_some(PIPE_BYTES):
                place.site.crew.hear()  # what it is written because of comes before it
                try:
                    if recorder is None:
                        self.view.write(fd, bytes(data))
                    else:
                        await recorder.output(fd, replayed.feed(bytes(data)))
                except OSError as error:
                    self.disk_failed(error)
        replayed.end()
        if replayed.differs and fd == 1:
            self.tell("stdout", "the script wrote something else when it was run again after its leader was lost")

    def tell(self, key: str, text: str) -> None:
        """One line for the user among the driver's stderr, once a job, whoever leads it."""
        recorder, replica = self._recorder, self.replica
        if recorder is None or replica is None or key in replica.chronicle.told or key in self._told:
            return
        self._told.add(key)
        recorder.told(key)
        recorder.note(f"grid: {text}\n".encode())

    async def _time_out(self, timeout_s: float) -> None:
        await trio.sleep(timeout_s)
        self.end(FAILED, EXIT_TIMEOUT, f"the job ran longer than its time limit of {timeout_s:g} s", "timeout")

    # ---- what it leaves ----

    async def _gather(self, place: JobPlace) -> tuple[tuple[OutputFile, ...], str]:
        """Adopt the files in the driver's working folder as durable blobs."""
        work = Path(place.setup.workdir)
        found = await trio.to_thread.run_sync(_walk, work)
        total = sum(size for _, size in found)
        if len(found) > limits.OUTPUT_FILES_MAX or total > limits.OUTPUT_FILE_BYTES_MAX:
            limit = f"{limits.OUTPUT_FILES_MAX} files, {limits.OUTPUT_FILE_BYTES_MAX >> 30} GiB"
            return (), f"the script left {len(found)} files of {total >> 20} MiB in its working folder; the limit is {limit}"
        files: list[OutputFile] = []
        try:
            for name, size in found:
                path = work / name
                mode = path.stat().st_mode & 0o777
                blob = await self._services.store.adopt(path, durable=True, owner=f"outcome:{self.job.hex()}")
                files.append(OutputFile(name, BlobRef(bytes(blob), size), mode))
        except (OSError, GridError) as error:
            return tuple(files), f"the script's files can't be kept: {error}"
        except Exception as error:
            if type(error).__name__ != "StoreFull":
                raise
            return tuple(files), f"the script's files can't be kept: {error}"
        return tuple(files), ""

    # ---- what it tells ----

    def describe(self) -> dict[str, Any]:
        """The object of `grid show --json`, without the schema."""
        stages: list[dict[str, Any]] = []
        peers: dict[str, Any] = {}
        if self.leader is not None:
            stages = [
                {
                    "index": stage.index,
                    "name": stage.name,
                    "total": stage.declared if stage.total is None else max(stage.total, stage.declared),
                    "open": stage.total is None,
                    "done": stage.done,
                    "failed": stage.failed,
                }
                for stage in self.leader.ledger.stages
            ]
            peers = {
                peer.hex(): {"done": tally.done, "executed": tally.executed, "stolen": tally.stolen}
                for peer, tally in self.leader.tallies.items()
            }
        voters = self.replica.voters if self.replica is not None else ()
        return describe(self.job, self.spec, self.view, self.epoch, self._services.me, stages, peers, voters)


async def serve_driver(driver: Child, leader: Leader, place: JobPlace, nursery: trio.Nursery) -> str:
    """Handle the driver's frames until it closes its channel. Returns what it broke, "" if nothing."""

    def post(message: wire.ToChild, body: bytes = b"") -> None:
        with contextlib.suppress(Exception):  # a driver that is gone is told by its frames' end
            driver.post(message, body)

    def release(path: str, reusable: bool) -> None:
        post(wire.Released(path, reusable))

    def post_frame(message: wire.ToChild, body: Body) -> None:
        from grid.leader import post_body

        post_body(place.spool, post, message, body)

    producer = Producer(leader, post_frame, nested=False)
    try:
        async for message, data in driver.frames:
            place.site.crew.hear()
            match message:
                case wire.Put() | wire.Fetch() | wire.OpenInput() | wire.ListInputs():
                    nursery.start_soon(place.data.serve, post, message, data)
                case wire.Ready() | wire.Print():
                    pass
                case wire.Page(path=path, shared=True):
                    producer.handle(message, place.spool.share(path, release))
                case wire.Page(path=path) if path:
                    producer.handle(message, bodies.whole_file(path))
                case _:
                    producer.handle(message, data)
            if place.site.crew.early:
                await place.site.crew.stay_awake()
    except RefusedError as error:
        driver.kill("protocol")
        return f"the driver broke the protocol: {error}"
    except OSError as error:
        driver.kill("disk")
        return f"the job's data can't be kept: {error.strerror or error}"
    finally:
        place.site.crew.hear()
        producer.close()
    return ""


def shared_bytes() -> int:
    """How much memory a driver of this machine may share: its pages beyond that go to disk."""
    _, available = memory.machine_bytes()
    return min(limits.SHARED_BYTES_MAX, int(available * limits.SHARED_SHARE))


def write_record(path: Path, data: bytes) -> None:
    """Durably replace a small file. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _walk(folder: Path) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if path.is_file() and not path.is_symlink():
                found.append((str(path.relative_to(folder)), path.stat().st_size))
    return sorted(found)


__all__ = ["CANCELLED", "LeadJob", "serve_driver", "shared_bytes", "write_record"]
