"""Faults at large: real processes killed and stopped, a mesh of five under random cuts and deaths, hostile addresses."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from dht.network import Address, RealNetwork
from grid.core.noise import Buffer
from grid.transport.channel import initiate, respond
from grid.transport.dialling import HOST_CHARS_MAX, AddressBook, format_address, open_stream, parse_address
from grid.transport.errors import ChannelClosed, PeerUnreachable
from grid.transport.hello import PEER, Hello
from grid.transport.limits import DEAD_S
from grid.transport.link import Link
from grid.transport.mesh import Mesh
from grid.transport.outbox import MESSAGE, PING, Frame, Outbox
from tests.transport.support import Grid, Peer, Recorder, World, identity
from tests.transport.test_mesh import peers


@asynccontextmanager
async def process(number: int) -> AsyncIterator[tuple[trio.Process, Address]]:
    command = [sys.executable, "-m", "tests.transport.child", str(number)]
    child = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        line = b""
        with trio.fail_after(20):
            while not line.endswith(b"\n"):
                line += await child.stdout.receive_some(100)
        yield child, ("127.0.0.1", int(line))
    finally:
        child.kill()
        with trio.CancelScope(shield=True):
            await child.wait()
            await child.stdout.aclose()


@asynccontextmanager
async def real_mesh(number: int) -> AsyncIterator[tuple[Mesh, Recorder]]:
    handler = Recorder()
    mesh = Mesh(membership=Grid(now_s=time.time()).member(number), network=RealNetwork(), handler=handler)
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run, ("127.0.0.1", 0))
        yield mesh, handler
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_process_killed() -> None:
    async with process(2) as (child, address), real_mesh(1) as (mesh, handler):
        peer = await mesh.connect_address(address)
        assert await mesh.request(peer, b"?", 10) == b"?"
        chunks = mesh.blob_chunks(peer, b"n" * 32, 0, 64 << 20)
        await anext(chunks)
        child.send_signal(signal.SIGKILL)
        await handler.until(lambda: handler.count("down"), within_s=5)  # reset or closed by its kernel: no timeout needed
        with pytest.raises(PeerUnreachable):
            async for _ in chunks:
                pass


@pytest.mark.real
async def test_process_stopped() -> None:
    """SIGSTOP: the kernel still acknowledges everything, only silence tells."""
    async with process(2) as (child, address), real_mesh(1) as (mesh, handler):
        peer = await mesh.connect_address(address)
        child.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        await handler.until(lambda: handler.count("down"), within_s=DEAD_S + 6)
        assert time.monotonic() - start > DEAD_S - 3
        child.send_signal(signal.SIGCONT)
        await mesh.connect(peer, [address])
        assert await mesh.request(peer, b"back", 10) == b"back"


@pytest.mark.parametrize("seed", range(4))
async def test_mesh_under_random_faults(autojump_clock: Any, grid: Grid, seed: int) -> None:
    """After cuts, one-way cuts and deaths heal, every kept pair has one connection that both ends agree on."""
    rng = random.Random(seed)
    world = World(memory=True, latency_s=0.005, jitter_s=0.02)
    assert world.memory is not None
    async with peers(world, grid, 5) as everyone, trio.open_nursery() as nursery:
        for near in everyone:
            for far in everyone:
                if near is not far:
                    near.mesh.keep(far.id)

        async def chatter(near: Peer) -> None:
            while True:
                await trio.sleep(rng.random())
                far = rng.choice([peer for peer in everyone if peer is not near])
                with suppress(PeerUnreachable, trio.TooSlowError):
                    await near.mesh.request(far.id, b"?", 5)

        for near in everyone:
            nursery.start_soon(chatter, near)
        for _ in range(15):
            one, two = rng.sample(everyone, 2)
            match rng.randrange(3):
                case 0:
                    world.memory.partition(one.name, two.name, one_way=rng.random() < 0.5)
                case 1:
                    world.memory.heal()
                case 2:
                    link = one.mesh._remotes[two.id].link
                    if link is not None:
                        await trio.aclose_forcefully(link.channel._stream)
            await trio.sleep(rng.random() * 8)
        world.memory.heal()
        await trio.sleep(60)
        for near in everyone:
            for far in everyone:
                if near is not far:
                    start = trio.current_time()
                    assert await near.mesh.request(far.id, b"?", 5) == b"?"
                    assert trio.current_time() - start < 0.2
                    kinds = [kind for kind in near.handler.kinds(far.id) if kind != "message"]
                    assert kinds == (["up", "down"] * len(kinds))[: len(kinds)]
                    assert kinds[-1] == "up"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:1", ("host", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:4743", ("::1", 4743)),
        (":4743", ("", 4743)),
        ("host", None),
        ("host:0", None),
        ("host:65536", None),
        ("host:٤", None),
        ("host:" + "9" * 5000, None),
        ("ho st:1", None),
        ("ho\0st:1", None),
        ("é:1", None),
        ("x" * (HOST_CHARS_MAX + 1) + ":1", None),
    ],
)
def test_addresses(text: str, address: Address | None) -> None:
    assert parse_address(text) == address
    if address is not None:
        assert format_address(address) == text


@pytest.mark.parametrize("host", ["x" * 64 + ".example", "a..b", "\0", ".", "é" * 70])
async def test_host_that_cannot_be_one(host: str) -> None:
    with trio.fail_after(20), pytest.raises(OSError, match=r".*"):  # the resolver's words vary
        await open_stream(RealNetwork(), (host, 1))


def test_address_book_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.transport.dialling.ADDRESSES_KNOWN_MAX", 3)
    book = AddressBook()
    for number in range(5):
        book.learn(PeerId(bytes([number]) * 20), [("h", number + port) for port in range(1, 9)])
    assert book.get(PeerId(bytes(20))) == []
    assert len(book.get(PeerId(bytes([4]) * 20))) == 4
    hello = Hello(identity(1).public, b"", (), PEER, address="0.0.0.0:4743")
    book.learn_from(hello, ("10.1.1.1", 50_000), dialled=False)
    assert book.get(hello.id) == [("10.1.1.1", 4743)]  # its own idea of its host is of no use, ours is
    book.learn_from(hello, ("10.1.1.1", 4744), dialled=True)
    assert book.get(hello.id) == [("10.1.1.1", 4744), ("10.1.1.1", 4743)]


async def test_fault_of_locate_is_no_address(clock: Any, world: World, grid: Grid) -> None:
    async def locate(peer: PeerId) -> list[Address]:
        raise KeyError("a fault of the DHT")

    async with peers(world, grid, 1, locate=locate) as (one,):
        with pytest.raises(PeerUnreachable, match="no address"):
            await one.mesh.connect(PeerId(bytes(20)))


async def test_frames_by_both_ways_keep_their_order(grid: Grid) -> None:
    """Single frames take the shortcut past the writer task, bursts and bulk do not; the order is the same."""
    listener = await RealNetwork().listen_stream(("127.0.0.1", 0))
    got: list[int] = []
    rng = random.Random(4)
    async with trio.open_nursery() as nursery:
        done = trio.Event()
        count = 2000

        async def take(frame: Frame) -> None:
            got.append(int(bytes(frame.payload[:6])))
            if len(got) == count:
                done.set()

        async def far_end() -> None:
            stream, _ = await listener.accept()
            channel = await respond(stream, grid.credentials(2))
            await Link(channel, Outbox(), b"\x91\xa2ok").run(take)

        nursery.start_soon(far_end)
        stream = await RealNetwork().open_stream(listener.address)
        channel, _ = await initiate(stream, grid.credentials(1), PEER)
        outbox = Outbox()
        nursery.start_soon(Link(channel, outbox).run, take)
        for number in range(count):
            size = rng.choice([0, 0, 0, 100, 20_000, 200_000])
            await outbox.put(Frame(MESSAGE, 0, b"%06d" % number + bytes(size)))
            if rng.random() < 0.3:
                await trio.sleep(rng.random() * 0.0005)
        with trio.fail_after(30):
            await done.wait()
        assert got == list(range(count))
        await listener.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("record", [b"\x01", b"\x01" + bytes(4) + b"\xff" * 4, b"\x81" + bytes(4) + b"\0\0\0\x05"])
async def test_broken_frames(grid: Grid, record: bytes) -> None:
    near, far = trio.testing.memory_stream_pair()
    why: list[str] = []

    async def ignore(frame: Frame) -> None: ...

    async with trio.open_nursery() as nursery:

        async def far_end() -> None:
            channel = await respond(far, grid.credentials(2))
            why.append(await Link(channel, Outbox(), b"\x91\xa2ok").run(ignore))

        nursery.start_soon(far_end)
        channel, _ = await initiate(near, grid.credentials(1), PEER)
        await channel.send(record, b"four")
        with suppress(ChannelClosed):
            while True:
                await channel.receive()
    assert why == ["the other end broke the frame format"]


async def test_outbox_is_fair_and_bounded() -> None:
    outbox = Outbox(frames_max=10)
    order: list[int] = []

    async def put(number: int) -> None:
        await outbox.put(Frame(MESSAGE, number, b""))
        order.append(number)

    payload: Buffer = b""
    for number in range(10):
        assert outbox.offer(Frame(MESSAGE, number, payload))
    assert not outbox.offer(Frame(MESSAGE, 99, payload))
    async with trio.open_nursery() as nursery:
        for number in range(10, 40):
            nursery.start_soon(put, number)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        taken: list[int] = []
        while len(taken) < 40:
            taken += [frame.id for frame in outbox.take()]
            await trio.testing.wait_all_tasks_blocked()
    assert taken == list(range(40))
    outbox.force(Frame(PING, 0, b""))
    for number in range(3):
        outbox.force(Frame(MESSAGE, number, b""))
    outbox.connection_lost()
    assert [frame.kind for frame in outbox.take()] == [MESSAGE] * 3


async def test_giving_up_wakes_all_who_wait() -> None:
    outbox = Outbox(frames_max=1)
    outbox.force(Frame(MESSAGE, 0, b""))
    failed: list[str] = []

    async def put() -> None:
        try:
            await outbox.put(Frame(MESSAGE, 1, b""))
        except PeerUnreachable as error:
            failed.append(error.why)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(put)
        await trio.testing.wait_all_tasks_blocked()
        assert outbox.give_up(PeerUnreachable(PeerId(bytes(20)), "gone")) == 1
    assert failed == ["gone"] * 5
    assert outbox.offer(Frame(MESSAGE, 2, b""))
