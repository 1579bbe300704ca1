"""A small deterministic world for the consensus core alone: members with disks, a faulty network, one seed.

Everything that happens comes from one heap of (time, number) and one generator; a seed replays exactly. Every step goes
through `raft_check.Checker`. `Chaos` says what may go wrong; `finish` heals all and demands progress.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import replace

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_check import Checker
from grid.core.raft_log import Durable
from grid.core.raft_messages import Appended, Config, NodeId, RaftMessage, Record, config_of, decode, encode
from tests.raft.material import ACTIONS, CALM, HOWS, Chaos, CrashedError, Member, SmallRaft, node


class World:
    """Members numbered 1..voters, n1 appointed as leader of term 1."""

    def __init__(
        self,
        seed: int,
        voters: int = 3,
        chaos: Chaos | None = None,
        kind: type[Raft] = Raft,
        rules: bool = True,
        kill_at: tuple[fx.Point, str] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.chaos = chaos or Chaos()
        self.kind = kind
        self.now_s = 0.0
        self.checker = Checker()
        self.rules = rules
        self.members: dict[NodeId, Member] = {}
        self.blocked: set[tuple[bytes, bytes]] = set()
        self.steps = 0
        self.effects_done = 0
        self.points: dict[fx.Point, int] = {}
        self.kill_at = kill_at
        self.kills: list[tuple[fx.Point, str]] = []
        self.before: Callable[[Member, fx.Event], None] | None = None
        self.after: Callable[[Member, fx.Event, list[fx.Effect]], None] | None = None
        self._queue: list[tuple[float, int, NodeId, NodeId | None, RaftMessage | None]] = []
        self._number = 0
        self._payload = 0
        self._next_peer = voters + 1
        self.wiped: NodeId | None = None
        self.first = config_of(node(n) for n in range(1, voters + 1))
        for id_ in reversed(self.first.voters):
            self.found(id_)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def found(self, id_: NodeId) -> None:
        member = self.members[id_] = Member(id_)
        member.raft, effects = self.kind.found(id_, self.first, node(1), self._seeded(), self.now_s)
        self._carry_out(member, effects)

    def start(self, member: Member) -> None:
        """Start a member that is down, from its disk."""
        member.held, member.applied, member.wake_s = [], [], math.inf
        journal = Durable(member.disk.records())
        self.checker.started(member.id, journal)
        member.raft, effects = self.kind.restart(member.id, journal, self._seeded(), self.now_s)
        self._carry_out(member, effects)

    def crash(self, member: Member) -> None:
        member.raft, member.held, member.wake_s = None, [], math.inf

    def _seeded(self) -> random.Random:
        return random.Random(self.rng.random())

    def handle(self, member: Member, event: fx.Event) -> list[fx.Effect]:
        """One event at one member, checked; its effects are carried out, or held back to be carried out with the next ones."""
        assert member.raft is not None
        if self.before:
            self.before(member, event)
        effects = member.raft.handle(event, self.now_s)
        if self.rules:
            self.checker.decided(member.raft, event, effects)
        if self.after:
            self.after(member, event, effects)
        self._carry_out(member, effects)
        return effects

    def _carry_out(self, member: Member, effects: list[fx.Effect]) -> None:
        member.held += effects
        if self.chaos.grouped and self.rng.random() < self.chaos.grouped and member.held:
            return
        self.release(member)

    def release(self, member: Member) -> None:
        """Carry out what is held: several calls' effects with their Persists first, as the contract allows."""
        effects, member.held = member.held, []
        if self.chaos.grouped:
            effects.sort(key=lambda effect: not isinstance(effect, fx.Persist))
        try:
            for effect in effects:
                self._do(member, effect)
        except CrashedError:
            self.crash(member)

    def _do(self, member: Member, effect: fx.Effect) -> None:
        self.effects_done += 1
        assert member.raft is not None
        if isinstance(effect, fx.Persist | fx.Send):
            point = effect.point
            self.points[point] = self.points.get(point, 0) + 1
            how = self._killed(point)
            if how == "before":
                raise CrashedError
            if isinstance(effect, fx.Persist):
                self._write(member, effect, torn=how == "torn")
            else:
                self._post(member.id, effect.to, effect.message)
                self.checker.did(member.raft, effect)
            if how:
                raise CrashedError
            return
        self.checker.did(member.raft, effect)
        match effect:
            case fx.WakeAt():
                member.wake_s = effect.time_s
                if effect.time_s < math.inf:
                    self._push(effect.time_s, member.id, None, None)
            case fx.Commit():
                member.applied += [entry.index for entry in effect.entries]
            case _:
                pass

    def _killed(self, point: fx.Point) -> str:
        if self.kill_at is not None and self.kill_at[0] is point:
            how, self.kill_at = self.kill_at[1], None
            self.kills.append((point, how))
            return how
        return ""

    def _write(self, member: Member, effect: fx.Persist, torn: bool) -> None:
        records: tuple[Record, ...] = effect.records
        if torn:  # whole records up to some point; of the next, entries up to some point
            keep = self.rng.randrange(len(records))
            rest = records[keep]
            records = records[:keep]
            if isinstance(rest, Appended) and (part := rest.entries[: self.rng.randrange(len(rest.entries))]):
                records += (Appended(part),)
        for record in records:
            member.disk.apply(record)
        if torn:
            self.checker.torn(member.id, records)
        elif member.raft is not None:
            self.checker.did(member.raft, effect)

    # ---- network -----------------------------------------------------------------------------------------------------

    def _push(self, time_s: float, to: NodeId, sender: NodeId | None, message: RaftMessage | None) -> None:
        self._number += 1
        heapq.heappush(self._queue, (time_s, self._number, to, sender, message))

    def _post(self, sender: NodeId, to: NodeId, message: RaftMessage) -> None:
        rng, chaos = self.rng, self.chaos
        if (sender.peer, to.peer) in self.blocked or rng.random() < chaos.loss:
            return
        if chaos.on_wire:
            message = decode(encode(message))
        for _ in range(2 if rng.random() < chaos.duplicate else 1):
            delay_s = rng.uniform(0.0005, 0.01) if rng.random() >= chaos.late else rng.uniform(0.01, 2.0)
            self._push(self.now_s + delay_s, to, sender, message)

    # ---- time --------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """The next thing in the heap. False when there is none."""
        while self._queue:
            time_s, _, to, sender, message = heapq.heappop(self._queue)
            self.now_s = max(self.now_s, time_s)
            member = self.members.get(to)
            if member is None or member.raft is None:
                continue
            if self.now_s < member.stalled_until_s:
                self._push(member.stalled_until_s, to, sender, message)
                continue
            if sender is None:
                if time_s < member.wake_s:
                    continue
                self.handle(member, fx.Tick())
            else:
                assert message is not None
                if (sender.peer, to.peer) in self.blocked:
                    continue
                self.handle(member, fx.Receive(sender, to, message))
            self.steps += 1
            return True
        return False

    def run(self, steps: int) -> None:
        """Steps with chaos between them."""
        for _ in range(steps):
            self.disturb()
            if not self.step():
                self.now_s += 0.1

    def leader(self) -> Member | None:
        """The leader of the highest term, among those who think they lead."""
        leading = [m for m in self.members.values() if m.raft is not None and m.raft.role is Role.LEADER]
        return max(leading, key=lambda m: m.raft.term if m.raft else 0, default=None)

    def alive(self) -> list[Member]:
        return [member for member in self.members.values() if member.raft is not None]

    # ---- chaos -------------------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Maybe let something go wrong, or somebody want something."""
        rng, chaos = self.rng, self.chaos
        roll = rng.random()
        for action in ACTIONS:
            roll -= getattr(chaos, action)
            if roll < 0:
                getattr(self, f"_{action}")()
                return

    def _propose(self) -> None:
        alive = self.alive()
        leader = self.leader()
        member = leader if leader is not None and self.rng.random() < 0.9 else self.rng.choice(alive) if alive else None
        if member is not None:
            self.handle(member, fx.Propose(self.payloads(self.rng.choice((1, 1, 1, 2, 5)))))

    def payloads(self, count: int) -> tuple[bytes, ...]:
        self._payload += count
        return tuple(b"%d" % number for number in range(self._payload - count, self._payload))

    def _crash(self) -> None:
        leader = self.leader()
        if leader is not None and self.rng.random() < 0.5:
            self.crash(leader)
        elif alive := self.alive():
            self.crash(self.rng.choice(alive))

    def _crash_at_point(self) -> None:
        point = self.rng.choice(list(fx.Point))
        self.kill_at = (point, self.rng.choice(HOWS[: 3 if point.startswith("persist") else 2]))

    def _bounce(self) -> None:
        if alive := self.alive():
            member = self.rng.choice(alive)
            self.crash(member)
            self.start(member)

    def _restart(self) -> None:
        if down := [member for member in self.members.values() if member.raft is None and member.id != self.wiped]:
            self.start(self.rng.choice(down))

    def _cut(self) -> None:
        peers = sorted({member.id.peer for member in self.members.values()})
        if self.rng.random() < 0.5:  # one direction of one link
            self.blocked.add((self.rng.choice(peers), self.rng.choice(peers)))
        else:  # one side from the other, maybe one way only
            side = set(self.rng.sample(peers, self.rng.randrange(1, len(peers))))
            both = self.rng.random() < 0.6
            self.blocked |= {(a, b) for a in peers for b in peers if a in side and b not in side}
            if both:
                self.blocked |= {(b, a) for a, b in self.blocked}

    def _heal(self) -> None:
        self.blocked.clear()

    def _transfer(self) -> None:
        if leader := self.leader():
            target = self.rng.choice([None, *self.members])
            self.handle(leader, fx.Transfer(target))

    def _stall(self) -> None:
        if alive := self.alive():
            self.rng.choice(alive).stalled_until_s = self.now_s + self.rng.uniform(0.1, 4.0)

    def _compact(self) -> None:
        if alive := self.alive():
            member = self.rng.choice(alive)
            assert member.raft is not None
            if member.applied and not member.held:
                self.handle(member, fx.Compacted(member.applied[-1], b"state %d" % member.applied[-1]))

    def _wipe(self) -> None:
        """A voter's journal is lost, it comes back under a new incarnation: at most one at a time, and never a majority."""
        leader = self.leader()
        if self.wiped is not None or leader is None or leader.raft is None:
            return
        log = leader.raft.log
        victims = [id_ for id_ in log.config.voters if id_ != leader.id]
        if log.config_index > leader.raft.commit or len(victims) < 2 or any(m.raft is None for m in self.members.values()):
            return
        self.wiped = self.rng.choice(victims)
        self.crash(self.members[self.wiped])
        del self.members[self.wiped]
        fresh = NodeId(self.wiped.peer, self.wiped.incarnation + 1)
        self.members[fresh] = Member(fresh)
        self.start(self.members[fresh])

    def _change(self) -> None:
        leader = self.leader()
        if leader is None or leader.raft is None:
            return
        if config := self._next_config(leader.raft.log.config):
            self.handle(leader, fx.Change(config))

    def _next_config(self, now: Config) -> Config | None:
        """A change that somebody might want: replace the wiped, promote, add, remove."""
        rng = self.rng
        if self.wiped is not None and self.wiped in now.members:
            fresh = NodeId(self.wiped.peer, self.wiped.incarnation + 1)
            return config_of((set(now.voters) - {self.wiped}), (set(now.learners) | {fresh}) - {self.wiped})
        learners, voters = set(now.learners), set(now.voters)
        if learners and rng.random() < 0.6:
            one = rng.choice(sorted(learners))
            return config_of(voters | {one}, learners - {one})
        if len(voters) > 2 and rng.random() < 0.5:
            gone = rng.choice(sorted(voters))
            return config_of(voters - {gone}, learners | {gone} if rng.random() < 0.5 else learners)
        if len(now.members) >= 6:
            return None
        known = [m for m in self.members if m.peer not in {n.peer for n in now.members} and m != self.wiped]
        if known and rng.random() < 0.5:
            return config_of(voters, learners | {rng.choice(known)})
        fresh = node(self._next_peer)
        self._next_peer += 1
        self.members[fresh] = Member(fresh)
        self.start(self.members[fresh])
        return config_of(voters, learners | {fresh})

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, seconds: float = 30.0) -> None:
        """Heal everything: within `seconds` a new proposal is committed by every member of the group, or it is an error."""
        grouped, on_wire = self.chaos.grouped, self.chaos.on_wire
        self.chaos = replace(CALM, on_wire=on_wire)
        self.blocked.clear()
        self.kill_at = None
        for member in list(self.members.values()):
            member.stalled_until_s = 0
            if member.raft is None:
                self.start(member)
            elif grouped:
                self.chaos.grouped = grouped
                self.release(member)
                self.chaos.grouped = 0.0
        end_s = self.now_s + seconds
        goal = None
        while self.now_s < end_s:
            leader = self.leader()
            if goal is None and leader is not None:
                effects = self.handle(leader, fx.Propose(self.payloads(1)))
                if isinstance(effects[0], fx.Proposed):
                    goal = effects[0]
            if goal is not None and self._reached(goal):
                return
            if goal is not None and leader is not None and leader.raft is not None and leader.raft.term > goal.term:
                goal = None
            if not self.step():
                break
        raise AssertionError(f"no progress: {goal=}, wiped {self.wiped}, {[member.raft for member in self.members.values()]}")

    def _reached(self, goal: fx.Proposed) -> bool:
        leader = self.leader()
        if leader is None or leader.raft is None:
            return False
        members = leader.raft.log.config.members
        rafts = [self.members[id_].raft for id_ in members if id_ in self.members]
        return all(raft is not None and raft.commit >= goal.last for raft in rafts)


__all__ = ["CALM", "HOWS", "Chaos", "Member", "SmallRaft", "World", "node"]
