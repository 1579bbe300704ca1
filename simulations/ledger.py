"""Checkers of the jobs' replicated logs: told of every step of every member, of all groups, in the order of the world's events.

- The consensus core's own properties (`grid.core.raft_check`): one leader a term, one vote a term, nothing committed that is not
  on a majority's disks, nothing committed ever lost or replaced. What a power cut left of a write that was under way is found
  out when the member starts again: any first part of it.
- Facts: every member of a branch is told the same facts in the same order; whoever takes over knows every fact that any member
  was ever told; one leader an epoch in a branch; one outcome a branch.
- A founding that no majority took in is given up and made again with other members: a group of its own, of which nothing may
  have come and nothing may come.

Rules: one `Groups` a world; a breach is a violation of the world and never reaches the code that is watched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grid.core import raft_effects as fx
from grid.core.chronicle import Chronicle
from grid.core.facts import AnyFact, Ended, Output, encode
from grid.core.raft_check import Checker, Violation
from grid.core.raft_log import Durable
from grid.core.raft_messages import Appended, NodeId, Record

if TYPE_CHECKING:
    from grid.replica import Replica
    from simulations.world import World


class Group:
    """One branch of one job, from one founding."""

    def __init__(self) -> None:
        self.checker = Checker()
        self.facts: list[AnyFact] = []
        self.leaders: dict[int, str] = {}
        self.output: dict[int, int] = {1: 0, 2: 0}
        self.outcome: bytes | None = None
        self.base: bytes | None = None  # of a branch: the state that it was opened with
        self.writing: dict[NodeId, list[Record]] = {}
        self.founder: NodeId | None = None
        self.empty: dict[NodeId, tuple[Any, Durable]] = {}  # members that nothing had reached when they began


class Groups:
    """All branches of all jobs of a world."""

    def __init__(self, world: World) -> None:
        self.all: dict[tuple[bytes, bytes], Group] = {}
        self._world = world
        self._at: dict[int, tuple[Any, int]] = {}  # id of a replica → (it, facts it was told of)
        self._group_of: dict[int, tuple[Any, Group]] = {}  # id of a core → (it, its group)

    def group(self, replica: Replica) -> Group:
        """Its group."""
        return self.all.setdefault((bytes(replica.job), bytes(replica.branch.name)), Group())

    def _bad(self, what: object) -> None:
        self._world.violation(f"the ledger: {what}")

    # ---- the consensus core ----

    def began(self, replica: Replica, durable: Durable, founds: bool) -> None:
        """A member is here, from its journal or as the founder of a group."""
        group = self.group(replica)
        if founds and group.founder is not None:
            group = self._founded_anew(replica, group)
        self._group_of[id(replica.raft)] = replica.raft, group
        self._at[id(replica)] = replica, 0
        if founds:
            group.founder = replica.node
            return
        if not (replica.raft.log.last_index or replica.raft.term):
            group.empty[replica.node] = replica.raft, durable
        pending = group.writing.pop(replica.node, [])
        self._settle(group, replica.node, pending, durable)
        try:
            group.checker.started(replica.node, durable)
        except Violation as violation:
            self._bad(violation)

    def _founded_anew(self, replica: Replica, before: Group) -> Group:
        """The group that takes the place of one that was given up; who is empty may belong to either."""
        if before.leaders or before.facts:
            self._bad(f"{replica!r} is founded anew although it was led before")
        group = self.all[bytes(replica.job), bytes(replica.branch.name)] = Group()
        for node, (raft, durable) in before.empty.items():
            if not (raft.log.last_index or raft.term):
                self._group_of[id(raft)] = raft, group
                group.empty[node] = raft, durable
                group.checker.started(node, durable)
        return group

    def _settle(self, group: Group, node: NodeId, pending: list[Record], durable: Durable) -> None:
        """A write was under way when the member died: take as much of it as its disk has."""
        pieces: list[Record] = []
        for record in pending:
            if isinstance(record, Appended):
                pieces += [Appended((entry,)) for entry in record.entries]
            else:
                pieces.append(record)
        for count in range(len(pieces), -1, -1):
            trial = copy.deepcopy(group.checker)
            try:
                trial.torn(node, pieces[:count])
                trial.started(node, durable)
            except Violation:
                continue
            group.checker.torn(node, pieces[:count])
            return

    def decided(self, raft: Any, event: fx.Event, effects: Sequence[fx.Effect]) -> None:
        """The core's answer to an event."""
        known = self._group_of.get(id(raft))
        if known is not None:
            try:
                known[1].checker.decided(raft, event, effects)
            except Violation as violation:
                self._bad(violation)

    def writes(self, replica_raft: Any, node: NodeId, persists: Sequence[fx.Persist]) -> None:
        """These are on their way to the disk."""
        known = self._group_of.get(id(replica_raft))
        if known is not None:
            known[1].writing[node] = [record for effect in persists for record in effect.records]

    def did(self, raft: Any, effect: fx.Effect) -> None:
        """The effect was carried out; a Persist is on the disk."""
        known = self._group_of.get(id(raft))
        if known is None:
            return
        if isinstance(effect, fx.Persist):
            known[1].writing.pop(raft.node, None)
        try:
            known[1].checker.did(raft, effect)
        except Violation as violation:
            self._bad(violation)

    # ---- facts ----

    def applied(self, replica: Replica, host: str, fact: AnyFact) -> None:
        """A member is told a fact."""
        group = self.group(replica)
        _, at = self._at.get(id(replica), (replica, 0))
        if at < len(group.facts):
            if encode((group.facts[at],)) != encode((fact,)):
                self._bad(f"{host} is told {fact!r} as fact {at}, where others were told {group.facts[at]!r}")
        else:
            group.facts.append(fact)
            self._new(group, host, fact)
        self._at[id(replica)] = replica, at + 1

    def _new(self, group: Group, host: str, fact: AnyFact) -> None:
        if isinstance(fact, Output):
            if fact.at == group.output[fact.fd]:
                group.output[fact.fd] += len(fact.data)
            elif fact.at > group.output[fact.fd]:
                has = group.output[fact.fd]
                self._bad(f"output is missing: fd {fact.fd} has {has} bytes, {host} is told those from {fact.at} on")
        elif isinstance(fact, Ended) and group.outcome is None:
            group.outcome = fact.outcome

    def restored(self, replica: Replica, host: str) -> None:
        """A member's state was replaced by a snapshot: it must be that of some number of the facts."""
        group = self.group(replica)
        wanted = replica.chronicle.snapshot()
        if replica.branch.name and group.base is None:
            group.base = wanted
            group.output = dict(replica.chronicle.output_length)
            group.outcome = replica.chronicle.outcome
        state = Chronicle.restore(group.base) if group.base is not None else Chronicle()
        for at in range(len(group.facts) + 1):
            if state.snapshot() == wanted:
                self._at[id(replica)] = replica, at
                return
            if at < len(group.facts):
                state.apply(group.facts[at])
        self._bad(f"{host} was given a state that no number of facts makes")

    def took_over(self, replica: Replica, host: str, term: int) -> None:
        """A leadership begins."""
        group = self.group(replica)
        if self._group_of[id(replica.raft)][1] is not group:
            self._bad(f"{host} leads epoch {term} of a founding that was given up")
        first = group.leaders.setdefault(term, host)
        if first != host:
            self._bad(f"{host} and {first} lead epoch {term}")
        _, at = self._at.get(id(replica), (replica, 0))
        if at < len(group.facts) and term == max(group.leaders):
            self._bad(f"{host} leads epoch {term} and knows {at} of {len(group.facts)} facts")
        self._world.count("leaderships")

    def branches(self, job: str) -> int:
        """How many histories a job has."""
        return sum(1 for name, _ in self.all if name.hex() == job)

    def is_final(self, job: bytes, fd: int, end: int) -> bool:
        """Whether output up to there is in some branch's committed facts."""
        groups = [group for (name, _), group in self.all.items() if name == job]
        return not groups or any(group.output[fd] >= end for group in groups)
