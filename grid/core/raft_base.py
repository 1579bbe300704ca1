"""What all roles of a consensus member share: its state, its role's table of moves, its effects, commitment.

Rules: what is promised is persisted first (`_send` writes a changed hard state before it sends); each field's invariant
stands beside it and is checked where it changes, by InvariantError.
"""

from __future__ import annotations

import enum
import math
import random
from typing import Final

from grid.core.errors import IllegalTransitionError
from grid.core.raft_effects import (
    ApplySnapshot,
    BecameLeader,
    Commit,
    Effect,
    LeaderKnown,
    Persist,
    Point,
    Send,
    SnapshotWanted,
    SteppedDown,
    WakeAt,
    Why,
)
from grid.core.raft_limits import LOG_BYTES_SNAPSHOT, Timing
from grid.core.raft_log import Durable, InvariantError, RaftLog
from grid.core.raft_messages import HardState, NodeId, RaftMessage, Record


class Role(enum.Enum):
    """What a member is at the moment. A learner, and a member that was removed, is a follower that never stands."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


MOVES: Final = frozenset(
    {
        (Role.FOLLOWER, Role.FOLLOWER),  # a new term, or a new leader
        (Role.FOLLOWER, Role.PRE_CANDIDATE),  # the election timeout
        (Role.FOLLOWER, Role.CANDIDATE),  # told to by the leader; or appointed at the founding
        (Role.PRE_CANDIDATE, Role.PRE_CANDIDATE),  # nobody answered: once more
        (Role.PRE_CANDIDATE, Role.CANDIDATE),  # a majority would vote for it
        (Role.PRE_CANDIDATE, Role.FOLLOWER),  # denied, or another leads
        (Role.CANDIDATE, Role.PRE_CANDIDATE),  # split vote: begin again
        (Role.CANDIDATE, Role.LEADER),  # elected
        (Role.CANDIDATE, Role.FOLLOWER),  # denied, or another leads
        (Role.LEADER, Role.FOLLOWER),  # a higher term, no majority heard, or removed
    }
)
"""Which role may follow which, and when. Everything else raises IllegalTransitionError."""


class RaftBase:
    """Common state. Volatile unless the journal is named."""

    def __init__(self, node: NodeId, durable: Durable, timing: Timing, rng: random.Random, now_s: float) -> None:
        self.node: Final = node
        self.timing: Final = timing
        self.role = Role.FOLLOWER
        self.leader: NodeId | None = None
        """Who leads `term`, if known: forgotten with the term and when standing (section 6.2)."""
        self.term = durable.hard.term
        """In the journal. Only grows; ≥ the log's last term."""
        self.vote = durable.hard.vote
        """In the journal. Set at most once in a term."""
        self.log = RaftLog(durable)
        """In the journal but for its trail."""
        self.commit = self.log.snapshot.index
        """Only grows; snapshot.index ≤ commit ≤ last_index. All up to it were emitted by Commit or ApplySnapshot."""
        self.election_due_s = math.inf
        self.leader_heard_s = -math.inf
        """When a leader was last heard, as a follower."""
        self.doubts_leader = False
        """The connection to the leader broke, and it was not heard since."""
        self._rng = rng
        self._now_s = now_s
        self._wake_s = math.nan
        self._snapshot_asked = False
        self._hard_saved = durable.hard
        self._hard_point = Point.PERSIST_TERM
        self._effects: list[Effect] = []
        self._require(self.log.last_term <= self.term, "the log ends in a later term than the hard state")

    def __repr__(self) -> str:
        return f"<{self.node.peer!r}.{self.node.incarnation} {self.role.value} t{self.term} {self.log.last_index}/{self.commit}>"

    # ---- effects -----------------------------------------------------------------------------------------------------

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _persist(self, point: Point, records: tuple[Record, ...]) -> None:
        """Write records; a hard state among them counts as saved."""
        for record in records:
            if isinstance(record, HardState):
                self._hard_saved = record
        self._emit(Persist(point, records))

    def _persist_hard(self) -> None:
        """Write term and vote if they changed since they were written."""
        if (self.term, self.vote) != (self._hard_saved.term, self._hard_saved.vote):
            self._persist(self._hard_point, (HardState(self.term, self.vote),))
        self._hard_point = Point.PERSIST_TERM

    def _send(self, point: Point, to: NodeId, message: RaftMessage) -> None:
        """Send, after the hard state is safe: every message speaks for the term it names."""
        self._persist_hard()
        self._emit(Send(point, to, message))

    def _taken(self) -> list[Effect]:
        """The effects of the event now handled, completed by the time to wake up when it changed."""
        self._persist_hard()
        due_s = self._due_s()
        if due_s != self._wake_s:
            self._wake_s = due_s
            self._emit(WakeAt(due_s))
        effects, self._effects = self._effects, []
        return effects

    def _due_s(self) -> float:
        return self.election_due_s if self.may_stand() else math.inf

    # ---- state -------------------------------------------------------------------------------------------------------

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise InvariantError(f"{self!r}: {what}")

    def _move(self, role: Role) -> None:
        """Change role by the table."""
        if (self.role, role) not in MOVES:
            raise IllegalTransitionError(f"a {self.role.value} can't become {role.value}")
        self.role = role

    def _new_term(self, term: int) -> None:
        """Enter a higher term, with no vote and no leader yet."""
        self._require(term > self.term, f"term {term} is not higher")
        self.term, self.vote, self.leader = term, None, None

    def _become_follower(self, term: int, leader: NodeId | None, why: Why = Why.HIGHER_TERM) -> None:
        """Follow in `term` (a higher one, or this one) the leader, if there is one yet. why: for one that led."""
        stepped_down = SteppedDown(self.term, why) if self.role is Role.LEADER else None
        if self.role is not Role.FOLLOWER:
            self._move(Role.FOLLOWER)
            self._stop_leading()
            self.leader = None
            self._restart_election_timer()
        if stepped_down:
            self._emit(stepped_down)
        if term > self.term:
            self._new_term(term)
        if leader is not None:
            self._follow(leader)

    def _follow(self, leader: NodeId) -> None:
        """A legitimate leader of this term was heard now."""
        self.leader_heard_s = self._now_s
        self.doubts_leader = False
        self._restart_election_timer()
        if self.leader != leader:
            self._require(self.leader is None, f"two leaders in term {self.term}: {self.leader} and {leader}")
            self.leader = leader
            self._emit(LeaderKnown(self.term, leader))

    def _stop_leading(self) -> None:
        """Forget what only a leader has."""

    def _announce_leadership(self) -> None:
        self.leader = self.node
        self._emit(BecameLeader(self.term))

    def may_stand(self) -> bool:
        """Whether this member starts elections: a voter by its latest configuration, or by the one before it while that is
        not known to be replaced for good ("as it might still be needed", section 4.2.2)."""
        log = self.log
        if self.node in log.config.voters:
            return True
        return log.config_index > self.commit and self.node in log.config_at(self.commit).voters

    def _restart_election_timer(self) -> None:
        """Draw a new election timeout from now (section 3.4)."""
        self.election_due_s = self._now_s + self.timing.election_s * (1 + self._rng.random())

    def _commit_to(self, index: int) -> None:
        """Entries up to `index` are final."""
        if index <= self.commit:
            return
        self._require(index <= self.log.last_index, f"entry {index} can't be committed: it is not in the log")
        entries = self.log.slice(self.commit + 1, index)
        self.commit = index
        self._emit(Commit(entries))
        if self.log.bytes_after_snapshot > LOG_BYTES_SNAPSHOT and not self._snapshot_asked:
            self._snapshot_asked = True
            self._emit(SnapshotWanted(index))

    def _start(self) -> None:
        """First effects of this process's life: the state that is final already."""
        if self.log.snapshot.index:
            self._emit(ApplySnapshot(self.log.snapshot))
        self._restart_election_timer()
        if self.log.config.voters == (self.node,):
            self.election_due_s = self._now_s  # nobody to wait for
