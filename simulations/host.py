"""One machine of a world: its home, its disk, its clocks, and the lives of the peer that runs on it.

What is durable here: the home's files are on a plain disk that never forgets (a folder in memory), but for jobs' output, of
which a power cut takes any part that was not synced; the journals of jobs' ledgers are on `simulations.disk`, which forgets
whatever was not synced. Rules: a killed peer does nothing more that anyone can see:
its network is dead first, its disk refuses, and its home is out of its reach while its tasks end.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from dht.core.identity import Identity
from dht.core.membership import ROLES, Membership, issue
from dht.memory import MemoryHost
from dht.node import Node
from grid import enrolment
from grid.api.client import ControlError
from grid.blobs.disk import Disk
from grid.config import Home, JoinOptions, write_file
from grid.machine import Machine
from grid.peer import Peer
from simulations.children import MAINS
from simulations.directory import DirectoryNode
from simulations.disk import LifeDisk, MemoryDisk, Pace
from simulations.processes import SimPool
from simulations.sources import EPOCH_S, Freezer, here

if TYPE_CHECKING:
    from simulations.world import World

PORT = 4743
END_S = 30.0
"""Virtual time in which a killed or leaving peer's tasks must have ended."""
Handler = Callable[["LocalCall"], Awaitable[Any]]


class CrashedError(BaseException):
    """The process died at this point: unwinds what was under way."""


class LocalCall:
    """One request of this machine's user to its peer: what `grid.control.Call` is to a handler."""

    def __init__(self, params: dict[str, Any], event: Callable[[str, dict[str, Any], bytes], None]) -> None:
        self.params = params
        self.method = ""
        self._event = event

    async def event(self, name: str, data: dict[str, Any] | None = None, body: bytes = b"") -> None:
        """See `Call.event`."""
        self._event(name, dict(data or {}), body)
        await trio.lowlevel.checkpoint()

    async def reply(self, result: Any = None) -> None:
        """See `Call.reply`."""
        await trio.lowlevel.checkpoint()


class LocalControl:
    """In the place of the control socket: hands the table of methods to the host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def serve(self, handlers: dict[str, Handler], *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Control.serve`."""
        host = self._host
        async with trio.open_nursery() as host.calls:
            try:
                host.handlers = handlers
                task_status.started("")
                await trio.sleep_forever()
            finally:
                host.handlers = {}


