"""The process's own sources of time, chance and threads, replaced while a world runs.

Product code asks the standard library for the time, for entropy and for helper threads. Here these are a simulated host's:
which one is told by a context variable, which trio hands from each task to those it starts. So every peer has a wall clock, a
clock that counts suspension and entropy of its own, and one seed replays one run. Rules: nothing real leaks in while
`installed` is active; all is put back afterwards.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import trio
import trio._core._run as trio_run
import trio._path as trio_path

from simulations.clock import WorldClock

EPOCH_S = 1_700_000_000.0
"""Unix time when a world begins."""


class Sources(Protocol):
    """What one host offers."""

    rng: random.Random

    def wall_s(self) -> float:
        """Unix time as this host has it."""

    def boot_s(self) -> float:
        """Monotonic, counts suspension."""

    def fsynced(self, fd: int) -> None:
        """A file of its own was synced."""


here: ContextVar[Sources | None] = ContextVar("here", default=None)
"""The host whose task runs."""


def _now_s() -> float:
    try:
        return trio.current_time()
    except RuntimeError:
        return 0.0


def wall_s() -> float:
    """Unix time where the running task is."""
    host = here.get()
    return EPOCH_S + _now_s() if host is None else host.wall_s()


def boot_s() -> float:
    """CLOCK_BOOTTIME where the running task is."""
    host = here.get()
    return _now_s() if host is None else host.boot_s()


async def _inline(function: Callable[..., Any], *arguments: Any, **_options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


def _fsync(fd: int) -> None:
    host = here.get()
    if host is not None:
        host.fsynced(fd)


@contextlib.contextmanager
def installed(seed: int, freezes: bool = True) -> Iterator[None]:
    """Replace them all; `seed` decides what tasks outside any host draw, and trio's scheduling. freezes: `Freezer` works."""
    world = random.Random(f"world {seed}")
    real_gettime = time.clock_gettime

    def rng() -> random.Random:
        host = here.get()
        return world if host is None else host.rng

    def clock_gettime(clock: int) -> float:
        return boot_s() if clock == getattr(time, "CLOCK_BOOTTIME", -1) else real_gettime(clock)

    def randbytes(count: int | None = None) -> bytes:
        return rng().randbytes(32 if count is None else count)

    replaced: list[tuple[Any, str, Any]] = [
        (time, "time", wall_s),
        (time, "time_ns", lambda: int(wall_s() * 1e9)),
        (time, "monotonic", lambda: _now_s()),
        (time, "monotonic_ns", lambda: int(_now_s() * 1e9)),
        (time, "clock_gettime", clock_gettime),
        (time, "clock_gettime_ns", lambda clock: int(clock_gettime(clock) * 1e9)),
        (secrets, "token_bytes", randbytes),
        (secrets, "token_hex", lambda count=None: randbytes(count).hex()),
        (secrets, "randbits", lambda bits: rng().getrandbits(bits)),
        (os, "urandom", randbytes),
        (random, "_urandom", randbytes),
        (os, "fsync", _fsync),
        (trio.to_thread, "run_sync", _inline),
        (trio_path, "run_sync", _inline),
        (trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (trio_run, "_r", random.Random(f"scheduler {seed}")),
        (trio._core, "MockClock", WorldClock),  # trio jumps no other kind
        *([(trio_run.Runner, "reschedule", _reschedule)] if freezes else []),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    state = random.getstate()
    random.seed(f"global {seed}")
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        random.setstate(state)


# ---- a host whose tasks stand still -----------------------------------------------------------------------------------------


class Freezer:
    """Holds back every task of a host, as SIGSTOP or a closed lid does. What was to wake them wakes them at `thaw`."""

    def __init__(self) -> None:
        self.frozen = False
        self._held: list[tuple[Any, Any]] = []

    def freeze(self) -> None:
        """From now on no task of the host takes a step."""
        self.frozen = True

    def hold(self, task: Any, next_send: Any) -> None:
        """A task was to run."""
        self._held.append((task, next_send))

    def thaw(self) -> None:
        """They all go on."""
        self.frozen = False
        held, self._held = self._held, []
        for task, next_send in held:
            trio.lowlevel.reschedule(task, next_send)


_real_reschedule = trio_run.Runner.reschedule


def _reschedule(runner: Any, task: Any, next_send: Any = trio_run._NO_SEND) -> None:
    host = task.context.get(here)
    freezer = None if host is None else host.freezer
    if freezer is not None and freezer.frozen:
        task._abort_func = None
        freezer.hold(task, next_send)
    else:
        _real_reschedule(runner, task, next_send)
