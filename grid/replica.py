"""One member of a job's consensus group on this peer: the shell around the sans-IO core (grid.core.raft).

One task drains an inbox (mail, proposals, time), calls the core and carries out its effects. Rules:
- what a round wants on the disk goes first, together; then all else, in order; what the core decided before the first write may
  leave before it. While the disk is busy the inbox waits, and nothing is promised;
- whether this member leads is asked of the clock at each act (`leads`), never of a timer: a clock that counts suspend has run
  out when a laptop wakes, whatever woke first;
- facts are applied in the log's order on every member; the same fact is told again only after a restart or a snapshot;
- a leadership begins (`took_over`) once all earlier facts are known here and a majority has endorsed it, and ends
  (`stepped_down`) when the lease is over, even if the disk holds the core's own opinion up.
Each write and each message has a name (grid.core.raft_effects.Point), told to `at` with "before " or "after ": where a simulation
kills.
"""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from dht.core.codec import CodecError
from dht.core.identity import PeerId
from grid.bell import Bell
from grid.core import facts
from grid.core import raft_effects as fx
from grid.core.chronicle import Chronicle
from grid.core.errors import NotLeadingError
from grid.core.facts import AnyFact
from grid.core.job import JobId, JobSpec, SignedSpec
from grid.core.mandate import Branch, Mandate
from grid.core.messages import Mail
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_limits import SNAPSHOT_BYTES_MAX
from grid.core.raft_log import InvariantError
from grid.core.raft_messages import Config, Entry, Kind, NodeId, RaftMessage, Snapshot, decode, encode
from grid.journal_errors import JournalDamaged
from grid.journal_files import FaultHook, no_fault
from grid.replica_batch import PENDING_BYTES_MAX, Batch

if TYPE_CHECKING:
    from grid.replica_files import Book
    from grid.replica_ports import Hooks

INBOX_EVENTS_MAX: Final = 8_192
"""What waits for a slow disk; more mail is lost, as on the wire, and repeated."""
INBOX_BYTES_MAX: Final = 32 << 20
ROUND_EVENTS_MAX: Final = 512
"""Handled before the disk is asked: what shares one fsync."""
CALM_S: Final = 10.0
"""After a member was lost, or another one had to take over, facts don't wait for company for so long: deaths come in series."""
CLOCK_SLACK_S: Final = 1e-6
"""A timer may fire so much too early: sums of floats."""
log = logging.getLogger(__name__)

Post = Callable[[PeerId, Mail], object]


@dataclass(frozen=True)
class Founding:
    """What a new group begins with: configuration, a chronicle's snapshot (b"": nothing yet), entries that follow it."""

    config: Config
    state: bytes = b""
    payloads: tuple[bytes, ...] = ()


