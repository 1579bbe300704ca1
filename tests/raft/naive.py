"""A deliberately naive twin: figure 2 of the paper, written down as it stands, and nothing else.

It sends nothing and decides nothing: it is shown what one member of a simulated group is shown (messages, proposals, the
moment it stands or gives up), and must come to the same term, vote, log, commit index and answers. One entry is compared at a
time, the commit index is found by trying each index, logs are copied whole. A fixed group, no snapshots.
"""

from __future__ import annotations

from grid.core.raft_messages import (
    AppendEntries,
    AppendReply,
    Entry,
    Kind,
    NodeId,
    RaftMessage,
    RequestVote,
    TimeoutNow,
    VoteReply,
)


class Naive:
    """The state of figure 2. log[0] stands for entry 1, the founding."""

    def __init__(self, me: NodeId, voters: tuple[NodeId, ...], election_s: float) -> None:
        self.me, self.voters, self.election_s = me, voters, election_s
        self.term, self.vote = 0, None
        self.log: list[tuple[int, Kind, bytes]] = [(1, Kind.DATA, b"")]
        self.commit = 1
        self.leads = False
        self.stands = False
        self.votes: set[NodeId] = set()
        self.match: dict[NodeId, int] = {}
        self.leader: NodeId | None = None
        self.heard_s = -1e9

    vote: NodeId | None

    def restart(self, term: int, vote: NodeId | None, entries: list[Entry]) -> None:
        """Only term, vote and log survive."""
        self.__init__(self.me, self.voters, self.election_s)  # type: ignore[misc]
        self.term, self.vote = term, vote
        self.log += [(entry.term, entry.kind, entry.data) for entry in entries]

    # ---- what the member did by its own timers -----------------------------------------------------------------------

    def stand(self) -> None:
        self.term, self.vote, self.stands, self.leads, self.leader = self.term + 1, self.me, True, False, None
        self.votes = {self.me}
        self._maybe_lead()

    def give_up(self) -> None:
        self.leads, self.stands, self.leader = False, False, None

    def propose(self, payloads: tuple[bytes, ...]) -> None:
        for data in payloads:
            self.log.append((self.term, Kind.DATA, data))
        self._count()

    # ---- messages ----------------------------------------------------------------------------------------------------

    def receive(self, sender: NodeId, message: RaftMessage, now_s: float) -> RaftMessage | None:
        """The answer that counts: to RequestVote and AppendEntries; its hint and its clock don't."""
        if isinstance(message, RequestVote) and message.pre:
            if message.term < self.term:
                return VoteReply(self.term, False, True)
            fine = message.term > self.term and not self._hears(now_s) and self._at_least(message)
            return VoteReply(message.term if fine else self.term, fine, True)
        if isinstance(message, VoteReply) and message.pre and message.granted:
            return None
        if isinstance(message, RequestVote) and not message.force and message.term > self.term and self._hears(now_s):
            return None
        if message.term > self.term:
            self.term, self.vote, self.leads, self.stands, self.leader = message.term, None, False, False, None
        if isinstance(message, RequestVote):
            fine = message.term == self.term and self.vote in (None, sender) and self._at_least(message)
            if fine:
                self.vote = sender
            return VoteReply(self.term, fine)
        if isinstance(message, AppendEntries):
            return self._append(sender, message, now_s)
        if message.term == self.term:
            if isinstance(message, VoteReply) and self.stands and message.granted:
                self.votes.add(sender)
                self._maybe_lead()
            if isinstance(message, AppendReply) and self.leads and message.ok:
                self.match[sender] = max(self.match.get(sender, 0), message.index)
                self._count()
        assert not isinstance(message, TimeoutNow)
        return None

    def _append(self, sender: NodeId, message: AppendEntries, now_s: float) -> AppendReply:
        if message.term < self.term:
            return AppendReply(self.term, False, message.prev_index)
        self.stands, self.leader, self.heard_s = False, sender, now_s
        previous = message.prev_index
        if previous > len(self.log) or (previous > 0 and self.log[previous - 1][0] != message.prev_term):
            return AppendReply(self.term, False, previous)
        for entry in message.entries:
            if entry.index <= len(self.log) and self.log[entry.index - 1][0] != entry.term:
                self.log = self.log[: entry.index - 1]
            if entry.index > len(self.log):
                self.log = [*self.log, (entry.term, entry.kind, entry.data)]
        last = previous + len(message.entries)
        self.commit = max(self.commit, min(message.commit, last))
        return AppendReply(self.term, True, last)

    def _hears(self, now_s: float) -> bool:
        return self.leads or (self.leader is not None and now_s < self.heard_s + self.election_s)

    def _at_least(self, message: RequestVote) -> bool:
        mine = self.log[-1][0]
        if message.last_term != mine:
            return message.last_term > mine
        return message.last_index >= len(self.log)

    def _maybe_lead(self) -> None:
        if not self.leads and len(self.votes) > len(self.voters) / 2:
            self.leads, self.stands, self.leader, self.match = True, False, self.me, {}
            self.log.append((self.term, Kind.NOOP, b""))
            self._count()

    def _count(self) -> None:
        for index in range(self.commit + 1, len(self.log) + 1):
            copies = 1 + sum(self.match.get(node, 0) >= index for node in self.voters if node != self.me)
            if copies > len(self.voters) / 2 and self.log[index - 1][0] == self.term:
                self.commit = index
