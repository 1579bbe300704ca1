"""What scripts and tasks do wrong, and what their authors are told; what a script gets from its command line."""

from __future__ import annotations

import json

import pytest

from tests.e2e.grids import Done, Peer

pytestmark = pytest.mark.real


@pytest.fixture
def peer(three: list[Peer]) -> Peer:
    """Any member; scripts fail the same everywhere."""
    return three[0]


def runs(done: Done, out: str) -> None:
    """The script ended well and printed this."""
    assert (done.status, done.out) == (0, out), done.err


# ---- scripts that can't be submitted: told before anything is sent ----------------------------------------------------


def refused(peer: Peer, *words: str) -> str:
    """Submit something that can't run; returns its one line of error. Nothing was sent."""
    before = len(peer("jobs", "--json").json["jobs"])
    done = peer("submit", *words)
    assert done.status == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert len(peer("jobs", "--json").json["jobs"]) == before
    return done.error


def test_missing_script(peer: Peer) -> None:
    assert "nowhere.py" in refused(peer, "nowhere.py")


def test_script_that_is_a_folder(peer: Peer) -> None:
    (peer.folder / "folder.py").mkdir(exist_ok=True)
    assert "folder.py" in refused(peer, "folder.py")


def test_syntax_error(peer: Peer) -> None:
    line = refused(peer, peer.script("import grid\n\nprint('open'\n", "broken.py"))
    assert "broken.py" in line
    assert "3" in line


def test_undeclared_import_names_the_option_to_type(peer: Peer) -> None:
    line = refused(peer, peer.script("import grid\nimport pandas_like_thing\n", "imports.py"))
    assert "pandas_like_thing" in line
    assert "--with" in line


def test_file_pattern_without_files(peer: Peer) -> None:
    assert "nothing-here" in refused(peer, "--file", "nothing-here/*.txt", peer.script("print(1)"))


def test_options_that_make_no_sense(peer: Peer) -> None:
    script = peer.script("print(1)")
    for words in (["--retries", "-1"], ["--timeout", "soon"], ["--memory", "lots"], ["--env", "=x"], ["--nonsense"], ["--local", "2", "-d"]):
        done = peer("submit", *words, script)
        assert done.status == 2, done
        assert done.out == ""
        assert "Traceback" not in done.err


def test_bad_header(peer: Peer) -> None:
    header = '# /// script\n# dependencies = ["numpy"\n# ///\nprint(1)\n'
    assert "header" in refused(peer, peer.script(header, "header.py"))


def test_own_module_called_grid_is_named(peer: Peer) -> None:
    (peer.folder / "shadow").mkdir(exist_ok=True)
    (peer.folder / "shadow" / "grid.py").write_text("x = 1\n")
    (peer.folder / "shadow" / "job.py").write_text("import grid\nprint(1)\n")
    assert "grid.py" in refused(peer, "shadow/job.py")


def test_own_modules_called_like_ours_are_fine(peer: Peer) -> None:
    folder = peer.folder / "own"
    folder.mkdir(exist_ok=True)
    (folder / "dht.py").write_text("def twice(x): return 2 * x\n")
    (folder / "cli.py").write_text("BASE = 5\n")
    (folder / "job.py").write_text("import grid, dht, cli\nprint(sum(grid.map(dht.twice, range(cli.BASE))))\n")
    runs(peer("submit", "own/job.py"), "20\n")


def test_local_package_travels(peer: Peer) -> None:
    folder = peer.folder / "pkg" / "helpers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("from .deep import cube\n")
    (folder / "deep.py").write_text("def cube(x):\n    return x ** 3\n")
    (folder.parent / "job.py").write_text("import grid\nfrom helpers import cube\nprint(sum(grid.map(cube, range(10))))\n")
    runs(peer("submit", "pkg/job.py"), "2025\n")