class Replica:
    """Made and run by `grid.replicas`. All may be read at any time; `chronicle` is replaced by `restored`."""

    def __init__(
        self,
        book: Book,
        spec: JobSpec,
        hooks: Hooks,
        post: Post,
        clock: Callable[[], float],
        rng: random.Random,
        at: FaultHook = no_fault,
        found: Founding | None = None,
    ) -> None:
        """found: of a new group, which this member is to lead. Raises InvariantError."""
        self.job: JobId = JobId(book.seat.job)
        self.branch: Branch = book.seat.branch
        self.node: NodeId = book.seat.node
        self.signed: SignedSpec = book.seat.signed
        self.blobs = book.seat.blobs
        self.spec = spec
        self.chronicle = Chronicle()
        self.mandate = Mandate()
        self.applied_index = 0
        self.fate = ""
        """Why it ended: one word of `grid.replicas`' rules."""
        self.heard_s = clock()
        """When a leader was last heard, or led here."""
        self.progress = Bell()
        """Rings when facts were applied, leadership or members changed, and at the end."""
        self.enlister: PeerId | None = None
        """Who asked this peer to hold it, in this process's life."""
        self.loaded = False
        """It was on the disk when this process began."""
        self.collect: Callable[[Replica, int], object] = lambda replica, term: replica.take_over(term, Mandate())
        """Called once a leadership's own first entry is applied, and when members changed: to get endorsements and call
        `take_over`."""
        self.settled: Callable[[Replica], object] = lambda replica: None
        """Called when it has a state of its branch, on its disk."""
        self.closed = trio.Event()
        self._book = book
        self._hooks = hooks
        self._post = post
        self._clock = clock
        self._at = at
        self._batch = Batch()
        self._bell = Bell()
        self._inbox: deque[tuple[fx.Event, int]] = deque()
        self._inbox_bytes = 0
        self._wake_s = math.inf
        self._own_term = 0  # the term whose first entry, this leader's, is applied
        self._ruling = 0  # the term of the leadership that `took_over` told of
        self._calm_from_s = -math.inf
        self._stopping = trio.CancelScope()
        self._ended_told = False
        if found is None:
            self.raft, self._first = Raft.restart(self.node, book.durable, rng, clock())
        else:
            self.raft, self._first = Raft.found(
                self.node, found.config, self.node, rng, clock(), found.state, payloads=found.payloads
            )
        self.led_term = self.raft.log.last_term
        """The newest term in which a leader was heard of."""

    def __repr__(self) -> str:
        return f"<{self.job.hex()[:8]} {self.raft!r}>"

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """The job's epoch, in this branch."""
        return self.raft.term

    @property
    def leader(self) -> PeerId | None:
        """Who leads the term, if known."""
        return PeerId(self.raft.leader.peer) if self.raft.leader is not None else None

    @property
    def voters(self) -> tuple[PeerId, ...]:
        """By the configuration in force."""
        return tuple(PeerId(node.peer) for node in self.raft.log.config.voters)

    @property
    def members(self) -> tuple[PeerId, ...]:
        """Voters and learners."""
        return tuple(PeerId(node.peer) for node in self.raft.log.config.members)

    @property
    def empty(self) -> bool:
        """Nothing of the group has reached it yet."""
        return self.raft.log.last_index == 0

    @property
    def stuck(self) -> bool:
        """Its disk takes nothing now."""
        return self._book.stuck

    def leads(self) -> bool:
        """Whether all earlier facts are known here, and a majority surely follows: asked before each act."""
        raft = self.raft
        return raft.role is Role.LEADER and self._own_term == raft.term and self._clock() < raft.quorum_until_s()

    def hears_leader(self) -> bool:
        """Whether the group is led, as far as this member knows."""
        raft = self.raft
        if raft.role is Role.LEADER:
            return self._clock() < raft.quorum_until_s()
        return raft.leader is not None and self._clock() < raft.leader_heard_s + 2 * raft.timing.election_s

    # ---- what a leader does ------------------------------------------------------------------------------------------

    @property
    def pending_bytes(self) -> int:
        """Of facts that are not committed."""
        return self._batch.pending_bytes

    def propose(self, proposed: Sequence[AnyFact], patient: bool = False) -> int:
        """The number of the last of these facts, for `committed`. Raises NotLeadingError; ValueError: one is too large.

        patient: nobody waits for them yet; in calm times they may share an entry with what comes a little later.
        """
        if not self.leads():
            raise NotLeadingError("this peer does not lead the job any more")
        due_s, now_s = self._batch.due_s(), self._clock()
        number = self._batch.add(proposed, now_s, patient and now_s >= self._calm_from_s)
        if self._batch.due_s() < due_s:
            self._bell.ring()
        return number

    async def room(self) -> None:
        """Return when little enough is not committed, or this peer does not lead (any more)."""
        while self._batch.pending_bytes > PENDING_BYTES_MAX and not self.closed.is_set():
            await self.progress.wait()

    async def committed(self, sequence: int, patient: bool = False) -> None:
        """Return when that fact is committed and applied. Raises NotLeadingError: nobody knows whether it ever will be.

        patient: not a word sooner than it would be anyway.
        """
        if not patient and self._batch.waits(sequence):
            self._batch.hurry(self._clock())
            self._bell.ring()
        while True:
            if self._batch.is_lost(sequence):
                raise NotLeadingError("this peer does not lead the job any more")
            if sequence <= self._batch.committed:
                return
            if self.closed.is_set():
                raise NotLeadingError("this peer holds no replica of the job any more")
            await self.progress.wait()

    def transfer(self, to: PeerId | None = None) -> None:
        """Hand leadership over, to whom has most of the log if nobody is named. What was proposed is committed first."""
        target = next((node for node in self.raft.log.config.voters if node.peer == to), None)
        self.push(fx.Transfer(target))

    def change(self, config: Config) -> None:
        """Ask for another configuration; the core refuses what is not safe now."""
        self.push(fx.Change(config))

    def take_over(self, term: int, mandate: Mandate) -> None:
        """This leadership may begin, or its mandate is another one now."""
        if self.raft.term != term or not self.leads():
            return
        self.mandate = mandate
        if self._ruling == term:
            self._hooks.changed(self)
        else:
            self._ruling = term
            if term > 1 or self.branch.name:
                self._calm_from_s = self._clock() + CALM_S
            self._hooks.took_over(self, term)
        self.progress.ring()
        self._bell.ring()

    # ---- what happens to it ------------------------------------------------------------------------------------------

    def mail(self, sender: NodeId, data: bytes) -> None:
        """A message from another member. Raises CodecError. Lost when too much waits, as on the wire."""
        message = decode(data)
        if len(self._inbox) < INBOX_EVENTS_MAX and self._inbox_bytes + len(data) <= INBOX_BYTES_MAX:
            self.push(fx.Receive(sender, self.node, message), len(data))

    def disconnected(self, peer: PeerId) -> None:
        """The connection to a peer broke. A member may not be the last one to go: nothing waits for company now."""
        if peer in self.voters:
            self._calm_from_s = self._clock() + CALM_S
            self._batch.hurry(self._clock())
            self._bell.ring()
        leader = self.raft.leader
        if leader is not None and leader.peer == peer:
            self.push(fx.Disconnected(leader))

    def push(self, event: fx.Event, size: int = 0) -> None:
        """Something for the core."""
        self._inbox.append((event, size))
        self._inbox_bytes += size
        self._bell.ring()

    def stop(self, fate: str) -> None:
        """End now; whatever waits is dropped, what is being written may be cut short."""
        if not self.fate:
            self.fate = fate
            self._stopping.cancel()

    # ---- its task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`, or until it can't go on: `fate` tells. Closes the journal."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_lease)
                with self._stopping:
                    await self._drain()
                nursery.cancel_scope.cancel()
        except* JournalDamaged as group:
            log.warning("job %s: %s", self.job.hex()[:8], group.exceptions[0])
            self.fate = "damaged"
        except* InvariantError as broken:
            log.exception("job %s: its replica here broke a rule and is given up", self.job.hex()[:8], exc_info=broken)
            self.fate = "broken"
        finally:
            self._lose(self.fate or "this peer stops")
            self.closed.set()
            self.progress.ring()
            with trio.CancelScope(shield=True):
                await self._book.close()

    async def _drain(self) -> None:
        """Until cancelled."""
        effects = self._first
        while True:
            await self._carry_out(effects)
            await self._until_due()
            effects = self._round()

    async def _until_due(self) -> None:
        """Return when something is to be done. The clock is asked again after each sleep: it may have run on meanwhile."""
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            due_s = self._batch.due_s() if self._own_term == self.raft.term else math.inf
            wait_s = min(self._wake_s, due_s) - self._clock()
            if wait_s <= CLOCK_SLACK_S:
                return
            with trio.move_on_after(wait_s):
                await self._bell.wait()

    def _round(self) -> list[fx.Effect]:
        """What waits, and what the time asks for, handed to the core."""
        now_s = self._clock()
        if now_s < self._wake_s <= now_s + CLOCK_SLACK_S:
            now_s = self._wake_s
        effects: list[fx.Effect] = []
        for _ in range(min(len(self._inbox), ROUND_EVENTS_MAX)):
            event, size = self._inbox.popleft()
            self._inbox_bytes -= size
            effects += self.raft.handle(event, now_s)
        if now_s >= self._wake_s:
            effects += self.raft.handle(fx.Tick(), now_s)
        if self._own_term == self.raft.term and now_s + CLOCK_SLACK_S >= self._batch.due_s():
            effects += self._flush(now_s)
        if self.hears_leader():
            self.led_term = self.raft.term
            self.heard_s = now_s if self.raft.role is Role.LEADER else max(self.heard_s, self.raft.leader_heard_s)
        return effects

    def _flush(self, now_s: float) -> list[fx.Effect]:
        """Propose the facts that wait."""
        entries = self._batch.entries()
        effects = self.raft.handle(fx.Propose(tuple(payload for payload, _ in entries)), now_s)
        for effect in effects:
            if isinstance(effect, fx.Proposed):
                self._batch.proposed(effect.first, entries)
                break
            if isinstance(effect, fx.Refused):
                self._batch.refused(now_s)
                break
        return effects

    async def _carry_out(self, effects: list[fx.Effect]) -> None:
        """Before the first write, the writes, all else."""
        first = next((at for at, effect in enumerate(effects) if isinstance(effect, fx.Persist)), len(effects))
        for effect in effects[:first]:
            await self._do(effect)
        persists = [effect for effect in effects[first:] if isinstance(effect, fx.Persist)]
        if persists:
            await self._book.write(persists)
        for effect in effects[first:]:
            if not isinstance(effect, fx.Persist):
                await self._do(effect)

    async def _do(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Send():
                self._send(effect.point, effect.to, effect.message)
            case fx.Commit():
                await self._apply(effect.entries)
            case fx.ApplySnapshot():
                self._restore(effect.snapshot)
            case fx.SnapshotWanted():
                self._snapshot()
            case fx.WakeAt():
                self._wake_s = effect.time_s
            case fx.BecameLeader() | fx.LeaderKnown():
                self.progress.ring()
            case fx.SteppedDown():
                self._lose(effect.why.value)
            case fx.Refused():
                log.debug("%r: refused: %s", self, effect.why.value)
            case _:
                pass

    def _send(self, point: fx.Point, to: NodeId, message: RaftMessage) -> None:
        self._at(f"before {point}")
        mail = Mail(self.job, self.branch.name, self.node.incarnation, to.incarnation, encode(message))
        self._post(PeerId(to.peer), mail)

    # ---- the state machine -------------------------------------------------------------------------------------------

    async def _apply(self, entries: tuple[Entry, ...]) -> None:
        """Take in what is final. Others have their turn between two entries: the state is whole then."""
        for number, entry in enumerate(entries):
            if number:
                await trio.lowlevel.checkpoint()
            if entry.kind is Kind.DATA:
                for fact in facts_of(entry):
                    self.chronicle.apply(fact)
                    self._hooks.applied(self, fact)
            self.applied_index = entry.index
            self._batch.applied(entry.index)
            if entry.kind is Kind.NOOP and entry.term == self.raft.term and self.raft.role is Role.LEADER:
                self._own_term = entry.term
                self.collect(self, entry.term)
            elif entry.kind is Kind.CONFIG and self.leads():
                self.collect(self, self.raft.term)
        self.progress.ring()

    def _restore(self, snapshot: Snapshot) -> None:
        try:
            self.chronicle = Chronicle.restore(snapshot.data) if snapshot.data else Chronicle()
        except CodecError as error:
            raise InvariantError(f"{self!r}: a snapshot that no chronicle made: {error}") from error
        self.applied_index = snapshot.index
        self._hooks.restored(self)
        self.settled(self)
        self.progress.ring()

    def _snapshot(self) -> None:
        data = self.chronicle.snapshot()
        if len(data) > SNAPSHOT_BYTES_MAX // 2:
            log.warning("job %s: its ledger has %d MB: it can't be compacted", self.job.hex()[:8], len(data) >> 20)
            return
        self._hooks.compacting(self)
        self.push(fx.Compacted(self.applied_index, data))

    def knows(self, peer: PeerId) -> bool:
        """Whether a peer is, or was as far as the log goes back, a member of the group; or asked this peer to be one."""
        configs = self.raft.log.configs_from(self.raft.log.snapshot.index)
        return peer == self.enlister or any(node.peer == peer for config in configs for node in config.members)

    def uncommitted(self) -> tuple[bytes, ...]:
        """Payloads of this member's log that are not applied, final or not: what a branch goes on with."""
        raft_log = self.raft.log
        if raft_log.last_index <= self.applied_index:
            return ()
        entries = raft_log.slice(self.applied_index + 1, raft_log.last_index)
        return tuple(entry.data for entry in entries if entry.kind is Kind.DATA)

    # ---- leadership --------------------------------------------------------------------------------------------------

    async def _watch_lease(self) -> None:
        """Tell the end of a leadership that the core, waiting for the disk, can't tell yet."""
        while True:
            if not self._ruling:
                await self.progress.wait()
                continue
            left_s = self.raft.quorum_until_s() - self._clock()
            if left_s <= 0:
                self._lose("a majority was not heard in time")
                self.push(fx.Tick())
                continue
            with trio.move_on_after(max(left_s, CLOCK_SLACK_S)):
                await self.progress.wait()

    def _lose(self, why: str) -> None:
        """This member leads no more, if it did."""
        self._own_term = 0
        self._batch.lose()
        if self._ruling:
            self._ruling = 0
            self._hooks.stepped_down(self, why)
        self.progress.ring()


def facts_of(entry: Entry) -> tuple[AnyFact, ...]:
    """An entry's facts. Raises InvariantError: no leader proposes anything else."""
    try:
        return facts.decode(entry.data)
    except CodecError as error:
        raise InvariantError(f"entry {entry.index} holds no facts: {error}") from error
