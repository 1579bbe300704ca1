"""Blobs between two processes over the encrypted transport, beside plain TCP: `benchmarks.transport`'s parts, for a table."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import Any

import trio

from benchmarks import transport
from dht.core.identity import Identity
from dht.core.membership import Membership, Role
from dht.network import RealNetwork
from grid.transport.mesh import Mesh

ROUNDS = 3


def measure(megabytes: int) -> dict[str, float]:
    """MB/s of both, interleaved, and the round trips of small messages."""
    root, one, two = Identity.generate(), Identity.generate(), Identity.generate()
    first = Membership.found(one, root, time.time())
    chain = first.admit(two.public, Role.SUBMIT | Role.WORK, b"", time.time())
    ours, theirs = multiprocessing.Pipe()
    context: Any = multiprocessing.get_context("spawn")
    process = context.Process(target=transport.serve, args=(theirs, (root.public, one.seed, first.chain)))
    process.start()
    found: dict[str, float] = {}

    async def run() -> None:
        address, echo = ours.recv(), ours.recv()
        mesh = Mesh(membership=Membership(root.public, two, chain), network=RealNetwork(), handler=transport.Server())
        async with trio.open_nursery() as nursery:
            await nursery.start(mesh.run, transport.LOOPBACK)
            peer = await mesh.connect_address(address)
            blobs, plains = [], []
            for _ in range(ROUNDS):
                plains.append(await transport.plain_rate(echo, megabytes))
                blobs.append(await transport.blob_rate(mesh, peer, megabytes))
            found.update(mb_s=statistics.median(blobs), plain_tcp_mb_s=statistics.median(plains))
            found["round_trip_us"], _ = await transport.round_trips(mesh, peer, 500)
            found["plain_round_trip_us"], _ = await transport.plain_round_trips(echo, 500)
            nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    finally:
        ours.send("stop")
        process.join()
    return found
