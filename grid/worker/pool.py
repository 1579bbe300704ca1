"""All children of a peer: spare fork servers, the jobs' processes, and the watch over their memory.

`WorkerPool.run` holds the one nursery in which everything here runs; leaving it kills every child. A job's processes are
forked by a fork server of its own, never shared between jobs. Spare servers of one environment (mostly the bare one) wait
for the next job.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import msgspec
import trio

from grid.api import wire
from grid.worker import memory
from grid.worker.environment import Environment
from grid.worker.fork_server import CHANNEL_BUFFER_BYTES, ForkServer, WorkerStartError
from grid.worker.process import Child, ChildGone, shared_cell
from grid.worker.sandbox import Bind, NoSandbox, Sandbox

__all__ = ["Child", "ChildGone", "JobProcesses", "WorkerPool", "WorkerStartError"]

READY_S_MAX: Final = 60.0
"""From fork to Ready; a swapping machine takes seconds."""
MEMORY_POLL_S: Final = 0.2
"""A greedy task takes at most about this much time's worth of page faults (some 1 GB) more than its limit."""
AVAILABLE_SHARE_MIN: Final = 0.04
"""Of the machine's memory; below it the kernel would choose a victim, perhaps the peer: we choose the largest child."""
RELIEF_S: Final = 1.0
"""Between two such kills, so that the memory of the first is back before a second is chosen."""
SPARE_PAUSE_S: Final = 2.0, 10.0
"""From a job's start here to that of the next spare server, unless a job ends before: its imports take a tenth of a second
of a core, which the job's first workers need more. Drawn from this range: peers that share a machine start together."""


class WorkerPool:
    """Owns all child processes of this peer."""

    def __init__(
        self,
        *,
        spare_zygotes: int = 1,
        spare_environment: Environment | None = None,
        kill_grace_s: float = 2.0,
        memory_poll_s: float = MEMORY_POLL_S,
    ) -> None:
        """`spare_environment`: of the servers kept warm, where jobs will mostly use another than the bare one."""
        self._spares_wanted = spare_zygotes
        self._spare_environment = spare_environment or Environment.bare()
        self.kill_grace_s = kill_grace_s
        self._memory_poll_s = memory_poll_s
        self._spares: list[ForkServer] = []
        self._spare_taken = trio.Event()
        self._job_ended = trio.Event()
        self._jobs: set[JobProcesses] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every child is killed."""
        async with trio.open_nursery() as self._nursery:
            try:
                self._nursery.start_soon(self._keep_spares)
                self._nursery.start_soon(self._watch_memory)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery.cancel_scope.cancel()

    async def open_job(
        self,
        *,
        setup: wire.Setup,
        environment: Environment | None = None,
        memory_bytes_max: int | None = None,
        sandbox: Sandbox | None = None,
        binds: Sequence[Bind] = (),
        early: socket.socket | None = None,
    ) -> JobProcesses:
        """Return a place for one job's processes, with its fork server started. Raises WorkerStartError.

        `setup` is what its workers get. No `environment`: the bare standard library. `memory_bytes_max`: a worker's.
        `early`: the workers' end of a datagram socket to a driver that is not one of these processes; it is theirs from now on.
        """
        if self._nursery is None:
            raise WorkerStartError("the pool does not run")
        ends = (early,) if early is not None else socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        environment, sandbox = environment or Environment.bare(), sandbox or NoSandbox()
        job = JobProcesses(self, setup, environment, memory_bytes_max or 0, sandbox, binds, ends)
        self._jobs.add(job)
        try:
            await self._nursery.start(job.run)
        except BaseException:
            self._jobs.discard(job)
            raise
        return job

    def children(self) -> list[Child]:
        """All that live."""
        return [child for job in self._jobs for child in job.children]

    def take_server(self, environment: Environment, sandbox: Sandbox) -> ForkServer | None:
        """A spare fork server if one fits."""
        if environment != self._spare_environment or not isinstance(sandbox, NoSandbox):
            return None
        while self._spares:
            server = self._spares.pop(0)
            self._job_ended = trio.Event()
            self._spare_taken.set()
            if not server.gone.is_set():
                return server
        return None

    def start_server(self, environment: Environment, sandbox: Sandbox, binds: Sequence[Bind]) -> ForkServer:
        """Start a fork server, which runs in the pool's nursery. Raises WorkerStartError."""
        assert self._nursery is not None
        server = ForkServer.start(environment, sandbox, binds)
        self._nursery.start_soon(server.run)
        return server

    def forget(self, job: JobProcesses) -> None:
        """The job has closed."""
        self._jobs.discard(job)
        self._job_ended.set()

    async def _keep_spares(self) -> None:
        pause_s = 1.0
        while True:
            if self._spare_taken.is_set():
                self._spare_taken = trio.Event()
                with trio.move_on_after(random.uniform(*SPARE_PAUSE_S)):
                    await self._job_ended.wait()
            self._spares = [server for server in self._spares if not server.gone.is_set()]
            if len(self._spares) >= self._spares_wanted:
                await self._spare_taken.wait()
                continue
            try:
                server = self.start_server(self._spare_environment, NoSandbox(), ())
                self._spares.append(server)  # a job may take it before it is ready: then they wait together
                await server.wait_ready()
            except WorkerStartError:  # each job will be told; perhaps it is a passing lack of memory
                await trio.sleep(pause_s)
                pause_s = min(60.0, 2 * pause_s)
                continue
            pause_s = 1.0

    async def _watch_memory(self) -> None:
        total, _ = memory.machine_bytes()
        relieved_at = -RELIEF_S
        spent_s = 0.0
        while True:
            await trio.sleep(max(self._memory_poll_s, 20 * spent_s))  # a twentieth of a core is enough, however many there are
            began_s = trio.current_time()
            children = self.children()
            sizes = {child: child.rss_bytes() for child in children}
            for child, size in sizes.items():
                if child.memory_bytes_max and size - child.shared_bytes > child.memory_bytes_max:
                    child.kill("memory")
            _, available = memory.machine_bytes()
            now = trio.current_time()
            spent_s = now - began_s
            if sizes and available < AVAILABLE_SHARE_MIN * total and now - relieved_at > RELIEF_S:
                relieved_at = now
                # Drivers last: a worker's tasks run again elsewhere, a driver is the job.
                max(sizes, key=lambda child: (child.role == "worker", sizes[child])).kill("memory")


