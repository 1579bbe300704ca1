"""What befalls a world: processes of faults, each a coroutine that acts until it is cancelled.

Options are a scenario's; times are seconds or distributions of them (`simulations.chance`). Rules: what a fault began it ends
itself, or `heal` does; who is hit is drawn from the fault's own generator, among those that are up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from grid.core import limits
from grid.core.raft_effects import Point
from grid.journal_files import POINTS as JOURNAL_POINTS
from simulations.chance import MODELS, draw, residual
from simulations.disk import Pace

if TYPE_CHECKING:
    from simulations.host import Host
    from simulations.world import World

Kind = Callable[["Fault"], Awaitable[None]]


class Fault:
    """One process of faults in a world."""

    def __init__(self, world: World, number: int, options: dict[str, Any]) -> None:
        self.world = world
        self.rng = random.Random(f"{world.seed} fault {number}")
        self.options = options

    def draw(self, name: str, default: Any) -> float:
        """An option that is a distribution."""
        return draw(self.rng, self.options.get(name, default))

    def chance(self, name: str, default: float = 0.0) -> bool:
        """An option that is a chance."""
        return self.rng.random() < float(self.options.get(name, default))

    @property
    def up(self) -> list[Host]:
        """Hosts whose peers run."""
        return [host for host in self.world.hosts if host.up and not host.killed and not host.freezer.frozen]

    def victim(self) -> Host | None:
        """Whom `who` means just now: "any", "leader", "helper" (no leader), "submitter", or a host's number."""
        who = self.options.get("who", "any")
        hosts = self.up
        if isinstance(who, int):
            hosts = [host for host in hosts if host.number == who]
        elif who == "leader":
            hosts = [host for host in hosts if leads(host)]
        elif who == "helper":
            hosts = [host for host in hosts if not leads(host)]
        elif who == "submitter":
            hosts = [host for host in hosts if any(job.host is host for job in self.world.jobs)]
        return self.rng.choice(hosts) if hosts else None

    async def rounds(self, act: Callable[[], Awaitable[None]]) -> None:
        """`act` `count` times (0: for ever), first after `first`, then every `every` seconds."""
        await trio.sleep(self.draw("first", ["uniform", 2.5, 8]))
        left = int(self.options.get("count", 0)) or 1 << 30
        async with trio.open_nursery() as nursery:
            while left:
                left -= 1
                nursery.start_soon(act)
                await trio.sleep(self.draw("every", ["exp", 8]))

    async def down(self, host: Host, back_s: float) -> None:
        """Kill a host's peer, or its machine; start it again later (back_s < 0: `heal` does)."""
        power = self.chance("power", 0.3)
        with trio.CancelScope(shield=True):
            await host.kill(power=power)
        self.world.count("kills")
        if self.chance("damage"):
            self.damage(host)
        if back_s >= 0:
            await trio.sleep(back_s)
            self.start(host)

    def damage(self, host: Host) -> None:
        """Spoil what is on the disk of a machine that is down: a bit of a journal, or all of it."""
        paths = sorted(path for path, inode in host.disk.names.items() if inode.seen)
        if not paths:
            return
        self.world.count("damaged disks")
        if self.rng.random() < 0.5:
            for path in paths:
                host.disk.unlink(path)
        else:
            path = self.rng.choice(paths)
            host.disk.flip(path, self.rng.randrange(8 * len(host.disk.names[path].seen)))
        self.world.trace.add("damage", host.name)

    def start(self, host: Host) -> None:
        """Switch a host on if it is off."""
        if not host.up:
            host.start(self.world.nursery)


def leads(host: Host) -> bool:
    """Whether its peer leads a job that is not final."""
    return host.peer is not None and any(lead.view.outcome is None for lead in host.peer.jobs.led.values())


async def kill(fault: Fault) -> None:
    """Peers are killed: `who`, `every`, `back`, `power` (chance that it is the machine), `damage` (chance, of its journals)."""

    async def act() -> None:
        host = fault.victim()
        if host is not None:
            await fault.down(host, fault.draw("back", ["exp", 6]))

    await fault.rounds(act)


async def churn(fault: Fault) -> None:
    """Every host comes and goes as a fit has it: `model`, `hour_s` (seconds that an hour of the fit takes here)."""
    up_h, down_h = MODELS[fault.options["model"]]
    hour_s = float(fault.options.get("hour_s", 5.0))

    async def live(host: Host) -> None:
        await trio.sleep(residual(fault.rng, up_h) * hour_s)
        while True:
            if host.up:
                await fault.down(host, draw(fault.rng, down_h) * hour_s)
            await trio.sleep(draw(fault.rng, up_h) * hour_s)

    async with trio.open_nursery() as nursery:
        for host in fault.world.hosts:
            nursery.start_soon(live, host)


