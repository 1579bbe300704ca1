"""What tasks do wrong and what their authors are told; what authors write that must work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.grids import Grid, Peer, runs

pytestmark = pytest.mark.real


@pytest.fixture
def peer(three: list[Peer]) -> Peer:
    """Any member; scripts fail the same everywhere."""
    return three[0]


# ---- what tasks do wrong ---------------------------------------------------------------------------------------------------


def caught(peer: Peer, body: str, *options: str, call: str = "grid.submit(work).result()") -> str:
    """Run a task whose exception the script prints as TYPE: message."""
    script = f"""
import os, sys, time, threading
import grid
{body}
try:
    print("got", {call})
except Exception as error:
    print(type(error).__name__, "|", error)
"""
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
    body = """
class Odd(Exception):
    def __init__(self):
        super().__init__("odd")
        self.lock = threading.Lock()
def work():
    raise Odd()
"""
    told = caught(peer, body)
    assert "Odd" in told
    assert "odd" in told


def test_exception_that_breaks_when_it_is_unpickled(peer: Peer) -> None:
    body = """
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)
def work():
    raise Odd("x", "y")
"""
    assert "Odd" in caught(peer, body)


def test_unpicklable_result(peer: Peer) -> None:
    told = caught(peer, "def work():\n    return threading.Lock()")
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
    told = caught(peer, "def work():\n    sys.exit(4)")
    assert "SystemExit" in told
    assert "4" in told


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
found = list(grid.map(work, range(100), return_exceptions=True))
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
    script = """
import grid
print(list(grid.map(abs, [])), list(grid.map_unordered(abs, iter(()))))
with grid.Executor() as pool:
    print(list(pool.map(abs, [])))
"""
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


def test_refs_made_by_tasks_are_read_on_other_peers(peer: Peer) -> None:
    script = """
import time
import grid
def make(i):
    time.sleep(0.02)
    return grid.put([i] * 50_000)
def through(i):
    return grid.submit(sum, grid.put([i] * 1000)).result()
refs = list(grid.map(make, range(45)))
print(sum(grid.map(sum, refs)), refs[7].get()[-1], sum(grid.map(through, range(9))))
"""
    runs(peer.job(script), f"{sum(range(45)) * 50_000} 7 {sum(range(9)) * 1000}\n")


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
    script = """
import grid
def where(i): return grid.context().peer
with grid.connect() as connection:
    assert grid.connect() is connection  # a notebook's cell that runs again
    print(sum(grid.map(abs, range(10))), len(connection.job))
    assert set(grid.map(where, range(3)))
"""
    peer.script(script, "notebook.py")
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=peer.folder,
        env=peer.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "45 64\n", "")


def test_throwaway_grid_where_there_is_none(grid: Grid) -> None:
    alone = grid.home()
    done = alone.job("import grid\nprint(sum(grid.map(abs, range(10))))")
    runs(done, "45\n")
    assert "throwaway" in done.err
    runs(alone("submit", "--local", "2", "job.py"), "45\n")
    detached = alone("submit", "-d", "job.py")
    assert detached.status == 125
    assert "grid join" in detached.error
    assert json.loads(alone("jobs", "--json").out)["error"]["code"] == "no-peer"