# ---- how scripts end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("import sys; print('out'); sys.exit(3)", 3, ""),
        ("import sys; print('out'); sys.exit('no luck')", 1, "no luck"),
        ("print('out'); raise ValueError('mine')", 1, "ValueError: mine"),
        ("import os, signal, sys; print('out'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)", 143, "SIGTERM"),
        ("import os, signal, sys; print('out'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
        ("import os, sys; print('out'); sys.stdout.flush(); os._exit(7)", 7, ""),
        ("import os; print('out', flush=True); os.abort()", 134, "SIGABRT"),
    ],
    ids=["exit 3", "exit text", "raises", "SIGTERM", "SIGKILL", "os._exit", "abort"],
)
def test_exit_status_is_the_scripts(peer: Peer, script: str, status: int, told: str) -> None:
    done = peer.job(script)
    assert (done.status, done.out) == (status, "out\n"), done
    assert told in done.err
    shown = peer.show("last")
    assert shown["state"] == "failed"
    assert peer("wait", "last").status == status
    again = peer("result", "last")
    assert (again.status, again.out) == (status, "out\n")


def test_script_that_raises_shows_its_own_traceback_only(peer: Peer) -> None:
    done = peer.job("import grid\n\ndef work(x):\n    return 1 // x\n\nprint(list(grid.map(work, [2, 1, 0, 5])))\n")
    assert done.status == 1
    assert "ZeroDivisionError" in done.err
    assert "in work" in done.err
    assert "job.py" in done.err


def test_stages_that_nobody_reads_complete_before_the_end(peer: Peer) -> None:
    script = """
import grid, time
def slow(i):
    time.sleep(0.05)
    print("ran", i)
stage = grid.map(slow, range(10))
futures = [grid.submit(slow, 100 + i) for i in range(3)]
print("end of script")
"""
    done = peer.job(script)
    runs(done, "end of script\n")
    shown = peer.show("last")
    assert sum(stage["done"] for stage in shown["stages"]) == 13


# ---- what scripts get ----------------------------------------------------------------------------------------------------


def test_arguments_are_the_scripts_even_where_ours_are_called_alike(peer: Peer) -> None:
    script = peer.script("import sys; print(sys.argv[1:])", "arguments.py")
    done = peer("submit", "--retries", "1", script, "--retries", "5", "-d", "--json", "--help", "--", "-x", "a b", "ünï")
    runs(done, f"{['--retries', '5', '-d', '--json', '--help', '--', '-x', 'a b', 'ünï']}\n")


def test_stdin_environment_and_seed(peer: Peer) -> None:
    script = peer.script("import os, sys; print(sys.stdin.read(), os.environ.get('COLOUR'), os.environ.get('SECRET'))", "reads.py")
    runs(peer("submit", "--stdin", "-", "--env", "COLOUR=blue", script, stdin="given", SECRET="x"), "given blue None\n")
    runs(peer("submit", "--env", "COLOUR", script, COLOUR="red"), " red None\n")
    (peer.folder / "input.txt").write_text("from a file")
    runs(peer("submit", "--stdin", "input.txt", script), "from a file None None\n")
    missing = peer("submit", "--env", "NOT_SET_ANYWHERE", script)
    assert missing.status == 2
    assert "NOT_SET_ANYWHERE" in missing.error
    assert "--stdin" in refused(peer, "--stdin", "no-such-file", script)


def test_tasks_get_the_environment_too(peer: Peer) -> None:
    script = "import grid, os\ndef get(i): return os.environ.get('COLOUR'), os.environ.get('SECRET')\nprint(set(grid.map(get, range(9))))\n"
    runs(peer("submit", "--env", "COLOUR=blue", peer.script(script), SECRET="x"), "{('blue', None)}\n")


