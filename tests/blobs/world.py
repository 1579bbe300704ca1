"""Peers that hold a blob and answer honestly, slowly, falsely or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from dht.core.identity import PeerId
from grid.blobs.blob import (
    BLOB_ID_BYTES,
    CHUNK_BYTES,
    blob_id,
)
from grid.transport import errors as transport
from tests.blobs.helpers import bytes_of

Behaviour = Callable[["World", bytes, int, int], Awaitable[bytes]]

CHUNKS = 6
DATA = bytes_of((CHUNKS - 1) * CHUNK_BYTES + 777)
BLOB = blob_id(DATA)
OTHER = bytes(len(DATA))
A, B, C, D = (PeerId(bytes([n]) * 20) for n in range(1, 5))


def hashes_of(data: bytes) -> bytes:
    return b"".join(blob_id(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES))


LISTS = {DATA: hashes_of(DATA), OTHER: hashes_of(OTHER)}


def answer(data: bytes, name: bytes, offset: int, length: int) -> bytes:
    if data is OTHER and len(name) == BLOB_ID_BYTES:
        return bytes(length)  # also where the blob is longer than OTHER
    source = data if len(name) == BLOB_ID_BYTES else LISTS.get(data) or hashes_of(data)
    return source[offset : offset + length]


async def honest(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(world.data, name, offset, length)


async def lying_chunks(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(world.data if len(name) > BLOB_ID_BYTES else OTHER, name, offset, length)


async def lying_list(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(OTHER if len(name) > BLOB_ID_BYTES else world.data, name, offset, length)


async def lying_throughout(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep(world.latency_s)
    return answer(OTHER, name, offset, length)


async def short(world: World, name: bytes, offset: int, length: int) -> bytes:
    return answer(world.data, name, offset, length)[:-1]


async def missing(world: World, name: bytes, offset: int, length: int) -> bytes:
    raise transport.BlobMissing(A, name)


async def gone(world: World, name: bytes, offset: int, length: int) -> bytes:
    raise trio.BrokenResourceError("connection reset\nby peer")


async def stalled(world: World, name: bytes, offset: int, length: int) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def stalled_after_list(world: World, name: bytes, offset: int, length: int) -> bytes:
    return await (honest if len(name) > BLOB_ID_BYTES else stalled)(world, name, offset, length)


class World:
    """Peers by behaviour, and what they were asked for."""

    def __init__(self, data: bytes = DATA, **peers: Behaviour) -> None:
        self.data = data
        self.latency_s = 0.01
        self.peers = dict(zip((A, B, C, D), peers.values(), strict=False))
        self.asked: list[tuple[PeerId, int]] = []  # chunks only: peer, offset
        self.in_flight: Counter[PeerId] = Counter()
        self.peak = 0

    async def read(self, peer: PeerId, name: bytes, offset: int, length: int) -> bytes:
        assert 0 < length <= CHUNK_BYTES
        if len(name) == BLOB_ID_BYTES:
            self.asked.append((peer, offset))
        self.in_flight[peer] += 1
        self.peak = max(self.peak, self.in_flight.total())
        try:
            return await self.peers[peer](self, name, offset, length)
        finally:
            self.in_flight[peer] -= 1

    @property
    def holders(self) -> list[PeerId]:
        return list(self.peers)

    def asked_of(self, peer: PeerId) -> int:
        return sum(1 for each, _ in self.asked if each == peer)
