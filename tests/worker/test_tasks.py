"""What a worker does with tasks, whatever they do (real processes)."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.api import serialize, wire
from grid.worker.pool import JobProcesses
from tests.worker.conftest import PATIENCE_S, Tasks, poll

pytestmark = pytest.mark.real


async def test_results_in_order(tasks: Tasks) -> None:
    results = await tasks.run(lambda x: x * x, range(1000))
    assert results == {i: i * i for i in range(1000)}
    assert tasks.frames[-1].final


async def test_results_of_all_shapes(tasks: Tasks) -> None:
    """Scalars and others in turn keep their order."""
    values: list[Any] = [1, "two", [3], None, {"four": 4}, (5.0,), b"six" * 100_000, True]
    results = await tasks.run(lambda x: x, values)
    assert list(results.values()) == values


async def test_closure_and_partial_and_kwargs(tasks: Tasks) -> None:
    captured = {"k": 10}
    assert (await tasks.run(lambda x: x + captured["k"], [1]))[0] == 11
    tasks.results.clear()
    calls = [((2,), {"base": 2}), ((2, 3), None)]
    assert await tasks.run(functools.partial(pow, 10), calls[1:], kind=serialize.CALL, stage=1) == {0: 1}
    tasks.results.clear()
    assert await tasks.run(lambda x, base=0: x * base, calls, kind=serialize.CALL, stage=2) == {0: 4, 1: 6}


async def test_part_of_a_segment(tasks: Tasks) -> None:
    """Bundles cut a segment anywhere; a retry sees fresh arguments although the first try changed them."""
    await tasks.define(lambda x: x.append(1) or len(x))
    items = [[0] * n for n in range(20)]
    for lo, hi, attempt in ((5, 9, 0), (0, 5, 0), (9, 20, 0)):
        await tasks.finish(await tasks.start(items, first=0, lo=lo, hi=hi, attempt=attempt))
    assert tasks.results == {n: n + 1 for n in range(20)}
    tasks.results.clear()
    await tasks.finish(await tasks.start(items, first=0, lo=5, hi=6, attempt=1))
    assert tasks.results == {5: 6}


async def test_exception_keeps_its_type_and_traceback(tasks: Tasks) -> None:
    def inner(x: int) -> int:
        if x == 2:
            raise KeyError("no such thing")
        return x

    await tasks.run(lambda x: inner(x), [0, 1, 2, 3])
    assert tasks.results == {0: 0, 1: 1, 3: 3}
    failed, error = tasks.failures[2]
    assert isinstance(error, KeyError)
    assert (failed.kind, failed.type_name, failed.message) == ("raised", "KeyError", "'no such thing'")
    frames = [line for line in failed.traceback.splitlines() if line.startswith("  File")]
    assert all(__file__ in line for line in frames), failed.traceback
    assert frames[0].endswith("in <lambda>")
    assert frames[1].endswith("in inner")


async def test_unpicklable_exception(tasks: Tasks) -> None:
    class Stubborn(Exception):
        def __init__(self) -> None:
            super().__init__("it holds a lock")
            self.lock = threading.Lock()

    def fail(x: int) -> None:
        raise Stubborn

    await tasks.run(fail, [0])
    failed, error = tasks.failures[0]
    assert error is None
    assert failed.kind == "raised"
    assert failed.type_name.endswith("Stubborn")
    assert failed.message == "it holds a lock"
    assert "raise Stubborn" in failed.traceback or "in fail" in failed.traceback


async def test_unpicklable_result_names_its_type(tasks: Tasks) -> None:
    await tasks.run(lambda x: {"lock": threading.Lock()} if x == 1 else x, [0, 1, 2])
    assert tasks.results == {0: 0, 2: 2}
    failed, _ = tasks.failures[1]
    assert failed.kind == "unpicklable"
    assert "dict" in failed.message
    assert "lock" in failed.message


async def test_generator_and_coroutine_results_are_type_errors(tasks: Tasks) -> None:
    async def coroutine() -> None: ...

    def task(x: int) -> Any:
        return (n for n in range(3)) if x else coroutine()

    await tasks.run(task, [0, 1])
    for index, word in ((0, "coroutine"), (1, "generator")):
        failed, error = tasks.failures[index]
        assert isinstance(error, TypeError)
        assert word in failed.message
    assert not tasks.prints  # no warning about a coroutine that was never awaited


async def test_sys_exit_is_a_task_error(tasks: Tasks) -> None:
    def leave(x: int) -> int:
        if x == 0:
            raise SystemExit(3)
        return x

    await tasks.run(leave, [0, 1])
    failed, error = tasks.failures[0]
    assert (failed.type_name, failed.message, error) == ("SystemExit", "called sys.exit(3)", None)
    assert tasks.results == {1: 1}


async def test_function_that_cannot_be_loaded(tasks: Tasks) -> None:
    await tasks.child.send(wire.Function(0), b"\x80\x05cno_such_module\nfunction\n.")
    await tasks.finish(await tasks.start([1, 2]))
    assert set(tasks.failures) == {0, 1}
    failed, error = tasks.failures[0]
    assert isinstance(error, ModuleNotFoundError)
    assert "no_such_module" in failed.message
    assert (await tasks.run(abs, [-1], stage=1))[0] == 1


async def test_arguments_that_cannot_be_loaded(tasks: Tasks) -> None:
    await tasks.define(abs)
    await tasks.child.send(wire.Run(1, 0, 0, 0, 0, 1), b"garbage")
    await tasks.finish(1)
    assert tasks.failures[0][0].kind == "raised"
    assert "arguments" in tasks.failures[0][0].message


async def test_large_result_goes_through_the_spool(tasks: Tasks, tmp_path: Path) -> None:
    results = await tasks.run(lambda n: b"x" * n, [3 << 20, 10])
    assert [len(results[0]), len(results[1])] == [3 << 20, 10]
    assert tasks.frames[0].path.startswith(str(tmp_path / "spool"))


async def test_spool_that_cannot_be_written(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "spool").rmdir()
    await tasks.run(lambda n: b"x" * n, [3 << 20, 10])
    failed, _ = tasks.failures[0]
    assert failed.kind == "failed"
    assert "can't write" in failed.message
    assert len(tasks.results[1]) == 10


async def test_prints_carry_their_task(tasks: Tasks) -> None:
    def chat(x: int) -> None:
        import os
        import sys

        print("line", x)
        print("error", x, file=sys.stderr)
        sys.stdout.write("no newline")
        if x == 2:
            os.write(1, b"from C\n")

    await tasks.run(chat, [0, 1, 2], stage=4)
    if not any(b"from C" in text for *_, text in tasks.prints):
        await tasks.until(lambda *_: any(b"from C" in text for *_, text in tasks.prints))
    for x in range(3):
        mine = [(fd, text) for stage, index, fd, text in tasks.prints if (stage, index) == (4, x) and b"C" not in text]
        assert mine == [(1, b"line %d\n" % x), (2, b"error %d\n" % x), (1, b"no newline")]
    assert (4, 2, 1, b"from C\n") in tasks.prints


async def test_prints_of_one_task_are_bounded(tasks: Tasks) -> None:
    def drown(x: int) -> None:
        for _ in range(3000):
            print("x" * 1000)

    await tasks.run(drown, [0])
    size = sum(len(text) for *_, text in tasks.prints)
    assert 1 << 20 <= size < 1.1 * (1 << 20)
    assert b"the rest is dropped" in tasks.prints[-1][3]


async def test_finished_results_do_not_wait_for_a_long_task(tasks: Tasks, tmp_path: Path) -> None:
    """The second task waits for a file that the test writes once it has the first one's result and print."""
    gate = str(tmp_path / "gate")

    def task(x: int) -> int:
        import os
        import time

        if x:
            print("waiting")
        while x and not os.path.exists(gate):
            time.sleep(0.01)
        return x

    await tasks.define(task)
    ticket = await tasks.start([0, 1])
    await tasks.until(lambda *_: 0 in tasks.results and bool(tasks.prints))
    assert 1 not in tasks.results
    assert tasks.child.progress()[0] == 1
    assert tasks.child.overdue(tasks.child.progress()[1] + 2_000_000_000, 1.0) == 1
    assert tasks.child.overdue(tasks.child.progress()[1], 1.0) is None
    (tmp_path / "gate").touch()
    await tasks.finish(ticket)
    assert tasks.results == {0: 0, 1: 1}


