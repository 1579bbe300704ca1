"""Working for jobs that other peers lead: looking for work, taking grants, keeping a place for each job.

Rules: a job's place is opened when its first grant arrives and kept until the job is over or nothing was heard of any leader
of it for JOB_FORGET_S; when another peer leads, the place goes over to it as it is; a job that can't run here (its
environment fails to build, say) is told to its leader once and left alone; a job that this peer comes to lead is handed over:
its place closes, what it has finished and no leader has acknowledged is the new leadership's.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import trio

from dht.core.codec import CodecError
from dht.core.identity import BadSignature, Identity, PeerId
from grid.bell import Bell
from grid.core import limits
from grid.core.board import Board, Entry
from grid.core.errors import BlobLostError, GridError, in_one_line
from grid.core.job import JobId
from grid.core.messages import Claims, Completed, Drop, FindBlob, Give, Holders, JobsWanted, Nothing, Steal, decode, encode
from grid.core.stealing import Ask, Thief
from grid.jobdata import JobData
from grid.jobplace import Services, open_place
from grid.remote import Remote
from grid.reports import Shelf
from grid.transport.errors import TransportError
from grid.worker.environment import python_minor

if TYPE_CHECKING:
    from grid.post import PostOffice
    from grid.transport.mesh import Mesh

GRANT_AGE_S_MAX = limits.STEAL_TIMEOUT_S / 2
"""A grant that waited longer for its job's place may have been taken back: it is dropped and asked for again."""
SHELF_SHARE = 0.25
"""Of the blob store: results of jobs that live, kept for their later leaders."""
EARLY_DROPS_MAX = 64
"""Remembered of one grant that is on its way here; what is not remembered runs, and its result is not counted."""
_Early: TypeAlias = tuple[JobId, list[tuple[PeerId, Drop]]]
_Answer: TypeAlias = tuple[bool, tuple[PeerId, ...], bool]  # whether work came; who may have some; whether the victim will poke
NOTHING: _Answer = (False, (), False)
log = logging.getLogger(__name__)


