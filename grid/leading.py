"""The jobs of whose logs this peer holds a replica: it follows them, and leads those whose log it leads.

Founding a job that was submitted here, taking over when this peer's replica is elected, giving up when it is not any more.
Rules:
- what a job shows (output, outcome) comes from its log, on every replica alike; who leads only proposes it;
- one leadership of a job at a time: the next begins when the last has cleaned up;
- a leadership that lost the log says nothing and does nothing any more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import PeerId
from grid.bell import Bell
from grid.config import parse_address
from grid.core import limits
from grid.core.facts import AnyFact, Ended, Output, RangeDone, SegmentsCut, Stored
from grid.core.job import RUNNING, BlobRef, JobId, JobSpec, Outcome, SignedSpec, job_id
from grid.core.messages import Answer, Ask, JobNews, decode, encode
from grid.core.news import sign_news
from grid.keeping import owner_of
from grid.leadjob import LeadJob, write_record
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.core.board import Entry
    from grid.core.recovery import Standing
    from grid.followed import Followed
    from grid.jobview import JobView
    from grid.peer import Peer
    from grid.replica import Replica

DURABLE_S: Final = 600.0
"""For a job's code and inputs to reach a majority of its replicas before `submit -d` says what is missing."""
FILL_AGAIN_S: Final = 1.0
FILLS_MAX: Final = 10_000
"""Pieces of missing output that are asked for: a gigabyte takes about 4,000; later questions for it go to other peers."""
log = logging.getLogger(__name__)


@dataclass
class Held:
    """One job held here."""

    followed: Followed
    signed: SignedSpec
    lead: LeadJob | None = None
    filling: bool = False
    turn: trio.Lock = field(default_factory=trio.Lock)
    turned: Bell = field(default_factory=Bell)


