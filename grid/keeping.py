"""Copies of a job's blobs on several peers: the `Keeper` of the job's leader asks for them, each peer's `Custodian` has them.

Which owner pins what in a peer's store:
- `<job>`: what the job's place here uses at the moment (`grid.jobdata`), until the place closes;
- `kept:<job>`: what this peer holds so that the job outlives others: results its recorder stored, blobs it was asked to keep;
  until the job is over (`Custodian.release`), whoever leads meanwhile;
- `outcome:<job>`: the files of an ended job, until it leaves the archive.
Rules: "I keep it" is said when the blob was checked and is on the disk; a `Keep` is believed of the job's leader only (the caller
checks); what a peer keeps for others is bounded in bytes, and never counts before it is asked for.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import PeerId
from grid.bell import Bell
from grid.blobs.blob import BLOB_BYTES_MAX, BadBlob, BlobId, BlobMissing, BlobUnavailable, StoreFull
from grid.body import Body, FileSlice, SpoolFile
from grid.core import keeping as core
from grid.core.facts import Stored
from grid.core.job import JobId
from grid.core.messages import Have, Keep, Message

if TYPE_CHECKING:
    from grid.blobs.fetch import Fetcher
    from grid.blobs.store import BlobStore
    from grid.blobs.transfer import Read

KEPT_SHARE: Final = 0.5
"""Of a store's quota: what a peer keeps for jobs because it was asked to. The rest is for what it works on."""
FETCHES_MAX: Final = 4
"""Blobs fetched at a time in order to keep them: the tasks' own fetches must not wait for many of these."""
WAITING_MAX: Final = 1024
"""Blobs of which a peer was asked to keep and did not say yet whether it does; further ones it refuses."""
KEEP_BLOBS_MAX: Final = 256
"""Blobs of one Keep that are looked at."""
OVER_MAX: Final = 1024
"""Ended jobs that are remembered, so that a late Keep pins nothing for ever."""
GATHER_S: Final = 0.01
"""Blobs wait so long for company before peers are asked to keep them."""
ASK_S: Final = 2.0
"""For a peer to say whether it has a blob, dialling it included."""
COMPANY_S: Final = 0.05
"""After the first peer that has it: so long others may say so too."""
SILENT_S: Final = 10.0
"""A peer that did not answer within ASK_S is asked last for so long."""
READ_BYTES_MAX: Final = 1 << 20
"""Stored bytes up to this many are handed over in memory, more as a slice of the blob's file."""
TROUBLES: Final = (BlobUnavailable, BlobMissing, BadBlob, StoreFull, OSError, ValueError)

Post = Callable[[PeerId, Message], None]
log = logging.getLogger(__name__)


def owner_of(job: JobId) -> str:
    """The name under which a store pins what is kept for the job."""
    return f"kept:{job.hex()}"


