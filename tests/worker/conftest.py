"""Fixtures: a running pool, and a worker to give tasks to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.api import serialize, wire
from grid.worker.pool import Child, JobProcesses, WorkerPool

PATIENCE_S = 30.0
"""For real processes on a busy machine."""


async def poll(condition: Callable[[], object]) -> None:
    """Wait until something about a real process is so."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


class Tasks:
    """Gives Runs to a worker and collects its answers."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.results: dict[int, Any] = {}
        self.failures: dict[int, tuple[wire.Failed, BaseException | None]] = {}
        self.prints: list[tuple[int, int, int, bytes]] = []
        self.frames: list[Any] = []
        self._tickets = 0
        self._reported: dict[int, int] = {}  # where what is reported of a ticket ends

    async def define(self, function: Callable[..., Any], fn: int = 0) -> None:
        """Send a function."""
        await self.child.send(wire.Function(fn), serialize.dump_function(function))

    async def start(
        self,
        items: Sequence[Any],
        *,
        fn: int = 0,
        first: int = 0,
        lo: int | None = None,
        hi: int | None = None,
        stage: int = 0,
        kind: int = serialize.ONE,
        attempt: int = 0,
        timed: bool = False,
    ) -> int:
        """Send a Run; return its ticket."""
        self._tickets += 1
        parts, _ = serialize.dump_segment(items, kind)
        lo = first if lo is None else lo
        hi = first + len(items) if hi is None else hi
        await self.child.send(wire.Run(self._tickets, stage, fn, first, lo, hi, attempt, "", timed), *parts)
        return self._tickets

    async def until(self, done: Callable[[Any, Any], bool]) -> Any:
        """Take frames up to the first that satisfies `done`, and return it."""
        with trio.fail_after(PATIENCE_S):
            async for message, body in self.child.frames:
                self._take(message, body)
                if done(message, body):
                    return message
        raise AssertionError(f"the worker ended: status {self.child.status}, {self.prints}")

    async def finish(self, ticket: int) -> None:
        """Take frames until the ticket is answered: by a final frame, or by the return of all that was not reported."""

        def ends(message: Any, _: Any) -> bool:
            if getattr(message, "ticket", None) != ticket:
                return False
            if isinstance(message, wire.Returned):
                return message.lo == self._reported.get(ticket)
            return bool(getattr(message, "final", False))

        await self.until(ends)

    async def run(self, function: Callable[..., Any], items: Sequence[Any], **options: Any) -> dict[int, Any]:
        """Define, start, finish; return the results by index."""
        await self.define(function)
        await self.finish(await self.start(items, **options))
        return self.results

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of one call."""
        self.results.clear()
        await self.run(function, [((), None)], kind=serialize.CALL)
        assert not self.failures, self.failures[0][0].traceback
        return self.results[0]

    def _take(self, message: Any, body: bytes) -> None:
        self.frames.append(message)
        if isinstance(message, wire.Done | wire.Failed):
            self._reported[message.ticket] = message.hi if isinstance(message, wire.Done) else message.index + 1
        if isinstance(message, wire.Done):
            data = Path(message.path).read_bytes() if message.path else body
            values = serialize.load_results(data)
            assert len(values) == message.hi - message.lo
            for index, value in enumerate(values, message.lo):
                assert index not in self.results
                self.results[index] = value
        elif isinstance(message, wire.Failed):
            self.failures[message.index] = message, serialize.load_exception(body)
        elif isinstance(message, wire.Print):
            self.prints.append((message.stage, message.index, message.fd, body))


@pytest.fixture
def setup(tmp_path: Path) -> wire.Setup:
    """A worker's Setup: its script lies in tmp_path/code."""
    for name in ("code", "work", "spool"):
        (tmp_path / name).mkdir()
    return wire.Setup(
        role="worker",
        job="ab" * 16,
        job_name="job",
        peer="cd" * 20,
        seed=7,
        script=str(tmp_path / "code" / "job.py"),
        argv=("a", "-b"),
        workdir=str(tmp_path / "work"),
        spool=str(tmp_path / "spool"),
        env={"GREETING": "hello"},
    )


@pytest.fixture
async def pool(nursery: trio.Nursery) -> WorkerPool:
    """A pool that runs for the test."""
    pool = WorkerPool(memory_poll_s=0.05)
    await nursery.start(pool.run)
    return pool


@pytest.fixture
async def job(pool: WorkerPool, setup: wire.Setup) -> AsyncIterator[JobProcesses]:
    """A job in the bare environment."""
    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup)
    yield job
    with trio.fail_after(PATIENCE_S):
        await job.aclose()


@pytest.fixture
async def tasks(job: JobProcesses) -> Tasks:
    """A worker of that job."""
    with trio.fail_after(PATIENCE_S):
        return Tasks(await job.start_worker())
