"""A world: real peers on simulated machines, jobs, faults, followers, and what must hold of them all.

One trio run on a virtual clock. First the machines start, then jobs are submitted and faults happen; once all jobs are final, or
the time for faults is over, everything heals, every job must become final within the scenario's bound, and the checkers look at
what is left. Rules: everything is drawn from generators seeded by the world's seed; whatever is wrong is a violation, told with
the time, and a world goes on after one so that the first is not the only one seen.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import random
import shutil
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from dht.memory import MemoryNetwork
from grid.api.client import ControlError
from grid.core.job import FINAL
from grid.worker.environment import python_minor
from simulations import faults, hooks, scenario, sources
from simulations.checks import Checks
from simulations.clock import WorldClock
from simulations.directory import Directory
from simulations.host import Host, memberships
from simulations.ledger import Groups
from simulations.programs import Expected, serial
from simulations.trace import Trace

RETRY_S = 1.0
"""Before a follower that was refused asks again, perhaps elsewhere."""
STEP_S = 0.5
"""How often the world looks whether it is over."""
AGREE_S = 30.0
"""After all jobs are final: until every member says so."""
READY_S = 30.0
MEMORY = Path("/dev/shm")
"""Homes are there where there is such a file system."""


@dataclass
class Report:
    """How a run went. Counters and durations are for people."""

    scenario: str
    seed: int
    violations: list[str] = field(default_factory=list)
    trace_hash: str = ""
    trace_lines: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing was wrong."""
        return not self.violations


@dataclass
class SimJob:
    """A job as the world knows it."""

    number: int
    spec: scenario.Job
    expected: Expected
    host: Host
    id: str = ""
    submitted_s: float = 0.0
    final_s: float = 0.0
    lost: str = ""  # why it was never accepted
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by host


@dataclass
class Meter:
    """Messages between peers, by host; a request counts at both ends, its answer too."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    bytes_received: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Begin anew."""
        for counter in (self.sent, self.received, self.bytes_received, self.kinds):
            counter.clear()

    def add(self, by: str, to: str, kind: str, size: int, answered: bool) -> None:
        """One message."""
        self.sent[by] += 1
        self.received[to] += 1
        self.bytes_received[to] += size
        self.kinds[kind] += 1
        if answered:
            self.sent[to] += 1
            self.received[by] += 1


