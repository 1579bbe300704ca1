"""The driver process: the script runs as under Python (real processes)."""

# ruff: noqa: ASYNC221, ASYNC230, ASYNC240 - small files and short programs
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio

from grid.api import serialize, wire
from grid.worker.pool import Child, JobProcesses
from tests.worker.conftest import PATIENCE_S

pytestmark = pytest.mark.real


class Outcome(msgspec.Struct):
    """What a driver left."""

    status: int | None
    stdout: str
    stderr: str
    frames: list[wire.Message]


Run = Callable[..., Awaitable[Outcome]]


@pytest.fixture
def run(job: JobProcesses, setup: wire.Setup, tmp_path: Path) -> Run:
    """Write the script, run it as the job's driver, return what it left. `serve` answers its frames."""

    async def run(
        source: str, stdin: str | None = None, serve: Callable[[Child, wire.Message], Awaitable[None]] | None = None
    ) -> Outcome:
        Path(setup.script).write_text(source)
        paths = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(stdin or "")
        with open(paths[0], "rb") as given, open(paths[1], "wb") as out, open(paths[2], "wb") as err:
            with trio.fail_after(PATIENCE_S):
                child = await job.start_driver(
                    setup, stdin=None if stdin is None else given.fileno(), stdout=out.fileno(), stderr=err.fileno()
                )
                frames = []
                async for message, _ in child.frames:
                    frames.append(message)
                    if serve is not None:
                        await serve(child, message)
                await child.exited.wait()
        return Outcome(child.status, paths[1].read_text(), paths[2].read_text(), frames)

    return run


async def test_runs_as_main(run: Run, setup: wire.Setup) -> None:
    (Path(setup.script).parent / "helper.py").write_text("WORD = 'helped'\n")
    outcome = await run(
        """
import os, pickle, sys, __main__
import helper

class Thing:
    pass

if __name__ == "__main__":
    print(sys.argv, __file__, os.getcwd(), helper.WORD)
    print(dict(os.environ), repr(sys.stdin.read()), sys.path[0] == os.path.dirname(__file__))
    print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, __main__.Thing is Thing, __doc__, __package__, __spec__)
    print(os.getsid(0) == os.getpid())
"""
    )
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert lines[0] == f"{[setup.script, 'a', '-b']} {setup.script} {setup.workdir} helped"
    assert lines[1] == "{'GREETING': 'hello'} '' True"
    assert lines[2] == "True True None None None"
    assert lines[3] == "True"
    assert outcome.status == 0


async def test_stdin(run: Run) -> None:
    assert (await run("print(input(), input())", stdin="one\ntwo\n")).stdout == "one two\n"


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit('a word')", 1),
        ("raise SystemExit(True)", 1),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT),
        ("import atexit; atexit.register(print, 'bye'); 1/0", 1),
        ("def f():\n    return g()\ndef g():\n    return [][1]\nf()", 1),
        ("def f(:", 1),
        ("import sys; sys.excepthook = lambda *_: print('mine'); 1/0", 1),
        ("import threading; threading.Thread(target=lambda: print('from a thread')).start(); print('main')", 0),
        ("print('no newline', end='')", 0),
        ("\ufeffprint('with a mark')", 0),
    ],
)
async def test_ends_as_under_python(run: Run, setup: wire.Setup, source: str, status: int) -> None:
    """Status, stdout and stderr are those of `python job.py`."""
    outcome = await run(source)
    python = subprocess.run(
        [sys.executable, setup.script], capture_output=True, check=False, cwd=setup.workdir, env={"NO_COLOR": "1"}
    )
    assert outcome.status == status
    assert python.returncode == status
    assert outcome.stderr == python.stderr.decode()
    assert outcome.stdout == python.stdout.decode()


async def test_random_is_seeded_by_the_job(run: Run) -> None:
    source = "import random; print(random.random()); random.seed(); print(random.random())"
    one, other = (await run(source)).stdout.split(), (await run(source)).stdout.split()
    assert one[0] == other[0]
    assert one[1] != other[1]


async def test_output_is_there_line_by_line(run: Run, setup: wire.Setup, tmp_path: Path) -> None:
    """The driver itself sees that its first line has reached the file while it runs."""
    outcome = await run(f"print('first'); print(open({str(tmp_path / 'stdout')!r}).read() == 'first\\n')")
    assert outcome.stdout == "first\nTrue\n"


async def test_calls_reach_the_peer_and_unread_stages_are_awaited(run: Run) -> None:
    """A driver maps, reads nothing and ends: it stays until the peer has reported everything."""
    results = b"".join(serialize.dump_results([1, 2, 3]))
    seen: list[type] = []

    async def serve(child: Child, message: wire.Message) -> None:
        seen.append(type(message))
        if isinstance(message, wire.Page | wire.Close) and getattr(message, "final", True):
            os.kill(child.pid, 0)
            await child.send(wire.Result(message.stage, 0, 3), results)

    outcome = await run("import grid\ngrid.map(abs, [1, -2, 3])\nprint('end of script')", serve=serve)
    assert outcome.stderr == ""
    assert (outcome.status, outcome.stdout) == (0, "end of script\n")
    assert seen[:2] == [wire.Define, wire.Stage]


async def test_missing_script(run: Run, setup: wire.Setup, job: JobProcesses, tmp_path: Path) -> None:
    with open(tmp_path / "err", "wb") as err, trio.fail_after(PATIENCE_S):
        child = await job.start_driver(setup, stdin=None, stdout=err.fileno(), stderr=err.fileno())
        async for _ in child.frames:
            pass
        await child.exited.wait()
    assert child.status == 1
    assert "FileNotFoundError" in (tmp_path / "err").read_text()