def test_seed_fixes_the_randomness_of_driver_and_tasks(peer: Peer) -> None:
    script = """
import random
import grid
def draw(i): return random.random(), grid.context().seed
print(random.random(), list(grid.map(draw, range(40))))
"""
    first = peer.job(script, "--seed", "5")
    second = peer.job(script, "--seed", "5")
    other = peer.job(script, "--seed", "6")
    assert first.status == 0
    assert first.out == second.out
    assert first.out != other.out


def test_header_options_and_their_order_of_precedence(peer: Peer) -> None:
    script = '''
# /// script
# requires-python = ">=3.11"
# [tool.grid]
# env = ["A=header", "B=header"]
# name = "named-in-header"
# ///
import os
print(os.environ.get("A"), os.environ.get("B"))
'''
    done = peer.job(script, "--env", "A=typed")
    assert done.status == 0, done.err
    assert done.out.split()[0] == "typed"
    assert peer.show("last")["name"] == "named-in-header"


def test_python_that_is_not_to_be_had(peer: Peer) -> None:
    script = '# /// script\n# requires-python = ">=3.99"\n# ///\nprint(1)\n'
    assert "3.99" in refused(peer, peer.script(script, "future.py"))


def test_output_files_come_back_and_foreign_ones_are_spared(peer: Peer) -> None:
    script = """
import grid
from pathlib import Path
grid.output("table/a.csv").write_text("1,2")
grid.output("b.txt").write_text("made by the job")
Path("left.txt").write_text("beside")
print("done")
"""
    folder = peer.folder / "results"
    done = peer.job(script, "--output", "results")
    runs(done, "done\n")
    assert (folder / "table" / "a.csv").read_text() == "1,2"
    assert (folder / "b.txt").read_text() == "made by the job"
    runs(peer.job(script, "--output", "results"), "done\n")  # over what it wrote itself
    (folder / "b.txt").write_text("precious")
    spared = peer.job(script, "--output", "results")
    assert spared.status != 0
    assert "--overwrite" in spared.error
    assert (folder / "b.txt").read_text() == "precious"
    runs(peer.job(script, "--output", "results", "--overwrite"), "done\n")
    assert (folder / "b.txt").read_text() == "made by the job"
    fetched = peer("result", "last", "-o", "all")
    runs(fetched, "done\n")
    assert (peer.folder / "all" / "left.txt").read_text() == "beside"