class World:
    """One run."""

    def __init__(self, of: scenario.Scenario, seed: int, folder: Path, show: Callable[[str], None] | None = None) -> None:
        self.scenario = of
        self.seed = seed
        self.folder = folder
        self.rng = random.Random(f"{of.name} {seed}")
        self.trace = Trace(show)
        link = {name: getattr(of.link, name) for name in scenario.Link.__struct_fields__}
        self.network = MemoryNetwork(random.Random(f"network {seed}"), **link)
        self.directory = Directory(self.network)
        self.violations: list[str] = []
        self.counters: dict[str, float] = {}
        self.hosts: list[Host] = []
        self.followers: list[Host] = []
        self.meter = Meter()
        self.jobs: list[SimJob] = []
        self.checks = Checks(self)
        self.groups = Groups(self)
        self.healed = False
        self.points: dict[str, int] = {}
        self.dies_at: Callable[[Host, str], bool] = lambda host, point: False
        """Asked at each named point of the ledger; True: it has crashed the host."""
        self.nursery: trio.Nursery

    # ---- telling ----

    def violation(self, text: str, error: BaseException | None = None) -> None:
        """Something that must not be."""
        if error is not None:
            text += "\n" + "".join(traceback.format_exception(error))
        try:
            at_s = trio.current_time()
        except RuntimeError:
            at_s = 0.0
        self.violations.append(f"[{at_s:.3f} s] {text}")

    def count(self, name: str, number: float = 1) -> None:
        """For the report."""
        self.counters[name] = self.counters.get(name, 0) + number

    # ---- the run ----

    async def run(self) -> None:
        """From the first start to the last check."""
        admit = memberships(random.Random(f"grid {self.seed}"))
        self.hosts = [Host(self, number, admit) for number in range(self.scenario.peers)]
        count = self.scenario.followers or len(self.hosts)
        self.followers = self.hosts if count >= len(self.hosts) else self.rng.sample(self.hosts, count)
        async with trio.open_nursery() as self.nursery:
            await self._begin()
            async with trio.open_nursery() as troubles:
                for number, job in enumerate(self.scenario.job):
                    self.nursery.start_soon(self._submit, number, job)
                for number, fault in enumerate(self.scenario.fault):
                    troubles.start_soon(faults.KINDS[fault.kind], faults.Fault(self, number, dict(fault.options)))
                await self.until(self._all_final, self.scenario.faults_s)
                troubles.cancel_scope.cancel()
            await faults.heal(self)
            self.healed = True
            for host in self.hosts:
                if not host.up:
                    host.start(self.nursery)
            await self.until(lambda: all(host.ready.is_set() for host in self.hosts), READY_S)
            if not await self.until(self._all_final, self.scenario.settle_s):
                for each in self.jobs:
                    if not each.outcomes:
                        self.violation(f"job {each.number} is not final {self.scenario.settle_s:g} s after all healed")
                        self.checks.explain(each)
            else:
                await self.checks.agreement(AGREE_S)
            await self._end()
            self.nursery.cancel_scope.cancel()

    async def _begin(self) -> None:
        for host in self.hosts:
            host.start(self.nursery)
            await trio.sleep(self.rng.random() * 0.2)
        with trio.move_on_after(READY_S) as patience:
            for host in self.hosts:
                await host.ready.wait()
        if patience.cancelled_caught:
            self.violation("a peer did not become ready")

    async def _end(self) -> None:
        """Stop all peers as SIGTERM does; then nothing may be left of them."""
        if not self.violations:
            await self.checks.pins()
        for host in self.hosts:
            if host.up:
                await host.stop()
        self.checks.leaks()

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Wait for something that many parts decide; whether it came."""
        with trio.move_on_after(within_s):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(STEP_S)
        return condition()

    def _all_final(self) -> bool:
        return len(self.jobs) == len(self.scenario.job) and all(job.outcomes or job.lost for job in self.jobs)

    # ---- jobs ----

    async def _submit(self, number: int, spec: scenario.Job) -> None:
        expected = serial(spec.program, spec.tasks, spec.mean_s)
        await trio.sleep(spec.at_s + self.rng.random() * 0.1)
        host = self.hosts[spec.submitter] if spec.submitter >= 0 else self.rng.choice(self.hosts)
        await self.until(lambda: host.up and host.ready.is_set(), math.inf)
        job = SimJob(number, spec, expected, host)
        archive = self.folder / f"job{number}.tar"
        _pack(archive, json.dumps([spec.program, spec.tasks, spec.mean_s]).encode())
        submission = {
            "name": f"job{number}",
            "script": "job.py",
            "argv": [],
            "code": str(archive),
            "python": python_minor(),
            "options": {"replicas": spec.replicas, "strict": spec.strict, "retries": spec.retries, "seed": number},
        }

        def event(name: str, data: dict[str, Any], body: bytes) -> None:
            if name == "accepted":
                job.id = str(data["job"])

        try:
            await host.ask("submit", {"submission": submission, "detach": True}, event)
        except ControlError as error:
            if not job.id:
                job.lost = str(error)
                if not host.killed and not self.scenario.fault:
                    self.violation(f"job {number} was refused: {error}")
        self.trace.add("submitted", host.name, number, job.id[:8] or job.lost)
        job.submitted_s = trio.current_time()
        self.checks.accepted(job)
        self.jobs.append(job)
        if job.id:
            for follower in self.followers:
                self.nursery.start_soon(self._follow, job, follower)

    async def _follow(self, job: SimJob, host: Host) -> None:
        """A user of this machine follows the job to its end, whatever happens to the peer."""
        at = {"stdout": 0, "stderr": 0}

        def event(name: str, data: dict[str, Any], body: bytes) -> None:
            if name in at:
                self.checks.shown(job, host.name, 1 if name == "stdout" else 2, int(data["offset"]), body)
                at[name] = int(data["offset"]) + len(body)
            elif name == "final":
                self.checks.final(job, host, data)

        while host.name not in job.outcomes:
            with contextlib.suppress(ControlError):
                params = {"job": job.id, "from_stdout": at["stdout"], "from_stderr": at["stderr"], "prints": False}
                await host.ask("follow", params, event)
            await trio.sleep(RETRY_S)


def _pack(path: Path, script: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("job.py")
        info.size = len(script)
        tar.addfile(info, io.BytesIO(script))


# ---- running one ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    base = MEMORY if MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="grid-world-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    of: scenario.Scenario,
    seed: int,
    show: Callable[[str], None] | None = None,
    make: Callable[[scenario.Scenario, int, Path, Callable[[str], None] | None], World] = World,
) -> Report:
    """Run a world to its end."""
    began_s = time.perf_counter()
    report = Report(of.name, seed)
    freezes = any(fault.kind in faults.FREEZES for fault in of.fault)
    with _folder() as folder, sources.installed(seed, freezes):
        world = make(of, seed, folder, show)
        with hooks.installed(world):
            clock = WorldClock()
            collects = gc.isenabled()
            gc.disable()  # a run is short, and all of it is alive until the end
            try:
                trio.run(world.run, clock=clock)
            except Exception as error:
                world.violation("the world broke", error)
            finally:
                if collects:
                    gc.enable()
        report.violations = world.violations
        report.trace_hash, report.trace_lines = world.trace.digest, world.trace.lines
        report.virtual_s = clock.now_s
        report.counters = world.counters
    report.real_s = time.perf_counter() - began_s
    return report


__all__ = ["FINAL", "Report", "SimJob", "World", "run"]