async def preempt(fault: Fault) -> None:
    """Spot machines: each is told `notice` seconds before it goes, leaves if it can, and another comes in its place."""

    async def act() -> None:
        host = fault.victim()
        if host is None:
            return
        with trio.move_on_after(fault.draw("notice", 2.0)):
            await host.leave()
        with trio.CancelScope(shield=True):
            await host.kill(power=True)
        fault.world.count("preemptions")
        await trio.sleep(fault.draw("back", ["exp", 10]))
        fault.start(host)

    await fault.rounds(act)


async def partition(fault: Fault) -> None:
    """The network splits: `shape` "halves", "one" (a host, `who`, from all others) or "link" (one between two hosts), `one_way`
    (chance), `last` seconds."""

    async def act() -> None:
        world = fault.world
        names = [host.name for host in world.hosts]
        shape = fault.options.get("shape", "halves")
        if shape == "link":
            names = fault.rng.sample(names, 2)
            near = names[:1]
        elif shape == "one":
            host = fault.victim()
            if host is None:
                return
            near = [host.name]
        else:
            near = fault.rng.sample(names, fault.rng.randint(1, len(names) - 1))
        far = [name for name in names if name not in near]
        one_way = fault.chance("one_way")
        if one_way and fault.rng.random() < 0.5:
            near, far = far, near
        world.trace.add("cut", "+".join(near), "one way" if one_way else "both ways")
        world.count("partitions")
        world.network.partition(near, far, one_way)
        await trio.sleep(fault.draw("last", ["exp", 6]))
        world.trace.add("mend", "+".join(near))
        world.network.heal(near, far)

    await fault.rounds(act)


async def rolling(fault: Fault) -> None:
    """All hosts are restarted one after the other, politely (`grid leave`) or not (chance `rude`)."""
    await trio.sleep(fault.draw("first", ["uniform", 2.5, 5]))
    while True:
        for host in fault.world.hosts:
            if host.up:
                if fault.chance("rude", 0.3):
                    await fault.down(host, -1)
                else:
                    with trio.CancelScope(shield=True):
                        await host.leave()
                await trio.sleep(fault.draw("back", ["uniform", 0.2, 2]))
                fault.start(host)
            await trio.sleep(fault.draw("every", ["uniform", 1, 5]))


async def poweroff(fault: Fault) -> None:
    """All machines lose power at once, and come back in any order: `stagger` seconds each, all but `stays_off` of them."""

    async def act() -> None:
        world = fault.world
        async with trio.open_nursery() as nursery:
            for host in fault.up:
                nursery.start_soon(fault.down, host, -1)
        await trio.sleep(fault.draw("back", ["uniform", 1, 10]))
        hosts = fault.rng.sample(world.hosts, len(world.hosts) - int(fault.options.get("stays_off", 0)))
        for host in hosts:
            fault.start(host)
            await trio.sleep(fault.draw("stagger", ["exp", 1]))

    fault.options.setdefault("power", 1.0)
    fault.options.setdefault("every", ["uniform", 15, 30])
    await fault.rounds(act)


async def disk(fault: Fault) -> None:
    """A disk becomes slow, or fails, for a while: `stall` (chance of a step), `stall_s`, `failure` (chance of an fsync)."""

    async def act() -> None:
        host = fault.victim()
        if host is None:
            return
        names = [name for name in Pace.__dataclass_fields__ if name in fault.options]
        before = {name: getattr(host.pace, name) for name in names}
        for name in names:
            setattr(host.pace, name, float(fault.options[name]))
        await trio.sleep(fault.draw("last", ["exp", 10]))
        for name, value in before.items():
            setattr(host.pace, name, value)

    await fault.rounds(act)


async def clock(fault: Fault) -> None:
    """A wall clock jumps, by up to `jump_s` either way."""

    async def act() -> None:
        host = fault.victim()
        if host is not None:
            host.wall_offset_s += fault.rng.uniform(-1, 1) * float(fault.options.get("jump_s", 7200.0))
            fault.world.trace.add("clock", host.name, f"{host.wall_offset_s:.0f}")

    await fault.rounds(act)


