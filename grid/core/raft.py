"""One member of a consensus group: a sans-IO Raft core after Ongaro's dissertation. Terms are a job's epochs.

`Raft.found` and `Raft.restart` make a member, `handle(event, now_s)` moves it; all return effects, to be carried out in order
(raft_effects). Time is an argument, in seconds of a clock that counts suspend and never goes back; randomness is a seeded
generator. Rules:
- a group is founded with its first configuration, term 1 and everybody's vote for the leader that was appointed: it leads
  without an election, once. A process that starts again restarts from its journal and leads by election only;
- a higher term fences a lower one; terms are compared before anything else in a message is looked at;
- pre-vote, check-quorum, leader's no-op, one-at-a-time changes of members, learners, handing over: raft_election, raft_leader.
There are no reads: whoever asks the leader's state relies on what was committed, not on leases.
"""

from __future__ import annotations

import random

from grid.core.raft_base import Role
from grid.core.raft_effects import (
    Change,
    Compacted,
    Disconnected,
    Effect,
    Event,
    Point,
    Propose,
    Receive,
    Refused,
    Tick,
    Transfer,
    Why,
)
from grid.core.raft_election import Electing, adopts_term
from grid.core.raft_follower import Following
from grid.core.raft_limits import SNAPSHOT_BYTES_MAX, Timing
from grid.core.raft_log import Durable, founding
from grid.core.raft_messages import (
    AppendEntries,
    AppendReply,
    Config,
    InstallSnapshot,
    NodeId,
    RaftMessage,
    RequestVote,
    Snapshot,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)


class Raft(Electing, Following):
    """A member. `role`, `term`, `leader`, `commit`, `log`, `progress` and `quorum_until_s()` may be read at any time."""

    def __init__(self, node: NodeId, durable: Durable, timing: Timing, rng: random.Random, now_s: float) -> None:
        """Use `found` or `restart`. Raises InvariantError when the journal contradicts itself."""
        super().__init__(node, durable, timing, rng, now_s)
        self.votes = {}
        self.incoming = None
        self._stop_leading()

    @classmethod
    def found(
        cls,
        node: NodeId,
        config: Config,
        leader: NodeId,
        rng: random.Random,
        now_s: float,
        data: bytes = b"",
        timing: Timing | None = None,
        payloads: tuple[bytes, ...] = (),
    ) -> tuple[Raft, list[Effect]]:
        """A first member of a new group, whose state is `data`: only where this incarnation has no journal of the group.

        payloads: entries that follow the state, to be committed. All first members get the same config, leader, data and
        payloads, or begin with an empty journal (`restart`): the leader brings those up, and none of them can stand before.
        Found the leader last: it leads at once, and gives up when no majority answers within an election timeout. Raises
        ValueError on a bad configuration.
        """
        if config.fault() or node not in config.members or leader not in config.voters:
            raise ValueError(f"no group can be founded: {config.fault() or 'its leader or this member is not in it'}")
        records = founding(config, leader, data, payloads)
        raft = cls(node, Durable(records), timing or Timing(), rng, now_s)
        raft._persist(Point.PERSIST_FOUNDING, records)
        raft._start()
        if leader == node:
            raft._move(Role.CANDIDATE)  # the founding was the election: everybody's vote is on record
            raft._lead()
        return raft, raft._taken()

    @classmethod
    def restart(
        cls, node: NodeId, durable: Durable, rng: random.Random, now_s: float, timing: Timing | None = None
    ) -> tuple[Raft, list[Effect]]:
        """A member from its journal. An empty one: a newcomer, that a leader will bring up when it is in a configuration."""
        raft = cls(node, durable, timing or Timing(), rng, now_s)
        raft._start()
        return raft, raft._taken()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """One event. Raises InvariantError when something happened that can't: then this member must not go on."""
        self._now_s = max(self._now_s, now_s)
        self._check_quorum()
        match event:
            case Receive():
                if event.to == self.node != event.sender:
                    self._receive(event.sender, event.message)
            case Tick():
                if self.role is Role.LEADER:
                    self._lead_tick()
                else:
                    self._election_tick()
            case Propose():
                self._propose(event.payloads)
            case Change():
                self._change(event.config)
            case Transfer():
                self._transfer(event.target)
            case Compacted():
                self._compacted(event.index, event.data)
            case Disconnected():
                self._disconnected(event.node)
        return self._taken()

    def _receive(self, sender: NodeId, message: RaftMessage) -> None:
        """Terms first: they tell what is out of date, the message or this member."""
        if message.term > self.term and adopts_term(message):
            if isinstance(message, RequestVote) and not message.force and self._hears_leader():
                return  # "it does not update its term or grant its vote" (4.2.3)
            self._fenced(message)
        if message.term < self.term:
            self._answer_stale(sender, message)
            return
        match message:
            case RequestVote():
                self._vote_request(sender, message)
            case VoteReply():
                self._vote_reply(sender, message)
            case AppendEntries() | InstallSnapshot():
                self._require(self.role is not Role.LEADER, f"{sender} leads term {self.term} too")
                self._become_follower(message.term, sender)
                self._persist_hard()
                if isinstance(message, AppendEntries):
                    self._append_entries(sender, message)
                else:
                    self._install_snapshot(sender, message)
            case AppendReply():
                self._append_reply(sender, message)
            case SnapshotReply():
                self._snapshot_reply(sender, message)
            case TimeoutNow():
                self._timeout_now(sender)

    def _fenced(self, message: RaftMessage) -> None:
        """A higher term began: whatever this member was, it is a follower in it."""
        self.incoming = None
        self._become_follower(message.term, None)

    def _answer_stale(self, sender: NodeId, message: RaftMessage) -> None:
        """"If a server receives a request with a stale term number, it rejects the request" (3.3): the answer's term tells."""
        if isinstance(message, RequestVote):
            point = Point.SEND_PRE_VOTE_REPLY if message.pre else Point.SEND_VOTE
            self._send(point, sender, VoteReply(self.term, False, message.pre))
        elif isinstance(message, AppendEntries | InstallSnapshot):
            index = message.prev_index if isinstance(message, AppendEntries) else message.index
            self._send(Point.SEND_APPEND_REPLY, sender, AppendReply(self.term, False, index, sent_us=message.sent_us))

    def _compacted(self, index: int, data: bytes) -> None:
        """The state machine's snapshot: write it, then forget the log before it."""
        term = self.log.term_at(index)
        if not self.log.snapshot.index < index <= self.commit or term is None or len(data) > SNAPSHOT_BYTES_MAX:
            self._emit(Refused(Why.BAD_SNAPSHOT))
            return
        snapshot = Snapshot(index, term, self.log.config_at(index), data)
        self._persist(Point.PERSIST_OWN_SNAPSHOT, (snapshot,))
        self.log.compact(snapshot)
        self._snapshot_asked = False
