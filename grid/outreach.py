"""A leader's dealings with other peers: it answers thieves, takes completions, watches claims, relays children's frames.

Rules: every message is judged by the session it came through and by its signature; what names another epoch is fenced;
completions of one peer are taken in their order and acknowledged when their results are here; what a peer claimed and
lost runs again (see `grid.core.liveness`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import trio

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
from grid.bell import Bell
from grid.body import Body
from grid.core import limits
from grid.core.bundle import (
    COMPLETION_DOMAIN,
    DECLARATION_DOMAIN,
    Completion,
    ResultRange,
    Signed,
    TaskFailure,
    open_signed,
    sign,
)
from grid.core.errors import FencedError, NotLeadingError, RefusedError
from grid.core.facts import Stored
from grid.core.job import JobId
from grid.core.messages import (
    Accepted,
    Beat,
    Claims,
    Completed,
    Drop,
    GrantTaken,
    Have,
    Message,
    Nothing,
    Poke,
    Printed,
    Relay,
    RelayClosed,
    Steal,
)
from grid.core.ranges import RangeSet
from grid.core.stealing import Referrals
from grid.giving import Giver, declaration_of
from grid.jobdata import JobData
from grid.leader import Leader, PeerTally
from grid.speculating import Speculator
from grid.takeback import Request, TakeBack

if TYPE_CHECKING:
    from grid.post import PostOffice

FETCHES_MAX = 16
"""Large results fetched from thieves at once."""
BLOBS_WATCHED_MAX = 1 << 16
"""Blobs whose holders are remembered: what tasks `put` is to be had from there only. About 20 MB when full."""
SESSIONS_MAX = 4_096
"""Peers' sessions whose batches are remembered; of those longest silent a batch may be counted as executed twice."""
BEAT_MS = round(limits.HEARTBEAT_S * 1e3)
"""Between heartbeats of a helper that was not told otherwise."""
EARLY_RESULTS_MAX = 4_096
"""Results of an earlier epoch that wait for a replay to declare their tasks again; others run again."""
DROP_RANGES_MAX = 4_096
"""Ranges in one Drop: about 64 KiB."""
log = logging.getLogger(__name__)


