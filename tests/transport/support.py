"""A small grid for transport tests: members, a world of either kind, a handler that remembers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dht.core.identity import Identity, PeerId
from dht.core.membership import Chain, Membership, Role
from dht.memory import MemoryNetwork
from dht.network import Address, Network, RealNetwork
from grid.core.noise import Buffer
from grid.transport.errors import RemoteError
from grid.transport.hello import Credentials, Hello, HelloInfo
from grid.transport.mesh import Mesh

NOW_S = 1_800_000_000.0
MEMBER = Role.SUBMIT | Role.WORK | Role.INVITE


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


class Grid:
    """Members by number; their keys, hence ids, are the same in each run."""

    def __init__(self, root: int = 1000, now_s: float = NOW_S) -> None:
        self.now_s = now_s
        self.root = identity(root)
        self.founder = Membership.found(identity(root + 1), self.root, now_s)

    def member(self, number: int, lifetime_s: int = 86_400) -> Membership:
        key = identity(number)
        chain = self.founder.admit(key.public, MEMBER, b"", self.now_s, lifetime_s)
        return Membership(self.root.public, key, chain)

    def credentials(self, number: int, now_s: float = NOW_S, **changes: Any) -> Credentials:
        member = self.member(number)
        options: dict[str, Any] = {
            "chain": lambda: member.chain,
            "check": lambda chain: member.check(chain, now_s),
            "describe": lambda: HelloInfo(name=f"peer-{number}"),
            "entropy": random.Random(number).randbytes,
        }
        return Credentials(member.grid, member.identity, **(options | changes))


class World:
    """Real sockets on loopback, or memory when `memory` is set."""

    def __init__(self, memory: bool, **link: Any) -> None:
        self.memory = MemoryNetwork(random.Random(7), **link) if memory else None

    def network(self, name: str) -> Network:
        return self.memory.host(name) if self.memory is not None else RealNetwork()

    def any_port(self, name: str) -> Address:
        return (name if self.memory is not None else "127.0.0.1", 0)


class Recorder:
    """A MeshHandler that remembers everything; what it does with requests, blobs and joiners can be replaced."""

    def __init__(self) -> None:
        self.events: list[tuple[str, PeerId, Any]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.answer: Callable[[PeerId, bytes], Awaitable[bytes]] = self._echo
        self.hold: Callable[[PeerId, bytes], Awaitable[None]] | None = None
        self.admitter: Callable[[bytes, bytes], Chain] | None = None
        self._changed = trio.Event()

    def add(self, kind: str, peer: PeerId, value: Any) -> None:
        self.events.append((kind, peer, value))
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], object], within_s: float = 10) -> None:
        with trio.fail_after(within_s):
            while not condition():
                await self._changed.wait()

    def messages(self, peer: PeerId | None = None) -> list[bytes]:
        return [value for kind, who, value in self.events if kind == "message" and peer in (None, who)]

    def kinds(self, peer: PeerId) -> list[str]:
        return [kind for kind, who, _ in self.events if who == peer]

    def got(self, kind: str, count: int) -> Callable[[], bool]:
        """A condition for `until`."""
        return lambda: self.count(kind) >= count

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)

    async def _echo(self, peer: PeerId, message: bytes) -> bytes:
        return message

    async def on_message(self, peer: PeerId, message: bytes) -> None:
        if self.hold is not None:
            await self.hold(peer, message)
        self.add("message", peer, message)

    async def on_request(self, peer: PeerId, message: bytes) -> bytes:
        return await self.answer(peer, message)

    async def on_up(self, peer: PeerId, hello: Hello) -> None:
        self.add("up", peer, hello)

    async def on_down(self, peer: PeerId, why: str) -> None:
        self.add("down", peer, why)

    async def admit(self, invite: bytes, key: bytes, hello: Hello) -> Chain:
        self.add("admit", hello.id, (invite, key, hello))
        if self.admitter is None:
            raise RemoteError("unknown", "this grid knows no such invite")
        return self.admitter(invite, key)

    async def read_blob(self, peer: PeerId, blob: bytes, offset: int, length: int) -> Buffer | None:
        data = self.blobs.get(blob)
        return None if data is None or offset + length > len(data) else memoryview(data)[offset : offset + length]


class Peer:
    """One mesh with its recorder. `await peer.start(nursery)` runs it; `peer.stop()` ends it without a word."""

    def __init__(self, world: World, membership: Membership, name: str, **options: Any) -> None:
        self.world = world
        self.name = name
        self.handler = Recorder()
        self.id = membership.identity.id
        self.address: Address = world.any_port(name)
        self.known: dict[PeerId, list[Address]] = {}
        self.located = 0
        self.tells_address = True
        seed = int.from_bytes(self.id[:4], "big")
        began = trio.current_time()
        defaults: dict[str, Any] = {
            "locate": self._locate,
            "describe": self._describe,
            "clock": lambda: NOW_S + trio.current_time() - began,
            "rng": random.Random(seed),
            "entropy": random.Random(seed + 1).randbytes,
        }
        self.mesh = Mesh(membership=membership, network=world.network(name), handler=self.handler, **(defaults | options))
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def _locate(self, peer: PeerId) -> list[Address]:
        self.located += 1
        return self.known.get(peer, [])

    def _describe(self) -> HelloInfo:
        host, port = self.address
        return HelloInfo(address=f"{host}:{port}" if port and self.tells_address else "", name=self.name)

    async def start(self, nursery: trio.Nursery) -> Address:
        self.address = await nursery.start(self._run)
        return self.address

    async def _run(self, task_status: trio.TaskStatus[Address]) -> None:
        with self._scope:
            await self.mesh.run(self.address, task_status=task_status)
        self._stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    def knows(self, *others: Peer) -> None:
        for other in others:
            self.known[other.id] = [other.address]
