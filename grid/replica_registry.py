"""The replicas of jobs' ledgers on this peer: how each begins, runs, is found, and ends.

Rules:
- a replica is on the disk before anybody is told of it, and is found there again when the peer starts;
- at most one branch of a job goes on here: where one has its state, those it descends from (and those it wins over) go;
- a replica that ended for good (`Replica.fate` says why) leaves no files, and may come back under a new incarnation only.
`grid.replicas` is what the peer uses.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import Identity, PeerId
from grid import boottime
from grid.bell import Bell
from grid.core import choice
from grid.core.errors import RefusedError
from grid.core.job import JobId, JobSpec, SignedSpec
from grid.core.mandate import Branch, Mandate
from grid.core.messages import Dismissed, Enlist, Mail, encode
from grid.core.raft_log import InvariantError
from grid.core.raft_messages import NodeId
from grid.core.recovery import path
from grid.journal import Journal
from grid.journal_errors import JournalDamaged, JournalError
from grid.journal_files import FaultHook, no_fault
from grid.replica import Founding, Replica
from grid.replica_asking import Asking
from grid.replica_files import Book, Journals, Shelf
from grid.replica_mandate import collect
from grid.replica_ports import NoKnowledge
from grid.replica_recovery import Patience
from grid.replica_repair import Upkeep

if TYPE_CHECKING:
    from grid.blobs.disk import Disk
    from grid.replica_ports import Hooks, Knowledge, Links

DISMISS_AGAIN_S: Final = 1.0
"""Between two dismissals of a member that goes on sending."""
CONNECT_S: Final = 1.0
"""Between two looks at whether all members are connected."""
LOAD_RETRY_S: Final = 5.0
"""Before a replica whose journal could not be read (a full disk) is looked at again."""
KEPT_FATES: Final = frozenset({"", "failed"})
"""Ends that leave the journal where it is: this peer stops, or a fault of its own."""
UNTOLD_FATES: Final = frozenset({"", "abandoned"})
"""Ends that whoever stopped the peer, or founded the group, knows."""
GIVEN_UP_MAX: Final = 64
"""Foundings remembered that no majority took in: whoever was told of one and could not be told of its end writes to us, soon."""
log = logging.getLogger(__name__)

Check = Callable[[SignedSpec], tuple[JobId, JobSpec]]


class Registry:
    """One peer's. `run` it; requests and mail wait until it has read what is on the disk."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        links: Links,
        rng: random.Random,
        disk: Disk,
        hooks: Hooks,
        *,
        check: Check,
        knowledge: Knowledge | None = None,
        clock: Callable[[], float] = boottime.now_s,
        wall: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
        journals: Journals = Journal,
        at: FaultHook = no_fault,
    ) -> None:
        """check: `open_spec` of the grid. clock: counts suspend. wall: unix time. journals, at: for simulations."""
        self.me = identity.id
        self.changed = Bell()
        """Rings when a replica comes or goes."""
        self._shelf = Shelf(folder, disk, journals, at)
        self._identity = identity
        self._links = links
        self._asking = Asking(self.me, wall(), links, wall)
        self._rng = rng
        self._hooks = hooks
        self._check = check
        self._knowledge = knowledge or NoKnowledge()
        self._clock = clock
        self._entropy = entropy
        self._held: dict[JobId, dict[bytes, Replica]] = {}
        self._patience: dict[Replica, Patience] = {}
        self._in_doubt: set[Replica] = set()  # that may have to give way to another branch
        self._busy: dict[JobId, trio.Lock] = {}
        self._dismissed_s: dict[NodeId, float] = {}
        self._given_up: deque[tuple[bytes, bytes, int]] = deque(maxlen=GIVEN_UP_MAX)  # foundings: job, branch, own incarnation
        self._loaded = trio.Event()
        self._nursery: trio.Nursery | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take up what is on the disk; until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for place in self._shelf.places():
                    await self._load(place)
                self._loaded.set()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def _load(self, place: Path) -> None:
        """A replica found on the disk; a damaged one is forgotten: its group will see to it."""
        try:
            book = await self._shelf.open(place)
        except JournalDamaged as error:
            log.warning("%s: %s; it is forgotten", place, error)
            await self._forget(place)
        except (JournalError, OSError) as error:
            log.warning("%s can't be read now: %s", place, error)
            self._running.start_soon(self._load_later, place)
        else:
            try:
                replica = await self._start(book, None, loaded=True)
            except OSError as error:
                log.warning("%s can't be used now: %s", place, error)
                self._running.start_soon(self._load_later, place)
            else:
                if replica is None:
                    await self._forget(place)

    async def _load_later(self, place: Path) -> None:
        await trio.sleep(LOAD_RETRY_S)
        if not any(self._shelf.place(job, branch) == place for job, held in self._held.items() for branch in held):
            await self._load(place)

    async def _forget(self, place: Path) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._shelf.destroy(place)
            except OSError as error:
                log.warning("%s can't be removed: %s", place, error)

    @property
    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise RefusedError("this peer stops")
        return self._nursery

    async def _start(
        self, book: Book, found: Founding | None, enlister: PeerId | None = None, loaded: bool = False
    ) -> Replica | None:
        """Run a replica. None when its journal contradicts itself. loaded: it was on the disk. Raises OSError."""
        try:
            spec = codec.decode(book.seat.signed.payload, JobSpec)
            replica = Replica(
                book,
                spec,
                self._hooks,
                self._mail,
                self._clock,
                random.Random(self._rng.getrandbits(64)),
                self._shelf.at,
                found=found,
            )
        except (InvariantError, CodecError) as error:
            log.error("job %s: its journal here can't be used: %s", book.seat.job.hex()[:8], error)
            await book.close()
            return None
        replica.enlister, replica.loaded = enlister, loaded
        replica.settled = self._settled
        replica.collect = self._collect
        self._held.setdefault(replica.job, {})[replica.branch.name] = replica
        try:
            self._hooks.enlisted(replica)
        except BaseException:
            self._remove(replica)
            with trio.CancelScope(shield=True):
                await book.close()
            raise
        self._running.start_soon(self._run, replica)
        self.changed.ring()
        return replica

    async def _run(self, replica: Replica) -> None:
        """One replica's life, with what looks after it."""
        upkeep = Upkeep(replica, self._clock, self._asking.ages, self._enlist, self._dismiss)
        patience = Patience(replica, self._clock, self._asking.survey, self._open_branch, self._knowledge, replica.loaded)
        self._patience[replica] = patience
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upkeep.run)
                nursery.start_soon(patience.run)
                nursery.start_soon(self._keep_connected, replica)
                await replica.run()
                nursery.cancel_scope.cancel()
        except Exception:
            log.exception("job %s: its replica here failed", replica.job.hex()[:8])
            replica.fate = "failed"
        finally:
            del self._patience[replica]
            await self._leave(replica)

    async def _leave(self, replica: Replica) -> None:
        """It has ended."""
        if replica.fate not in KEPT_FATES:
            log.info("job %s: this peer holds it no more: %s", replica.job.hex()[:8], replica.fate)
            await self._forget(self._shelf.place(replica.job, replica.branch.name))
        self._remove(replica)
        needed = {peer for other in self.all() for peer in other.members} | set(self._links.connected())
        for peer in set(replica.members) - needed - {self.me}:
            self._links.unkeep(peer)
        if replica.fate not in UNTOLD_FATES:
            self._hooks.gone(replica)
        self.changed.ring()

    def _remove(self, replica: Replica) -> None:
        held = self._held.get(replica.job, {})
        if held.get(replica.branch.name) is replica:
            del held[replica.branch.name]
        if not held:
            self._held.pop(replica.job, None)

    async def _keep_connected(self, replica: Replica) -> None:
        """Members stay connected: mail is sent only where a connection stands."""
        while True:
            connected = {self.me, *self._links.connected()}
            for peer in replica.members:
                if peer not in connected:
                    self._links.keep(peer)
            await trio.sleep(CONNECT_S)

    def _settled(self, replica: Replica) -> None:
        """It has a state: other branches that are here end, or it does."""
        for other in list(self._held.get(replica.job, {}).values()):
            if other is replica or other.fate:
                continue
            if other.empty and replica.branch.name in other.branch.ancestors:
                continue  # a branch that may yet begin
            (other if other.empty or _goes_on(replica, other) else replica).stop("superseded")

    async def _open_branch(
        self, parent: Replica, branch: Branch, state: bytes, payloads: tuple[bytes, ...], survivors: list[PeerId]
    ) -> None:
        """See `grid.replicas`."""
        raise NotImplementedError

    def _collect(self, replica: Replica, term: int) -> None:
        """A leadership may begin once a majority endorsed it: see `Replica.collect`."""
        if term == 1 and not replica.branch.name:
            replica.take_over(term, Mandate())
        else:
            self._running.start_soon(collect, replica, term, self._identity, self._asking.request)

    def _mail(self, peer: PeerId, mail: Mail) -> None:
        self._links.post(peer, encode(mail))

    def _dismiss(self, replica: Replica, node: NodeId) -> None:
        """Tell a node that it is no member of this replica's group."""
        self._tell_dismissed(replica.job, replica.branch.name, node)

    def _tell_dismissed(self, job: bytes, branch: bytes, node: NodeId) -> None:
        """Tell a node that it is no member of a group; not too often."""
        now_s = self._clock()
        if now_s < self._dismissed_s.get(node, now_s):
            return
        self._dismissed_s = {each: until_s for each, until_s in self._dismissed_s.items() if now_s < until_s}
        self._dismissed_s[node] = now_s + DISMISS_AGAIN_S
        self._links.post(PeerId(node.peer), encode(Dismissed(job, branch, node.incarnation)))

    async def _enlist(self, replica: Replica, peer: PeerId) -> int | None:
        """Ask a peer to join a group that is led here."""
        return await self._asking.enlist(peer, Enlist(replica.signed, replica.branch, replica.blobs))

    # ---- what is held ------------------------------------------------------------------------------------------------

    def all(self) -> list[Replica]:
        """Every replica here."""
        return [replica for held in self._held.values() for replica in held.values()]

    def get(self, job: JobId) -> Replica | None:
        """The job's replica here: of two branches the one that has a state, and of those the younger."""
        held = self._held.get(job, {}).values()
        return max(held, key=lambda replica: (not replica.empty, len(replica.branch.ancestors)), default=None)

    def waiting(self, job: JobId) -> str:
        """What a job without a leader waits for, for people; "" when it has one, or isn't held here."""
        replica = self.get(job)
        if replica is None:
            return ""
        if replica.stuck:
            return "the disk of this machine takes nothing now"
        patience = self._patience.get(replica)
        return patience.waiting if patience is not None else ""

    def choose(self, count: int) -> list[PeerId]:
        """Who is to hold a job submitted here: this peer, then the oldest."""
        return choice.choose(self.me, self._asking.ages(), count)

    def hello_info(self) -> bytes:
        """What this peer says of its age in its hello."""
        return choice.hello_info(self._asking.started_s)


def _goes_on(one: Replica, other: Replica) -> bool:
    """Whether `one` stays, of two branches that have a state here: the one that is led; an ancestor that is, else the younger; of
    unrelated ones the lower name."""
    led = one.hears_leader()
    if led != other.hears_leader():
        return led
    if other.branch.name in one.branch.ancestors:
        return not led
    if one.branch.name in other.branch.ancestors:
        return led
    return path(one.branch) < path(other.branch)