class Outreach:
    """The mesh side of one leadership."""

    def __init__(
        self,
        leader: Leader,
        data: JobData,
        identity: Identity,
        epoch: int,
        post: PostOffice,
        nursery: trio.Nursery,
        request: Request | None = None,
        may_lead: Callable[[], bool] = lambda: True,
    ) -> None:
        """may_lead: checked before each act; a peer that was suspended finds out so that it leads no more."""
        self.leader = leader
        self._may_lead = may_lead
        self.epoch = epoch
        self._speculator = leader.speculator = Speculator(leader, lambda peer: self._helpers.get(peer, (1, 0))[0])
        self.giver = Giver(leader.site, data, identity, epoch, self._declaration, strange=self._speculator.strange)
        self.reasons: dict[PeerId, str] = {}
        self._job: JobId = leader.job
        self._data = data
        self._identity = identity
        self._post = post
        self._nursery = nursery
        self._declarations: dict[int, Signed] = {}
        self._thieves: OrderedDict[PeerId, None] = OrderedDict()
        self._seeking: dict[PeerId, None] = {}  # had nothing to do when last heard
        self._taken: OrderedDict[tuple[PeerId, int], _Taken] = OrderedDict()
        self._fetches = trio.Semaphore(FETCHES_MAX)
        self._holders: OrderedDict[bytes, list[PeerId]] = OrderedDict()
        self._helpers: dict[PeerId, tuple[int, int]] = {}
        self._referrals = Referrals(self._surplus)
        self._paced: dict[PeerId, int] = {}
        self._cancelled: dict[int, RangeSet] = {}
        self._take_back = TakeBack(leader, self, epoch, post, request) if request is not None else None
        self._early: dict[int, deque[_Early]] = {}
        self._early_count = 0
        self._unacknowledged: dict[tuple[PeerId, int], _Taken] = {}
        self._acknowledging = Bell()
        leader.cancelled_listeners.append(self._on_cancel)
        leader.declared_listeners.append(self._declared)

    # ---- stealing ----

    def _declaration(self, stage: int) -> Signed:
        signed = self._declarations.get(stage)
        if signed is None:
            name = self.leader.ledger.stage(stage).name
            declaration = declaration_of(self.leader.site, self._job, self.epoch, stage, name)
            signed = self._declarations[stage] = sign(declaration, DECLARATION_DOMAIN, self._identity)
        return signed

    async def steal(self, thief: PeerId, steal: Steal) -> Message:
        """Answer a thief. Raises FencedError."""
        self._check_epoch(steal.epoch)
        if not self._may_lead():
            return Nothing()
        thieves = min(len(self._seeking) + (thief not in self._seeking), limits.WAITING_THIEVES_MAX)  # more aren't poked at once
        found = await self.giver.give(thief, steal, thieves=thieves)
        if found is None:
            copies = self._speculator.offer(thief, steal.tags, steal.slots)
            found = await self.giver.give(thief, steal, copies) if copies else None
        if found is not None:
            give, works = found
            self.leader.claims.grant(thief, works, trio.current_time())
            self._referrals.heard(thief)
            self._thieves.pop(thief, None)
            self._seeking.pop(thief, None)
            return give
        self._thieves[thief] = None
        while len(self._thieves) > limits.WAITING_THIEVES_MAX:
            self._thieves.popitem(last=False)
        if len(self._seeking) < limits.SEEKING_MAX:
            self._seeking[thief] = None
        pause_ms = 1000 * len(self._seeking) // limits.THIEVES_PER_S_MAX
        parked = thief in self._thieves
        return Nothing(self.hints(thief), parked=parked, state="running", fence=self.epoch, pause_ms=pause_ms)

    def hints(self, thief: PeerId) -> tuple[PeerId, ...]:
        """Whom a thief may ask instead: those who claim more than their own slots run."""
        return self._referrals.choose(thief, trio.current_time(), lambda peer: not self._speculator.suspect(peer))

    def _surplus(self, peer: PeerId) -> int:
        return self.leader.claims.total(peer) - self._helpers.get(peer, (1, 0))[0]

    def poke(self) -> None:
        """There is work: tell the thieves that found none."""
        count = min(len(self._thieves), max(1, self.leader.site.deque.total))
        for _ in range(count):
            thief, _ = self._thieves.popitem(last=False)
            self._post.post(thief, Poke(self._job))

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise FencedError(f"epoch {epoch} is not this leader's {self.epoch}")

    # ---- messages ----

    async def handle(self, peer: PeerId, message: Message) -> None:
        """One message about this job. Raises RefusedError, BadSignature, CodecError: it changed nothing then."""
        match message:
            case GrantTaken(number=number):
                works = self.giver.taken(peer, number)
                self.leader.claims.grant(peer, works, trio.current_time())  # a heartbeat sent before may have come since
                self._referrals.heard(peer)
                self.leader.tallies.setdefault(peer, PeerTally()).stolen += sum(work.hi - work.lo for work in works)
            case Claims():
                self._claims(peer, message)
            case Completed(signed=signed):
                await self._completed(peer, signed)
            case Printed(lines=lines, dropped_bytes=dropped):
                for stage, index, fd, data in lines:
                    self.leader.print_from(peer, stage, index, fd, data)
                if dropped > 0 and lines:
                    stage, index, _, _ = lines[-1]
                    text = f"({dropped} bytes of prints on peer {peer.hex()[:8]} were left out: too many a second)\n"
                    self.leader.print_from(peer, stage, index, 2, text.encode())
            case Have(blobs=blobs):
                for blob in blobs[: limits.HAVE_MAX]:
                    self.holds(peer, blob)
            case Relay():
                await self._relay(peer, message)
            case RelayClosed(token=token):
                self.leader.close_child((peer, token))
            case _:
                raise RefusedError(f"a leader takes no {type(message).__name__}")

    def _claims(self, peer: PeerId, message: Claims) -> None:
        self._check_epoch(message.epoch)
        self.leader.claims.claim(peer, dict(message.held), trio.current_time())
        self._helpers[peer] = (message.slots, message.busy)
        self._referrals.heard(peer)
        if self._surplus(peer) >= 0:
            self._seeking.pop(peer, None)
        interval_ms = round(self.leader.claims.pace() * 1e3)
        if self._paced.get(peer, BEAT_MS) != interval_ms:
            self._paced[peer] = interval_ms
            self._post.post(peer, Beat(self._job, interval_ms))
        if message.blocked:
            self.reasons[peer] = message.blocked[: limits.TEXT_MAX]
        else:
            self.reasons.pop(peer, None)
        for blob in message.have[: limits.HAVE_MAX]:
            self.holds(peer, blob)

    def _speculate(self, now_s: float) -> None:
        """Second copies of what runs too long; those that are done elsewhere need not go on."""
        for work in self._speculator.due(now_s):
            self.leader.run_again(work)
        self._drop_copies()
        if self._speculator.offers and self._thieves:
            self.poke()

    def _drop_copies(self) -> None:
        """Tell those who have a copy of what is done: the sooner, the fewer of them begin with it."""
        for peer, ranges in self._speculator.drops():
            self._post.post(peer, Drop(self._job, self.epoch, ranges))

    def holds(self, peer: PeerId, blob: bytes) -> None:
        """The peer has this blob."""
        holders = self._holders.setdefault(blob, [])
        if peer not in holders and len(holders) < limits.HOLDERS_MAX:
            holders.append(peer)
        self._holders.move_to_end(blob)
        while len(self._holders) > BLOBS_WATCHED_MAX:
            self._holders.popitem(last=False)

    def holders(self, blob: bytes) -> list[PeerId]:
        """Peers that said they hold the blob."""
        return list(self._holders.get(blob, ()))

    # ---- completions ----

    async def _completed(self, peer: PeerId, signed: Signed) -> None:
        signer, completion = open_signed(signed, COMPLETION_DOMAIN, Completion)
        if signer != peer or completion.job != self._job:
            raise RefusedError("a completion that is not its sender's, or of another job")
        mine = peer == self.leader.me  # what this peer finished before it opened the branch, whose epochs begin anew
        if (completion.epoch > self.epoch and not mine) or not self._may_lead():
            raise FencedError(f"a completion of epoch {completion.epoch} at a leader of {self.epoch}, or of none")
        taken = self._session(peer, completion.session)
        if not taken.begin(completion.number):
            self._acknowledge(peer, completion.session, taken)
            return
        batch = _Batch(peer, completion.session, taken, completion.number)
        large: list[ResultRange] = []
        for result in completion.results:
            if result.blob:
                large.append(result)
            else:
                self._complete(peer, result, result.inline, None, batch)
        for failure in completion.failures:
            self._fail(peer, failure, completion.epoch)
        if not large:
            self._end(batch)
            return
        await self._fetches.acquire()
        self._nursery.start_soon(self._fetch_results, peer, batch, large)

    def _end(self, batch: _Batch) -> None:
        """A part of a batch was dealt with; with the last one the batch counts as taken."""
        batch.parts -= 1
        if batch.parts == 0:
            batch.taken.end(batch.number)
            self._acknowledge(batch.peer, batch.session, batch.taken)
            self._drop_copies()

    def _session(self, peer: PeerId, session: int) -> _Taken:
        key = (peer, session)
        taken = self._taken.setdefault(key, _Taken())
        self._taken.move_to_end(key)
        while len(self._taken) > SESSIONS_MAX:
            self._taken.popitem(last=False)
        return taken

    def _complete(self, peer: PeerId, result: ResultRange, body: Body, stored: Stored | None, batch: _Batch) -> None:
        """One that breaks a rule is left out: the others of its batch, and the batch's number, count."""
        if self._is_early(result):
            batch.parts += 1
            self._early.setdefault(result.stage, deque()).append(_Early(peer, result, body, stored, batch))
            self._early_count += 1
            return
        try:
            stage = self.leader.ledger.stage(result.stage)
            if not 0 <= result.first <= result.lo:
                raise RefusedError("a result that begins before its segment")
            if result.segment:
                self.leader.check_segment(result.stage, result.lo, result.segment)
            self.leader.complete(
                peer, result.stage, result.function, result.lo, result.hi, result.first, body, result.elapsed_us, stored
            )
        except RefusedError as error:
            log.debug("a result of %s was refused: %s", peer.hex()[:8], error)
            bodies.release(body)
            return
        self.leader.site.stages[stage.index].pace.hint(result.elapsed_us / 1e6 / (result.hi - result.lo))

    def _is_early(self, result: ResultRange) -> bool:
        """Whether a replay may yet declare the tasks that an earlier leader had given out."""
        if self.leader.replaying is None or not result.segment or self._early_count >= EARLY_RESULTS_MAX:
            return False
        try:
            return result.hi > self.leader.ledger.stage(result.stage).declared
        except RefusedError:
            return True

    def _declared(self, stage: int) -> None:
        """Tasks were declared: what came early may be theirs."""
        early = self._early.pop(stage, None)
        if early is not None:
            self._early_count -= len(early)
            for each in early:
                self._complete(*each)
                self._end(each.batch)

    def _fail(self, peer: PeerId, failure: TaskFailure, epoch: int) -> None:
        told = wire.Failed(
            0, failure.index, failure.kind, failure.type_name, failure.message, failure.traceback, failure.elapsed_us, False
        )
        try:
            if failure.segment:
                self.leader.check_segment(failure.stage, failure.index, failure.segment)
            elif epoch != self.epoch:
                raise RefusedError("a failure of an earlier epoch that doesn't name its arguments")
            self.leader.fail(peer, failure.stage, failure.function, told, failure.exception)
        except RefusedError as error:
            log.debug("a failure of %s was refused: %s", peer.hex()[:8], error)

    async def _fetch_results(self, peer: PeerId, batch: _Batch, results: list[ResultRange]) -> None:
        """Bring large results here. One that is not to be had runs again: nobody claims it any more."""
        try:
            for result in results:
                if not self._awaited(result):
                    continue
                try:
                    path = await self._data.path(result.blob, result.size, [peer])
                except Exception as error:  # the holder is gone or lied
                    self.reasons[peer] = f"a result could not be fetched: {error}"
                    continue
                body = bodies.whole_file(self.leader.spool.link(str(path)))
                stored = Stored(result.blob, result.size, 0, result.size, (peer, self.leader.me))
                self._complete(peer, result, body, stored, batch)
                self._data.store.unpin(self._data.owner, result.blob)  # type: ignore[arg-type]
        finally:
            self._fetches.release()
        self._end(batch)

    def _awaited(self, result: ResultRange) -> bool:
        try:
            return not self.leader.ledger.stage(result.stage).settled.covers(result.lo, max(result.lo, result.hi))
        except RefusedError:
            return self._is_early(result)

    def _acknowledge(self, peer: PeerId, session: int, taken: _Taken) -> None:
        if peer == self.leader.me:  # what this peer had finished for the leader before
            return
        if self.leader.recorder.keeps:
            self._unacknowledged[peer, session] = taken
            self._acknowledging.ring()
        else:
            self._post.post(peer, Accepted(self._job, taken.through, session))

    async def _acknowledge_recorded(self) -> None:
        """What a helper is told to forget must be known to whoever leads next."""
        while True:
            while not self._unacknowledged:
                await self._acknowledging.wait()
            through = {key: taken.through for key, taken in self._unacknowledged.items()}
            self._unacknowledged = {}
            try:
                await self.leader.recorder.flushed()
            except NotLeadingError:
                return
            for (peer, session), number in through.items():
                self._post.post(peer, Accepted(self._job, number, session))

    def _on_cancel(self, stage: int, lo: int, hi: int) -> None:
        if any(self.leader.claims.held(peer, stage).touches(lo, hi) for peer in self.leader.claims.peers()):
            self._cancelled.setdefault(stage, RangeSet()).add(lo, hi)

    def _drop(self) -> None:
        """Tell the helpers what was cancelled since the last time."""
        parts = [(stage, part) for stage, ranges in self._cancelled.items() for part in ranges]
        self._cancelled = {}
        for at in range(0, len(parts), DROP_RANGES_MAX):
            table: dict[int, list[tuple[int, int]]] = {}
            for stage, part in parts[at : at + DROP_RANGES_MAX]:
                table.setdefault(stage, []).append(part)
            ranges = tuple((stage, tuple(found)) for stage, found in table.items())
            for peer in self.leader.claims.peers():
                self._post.post(peer, Drop(self._job, self.epoch, ranges))

    # ---- children of tasks ----

    async def _relay(self, peer: PeerId, message: Relay) -> None:
        frame = decode_frame(message.header, wire.from_child_decoder)
        body: Body = message.body
        if message.blob:
            path = await self._data.path(message.blob, message.size, [peer])
            body = bodies.whole_file(self.leader.spool.link(str(path)))
        token = message.token

        def post(answer: wire.ToChild, data: Body) -> None:
            self._post.post_frame(peer, self._data, self._job, token, answer, data)

        try:
            self.leader.relay_from((peer, token), post, frame, body)
        except RefusedError as error:
            bodies.release(body)
            self.leader.close_child((peer, token))
            self._post.post(peer, RelayClosed(self._job, token, str(error)))

    # ---- housekeeping ----

    def lost(self, peer: PeerId) -> None:
        """The connection to a peer ended: it claims nothing until it is heard again."""
        self.leader.claims.lose(peer)
        self._referrals.heard(peer)
        self._thieves.pop(peer, None)
        self._seeking.pop(peer, None)
        self._helpers.pop(peer, None)
        self._paced.pop(peer, None)
        for key in self.leader.close_children(lambda key: isinstance(key, tuple) and key[0] == peer):
            # The connection may stand again at once, or its end be noticed here only: the child would wait for ever.
            assert isinstance(key, tuple)
            self._post.post(peer, RelayClosed(self._job, key[1], "dropped"))

    async def run(self) -> None:
        """Sweep claims each heartbeat and keep the own slots busy, until cancelled."""
        self._nursery.start_soon(self._acknowledge_recorded)
        hungry = self.leader.site.workshop.hungry
        if self._take_back is not None:
            hungry.append(self._take_back.hungry)
            self._nursery.start_soon(self._take_back.run)
        try:
            await self._sweep()
        finally:
            if self._take_back is not None:
                hungry.remove(self._take_back.hungry)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(limits.HEARTBEAT_S)
            now_s = trio.current_time()
            self.giver.expire(now_s)
            self.leader.giving = self.giver.held()
            self.leader.sweep(now_s)
            self._drop()
            self._speculate(now_s)
            if self.leader.site.deque and self._thieves:
                self.poke()


