"""A leader, its helpers and their workers in virtual time, with deaths, lost connections, restarts and cancels in any order.

Whatever happens, each task's final word reaches the driver exactly once, with the right value, and nothing is left behind.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.api import wire
from grid.core import limits
from grid.core.errors import GridError
from grid.core.messages import Give
from tests.core.fakes import FakeChild, FakePost, FakeProcesses
from tests.core.material import LEADER
from tests.core.team import IDENTITIES, Helper, Team

TASKS = 600
FAILING = 41
"""Every so many-th task raises, whenever it runs."""
QUIET_S = 60.0
"""Virtual time after the last fault in which everything must be over."""


class Worker(FakeChild):
    """Runs what it is given, in virtual time; may die at any task."""

    def __init__(self, rng: random.Random, dies: Callable[[], bool]) -> None:
        super().__init__()
        self._rng = rng
        self._dies = dies
        self._queue: deque[wire.Run] = deque()
        self._arrived = trio.Event()

    def post(self, message: Any, body: bytes = b"") -> None:
        super().post(message, body)
        if isinstance(message, wire.Run):
            self._queue.append(message)
            self._arrived.set()
        elif isinstance(message, wire.Revoke):
            for run in self._queue:
                if run.ticket == message.ticket:
                    self._queue.remove(run)
                    self.say(wire.Returned(run.ticket))
                    break

    async def work(self) -> None:
        while not self.exited.is_set():
            if not self._queue:
                self._arrived = trio.Event()
                await self._arrived.wait()
                continue
            await self._run(self._queue.popleft())

    async def _run(self, run: wire.Run) -> None:
        lo = run.lo
        while lo < run.hi:
            hi = min(run.hi, lo + self._rng.randint(1, 20))
            bad = next((index for index in range(lo, hi) if index % FAILING == 7), None)
            hi = hi if bad is None else bad if bad > lo else lo + 1
            each_s = self._rng.choice([0.0005, 0.002, 0.1])
            self.cell = (self._rng.randrange(lo, hi), 1)
            await trio.sleep(each_s * (hi - lo))
            if self.exited.is_set():
                return
            if self._dies():
                self.die(-9)
                return
            if bad == lo:
                self.fail(run, lo)
            else:
                self.finish(run, hi, lo, int(each_s * 1e6) * (hi - lo))
            lo = hi
        self.cell = (-1, 0)


class Processes(FakeProcesses):
    """Starts Workers, which run in the nursery of their peer."""

    def __init__(self, nursery: trio.Nursery, rng: random.Random, dies: Callable[[], bool]) -> None:
        super().__init__()
        self._nursery, self._rng, self._dies = nursery, rng, dies

    async def start_worker(self) -> Any:
        await trio.sleep(0.01)
        child = Worker(self._rng, self._dies)
        self._nursery.start_soon(child.work)
        self.children.append(child)
        return child


class Post(FakePost):
    """Puts messages on the wires."""

    def __init__(self, world: World, me: PeerId) -> None:
        super().__init__()
        self._world, self._me = world, me

    def post(self, peer: PeerId, item: Any) -> None:
        self._world.send(self._me, peer, item)


class World:
    """The peers and the wires between them. Each wire is first in, first out; cut, it loses what is on it."""

    def __init__(self, nursery: trio.Nursery, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nursery = nursery
        self.deaths = 8
        self.faults = True
        self.team = Team(nursery, folder, helpers=0, slots=1)
        self.team.outreach._post = cast(Any, Post(self, LEADER.id))
        self.team.site.crew._processes = cast(Any, Processes(nursery, self.rng, self.dies))
        self.peers: dict[PeerId, Helper] = {}
        self.scopes: dict[PeerId, trio.CancelScope] = {}
        self.wires: dict[tuple[PeerId, PeerId], deque[Any]] = {}
        self.restarts = 0

    def dies(self) -> bool:
        if self.faults and self.deaths and self.rng.random() < 0.02:
            self.deaths -= 1
            return True
        return False

    # ---- wires ----

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
                if to == LEADER.id:
                    await self.team.outreach.handle(by, item)
                elif to in self.peers:
                    await self.peers[to].remote.handle(by, item)
            except GridError:
                continue
        del self.wires[by, to]

    async def cut(self, peer: PeerId) -> None:
        """The connection to the leader breaks, and stands again a little later."""
        for pair, queue in self.wires.items():
            if set(pair) == {peer, LEADER.id}:
                queue.clear()
        self.team.outreach.lost(peer)
        if peer in self.peers:
            self.peers[peer].remote.disconnected()
        await trio.sleep(self.rng.choice([0.01, 0.3, 4.0]))
        if peer in self.peers:
            self.peers[peer].remote.reconnected()

    def lose_one(self, peer: PeerId) -> None:
        """A queue was dropped, and nobody noticed."""
        queue = self.wires.get((peer, LEADER.id))
        if queue:
            queue.clear()

    # ---- peers ----

    async def live(self, number: int) -> None:
        """One helper, until it is killed; then it comes back without a memory."""
        identity = IDENTITIES[number]
        while True:
            self.restarts += 1
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    self.scopes[identity.id] = scope
                    folder = self.team.folder / f"life{self.restarts}"
                    team = self.team
                    outer, team.nursery = team.nursery, nursery
                    try:
                        helper = Helper(team, identity, folder, slots=1)
                    finally:
                        team.nursery = outer
                    helper.place.workshop.slots = 1 + number
                    helper.site.crew._processes = cast(Any, Processes(nursery, self.rng, self.dies))
                    helper.remote._post = cast(Any, Post(self, identity.id))
                    self.peers[identity.id] = helper
                    nursery.start_soon(helper.remote.run)
                    nursery.start_soon(self.steal, helper)
                    await trio.sleep_forever()
            helper.site.closed = True
            del self.peers[identity.id]
            for pair, queue in self.wires.items():
                if identity.id in pair:
                    queue.clear()
            await trio.sleep(self.rng.choice([0.05, 1.0, 5.0]))
            self.team.outreach.lost(identity.id)

    async def steal(self, helper: Helper) -> None:
        """Ask for work whenever there is little, of the leader or of another helper; answers may get lost."""
        while True:
            await trio.sleep(self.rng.choice([0.01, 0.05, 0.2]))
            if helper.site.remaining_s() > limits.STEAL_LOW_WATER_S:
                continue
            question = helper.remote.ask(1)
            others = [other for other in self.peers.values() if other is not helper]
            victim = self.rng.choice([None, None, *others])
            if victim is None:
                answer = await self.team.outreach.steal(helper.id, question)
            else:
                answer = await victim.remote.steal(helper.id, question)
            await trio.sleep(self.rng.choice([0.0001, 0.02]))
            if isinstance(answer, Give) and not (self.faults and self.rng.random() < 0.05):
                await helper.remote.take(LEADER.id if victim is None else victim.id, answer)

    # ---- the driver ----

    async def drive(self) -> None:
        """Declare a stage page by page, and change one's mind about some tasks."""
        declared = 0
        while declared < TASKS:
            sizes = [self.rng.randint(1, 40) for _ in range(self.rng.randint(1, 4))]
            self.team.page(*sizes, filler=self.rng.choice([0, 0, 0, limits.SEGMENT_INLINE_BYTES]))
            declared += sum(sizes)
            if self.rng.random() < 0.3:
                at = self.rng.randrange(declared)
                self.team.producer.handle(wire.Cancel(0, at, at + self.rng.randint(1, 5)), b"")
            await trio.sleep(self.rng.choice([0.0, 0.01, 0.5]))
        self.team.producer.handle(wire.Close(0, declared), b"")

    async def trouble(self) -> None:
        """Cut and kill at random, for a while."""
        for _ in range(12):
            await trio.sleep(self.rng.random())
            peer = self.rng.choice(IDENTITIES).id
            kind = self.rng.random()
            if kind < 0.4:
                self.nursery.start_soon(self.cut, peer)
            elif kind < 0.7:
                self.lose_one(peer)
            elif peer in self.peers:
                self.scopes[peer].cancel()
        self.faults = False


