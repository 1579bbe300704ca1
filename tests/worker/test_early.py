"""A worker sends the result of a task that the driver alone waits for to the driver, too, after the peer."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from grid.api import serialize, wire
from grid.worker.pool import JobProcesses
from tests.worker.conftest import Tasks


@pytest.fixture
def driver(job: JobProcesses) -> socket.socket:
    """Its end of the socket."""
    return job._early[1]


def early(driver: socket.socket) -> tuple[int, int, Any] | None:
    """(stage, index, value) of the next early result; None: there is none."""
    try:
        data = driver.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    stage, index = wire.EARLY.unpack_from(data)
    (value,) = serialize.load_results(data[wire.EARLY.size :])
    return stage, index, value


async def run(tasks: Tasks, function: Any, ticket: int, *, stage: int = 9, given_ns: int = 0, count: int = 1) -> wire.Done:
    tasks.results.clear()
    await tasks.child.send(wire.Function(ticket), serialize.dump_function(function))
    parts, _ = serialize.dump_segment([ticket] * count)
    given_ns = given_ns or time.monotonic_ns()
    await tasks.child.send(wire.Run(ticket, 0, ticket, 5, 5, 5 + count, 0, "", early=stage, given_ns=given_ns), *parts)
    await tasks.finish(ticket)
    last = tasks.frames[-1]
    assert isinstance(last, wire.Done)
    return last


async def test_result_reaches_the_peer_and_then_the_driver(tasks: Tasks, driver: socket.socket) -> None:
    ticket = 1
    while not (done := await run(tasks, abs, ticket)).early:
        ticket += 1  # it took long on a busy machine
    assert (done.lo, done.hi, done.final) == (5, 6, True)
    driver.settimeout(20)  # it was sent behind what the peer got
    data = driver.recv(1 << 16)
    driver.setblocking(False)
    assert wire.EARLY.unpack_from(data) == (9, 5)
    assert serialize.load_results(data[wire.EARLY.size :]) == [ticket]


async def test_result_that_nobody_asked_for_early_is_the_peers_alone(tasks: Tasks, driver: socket.socket) -> None:
    assert not (await run(tasks, abs, 1, stage=-1)).early
    await tasks.child.stop()
    assert early(driver) is None


async def test_result_that_took_long_or_is_large_is_the_peers_alone(tasks: Tasks, driver: socket.socket) -> None:
    assert not (await run(tasks, abs, 1, given_ns=time.monotonic_ns() - wire.EARLY_NS)).early
    assert not (await run(tasks, lambda _: bytes(wire.EARLY_BYTES_MAX), 2)).early
    await tasks.child.stop()
    assert early(driver) is None


async def test_driver_that_does_not_read_holds_no_worker_up(tasks: Tasks, driver: socket.socket) -> None:
    for ticket in range(1, 700):  # more than the socket takes
        await run(tasks, abs, ticket)
    assert early(driver) is not None
