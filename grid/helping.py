"""Working for jobs that other peers lead: looking for work, taking grants, keeping a place for each job.

Rules: a job's place is opened when its first grant arrives and kept until the job is over or its leader is silent for
JOB_FORGET_S; a job that can't run here (its environment fails to build, say) is told to its leader once and left alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from dht.core.codec import CodecError
from dht.core.identity import BadSignature, Identity, PeerId
from grid.bell import Bell
from grid.core import limits
from grid.core.board import Board, Entry
from grid.core.errors import BlobLostError, GridError, in_one_line
from grid.core.job import JobId
from grid.core.messages import Claims, FindBlob, Give, Holders, Nothing, Steal, decode, encode
from grid.core.stealing import Ask, Thief
from grid.jobdata import JobData
from grid.jobplace import Services, open_place
from grid.remote import Remote
from grid.transport.errors import TransportError
from grid.worker.environment import python_minor

if TYPE_CHECKING:
    from grid.post import PostOffice
    from grid.transport.mesh import Mesh

GRANT_AGE_S_MAX = limits.STEAL_TIMEOUT_S / 2
"""A grant that waited longer for its job's place may have been taken back: it is dropped and asked for again."""
log = logging.getLogger(__name__)


class Helper:
    """One job helped here."""

    def __init__(self, leader: PeerId) -> None:
        self.leader = leader
        self.scope = trio.CancelScope()
        self.ready = trio.Event()
        self.remote: Remote | None = None


