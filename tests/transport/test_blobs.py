"""Blobs over links of their own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.transport.errors import BlobMissing, PeerUnreachable
from grid.transport.limits import BLOB_CHUNK_BYTES, BLOB_IDLE_S, BLOB_SERVED_AT_ONCE, BLOB_WINDOW
from tests.transport.support import Grid, World
from tests.transport.test_mesh import peers

NAME = b"n" * 32


async def test_any_range(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        data = two.handler.blobs[NAME] = random.Random(1).randbytes(3 * BLOB_CHUNK_BYTES + 17)
        for offset, length in ((0, len(data)), (0, 0), (5, 1), (BLOB_CHUNK_BYTES - 1, 2), (7, 2 * BLOB_CHUNK_BYTES)):
            assert await one.mesh.read_blob(two.id, NAME, offset, length) == data[offset : offset + length]
        sizes = [len(chunk) async for chunk in one.mesh.blob_chunks(two.id, NAME, 0, len(data))]
        assert sizes == [BLOB_CHUNK_BYTES] * 3 + [17]
        assert two.mesh.connected() == []  # no control connection is needed for it


async def test_missing(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        two.handler.blobs[NAME] = bytes(1000)
        with pytest.raises(BlobMissing) as caught:
            await one.mesh.read_blob(two.id, b"x" * 32, 0, 10)
        assert (caught.value.peer, caught.value.blob) == (two.id, b"x" * 32)
        with pytest.raises(BlobMissing):
            await one.mesh.read_blob(two.id, NAME, 0, 1001)
        assert await one.mesh.read_blob(two.id, NAME, 0, 1000) == bytes(1000)  # the link is fine


async def test_fault_or_nonsense_of_the_server_is_missing(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        answers: list[Any] = [KeyError("fault"), b"short", bytes(11)]

        async def read(peer: PeerId, blob: bytes, offset: int, length: int) -> bytes:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, bytes)
            return answer

        two.handler.read_blob = read  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(BlobMissing):
                await one.mesh.read_blob(two.id, NAME, 0, 10)
        assert two.mesh.counters["handler_faults"] == 1


async def test_many_streams_share_one_link(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        data = two.handler.blobs[NAME] = random.Random(2).randbytes(2 * BLOB_CHUNK_BYTES)
        whole: list[bytes] = []

        async def read() -> None:
            whole.append(await one.mesh.read_blob(two.id, NAME, 0, len(data)))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read)
        assert whole == [data] * 10
        assert two.mesh.counters["accepted"] == 1


async def test_both_ends_are_bounded(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        running = most = asked = 0

        async def read(peer: PeerId, blob: bytes, offset: int, length: int) -> bytes:
            nonlocal running, most, asked
            asked += 1
            running += 1
            most = max(most, running)
            await trio.lowlevel.checkpoint()
            running -= 1
            return bytes(length)

        two.handler.read_blob = read  # type: ignore[method-assign]
        chunks = one.mesh.blob_chunks(two.id, NAME, 0, 100 * BLOB_CHUNK_BYTES)
        assert await anext(chunks) == bytes(BLOB_CHUNK_BYTES)
        await one.mesh.read_blob(two.id, NAME, 0, 1)  # one stream read slowly does not stop another
        assert asked <= BLOB_WINDOW + 2
        assert most <= BLOB_SERVED_AT_ONCE


async def test_heartbeats_pass_megabytes(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two), trio.open_nursery() as nursery:
        two.handler.blobs[NAME] = bytes(8 * BLOB_CHUNK_BYTES)

        async def flood() -> None:
            while True:
                await one.mesh.read_blob(two.id, NAME, 0, 8 * BLOB_CHUNK_BYTES)

        nursery.start_soon(flood)
        for number in range(20):
            assert await one.mesh.request(two.id, b"%d" % number, 5) == b"%d" % number
        nursery.cancel_scope.cancel()


async def test_reader_that_cannot_dial_is_served_back(clock: Any, world: World, grid: Grid) -> None:
    """Behind a NAT only one side can dial; blobs go both ways all the same."""
    async with peers(world, grid, 2) as (one, two):
        two.known.clear()  # two knows no address of one
        one.tells_address = False
        one.handler.blobs[NAME] = b"blob of one"
        await one.mesh.connect(two.id)
        await two.handler.until(lambda: two.handler.count("up"))
        assert await two.mesh.read_blob(one.id, NAME, 0, 11) == b"blob of one"
        assert await two.mesh.read_blob(one.id, NAME, 0, 4) == b"blob"
        assert two.mesh.counters["accepted"] == 2


async def test_unreachable(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await two.stop()
        with pytest.raises(PeerUnreachable):
            await one.mesh.read_blob(two.id, NAME, 0, 1)


async def test_server_dies_in_the_middle(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        two.handler.blobs[NAME] = bytes(20 * BLOB_CHUNK_BYTES)
        chunks = one.mesh.blob_chunks(two.id, NAME, 0, 20 * BLOB_CHUNK_BYTES)
        await anext(chunks)
        await two.stop()
        with pytest.raises(PeerUnreachable):
            async for _ in chunks:
                pass


async def test_hanging_server_is_given_up(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 2) as (one, two):

        async def read(peer: PeerId, blob: bytes, offset: int, length: int) -> bytes:
            await trio.sleep_forever()
            return b""

        two.handler.read_blob = read  # type: ignore[method-assign]
        with pytest.raises(PeerUnreachable, match="took over"):
            await one.mesh.read_blob(two.id, NAME, 0, 1)


async def test_idle_link_is_closed(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 2) as (one, two):
        two.handler.blobs[NAME] = bytes(10)
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        await one.mesh.read_blob(two.id, NAME, 0, 10)
        assert trio.lowlevel.current_statistics().tasks_living > tasks
        await trio.sleep(BLOB_IDLE_S + 10)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert await one.mesh.read_blob(two.id, NAME, 0, 10) == bytes(10)


async def test_abandoned_stream_frees_its_places(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        two.handler.blobs[NAME] = bytes(8 * BLOB_CHUNK_BYTES)
        for _ in range(20):  # more chunks left unread than a link may have outstanding
            await anext(one.mesh.blob_chunks(two.id, NAME, 0, 8 * BLOB_CHUNK_BYTES))
        with trio.fail_after(10):
            assert len(await one.mesh.read_blob(two.id, NAME, 0, 1)) == 1


async def test_200_megabytes_over_loopback(grid: Grid) -> None:
    async with peers(World(memory=False), grid, 2) as (one, two):
        data = two.handler.blobs[NAME] = random.Random(3).randbytes(1 << 20) * 200
        place = 0
        async for chunk in one.mesh.blob_chunks(two.id, NAME, 0, len(data)):
            assert chunk == data[place : place + len(chunk)]
            place += len(chunk)
        assert place == len(data)
