"""Grids for the tests: any number of nodes on a `MemoryNetwork` in virtual time, or on loopback."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from dht.core.identity import Identity
from dht.core.membership import ROLES, Membership, Role
from dht.memory import MemoryNetwork
from dht.network import Address, Network, RealNetwork
from dht.node import Node
from dht.tuning import Tuning

EPOCH_S = 1_700_000_000.0
PORT = 4743


def wall_clock() -> float:
    """Unix time that follows the virtual clock."""
    return EPOCH_S + trio.current_time()


def identity(number: int) -> Identity:
    return Identity.from_seed(random.Random(number).randbytes(32))


ROOT = identity(1_000_000)


def founder(now_s: float = EPOCH_S) -> Membership:
    return Membership.found(identity(0), ROOT, now_s)


def member(of: Membership, number: int, roles: Role = ROLES["member"], now_s: float = EPOCH_S) -> Membership:
    key = identity(number)
    return Membership(of.grid, key, of.admit(key.public, roles, b"", now_s))


async def until(condition: Callable[[], bool], timeout_s: float = 30.0, step_s: float = 0.05) -> float:
    """Wait for `condition`; returns how long it took."""
    start_s = trio.current_time()
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is waited for is many nodes' state)
            await trio.sleep(step_s)
    return trio.current_time() - start_s


@dataclass
class Grid:
    """Nodes that run in `nursery`; each has its scope, so that any can be stopped."""

    nursery: trio.Nursery
    network: Callable[[int], Network]
    host: Callable[[int], str]
    port: int
    clock: Callable[[], float]
    tuning: Tuning | None = None
    memory: MemoryNetwork | None = None
    nodes: dict[int, Node] = field(default_factory=dict)
    scopes: dict[int, trio.CancelScope] = field(default_factory=dict)
    members: dict[int, Membership] = field(default_factory=dict)

    def membership(self, number: int) -> Membership:
        if number not in self.members:
            now_s = self.clock()
            self.members[number] = founder(now_s) if number == 0 else member(self.membership(0), number, now_s=now_s)
        return self.members[number]

    def make(self, number: int, *, state_path: Path | None = None, advertise: Address | None = None) -> Node:
        return Node(
            membership=self.membership(number),
            network=self.network(number),
            address=(self.host(number), self.port),
            advertise=advertise,
            rng=random.Random(number + 1_000),
            clock=self.clock,
            state_path=state_path,
            info=lambda: f"node {number}".encode(),
            tuning=self.tuning,
        )

    async def start(
        self,
        number: int,
        bootstrap: list[Address] | None = None,
        *,
        node: Node | None = None,
        state_path: Path | None = None,
    ) -> Node:
        """Start a node; by default it bootstraps from node 0."""
        if bootstrap is None:
            bootstrap = [self.nodes[0].address] if number != 0 else []
        if node is None:
            node = self.make(number, state_path=state_path)
        self.nodes[number] = node
        scope = self.scopes[number] = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[Address]) -> None:
            with scope:
                await node.run(bootstrap=bootstrap, task_status=task_status)

        await self.nursery.start(run)
        return node

    async def start_all(self, count: int) -> None:
        for number in range(count):
            await self.start(number)

    def stop(self, number: int, *, polite: bool = True) -> None:
        """End a node, without a word unless `polite`."""
        node = self.nodes.pop(number)
        node.polite = polite
        self.scopes.pop(number).cancel()

    def knows(self, number: int) -> int:
        return len(self.nodes[number].contacts())

    async def complete(self, timeout_s: float = 30.0) -> float:
        """Until everybody knows everybody (as far as their tables hold them)."""
        wanted = len(self.nodes) - 1
        return await until(lambda: all(self.knows(n) >= wanted for n in self.nodes), timeout_s)


def memory_grid(nursery: trio.Nursery, seed: int = 1, tuning: Tuning | None = None, **link: float) -> Grid:
    world = MemoryNetwork(random.Random(seed), **link)
    return Grid(nursery, lambda n: world.host(f"h{n}"), lambda n: f"h{n}", PORT, wall_clock, tuning=tuning, memory=world)


def loopback_grid(nursery: trio.Nursery, tuning: Tuning | None = None) -> Grid:
    real = RealNetwork()
    return Grid(nursery, lambda _: real, lambda _: "127.0.0.1", 0, time.time, tuning=tuning)