class Custodian:
    """One peer's blobs kept for jobs. `bytes_max`: of those that nothing else here needs."""

    def __init__(self, me: PeerId, store: BlobStore, fetcher: Fetcher, post: Post, bytes_max: int) -> None:
        self.store = store
        self.fetcher = fetcher
        self.bytes_max = bytes_max
        self.kept_bytes = 0
        self._me = me
        self._post = post
        self._kept: dict[JobId, dict[bytes, int]] = {}
        self._scopes: dict[JobId, list[trio.CancelScope]] = {}
        self._over: OrderedDict[JobId, None] = OrderedDict()
        self._places = trio.Semaphore(FETCHES_MAX)
        self._waiting = 0

    def jobs(self) -> list[JobId]:
        """Jobs for which something is kept, or about to be."""
        return list(dict.fromkeys([*self._kept, *self._scopes]))

    # ---- keeping ----

    async def answer_keep(self, peer: PeerId, message: Keep) -> None:
        """Do what the job's leader asks; it is told of each blob whether it is kept. Returns when all are."""
        job = JobId(message.job)
        blobs = message.blobs[:KEEP_BLOBS_MAX]
        free = max(0, WAITING_MAX - self._waiting)
        holders = [PeerId(holder) for holder in message.holders[: core.SOURCES_MAX] if holder != self._me]
        sources = list(dict.fromkeys([*holders, peer]))
        if blobs[free:]:
            self._post(peer, Have(job, (), tuple(blob for blob, _ in blobs[free:])))
        here = [(blob, size) for blob, size in blobs[:free] if self.store.has(BlobId(blob))]
        self._waiting += len(blobs[:free])
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer, peer, job, here, sources)
                for wanted in blobs[:free]:
                    if wanted not in here:
                        nursery.start_soon(self._answer, peer, job, [wanted], sources)
        finally:
            self._waiting -= len(blobs[:free])

    async def _answer(self, peer: PeerId, job: JobId, blobs: Sequence[tuple[bytes, int]], sources: Sequence[PeerId]) -> None:
        kept: list[bytes] = []
        refused: list[bytes] = []
        for blob, size in blobs:
            (kept if await self.keep(job, blob, size, sources) else refused).append(blob)
        if blobs:
            self._post(peer, Have(job, tuple(kept), tuple(refused)))

    async def keep(self, job: JobId, blob: bytes, size: int, sources: Sequence[PeerId] = ()) -> bool:
        """Have the blob here, durable and pinned until the job is over; False if that can't be."""
        name = BlobId(blob)
        if job in self._over:
            return False
        known = blob in self._kept.get(job, {})
        if not known and not self.store.pinned(name) and self.kept_bytes + size > self.bytes_max:
            log.debug("blob %s of job %s is not kept: the share for that is used up", blob.hex()[:12], job.hex()[:8])
            return False
        scopes = self._scopes.setdefault(job, [])
        self.kept_bytes += size
        with trio.CancelScope() as scope:
            scopes.append(scope)
            try:
                await self._have(name, size, sources, owner_of(job))
            except TROUBLES as error:
                log.debug("blob %s of job %s is not kept: %s", blob.hex()[:12], job.hex()[:8], error)
            else:
                self._note(job, blob, size)
                return True
            finally:
                self.kept_bytes -= size
                scopes.remove(scope)
                if not scopes and self._scopes.get(job) is scopes:
                    del self._scopes[job]
        if known and not self.store.has(name):
            self.kept_bytes -= self._kept.get(job, {}).pop(blob, 0)
        return False

    async def _have(self, blob: BlobId, size: int, sources: Sequence[PeerId], owner: str) -> None:
        if not await self.store.intact(blob):
            async with self._places:
                await self.fetcher.ensure(blob, size, sources, owner=owner)
        if self.store.size(blob) != size:
            raise ValueError(f"the blob has not {size} bytes")
        await self.store.secure(blob, owner)

    def _note(self, job: JobId, blob: bytes, size: int) -> None:
        kept = self._kept.setdefault(job, {})
        if blob not in kept:
            kept[blob] = size
            self.kept_bytes += size

    # ---- jobs' ends, and this peer's own restart ----

    def release(self, job: JobId, outcome: Iterable[bytes] = (), *, final: bool = True) -> None:
        """The job is over: what was kept for it may go, but for the outcome's files that are here (archived jobs only).

        final=False: it was not heard of for long, and may come back.
        """
        for blob in outcome:
            self.store.pin(f"outcome:{job.hex()}", BlobId(blob))
        if final:
            self._over[job] = None
            while len(self._over) > OVER_MAX:
                self._over.popitem(last=False)
        for scope in self._scopes.pop(job, []):
            scope.cancel()
        self.kept_bytes -= sum(self._kept.pop(job, {}).values())
        self.store.unpin(owner_of(job))

    def restore(self, job: JobId, blobs: Iterable[tuple[bytes, int]]) -> int:
        """After a restart, before the store's RESTART pins go: pin what is here of the blobs (name, size) that a job's spec and
        record refer to. Returns how many that are.
        """
        count = 0
        for blob, size in blobs:
            if self.store.has(BlobId(blob)):
                self.store.pin(owner_of(job), BlobId(blob))
                self._note(job, blob, size)
                count += 1
        return count


