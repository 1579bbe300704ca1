"""A leader's dealings with other peers: it answers thieves, takes completions, watches claims, relays children's frames.

Rules: every message is judged by the session it came through and by its signature; what names another epoch is fenced;
completions of one peer are taken in their order and acknowledged when their results are here; what a peer claimed and
lost runs again (see `grid.core.liveness`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
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
from grid.core.errors import FencedError, RefusedError
from grid.core.job import JobId
from grid.core.messages import (
    Accepted,
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
from grid.giving import Giver, declaration_of
from grid.jobdata import JobData
from grid.leader import Leader, PeerTally
from grid.takeback import Request, TakeBack

if TYPE_CHECKING:
    from grid.post import PostOffice

FETCHES_MAX = 16
"""Large results fetched from thieves at once."""
BLOBS_WATCHED_MAX = 1 << 16
"""Blobs whose holders are remembered: what tasks `put` is to be had from there only. About 20 MB when full."""
SESSIONS_MAX = 4_096
"""Peers' sessions whose batches are remembered; of those longest silent a batch may be counted as executed twice."""
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
    ) -> None:
        self.leader = leader
        self.epoch = epoch
        self.giver = Giver(leader.site, data, identity, epoch, self._declaration)
        self.reasons: dict[PeerId, str] = {}
        self._job: JobId = leader.job
        self._data = data
        self._identity = identity
        self._post = post
        self._nursery = nursery
        self._declarations: dict[int, Signed] = {}
        self._thieves: OrderedDict[PeerId, None] = OrderedDict()
        self._taken: OrderedDict[tuple[PeerId, int], _Taken] = OrderedDict()
        self._fetches = trio.Semaphore(FETCHES_MAX)
        self._holders: OrderedDict[bytes, list[PeerId]] = OrderedDict()
        self._helpers: dict[PeerId, tuple[int, int]] = {}
        self._cancelled: dict[int, RangeSet] = {}
        self._take_back = TakeBack(leader, self, epoch, post, request) if request is not None else None
        leader.cancelled_listeners.append(self._on_cancel)

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
        found = await self.giver.give(thief, steal)
        if found is not None:
            give, works = found
            self.leader.claims.grant(thief, works, trio.current_time())
            self._thieves.pop(thief, None)
            return give
        self._thieves[thief] = None
        while len(self._thieves) > limits.WAITING_THIEVES_MAX:
            self._thieves.popitem(last=False)
        return Nothing(self.hints(thief), parked=thief in self._thieves, state="running", fence=self.epoch)

    def hints(self, thief: PeerId) -> tuple[PeerId, ...]:
        """Who claims the most beyond what its own slots run, `thief` apart."""
        best: list[tuple[int, PeerId]] = []
        for peer in self.leader.claims.peers():
            if peer == thief:
                continue
            slots, _ = self._helpers.get(peer, (1, 0))
            held = self.leader.claims.total(peer)
            if held > slots:
                best.append((held, peer))
        return tuple(peer for _, peer in sorted(best, reverse=True)[: limits.HINTS_MAX])

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
        if message.blocked:
            self.reasons[peer] = message.blocked[: limits.TEXT_MAX]
        else:
            self.reasons.pop(peer, None)
        for blob in message.have[: limits.HAVE_MAX]:
            self.holds(peer, blob)

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
        taken = self._session(peer, completion.session)
        if not taken.begin(completion.number):
            self._acknowledge(peer, completion.session, taken)
            return
        large: list[ResultRange] = []
        for result in completion.results:
            if result.blob:
                large.append(result)
            else:
                self._complete(peer, result, result.inline)
        for failure in completion.failures:
            self._fail(peer, failure)
        if not large:
            taken.end(completion.number)
            self._acknowledge(peer, completion.session, taken)
            return
        await self._fetches.acquire()
        self._nursery.start_soon(self._fetch_results, peer, taken, completion, large)

    def _session(self, peer: PeerId, session: int) -> _Taken:
        key = (peer, session)
        taken = self._taken.setdefault(key, _Taken())
        self._taken.move_to_end(key)
        while len(self._taken) > SESSIONS_MAX:
            self._taken.popitem(last=False)
        return taken

    def _complete(self, peer: PeerId, result: ResultRange, body: Body) -> None:
        """One that breaks a rule is left out: the others of its batch, and the batch's number, count."""
        try:
            stage = self.leader.ledger.stage(result.stage)
            if not 0 <= result.first <= result.lo:
                raise RefusedError("a result that begins before its segment")
            self.leader.complete(peer, result.stage, result.function, result.lo, result.hi, result.first, body)
        except RefusedError as error:
            log.debug("a result of %s was refused: %s", peer.hex()[:8], error)
            bodies.release(body)
            return
        self.leader.site.stages[stage.index].pace.hint(result.elapsed_us / 1e6 / (result.hi - result.lo))

    def _fail(self, peer: PeerId, failure: TaskFailure) -> None:
        told = wire.Failed(
            0, failure.index, failure.kind, failure.type_name, failure.message, failure.traceback, failure.elapsed_us, False
        )
        try:
            self.leader.fail(peer, failure.stage, failure.function, told, failure.exception)
        except RefusedError as error:
            log.debug("a failure of %s was refused: %s", peer.hex()[:8], error)

    async def _fetch_results(self, peer: PeerId, taken: _Taken, completion: Completion, results: list[ResultRange]) -> None:
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
                self._data.store.unpin(self._data.owner, result.blob)  # type: ignore[arg-type]
                self._complete(peer, result, body)
        finally:
            self._fetches.release()
            taken.end(completion.number)
        self._acknowledge(peer, completion.session, taken)

    def _awaited(self, result: ResultRange) -> bool:
        try:
            return not self.leader.ledger.stage(result.stage).settled.covers(result.lo, max(result.lo, result.hi))
        except RefusedError:
            return False

    def _acknowledge(self, peer: PeerId, session: int, taken: _Taken) -> None:
        self._post.post(peer, Accepted(self._job, taken.through, session))

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
        self._thieves.pop(peer, None)
        self._helpers.pop(peer, None)
        for key in self.leader.close_children(lambda key: isinstance(key, tuple) and key[0] == peer):
            # The connection may stand again at once, or its end be noticed here only: the child would wait for ever.
            assert isinstance(key, tuple)
            self._post.post(peer, RelayClosed(self._job, key[1], "dropped"))

    async def run(self) -> None:
        """Sweep claims each heartbeat and keep the own slots busy, until cancelled."""
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
            if self.leader.site.deque and self._thieves:
                self.poke()


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