async def suspend(fault: Fault) -> None:
    """A machine's tasks stand still for `last` seconds, workers and all; the clocks go on."""

    async def act() -> None:
        host = fault.victim()
        if host is None:
            return
        fault.world.trace.add("suspend", host.name)
        fault.world.count("suspensions")
        host.freezer.freeze()
        await trio.sleep(fault.draw("last", ["exp", 8]))
        fault.world.trace.add("resume", host.name)
        host.freezer.thaw()

    await fault.rounds(act)


async def flap(fault: Fault) -> None:
    """One host is killed again and again as soon as it is back: `stay`, `back` seconds."""
    host = fault.rng.choice(fault.world.hosts)
    await trio.sleep(fault.draw("first", ["uniform", 2.5, 5]))
    while True:
        if host.up:
            await fault.down(host, fault.draw("back", ["uniform", 0.1, 2]))
        await trio.sleep(fault.draw("stay", ["exp", 2]))
        fault.start(host)


async def children(fault: Fault) -> None:
    """A worker process dies; never so often with the same task that the task would be blamed (`RETRIES_LOST_MAX`)."""
    deaths: Counter[tuple[int, int]] = Counter()

    async def act() -> None:
        found = [child for host in fault.up for child in host.children if child.role == "worker"]
        found = [child for child in found if deaths[child.task[:2]] < limits.RETRIES_LOST_MAX - 1]
        if found:
            child = fault.rng.choice(found)
            deaths[child.task[:2]] += 1
            child.die(-9)
            fault.world.count("worker deaths")

    await fault.rounds(act)


async def slow(fault: Fault) -> None:
    """A machine is `factor` times as slow for `last` seconds."""

    async def act() -> None:
        host = fault.victim()
        if host is not None:
            host.slow = float(fault.options.get("factor", 20.0))
            await trio.sleep(fault.draw("last", ["exp", 15]))
            host.slow = 1.0

    await fault.rounds(act)


async def point(fault: Fault) -> None:
    """Whoever comes by one named point of the ledger, the vote or the journal dies there: `count` times, each time after having
    let up to `skip` pass. The point is the world's seed's, so that a swarm goes through all of them."""
    world = fault.world
    chosen = POINTS[world.seed % len(POINTS)]
    world.trace.add("point", chosen.replace(" ", "-"))
    left, skip = int(fault.options.get("count", 3)), 0
    fallen: list[Host] = []
    news = trio.Event()

    def reached(host: Host, at: str) -> bool:
        nonlocal left, skip
        if at != chosen or left <= 0 or world.healed:
            return False
        if skip > 0:
            skip -= 1
            return False
        left -= 1
        skip = fault.rng.randint(0, int(fault.options.get("skip", 30)))
        host.crash(power=fault.chance("power", 0.5))
        world.count("deaths at points")
        fallen.append(host)
        news.set()
        return True

    skip = fault.rng.randint(0, int(fault.options.get("skip", 30)))
    if any(name in chosen for name in ("founding", "create", "open")):
        skip = fault.rng.randint(0, 2)  # passed a few times in all
    world.dies_at = reached
    async with trio.open_nursery() as nursery:
        while True:
            await news.wait()
            news = trio.Event()
            while fallen:
                nursery.start_soon(_back, fault, fallen.pop())


async def _back(fault: Fault, host: Host) -> None:
    with trio.CancelScope(shield=True):
        await host.buried()
    await trio.sleep(fault.draw("back", ["exp", 3]))
    fault.start(host)


POINTS: tuple[str, ...] = (
    *(f"{when} {each.value}" for each in Point if each.value.startswith("persist") for when in ("before", "after")),
    *(f"before {each.value}" for each in Point if each.value.startswith("send")),
    *JOURNAL_POINTS,
)
"""Every persist and send point of the ledger and the vote, and every step of the journal on the disk."""

KINDS: dict[str, Kind] = {
    each.__name__: each
    for each in (kill, churn, preempt, partition, rolling, poweroff, disk, clock, suspend, flap, children, slow, point)
}


FREEZES = frozenset({"suspend"})
"""Kinds that stop a host's tasks."""


async def heal(world: World) -> None:
    """All faults end: links are whole, disks fast and faultless, machines awake. Wall clocks stay as wrong as they are."""
    world.trace.add("heal")
    world.network.heal()
    for host in world.hosts:
        host.slow = 1.0
        for name in Pace.__dataclass_fields__:
            setattr(host.pace, name, getattr(world.scenario.disk, name))
        host.pace.failure = host.pace.stall = 0.0
        if host.freezer.frozen:
            host.freezer.thaw()
    await trio.lowlevel.checkpoint()
