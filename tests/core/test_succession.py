"""One leader after the other dies while helpers work, in virtual time: nothing is lost, nothing told wrong, little run twice.

Real leaders, outreaches, recorders, replays and remotes; workers, post and the log's commits are stand-ins. What a dead leader
had proposed and not committed is gone, its own workers' bundles too.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.errors import GridError
from grid.core.messages import Give
from grid.leader import Leader
from grid.outreach import Outreach
from grid.producer import Producer
from grid.recorder import LogRecorder
from grid.remote import Remote
from grid.replaying import Replaying
from tests.core.fakes import FUNCTION, JOB, FakeChild, FakeData, FakePost, FakeProcesses, Place, segment_bytes
from tests.core.material import LEADER, OTHER, THIEF
from tests.core.test_leader import Driver

TASKS = 800
COMMIT_S = 0.03
"""From a leader's word to a fact on a majority's disks."""
ELECTION_S = 1.0
ONE, TWO = (Identity(seed * 32) for seed in (b"1", b"2"))
PEERS = (LEADER, THIEF, OTHER, ONE, TWO)
QUIET_S = 60.0


class Worker(FakeChild):
    """Runs what it is given, in virtual time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._queue: deque[wire.Run] = deque()
        self._arrived = trio.Event()

    def post(self, message: Any, body: bytes = b"") -> None:
        super().post(message, body)
        if isinstance(message, wire.Run):
            self._queue.append(message)
            self._arrived.set()
        elif isinstance(message, wire.Revoke):
            for run in list(self._queue):
                if run.ticket == message.ticket:
                    self._queue.remove(run)
                    self.say(wire.Returned(run.ticket))

    async def work(self) -> None:
        while not self.exited.is_set():
            if not self._queue:
                self._arrived = trio.Event()
                await self._arrived.wait()
                continue
            await self._run(self._queue.popleft())

    async def _run(self, run: wire.Run) -> None:
        rng = self._world.rng
        lo = run.lo
        while lo < run.hi:
            hi = min(run.hi, lo + rng.randint(1, 4))
            await trio.sleep(rng.choice([0.005, 0.03]) * (hi - lo))
            if self.exited.is_set():
                return
            self._world.executed.update(range(lo, hi))
            self.finish(run, hi, lo, 20_000 * (hi - lo))
            lo = hi


class Processes(FakeProcesses):
    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        super().__init__()
        self._world, self._nursery = world, nursery

    async def start_worker(self) -> Any:
        await trio.sleep(0.01)
        child = Worker(self._world)
        self._nursery.start_soon(child.work)
        self.children.append(child)
        return child


class Log:
    """The leader's end of the log: what it says is a fact a little later, if it lives."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.chronicle = world.chronicle
        self._world = world
        self._sequence = self._committed = 0
        self._bell = Bell()
        self._send, self._receive = trio.open_memory_channel[tuple[float, list[Any]]](100_000)
        nursery.start_soon(self._commit)

    def propose(self, facts: Sequence[Any], patient: bool = False) -> int:
        self._sequence += len(facts)
        self._send.send_nowait((trio.current_time() + COMMIT_S, list(facts)))
        return self._sequence

    async def _commit(self) -> None:
        async for at_s, facts in self._receive:
            await trio.sleep_until(at_s)
            for fact in facts:
                self._world.chronicle.apply(fact)
            self._committed += len(facts)
            self._bell.ring()

    async def committed(self, sequence: int, patient: bool = False) -> None:
        while self._committed < sequence:
            await self._bell.wait()


class Post(FakePost):
    def __init__(self, world: World, me: PeerId) -> None:
        super().__init__()
        self._world, self._me = world, me

    def post(self, peer: PeerId, item: Any) -> None:
        self._world.send(self._me, peer, item)


class Leadership:
    """One peer's epoch."""

    def __init__(self, world: World, nursery: trio.Nursery, identity: Identity, epoch: int) -> None:
        self.identity, self.epoch = identity, epoch
        folder = world.folder / f"epoch{epoch}"
        folder.mkdir()
        spool = bodies.Spool(folder / "spool")
        log = cast(Any, Log(world, nursery))
        self.leader = leader = Leader(
            JOB, identity.id, StageOptions(), spool, lambda *entry: None, next_stage=world.chronicle.next_stage
        )
        place = Place(nursery, folder / "spool", leader, slots=1)
        place.site.crew._processes = cast(Any, Processes(world, nursery))
        leader.site = place.site
        data = cast(Any, FakeData(folder / "blobs", world.blobs))
        self.outreach = Outreach(leader, data, identity, epoch, cast(Any, Post(world, identity.id)), nursery)
        leader.recorder = recorder = LogRecorder(JOB, identity.id, log, cast(Any, None), spool)
        if world.chronicle.stages:
            leader.replaying = Replaying(world.chronicle, leader, recorder, None, nursery)
        self.driver = Driver(spool)
        self.producer = Producer(leader, self.driver.post, nested=False)
        nursery.start_soon(self.outreach.run)

    async def drive(self, pages: list[tuple[int, ...]], pause_s: float, ordered: bool) -> None:
        """The script: the same calls each time, at its own speed."""
        self.producer.handle(wire.Define(0, "f"), FUNCTION)
        self.producer.handle(wire.Stage(0, 0, "f", ordered, wire.Options()), b"")
        at = 0
        for sizes in pages:
            pieces = []
            first = at
            for size in sizes:
                pieces.append(segment_bytes(at, at + size))
                at += size
            self.producer.handle(wire.Page(0, first, sizes, tuple(map(len, pieces))), b"".join(pieces))
            await trio.sleep(pause_s)
        self.producer.handle(wire.Close(0, at), b"")

    @property
    def complete(self) -> bool:
        stages = self.leader.ledger.stages
        return bool(stages) and next(iter(stages)).complete


