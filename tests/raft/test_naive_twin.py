"""Every member of random groups is followed by a naive twin that reads the same messages; they must never differ."""

from __future__ import annotations

import pytest

from grid.core import raft_effects as fx
from grid.core.raft_base import Role
from grid.core.raft_messages import AppendReply, NodeId, TimeoutNow, VoteReply
from tests.raft.naive import Naive
from tests.raft.planted import CommitsOldTerms
from tests.raft.world import Chaos, Member, SmallRaft, World

CHAOS = Chaos(
    late=0.2, crash=0.015, restart=0.1, transfer=0.02, change=0.0, wipe=0.0, compact=0.0, stall=0.0, crash_at_point=0.0
)


class Twins:
    """The twins of a world's members, and the comparison after each step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.naive: dict[NodeId, Naive] = {}
        self.compared = 0
        self._before: tuple[int, Role] = (0, Role.FOLLOWER)
        self._process: dict[NodeId, object] = {}
        world.before, world.after = self.before, self.after

    def before(self, member: Member, event: fx.Event) -> None:
        raft = member.raft
        assert raft is not None
        if self._process.get(member.id) is not raft:  # a new process: only its journal survived
            self._process[member.id] = raft
            twin = self.naive[member.id] = Naive(member.id, self.world.first.voters, raft.timing.election_s)
            twin.restart(raft.term, raft.vote, list(raft.log.slice(2, raft.log.last_index)))
            if raft.role is Role.LEADER:  # appointed
                twin.leads, twin.leader = True, member.id
        twin = self.naive[member.id]
        if raft.role is Role.LEADER and self.world.now_s >= raft.quorum_until_s():
            twin.give_up()  # check-quorum: the first thing that the member will do
        self._before = (raft.term, raft.role)

    def after(self, member: Member, event: fx.Event, effects: list[fx.Effect]) -> None:
        raft, twin = member.raft, self.naive[member.id]
        assert raft is not None
        answer = None
        if isinstance(event, fx.Receive) and not isinstance(event.message, TimeoutNow):
            answer = twin.receive(event.sender, event.message, self.world.now_s)
        stood = any(isinstance(effect, fx.Persist) and effect.point is fx.Point.PERSIST_CANDIDACY for effect in effects)
        if stood:
            twin.stand()
        elif raft.role in (Role.PRE_CANDIDATE, Role.FOLLOWER) and raft.leader is None and twin.term == raft.term:
            twin.give_up()
        if isinstance(event, fx.Propose) and isinstance(effects[0], fx.Proposed):
            twin.propose(event.payloads)
        self._same(member, twin)
        sent = [effect.message for effect in effects if isinstance(effect, fx.Send)]
        if isinstance(answer, VoteReply):
            assert answer in sent, (answer, sent)
        if isinstance(answer, AppendReply):
            replies = [(reply.term, reply.ok, reply.index) for reply in sent if isinstance(reply, AppendReply)]
            assert replies == [(answer.term, answer.ok, answer.index)]

    def _same(self, member: Member, twin: Naive) -> None:
        raft = member.raft
        assert raft is not None
        assert (raft.term, raft.vote, raft.commit) == (twin.term, twin.vote, twin.commit), (raft, vars(twin))
        assert (raft.role is Role.LEADER) == twin.leads, (raft, vars(twin))
        log = [(entry.term, entry.kind, entry.data) for entry in raft.log.slice(2, raft.log.last_index)]
        assert log == twin.log[1:], raft
        self.compared += 1


@pytest.mark.parametrize("block", range(4))
def test_twin_agrees_on_random_schedules(block: int) -> None:
    compared = 0
    for seed in range(block * 15, block * 15 + 15):
        world = World(seed, voters=(3, 5, 4)[seed % 3], chaos=CHAOS, kind=SmallRaft)
        twins = Twins(world)
        world.run(300)
        compared += twins.compared
    assert compared > 3000


def test_twin_notices_a_bug() -> None:
    """A member that counts copies of earlier terms' entries parts from its twin."""

    def run(seeds: int) -> None:
        for seed in range(seeds):
            world = World(seed, voters=5, chaos=CHAOS, kind=SmallCommitsOldTerms, rules=False)
            Twins(world)
            world.run(300)

    with pytest.raises(AssertionError):
        run(200)


class SmallCommitsOldTerms(CommitsOldTerms, SmallRaft):
    """The bug, with batches small enough to show it."""
