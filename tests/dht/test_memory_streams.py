"""The in-memory twin's streams behave as TCP's do."""

from __future__ import annotations

import random

import pytest
import trio
from trio.abc import HalfCloseableStream

from dht.memory import MemoryNetwork
from dht.memorystream import STREAM_BUFFER_BYTES


async def connected(world: MemoryNetwork) -> tuple[HalfCloseableStream, HalfCloseableStream]:
    listener = await world.host("b").listen_stream(("b", 1))
    near = await world.host("a").open_stream(("b", 1))
    far, peer = await listener.accept()
    assert peer[0] == "a"
    return near, far


async def read_all(stream: HalfCloseableStream) -> bytes:
    got = b""
    while chunk := await stream.receive_some():
        got += chunk
    return got


async def test_bytes_arrive_in_order_after_the_latency(autojump_clock: trio.testing.MockClock) -> None:
    world = MemoryNetwork(random.Random(1), latency_s=0.05, jitter_s=0.05)
    near, far = await connected(world)
    start = trio.current_time()
    sent = bytes(range(256)) * 40
    for i in range(0, len(sent), 100):
        await near.send_all(sent[i : i + 100])
    await near.send_eof()
    assert await read_all(far) == sent
    assert 0.05 <= trio.current_time() - start <= 0.11
    await far.send_all(b"answer")  # half closed: the other direction still works
    assert await near.receive_some() == b"answer"


async def test_a_sender_waits_for_a_slow_receiver(autojump_clock: trio.testing.MockClock) -> None:
    near, far = await connected(MemoryNetwork())
    with trio.move_on_after(10) as scope:
        await near.send_all(bytes(STREAM_BUFFER_BYTES + 1))
    assert scope.cancelled_caught
    received = 0
    while received < STREAM_BUFFER_BYTES:
        received += len(await far.receive_some())
    with trio.fail_after(1):
        await near.send_all(b"x")


async def test_a_cut_link_is_silence_and_what_was_sent_arrives_after_it_heals(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = MemoryNetwork()
    near, far = await connected(world)
    world.partition("a", "b")
    await near.send_all(b"late")
    with trio.move_on_after(60) as scope:
        await far.receive_some()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await far.receive_some())

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        world.heal("a", "b")
    assert got == [b"late"]


async def test_a_one_way_cut_lets_the_other_way_through(autojump_clock: trio.testing.MockClock) -> None:
    world = MemoryNetwork()
    near, far = await connected(world)
    world.partition("a", "b", one_way=True)
    await far.send_all(b"hear me")
    assert await near.receive_some() == b"hear me"
    await near.send_all(b"no")
    with trio.move_on_after(5) as scope:
        await far.receive_some()
    assert scope.cancelled_caught


async def test_a_killed_process_resets_its_streams(autojump_clock: trio.testing.MockClock) -> None:
    world = MemoryNetwork()
    near, far = await connected(world)
    await far.send_all(b"last words")
    world.kill("b")
    assert await near.receive_some() == b"last words"
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await far.receive_some()
    with pytest.raises(ConnectionRefusedError):
        await world.host("a").open_stream(("b", 1))


async def test_a_pulled_plug_is_silence(autojump_clock: trio.testing.MockClock) -> None:
    world = MemoryNetwork()
    near, _ = await connected(world)
    world.kill("b", silent=True)
    for operation in (near.receive_some(), near.send_all(bytes(2 * STREAM_BUFFER_BYTES))):
        with trio.move_on_after(30) as scope:
            await operation
        assert scope.cancelled_caught
    with pytest.raises(TimeoutError):
        await world.host("a").open_stream(("b", 1))


async def test_a_reset_wakes_whoever_waits(autojump_clock: trio.testing.MockClock) -> None:
    world = MemoryNetwork()
    near, _ = await connected(world)
    broken = []

    async def expect(operation: object) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await operation  # type: ignore[misc]
        broken.append(1)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, near.receive_some())
            nursery.start_soon(expect, near.send_all(bytes(4 * STREAM_BUFFER_BYTES)))
            await trio.testing.wait_all_tasks_blocked()
            world.kill("b")
    assert broken == [1, 1]


async def test_a_close_is_an_eof_and_a_close_with_unread_input_a_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    near, far = await connected(MemoryNetwork())
    await far.aclose()
    assert await near.receive_some() == b""
    await near.send_all(b"into the void")
    await trio.sleep(1)
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")

    near, far = await connected(MemoryNetwork())
    await near.send_all(b"unread")
    await trio.sleep(1)
    await far.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()


async def test_closing_wakes_the_own_tasks(autojump_clock: trio.testing.MockClock) -> None:
    near, _ = await connected(MemoryNetwork())

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await near.aclose()


async def test_ports_are_shared_and_taken(autojump_clock: trio.testing.MockClock) -> None:
    host = MemoryNetwork().host("a")
    first = await host.listen_stream(("a", 0))
    await host.open_datagram(first.address)  # the number serves both protocols
    with pytest.raises(OSError, match="taken"):
        await host.listen_stream(first.address)
    await first.aclose()
    await host.listen_stream(first.address)


async def test_datagrams_are_lost_duplicated_and_reordered_by_seed(autojump_clock: trio.testing.MockClock) -> None:
    async def run(seed: int) -> list[bytes]:
        world = MemoryNetwork(random.Random(seed), loss=0.2, duplicate=0.2, reorder=0.3)
        near = await world.host("a").open_datagram(("a", 1))
        far = await world.host("b").open_datagram(("b", 1))
        for i in range(100):
            await near.send_to(bytes([i]), far.address)
        got = []
        with trio.move_on_after(5):
            while True:
                got.append((await far.receive_from())[0])
        return got

    first, again, other = await run(1), await run(1), await run(2)
    assert first == again != other
    assert len(set(first)) < 100  # lost
    assert len(set(first)) < len(first)  # duplicated
    assert sorted(first) != first  # reordered
