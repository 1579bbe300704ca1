"""A peer in a process of its own, for tests that kill it: `python -m tests.transport.child NUMBER` prints its port."""

from __future__ import annotations

import sys
import time

import trio

from dht.network import RealNetwork
from grid.transport.mesh import Mesh
from tests.transport.support import Grid, Recorder


async def main(number: int) -> None:
    handler = Recorder()
    handler.blobs[b"n" * 32] = bytes(64 << 20)
    mesh = Mesh(membership=Grid(now_s=time.time()).member(number), network=RealNetwork(), handler=handler)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(mesh.run, ("127.0.0.1", 0))
        print(address[1], flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