class Keeper:
    """The leader's side, for one job in one epoch. `read`: of another peer's blobs, as the fetcher's."""

    def __init__(
        self,
        job: JobId,
        me: PeerId,
        custodian: Custodian,
        post: Post,
        peers: Iterable[PeerId],
        replicas: Iterable[PeerId],
        read: Read,
        copies: int,
        lost: Callable[[list[bytes]], None] = lambda blobs: None,
    ) -> None:
        """peers: who is connected now. copies: of vital blobs. lost: told of blobs that nobody holds any more."""
        self.job = job
        self._me = me
        self._custodian = custodian
        self._store = custodian.store
        self._post = post
        self._read = read
        self._copies = copies
        self._lost = lost
        self._table = core.Keeping(me)
        self._replicas: tuple[PeerId, ...] = ()
        self._silent: dict[PeerId, float] = {}
        self._bell = Bell()
        self._changed = Bell()
        for peer in peers:
            self._table.up(peer)
        self.set_replicas(replicas)

    # ---- what is to be kept ----

    def add(
        self, blob: bytes, size: int, *, copies: int = 0, vital: bool = False, holders: Iterable[PeerId] | None = None
    ) -> bool:
        """Keep so many copies (0: as many as the job wants of a vital one, else one). holders: who has it; None: this peer,
        if it does.

        vital: can't be made again (what a spec or an outcome names), and goes to the job's replicas first. False: the table of
        results is full, this one is not watched.
        """
        copies = copies or (self._copies if vital else 1)
        if holders is None:
            holders = (self._me,) if self._store.has(BlobId(blob)) else ()
        added = self._table.add(blob, size, copies, vital=vital, near=holders, now_s=trio.current_time())
        self._bell.ring()
        return added

    def made(self, blob: bytes, size: int, made_s: float, holders: Iterable[PeerId] = ()) -> None:
        """Results were stored here that took `made_s` to make: a second copy of what is dearer to make than to copy."""
        copies = core.RESULT_COPIES if core.worth_a_copy(size, made_s) else 1
        self.add(blob, size, copies=copies, holders=[self._me, *holders])

    def recorded(self, blobs: Iterable[Stored]) -> None:
        """What an earlier leader's facts refer to: found where it is, and copied where it has but one holder."""
        for stored in blobs:
            here = [self._me] if self._store.has(BlobId(stored.blob)) else []
            self.add(stored.blob, stored.blob_size, copies=core.RESULT_COPIES, holders=[*here, *map(PeerId, stored.peers)])

    def forget(self, blobs: Iterable[bytes]) -> None:
        """Nobody needs these any more."""
        for blob in blobs:
            self._table.forget(blob)

    def set_replicas(self, replicas: Iterable[PeerId]) -> None:
        """The job's replica set changed."""
        self._replicas = tuple(replicas)
        self._table.set_replicas(self._replicas)
        self._bell.ring()

    # ---- what peers say ----

    def have(
        self, peer: PeerId, blobs: Iterable[bytes], refused: Iterable[bytes] = (), sizes: Iterable[int] = ()
    ) -> None:
        """A peer's Have. With sizes: its tasks stored these, results may name them, so they get a second copy."""
        now_s = trio.current_time()
        blobs = tuple(blobs)
        for blob, size in zip(blobs, sizes, strict=False):
            if blob not in self._table and 0 <= size <= BLOB_BYTES_MAX:
                self.add(blob, size, copies=core.RESULT_COPIES, holders=[peer])
        for blob in blobs:
            self._table.kept(peer, blob)
        for blob in refused:
            self._table.refused(peer, blob, now_s)
        self._told()

    def up(self, peer: PeerId) -> None:
        """A connection stands."""
        self._silent.pop(peer, None)
        self._table.up(peer)
        self._told()

    def down(self, peer: PeerId) -> None:
        """A connection ended: what the peer held is copied anew at once."""
        self._table.down(peer, trio.current_time())
        self._told()

    def _told(self) -> None:
        self._bell.ring()
        self._changed.ring()

    # ---- asking ----

    async def run(self) -> None:
        """Ask peers to keep what is to be kept, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                for order in self._table.plan(now_s):
                    if order.peer == self._me:
                        nursery.start_soon(self._keep_here, order)
                    else:
                        self._post(order.peer, Keep(self.job, order.blobs, order.sources))
                lost = self._table.lost(now_s)
                if lost:
                    self._lost(lost)
                wake_s = self._table.wake_s(now_s)
                with trio.move_on_at(wake_s if wake_s is not None else float("inf")):
                    await self._bell.wait()
                    await trio.sleep(GATHER_S)

    async def _keep_here(self, order: core.Order) -> None:
        for blob, size in order.blobs:
            kept = await self._custodian.keep(self.job, blob, size, order.sources)
            self.have(self._me, (blob,) if kept else (), () if kept else (blob,))

    # ---- looking ----

    def holders(self, blob: bytes) -> list[PeerId]:
        """Connected peers that have it, this one included, best first."""
        return self._table.holders(blob)

    async def durable(self, blobs: Mapping[bytes, int], majority_of: Sequence[PeerId], timeout_s: float) -> bool:
        """Whether, within the time, more than half of these peers (this one among them, or not) keep all these blobs.

        blobs: name → size; those not watched yet are vital from now on, and here. `run` must be running.
        """
        for blob, size in blobs.items():
            if blob not in self._table:
                self.add(blob, size, vital=True)
            self._table.require(blob, majority_of)
        self._bell.ring()
        with trio.move_on_after(timeout_s):
            while True:
                keeping = sum(all(self._table.keeps(peer, blob) for blob in blobs) for peer in majority_of)
                if 2 * keeping > len(majority_of):
                    return True
                await self._changed.wait()
        return False

    # ---- fetching ----

    async def fetch(self, stored: Stored) -> Body | None:
        """Bytes that a fact names: from here, from who is said to hold them, from the replicas, from any connected peer.

        None: nobody who answers has them, make them again. They are kept here from then on. Raises StoreFull, OSError.
        """
        if min(stored.offset, stored.size) < 0 or stored.offset + stored.size > stored.blob_size:
            return None
        if not stored.size:
            return b""
        blob = BlobId(stored.blob)
        try:
            if not await self._store.intact(blob):
                tiers = self._tiers(stored)

                async def more(blob: BlobId) -> Sequence[PeerId]:
                    while tiers:
                        found = await self._who_has(blob, tiers.pop(0))
                        if found:
                            return found
                    return ()

                await self._custodian.fetcher.ensure(blob, stored.blob_size, (), more_holders=more, owner=owner_of(self.job))
                self._table.said(self._me, stored.blob)
                self._bell.ring()
            return await self._body(stored)
        except (BlobUnavailable, BlobMissing, BadBlob, ValueError) as error:
            log.info("stored bytes of job %s can't be had: %s", self.job.hex()[:8], error)
            return None

    async def _body(self, stored: Stored) -> Body:
        blob = BlobId(stored.blob)
        if stored.size <= READ_BYTES_MAX:
            return await self._store.read(blob, stored.offset, stored.size)
        path = await self._store.path(blob)
        if path is None or self._store.size(blob) != stored.blob_size:
            raise BlobMissing(blob.hex())
        file = SpoolFile(str(path), owned=False)
        file.owners = 1
        return FileSlice(file, stored.offset, stored.size)

    def _tiers(self, stored: Stored) -> list[list[PeerId]]:
        """Whom to ask, group by group: those who should have it, the replicas, others; at last those silent lately."""
        now_s = trio.current_time()
        recorded = [*self._table.holders(stored.blob), *map(PeerId, stored.peers[: core.SOURCES_MAX])]
        tiers: list[list[PeerId]] = []
        seen = {self._me}
        silent: list[PeerId] = []
        for group in (recorded, self._replicas, self._table.search(stored.blob)):
            tier: list[PeerId] = []
            for peer in group:
                if peer not in seen:
                    seen.add(peer)
                    (silent if self._silent.get(peer, now_s) > now_s else tier).append(peer)
            tiers.append(tier)
        tiers[-1] += silent
        return [tier for tier in tiers if tier]

    async def _who_has(self, blob: BlobId, peers: Sequence[PeerId]) -> list[PeerId]:
        """Those of the peers that say so, fastest first; all are asked at once."""
        found: list[PeerId] = []

        async def ask(peer: PeerId) -> None:
            with trio.move_on_after(ASK_S) as patience:
                try:
                    await self._read(peer, blob, 0, 1)
                except Exception as error:  # whatever the network may raise: this peer does not give it
                    log.debug("peer %s does not have blob %s: %s", peer.hex()[:8], blob.hex()[:12], error)
                else:
                    found.append(peer)
                    nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + COMPANY_S)
            if patience.cancelled_caught:
                self._silent[peer] = trio.current_time() + SILENT_S

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
        return found