class Helper:
    """One job helped here."""

    def __init__(self, entry: Entry) -> None:
        self.follow(entry)
        self.scope = trio.CancelScope()
        self.ready = trio.Event()
        self.leaving = trio.Event()
        self.closed = trio.Event()
        self.collected: list[Completed] = []
        self.remote: Remote | None = None

    leader: PeerId
    branch: bytes
    epoch: int

    def follow(self, entry: Entry) -> None:
        """Work for who leads by these news."""
        self.leader, self.branch, self.epoch = entry.leader, entry.news.branch.name, entry.news.epoch
        remote = getattr(self, "remote", None)
        if remote is not None:
            remote.follow(self.leader, self.branch, self.epoch)


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
        self._retired: set[JobId] = set()
        self._told: dict[JobId, tuple[PeerId, bytes, int]] = {}  # whom it was told that a job can't run here
        self._early: list[_Early] = []
        self._shelf = Shelf(services.store, int(services.store.quota_bytes * SHELF_SHARE))
        self._thief = Thief(rng)
        self._bell = Bell()
        services.workshop.hungry.append(self._hungry)

    # ---- news ----

    def heard(self, job: JobId, entry: Entry) -> None:
        """News of a job that another peer leads."""
        if not entry.live:
            self.over(job)
            return
        if job in self._retired or self._leads(job) or entry.leader == self._services.me:
            return
        if job in self.unfit:
            self._tell_unfit(job, entry)
            return
        if entry.spec.python != python_minor():
            self._unfit(job, entry, f"the job needs Python {entry.spec.python}, this peer has {python_minor()}")
            return
        helper = self.jobs.get(job)
        if helper is not None:
            helper.follow(entry)
        self._thief.job_known(job, entry.leader, entry.news.work, trio.current_time())
        self._bell.ring()

    def over(self, job: JobId) -> None:
        """The job ended."""
        self._retired.discard(job)
        self._stop(job)
        self._shelf.clear(job)

    def _stop(self, job: JobId) -> None:
        self._thief.job_gone(job)
        helper = self.jobs.get(job)
        if helper is not None:
            helper.scope.cancel()

    # ---- leading instead ----

    def retire(self, job: JobId) -> None:
        """This peer is about to lead the job: help no more, from now until `resume`."""
        self._retired.add(job)
        self._thief.job_gone(job)

    async def hand_over(self, job: JobId) -> list[Completed]:
        """Retire, and close the job's place here. Returns all that was finished and no leader has acknowledged, signed.

        Large results in it are blobs of this peer's store, and stay pinned until the job is over.
        """
        self.retire(job)
        helper = self.jobs.get(job)
        if helper is None:
            return []
        helper.leaving.set()
        if helper.remote is None:
            helper.scope.cancel()  # its place is still being opened: it has finished nothing
        await helper.closed.wait()
        return helper.collected

    def resume(self, job: JobId) -> None:
        """This peer's leadership ended without an outcome: help whoever leads."""
        self._retired.discard(job)
        entry = self._board.get(job)
        if entry is not None:
            self.heard(job, entry)

    def poked(self, job: JobId, by: PeerId) -> None:
        """A peer has work of this job again."""
        self._thief.poked(job, by, trio.current_time())
        self._bell.ring()

    def dropped(self, peer: PeerId, drop: Drop) -> None:
        """A leader wants ranges no more: also of a grant that is under way, or waits for its job's place."""
        for job, drops in self._early:
            if job == drop.job and len(drops) < EARLY_DROPS_MAX:
                drops.append((peer, drop))

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
        granted = parked = False
        entry = self._board.get(ask.job)
        leadership = entry and (entry.leader, entry.news.epoch)
        try:
            granted, hints, parked = await self._steal(ask)
        except (TransportError, GridError, BadSignature, CodecError, OSError, trio.TooSlowError) as error:
            log.debug("no work of job %s from %s: %s", ask.job.hex()[:8], ask.victim.hex()[:8], error)
        finally:
            now_s = trio.current_time()
            entry = self._board.get(ask.job)
            if leadership != (entry and (entry.leader, entry.news.epoch)):
                pass  # what the earlier leader said or didn't is no reason to leave the present one alone
            elif granted:
                self._thief.granted(ask.job, now_s)
            else:
                self._thief.refused(ask.job, hints, now_s, parked)
            self._bell.ring()

    async def _steal(self, ask: Ask) -> _Answer:
        entry = self._board.get(ask.job)
        if entry is None or not entry.live:
            self.over(ask.job)
            return NOTHING
        if trio.current_time() - entry.heard_s > limits.JOB_FORGET_S:
            self._thief.job_gone(ask.job)  # until there is news of it again
            return NOTHING
        helper = self.jobs.get(ask.job)
        if helper is not None and helper.remote is not None:
            question = helper.remote.ask(ask.slots)
        else:
            question = Steal(ask.job, entry.news.epoch, ask.slots, self._tags)
        early: _Early = (ask.job, [])
        self._early.append(early)
        try:
            return await self._take(ask, entry, question, early)
        finally:
            self._early = [each for each in self._early if each is not early]  # another ask may look alike

    async def _take(self, ask: Ask, entry: Entry, question: Steal, early: _Early) -> _Answer:
        answer = decode(await self._mesh.request(ask.victim, encode(question), limits.STEAL_TIMEOUT_S))
        if isinstance(answer, Nothing):
            if answer.state == "final" and ask.victim in entry.keepers:
                self._board.close(ask.job)
                self.over(ask.job)
                return NOTHING
            self._thief.paced(ask.job, answer.pause_ms / 1e3)
            if answer.fence > question.epoch:
                self._post.post(ask.victim, JobsWanted())
            return False, tuple(PeerId(hint) for hint in answer.hints[: limits.HINTS_MAX]), answer.parked
        if not isinstance(answer, Give):
            return NOTHING
        began_s = trio.current_time()
        if ask.job in self._retired or self._leads(ask.job):
            return NOTHING
        helper = await self._open(ask.job, self._board.get(ask.job) or entry)
        late = trio.current_time() - began_s > GRANT_AGE_S_MAX
        if helper.remote is None or late or helper.leaving.is_set() or self.jobs.get(ask.job) is not helper:
            return NOTHING
        await helper.remote.take(ask.victim, answer)
        for peer, drop in early[1]:
            if peer == helper.leader:
                await helper.remote.handle(peer, drop)
        return True, (), False

    # ---- places ----

    async def _open(self, job: JobId, entry: Entry) -> Helper:
        helper = self.jobs.get(job)
        if helper is None:
            helper = self.jobs[job] = Helper(entry)
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
            helper.closed.set()
            self.jobs.pop(job, None)
            self._services.workshop.pump()

    def _unfit(self, job: JobId, entry: Entry, reason: str, lasting: bool = True) -> None:
        if lasting:
            self.unfit[job] = reason
            while len(self.unfit) > limits.JOBS_KNOWN_MAX:
                self._told.pop(next(iter(self.unfit)), None)
                self.unfit.pop(next(iter(self.unfit)))
            self._thief.job_gone(job)
            self._tell_unfit(job, entry)
        else:
            self._post.post(entry.leader, Claims(job, entry.news.epoch, (), 0, 0, (), reason[: limits.TEXT_MAX]))

    def _tell_unfit(self, job: JobId, entry: Entry) -> None:
        """Each leader is told once."""
        leadership = entry.leader, entry.news.branch.name, entry.news.epoch
        if self._told.get(job) != leadership:
            self._told[job] = leadership
            self._post.post(entry.leader, Claims(job, entry.news.epoch, (), 0, 0, (), self.unfit[job][: limits.TEXT_MAX]))

    async def _serve(self, job: JobId, entry: Entry, helper: Helper) -> None:
        services = self._services

        async def find(blob: bytes) -> list[PeerId]:
            try:
                answer = decode(await self._mesh.request(helper.leader, encode(FindBlob(job, blob)), limits.STEAL_TIMEOUT_S))
            except (TransportError, CodecError, trio.TooSlowError):
                answer = None
            found = [PeerId(peer) for peer in answer.peers] if isinstance(answer, Holders) else []
            known = self._board.get(job)
            keepers = known.keepers[: limits.HOLDERS_MAX] if known is not None else ()
            return [peer for peer in dict.fromkeys([*found, helper.leader, *keepers]) if peer != services.me]

        data = JobData(job, services.store, services.fetcher, find)
        remote = Remote(
            job,
            helper.epoch,
            helper.leader,
            data,
            self._identity,
            services.me,
            self._post,
            branch=helper.branch,
            shelf=self._shelf,
        )
        remote.tags = self._tags
        async with (
            trio.open_nursery() as nursery,
            open_place(job, entry.spec, services, remote, data, helper.epoch, nursery) as place,
        ):
            remote.attach(place.site)
            remote.follow(helper.leader, helper.branch, helper.epoch)  # it may have changed meanwhile
            helper.remote = remote
            helper.ready.set()
            async with trio.open_nursery() as sending:
                sending.start_soon(remote.run)
                await self._watch(job, helper, remote)
                sending.cancel_scope.cancel()
            if helper.leaving.is_set():
                place.site.closed = True
                helper.collected = await self._collect(remote)
            nursery.cancel_scope.cancel()

    async def _collect(self, remote: Remote) -> list[Completed]:
        try:
            return await remote.reports.collect()
        except (GridError, OSError) as error:  # a full disk: these tasks run again
            log.warning("finished results of job %s can't be kept: %s", remote.job.hex()[:8], in_one_line(error))
            return remote.reports.unacknowledged()

    async def _watch(self, job: JobId, helper: Helper, remote: Remote) -> None:
        """Return when the job is over, handed over, or no leader of it was heard for too long."""
        while not helper.leaving.is_set():
            with trio.move_on_after(limits.HEARTBEAT_S):
                await helper.leaving.wait()
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