class JobProcesses:
    """The processes of one job on this peer. Made by `WorkerPool.open_job`."""

    def __init__(
        self,
        pool: WorkerPool,
        setup: wire.Setup,
        environment: Environment,
        memory_bytes_max: int,
        sandbox: Sandbox,
        binds: Sequence[Bind],
        early: tuple[socket.socket, ...],
    ) -> None:
        self.environment = environment
        self.children: list[Child] = []
        """Those that live."""
        self._opened: list[Child] = []
        self._early = early
        """The workers' end and, unless it is elsewhere, the driver's: of results it need not wait for the peer to pass on."""
        self._pool = pool
        self._setup = setup
        self._memory_bytes_max = memory_bytes_max
        self._sandbox = sandbox
        self._binds = binds
        self._server: ForkServer | None = None
        self._server_lock = trio.Lock()
        self._closing = trio.Event()
        self._closed = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started by the pool: lives until `aclose`."""
        try:
            await self._ready_server()
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await self._closing.wait()
                self._nursery.cancel_scope.cancel()
        finally:
            self._closing.set()
            if self._server is not None:
                self._server.close()
                with trio.CancelScope(shield=True):
                    await self._server.gone.wait()
            for child in self._opened:
                child.close()
            for end in self._early:
                end.close()
            self._pool.forget(self)
            self._closed.set()

    async def start_worker(self) -> Child:
        """Fork a worker and return it when it is ready for frames. Raises WorkerStartError."""
        return await self._start("worker", self._setup, {}, self._memory_bytes_max)

    async def start_driver(
        self, setup: wire.Setup, *, stdin: int | None, stdout: int, stderr: int, memory_bytes_max: int | None = None
    ) -> Child:
        """Fork the driver on the given descriptors, which stay the caller's. Raises WorkerStartError."""
        fds = {"stdout": stdout, "stderr": stderr} | ({} if stdin is None else {"stdin": stdin})
        return await self._start("driver", setup, fds, memory_bytes_max or 0)

    async def aclose(self) -> None:
        """Kill all the job's processes and wait until they are gone. Idempotent."""
        self._closing.set()
        await self._closed.wait()

    async def _ready_server(self) -> ForkServer:
        """The job's fork server, started anew if it was lost."""
        async with self._server_lock:
            if self._server is not None and not self._server.gone.is_set():
                return self._server
            if self._closing.is_set():
                raise WorkerStartError("the job's processes are closed")
            self._server = self._pool.take_server(self.environment, self._sandbox)
            if self._server is not None:
                with contextlib.suppress(WorkerStartError):  # a spare that died unseen: start another
                    await self._server.wait_ready()
                    return self._server
            self._server = self._pool.start_server(self.environment, self._sandbox, self._binds)
            await self._server.wait_ready()
            return self._server

    async def _start(self, role: str, setup: wire.Setup, fds: Mapping[str, int], memory_bytes_max: int) -> Child:
        server = await self._ready_server()
        assert self._nursery is not None
        early = self._early[role == "driver"].fileno()
        async with _open_child(role, {**fds, "early": early}) as (child, handed, pipes):
            child.takes_early = True
            number, pid = await server.fork(role, handed, memory_bytes_max, functools.partial(self._on_exit, child))
            child.memory_bytes_max = memory_bytes_max
            child.grace_s = self._pool.kill_grace_s
            child.on_fork(pid, functools.partial(server.kill, number))
            self._opened = [other for other in self._opened if not other.closed] + [child]
            if not child.exited.is_set():
                self.children.append(child)
            for pipe, fd in pipes:
                child.add_pipe()
                self._nursery.start_soon(child.drain, pipe, fd)
            pipes.clear()
            self._nursery.start_soon(child.write)
        try:
            await self._greet(child, msgspec.structs.replace(setup, role=role))
        except BaseException:
            child.kill("start")
            child.close()
            raise
        return child

    async def _greet(self, child: Child, setup: wire.Setup) -> None:
        """Send the setup and wait for the child's first frame."""
        said = b""
        with trio.move_on_after(READY_S_MAX) as scope, contextlib.suppress(ChildGone):
            await child.send(setup)
            async for message, body in child.frames:
                if isinstance(message, wire.Ready):
                    child.python = message.python
                    return
                said += body if isinstance(message, wire.Print) else b""
        if scope.cancelled_caught:
            raise WorkerStartError(f"a {child.role} of the job was not ready within {READY_S_MAX:.0f} s")
        lines = said.decode(errors="replace").strip().splitlines()
        raise WorkerStartError(f"a {child.role} of the job ended as it started" + (f": {lines[-1]}" if lines else ""))

    def _on_exit(self, child: Child, status: int | None) -> None:
        with contextlib.suppress(ValueError):
            self.children.remove(child)
        child.on_exit(status)


@contextlib.asynccontextmanager
async def _open_child(role: str, fds: Mapping[str, int]) -> AsyncIterator[tuple[Child, dict[str, int], list[tuple[int, int]]]]:
    """Make a child's channel, cell and pipes; yield (child, descriptors to hand over, our ends of pipes to drain)."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER_BYTES)
    mine = [theirs.detach()]
    handed = {"channel": mine[0], **fds}
    pipes: list[tuple[int, int]] = []
    cell = None
    try:
        if role == "worker":
            cell_fd, cell = shared_cell()
            mine.append(cell_fd)
            handed["progress"] = cell_fd
            for name, fd in (("stdout", 1), ("stderr", 2)):
                read, write = os.pipe()
                mine.append(write)
                pipes.append((read, fd))
                handed[name] = write
        child = Child(role, ours, cell)
        try:
            yield child, handed, pipes
        except BaseException:
            child.close()
            raise
    finally:
        for fd in mine:
            os.close(fd)
        for read, _ in pipes:
            os.close(read)
