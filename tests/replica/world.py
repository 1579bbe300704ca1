"""Peers that hold replicas, and nothing else: a wire between them, a disk each, virtual time.

The wire loses, delays, cuts one way or both; a peer dies by cancellation, its disk stays or loses power. Each group is watched by
the consensus core's own checker through the journals, which see what gets to the disk.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from dht.core.identity import Identity, PeerId
from dht.core.membership import Membership
from dht.network import Address
from grid.core import choice
from grid.core.facts import AnyFact, Ended, Output
from grid.core.job import BlobRef, JobId, JobOptions, JobSpec, SignedSpec, job_id, open_spec, sign_spec
from grid.core.messages import Dismissed, Mail, Message, decode, encode
from grid.core.recovery import Standing
from grid.journal import Journal
from grid.replica import Replica
from grid.replicas import Replicas
from grid.transport.errors import PeerUnreachable, RemoteError
from grid.transport.hello import Hello
from tests.journal.disks import MemoryDisk

ROOT = Identity(b"r" * 32)
NOW_S = 1_700_000_000.0
DELAY_S = 0.002
QUEUE_MAX = 100_000


class Crash(BaseException):
    """The process dies here."""


class Host:
    """One machine: identity, disk, clock; the process on it is `replicas` while it runs. All hooks' calls are in `said`."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.identity = Identity(bytes([number]) * 32)
        self.id = self.identity.id
        self.disk = MemoryDisk()
        self.folder = world.folder / f"host{number}"
        self.folder.mkdir()
        self.clock_offset_s = 0.0
        self.started_s = NOW_S - 1000 + number
        self.life = trio.CancelScope()
        self.replicas: Replicas | None = None
        self.said: list[tuple[Any, ...]] = []
        self.shown: dict[JobId, dict[int, bytes]] = {}
        self.final: set[JobId] = set()
        self.news: dict[JobId, tuple[Standing, PeerId, float]] = {}
        self.journals: Any = Journal
        self.ups = 0

    def clock(self) -> float:
        return trio.current_time() + self.clock_offset_s

    # ---- fault points ----

    def at(self, point: str) -> None:
        world = self.world
        world.points[point] = world.points.get(point, 0) + 1
        if point == world.kill_at:
            world.kill_at = ""
            world.killed.append(self)
            raise Crash(point)

    # ---- hooks ----

    def enlisted(self, replica: Replica) -> None:
        self.said.append(("enlisted", replica.branch.name))

    def applied(self, replica: Replica, fact: AnyFact) -> None:
        if isinstance(fact, Output):
            self.shown.setdefault(replica.job, {})[fact.at] = fact.data
        self.said.append(("applied", replica.branch.name, fact))

    def restored(self, replica: Replica) -> None:
        self.said.append(("restored", replica.branch.name))

    def compacting(self, replica: Replica) -> None:
        assert replica.applied_index > 0

    def took_over(self, replica: Replica, term: int) -> None:
        assert replica.leads()
        self.said.append(("took over", replica.branch.name, term))

    def stepped_down(self, replica: Replica, why: str) -> None:
        assert not replica.leads()
        self.said.append(("stepped down", why))

    def changed(self, replica: Replica) -> None:
        self.said.append(("changed", replica.voters))

    def gone(self, replica: Replica) -> None:
        if replica.chronicle.outcome is not None:
            self.final.add(replica.job)
        self.said.append(("gone", replica.branch.name, replica.fate))

    # ---- knowledge ----

    def standing(self, job: JobId) -> tuple[Standing, PeerId, float] | None:
        known = self.news.get(job)
        return (known[0], known[1], trio.current_time() - known[2]) if known else None

    async def learn_outcome(self, replica: Replica, peers: Sequence[PeerId]) -> bool:
        """The outcome of a job that one of these has ended."""
        await trio.lowlevel.checkpoint()
        if not any(job == replica.job for each in self.world.hosts if each.id in peers for job in each.final):
            return False
        self.final.add(replica.job)
        return True

    def is_final(self, job: JobId) -> bool:
        return job in self.final

    # ---- links ----

    def connected(self) -> list[PeerId]:
        return [host.id for host in self.world.hosts if host is not self and self.world.linked(self, host)]

    def hello(self, peer: PeerId) -> Hello | None:
        host = self.world.by_id[peer]
        if not self.world.linked(self, host):
            return None
        return Hello(host.identity.public, b"", (), "", info=choice.hello_info(host.started_s))

    def post(self, peer: PeerId, message: bytes) -> bool:
        host = self.world.by_id[peer]
        if not self.world.linked(self, host):
            return False
        self.world.send(self, host, message)
        return True

    async def request(self, peer: PeerId, message: bytes, timeout_s: float) -> bytes:
        host = self.world.by_id[peer]
        with trio.fail_after(timeout_s):
            await trio.sleep(DELAY_S)
            if not self.world.linked(self, host) or host.replicas is None:
                raise PeerUnreachable(peer, "it is down")
            if not self.world.open(self, host):
                await trio.sleep_forever()
            try:
                answer = await host.replicas.request(self.id, decode(message))
            except Exception as error:
                raise RemoteError("refused", str(error)) from None
            await trio.sleep(DELAY_S)
            if not self.world.open(host, self):
                await trio.sleep_forever()
            return encode(answer)

    def keep(self, peer: PeerId, addresses: Sequence[Address] = ()) -> None:
        pass

    def unkeep(self, peer: PeerId) -> None:
        pass

    # ---- life ----

    @property
    def up(self) -> bool:
        return self.replicas is not None

    def replica(self, job: JobId) -> Replica | None:
        return self.replicas.get(job) if self.replicas is not None else None


