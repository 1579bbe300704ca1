"""Majorities die, halves go on, all comes back: in the end one branch, one leader, everybody in it."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import trio
from trio.testing import MockClock

from grid.core.errors import NotLeadingError
from grid.core.job import JobId
from grid.core.recovery import Standing, wins
from tests.replica.world import Host, World, output, world_of

FORGET_S = 20.0
"""News of a leader not heard for so long gives way to any other's."""


class Gossip:
    """Leaders tell how their job stands, as the peers' gossip does; who hears it believes what wins."""

    def __init__(self, world: World, job: JobId) -> None:
        self.world = world
        self.job = job
        self.version: dict[tuple[bytes, int], int] = {}

    async def run(self) -> None:
        while True:
            for host in self.world.hosts:
                replica = host.replica(self.job)
                if replica is not None and replica.leads():
                    key = replica.branch.name, replica.term
                    self.version[key] = self.version.get(key, 0) + 1
                    for other in self.world.hosts:
                        self.hear(other, host, (replica.branch, replica.term, self.version[key], False))
            await trio.sleep(5)

    def hear(self, host: Host, leader: Host, news: Standing) -> None:
        if not host.up or not self.world.open(leader, host):
            return
        known = host.news.get(self.job)
        if known is None or wins(news, known[0]) or trio.current_time() - known[2] > FORGET_S:
            host.news[self.job] = news, leader.id, trio.current_time()
        assert host.replicas is not None
        host.replicas.heard(self.job, host.news[self.job][0])


async def upheaval(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with world_of(folder, 5, seed) as world:
        job = await world.found()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Gossip(world, job).run)
            for _ in range(12):
                action = rng.random()
                down = [host for host in world.hosts if not host.up]
                if action < 0.35 and len(down) < 4:
                    victims = rng.sample([host for host in world.hosts if host.up], rng.randrange(1, 5 - len(down)))
                    await world.kill(*(host.number for host in victims), power=rng.random() < 0.5)
                elif action < 0.6 and down:
                    for host in rng.sample(down, rng.randrange(1, len(down) + 1)):
                        await world.start(host.number)
                elif action < 0.75:
                    world.isolate(*rng.sample(range(1, 6), rng.randrange(1, 4)))
                elif action < 0.8:
                    world.cut.add((rng.randrange(1, 6), rng.randrange(1, 6)))
                else:
                    world.cut.clear()
                for host in world.hosts:
                    replica = host.replica(job)
                    if replica is not None and replica.leads():
                        with contextlib.suppress(NotLeadingError):
                            replica.propose([output(replica.chronicle.output_length[1], b"x")])
                await trio.sleep(rng.uniform(0.1, 12))
            world.cut.clear()
            for host in world.hosts:
                if not host.up:
                    await world.start(host.number)
            await world.until(lambda: _one(world, job), 240)
            nursery.cancel_scope.cancel()


def _one(world: World, job: JobId) -> bool:
    """One branch, held by all five, all of one state."""
    held = [replica for host in world.hosts if host.replicas is not None for replica in host.replicas.all()]
    if len(held) != 5 or len({replica.branch.name for replica in held}) != 1 or world.leader(job) is None:
        return False
    states = {replica.chronicle.snapshot() for replica in held}
    return len(states) == 1 and all(len(replica.voters) == 5 for replica in held)


async def test_after_any_upheaval_one_branch_is_left(tmp_path: Path, autojump_clock: MockClock) -> None:
    for seed in (0, 1, 2, 5, 18, 136):  # the last three found faults once
        folder = tmp_path / str(seed)
        folder.mkdir()
        await upheaval(folder, seed)