@dataclass(slots=True)
class _Batch:
    """A batch of completions on its way into the log. parts: those not dealt with; results that came early are some."""

    peer: PeerId
    session: int
    taken: _Taken
    number: int
    parts: int = 1


class _Early(NamedTuple):
    """A result of an earlier epoch that waits for its tasks to be declared."""

    peer: PeerId
    result: ResultRange
    body: Body
    stored: Stored | None
    batch: _Batch


class _Taken:
    """Which completion batches of one peer were taken: through `through` without a gap."""

    def __init__(self) -> None:
        self.through = 0
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    def begin(self, number: int) -> bool:
        """False when the batch was begun before (a resent one)."""
        if number <= self.through or number in self._begun or number in self._ended:
            return False
        self._begun.add(number)
        return True

    def end(self, number: int) -> None:
        """The batch is settled."""
        self._begun.discard(number)
        self._ended.add(number)
        while self.through + 1 in self._ended:
            self.through += 1
            self._ended.discard(self.through)


def decode_frame(header: bytes, decoder: object) -> wire.Message:
    """The message of a relayed frame. Raises RefusedError."""
    try:
        message: wire.Message = decoder.decode(header)  # type: ignore[attr-defined]
    except Exception as error:
        raise RefusedError(f"not a frame: {error}") from None
    return message
