"""Processes die at each named point of the ledger, lose power, lose mail: nothing acknowledged is lost, nobody votes twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from grid.core.errors import GridError, NotLeadingError
from grid.core.job import JobId, job_id
from grid.core.raft_effects import Point
from tests.replica.world import Host, World, output, world_of

POINTS = [f"before {point}" for point in Point] + [f"after {point}" for point in Point if point.startswith("persist")]


class Story:
    """What happens to a job while somebody dies: facts are said until they are acknowledged, whoever leads."""

    def __init__(self, world: World, power: bool) -> None:
        self.world = world
        self.power = power
        self.job = JobId(b"")
        self.said: list[bytes] = []
        self.reviving: list[Host] = []

    async def revive(self) -> None:
        """Whoever died starts again a second later."""
        while True:
            await trio.sleep(0.1)
            while self.world.killed:
                host = self.world.killed.pop()
                self.reviving.append(host)
                await self.world.until(lambda host=host: not host.up)  # type: ignore[misc]
                if self.power:
                    host.disk.lose_power(self.world.rng)
                await trio.sleep(1)
                self.reviving.remove(host)
                await self.world.start(host.number)

    async def start(self, host: Host) -> None:
        """Unless it runs, or will be revived."""
        if not host.up and host not in self.world.killed and host not in self.reviving:
            await self.world.start(host.number)

    async def found(self) -> None:
        """Until a founding returns; one that was cut short may or may not go on."""
        for number in range(10):
            await self.world.until(lambda: self.world[1].up)
            spec, signed = self.world.spec(b"%d" % number)
            self.job = job_id(signed.payload)
            replicas = self.world[1].replicas
            assert replicas is not None
            try:
                with trio.fail_after(30):
                    await replicas.found(spec, signed, replicas.choose(5))
            except (GridError, trio.TooSlowError):
                continue
            return
        raise AssertionError("no founding ever returns")

    async def say(self, data: bytes) -> None:
        """Return when it is acknowledged."""
        at = sum(map(len, self.said))
        while True:
            _, replica = await self.world.led(self.job, 60)
            try:
                if replica.chronicle.output_length[1] == at:
                    replica.propose([output(at, data)])
                with trio.move_on_after(20):
                    await replica.committed(replica.propose([output(at, b"")]))
                    break
            except NotLeadingError:
                await trio.sleep(0.05)
        self.said.append(data)

    async def tell(self) -> None:
        """Elections, a transfer, a member so far behind that it needs a snapshot, a new member."""
        world = self.world
        await self.found()
        for number in range(3):
            await self.say(b"%d" % number)
        host, replica = await world.led(self.job)
        behind = next(each for each in world.hosts if each is not host)
        if behind.up:
            await world.kill(behind.number, power=self.power)
        big = b"x" * (250 << 10)
        for _ in range(20):
            _, replica = await world.led(self.job, 60)
            replica.raft.log.trail_bytes_max = 0
            replica.raft.snapshot_chunk_bytes = 256 << 10  # several to a snapshot
            await self.say(big)
        await self.start(behind)
        await trio.sleep(1)
        _, replica = await world.led(self.job, 60)
        replica.transfer()
        await self.say(b"a")
        host, _ = await world.led(self.job, 60)
        await world.kill(host.number, power=self.power)
        await self.say(b"b")
        await self.start(host)
        await self.say(b"c")

    def check(self) -> None:
        """In the end all know all that was acknowledged, and each epoch had one leader."""
        leaders: dict[tuple[bytes, int], Host] = {}
        for host in self.world.hosts:
            for said in host.said:
                if said[0] == "took over":
                    assert leaders.setdefault(said[1:], host) is host
            assert not any(said[0] == "gone" and said[2] in ("broken", "failed") for said in host.said)


async def tell(folder: Path, kill_at: str, power: bool, seed: int) -> World:
    async with world_of(folder, 3, seed) as world:
        story = Story(world, power)
        world.kill_at = kill_at
        async with trio.open_nursery() as nursery:
            nursery.start_soon(story.revive)
            with trio.fail_after(600):
                await story.tell()
                total = sum(map(len, story.said))
                await world.until(lambda: all(_length(host, story.job) == total for host in world.hosts), 60)
            nursery.cancel_scope.cancel()
        story.check()
        return world


def _length(host: Host, job: JobId) -> int:
    replica = host.replica(job)
    return replica.chronicle.output_length[1] if replica is not None else -1


@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_death_at_each_point_loses_nothing(tmp_path: Path, autojump_clock: MockClock, point: str, power: bool) -> None:
    world = await tell(tmp_path, point, power, seed=1)
    assert world.kill_at == "", f"nothing ever came to {point}"


async def test_random_deaths_losses_and_power_cuts_lose_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        await chaos(folder, seed)


async def chaos(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with world_of(folder, 5, seed) as world:
        story = Story(world, power=False)
        await story.found()
        world.loss = 0.05
        async with trio.open_nursery() as nursery:
            nursery.start_soon(story.revive)
            for number in range(30):
                action = rng.random()
                down = [host for host in world.hosts if not host.up]
                if action < 0.3 and len(down) < 2:
                    host = rng.choice([host for host in world.hosts if host.up])
                    await world.kill(host.number, power=rng.random() < 0.5)
                elif action < 0.6 and down:
                    await story.start(rng.choice(down))
                elif action < 0.7 and not down:
                    a, b = rng.sample(range(1, 6), 2)
                    world.cut = {(a, b)}
                elif action < 0.8:
                    world.cut.clear()
                elif action < 0.9:
                    world.kill_at = rng.choice(POINTS)
                await story.say(b"%d" % number)
                await trio.sleep(rng.random() * 2)
            world.kill_at = ""
            world.loss = 0.0
            world.cut.clear()
            await trio.sleep(3)
            for host in world.hosts:
                await story.start(host)
            total = sum(map(len, story.said))
            await world.until(lambda: all(_length(host, story.job) == total for host in world.hosts), 120)
            nursery.cancel_scope.cancel()
        story.check()
