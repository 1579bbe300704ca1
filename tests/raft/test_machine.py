"""Hypothesis steers a group: it chooses what is delivered, lost, repeated, who dies where, who is cut off, and shrinks what
goes wrong to a few steps. Everything is checked after each step, and in the end the group must make progress."""

from __future__ import annotations

import heapq

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from grid.core import raft_effects as fx
from grid.core.raft_check import matching
from tests.raft.world import CALM, HOWS, Member, SmallRaft, World

PLACES = st.integers(0, 30)
MEMBERS = st.integers(0, 7)


class Group(RuleBasedStateMachine):
    """A World without chance of its own: the rules are the chance."""

    @initialize(voters=st.integers(1, 5), seed=st.integers(0, 3))
    def found(self, voters: int, seed: int) -> None:
        self.world = World(seed, voters=voters, chaos=CALM, kind=SmallRaft)

    def member(self, n: int) -> Member:
        members = list(self.world.members.values())
        return members[n % len(members)]

    @rule(steps=st.integers(1, 12))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule(place=PLACES, repeat=st.booleans())
    def deliver_out_of_order(self, place: int, repeat: bool) -> None:
        queue = self.world._queue
        packets = sorted(item for item in queue if item[3] is not None)
        if not packets:
            return
        item = packets[place % len(packets)]
        if not repeat:
            queue.remove(item)
            heapq.heapify(queue)
        _, _, to, sender, message = item
        member = self.world.members.get(to)
        if member is not None and member.raft is not None and sender is not None and message is not None:
            self.world.handle(member, fx.Receive(sender, to, message))

    @rule(place=PLACES, count=st.integers(1, 5))
    def lose(self, place: int, count: int) -> None:
        queue = self.world._queue
        packets = sorted(item for item in queue if item[3] is not None)
        for item in packets[place : place + count]:
            queue.remove(item)
        heapq.heapify(queue)

    @rule(n=MEMBERS)
    def time_out(self, n: int) -> None:
        """Its clock runs ahead: it stands now, or sends heartbeats now."""
        member = self.member(n)
        if member.raft is not None and member.wake_s < self.world.now_s + 10:
            self.world.now_s = max(self.world.now_s, member.wake_s)
            self.world.handle(member, fx.Tick())

    @rule(n=MEMBERS, count=st.integers(1, 3))
    def propose(self, n: int, count: int) -> None:
        member = self.world.leader() or self.member(n)
        if member.raft is not None:
            self.world.handle(member, fx.Propose(self.world.payloads(count)))

    @rule(n=MEMBERS)
    def crash(self, n: int) -> None:
        self.world.crash(self.member(n))

    @rule(n=MEMBERS)
    def start_again(self, n: int) -> None:
        member = self.member(n)
        if member.raft is None:
            self.world.start(member)

    @rule(point=st.sampled_from(list(fx.Point)), how=st.sampled_from(HOWS))
    def kill_at(self, point: fx.Point, how: str) -> None:
        self.world.kill_at = (point, how if point.startswith("persist") else HOWS[how == "before"])

    @rule(a=MEMBERS, b=MEMBERS, both=st.booleans())
    def cut(self, a: int, b: int, both: bool) -> None:
        one, other = self.member(a).id.peer, self.member(b).id.peer
        self.world.blocked |= {(one, other), (other, one)} if both else {(one, other)}

    @rule()
    def heal(self) -> None:
        self.world.blocked.clear()

    @rule()
    def hand_over(self) -> None:
        self.world._transfer()

    @rule()
    def change_members(self) -> None:
        self.world._change()

    @rule()
    def lose_a_journal(self) -> None:
        self.world._wipe()

    @rule()
    def compact(self) -> None:
        self.world._compact()

    @invariant()
    def logs_match(self) -> None:
        if hasattr(self, "world"):
            matching(member.raft for member in self.world.alive() if member.raft is not None)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


TestGroup = Group.TestCase
TestGroup.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