def words_of(world: World) -> dict[int, str]:
    """What the driver was told of each task; anything told twice fails."""
    words: dict[int, str] = {}

    def say(lo: int, hi: int, word: str) -> None:
        for index in range(lo, hi):
            assert index not in words, f"task {index} was told twice"
            words[index] = word

    for message, _ in world.team.driver.got:
        if isinstance(message, wire.Result):
            say(message.lo, message.hi, "done")
        elif isinstance(message, wire.Failure):
            say(message.index, message.index + 1, message.kind)
        elif isinstance(message, wire.Cancelled):
            say(message.lo, message.hi, "cancelled")
    return words


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seed", range(8))
async def test_every_task_is_told_once_whatever_happens(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seed: int, ordered: bool
) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery, tmp_path, seed)
        team = world.team
        team.open(ordered=ordered)
        nursery.start_soon(team.outreach.run)
        for number in range(len(IDENTITIES)):
            nursery.start_soon(world.live, number)
        nursery.start_soon(world.drive)
        await world.trouble()
        stage = team.leader.ledger.stage(0)
        with trio.move_on_after(QUIET_S):
            while not stage.complete:
                await team.leader.bell.wait()
        assert stage.complete, f"{team.leader.ledger.missing(0)} hang; {world.team.site.held()}"
        words = words_of(world)
        assert sorted(words) == list(range(stage.declared))
        values = team.driver.values()
        for index, word in words.items():
            if word == "done":
                assert values[index] == index * 10
                assert index % FAILING != 7
            elif word == "raised":
                assert index % FAILING == 7
            else:
                assert word == "cancelled"
        assert (stage.done, stage.failed) == (len(values), list(words.values()).count("raised"))
        assert sum(tally.done for tally in team.leader.tallies.values()) == stage.done
        assert sum(tally.done for peer, tally in team.leader.tallies.items() if peer != LEADER.id) > 0
        await trio.sleep(QUIET_S)
        for helper in world.peers.values():
            assert not helper.remote.held(), "held for ever"
            assert helper.remote.reports.settled
            assert not helper.site.stages or not helper.site.stages[0].held, "arguments of nothing"
        assert not team.site.held()
        assert team.outreach.giver.held() == []
        assert team.leader.argument_bytes == team.leader._argument_memory == 0
        assert not stage.attempts
        assert not stage.lost
        assert [path.name for path in team.leader.spool.folder.iterdir()] == []
        nursery.cancel_scope.cancel()
