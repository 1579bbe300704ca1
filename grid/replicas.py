"""What a peer does with its replicas: founding groups, being asked to join, mail, surveys, elections' papers, news.

Rules: who asks is judged by its session's id: a replica that lives is replaced or dismissed by members of its own group only; one
that is led gives way to no other branch before news says that it lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from dht.core.identity import PeerId
from grid.core import choice
from grid.core.errors import GridError, RefusedError
from grid.core.job import JobId, JobSpec, SignedSpec, job_id
from grid.core.mandate import Branch, endorse
from grid.core.messages import Dismissed, Endorse, Endorsed, Enlist, Enlisted, Mail, Message, Survey, Surveyed
from grid.core.raft_messages import NodeId, config_of
from grid.core.recovery import RECOVERY_S, Standing, wins
from grid.journal_errors import JournalError
from grid.replica import Founding, Replica
from grid.replica_files import Seat
from grid.replica_recovery import SURVEY_TIMEOUT_S, standing
from grid.replica_registry import Registry

FOUND_S: Final = 6.0
"""For a majority of those that answered to have the founding on disk; then it is tried once more, and at last alone."""
REPLICAS_HELD_MAX: Final = 512
"""On one peer: each costs a file and some memory."""
log = logging.getLogger(__name__)


class Replicas(Registry):
    """One peer's. Its constructor and `run` are `Registry`'s."""

    # ---- founding ----------------------------------------------------------------------------------------------------

    async def found(
        self, spec: JobSpec, signed: SignedSpec, candidates: Sequence[PeerId], *, blobs: Sequence[tuple[bytes, int]] = ()
    ) -> Replica:
        """A job's group with this peer as its first leader: on a majority's disks when this returns. Another may lead by then.

        candidates: who is asked to be the other members; those that do not answer are left out, and taken in later. Raises
        GridError, OSError: then nothing is left of it.
        """
        await self._loaded.wait()
        job = job_id(signed.payload)
        if job in self._held:
            raise RefusedError("this peer holds a replica of the job already")
        others = [peer for peer in candidates if peer != self.me]
        for asked in (others, others, []):
            replica = await self._found(Seat(job, Branch(), self._new_node(), signed, tuple(blobs)), asked)
            if await self._stands(replica):
                return replica
        raise GridError("the job's log could not be founded", "see this peer's messages: its disk may be full")

    async def _stands(self, replica: Replica) -> bool:
        """Whether a majority took the founding in in time, whoever of it leads by now; else nothing is left of it."""
        begun = replica.raft.commit

        def stands() -> bool:
            return replica.leads() or replica.raft.commit > begun

        try:
            with trio.move_on_after(FOUND_S):
                while not stands() and not replica.closed.is_set():
                    await replica.progress.wait()
            if stands() and not replica.closed.is_set():
                return True
        except trio.Cancelled:
            self._abandon(replica)
            raise
        self._abandon(replica)
        with trio.CancelScope(shield=True):
            while replica in self.all():
                await self.changed.wait()
        return False

    def _abandon(self, replica: Replica) -> None:
        self._given_up.append((replica.job, replica.branch.name, replica.node.incarnation))
        for node in replica.raft.log.config.members:
            if node != replica.node:
                self._dismiss(replica, node)
        replica.stop("abandoned")

    async def _found(
        self, seat: Seat, candidates: Sequence[PeerId], state: bytes = b"", payloads: tuple[bytes, ...] = ()
    ) -> Replica:
        """Enlist, write down, begin to lead. The members that enlisted are empty: what they need comes from the log."""
        members = await self._asking.gather(candidates, Enlist(seat.signed, seat.branch, seat.blobs))
        config = config_of([seat.node, *(NodeId(peer, incarnation) for peer, incarnation in members.items())])
        book = await self._shelf.create(seat)
        replica = await self._start(book, Founding(config, state, payloads))
        assert replica is not None  # an empty journal contradicts nothing
        return replica

    def _new_node(self) -> NodeId:
        """This peer under an incarnation that no journal ever had."""
        return NodeId(self.me, int.from_bytes(self._entropy(8), "big") >> 2)

    async def _open_branch(
        self, parent: Replica, branch: Branch, state: bytes, payloads: tuple[bytes, ...], survivors: list[PeerId]
    ) -> None:
        """Go on without the majority, with whom can be reached."""
        wanted = max(1, parent.spec.options.replicas)
        others = choice.newcomers(self._asking.ages(), [self.me, *survivors])
        seat = Seat(parent.job, branch, self._new_node(), parent.signed, parent.blobs)
        async with self._lock(parent.job):
            if parent.hears_leader() or branch.name in self._held.get(parent.job, {}):
                return
            try:
                await self._found(seat, [*survivors, *others][: wanted - 1], state, payloads)
            except (JournalError, OSError) as error:
                log.warning("job %s: a branch can't be opened here: %s", parent.job.hex()[:8], error)

    def _lock(self, job: JobId) -> trio.Lock:
        """One replica of a job is made at a time."""
        for idle in [each for each, lock in self._busy.items() if each not in self._held and not lock.locked()]:
            del self._busy[idle]
        return self._busy.setdefault(job, trio.Lock())

    # ---- elections' papers -------------------------------------------------------------------------------------------

    def _endorse(self, peer: PeerId, request: Endorse) -> Endorsed:
        replica = self._held.get(JobId(request.job), {}).get(request.branch)
        if replica is None or replica.term != request.epoch or replica.leader != peer or self.me not in replica.voters:
            raise RefusedError("the asker is not known as the job's leader here")
        return Endorsed(endorse(request.job, request.branch, request.epoch, peer, self._identity))

    # ---- messages ----------------------------------------------------------------------------------------------------

    async def handle(self, peer: PeerId, message: Message) -> None:
        """A Mail or Dismissed. Raises CodecError, RefusedError."""
        match message:
            case Mail():
                self._deliver(peer, message)
            case Dismissed(job=job, branch=branch, incarnation=incarnation):
                replica = self._held.get(JobId(job), {}).get(branch)
                if replica is not None and replica.node.incarnation == incarnation:
                    if not self._may_dispose(peer, replica):
                        raise RefusedError("a dismissal by who is no member of the group")
                    replica.stop("dismissed")
            case _:
                raise RefusedError(f"{type(message).__name__} is no message to replicas")

    def _deliver(self, peer: PeerId, mail: Mail) -> None:
        sender = NodeId(peer, mail.sender)
        replica = self._held.get(JobId(mail.job), {}).get(mail.branch)
        if replica is None or replica.node.incarnation != mail.to:
            if (mail.job, mail.branch, mail.to) in self._given_up:
                self._tell_dismissed(mail.job, mail.branch, sender)
            return
        raft_log = replica.raft.log
        if replica.leads() and sender not in raft_log.config.members and raft_log.config_index <= replica.raft.commit:
            self._dismiss(replica, sender)
        else:
            replica.mail(sender, mail.data)

    def _may_dispose(self, peer: PeerId, replica: Replica) -> bool:
        """Whether a peer may end a replica that lives here."""
        known = self._knowledge.standing(replica.job)
        named = known is not None and known[1] == peer and known[0][0].name == replica.branch.name
        return replica.knows(peer) or named

    async def request(self, peer: PeerId, message: Message) -> Message:
        """An Enlist, Survey or Endorse. Raises GridError, BadSignature, MembershipError, CodecError."""
        await self._loaded.wait()
        match message:
            case Enlist():
                return await self._enlisted(peer, message)
            case Survey(job=job, branch=branch):
                return self._surveyed(JobId(job), branch)
            case Endorse():
                return self._endorse(peer, message)
            case _:
                raise RefusedError(f"{type(message).__name__} is no request to replicas")

    def _surveyed(self, job: JobId, branch: bytes) -> Surveyed:
        held = self._held.get(job, {})
        replica = held.get(branch)
        final = self._knowledge.is_final(job) or any(each.chronicle.outcome is not None for each in held.values())
        led = any(each.hears_leader() for each in held.values() if each.branch.name == branch or branch in each.branch.ancestors)
        if replica is None or replica.stuck:  # one whose disk takes nothing can neither vote nor store
            return Surveyed(0, led=led, final=final)
        raft = replica.raft
        return Surveyed(replica.node.incarnation, raft.term, raft.log.last_term, raft.log.last_index, led, final)

    async def _enlisted(self, peer: PeerId, enlist: Enlist) -> Enlisted:
        """Hold a replica, empty as yet: on the disk when this answers."""
        job, _ = self._check(enlist.spec)
        async with self._lock(job):
            if self._knowledge.is_final(job):
                raise RefusedError("the job is over")
            if len(self.all()) >= REPLICAS_HELD_MAX:
                raise RefusedError("this peer holds as many replicas as it can")
            for replica in list(self._held.get(job, {}).values()):
                self._check_enlist(peer, enlist.branch, replica)
                if replica.branch.name == enlist.branch.name or replica.empty:
                    replica.stop("replaced")
                    while replica in self.all():
                        await self.changed.wait()
            node = self._new_node()
            with trio.CancelScope(shield=True):  # whoever asked has an answer, or there is nothing here
                try:
                    book = await self._shelf.create(Seat(job, enlist.branch, node, enlist.spec, enlist.blobs))
                    await self._start(book, None, peer)
                except OSError as error:
                    raise GridError(f"this peer's disk takes no replica: {error.strerror or error}") from error
        return Enlisted(node.incarnation)

    def _check_enlist(self, peer: PeerId, branch: Branch, replica: Replica) -> None:
        """Raises RefusedError when the replica that is here must stay as it is."""
        if replica.empty:
            return
        if replica.branch.name == branch.name:
            if replica.leads() or not self._may_dispose(peer, replica):
                raise RefusedError("the replica here is replaced by members of its group only")
        elif replica.hears_leader():
            raise RefusedError("another branch of the job is led, as far as is known here")
        elif replica.branch.name not in branch.ancestors and self._clock() - replica.heard_s < RECOVERY_S:
            raise RefusedError("another branch of the job is here, and may yet be led")

    # ---- what is heard -----------------------------------------------------------------------------------------------

    def down(self, peer: PeerId) -> None:
        """The connection to a peer broke: where it leads, an election may be due."""
        for replica in self.all():
            replica.disconnected(peer)

    def up(self, peer: PeerId) -> None:
        """A connection stands."""

    def heard(self, job: JobId, news: Standing) -> None:
        """News of a job that its checks let pass: another branch may have won over the one here. Its leader is asked first."""
        for replica in list(self._held.get(job, {}).values()):
            if self._beats(news, replica) and replica not in self._in_doubt and self._nursery is not None:
                self._in_doubt.add(replica)
                self._nursery.start_soon(self._give_way, replica, news)

    def _beats(self, news: Standing, replica: Replica) -> bool:
        branch, _, _, final = news
        if branch.name == replica.branch.name or replica.empty:
            return False
        if replica.branch.name in branch.ancestors and not final and replica.hears_leader():
            return False  # it has its majority: the branch will hear so
        return wins(news, standing(replica, self._knowledge))

    async def _give_way(self, replica: Replica, news: Standing) -> None:
        """End the replica if the branch that won is alive: news may outlive who told it, and this may be the last copy."""
        try:
            known = self._knowledge.standing(replica.job)
            if known is None or known[0][0].name != news[0].name or known[1] == self.me:
                return
            answer = await self._asking.survey(known[1], Survey(replica.job, news[0].name), SURVEY_TIMEOUT_S)
            alive = answer is not None and (answer.final if news[3] else answer.led and answer.incarnation != 0)
            if alive and self._beats(news, replica):
                replica.stop("superseded")
        finally:
            self._in_doubt.discard(replica)

    def hand_over(self) -> None:
        """Let others lead what is led here."""
        for replica in self.all():
            if replica.leads():
                replica.transfer()