class Helping:
    """All jobs helped here."""

    def __init__(
        self,
        services: Services,
        identity: Identity,
        board: Board,
        mesh: Mesh,
        post: PostOffice,
        nursery: trio.Nursery,
        rng: random.Random,
        tags: tuple[str, ...],
        leads: Callable[[JobId], bool],
    ) -> None:
        self.jobs: dict[JobId, Helper] = {}
        self.unfit: dict[JobId, str] = {}
        self._services = services
        self._identity = identity
        self._board = board
        self._mesh = mesh
        self._post = post
        self._nursery = nursery
        self._tags = tags
        self._leads = leads
        self._thief = Thief(rng)
        self._bell = Bell()
        services.workshop.hungry.append(self._hungry)

    # ---- news ----

    def heard(self, job: JobId, entry: Entry) -> None:
        """News of a job that another peer leads."""
        if job in self.unfit or self._leads(job):
            return
        if not entry.live:
            self.over(job)
            return
        if entry.spec.python != python_minor():
            self._unfit(job, entry, f"the job needs Python {entry.spec.python}, this peer has {python_minor()}")
            return
        self._thief.job_known(job, entry.leader, entry.news.work, trio.current_time())
        self._bell.ring()

    def over(self, job: JobId) -> None:
        """The job ended."""
        self._thief.job_gone(job)
        helper = self.jobs.get(job)
        if helper is not None:
            helper.scope.cancel()

    def poked(self, job: JobId, by: PeerId) -> None:
        """A peer has work of this job again."""
        self._thief.poked(job, by, trio.current_time())
        self._bell.ring()

    def up(self, peer: PeerId) -> None:
        """A connection stands."""
        for helper in self.jobs.values():
            if helper.leader == peer and helper.remote is not None:
                helper.remote.reconnected()

    def down(self, peer: PeerId) -> None:
        """A connection ended."""
        for helper in self.jobs.values():
            if helper.leader == peer and helper.remote is not None:
                helper.remote.disconnected()

    # ---- stealing ----

    def _hungry(self) -> None:
        if self._thief.jobs():
            self._bell.ring()

    def _wanted(self, job: JobId) -> int:
        """Slots that this job could use here now."""
        workshop = self._services.workshop
        if workshop.draining or workshop.slots == 0:
            return 0
        helper = self.jobs.get(job)
        if helper is not None and helper.remote is not None and helper.ready.is_set():
            site = helper.remote.site
            if site.remaining_s() < limits.STEAL_LOW_WATER_S * workshop.slots:
                return workshop.slots
            return 0
        queued = sum(min(site.deque.total, workshop.slots) for site in workshop.sites)
        return max(0, workshop.free - queued)

    async def run(self) -> None:
        """Ask for work whenever there is room, until cancelled."""
        while True:
            decision = self._thief.next(trio.current_time(), self._wanted)
            if isinstance(decision, Ask):
                self._nursery.start_soon(self._ask, decision)
                continue
            with trio.move_on_at(decision.until_s if decision.until_s is not None else float("inf")):
                await self._bell.wait()

    async def _ask(self, ask: Ask) -> None:
        hints: tuple[PeerId, ...] = ()
        granted = False
        try:
            granted, hints = await self._steal(ask)
        except (TransportError, GridError, BadSignature, CodecError, OSError, trio.TooSlowError) as error:
            log.debug("no work of job %s from %s: %s", ask.job.hex()[:8], ask.victim.hex()[:8], error)
        finally:
            now_s = trio.current_time()
            if granted:
                self._thief.granted(ask.job, now_s)
            else:
                self._thief.refused(ask.job, hints, now_s)
            self._bell.ring()

    async def _steal(self, ask: Ask) -> tuple[bool, tuple[PeerId, ...]]:
        entry = self._board.get(ask.job)
        if entry is None or not entry.live:
            self.over(ask.job)
            return False, ()
        if trio.current_time() - entry.heard_s > limits.JOB_FORGET_S:
            self._thief.job_gone(ask.job)  # until there is news of it again
            return False, ()
        helper = self.jobs.get(ask.job)
        if helper is not None and helper.remote is not None:
            question = helper.remote.ask(ask.slots)
        else:
            question = Steal(ask.job, entry.news.epoch, ask.slots, self._tags)
        answer = decode(await self._mesh.request(ask.victim, encode(question), limits.STEAL_TIMEOUT_S))
        if isinstance(answer, Nothing):
            return False, tuple(PeerId(hint) for hint in answer.hints[: limits.HINTS_MAX])
        if not isinstance(answer, Give):
            return False, ()
        began_s = trio.current_time()
        helper = await self._open(ask.job, entry)
        late = trio.current_time() - began_s > GRANT_AGE_S_MAX
        if helper.remote is None or late or self.jobs.get(ask.job) is not helper:
            return False, ()
        await helper.remote.take(ask.victim, answer)
        return True, ()

    # ---- places ----

    async def _open(self, job: JobId, entry: Entry) -> Helper:
        helper = self.jobs.get(job)
        if helper is None:
            helper = self.jobs[job] = Helper(entry.leader)
            self._nursery.start_soon(self._help, job, entry, helper)
        await helper.ready.wait()
        return helper

    async def _help(self, job: JobId, entry: Entry, helper: Helper) -> None:
        """Keep a place for the job until it is over."""
        try:
            with helper.scope:
                await self._serve(job, entry, helper)
        except Exception as error:  # the job's own trouble here: its leader is told, this peer goes on
            reason = in_one_line(error)
            log.warning("job %s can't run here: %s", job.hex()[:8], reason, exc_info=error)
            self._unfit(job, entry, reason, lasting=not _passing(error))
        finally:
            helper.ready.set()
            self.jobs.pop(job, None)
            self._services.workshop.pump()

    def _unfit(self, job: JobId, entry: Entry, reason: str, lasting: bool = True) -> None:
        if lasting:
            self.unfit[job] = reason
            while len(self.unfit) > limits.JOBS_KNOWN_MAX:
                self.unfit.pop(next(iter(self.unfit)))
            self._thief.job_gone(job)
        self._post.post(entry.leader, Claims(job, entry.news.epoch, (), 0, 0, (), reason[: limits.TEXT_MAX]))

    async def _serve(self, job: JobId, entry: Entry, helper: Helper) -> None:
        services = self._services
        epoch = entry.news.epoch

        async def find(blob: bytes) -> list[PeerId]:
            try:
                answer = decode(await self._mesh.request(helper.leader, encode(FindBlob(job, blob)), limits.STEAL_TIMEOUT_S))
            except (TransportError, CodecError, trio.TooSlowError):
                return [helper.leader]
            found = [PeerId(peer) for peer in answer.peers] if isinstance(answer, Holders) else []
            return [peer for peer in dict.fromkeys([*found, helper.leader]) if peer != services.me]

        data = JobData(job, services.store, services.fetcher, find)
        remote = Remote(job, epoch, helper.leader, data, self._identity, services.me, self._post)
        remote.tags = self._tags
        async with (
            trio.open_nursery() as nursery,
            open_place(job, entry.spec, services, remote, data, epoch, nursery) as place,
        ):
            remote.attach(place.site)
            helper.remote = remote
            helper.ready.set()
            nursery.start_soon(remote.run)
            await self._watch(job, remote)
            nursery.cancel_scope.cancel()

    async def _watch(self, job: JobId, remote: Remote) -> None:
        """Return when the job is over or its leader has been silent for too long."""
        while True:
            await trio.sleep(limits.HEARTBEAT_S)
            entry = self._board.get(job)
            if entry is None or not entry.live:
                return
            heard_s = max(remote.heard_s, entry.heard_s)
            if trio.current_time() - heard_s > limits.JOB_FORGET_S:
                self._thief.job_gone(job)
                return


def _passing(error: BaseException) -> bool:
    """It may go well the next time: a blob could not be fetched, its holder not be reached."""
    if isinstance(error, BaseExceptionGroup):
        return all(_passing(each) for each in error.exceptions)
    return isinstance(error, TransportError | BlobLostError | trio.TooSlowError)
