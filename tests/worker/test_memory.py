"""Tasks that use up memory (real processes)."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.api import serialize, wire
from grid.worker import memory
from grid.worker.pool import WorkerPool
from tests.worker.conftest import PATIENCE_S, Tasks

pytestmark = pytest.mark.real
LIMIT = 200 << 20


async def test_greedy_task_gets_a_memory_error(pool: WorkerPool, setup: wire.Setup) -> None:
    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup, memory_bytes_max=LIMIT)
        tasks = Tasks(await job.start_worker())
    await tasks.run(lambda size: len(bytearray(size)), [1 << 20, 1 << 30, 10 << 20])
    assert tasks.results == {0: 1 << 20, 2: 10 << 20}
    failed, error = tasks.failures[1]
    assert (failed.kind, failed.type_name) == ("raised", "MemoryError")
    assert isinstance(error, MemoryError)
    with trio.fail_after(PATIENCE_S):
        await job.aclose()


async def test_memory_of_subprocesses_counts(pool: WorkerPool, setup: wire.Setup) -> None:
    """Each is under the limit of its own, together they are over it: the watch kills them."""

    def task(x: int) -> None:
        import os
        import signal

        for _ in range(4):
            if os.fork() == 0:
                globals()["kept"] = b"x" * (90 << 20)
                signal.pause()
        signal.pause()

    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup, memory_bytes_max=LIMIT)
        tasks = Tasks(await job.start_worker())
        await tasks.define(task)
        await tasks.start([0])
        async for _ in tasks.child.frames:
            pass
        await tasks.child.exited.wait()
        await job.aclose()
    assert (tasks.child.status, tasks.child.why) == (-signal.SIGKILL, "memory")


async def test_shared_arguments_do_not_count(pool: WorkerPool, setup: wire.Setup) -> None:
    """They are another process' memory: with a subprocess' own they would be over the limit."""

    def task(data: memoryview) -> int:
        import subprocess
        import sys

        subprocess.run([sys.executable, "-c", "import time; x = b'x' * (90 << 20); time.sleep(0.5)"], check=True)
        return sum(data[:: 1 << 12])

    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup, memory_bytes_max=LIMIT)
        tasks = Tasks(await job.start_worker())
    parts, _ = serialize.dump_segment([Shared()])
    fd = os.memfd_create("page")
    os.writev(fd, parts)
    tasks.child.shared_bytes = os.fstat(fd).st_size
    await tasks.define(task)
    await tasks.child.send(wire.Run(1, 0, 0, 0, 0, 1, 0, f"/proc/{os.getpid()}/fd/{fd}", shared=True))
    await tasks.finish(1)
    os.close(fd)
    assert tasks.results == {0: 150 << 8}, tasks.failures
    with trio.fail_after(PATIENCE_S):
        await job.aclose()


class Shared:
    """150 MiB, used where they lie."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return memoryview, (pickle.PickleBuffer(b"\1" * (150 << 20)),)


async def test_largest_worker_goes_when_the_machine_runs_out(
    pool: WorkerPool, setup: wire.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup)
        small, large = Tasks(await job.start_worker()), Tasks(await job.start_worker())
        await large.run(lambda x: globals().setdefault("kept", b"x" * x) and None, [80 << 20])
        monkeypatch.setattr(memory, "machine_bytes", lambda: (100, 3))
        await large.child.exited.wait()
        monkeypatch.undo()
        assert large.child.why == "memory"
        assert not small.child.exited.is_set()
        await job.aclose()


def test_sizes_of_this_process() -> None:
    import mmap
    import os

    before = memory.own_bytes(os.getpid())
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages: what the allocator gives may have been this process's already
        block.write(b"x" * (64 << 20))
        assert memory.own_bytes(os.getpid()) - before > 60 << 20
    assert os.getpid() in memory.tree(os.getpid())
    total, available = memory.machine_bytes()
    assert 0 < available <= total
    assert memory.own_bytes(1 << 30) == 0
    assert Path("/proc").exists()
