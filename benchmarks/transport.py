"""Measure the transport between two processes on loopback: blob throughput, round trip, messages a second.

    python benchmarks/transport.py [--megabytes 512]

The same host's plain TCP (one process pair, trio, 1 MiB writes) is printed next to it, as ratios travel better than figures.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import trio

from dht.core.identity import Identity, PeerId
from dht.core.membership import Chain, Membership, Role
from dht.network import RealNetwork
from grid.transport.errors import RemoteError
from grid.transport.hello import Hello
from grid.transport.mesh import Mesh

CHUNK = 1 << 20
LOOPBACK = ("127.0.0.1", 0)


class Server:
    """Answers requests with their own bytes, counts messages, serves one endless blob."""

    def __init__(self) -> None:
        self.mesh: Mesh
        self.messages = 0
        self.block = bytes(range(256)) * (CHUNK // 256)

    async def on_message(self, peer: PeerId, message: bytes) -> None:
        self.messages += 1

    async def on_request(self, peer: PeerId, message: bytes) -> bytes:
        return message if message != b"count" else str(self.messages).encode()

    async def on_up(self, peer: PeerId, hello: Hello) -> None:
        pass

    async def on_down(self, peer: PeerId, why: str) -> None:
        pass

    async def admit(self, invite: bytes, key: bytes, hello: Hello) -> Chain:
        raise RemoteError("unknown", "no")

    async def read_blob(self, peer: PeerId, blob: bytes, offset: int, length: int) -> memoryview:
        return memoryview(self.block)[:length]


def serve(connection: Connection, membership: tuple[bytes, bytes, Chain]) -> None:
    grid, seed, chain = membership

    async def main() -> None:
        server = Server()
        mesh = Mesh(membership=Membership(grid, Identity(seed), chain), network=RealNetwork(), handler=server)
        async with trio.open_nursery() as nursery:
            connection.send(await nursery.start(mesh.run, LOOPBACK))
            echo = await trio.open_tcp_listeners(0, host="127.0.0.1")
            connection.send(echo[0].socket.getsockname())
            nursery.start_soon(trio.serve_listeners, plain, echo)
            await trio.to_thread.run_sync(connection.recv, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def plain(stream: trio.SocketStream) -> None:
    """b"r": echo 256 bytes at a time; b"b": send 1 MiB blocks until the other end closes."""
    mode = await stream.receive_some(1)
    block = bytes(CHUNK)
    try:
        while True:
            if mode == b"b":
                await stream.send_all(block)
            else:
                data = await stream.receive_some(CHUNK)
                if not data:
                    return
                await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def blob_rate(mesh: Mesh, peer: PeerId, megabytes: int) -> float:
    await mesh.read_blob(peer, b"b" * 32, 0, CHUNK)
    start = time.perf_counter()
    count = 0
    async for chunk in mesh.blob_chunks(peer, b"b" * 32, 0, megabytes << 20):
        count += len(chunk)
    assert count == megabytes << 20
    return count / 1e6 / (time.perf_counter() - start)


async def plain_rate(address: tuple[str, int], megabytes: int) -> float:
    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"b")
        start = time.perf_counter()
        count = 0
        while count < megabytes << 20:
            count += len(await stream.receive_some(CHUNK))
        return count / 1e6 / (time.perf_counter() - start)


def quantiles(times: list[float]) -> tuple[float, float]:
    return statistics.median(times) * 1e6, statistics.quantiles(times, n=100)[98] * 1e6


async def round_trips(mesh: Mesh, peer: PeerId, count: int) -> tuple[float, float]:
    times = []
    for number in range(count + 100):
        start = time.perf_counter()
        await mesh.request(peer, b"x" * 256, math.inf)
        if number >= 100:
            times.append(time.perf_counter() - start)
    return quantiles(times)


async def plain_round_trips(address: tuple[str, int], count: int) -> tuple[float, float]:
    times = []
    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"r")
        for _ in range(count):
            start = time.perf_counter()
            await stream.send_all(b"x" * 256)
            await stream.receive_some(CHUNK)
            times.append(time.perf_counter() - start)
    return quantiles(times)


async def message_rate(mesh: Mesh, peer: PeerId, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        await mesh.send(peer, b"x" * 256)
    while int(await mesh.request(peer, b"count", 60)) < count:
        await trio.lowlevel.checkpoint()
    return count / (time.perf_counter() - start)


async def request_rate(mesh: Mesh, peer: PeerId, count: int, at_once: int) -> float:
    async def some() -> None:
        for _ in range(count // at_once):
            await mesh.request(peer, b"x" * 256, math.inf)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(some)
    return count / (time.perf_counter() - start)


async def measure(mesh: Mesh, peer: PeerId, echo: tuple[str, int], megabytes: int) -> None:
    # interleaved, best and median of three, as the machine may be shared
    blobs, plains = [], []
    for _ in range(3):
        plains.append(await plain_rate(echo, megabytes))
        blobs.append(await blob_rate(mesh, peer, megabytes))
    p50, p99 = await round_trips(mesh, peer, 2000)
    plain50, plain99 = await plain_round_trips(echo, 2000)
    blob, tcp = statistics.median(blobs), statistics.median(plains)
    print(f"blob, 1 MiB chunks   {blob:8.0f} MB/s   plain TCP {tcp:8.0f} MB/s   ratio {blob / tcp:.2f}   best {max(blobs):.0f}")
    print(f"round trip 256 B p50 {p50:8.0f} µs     plain TCP {plain50:8.0f} µs     ratio {p50 / plain50:.2f}")
    print(f"round trip 256 B p99 {p99:8.0f} µs     plain TCP {plain99:8.0f} µs")
    print(f"messages of 256 B    {await message_rate(mesh, peer, 50_000):8.0f} /s")
    print(f"requests, 64 at once {await request_rate(mesh, peer, 20_000, 64):8.0f} /s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=512)
    options = parser.parse_args()
    root, one, two = Identity.generate(), Identity.generate(), Identity.generate()
    first = Membership.found(one, root, time.time())
    chain = first.admit(two.public, Role.SUBMIT | Role.WORK, b"", time.time())
    ours, theirs = multiprocessing.Pipe()
    context: Any = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(theirs, (root.public, one.seed, first.chain)))
    process.start()
    address, echo = ours.recv(), ours.recv()

    async def run() -> None:
        mesh = Mesh(membership=Membership(root.public, two, chain), network=RealNetwork(), handler=Server())
        async with trio.open_nursery() as nursery:
            await nursery.start(mesh.run, LOOPBACK)
            peer = await mesh.connect_address(address)
            await measure(mesh, peer, echo, options.megabytes)
            nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    finally:
        ours.send("stop")
        process.join()


if __name__ == "__main__":
    main()
