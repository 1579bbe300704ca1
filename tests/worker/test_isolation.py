"""What a job's processes see of the peer's installation, and of each other (real processes)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.api import wire
from grid.worker import pool as pool_module
from grid.worker.environment import Environment
from grid.worker.pool import JobProcesses, WorkerPool
from tests.worker.conftest import PATIENCE_S, Tasks, poll

pytestmark = pytest.mark.real


def importable(*names: str) -> Any:
    """A task that tells which of these can be imported."""

    def task() -> list[str]:
        import importlib.util

        return [name for name in names if importlib.util.find_spec(name) is not None]

    return task


async def test_bare_environment_has_the_standard_library_and_grid_only(tasks: Tasks) -> None:
    names = ("numpy", "trio", "blake3", "pytest", "dht", "cli", "simulations", "tests", "six", "typing_extensions")
    assert importable(*names)() != []  # the peer itself has some of them
    assert await tasks.call(importable(*names)) == []
    own = ("grid", "grid.api.wire", "cloudpickle", "msgspec", "json", "sqlite3")
    assert await tasks.call(importable(*own)) == list(own)


async def test_idle_worker_is_light(tasks: Tasks) -> None:
    def heavy() -> list[str]:
        import sys

        return sorted({name.partition(".")[0] for name in sys.modules} & {"trio", "dht", "asyncio", "ssl", "blake3"})

    assert await tasks.call(heavy) == []
    assert tasks.child.rss_bytes() < 25 << 20


async def test_process_is_set_up_as_told(tasks: Tasks, setup: wire.Setup) -> None:
    def look() -> dict[str, Any]:
        import os
        import resource
        import sys

        return {
            "env": dict(os.environ),
            "cwd": os.getcwd(),
            "argv": sys.argv,
            "path": sys.path[0],
            "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
            "stdin": os.readlink("/proc/self/fd/0"),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "leader": (os.getsid(0), os.getpgid(0), os.getpid()),
            "hash": hash("a"),
            "builtins": [callable(quit), callable(exit), callable(help), bool(copyright)],
            "encoding": (sys.getfilesystemencoding(), sys.stdout.encoding),
            "main": sys.modules["__main__"].__name__,
            "signals": __import__("signal").getsignal(2) is __import__("signal").default_int_handler,
        }

    seen = await tasks.call(look)
    assert seen["env"] == {"GREETING": "hello"}
    assert seen["cwd"] == setup.workdir
    assert seen["argv"] == [setup.script, "a", "-b"]
    assert seen["path"] == os.path.dirname(setup.script)
    assert seen["fds"] in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6])  # one is the listing's own
    assert seen["stdin"] == "/dev/null"
    assert seen["core"] == (0, 0)
    assert set(seen["leader"]) == {tasks.child.pid}
    assert seen["builtins"] == [True] * 4
    assert seen["encoding"] == ("utf-8", "utf-8")
    assert seen["main"] == "__main__"
    assert seen["signals"]


async def test_hash_seed_is_fixed(job: JobProcesses, pool: WorkerPool, setup: wire.Setup) -> None:
    with trio.fail_after(PATIENCE_S):
        other = await pool.open_job(setup=setup)
        hashes = {await Tasks(await each.start_worker()).call(lambda: hash("spam")) for each in (job, other)}
        await other.aclose()
    assert len(hashes) == 1


async def test_modules_beside_the_script(tasks: Tasks, setup: wire.Setup) -> None:
    """Also such as are called like packages of ours."""
    for name in ("helper", "dht", "cli"):
        (Path(setup.script).parent / f"{name}.py").write_text(f"NAME = 'the script''s {name}'\n")

    def task() -> list[str]:
        import importlib

        return [importlib.import_module(name).NAME for name in ("helper", "dht", "cli")]

    assert await tasks.call(task) == ["the scripts helper", "the scripts dht", "the scripts cli"]


async def test_callers_own_environment(pool: WorkerPool, setup: wire.Setup) -> None:
    """`python job.py`: whatever the caller can import, .pth files included."""
    with trio.fail_after(PATIENCE_S):
        job = await pool.open_job(setup=setup, environment=Environment.caller(sys.executable, sys.path, sys.prefix))
        tasks = Tasks(await job.start_worker())
    assert await tasks.call(importable("numpy", "six", "pytest")) == ["numpy", "pytest"]
    prefix, executable = await tasks.call(lambda: (__import__("sys").prefix, __import__("sys").executable))
    assert (prefix, executable) == (sys.prefix, sys.executable)

    tasks.results.clear()

    def draw(x: int) -> float:
        import numpy

        return float(numpy.random.rand())

    first = dict(await tasks.run(draw, [0, 1, 2]))
    tasks.results.clear()
    assert await tasks.run(draw, [0, 1, 2]) == first
    assert len(set(first.values())) == 3
    with trio.fail_after(PATIENCE_S):
        await job.aclose()


async def test_spare_server_of_the_callers_environment(setup: wire.Setup, nursery: trio.Nursery) -> None:
    """The embedded grid's first job finds one that is warm."""
    environment = Environment.caller(sys.executable, sys.path, sys.prefix)
    pool = WorkerPool(spare_environment=environment)
    with trio.fail_after(PATIENCE_S):
        await nursery.start(pool.run)
        await trio.testing.wait_all_tasks_blocked()
        spare = pool._spares[0]
        job = await pool.open_job(setup=setup, environment=environment)
        assert job._server is spare
        bare = await pool.open_job(setup=setup)
        assert bare._server not in (None, spare, *pool._spares)
        assert await Tasks(await job.start_worker()).call(importable("numpy")) == ["numpy"]
        assert await Tasks(await bare.start_worker()).call(importable("numpy")) == []


async def test_next_spare_server_leaves_the_machine_to_the_job_that_starts(
    setup: wire.Setup, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there again after the job, or when that has long begun."""
    monkeypatch.setattr(pool_module, "SPARE_PAUSE_S", (PATIENCE_S, PATIENCE_S))
    pool = WorkerPool()
    with trio.fail_after(PATIENCE_S):
        await nursery.start(pool.run)
        await trio.testing.wait_all_tasks_blocked()
        job = await pool.open_job(setup=setup)
        assert await Tasks(await job.start_worker()).call(lambda: 1) == 1
        assert pool._spares == []
        await job.aclose()
        await poll(lambda: pool._spares)
        monkeypatch.setattr(pool_module, "SPARE_PAUSE_S", (0.0, 0.0))
        job = await pool.open_job(setup=setup)
        await poll(lambda: pool._spares)
        assert not job._closed.is_set()


async def test_own_library_of_an_environment_wins(pool: WorkerPool, setup: wire.Setup, tmp_path: Path) -> None:
    """cloudpickle comes from the environment where it has one."""
    import shutil

    import cloudpickle

    site = tmp_path / "site-packages"
    shutil.copytree(os.path.dirname(cloudpickle.__file__), site / "cloudpickle")
    (site / "grid.py").write_text("raise ImportError('not this one')\n")
    with trio.fail_after(PATIENCE_S):
        environment = Environment(Environment.bare().python, (), (str(site),))
        job = await pool.open_job(setup=setup, environment=environment)
        tasks = Tasks(await job.start_worker())
    assert (await tasks.call(lambda: __import__("cloudpickle").__file__)).startswith(str(site))
    with trio.fail_after(PATIENCE_S):
        await job.aclose()
