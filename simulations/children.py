"""What runs in simulated children: a worker that runs tasks in virtual time, a driver that runs a program."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import trio

from grid.api import serialize, wire
from simulations.processes import SimChild
from simulations.programs import PROGRAMS, Function, value_of
from simulations.session import Session, SimStage, TaskFailedError, segment

FLUSH_S = 0.01
"""A worker reports results once they are this old, as the real one does."""
GIVE_BACK_S = 0.25
"""Then it gives back what it has not begun of a Run, as the real one does."""
SEGMENT_ITEMS = 8
"""Items of a map in one segment: small, so that small jobs have many."""
PAGE_SEGMENTS = 4
BURST_MAX = 5
"""Submitted calls in one page at most."""


# ---- workers ----------------------------------------------------------------------------------------------------------------


class _Worker:
    def __init__(self, child: SimChild) -> None:
        self.child = child
        self.session = Session(child)
        self.functions: dict[int, Function] = {}
        self.runs: deque[tuple[wire.Run, bytes]] = deque()
        self.stopping = False
        self.news = trio.Event()

    def take(self, message: Any, body: bytes) -> None:
        """A frame of the peer."""
        match message:
            case wire.Function(fn):
                self.functions[fn] = Function.load(body)
            case wire.Run():
                self.runs.append((message, body))
                self.news.set()
            case wire.Revoke(ticket):
                for entry in self.runs:
                    if entry[0].ticket == ticket:
                        self.runs.remove(entry)
                        self.child.say(wire.Returned(ticket))
                        break
            case wire.Stop():
                self.stopping = True
                self.news.set()
            case _:
                self.session.take(message, body)

    async def serve(self) -> int:
        while True:
            if self.runs:
                await self._run(*self.runs.popleft())
            elif self.stopping:
                return 0
            else:
                self.news = trio.Event()
                await self.news.wait()

    async def _run(self, run: wire.Run, body: bytes) -> None:
        child = self.child
        data = _read(run.path) if run.path else body
        loaded = serialize.load_segment(data)
        items = loaded.items[run.lo - run.first : run.hi - run.first]
        assert len(items) == run.hi - run.lo, "a bundle with another's arguments"
        function = self.functions[run.fn]
        done: list[Any] = []
        lo, since_s, spent_s = run.lo, trio.current_time(), 0.0
        late_s = since_s + GIVE_BACK_S
        for index, item in enumerate(items, run.lo):
            if index > run.lo and trio.current_time() > late_s:
                if done:
                    child.say(wire.Done(run.ticket, lo, index, int(spent_s * 1e6), False), _results(done))
                child.say(wire.Returned(run.ticket, index))
                break
            argument = item[0][0] if loaded.kind == serialize.CALL else item
            child.task = (run.stage, index, run.attempt)
            child.cell = (index, int(trio.current_time() * 1e9))
            began_s = trio.current_time()
            try:
                value = await self._task(function, argument)
            except TaskFailedError as error:
                if done:
                    child.say(wire.Done(run.ticket, lo, index, int(spent_s * 1e6), False), _results(done))
                    done, spent_s = [], 0.0
                final = index + 1 == run.hi
                elapsed_us = int((trio.current_time() - began_s) * 1e6)
                child.say(wire.Failed(run.ticket, index, "raised", "ValueError", str(error), "", elapsed_us, final))
                lo, since_s = index + 1, trio.current_time()
                continue
            done.append(value)
            spent_s += trio.current_time() - began_s
            if trio.current_time() - since_s >= FLUSH_S or index + 1 == run.hi:
                child.say(wire.Done(run.ticket, lo, index + 1, int(spent_s * 1e6), index + 1 == run.hi), _results(done))
                done, lo, since_s, spent_s = [], index + 1, trio.current_time(), 0.0
        child.cell = (-1, 0)

    async def _task(self, function: Function, argument: int) -> int:
        child = self.child
        await child.work(function.seconds(argument))
        if function.fails(argument):
            raise TaskFailedError(f"argument {argument} is odd")
        children = function.children(argument)
        if not children:
            return function.value(argument)
        stage = self.session.open(function.child.dump(), function.child.name, True)
        stage.page([segment(children)], final=True)
        child.say(wire.Waiting(True))
        total = 0
        async for _, value in stage.values():
            if isinstance(value, TaskFailedError):
                raise value
            total += value
        child.say(wire.Waiting(False))
        return total


def _results(values: list[Any]) -> bytes:
    return b"".join(bytes(part) for part in serialize.dump_results(values))


async def worker(child: SimChild, setup: wire.Setup) -> int:
    """A worker process."""
    this = _Worker(child)
    child.take_in(this.take)
    return await this.serve()


# ---- the driver -------------------------------------------------------------------------------------------------------------


class _Driver:
    """A `Script` on the grid."""

    def __init__(self, child: SimChild, setup: wire.Setup, nursery: trio.Nursery, tasks: int, mean_s: float) -> None:
        self.tasks = tasks
        self.mean_s = mean_s
        self._nursery = nursery
        self._child = child
        self._folder = Path(setup.workdir)
        self.session = Session(child)

    async def map(self, function: Function, arguments: Iterable[int], ordered: bool = True) -> AsyncIterator[int | None]:
        stage = self.session.open(function.dump(), function.name, ordered)
        listed = list(arguments)
        self._nursery.start_soon(self._feed, stage, listed)
        async for index, value in stage.values():
            yield self._checked(stage, index, function, listed[index], value)

    def _checked(self, stage: SimStage, index: int, function: Function, argument: int, value: Any) -> int | None:
        """A result as the script gets it: it must be the task's, whatever happened to it on its way."""
        found = None if isinstance(value, TaskFailedError) else value
        wanted = value_of(function, argument)
        if found != wanted:
            why = AssertionError(f"{function.name}({argument}), task {index} of stage {stage.number}, is {wanted}, not {value!r}")
            self._child.broken(why)
        return found

    async def _feed(self, stage: SimStage, arguments: list[int]) -> None:
        segments = [segment(arguments[at : at + SEGMENT_ITEMS]) for at in range(0, len(arguments), SEGMENT_ITEMS)]
        for at in range(0, len(segments), PAGE_SEGMENTS):
            await self._child.work(0.002)
            stage.page(segments[at : at + PAGE_SEGMENTS], final=at + PAGE_SEGMENTS >= len(segments))
        if not segments:
            stage.close()

    async def submit_all(self, function: Function, bursts: list[list[int]]) -> list[int | None]:
        stage = self.session.open(function.dump(), function.name, False)
        where: dict[int, int] = {}

        async def thread(arguments: list[int]) -> None:
            rng = self._child.rng
            at = 0
            while at < len(arguments):
                await self._child.work(rng.random() * 0.01)
                burst = arguments[at : at + rng.randint(1, BURST_MAX)]
                for offset, argument in enumerate(burst):
                    where[argument] = stage.sent + offset
                stage.page([segment(burst, serialize.CALL)])
                at += len(burst)

        async with trio.open_nursery() as nursery:
            for arguments in bursts:
                nursery.start_soon(thread, arguments)
        stage.close()
        return [
            self._checked(stage, where[argument], function, argument, await stage.one(where[argument]))
            for burst in bursts
            for argument in burst
        ]

    def say(self, text: str, fd: int = 1) -> None:
        self._child.write(fd, f"{text}\n".encode())

    def leave(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)

    async def think(self, seconds: float) -> None:
        await self._child.work(seconds)


async def driver(child: SimChild, setup: wire.Setup) -> int:
    """The driver process: the "script" names a program and its size."""
    program, tasks, mean_s = json.loads(_read(setup.script))
    async with trio.open_nursery() as nursery:
        script = _Driver(child, setup, nursery, tasks, mean_s)

        def take(message: Any, body: bytes) -> None:
            script.session.take(message, body)

        child.take_in(take)
        await child.work(0.02)
        await PROGRAMS[program](script)
        await script.session.finish()
    return 0


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


MAINS = {"worker": worker, "driver": driver}
