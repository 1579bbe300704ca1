"""Elections: standing, asking first (pre-vote), voting, counting.

Rules (sections of the dissertation):
- one vote a term, on disk before it is told (3.4, 3.8); only for a log at least as up-to-date as the own (3.6.1);
- nobody raises its term before a majority said it would vote for it (9.6), except where the leader told it to (3.10);
- who heard a leader within the shortest election timeout neither votes nor takes over a candidate's term (4.2.3): a rule
  against disruption, not for safety, so who lost its connection to the leader need not wait for the timeout;
- learners and strangers vote when asked, since the candidate's configuration decides who counts (4.1), but never stand.
"""

from __future__ import annotations

from grid.core.raft_base import Role
from grid.core.raft_effects import Point
from grid.core.raft_leader import Leading
from grid.core.raft_limits import DOUBT_S
from grid.core.raft_messages import NodeId, RequestVote, VoteReply


class Electing(Leading):
    """A member with what an election needs."""

    votes: dict[NodeId, bool]
    """Answers to the present candidacy, the own vote included."""

    def _election_tick(self) -> None:
        if self._now_s >= self.election_due_s and self.may_stand():
            self._ask_first()

    def _ask_first(self) -> None:
        """The election timeout passed: would a majority vote for this member? Terms stay as they are."""
        self._move(Role.PRE_CANDIDATE)
        self.leader = None
        self._restart_election_timer()
        self._poll(self.term + 1, pre=True)

    def _stand(self, force: bool = False) -> None:
        """A real candidacy, in a new term: the own vote is on disk before anybody is asked."""
        self._move(Role.CANDIDATE)
        self._new_term(self.term + 1)
        self.vote = self.node
        self._restart_election_timer()
        self._hard_point = Point.PERSIST_CANDIDACY
        self._persist_hard()
        self._poll(self.term, pre=False, force=force)

    def _poll(self, term: int, pre: bool, force: bool = False) -> None:
        """Ask the other voters. The own vote is in; it may be enough."""
        self.votes = {self.node: True}
        request = RequestVote(term, self.log.last_index, self.log.last_term, pre, force)
        point = Point.SEND_PRE_VOTE if pre else Point.SEND_VOTE_REQUEST
        for node in self.log.config.voters:
            if node != self.node:
                self._send(point, node, request)
        self._count()

    def _count(self) -> None:
        """"A candidate wins an election if it receives votes from a majority of the servers in the full cluster" (3.4)."""
        config = self.log.config
        granted = sum(self.votes.get(node) is True for node in config.voters)
        denied = sum(self.votes.get(node) is False for node in config.voters)
        if granted >= config.quorum:
            if self.role is Role.PRE_CANDIDATE:
                self._stand()
            else:
                self._lead()
        elif denied > len(config.voters) - config.quorum:
            self._become_follower(self.term, None)

    def _hears_leader(self) -> bool:
        """Whether a leader is known and was heard within the shortest election timeout."""
        if self.role is Role.LEADER:
            return True  # it would have stepped down
        if self.leader is None or self.doubts_leader:
            return False
        return self._now_s < self.leader_heard_s + self.timing.election_s

    def _disconnected(self, node: NodeId) -> None:
        """A dead process' connections break at once: then neither its lease nor the election timeout need be waited for."""
        if self.role is Role.FOLLOWER and self.leader == node:
            self.doubts_leader = True
            self.election_due_s = min(self.election_due_s, self._now_s + self._rng.random() * DOUBT_S)

    def _vote_request(self, sender: NodeId, request: RequestVote) -> None:
        """A candidate of this term (or, asking first, of a later one)."""
        if request.pre:
            granted = request.term > self.term and not self._hears_leader() and self._up_to_date(request)
            reply = VoteReply(request.term if granted else self.term, granted, pre=True)
            self._send(Point.SEND_PRE_VOTE_REPLY, sender, reply)
            return
        granted = request.term == self.term and self._free_to_vote(sender) and self._up_to_date(request)
        if granted:
            if self.role is Role.PRE_CANDIDATE:
                self._become_follower(self.term, None)
            self._require(self.role is Role.FOLLOWER, "only a follower votes for another")
            self.vote = sender
            self._hard_point = Point.PERSIST_VOTE
            self._restart_election_timer()
        self._send(Point.SEND_VOTE, sender, VoteReply(self.term, granted))

    def _free_to_vote(self, candidate: NodeId) -> bool:
        """"Each server will vote for at most one candidate in a given term" (3.4)."""
        return self.vote in (None, candidate)

    def _up_to_date(self, request: RequestVote) -> bool:
        return self.log.up_to_date(request.last_term, request.last_index)

    def _vote_reply(self, sender: NodeId, reply: VoteReply) -> None:
        """An answer of this term; of a granted pre-vote, for the next one."""
        asked = (Role.PRE_CANDIDATE, self.term + 1) if reply.pre and reply.granted else (Role.CANDIDATE, self.term)
        if reply.pre and not reply.granted:
            asked = (Role.PRE_CANDIDATE, self.term)
        if (self.role, reply.term) == asked:
            self.votes[sender] = reply.granted
            self._count()

    def _timeout_now(self, sender: NodeId) -> None:
        """"This request has the same effect as the target server's election timer firing" (3.10), and asks nobody first."""
        if self.role is Role.FOLLOWER and self.leader == sender and self.node in self.log.config.voters:
            self._stand(force=True)


def adopts_term(message: object) -> bool:
    """Whether a message of a higher term makes its receiver enter that term: a question about voting in a term to come,
    and the promise to, don't."""
    if isinstance(message, RequestVote):
        return not message.pre
    return not (isinstance(message, VoteReply) and message.pre and message.granted)