def test_driver_output_is_bytes(peer: Peer) -> None:
    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4000); sys.stderr.write('to stderr\\n')"
    import subprocess

    from tests.e2e.grids import PROGRAM

    peer.script(script)
    done = subprocess.run(
        [*PROGRAM, "submit", "job.py"], cwd=peer.folder, env=peer.environment(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stdout == bytes(range(256)) * 4000
    assert b"to stderr\n" in done.stderr


# ---- what tasks do wrong ---------------------------------------------------------------------------------------------------


def caught(peer: Peer, body: str, *options: str, call: str = "grid.submit(work).result()") -> str:
    """Run a task whose exception the script prints as TYPE: message."""
    script = f"import grid, os, sys, time\n{body}\ntry:\n    print('got', {call})\nexcept Exception as error:\n    print(type(error).__mro__[0].__name__, '|', error)\n"
    done = peer.job(script, *options)
    assert done.status == 0, done.err
    return done.out.strip()


def test_exception_arrives_as_itself_with_the_remote_traceback(peer: Peer) -> None:
    script = """
import grid
class Mine(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.a = a
    def __reduce__(self):
        return Mine, (self.a, 2)
def work(x):
    raise Mine(x, 2)
try:
    grid.submit(work, 1).result()
except Mine as error:
    print(error, error.a, "in work" in str(error.__cause__))
"""
    runs(peer.job(script), "1-2 1 True\n")


def test_unpicklable_exception(peer: Peer) -> None:
    body = "class Odd(Exception):\n    def __init__(self):\n        super().__init__('odd')\n        self.lock = __import__('threading').Lock()\ndef work():\n    raise Odd()"
    told = caught(peer, body)
    assert "Odd" in told
    assert "odd" in told


def test_exception_that_breaks_when_it_is_unpickled(peer: Peer) -> None:
    body = "class Odd(Exception):\n    def __init__(self, a, b):\n        super().__init__(a)\ndef work():\n    raise Odd('x', 'y')"
    assert "Odd" in caught(peer, body)


def test_unpicklable_result(peer: Peer) -> None:
    told = caught(peer, "def work():\n    return __import__('threading').Lock()")
    assert told.startswith("UnpicklableResult")
    assert "lock" in told


def test_generator_as_result(peer: Peer) -> None:
    told = caught(peer, "def work():\n    yield 1")
    assert "generator" in told


def test_task_that_exits_its_process(peer: Peer) -> None:
    told = caught(peer, "def work():\n    os._exit(5)")
    assert told.startswith("WorkerDied")
    assert "5" in told


def test_task_that_calls_sys_exit(peer: Peer) -> None:
    script = "import grid, sys\ndef work():\n    sys.exit(4)\ntry:\n    grid.submit(work).result()\nexcept BaseException as error:\n    print(type(error).__name__)\nprint(grid.submit(abs, -1).result())"
    done = peer.job(script)
    assert done.status == 0, done.err
    assert done.out.splitlines()[1] == "1"


def test_task_over_its_time(peer: Peer) -> None:
    body = "def work():\n    time.sleep(60)"
    assert caught(peer, body, "--task-timeout", "300ms").startswith("TaskTimeout")
    assert caught(peer, body, call="grid.options(task_timeout=0.3).submit(work).result()").startswith("TaskTimeout")


def test_task_that_uses_up_memory(peer: Peer) -> None:
    body = "def work():\n    data = []\n    while True:\n        data.append(bytearray(8 << 20))\n        time.sleep(0.005)"
    told = caught(peer, body, "--memory", "200M")
    assert told.startswith("MemoryE"), told


def test_other_tasks_survive_one_that_kills_its_worker(peer: Peer) -> None:
    script = """
import grid, os
def work(i):
    if i == 37:
        os._exit(1)
    return i
found = list(grid.map(work, range(100)) if False else grid.options().map(work, range(100), return_exceptions=True))
print([type(x).__name__ for x in found if isinstance(x, Exception)], sum(x for x in found if isinstance(x, int)))
"""
    runs(peer.job(script), f"['WorkerDied'] {sum(range(100)) - 37}\n")


def test_retries(peer: Peer) -> None:
    script = """
import grid
def work(i):
    if grid.context().attempt < 2:
        raise RuntimeError("not yet")
    return grid.context().attempt
print(list(grid.map(work, range(6))))
"""
    runs(peer.job(script, "--retries", "2"), "[2, 2, 2, 2, 2, 2]\n")
    failed = peer.job(script, "--retries", "1")
    assert failed.status == 1
    assert "RuntimeError: not yet" in failed.err


def test_job_over_its_time(peer: Peer) -> None:
    done = peer.job("import time\nprint('begun', flush=True)\ntime.sleep(60)", "--timeout", "1s")
    assert (done.status, done.out) == (124, "begun\n")
    assert "1 s" in done.error
    assert peer.show("last")["state"] == "failed"


def test_lambda_closure_and_local_class(peer: Peer) -> None:
    script = """
import grid
def make(n):
    def add(x): return x + n
    return add
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
print(list(grid.map(lambda x: x * 2, range(4))), list(grid.map(make(10), range(3))))
print(grid.submit(lambda p: Point(p.x + 1), Point(1)).result() == Point(2))
"""
    runs(peer.job(script), "[0, 2, 4, 6] [10, 11, 12]\nTrue\n")


def test_zero_tasks(peer: Peer) -> None:
    script = "import grid\nprint(list(grid.map(abs, [])), list(grid.map_unordered(abs, iter(()))))\nwith grid.Executor() as e: print(list(e.map(abs, [])))"
    runs(peer.job(script), "[] []\n[]\n")


def test_empty_script(peer: Peer) -> None:
    runs(peer.job(""), "")


def test_argument_of_200_megabytes(peer: Peer) -> None:
    script = """
import grid
def size(data, i): return len(data), data[i], data[-1]
data = bytes(200 << 20)[:-1] + b"x"
print(grid.submit(size, data, 5).result())
ref = grid.put(data)
print(set(grid.map(size, [ref] * 4, range(4))))
def back(n): return bytes(n)
print(len(grid.submit(back, 200 << 20).result()))
"""
    done = peer.job(script)
    runs(done, f"({200 << 20}, 0, 120)\n{{({200 << 20}, 0, 120)}}\n{200 << 20}\n")


def test_nested_maps(peer: Peer) -> None:
    script = """
import grid
def leaf(x): return x * x
def middle(n): return sum(grid.map(leaf, range(n)))
def top(n): return sum(grid.map(middle, range(n)))
print(sum(grid.map(top, range(6))), grid.submit(top, 5).result())
"""
    expected = sum(sum(sum(x * x for x in range(m)) for m in range(n)) for n in range(6))
    runs(peer.job(script), f"{expected} {sum(sum(x * x for x in range(m)) for m in range(5))}\n")


def test_executor_and_futures(peer: Peer) -> None:
    script = """
import asyncio, concurrent.futures as cf
import grid
with grid.Executor() as pool:
    futures = {pool.submit(pow, i, 2): i for i in range(20)}
    print(sum(f.result() for f in cf.as_completed(futures)), list(pool.map(pow, range(4), [2] * 4)))
async def main():
    return await asyncio.gather(*(asyncio.wrap_future(grid.submit(abs, -i)) for i in range(5)))
print(asyncio.run(main()))
print(sorted(grid.map_unordered(abs, range(-3, 3))))
"""
    runs(peer.job(script), "2470 [0, 1, 4, 9]\n[0, 1, 2, 3, 4]\n[0, 1, 1, 2, 2, 3]\n")


def test_generator_is_consumed_lazily_and_closed_early(peer: Peer) -> None:
    script = """
import grid
def forever():
    i = 0
    while True:
        yield i
        i += 1
found = []
for value in grid.map(abs, forever()):
    found.append(value)
    if len(found) == 5: break
print(found)
"""
    runs(peer.job(script), "[0, 1, 2, 3, 4]\n")


def test_prints_of_tasks_are_prefixed_and_kept(peer: Peer) -> None:
    script = "import grid\ndef work(i):\n    print('working on', i)\n    return i\nprint(sum(grid.map(work, range(5))))"
    done = peer.job(script)
    runs(done, "10\n")
    for i in range(5):
        assert f"[0:{i}] working on {i}" in done.err
    assert peer("logs", "last", "--task", "0:3").out == "working on 3\n"


def test_connect_makes_this_process_the_driver(peer: Peer) -> None:
    import subprocess
    import sys

    script = """
import sys
import grid
def where(i): return grid.context().peer
with grid.connect() as connection:
    print(sum(grid.map(abs, range(10))), len(connection.job))
    assert set(grid.map(where, range(3)))
"""
    peer.script(script, "notebook.py")
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=peer.folder, env=peer.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "45 64\n", "")


def test_throwaway_grid_where_there_is_none(three: list[Peer], tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.e2e.grids import Grid

    with Grid(tmp_path_factory.mktemp("alone")) as grid:
        alone = grid.home()
        done = alone.job("import grid\nprint(sum(grid.map(abs, range(10))))")
        runs(done, "45\n")
        assert "throwaway" in done.err
        runs(alone("submit", "--local", "2", "job.py"), "45\n")
        detached = alone("submit", "-d", "job.py")
        assert detached.status == 125
        assert "grid join" in detached.error
        assert json.loads(alone("jobs", "--json").out)["error"]["code"] == "no-peer"