class Helper:
    """A peer that does not lead."""

    def __init__(self, world: World, nursery: trio.Nursery, identity: Identity, lead: Leadership, slots: int) -> None:
        world.lives += 1
        folder = world.folder / f"life{world.lives}"
        self.id = identity.id
        data = cast(Any, FakeData(folder / "blobs", world.blobs))
        post = cast(Any, Post(world, identity.id))
        self.remote = Remote(JOB, lead.epoch, lead.identity.id, data, identity, identity.id, post)
        self.place = Place(nursery, folder / "spool", self.remote, slots)
        self.place.site.crew._processes = cast(Any, Processes(world, nursery))
        self.remote.attach(self.place.site)
        nursery.start_soon(self.remote.run)


class World:
    """All peers, the wires between them, and the committed log."""

    def __init__(self, nursery: trio.Nursery, folder: Path, seed: int, ordered: bool) -> None:
        self.nursery, self.folder, self.ordered = nursery, folder, ordered
        self.rng = random.Random(seed)
        self.chronicle = Chronicle()
        self.blobs: dict[bytes, bytes] = {}
        self.executed: Counter[int] = Counter()
        self.wires: dict[tuple[PeerId, PeerId], deque[Any]] = {}
        self.peers: dict[PeerId, Helper] = {}
        self.scopes: dict[PeerId, trio.CancelScope] = {}
        self.lead: Leadership | None = None
        self.last_lead: Leadership
        self.lives = 0
        self.pages: list[tuple[int, ...]] = []
        while sum(map(sum, self.pages)) < TASKS:
            self.pages.append(tuple(self.rng.randint(1, 20) for _ in range(self.rng.randint(1, 4))))
        self.total = sum(map(sum, self.pages))

    def send(self, by: PeerId, to: PeerId, item: Any) -> None:
        queue = self.wires.get((by, to))
        if queue is None:
            queue = self.wires[by, to] = deque()
            self.nursery.start_soon(self._deliver, by, to)
        queue.append(item)

    async def _deliver(self, by: PeerId, to: PeerId) -> None:
        queue = self.wires[by, to]
        while queue:
            await trio.sleep(self.rng.choice([0.0001, 0.001, 0.02]))
            if not queue:
                break
            item = queue.popleft()
            try:
                if self.lead is not None and to == self.lead.identity.id:
                    await self.lead.outreach.handle(by, item)
                elif to in self.peers:
                    await self.peers[to].remote.handle(by, item)
            except GridError:
                continue
        del self.wires[by, to]

    def cut(self, peer: PeerId) -> None:
        for pair, queue in self.wires.items():
            if peer in pair:
                queue.clear()

    # ---- peers ----

    async def help(self, identity: Identity, slots: int) -> None:
        """A helper, until it is killed or leads."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                self.scopes[identity.id] = scope
                helper = self.peers[identity.id] = Helper(self, nursery, identity, self.last_lead, slots)
                nursery.start_soon(self.steal, helper)
                await trio.sleep_forever()
        helper.place.site.closed = True
        del self.peers[identity.id]
        self.cut(identity.id)

    async def steal(self, helper: Helper) -> None:
        while True:
            await trio.sleep(self.rng.choice([0.01, 0.05]))
            if helper.place.site.remaining_s() > limits.STEAL_LOW_WATER_S:
                continue
            question = helper.remote.ask(2)
            others = [other for other in self.peers.values() if other is not helper]
            victim = self.rng.choice([None, None, *others])
            lead = self.lead
            try:
                if victim is not None:
                    answer = await victim.remote.steal(helper.id, question)
                elif lead is not None:
                    answer = await lead.outreach.steal(helper.id, question)
                else:
                    continue
                await trio.sleep(self.rng.choice([0.0001, 0.02]))
                if isinstance(answer, Give):
                    await helper.remote.take(victim.id if victim is not None else lead.identity.id, answer)  # type: ignore[union-attr]
            except GridError:
                continue

    async def tell(self, helper: Helper, lead: Leadership) -> None:
        """The news reach a helper."""
        await trio.sleep(self.rng.choice([0.001, 0.1, 0.35]))
        if self.peers.get(helper.id) is helper:
            helper.remote.follow(lead.identity.id, b"", lead.epoch)

    async def reign(self, identity: Identity, epoch: int, for_s: float) -> bool:
        """One leadership; True when the stage is complete."""
        offers = []
        helper = self.peers.get(identity.id)
        if helper is not None:  # as `Helping.hand_over` does it
            helper.place.site.closed = True
            offers = await helper.remote.reports.collect()
            self.scopes[identity.id].cancel()
            while identity.id in self.peers:
                await trio.lowlevel.checkpoint()
        with trio.move_on_after(for_s) as scope:
            async with trio.open_nursery() as nursery:
                lead = self.lead = self.last_lead = Leadership(self, nursery, identity, epoch)
                for message in offers:
                    await lead.outreach.handle(identity.id, message)
                for other in self.peers.values():
                    self.nursery.start_soon(self.tell, other, lead)
                nursery.start_soon(lead.drive, self.pages, self.rng.choice([0.0, 0.005]), self.ordered)
                while not lead.complete:
                    await lead.leader.bell.wait()
                scope.deadline = float("inf")
                await trio.sleep(4 * limits.RESEND_S)  # the last words arrive
                nursery.cancel_scope.cancel()
        complete = lead.complete
        lead.leader.site.closed = True
        self.lead = None
        self.cut(identity.id)
        for other in self.peers.values():
            other.remote.disconnected()
        check(lead)
        return complete

    async def trouble(self) -> None:
        """Helpers are killed and come back, messages get lost, for a while."""
        for _ in range(8):
            await trio.sleep(self.rng.random())
            identity = self.rng.choice(PEERS[1:])
            if identity.id not in self.peers:
                continue
            if self.rng.random() < 0.5:
                self.cut(identity.id)
                continue
            self.scopes[identity.id].cancel()
            while identity.id in self.peers:
                await trio.lowlevel.checkpoint()
            if self.lead is not None:
                self.lead.outreach.lost(identity.id)
                self.nursery.start_soon(self.help, identity, 1)


def check(lead: Leadership) -> None:
    """What this driver was told is right, and was told once."""
    values = lead.driver.values()  # raises on what came twice
    assert all(value == index * 10 for index, value in values.items())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seed", range(6))
async def test_no_result_is_lost_when_leaders_die(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seed: int, ordered: bool
) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery, tmp_path, seed, ordered)
        died = await succession(world)
        again = sum(world.executed.values()) - len(world.executed)
        assert again <= 0.05 * world.total * died, "finished work was thrown away"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(10, 16))
async def test_no_result_is_lost_when_leaders_and_helpers_die(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery, tmp_path, seed, ordered=seed % 2 == 0)
        nursery.start_soon(world.trouble)
        await succession(world)
        nursery.cancel_scope.cancel()


async def succession(world: World) -> int:
    """Leaders one after the other until the job is done. Returns how many died."""
    world.last_lead = cast(Any, type("Before", (), {"epoch": 1, "identity": PEERS[0]}))
    for number, identity in enumerate(PEERS[1:]):
        world.nursery.start_soon(world.help, identity, 1 + number % 2)
    await trio.testing.wait_all_tasks_blocked()
    died = 0
    for epoch, identity in enumerate(PEERS, start=1):
        last = epoch == len(PEERS) - 1
        if await world.reign(identity, epoch, QUIET_S if last else world.rng.uniform(0.6, 1.8)):
            break
        died += 1
        await trio.sleep(ELECTION_S)
    lead = world.last_lead
    assert died >= 1
    assert lead.complete
    assert sorted(lead.driver.values()) == list(range(world.total))
    assert len(world.executed) == world.total
    for helper in world.peers.values():
        assert not helper.remote.held(), "held for ever"
        assert helper.remote.reports.settled
    return died
