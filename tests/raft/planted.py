"""Bugs put in on purpose, one a class: what the checkers must catch, or they check nothing."""

from __future__ import annotations

import random

from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_effects import Effect, Persist, Point
from grid.core.raft_limits import Timing
from grid.core.raft_log import Durable
from grid.core.raft_messages import AppendEntries, HardState, NodeId, RaftMessage, Record


class VotesTwice(Raft):
    """Forgets at a restart whom it voted for."""

    @classmethod
    def restart(
        cls, node: NodeId, durable: Durable, rng: random.Random, now_s: float, timing: Timing | None = None
    ) -> tuple[Raft, list[Effect]]:
        raft, effects = super().restart(node, durable, rng, now_s, timing)
        raft.vote, raft._hard_saved = None, HardState(raft.term)
        return raft, effects


class VotesForAnybody(Raft):
    """Votes for a log that is behind its own."""

    def _up_to_date(self, request: object) -> bool:
        return True


class CommitsOldTerms(Raft):
    """Counts copies of earlier terms' entries."""

    def _committable(self, index: int) -> bool:
        return True


class ChangesBeforeNoop(Raft):
    """Changes members before an entry of its own term is committed."""

    def _own_commit(self) -> bool:
        return True


class IgnoresTerms(Raft):
    """Takes entries of a leader that was deposed."""

    def _answer_stale(self, sender: NodeId, message: RaftMessage) -> None:
        if isinstance(message, AppendEntries) and self.role is Role.FOLLOWER:
            self._append_entries(sender, message)
        else:
            super()._answer_stale(sender, message)


class DropsEntryFsync(Raft):
    """A follower answers before its disk has the entries."""

    def _persist(self, point: Point, records: tuple[Record, ...]) -> None:
        if point is not Point.PERSIST_FOLLOWER_ENTRIES or self._rng.random() < 0.9:
            super()._persist(point, records)


class DropsVoteFsync(Raft):
    """Votes, and does not write it down."""

    def _persist(self, point: Point, records: tuple[Record, ...]) -> None:
        if point is not Point.PERSIST_VOTE:
            super()._persist(point, records)
            return
        for record in records:
            if isinstance(record, HardState):
                self._hard_saved = record


class AnswersEarly(Raft):
    """Sends its answer before the write it promises."""

    def _taken(self) -> list[object]:  # type: ignore[override]
        return sorted(super()._taken(), key=lambda effect: isinstance(effect, Persist))


class AcknowledgesUnmatched(Raft):
    """Believes that its own log agrees with the leader's wherever the leader starts."""

    def _refuse_entries(self, sender: NodeId, message: AppendEntries) -> None:
        from grid.core.raft_messages import AppendReply

        last = min(message.prev_index, self.log.last_index)
        self._send(Point.SEND_APPEND_REPLY, sender, AppendReply(self.term, True, last, sent_us=message.sent_us))