async def test_slow_task_behind_thousands_of_quick_ones(tasks: Tasks, tmp_path: Path) -> None:
    """The quick ones' results come while it runs; it is named as what runs, by the cell and by its own context."""
    gate, count = str(tmp_path / "gate"), 5000

    def task(x: int) -> int:
        import os
        import time

        import grid

        while x == 5000 and not os.path.exists(gate):
            time.sleep(0.01)
        return grid.context().task

    await tasks.define(task)
    ticket = await tasks.start(range(7, 7 + count + 10), first=7)
    await tasks.until(lambda *_: count - 1 in tasks.results)
    assert count not in tasks.results
    assert tasks.child.running() == (0, count)
    (tmp_path / "gate").touch()
    await tasks.finish(ticket)
    assert tasks.results == {index: index for index in range(7, 7 + count + 10)}


async def test_timed_task_behind_quick_ones_has_its_own_start(tasks: Tasks, tmp_path: Path) -> None:
    gate, count = str(tmp_path / "gate"), 3000

    def task(x: int) -> int:
        import os
        import time

        now_ns = time.monotonic_ns()
        while x == 3000 and not os.path.exists(gate):
            time.sleep(0.01)
        return now_ns

    await tasks.define(task)
    ticket = await tasks.start(range(count + 1), timed=True)
    await tasks.until(lambda *_: count - 1 in tasks.results)
    await poll(lambda: tasks.child.progress()[0] == count)
    started_ns = tasks.child.progress()[1]
    (tmp_path / "gate").touch()
    await tasks.finish(ticket)
    assert tasks.results[count - 1] <= started_ns <= tasks.results[count]


