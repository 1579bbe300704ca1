"""The peer's end of a child's channel, against a socket that plays the child."""

# ruff: noqa: ASYNC230 - small files and short programs
from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
import trio

from grid.api import serialize, wire
from grid.api.channel import Channel
from grid.worker import process
from grid.worker.process import Child, ChildGone
from tests.worker.conftest import PATIENCE_S, Tasks, poll


@pytest.fixture
async def pair(nursery: trio.Nursery) -> AsyncIterator[tuple[Child, Channel]]:
    """A child with its writer running, and the other end."""
    ours, theirs = socket.socketpair()
    child = Child("worker", ours, None)
    nursery.start_soon(child.write)
    other = Channel(theirs)
    yield child, other
    other.close()
    child.close()


async def test_send_waits_for_a_child_that_does_not_read(pair: tuple[Child, Channel]) -> None:
    child, other = pair
    body = bytes(range(256)) * 4096
    sent = 0

    async def send() -> None:
        nonlocal sent
        for fn in range(40):
            await child.send(wire.Function(fn), body[: len(body) // 2], body[len(body) // 2 :])
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 0 < sent <= 2 + process.OUT_BYTES_MAX // len(body)
        with trio.fail_after(PATIENCE_S):
            for fn in range(40):
                message, received = await trio.to_thread.run_sync(other.receive)
                assert message == wire.Function(fn)
                assert received == body
    assert sent == 40


async def test_small_frames_keep_their_order_behind_a_large_one(pair: tuple[Child, Channel]) -> None:
    child, other = pair
    await child.send(wire.Function(0), bytes(3 << 20))
    for fn in range(1, 100):
        await child.send(wire.Function(fn))
    with trio.fail_after(PATIENCE_S):
        numbers = [(await trio.to_thread.run_sync(other.receive))[0].fn for _ in range(100)]
    assert numbers == list(range(100))


async def test_blocked_sender_learns_that_the_child_is_gone(pair: tuple[Child, Channel]) -> None:
    child, other = pair
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _refused(child))
            await trio.testing.wait_all_tasks_blocked(0.05)
            other.close()
        assert [frame async for frame in child.frames] == []


async def _refused(child: Child) -> None:
    with pytest.raises(ChildGone):
        await _send_for_ever(child)


async def _send_for_ever(child: Child) -> None:
    while True:
        await child.send(wire.Function(0), bytes(1 << 20))


async def test_closed_under_its_reader(pair: tuple[Child, Channel]) -> None:
    child, _ = pair

    async def close() -> None:
        await trio.testing.wait_all_tasks_blocked()
        child.close()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            assert [frame async for frame in child.frames] == []
    assert child.closed


async def test_cancelled_reader_loses_nothing(pair: tuple[Child, Channel]) -> None:
    child, other = pair
    seen = []
    for _ in range(20):
        other.send(wire.Waiting(True), b"x" * 100)
        with trio.move_on_after(0) as scope:
            async for message, _body in child.frames:
                seen.append(message)
        assert scope.cancelled_caught
    with trio.fail_after(PATIENCE_S):
        while len(seen) < 20:
            seen.append((await anext(child.frames))[0])
    assert len(seen) == 20


@pytest.mark.real
async def test_child_nobody_listens_to_blocks(tasks: Tasks) -> None:
    """What it reports and prints is not piled up here."""

    def task(x: int) -> bytes:
        import os

        os.write(1, bytes(1 << 20))
        return bytes(1 << 20)

    await tasks.define(task)
    ticket = await tasks.start([0] * 50)
    last = -2

    def still() -> bool:
        nonlocal last
        before, last = last, tasks.child.progress()[0]
        return before == last >= 0

    await poll(still)
    with trio.fail_after(PATIENCE_S):
        await trio.sleep(0.2)
    assert tasks.child.progress()[0] < 45
    assert tasks.child._prints_bytes < 2 * process.PRINT_BYTES_MAX
    await tasks.finish(ticket)
    returned = [message.lo for message in tasks.frames if isinstance(message, wire.Returned)]
    assert len(tasks.results) == (returned[0] if returned else 50)  # it took long


@pytest.mark.real
async def test_argument_of_200_megabytes(tasks: Tasks, tmp_path: object) -> None:
    """It comes as a file that the worker maps."""
    parts, _ = serialize.dump_segment([b"x" * (200 << 20)])
    path = f"{tmp_path}/argument"
    with open(path, "wb") as file:
        file.writelines(parts)
    await tasks.define(len)
    await tasks.child.send(wire.Run(1, 0, 0, 0, 0, 1, 0, path))
    await tasks.finish(1)
    assert tasks.results == {0: 200 << 20}
    await tasks.finish(await tasks.start(["y"], first=1))
    await poll(lambda: tasks.child.rss_bytes() < 60 << 20)  # it did not keep it


def test_arrived_takes_more_than_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "RECEIVE_BYTES", 1000)
    monkeypatch.setattr(process, "_INPUT", bytearray(1000))
    ours, theirs = socket.socketpair()
    child = Child("worker", ours, None)
    body = bytes(900)
    with theirs:
        for _ in range(6):
            theirs.sendall(wire.encode(wire.Print(0, 0, 1), len(body)) + body)
        theirs.sendall(wire.encode(wire.Done(1, 0, 1, 1, True)))
        assert [type(message) for message, _ in child.arrived()] == [wire.Print] * 6 + [wire.Done]
    child._socket.close()