class World:
    """Hosts 1..n, all started. `seed` draws losses and election timeouts."""

    def __init__(self, folder: Path, nursery: trio.Nursery, count: int, seed: int = 0) -> None:
        self.folder = folder
        self.nursery = nursery
        self.rng = random.Random(seed)
        self.loss = 0.0
        self.cut: set[tuple[int, int]] = set()
        self.silent: set[int] = set()
        self.hosts = [Host(self, number) for number in range(1, count + 1)]
        self.by_id = {host.id: host for host in self.hosts}
        self.membership = Membership.found(self.hosts[0].identity, ROOT, NOW_S)
        self.kill_at = ""
        """The process that comes to this point first dies there."""
        self.killed: list[Host] = []
        self.points: dict[str, int] = {}
        self.watch: Callable[[Host, Host, Message], bool] = lambda sender, to, message: True

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number - 1]

    # ---- processes ----

    async def start(self, *numbers: int) -> None:
        for host in [self[number] for number in numbers] or self.hosts:
            assert host.replicas is None
            host.life = trio.CancelScope()
            await self.nursery.start(self._run, host)

    async def _run(self, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        replicas = Replicas(
            host.folder,
            host.identity,
            host,
            random.Random(self.rng.random()),
            host.disk,
            host,
            check=lambda signed: open_spec(signed, lambda chain: self.membership.check(chain, NOW_S), ROOT.public),
            knowledge=host,
            clock=host.clock,
            wall=lambda: NOW_S + trio.current_time(),
            entropy=self.rng.randbytes,
            journals=host.journals,
            at=host.at,
        )
        replicas._asking.started_s = host.started_s
        try:
            with host.life:
                host.replicas = replicas
                await replicas.run(task_status=task_status)
        except* Crash:
            pass
        finally:
            host.replicas = None
            host.disk.kill()
            self._tell_down(host)

    async def kill(self, *numbers: int, power: bool = False) -> None:
        """The process dies at once: nothing more leaves it, nothing more gets to its disk."""
        for number in numbers:
            host = self[number]
            host.life.cancel()
            dead = host.disk
            while host.replicas is not None:
                await trio.lowlevel.checkpoint()
            if power:
                dead.lose_power(self.rng)

    def _tell_down(self, host: Host) -> None:
        """Its connections break."""
        for other in self.hosts:
            if other is not host and other.replicas is not None and host.number not in self.silent:
                other.replicas.down(host.id)

    # ---- the wire ----

    def open(self, sender: Host, to: Host) -> bool:
        return (sender.number, to.number) not in self.cut

    def linked(self, a: Host, b: Host) -> bool:
        """A connection stands: it breaks when both directions are cut."""
        return a.up and b.up and (self.open(a, b) or self.open(b, a))

    def isolate(self, *numbers: int) -> None:
        for inside in numbers:
            for outside in range(1, len(self.hosts) + 1):
                if outside not in numbers:
                    self.cut |= {(inside, outside), (outside, inside)}

    def send(self, sender: Host, to: Host, data: bytes) -> None:
        if self.open(sender, to) and self.rng.random() >= self.loss:
            self.nursery.start_soon(self._deliver, sender, to, to.replicas, data)

    async def _deliver(self, sender: Host, to: Host, process: Replicas | None, data: bytes) -> None:
        await trio.sleep(DELAY_S)
        if process is None or to.replicas is not process or not self.open(sender, to):
            return
        message = decode(data)
        if not self.watch(sender, to, message):
            return
        assert isinstance(message, Mail | Dismissed)
        await process.handle(sender.id, message)

    # ---- jobs ----

    def spec(self, nonce: bytes = b"n", **options: Any) -> tuple[JobSpec, SignedSpec]:
        submitter = self.hosts[0].identity
        spec = JobSpec(
            nonce=nonce,
            grid=ROOT.public,
            submitter=submitter.public,
            owner=submitter.id,
            name="job",
            script="job.py",
            argv=(),
            code=BlobRef(b"c" * 32, 10),
            python="3.11",
            seed=7,
            created_s=NOW_S,
            options=JobOptions(**options),
        )
        return spec, sign_spec(spec, submitter, self.membership.chain)

    async def found(self, candidates: Sequence[int] | None = None, **options: Any) -> JobId:
        spec, signed = self.spec(**options)
        replicas = self[1].replicas
        assert replicas is not None
        chosen = [self[number].id for number in candidates] if candidates is not None else replicas.choose(spec.options.replicas)
        await replicas.found(spec, signed, chosen)
        return job_id(signed.payload)

    def leader(self, job: JobId) -> Host | None:
        """Who leads, if anybody does."""
        leading = [host for host in self.hosts if (replica := host.replica(job)) is not None and replica.leads()]
        return leading[0] if len(leading) == 1 else None

    async def led(self, job: JobId, timeout_s: float = 30.0, but: Host | None = None) -> tuple[Host, Replica]:
        """Wait until somebody (else than `but`) leads and was told so."""
        found: list[tuple[Host, Replica]] = []

        def leads() -> bool:
            host = self.leader(job)
            replica = host.replica(job) if host is not None else None
            if host is None or host is but or replica is None:
                return False
            if ("took over", replica.branch.name, replica.term) not in host.said:
                return False
            found.append((host, replica))
            return True

        await self.until(leads, timeout_s)
        return found[-1]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """In virtual time."""
        with trio.fail_after(timeout_s):
            while not holds():  # noqa: ASYNC110  # the time is virtual
                await trio.sleep(0.01)

    async def say(self, replica: Replica, at: int, data: bytes) -> None:
        """A fact, acknowledged when this returns."""
        await replica.committed(replica.propose([output(at, data)]))


def ended() -> Ended:
    return Ended(b"outcome")


def output(at: int, data: bytes) -> Output:
    return Output(1, at, data)


@asynccontextmanager
async def world_of(folder: Path, count: int, seed: int = 0) -> AsyncIterator[World]:
    """A world whose hosts run, ended with the block."""
    async with trio.open_nursery() as nursery:
        world = World(folder, nursery, count, seed)
        await world.start()
        yield world
        nursery.cancel_scope.cancel()