async def test_what_is_not_begun_of_a_long_run_comes_back(tasks: Tasks, tmp_path: Path) -> None:
    """While its first task still runs; each task is run once, whoever gets it then."""
    gate = str(tmp_path / "gate")

    def task(x: int) -> int:
        import os
        import time

        while not os.path.exists(gate):
            time.sleep(0.01)
        return x

    await tasks.define(task)
    ticket = await tasks.start(range(10))
    returned = await tasks.until(lambda message, _: isinstance(message, wire.Returned))
    assert (returned.ticket, returned.lo) == (ticket, 1)
    assert returned.elapsed_us > 0
    assert not tasks.results
    (tmp_path / "gate").touch()
    await tasks.finish(ticket)
    assert tasks.results == {0: 0}
    await tasks.finish(await tasks.start(range(10), lo=1))
    assert tasks.results == {index: index for index in range(10)}
    assert not tasks.failures


async def test_last_task_of_a_run_given_back_fails(tasks: Tasks, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")

    def task(x: int) -> int:
        import os
        import time

        while x and not os.path.exists(gate):
            time.sleep(0.01)
        return 1 // (not x)

    await tasks.define(task)
    ticket = await tasks.start(range(10))
    returned = await tasks.until(lambda message, _: isinstance(message, wire.Returned))
    (tmp_path / "gate").touch()
    await tasks.finish(ticket)
    assert returned.lo < 10
    assert (tasks.results, list(tasks.failures)) == ({0: 1}, list(range(1, returned.lo)))


async def test_revoked_while_another_task_runs(tasks: Tasks, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")

    def task(x: int) -> int:
        import os
        import time

        while not os.path.exists(gate):
            time.sleep(0.01)
        return x

    await tasks.define(task)
    first = await tasks.start([0])
    second = await tasks.start([1], first=1)
    third = await tasks.start([2], first=2)
    await poll(lambda: tasks.child.progress()[0] == 0)  # the first has begun: it is not affected
    for ticket in (first, second):
        await tasks.child.send(wire.Revoke(ticket))
    returned = await tasks.until(lambda message, _: isinstance(message, wire.Returned))
    assert returned.ticket == second
    (tmp_path / "gate").touch()
    await tasks.finish(third)
    assert tasks.results == {0: 0, 2: 2}


async def test_seeds_depend_on_the_task_alone(job: JobProcesses) -> None:
    """However a stage is cut up and whoever runs it; also where `random` is imported in the middle of a task."""

    def draw(x: int) -> float:
        import random

        return random.random()

    with trio.fail_after(PATIENCE_S):
        one, other = Tasks(await job.start_worker()), Tasks(await job.start_worker())
    whole = dict(await one.run(draw, range(6)))
    await other.define(draw)
    for lo, hi in ((4, 6), (0, 1), (1, 4)):
        await other.finish(await other.start(range(6), first=0, lo=lo, hi=hi))
    assert other.results == whole
    assert len(set(whole.values())) == 6
    one.results.clear()
    assert set((await one.run(draw, range(6), stage=1)).values()).isdisjoint(whole.values())


async def test_idle_worker_has_not_imported_random(tasks: Tasks) -> None:
    """If it had, every task would pay for seeding it."""
    import sys

    loaded = await tasks.call(lambda: sorted(sys.modules))
    assert "random" not in loaded
    assert "cloudpickle" in loaded


async def test_class_of_the_script_as_result(tasks: Tasks) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    results = await tasks.run(lambda x: Point(x), [1, 2])
    assert [results[0].x, results[1].x] == [1, 2]


async def test_process_forked_by_a_task_leaves_the_worker_alone(tasks: Tasks) -> None:
    def task(x: int) -> int:
        import os

        pid = os.fork()
        if pid == 0:
            print("from the fork", flush=True)
            return -1  # back into a loop that is not its own
        return os.waitpid(pid, 0)[0] - pid + x

    assert await tasks.run(task, [5, 6]) == {0: 5, 1: 6}


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_multiprocessing_in_a_task(tasks: Tasks, method: str) -> None:
    def task(x: int) -> list[int]:
        import math
        import multiprocessing

        print("in the task")
        with multiprocessing.get_context(method).Pool(2) as pool:
            return pool.map(math.isqrt, [x, x * x])

    assert await tasks.run(task, [100, 400]) == {0: [10, 100], 1: [20, 400]}


async def test_stop_kills_after_its_grace(tasks: Tasks) -> None:
    await tasks.define(lambda x: __import__("time").sleep(1000))
    await tasks.start([1])
    with trio.fail_after(PATIENCE_S):
        await tasks.child.stop(0.1)
        await tasks.child.exited.wait()
    assert tasks.child.why == "stopped"


async def test_stop_lets_queued_tasks_finish(tasks: Tasks) -> None:
    await tasks.define(lambda x: x)
    ticket = await tasks.start([1, 2])
    await tasks.child.send(wire.Stop())
    await tasks.finish(ticket)
    with trio.fail_after(PATIENCE_S):
        await tasks.child.exited.wait()
        assert [frame async for frame in tasks.child.frames] == []
    assert (tasks.child.status, tasks.child.why) == (0, "")


class InPlace:
    """Its buffer is used where it lies, as an array's is."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return memoryview, (pickle.PickleBuffer(bytearray(b"page" * 50_000)),)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Stands for shared memory."""
    parts, _ = serialize.dump_segment([InPlace()])
    path = tmp_path / "page"
    path.write_bytes(b"".join(parts))
    return path


async def lend(tasks: Tasks, page: Path, function: Callable[[memoryview], Any]) -> bool:
    """Whether it is let go after a task. The function is defined anew each time."""
    number = len(tasks.frames)
    await tasks.define(function, number)
    tasks.results.clear()
    await tasks.child.send(wire.Run(number, 0, number, 0, 0, 1, 0, str(page), shared=True))
    found = await tasks.until(lambda message, _: isinstance(message, wire.Unmapped))
    assert isinstance(found, wire.Unmapped)
    assert found.ticket == number
    return found.clean


async def test_shared_arguments_are_let_go_unless_a_task_kept_them(tasks: Tasks, page: Path) -> None:
    assert await lend(tasks, page, len)
    assert await lend(tasks, page, lambda data: bytes(data).index(b"no"))
    assert tasks.failures[0][0].type_name == "ValueError"
    assert await lend(tasks, page, lambda data: data)
    assert tasks.results == {0: b"page" * 50_000}
    assert not await lend(tasks, page, lambda data: globals().update(kept=data))
    assert await lend(tasks, page, len)


async def test_shared_arguments_may_live_on_in_what_a_task_forked(tasks: Tasks, page: Path) -> None:
    def task(data: memoryview) -> None:
        import os
        import signal

        if os.fork() == 0:
            signal.pause()

    assert not await lend(tasks, page, task)


async def test_modules_are_imported_before_they_are_needed(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "code" / "odd_module.py").write_text("print('imported')\n")
    (tmp_path / "code" / "broken_module.py").write_text("raise SystemExit(3)\n")
    await tasks.child.send(wire.Import(("broken_module", "no_such_module", "odd_module")))
    await tasks.until(lambda message, body: isinstance(message, wire.Print) and b"imported" in body)

    def loaded() -> bool:
        import sys

        return "odd_module" in sys.modules

    assert await tasks.call(loaded)
