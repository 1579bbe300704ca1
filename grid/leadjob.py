"""One job on the peer that leads it, from its spec to its outcome.

Set up the place, run the driver, serve its stages, keep its output, gather the files it left, write the outcome once.
Rules: whatever goes wrong the job gets an outcome, which is on disk before anyone is told; the driver's bytes go through
this peer (pipes), so that what is shown is what is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.errors import GridError, RefusedError, in_one_line
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
from grid.jobdata import JobData
from grid.jobplace import JobPlace, Services, open_place
from grid.jobview import JobView
from grid.leader import Leader
from grid.producer import Producer

if TYPE_CHECKING:
    from grid.outreach import Outreach
    from grid.worker.pool import Child

PIPE_BYTES = 64 << 10
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
    ) -> None:
        self.job = job
        self.spec = spec
        self.epoch = epoch
        self.folder = services.jobs / job.hex()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.view = JobView(self.folder, clear=True)
        self.outreach: Outreach | None = None
        self.place: JobPlace | None = None
        self.leader: Leader | None = None
        self._services = services
        self._reach = reach
        self._scope = trio.CancelScope()
        self._ending: tuple[str, int | None, str, str] | None = None
        self._driver: Child | None = None
        self.news: Callable[[], None] = lambda: None

    # ---- life ----

    async def run(self) -> None:
        """Lead the job to its outcome."""
        outcome = Outcome(FAILED, None, "the peer that led the job stopped")
        try:
            with self._scope:
                outcome = await self._run()
        except Exception as error:  # a fault of ours or of the disk is the job's outcome, not the peer's end
            log.exception("job %s", self.job.hex()[:8])
            outcome = Outcome(FAILED, None, in_one_line(error))
        finally:
            self._finish(outcome)

    def end(self, state: str, exit_code: int | None, why: str, code: str = "failed") -> None:
        """End the job now: cancelled by its owner, over its time, or broken."""
        if self._ending is None and self.view.outcome is None:
            self._ending = (state, exit_code, why, code)
            self._scope.cancel()

    async def _conclude(self, place: JobPlace, leader: Leader, nursery: trio.Nursery) -> Outcome:
        """Run the driver and finish: nobody waits for the outcome while folders are removed."""
        outcome = Outcome(FAILED, None, "the peer that led the job stopped", code="leader-stopped")
        try:
            outcome = await self._drive(place, leader, nursery)
        except trio.Cancelled:
            if self._ending is None:
                raise
            self._finish(outcome)
            raise
        self._finish(outcome)
        return outcome

    def _finish(self, outcome: Outcome) -> None:
        """Write the outcome and tell it. The first call counts."""
        view = self.view
        if view.outcome is not None:
            return
        if self._ending is not None:
            state, exit_code, why, code = self._ending
            outcome = Outcome(state, exit_code, why, files=outcome.files, code=code)
        outcome = Outcome(
            transition(view.state, outcome.state),
            outcome.exit_code,
            outcome.error,
            time.time(),
            outcome.files,
            view.stdout.length,
            view.stderr.length,
            signal=outcome.signal,
            code=outcome.code or ("failed" if outcome.error else ""),
        )
        try:
            write_record(self.folder / "outcome", codec.encode(outcome))
        except OSError as error:  # what can't be kept must not be told: after a restart it would read otherwise
            why = f"the job's outcome can't be written: {in_one_line(error)}"
            outcome = Outcome(FAILED, None, why, outcome.ended_s, (), outcome.stdout_bytes, outcome.stderr_bytes, code="disk")
        view.finish(outcome)
        self.news()

    async def _run(self) -> Outcome:
        spec = self.spec
        defaults = StageOptions(
            spec.options.retries,
            spec.options.task_timeout_s,
            spec.options.cpus,
            spec.options.memory_bytes,
            spec.options.tags,
        )
        leader = self.leader = Leader(
            self.job, self._services.me, defaults, bodies.Spool(self.folder / "spool"), self._printed, self._worked
        )
        async with trio.open_nursery() as nursery:
            try:
                data = JobData(self.job, self._services.store, self._services.fetcher, self._find)
                async with open_place(self.job, spec, self._services, leader, data, self.epoch, nursery) as place:
                    leader.site = place.site
                    leader.spool = place.spool
                    self.place = place
                    self.outreach = self._reach(self, place, nursery)
                    if self.outreach is not None:
                        nursery.start_soon(self.outreach.run)
                    else:
                        nursery.start_soon(self._sweep)
                    nursery.start_soon(self._tell_progress)
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

    async def _find(self, blob: bytes) -> list[PeerId]:
        return self.outreach.holders(blob) if self.outreach is not None else []

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
            nursery.start_soon(self._time_out, spec.options.timeout_s)
        for _ in range(min(2, self._services.workshop.free)):
            place.site.crew.start_worker()
        stdin = await self._open_stdin(place)
        pipes = [os.pipe(), os.pipe()]
        try:
            driver = self._driver = await place.processes.start_driver(
                place.setup, stdin=stdin, stdout=pipes[0][1], stderr=pipes[1][1]
            )
        finally:
            for _, write in pipes:
                os.close(write)
            if stdin is not None:
                os.close(stdin)
        async with trio.open_nursery() as output:
            for fd, (read, _) in enumerate(pipes, start=1):
                output.start_soon(self._copy_output, fd, read)
            broken = await serve_driver(driver, leader, place, nursery)
            await driver.exited.wait()
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

    async def _open_stdin(self, place: JobPlace) -> int | None:
        if self.spec.stdin is None:
            return None
        path = await place.data.path(self.spec.stdin.id, self.spec.stdin.size)
        return os.open(path, os.O_RDONLY)

    async def _copy_output(self, fd: int, pipe: int) -> None:
        async with trio.lowlevel.FdStream(pipe) as stream:
            while data := await stream.receive_some(PIPE_BYTES):
                try:
                    self.view.write(fd, bytes(data))
                except OSError as error:
                    self.end(FAILED, None, f"the job's output can't be kept: {error.strerror}")

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
        return describe(self.job, self.spec, self.view, self.epoch, self._services.me, stages, peers)


def describe(
    job: JobId,
    spec: JobSpec,
    view: JobView,
    epoch: int,
    leader: PeerId,
    stages: list[dict[str, Any]],
    peers: dict[str, Any],
) -> dict[str, Any]:
    """One job for programs."""
    outcome = view.outcome
    return {
        "id": job.hex(),
        "name": spec.name,
        "owner": spec.owner.hex(),
        "owner_name": spec.owner_name,
        "state": view.state,
        "epoch": epoch,
        "leader": leader.hex(),
        "replicas": [leader.hex()],
        "recovered": bool(outcome and outcome.recovered),
        "stages": stages,
        "peers": peers,
        "exit_code": outcome.exit_code if outcome else None,
        "error": outcome.error if outcome else "",
        "submitted_s": spec.created_s,
        "ended_s": outcome.ended_s if outcome else None,
    }


async def serve_driver(driver: Child, leader: Leader, place: JobPlace, nursery: trio.Nursery) -> str:
    """Handle the driver's frames until it closes its channel. Returns what it broke, "" if nothing."""

    def post(message: wire.ToChild, body: bytes = b"") -> None:
        with contextlib.suppress(Exception):  # a driver that is gone is told by its frames' end
            driver.post(message, body)

    def post_frame(message: wire.ToChild, body: Body) -> None:
        from grid.leader import post_body

        post_body(place.spool, post, message, body)

    producer = Producer(leader, post_frame, nested=False)
    try:
        async for message, data in driver.frames:
            match message:
                case wire.Put() | wire.Fetch() | wire.OpenInput() | wire.ListInputs():
                    nursery.start_soon(place.data.serve, post, message, data)
                case wire.Ready() | wire.Print():
                    pass
                case wire.Page(path=path) if path:
                    producer.handle(message, bodies.whole_file(path))
                case _:
                    producer.handle(message, data)
    except RefusedError as error:
        driver.kill("protocol")
        return f"the driver broke the protocol: {error}"
    except OSError as error:
        driver.kill("disk")
        return f"the job's data can't be kept: {error.strerror or error}"
    finally:
        producer.close()
    return ""


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


__all__ = ["CANCELLED", "LeadJob", "describe", "serve_driver", "write_record"]