class Leading:
    """All jobs held here. Its hooks are called by `grid.replicas`."""

    def __init__(self, peer: Peer) -> None:
        self.held: dict[JobId, Held] = {}
        self._peer = peer

    # ---- jobs that begin ----

    async def found(self, spec: JobSpec, signed: SignedSpec, blobs: Sequence[BlobRef]) -> JobId:
        """Accept a job submitted here: its log is on a majority's disks when this returns. Raises GridError, OSError."""
        job = job_id(signed.payload)
        held = self.hold(job, signed, spec)
        candidates = [PeerId(peer) for peer in spec.replicas]
        needed = [(ref.id, ref.size) for ref in blobs]
        try:
            replica = await self._peer.replicas.found(spec, signed, candidates, blobs=needed)
        except BaseException:
            self.held.pop(job, None)
            self._peer.jobs.unfollow(job)
            raise
        while replica.leads() and held.lead is None and held.followed.view.outcome is None:
            with trio.move_on_after(limits.HEARTBEAT_S):  # nothing rings when another member comes to lead
                await held.turned.wait()
        return job

    def hold(self, job: JobId, signed: SignedSpec, spec: JobSpec) -> Held:
        """Follow a job from its log, which is (about to be) here."""
        held = self.held.get(job)
        if held is None:
            folder = self._peer.home.jobs / job.hex()
            held = self.held[job] = Held(self._peer.jobs.follow(job, signed, spec, folder), signed)
        return held

    async def durable(self, job: JobId) -> str:
        """Wait until a majority of the replicas holds all that the job needs. Returns what users should know, or ""."""
        held = self.held.get(job)
        if held is None or held.followed.view.outcome is not None:
            return ""
        if held.lead is None:
            return "another peer leads the job already: keep this machine on for some seconds, until its files are copied"
        if held.lead.replica is None:
            return ""
        lead, replica = held.lead, held.lead.replica
        if len(replica.voters) == 1:
            return "no other peer holds the job: it is durable on this machine alone"
        if lead.keeper is not None and not await lead.keeper.durable(dict(replica.blobs), replica.voters, DURABLE_S):
            return "the job's code or inputs could not be copied to a majority of its replicas yet"
        return ""

    async def given_up(self) -> None:
        """Return when no job is led here that others could lead."""
        for held in list(self.held.values()):
            while held.lead is not None and held.lead.replica is not None and len(held.lead.replica.voters) > 1:
                await held.turned.wait()

    # ---- the log's hooks ----

    def enlisted(self, replica: Replica) -> None:
        """This peer was asked to hold a replica; or has found one on its disk."""
        held = self.hold(replica.job, replica.signed, replica.spec)
        held.followed.replica = replica
        for blob, _ in replica.blobs:
            self._keep(replica.job, blob)

    def applied(self, replica: Replica, fact: AnyFact) -> None:
        """A fact became final."""
        held = self.held.get(replica.job)
        if held is None:
            return
        if isinstance(fact, RangeDone | SegmentsCut):  # nearly all of them are
            where = fact.result if isinstance(fact, RangeDone) else fact.arguments
            if isinstance(where, Stored):
                self._keep(replica.job, where.blob)
            return
        match fact:
            case Output(fd, at, data):
                try:
                    held.followed.view.write_at(fd, at, data)
                except OSError as error:
                    log.warning("job %s: its output can't be kept: %s", replica.job.hex()[:8], error)
                    held.followed.view.log(fd).expect(at + len(data))
                    if held.lead is not None:
                        held.lead.disk_failed(error)
            case Ended(outcome, shown):
                held.followed.shown = json.loads(shown) if shown else None
                self._ended(held, replica, codec.decode(outcome, Outcome))

    def _keep(self, job: JobId, blob: bytes) -> None:
        """A blob that the log names stays, if it is here."""
        store = self._peer.services.store
        if store.has(blob):  # type: ignore[arg-type]
            store.pin(owner_of(job), blob)  # type: ignore[arg-type]

    def compacting(self, replica: Replica) -> None:
        """A snapshot is about to replace facts of the log: what was written because of them must stay."""
        held = self.held.get(replica.job)
        if held is not None:
            try:
                held.followed.view.sync()
            except OSError as error:  # after a power cut a part of the output will be missing here: others have it
                log.warning("job %s: its output can't be written: %s", replica.job.hex()[:8], error)

    def restored(self, replica: Replica) -> None:
        """The log's state was replaced by a snapshot: what was shown before it may be missing here."""
        held = self.held.get(replica.job)
        if held is None:
            return
        view = held.followed.view
        self._restore_output(replica, view)
        self._begin_filling(held, replica)
        for stored in replica.chronicle.blobs():
            self._keep(replica.job, stored.blob)
        if replica.chronicle.outcome is not None:
            self._ended(held, replica, codec.decode(replica.chronicle.outcome, Outcome))

    def _restore_output(self, replica: Replica, view: JobView) -> None:
        """Write what the record itself has of the output."""
        try:
            for fd, length in replica.chronicle.output_length.items():
                kept = bytes(replica.chronicle.output[fd])
                if kept:
                    view.write_at(fd, 0, kept)
                view.log(fd).expect(length)
        except OSError as error:
            log.warning("job %s: its output can't be kept: %s", replica.job.hex()[:8], error)

    def _begin_filling(self, held: Held, replica: Replica) -> None:
        view = held.followed.view
        if (view.stdout.missing() or view.stderr.missing()) and not held.filling:
            held.filling = True
            self._peer.nursery.start_soon(self._fill, held, replica)

    async def _fill(self, held: Held, replica: Replica) -> None:
        """Fetch the output that a snapshot left out from other members."""
        view, job = held.followed.view, replica.job
        try:
            for _ in range(FILLS_MAX):
                for fd, name in ((1, "stdout"), (2, "stderr")):
                    for lo, _ in view.log(fd).missing()[:1]:
                        if not await self._fill_from(replica, view, fd, name, lo):
                            await trio.sleep(FILL_AGAIN_S)
                if not (view.stdout.missing() or view.stderr.missing()):
                    return
        except OSError as error:
            log.warning("job %s: its output can't be kept: %s", job.hex()[:8], error)
        finally:
            held.filling = False

    async def _fill_from(self, replica: Replica, view: JobView, fd: int, name: str, at: int) -> bool:
        """One piece, from whoever has it."""
        params = {"job": replica.job.hex(), "stdout": -1, "stderr": -1, "print": -1, "seen": -1, "replica": True, name: at}
        for peer in replica.members:
            answer = await self._ask(peer, "poll", params) if peer != self._peer.me else None
            if answer is not None and answer.body:
                view.write_at(fd, at, answer.body)
                return True
        return False

    async def _ask(self, peer: PeerId, method: str, params: dict[str, Any]) -> Answer | None:
        """What one peer has to say of a job; None: nothing."""
        question = encode(Ask(method, json.dumps(params).encode()))
        try:
            answer = decode(await self._peer.mesh.request(peer, question, limits.CONTROL_TIMEOUT_S))
        except (TransportError, CodecError, trio.TooSlowError) as error:
            log.info("job %s: no %s from %s: %s", params["job"][:8], method, peer.hex()[:8], error)
            return None
        return answer if isinstance(answer, Answer) else None

    def _ended(self, held: Held, replica: Replica, outcome: Outcome) -> None:
        view = held.followed.view
        if view.outcome is not None:
            return
        if view.stdout.missing() or view.stderr.missing():  # the disk was full for a while
            self._restore_output(replica, view)
        for fd, length in ((1, outcome.stdout_bytes), (2, outcome.stderr_bytes)):
            view.log(fd).expect(length)  # this peer was away when the rest was written
        self._begin_filling(held, replica)
        try:
            view.sync()
            write_record(self._peer.home.jobs / replica.job.hex() / "outcome", codec.encode(outcome))
        except OSError as error:
            log.warning("job %s: its outcome can't be kept here: %s", replica.job.hex()[:8], error)
        for file in outcome.files:
            self._peer.services.store.pin(f"outcome:{replica.job.hex()}", file.blob.id)  # type: ignore[arg-type]
        view.finish(outcome)
        self._peer.board.close(replica.job)
        self._peer.helping.over(replica.job)
        if held.lead is not None:
            held.lead.ended.set()
            held.lead.news()

    def took_over(self, replica: Replica, term: int) -> None:
        """This peer leads the log."""
        self._peer.nursery.start_soon(self._lead, replica, term)

    def stepped_down(self, replica: Replica, why: str) -> None:
        """It does not any more."""
        held = self.held.get(replica.job)
        if held is not None and held.lead is not None and held.lead.replica is replica:
            log.info("job %s: leadership of epoch %d ended: %s", replica.job.hex()[:8], held.lead.epoch, why)
            held.lead.abandon()

    def changed(self, replica: Replica) -> None:
        """Other peers hold the log now, or others endorse its leader."""
        held = self.held.get(replica.job)
        if held is not None and held.lead is not None and held.lead.replica is replica:
            if held.lead.keeper is not None:
                held.lead.keeper.set_replicas(replica.voters)
            held.lead.news()

    def gone(self, replica: Replica) -> None:
        """This peer holds no replica of the job any more: it is over, or others hold it. Or one of two branches was given up."""
        held = self.held.get(replica.job)
        if held is None or held.followed.replica is not replica:
            return
        other = self._peer.replicas.get(replica.job)
        if other is not None and other is not replica and held.followed.view.outcome is None:
            held.followed.replica = other
            return
        del self.held[replica.job]
        outcome = held.followed.view.outcome
        files = [file.blob.id for file in outcome.files] if outcome is not None else ()
        self._peer.custodian.release(replica.job, files, final=outcome is not None)
        if outcome is None:
            self._peer.jobs.unfollow(replica.job)
        elif replica.job not in self._peer.jobs.archived:
            self._peer.jobs.archive(replica.job, replica.spec, outcome, held.followed.describe())

    # ---- what is heard of jobs ----

    def heard(self, job: JobId, entry: Entry) -> None:
        """News of a job that another peer leads, checked."""
        news = entry.news
        self._peer.helping.heard(job, entry)
        if not entry.live and job not in self.held:
            self._peer.custodian.release(job)
        self._peer.replicas.heard(job, (news.branch, news.epoch, news.version, not entry.live))

    def standing(self, job: JobId) -> tuple[Standing, PeerId, float] | None:
        """The best news of a job, its leader, and the age of that news in seconds."""
        entry = self._peer.board.get(job)
        if entry is None:
            return None
        news = entry.news
        age_s = trio.current_time() - entry.heard_s
        return (news.branch, news.epoch, news.version, not entry.live), entry.leader, age_s

    def is_final(self, job: JobId) -> bool:
        """See `grid.replica_ports.Knowledge`."""
        held = self.held.get(job)
        return job in self._peer.jobs.archived or (held is not None and held.followed.view.outcome is not None)

    async def learn_outcome(self, replica: Replica, peers: Sequence[PeerId]) -> bool:
        """See `grid.replica_ports.Knowledge`."""
        held = self.held.get(replica.job)
        for peer in peers if held is not None else ():
            answer = await self._ask(peer, "outcome", {"job": replica.job.hex()})
            if answer is None or held is None:
                continue
            try:
                outcome, shown = codec.decode(answer.body, Outcome), json.loads(answer.result)
            except ValueError as error:
                log.info("job %s: no outcome from %s: %s", replica.job.hex()[:8], peer.hex()[:8], error)
                continue
            held.followed.shown = shown
            self._ended(held, replica, outcome)
            return True
        return False

    # ---- leading ----

    async def _lead(self, replica: Replica, term: int) -> None:
        held = self.held.get(replica.job)
        if held is None:
            return
        async with held.turn:
            if replica.leads() and replica.term == term:
                if replica.chronicle.outcome is None:
                    await self._lead_now(held, replica, term)
                else:  # the leader before may have told nobody
                    self._tell(held, replica, term, held.followed.view.state, False)

    async def _lead_now(self, held: Held, replica: Replica, term: int) -> None:
        peer, job = self._peer, replica.job
        offers = await peer.helping.hand_over(job)
        lead = LeadJob(job, replica.spec, peer.services, peer.reach, term, replica, held.followed.view)
        lead.early.extend((peer.me, message) for message in offers)
        lead.keeper = keeper = peer.keeper(lead)
        lead.news = lambda: self.tell(held, lead)
        if held.followed.state == RUNNING:
            lead.view.state = RUNNING  # it began under an earlier leader
        held.lead = peer.jobs.led[job] = lead
        self.tell(held, lead)
        held.turned.ring()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.run)
                for blob, size in replica.blobs:
                    keeper.add(blob, size, vital=True)
                keeper.recorded(replica.chronicle.blobs())
                await lead.run()
                nursery.cancel_scope.cancel()
        finally:
            held.lead = None
            held.turned.ring()
            peer.jobs.led.pop(job, None)
            if lead.view.outcome is not None:
                peer.jobs.archive(job, replica.spec, lead.view.outcome, held.followed.shown or lead.describe())
            peer.helping.resume(job)

    def tell(self, held: Held, lead: LeadJob) -> None:
        """Spread how a job led here stands."""
        if lead.replica is not None and not lead.abandoned:
            work = lead.place is not None and bool(lead.place.site.deque)
            self._tell(held, lead.replica, lead.epoch, lead.view.state, work)

    def _tell(self, held: Held, replica: Replica, epoch: int, state: str, work: bool) -> None:
        peer = self._peer
        address = parse_address(peer.addresses()[0])
        news = JobNews(
            held.signed,
            epoch,
            peer.me,
            address,
            peer.version_of(replica.job, epoch),
            state,
            work,
            branch=replica.branch,
            mandate=replica.mandate,
        )
        peer.gossip.tell(sign_news(news, peer.identity))
