"""The scripts of simulated jobs: small, deterministic, each with the output that a serial run of it has.

A program is one coroutine over a `Script`: `map`, `submit`, `say`, `leave`. The same coroutine runs in a simulated driver on the
grid and, by `serial`, on its own: the two must print and leave the same bytes. Rules: a task's value and its length depend on
the function and the argument alone; nothing printed depends on the order in which unordered results come.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

FAILS_EVERY = 37
"""Of function "odd": the tasks that raise."""
CHILDREN = 4
"""Tasks that a task of function "nest" makes."""


@dataclass(frozen=True)
class Function:
    """What a task runs: its name says how its value is made, `mean_s` how long it takes."""

    name: str
    mean_s: float

    def dump(self) -> bytes:
        """As it travels."""
        return json.dumps(["sim", self.name, self.mean_s]).encode()

    @classmethod
    def load(cls, data: bytes) -> Function:
        _, name, mean_s = json.loads(data)
        return cls(name, mean_s)

    def _hash(self, argument: int, what: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{what}/{self.name}/{argument}".encode(), digest_size=6).digest(), "big")

    def seconds(self, argument: int) -> float:
        """Of one task: exponential, cut at five means."""
        chance = (self._hash(argument, "time") + 1) / (1 << 48)
        return min(-math.log(chance), 5.0) * self.mean_s

    def fails(self, argument: int) -> bool:
        """Whether the task raises, wherever and whenever it runs."""
        return self.name == "odd" and argument % FAILS_EVERY == 5

    def children(self, argument: int) -> list[int]:
        """Arguments of the tasks it makes."""
        return [argument * 31 + n for n in range(CHILDREN)] if self.name == "nest" else []

    @property
    def child(self) -> Function:
        """What those run."""
        return Function("mix", self.mean_s / 2)

    def value(self, argument: int) -> int:
        """Of a task without children."""
        return self._hash(argument, "value") % 1_000_003


def value_of(function: Function, argument: int) -> int | None:
    """A task's value as a serial run has it; None: it raises."""
    if function.fails(argument):
        return None
    children = function.children(argument)
    if children:
        return sum(function.child.value(child) for child in children)
    return function.value(argument)


class Script(Protocol):
    """What a program can do."""

    tasks: int
    mean_s: float

    def map(self, function: Function, arguments: Iterable[int], ordered: bool = True) -> AsyncIterator[int | None]:
        """Values (None: the task raised), in order or as they come. The stage runs from the first step on."""

    async def submit_all(self, function: Function, bursts: list[list[int]]) -> list[int | None]:
        """Submit one by one, each burst from a thread of its own; the values, burst by burst."""

    def say(self, text: str, fd: int = 1) -> None:
        """Print a line."""

    def leave(self, name: str, data: bytes) -> None:
        """A file in the working folder."""

    async def think(self, seconds: float) -> None:
        """The script's own work."""


async def sums(script: Script) -> None:
    """A map, read in order, with a line now and then."""
    total = 0
    at = 0
    async for value in script.map(Function("mix", script.mean_s), range(script.tasks)):
        total += value or 0
        at += 1
        if at % max(1, script.tasks // 8) == 0:
            script.say(f"{at} done, sum {total}")
    script.say(f"total {total}")


async def chain(script: Script) -> None:
    """An unordered map that feeds a second one."""
    first = Function("mix", script.mean_s)
    found = sorted([value or 0 async for value in script.map(first, range(script.tasks // 2), ordered=False)])
    script.say(f"first {len(found)}, sum {sum(found)}")
    second = Function("fold", script.mean_s)
    total = 0
    async for value in script.map(second, found[: script.tasks - script.tasks // 2], ordered=False):
        total += value or 0
    script.say(f"second {total}")


async def threads(script: Script) -> None:
    """Calls submitted one by one from two threads."""
    function = Function("call", script.mean_s)
    half = script.tasks // 2
    values = await script.submit_all(function, [list(range(half)), list(range(half, script.tasks))])
    script.say(f"sum {sum(value or 0 for value in values)}")


async def nested(script: Script) -> None:
    """Tasks that call map."""
    total = 0
    async for value in script.map(Function("nest", script.mean_s), range(max(1, script.tasks // (CHILDREN + 1)))):
        total += value or 0
    script.say(f"nested {total}")


async def mixed(script: Script) -> None:
    """Stage after stage with the script's own work between them, tasks that raise, lines on stderr, a file left."""
    total = 0
    for stage in range(3):
        function = Function("odd", script.mean_s)
        base = stage * script.tasks
        async for value in script.map(function, range(base, base + max(1, script.tasks // 3)), ordered=stage != 1):
            total += 1 if value is None else value
        script.say(f"stage {stage}: {total}")
        script.say(f"warning {stage}", fd=2)
        await script.think(0.2)
    script.leave("report.txt", f"{total}\n".encode())
    script.say("done")


PROGRAMS: dict[str, Callable[[Script], Awaitable[None]]] = {
    "sums": sums,
    "chain": chain,
    "threads": threads,
    "nested": nested,
    "mixed": mixed,
}


@dataclass
class Expected:
    """What a run shows."""

    stdout: bytes = b""
    stderr: bytes = b""
    files: tuple[tuple[str, bytes], ...] = ()


class Serial:
    """A script that runs its tasks itself, one after the other, in no time."""

    def __init__(self, tasks: int, mean_s: float) -> None:
        self.tasks = tasks
        self.mean_s = mean_s
        self.shown = {1: b"", 2: b""}
        self.files: dict[str, bytes] = {}

    async def map(self, function: Function, arguments: Iterable[int], ordered: bool = True) -> AsyncIterator[int | None]:
        for argument in arguments:
            yield value_of(function, argument)

    async def submit_all(self, function: Function, bursts: list[list[int]]) -> list[int | None]:
        return [value_of(function, argument) for burst in bursts for argument in burst]

    def say(self, text: str, fd: int = 1) -> None:
        self.shown[fd] += f"{text}\n".encode()

    def leave(self, name: str, data: bytes) -> None:
        self.files[name] = data

    async def think(self, seconds: float) -> None:
        return


def serial(program: str, tasks: int, mean_s: float) -> Expected:
    """What the program shows and leaves when nothing is distributed."""
    script = Serial(tasks, mean_s)
    run = PROGRAMS[program](script)
    try:
        run.send(None)  # type: ignore[attr-defined]  # it awaits nothing that waits
    except StopIteration:
        return Expected(script.shown[1], script.shown[2], tuple(sorted(script.files.items())))
    raise AssertionError(f"the program {program} waits for something in its serial run")
