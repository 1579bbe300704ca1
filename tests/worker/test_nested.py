"""Tasks that make stages of their own: the worker's channel serves both (real processes)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

from grid.api import serialize, wire
from tests.worker.conftest import PATIENCE_S, Tasks

pytestmark = pytest.mark.real


class Leader:
    """Answers a worker's nested stages by running them itself."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._functions: dict[int, Any] = {}
        self._stages: dict[int, wire.Stage] = {}
        self.waiting: list[bool] = []
        self.parents: list[tuple[int, int, int]] = []
        self.answered = 0

    async def finish(self, ticket: int) -> None:
        """Take the worker's frames until the ticket is answered."""
        with trio.fail_after(PATIENCE_S):
            async for message, body in self._tasks.child.frames:
                self._tasks._take(message, body)
                await self._serve(message, body)
                if getattr(message, "final", False) and getattr(message, "ticket", None) == ticket:
                    return

    async def _serve(self, message: Any, body: bytes) -> None:
        if isinstance(message, wire.Define):
            self._functions[message.fn] = serialize.load_function(body)
        elif isinstance(message, wire.Stage):
            self._stages[message.stage] = message
            self.parents.append((message.parent_stage, message.parent_index, message.occurrence))
        elif isinstance(message, wire.Waiting):
            self.waiting.append(message.blocked)
        elif isinstance(message, wire.Page):
            function = self._functions[self._stages[message.stage].fn]
            lo, start = message.first, 0
            for count, length in zip(message.counts, message.lengths, strict=True):
                segment = serialize.load_segment(body[start : start + length])
                results = serialize.dump_results(map(segment.bind(function), segment.items))
                await self._tasks.child.send(wire.Result(message.stage, lo, lo + count), *results)
                self.answered += count
                lo, start = lo + count, start + length


async def test_nested_map_while_more_work_waits(tasks: Tasks) -> None:
    """Runs that arrive while a task waits for its children are kept for later, in order."""

    def outer(x: int) -> int:
        import grid

        return int(sum(grid.map(lambda y: y * y, range(x))) + sum(grid.map(abs, [-x])))

    leader = Leader(tasks)
    await tasks.define(outer)
    await tasks.start([10, 20], stage=3)
    ticket = await tasks.start([30], first=2, stage=3)
    await leader.finish(ticket)
    assert tasks.results == {0: 285 + 10, 1: 2470 + 20, 2: 8555 + 30}
    assert leader.parents == [(3, 0, 0), (3, 0, 1), (3, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1)]
    assert leader.waiting == [True, False] * (len(leader.waiting) // 2)
    assert leader.waiting


async def test_nested_submit_from_a_thread_of_the_task(tasks: Tasks) -> None:
    def outer(x: int) -> int:
        import grid

        found = []
        thread = threading.Thread(target=lambda: found.append(grid.submit(pow, x, 2).result()))
        thread.start()
        direct = grid.submit(pow, x, 3).result()
        thread.join()
        return int(direct + found[0])

    leader = Leader(tasks)
    await tasks.define(outer)
    for index in range(20):
        await leader.finish(await tasks.start([index], first=index))
    assert tasks.results == {x: x**3 + x**2 for x in range(20)}


async def test_long_task_with_nested_calls_and_a_revoked_bundle(tasks: Tasks) -> None:
    """The clock reads while the task computes, its own calls read while it waits: nothing is lost between them."""

    def outer(x: int) -> int:
        import time

        import grid

        total = 0
        for n in range(30):
            total += grid.submit(abs, -n).result()
            time.sleep(0.02)
        return total + x

    leader = Leader(tasks)
    await tasks.define(outer)
    first = await tasks.start([0])
    second = await tasks.start([1], first=1)
    third = await tasks.start([2], first=2)

    async def revoke() -> None:
        while not leader.answered > 5:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await tasks.child.send(wire.Revoke(second))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(revoke)
        await leader.finish(third)
    assert tasks.results == {0: 435, 2: 437}
    returned = [message.ticket for message in tasks.frames if isinstance(message, wire.Returned)]
    assert returned == [second]
    assert first not in returned


async def test_children_of_a_failed_task_are_cancelled(tasks: Tasks) -> None:
    def outer(x: int) -> None:
        import grid

        grid.submit(abs, x)
        raise ValueError("too bad")

    leader = Leader(tasks)
    await tasks.define(outer)
    await leader.finish(await tasks.start([1]))
    assert tasks.failures[0][0].message == "too bad"


async def test_context_of_a_task(tasks: Tasks, setup: wire.Setup) -> None:
    def look(x: int) -> Any:
        import grid

        context = grid.context()
        return context.job, context.stage, context.task, context.attempt, context.peer, context.seed

    await tasks.run(look, [0, 0], first=5, stage=2, attempt=1)
    assert [value[:5] for value in tasks.results.values()] == [(setup.job, 2, n, 1, setup.peer) for n in (5, 6)]
    assert len({value[5] for value in tasks.results.values()}) == 2
