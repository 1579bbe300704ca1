"""Processes that die, at any point, and who notices (real processes)."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from grid.api import wire
from grid.worker.environment import Environment
from grid.worker.pool import ChildGone, JobProcesses, WorkerPool, WorkerStartError
from tests.worker.conftest import PATIENCE_S, Tasks, poll

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def ended(tasks: Tasks) -> list[wire.Message]:
    """The frames up to the end; the child is reaped then."""
    with trio.fail_after(PATIENCE_S):
        frames = [message async for message, _ in tasks.child.frames]
        await tasks.child.exited.wait()
    return frames


async def test_task_exits_the_process(tasks: Tasks) -> None:
    """The results before it arrived; the cell names the culprit."""

    def task(x: int) -> int:
        import os
        import time

        if x == 2:
            time.sleep(0.3)
            print("last words")
            os._exit(7)
        return x

    await tasks.define(task)
    await tasks.start([0, 1, 2, 3], stage=5)
    frames = await ended(tasks)
    done = [message for message in frames if isinstance(message, wire.Done)]
    assert (done[0].lo, done[-1].hi) == (0, 2)
    assert not done[-1].final
    assert (tasks.child.status, tasks.child.why) == (7, "")
    assert tasks.child.progress()[0] == 2
    assert tasks.child.running() == (5, 2)
    with pytest.raises(ChildGone):
        await tasks.child.send(wire.Stop())


async def test_crash_leaves_a_python_traceback(tasks: Tasks) -> None:
    def crash(x: int) -> None:
        import ctypes

        ctypes.string_at(0)

    await tasks.define(crash)
    await tasks.start([0])
    with trio.fail_after(PATIENCE_S):
        text = b"".join([body async for message, body in tasks.child.frames if isinstance(message, wire.Print)])
        await tasks.child.exited.wait()
    assert tasks.child.status == -signal.SIGSEGV
    assert b"in crash" in text


async def test_killed_in_mid_task(tasks: Tasks, job: JobProcesses) -> None:
    await tasks.define(lambda x: __import__("time").sleep(1000))
    await tasks.start([0])
    await poll(lambda: tasks.child.progress()[0] == 0)
    os.kill(tasks.child.pid, signal.SIGKILL)
    await ended(tasks)
    assert (tasks.child.status, tasks.child.why) == (-signal.SIGKILL, "")
    with trio.fail_after(PATIENCE_S):
        other = Tasks(await job.start_worker())
    assert await other.run(abs, [-3]) == {0: 3}


async def test_kill_tells_why_and_takes_subprocesses(tasks: Tasks, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def task(path: str) -> None:
        import subprocess
        import time

        processes = [
            subprocess.Popen(["sleep", "1000"]),
            subprocess.Popen(["sleep", "1000"], start_new_session=True),  # flees the group
        ]
        with open(path + "~", "w") as file:
            file.write(" ".join(str(process.pid) for process in processes))
        __import__("os").rename(path + "~", path)
        time.sleep(1000)

    await tasks.define(task)
    await tasks.start([str(pids)])
    await poll(pids.exists)
    group, fled = map(int, pids.read_text().split())
    tasks.child.kill("timeout")
    tasks.child.kill("second reason")
    await ended(tasks)
    assert (tasks.child.status, tasks.child.why) == (-signal.SIGKILL, "timeout")
    await poll(lambda: not alive(group))
    assert alive(fled)  # until the job ends: see the next test


async def test_closing_a_job_leaves_nothing(pool: WorkerPool, setup: wire.Setup, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"

    def daemonise(path: str) -> None:
        import os
        import subprocess

        process = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
        with open(path + "~", "wb") as file:
            file.write(process.stdout.readline())  # type: ignore[union-attr]
        os.rename(path + "~", path)

    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup)
        tasks = Tasks(await job.start_worker())
    await tasks.run(daemonise, [str(pidfile)])
    assert not tasks.failures, tasks.failures[0][0].traceback
    orphan = int(pidfile.read_text())
    assert alive(orphan)
    with trio.fail_after(PATIENCE_S):
        await job.aclose()
        await job.aclose()
    assert not alive(tasks.child.pid)
    assert not alive(orphan)
    assert pool.children() == []
    with pytest.raises(WorkerStartError):
        await job.start_worker()


async def test_fork_server_killed(tasks: Tasks, job: JobProcesses) -> None:
    """Its children die with it; the next worker gets a new one."""
    await tasks.define(lambda x: __import__("time").sleep(1000))
    await tasks.start([0])
    await poll(lambda: tasks.child.progress()[0] == 0)
    assert job._server is not None
    os.kill(job._server.pid, signal.SIGKILL)
    await ended(tasks)
    await poll(lambda: not alive(tasks.child.pid))
    with trio.fail_after(PATIENCE_S):
        other = Tasks(await job.start_worker())
    assert await other.run(abs, [-3]) == {0: 3}


async def test_peer_killed_takes_everything_along(tmp_path: Path) -> None:
    """A process that owns a pool is killed while its worker and the worker's subprocess are busy."""
    program = tmp_path / "owner.py"
    program.write_text(
        """
import sys, trio
from grid.api import serialize, wire
from grid.worker.pool import WorkerPool

def task(x):
    import subprocess, time
    print(subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1000)

async def main():
    folder = sys.argv[1]
    pool = WorkerPool()
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        setup = wire.Setup("worker", "00" * 16, "job", "", 1, folder + "/job.py", (), folder, folder)
        job = await pool.open_job(setup=setup)
        child = await job.start_worker()
        await child.send(wire.Function(0), serialize.dump_function(task))
        await child.send(wire.Run(1, 0, 0, 0, 0, 1), *serialize.dump_segment([0])[0])
        async for message, body in child.frames:
            print(job._server.pid, child.pid, int(body), flush=True)

trio.run(main)
"""
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with trio.fail_after(PATIENCE_S):
        process = await trio.lowlevel.open_process([sys.executable, str(program), str(tmp_path)], stdout=-1, stderr=-1, env=env)
        assert process.stdout is not None
        assert process.stderr is not None
        async with process.stdout, process.stderr:
            line = await process.stdout.receive_some()
            assert line, await process.stderr.receive_some()
            process.kill()
            await process.wait()
    for pid in map(int, line.split()):
        await poll(functools.partial(lambda pid: not alive(pid), pid))


async def test_peer_and_fork_server_killed_at_once(tasks: Tasks, job: JobProcesses) -> None:
    """Nobody is left to tell a busy worker: the kernel does (PR_SET_PDEATHSIG)."""
    await tasks.define(lambda x: __import__("time").sleep(1000))
    await tasks.start([0])
    await poll(lambda: tasks.child.progress()[0] == 0)
    assert job._server is not None
    os.kill(job._server.pid, signal.SIGSTOP)  # it can't do it itself
    os.kill(job._server.pid, signal.SIGKILL)
    await poll(lambda: not alive(tasks.child.pid))


async def test_cancelled_pool_kills_all(setup: wire.Setup) -> None:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            pool = WorkerPool()
            await nursery.start(pool.run)
            job = await pool.open_job(setup=setup)
            child = await job.start_worker()
            assert job._server is not None
            pids = [child.pid, job._server.pid]
            nursery.cancel_scope.cancel()
    assert not any(map(alive, pids))
    assert child.exited.is_set()


async def test_starting_is_refused_with_a_reason(pool: WorkerPool, setup: wire.Setup, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no library for you' >&2\nexit 3\n")
    broken.chmod(0o755)
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(WorkerStartError, match="no library for you"):
            await pool.open_job(setup=setup, environment=Environment(str(broken)))
        with pytest.raises(WorkerStartError, match="No such file"):
            await pool.open_job(setup=setup, environment=Environment(str(tmp_path / "absent")))
        setup = wire.Setup("worker", "00", "", "", 1, "", (), "/proc/nowhere", "")
        job = await pool.open_job(setup=setup)
        with pytest.raises(WorkerStartError, match="nowhere"):
            await job.start_worker()
        await job.aclose()


async def test_child_that_breaks_the_frame_format_is_killed(tasks: Tasks) -> None:
    def babble(x: int) -> None:
        import os

        for fd in range(3, 6):  # wherever the channel is
            with contextlib.suppress(OSError):
                os.write(fd, b"\xff" * 64)
        __import__("time").sleep(1000)

    await tasks.define(babble)
    await tasks.start([0])
    await ended(tasks)
    assert (tasks.child.status, tasks.child.why) == (-signal.SIGKILL, "protocol")
