"""Child processes in virtual time: the pool's interface and the children's wire protocol, without a process.

A child is a task of the pool's nursery that speaks `grid.api.wire` with its peer: every frame is encoded and decoded as on a
socket. Rules: a frame to a child is taken in at once (real ones have a reader thread); what a child says is read by whoever
iterates its frames; killing a child is immediate, its end is told as a real one's is.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio

from grid.api import wire
from grid.worker.environment import python_minor
from grid.worker.fork_server import WorkerStartError
from grid.worker.process import ChildGone

START_S = (0.003, 0.03)
"""A fork, and a fork on a busy machine."""

Main = Callable[["SimChild", wire.Setup], Awaitable[int]]


class Died(Exception):
    """The process ends here, with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class SimChild:
    """One child as its peer sees it (the interface of `grid.worker.process.Child`) and as its own code does."""

    def __init__(self, role: str, rng: random.Random, slowness: Callable[[], float]) -> None:
        self.role = role
        self.rng = rng
        self.slowness = slowness
        self.pid = 0
        self.python = python_minor()
        self.exited = trio.Event()
        self.status: int | None = None
        self.why = ""
        self.memory_bytes_max = 0
        self.grace_s = 2.0
        self.takes_early = False
        self.cell = (-1, 0)
        self.task = (-1, -1, 0)
        self.closed = False
        self.stdout = self.stderr = -1
        self.inbox: Callable[[Any, bytes], None] = self._early
        self.broken: Callable[[Exception], None] = lambda error: None
        self.paused = False
        self._waiting: list[tuple[Any, bytes]] = []
        self._said: deque[tuple[Any, bytes]] = deque()
        self._news = trio.Event()
        self._resumed = trio.Event()
        self._scope = trio.CancelScope()

    # ---- the peer's side ----

    async def send(self, message: wire.ToChild, *bodies: wire.Buffer) -> None:
        """See `Child.send`."""
        self.post(message, *bodies)
        await trio.lowlevel.checkpoint()

    def post(self, message: wire.ToChild, *bodies: wire.Buffer) -> None:
        """See `Child.post`."""
        if self.exited.is_set() or self.closed:
            raise ChildGone
        body = b"".join(bodies)
        assert len(body) <= wire.BODY_BYTES_MAX
        try:
            self.inbox(wire.to_child_decoder.decode(msgspec.msgpack.encode(message)), body)
        except Exception as error:  # callers take any error for a child that is gone
            self.broken(error)

    def _early(self, message: Any, body: bytes) -> None:
        self._waiting.append((message, body))

    def take_in(self, inbox: Callable[[Any, bytes], None]) -> None:
        """From now on frames go there; first those that came before."""
        self.inbox = inbox
        waiting, self._waiting = self._waiting, []
        for message, body in waiting:
            inbox(message, body)

    @property
    def frames(self) -> SimChild:
        """See `Child.frames`."""
        return self

    def __aiter__(self) -> SimChild:
        return self

    async def __anext__(self) -> tuple[Any, bytes]:
        while True:
            if self._said:
                return self._said.popleft()
            if self.exited.is_set() or self.closed:
                self.close()
                raise StopAsyncIteration
            self._news = trio.Event()
            await self._news.wait()

    def progress(self) -> tuple[int, int]:
        """See `Child.progress`."""
        return self.cell

    def running(self) -> tuple[int, int]:
        """See `Child.running`."""
        return self.task[:2]

    def rss_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    def kill(self, reason: str = "killed") -> None:
        """See `Child.kill`."""
        if not self.exited.is_set():
            self.why = self.why or reason
            self.die(-9)

    async def stop(self, grace_s: float | None = None) -> None:
        """See `Child.stop`."""
        self.kill("stopped")
        await trio.lowlevel.checkpoint()

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        self.paused = False
        self._resumed.set()
        self._resumed = trio.Event()

    def close(self) -> None:
        """See `Child.close`."""
        self.closed = True
        self._news.set()

    # ---- its own side ----

    def say(self, message: wire.FromChild, body: bytes = b"") -> None:
        """A frame to the peer."""
        if not self.exited.is_set():
            self._said.append((wire.from_child_decoder.decode(msgspec.msgpack.encode(message)), body))
            self._news.set()

    def write(self, fd: int, data: bytes) -> None:
        """To its stdout (1) or stderr (2): the pipe the peer gave it. A world's output stays under a pipe's buffer at a time."""
        pipe = self.stdout if fd == 1 else self.stderr
        if pipe >= 0 and not self.exited.is_set():
            try:
                assert os.write(pipe, data) == len(data)
            except BrokenPipeError:  # its peer reads no more: SIGPIPE, or Python's way to say so
                self.die(1)

    async def work(self, seconds: float) -> None:
        """Use time."""
        await trio.sleep(seconds * self.slowness())
        await self.gate()

    async def gate(self) -> None:
        """Go on only while not stopped."""
        while self.paused:
            await self._resumed.wait()

    def die(self, status: int) -> None:
        """The process ends now."""
        if self.exited.is_set():
            return
        self.status = status
        for pipe in (self.stdout, self.stderr):
            if pipe >= 0:
                os.close(pipe)
        self.stdout = self.stderr = -1
        self.exited.set()
        self._news.set()
        self._scope.cancel()

    async def run(self, main: Main, setup: wire.Setup) -> None:
        """The process."""
        status = -9
        try:
            with self._scope:
                try:
                    status = await main(self, setup)
                except Died as death:
                    status = death.status
        finally:
            self.die(status)