class Host(Machine):
    """A machine. Its `rng` is drawn from by whatever runs on it, in the order in which it runs."""

    def __init__(self, world: World, number: int, membership: Callable[[Identity], Membership]) -> None:
        self.world = world
        self.number = number
        self.name = f"h{number}"
        self.rng = random.Random(f"{world.seed} {self.name}")
        self.identity = Identity.from_seed(self.rng.randbytes(32))
        self.home = world.folder / self.name
        self.disk = MemoryDisk()
        self.pace = Pace(**{name: getattr(world.scenario.disk, name) for name in Pace.__dataclass_fields__})
        self.freezer = Freezer()
        self.wall_offset_s = 0.0
        self.slow = 1.0
        self.peer: Peer | None = None
        self.handlers: dict[str, Handler] = {}
        self.calls: trio.Nursery | None = None
        self._synced_bytes: dict[str, int] = {}
        self.lives = 0
        self.up = False
        self.killed = False
        self.ready = trio.Event()
        self._pool: SimPool | None = None
        self._life_disk: LifeDisk | None = None
        self._scope = trio.CancelScope()
        self._ended, self._buried, self._dying = trio.Event(), trio.Event(), trio.Event()
        self._ended.set()
        self._make_home(membership(self.identity))

    def _make_home(self, membership: Membership) -> None:
        home = Home.open(self.home, create=True)
        write_file(home.identity, self.identity.seed)
        known = [(f"h{n}", PORT) for n in range(min(3, self.world.scenario.peers)) if n != self.number]
        enrolment.save(home, membership, known)

    # ---- what a machine offers ----

    def wall_s(self) -> float:
        return EPOCH_S + self.wall_offset_s + trio.current_time()

    def boot_s(self) -> float:
        """CLOCK_BOOTTIME: trio's clock here goes on during a suspension, too."""
        return 1000.0 + self.number + trio.current_time()

    def entropy(self, count: int) -> bytes:
        return self.rng.randbytes(count)

    def pool(self, spare_zygotes: int) -> Any:
        self._pool = SimPool(
            self.rng, MAINS, lambda: self.slow, lambda error: self.world.violation(f"a child on {self.name} broke", error)
        )
        return self._pool

    def control(self, home: Home) -> Any:
        return LocalControl(self)

    def node(self, **options: Any) -> Any:
        if self.world.scenario.dht:
            return Node(**options)
        return DirectoryNode(self.world.directory, **options)

    def journal_disk(self) -> Disk:
        assert self._life_disk is not None
        return self._life_disk

    def at(self, point: str) -> None:
        """A named point of the ledger is passed: the world may have the machine die there."""
        if not self.killed:
            self.world.points[point] = self.world.points.get(point, 0) + 1
            if not self.world.dies_at(self, point):
                return
        raise CrashedError(point)

    @property
    def network(self) -> MemoryHost:
        """Its network."""
        return self.world.network.host(self.name)

    @property
    def children(self) -> list[Any]:
        """Its processes that live."""
        return self._pool.children() if self._pool is not None else []

    # ---- lives ----

    def start(self, nursery: trio.Nursery) -> None:
        """Switch it on."""
        assert self._ended.is_set()
        self.world.trace.add("start", self.name)
        self.lives += 1
        self.up, self.killed = True, False
        self.ready = trio.Event()
        self._ended, self._buried, self._dying = trio.Event(), trio.Event(), trio.Event()
        self._scope = trio.CancelScope()
        self._life_disk = LifeDisk(self.disk, self.rng, self.pace, self._synced)
        self.world.network.revive(self.name)
        nursery.start_soon(self._live)
        nursery.start_soon(self._bury)

    def _synced(self, fd: int) -> None:
        self.world.trace.add("fsync", self.name)

    async def _live(self) -> None:
        here.set(self)
        try:
            with self._scope:
                home = Home.open(self.home, create=True)
                listen = f"{self.name}:{PORT}"
                options = JoinOptions(listen=listen, slots=self.world.scenario.slots, name=self.name)
                self.peer = Peer(home, home.settle(options, save=False), self._reported, self.network, self)
                await self.peer.run()
        except BaseException as error:
            if not self.killed:
                self.world.violation(f"the peer on {self.name} ended by itself: {error!r}", error)
            if isinstance(error, trio.Cancelled):
                raise
        finally:
            self.world.counters["points"] = len(self.world.points)
            self._ended.set()
            if not self.killed:
                self.up = False
                self._buried.set()

    async def _bury(self) -> None:
        """Once killed: watch its tasks end, and give the home back as it was."""
        await self._dying.wait()
        with trio.move_on_after(END_S) as patience:
            await self._ended.wait()
        if patience.cancelled_caught:
            self.world.violation(f"tasks of the killed peer on {self.name} go on")
        shutil.rmtree(self.home, ignore_errors=True)
        self._kept.rename(self.home)
        self.peer = None
        self.up = False
        self._buried.set()

    def _reported(self, report: dict[str, Any]) -> None:
        if report.get("event") == "ready":
            self.ready.set()

    def crash(self, *, power: bool = False, silent: bool | None = None) -> None:
        """The process dies at once; with `power` the whole machine, and what its journals' disk had not synced.

        What its tasks still do until they have ended reaches nobody: `buried` waits for that.
        """
        if not self.up or self.killed:
            return
        self.world.trace.add("power-off" if power else "kill", self.name)
        self.killed = True
        assert self._life_disk is not None
        self._life_disk.dead = True
        self.world.network.kill(self.name, silent=power if silent is None else silent)
        if power:
            self.disk.lose_power(self.rng)
            self._lose_output()
        else:
            self.disk.kill()
        self.home.rename(self._kept)
        self.freezer.thaw()
        self._dying.set()
        self._scope.cancel()

    def fsynced(self, fd: int) -> None:
        """See `Sources`."""
        self._synced_bytes[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size

    def _lose_output(self) -> None:
        for name in ("stdout", "stderr"):
            for path in sorted(self.home.glob(f"jobs/*/{name}")):
                size = path.stat().st_size
                least = min(size, self._synced_bytes.get(str(path), 0))
                os.truncate(path, self.rng.choice((size, least, self.rng.randint(least, size))))

    @property
    def _kept(self) -> Path:
        """Where the home is while a killed peer's tasks end."""
        return self.home.with_name(f"{self.name}.kept")

    async def buried(self) -> None:
        """Until nothing is left of a killed peer; then the machine can be started again."""
        await self._buried.wait()

    async def kill(self, *, power: bool = False, silent: bool | None = None) -> None:
        """`crash`, and wait until nothing is left of the peer."""
        self.crash(power=power, silent=silent)
        if self.killed:
            await self.buried()

    async def leave(self) -> None:
        """`grid leave`: it drains, and stops."""
        self.world.trace.add("leave", self.name)
        with trio.move_on_after(END_S) as patience:
            await self._serves_or_ended()
            if not self._ended.is_set():
                with contextlib.suppress(ControlError):  # it ended before it could say so
                    await self.ask("leave", {})
            await self._ended.wait()
        if patience.cancelled_caught:
            self.world.violation(f"the peer on {self.name} does not leave")
            await self.kill()
        self.peer = None

    async def _serves_or_ended(self) -> None:
        """Nobody can tell a peer to leave that is still starting."""
        async with trio.open_nursery() as nursery:

            async def until(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, self.ready)
            nursery.start_soon(until, self._ended)

    async def stop(self) -> None:
        """SIGTERM: the peer ends by itself."""
        assert self.peer is not None
        self.peer.stop.cancel()
        with trio.move_on_after(END_S) as patience:
            await self._ended.wait()
        if patience.cancelled_caught:
            self.world.violation(f"the peer on {self.name} does not stop")
            await self.kill()

    async def ask(
        self, method: str, params: dict[str, Any], event: Callable[[str, dict[str, Any], bytes], None] = lambda *_: None
    ) -> Any:
        """What this machine's user asks of the peer. Raises ControlError."""
        handler = self.handlers.get(method)
        if handler is None:
            raise ControlError("no-peer", f"no peer runs on {self.name}")
        nursery, done = self.calls, trio.Event()
        assert nursery is not None
        outcome: list[Any] = []
        errors: list[ControlError] = []
        scope = trio.CancelScope()

        async def run() -> None:
            here.set(self)
            try:
                with scope:
                    outcome.append(await handler(LocalCall(params, event)))
            except ControlError as error:
                errors.append(error)
            except Exception as error:
                if not self.killed:
                    self.world.violation(f"{method} failed inside the peer on {self.name}: {error!r}", error)
            finally:
                done.set()

        nursery.start_soon(run)
        try:
            await done.wait()
        finally:
            scope.cancel()
        if errors:
            raise errors[0]
        if not outcome:
            raise ControlError("no-peer", f"the peer on {self.name} ended")
        return outcome[0]


def memberships(rng: random.Random) -> Callable[[Identity], Membership]:
    """A grid whose root lets everybody in itself: chains of one, cheap to check."""
    root = Identity.from_seed(rng.randbytes(32))

    def admit(identity: Identity) -> Membership:
        expires_s = int(EPOCH_S) + 365 * 86_400
        owner = bytes(identity.id)
        return Membership(root.public, identity, (issue(root.public, root, identity.public, ROLES["member"], owner, expires_s),))

    return admit