class SimProcesses:
    """One job's processes: the interface of `grid.worker.pool.JobProcesses`."""

    def __init__(self, pool: SimPool, setup: wire.Setup, nursery: trio.Nursery) -> None:
        self.children: list[SimChild] = []
        self._pool = pool
        self._setup = setup
        self._nursery = nursery
        self._closed = False

    async def start_worker(self) -> SimChild:
        """See `JobProcesses.start_worker`."""
        return await self._start("worker", self._setup, -1, -1)

    async def start_driver(
        self, setup: wire.Setup, *, stdin: int | None, stdout: int, stderr: int, memory_bytes_max: int | None = None
    ) -> SimChild:
        """See `JobProcesses.start_driver`."""
        return await self._start("driver", setup, os.dup(stdout), os.dup(stderr))

    async def _start(self, role: str, setup: wire.Setup, stdout: int, stderr: int) -> SimChild:
        pool = self._pool
        child = SimChild(role, random.Random(pool.rng.random()), pool.slowness)
        child.stdout, child.stderr, child.broken = stdout, stderr, pool.broken
        try:
            await trio.sleep(pool.rng.uniform(*START_S))
            if self._closed:
                raise WorkerStartError("the job's processes are closed")
        except BaseException:
            child.die(-9)
            raise
        pool.started += 1
        child.pid = pool.started
        self.children.append(child)
        self._nursery.start_soon(self._run, child, msgspec.structs.replace(setup, role=role))
        return child

    async def _run(self, child: SimChild, setup: wire.Setup) -> None:
        try:
            await child.run(self._pool.mains[child.role], setup)
        finally:
            self.children.remove(child)

    async def aclose(self) -> None:
        """See `JobProcesses.aclose`."""
        self._closed = True
        for child in list(self.children):
            child.kill("closed")
        self._pool.forget(self)
        await trio.lowlevel.checkpoint()


class SimPool:
    """The interface of `grid.worker.pool.WorkerPool`. `mains`: what a process of each role runs; `broken`: told of what a
    child can't make sense of."""

    def __init__(
        self,
        rng: random.Random,
        mains: Mapping[str, Main],
        slowness: Callable[[], float],
        broken: Callable[[Exception], None],
    ) -> None:
        self.broken = broken
        self.rng = rng
        self.mains = mains
        self.slowness = slowness
        self.started = 0
        self._jobs: list[SimProcesses] = []
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `WorkerPool.run`."""
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                for child in self.children():
                    child.kill("closed")
                self._nursery.cancel_scope.cancel()

    async def open_job(
        self,
        *,
        setup: wire.Setup,
        environment: Any = None,
        memory_bytes_max: int | None = None,
        sandbox: Any = None,
        binds: Sequence[Any] = (),
    ) -> SimProcesses:
        """See `WorkerPool.open_job`."""
        if self._nursery is None:
            raise WorkerStartError("the pool does not run")
        job = SimProcesses(self, setup, self._nursery)
        self._jobs.append(job)
        await trio.sleep(self.rng.uniform(*START_S))
        return job

    def children(self) -> list[SimChild]:
        """All that live."""
        return [child for job in self._jobs for child in job.children]

    def forget(self, job: SimProcesses) -> None:
        """The job has closed."""
        if job in self._jobs:
            self._jobs.remove(job)
