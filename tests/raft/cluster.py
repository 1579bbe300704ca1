"""A group driven by hand: nothing is delivered, no time passes unless a test says so. Says what happens in lines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_check import Checker, matching
from grid.core.raft_log import Durable
from grid.core.raft_messages import (
    Appended,
    AppendEntries,
    AppendReply,
    Config,
    Entry,
    HardState,
    InstallSnapshot,
    Kind,
    NodeId,
    RaftMessage,
    Record,
    RequestVote,
    Snapshot,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    config_of,
)
from tests.raft.world import node


def number(id_: NodeId) -> str:
    """n1, or n1.2 for a later incarnation."""
    return id_.peer.decode() + (f".{id_.incarnation}" if id_.incarnation else "")


@dataclass(frozen=True)
class Packet:
    """A message on its way."""

    sender: NodeId
    to: NodeId
    message: RaftMessage


@dataclass
class Box:
    """A member: its process, its disk, what it applied."""

    raft: Raft | None
    disk: Durable = field(default_factory=Durable)
    applied: list[Entry] = field(default_factory=list)
    effects: list[fx.Effect] = field(default_factory=list)


class Cluster:
    """Members by node id. `wire`: messages on their way, oldest first. `lines`: what happened."""

    rules = True
    """Whether the checker looks for breaches of rules as well as for the harm they do."""

    def __init__(self, kind: type[Raft] = Raft, check: bool = True) -> None:
        self.kind = kind
        self.boxes: dict[NodeId, Box] = {}
        self.wire: list[Packet] = []
        self.blocked: set[tuple[NodeId, NodeId]] = set()
        self.now_s = 0.0
        self.lines: list[str] = []
        self.checker = Checker() if check else None

    # ---- members -----------------------------------------------------------------------------------------------------

    def found(self, voters: int, leader: int = 1, learners: int = 0) -> Cluster:
        config = config_of((node(n) for n in range(1, voters + 1)), (node(n) for n in range(voters + 1, voters + learners + 1)))
        for id_ in sorted(config.members, key=lambda id_: id_ == node(leader)):  # the leader last
            raft, effects = self.kind.found(id_, config, node(leader), random.Random(id_.peer), self.now_s)
            self.boxes[id_] = Box(raft)
            self.carry_out(id_, effects)
        return self

    def add(self, id_: NodeId, *records: Record) -> Raft:
        """A member with this journal."""
        box = self.boxes[id_] = Box(None)
        for record in records:
            box.disk.apply(record)
        if self.checker:
            self.checker.torn(id_, records)
        return self.restart(id_)

    def add_log(self, id_: NodeId, config: Config, term: int, terms: Iterable[int], vote: NodeId | None = None) -> Raft:
        """A member in `term` whose log's entries are of these terms: the first one is the founding snapshot's."""
        first, *rest = terms
        entries = tuple(Entry(i, t, Kind.DATA, b"%d/%d" % (i, t)) for i, t in enumerate(rest, 2))
        records: tuple[Record, ...] = (HardState(term, vote), Snapshot(1, first, config))
        return self.add(id_, *records, *((Appended(entries),) if entries else ()))

    def crash(self, id_: NodeId) -> None:
        self.boxes[id_].raft = None

    def restart(self, id_: NodeId) -> Raft:
        box = self.boxes[id_]
        journal = Durable(box.disk.records())
        if self.checker:
            self.checker.started(id_, journal)
        box.raft, effects = self.kind.restart(id_, journal, random.Random(id_.peer), self.now_s)
        box.applied = []
        self.carry_out(id_, effects)
        return box.raft

    def __getitem__(self, n: int) -> Raft:
        raft = self.boxes[node(n)].raft
        assert raft is not None, f"n{n} is down"
        return raft

    def disk(self, n: int) -> Durable:
        return self.boxes[node(n)].disk

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, id_: NodeId, event: fx.Event) -> list[fx.Effect]:
        box = self.boxes[id_]
        assert box.raft is not None
        effects = box.raft.handle(event, self.now_s)
        if self.checker and self.rules:
            self.checker.decided(box.raft, event, effects)
        self.carry_out(id_, effects)
        if self.checker:
            matching(other.raft for other in self.boxes.values() if other.raft is not None)
        return effects

    def carry_out(self, id_: NodeId, effects: list[fx.Effect]) -> None:
        box = self.boxes[id_]
        box.effects = effects
        for effect in effects:
            match effect:
                case fx.Persist():
                    for record in effect.records:
                        box.disk.apply(record)
                case fx.Send():
                    self.wire.append(Packet(id_, effect.to, effect.message))
                case fx.Commit():
                    box.applied += effect.entries
                case _:
                    pass
            if self.checker and box.raft is not None:
                self.checker.did(box.raft, effect)
            if line := said(effect):
                self.lines.append(f"{number(id_)} {line}")

    def tick(self, n: int) -> list[fx.Effect]:
        return self.handle(node(n), fx.Tick())

    def campaign(self, n: int) -> list[fx.Effect]:
        """n's election timeout passes, nobody else notices the time."""
        self.now_s = max(self.now_s, self[n].election_due_s)
        return self.tick(n)

    def advance(self, seconds: float) -> None:
        """Time passes in heartbeats, ticks and messages are delivered."""
        end_s = self.now_s + seconds
        while self.now_s < end_s - 1e-9:
            self.now_s = min(end_s, self.now_s + 0.1)
            for id_ in self.boxes:
                if self.boxes[id_].raft is not None:
                    self.handle(id_, fx.Tick())
            self.stabilize()

    def propose(self, n: int, *payloads: bytes) -> list[fx.Effect]:
        return self.handle(node(n), fx.Propose(payloads))

    def change(self, n: int, voters: Iterable[NodeId], learners: Iterable[NodeId] = ()) -> list[fx.Effect]:
        return self.handle(node(n), fx.Change(config_of(voters, learners)))

    def receive(self, n: int, sender: int, message: RaftMessage) -> list[fx.Effect]:
        """A message made by the test."""
        return self.handle(node(n), fx.Receive(node(sender), node(n), message))

    # ---- the wire ----------------------------------------------------------------------------------------------------

    def deliver(self, wanted: Callable[[Packet], bool] = lambda packet: True, keep: bool = False) -> int:
        """Deliver the messages that are wanted and on the wire now; what they cause stays. Returns how many there were."""
        chosen = [packet for packet in self.wire if wanted(packet)]
        if not keep:
            self.wire = [packet for packet in self.wire if not wanted(packet)]
        for packet in chosen:
            text = f"{number(packet.sender)}->{number(packet.to)} {described(packet.message)}"
            box = self.boxes.get(packet.to)
            if (packet.sender, packet.to) in self.blocked or box is None or box.raft is None:
                self.lines.append(f"lost {text}")
                continue
            self.lines.append(text)
            self.handle(packet.to, fx.Receive(packet.sender, packet.to, packet.message))
        return len(chosen)

    def stabilize(self, *among: int) -> None:
        """Deliver until nothing is on its way (between these members)."""
        ids = {node(n) for n in among} or set(self.boxes)
        for _ in range(1000):
            if not self.deliver(lambda packet: packet.sender in ids and packet.to in ids):
                return
        raise AssertionError("the group never comes to rest")

    def drop(self, wanted: Callable[[Packet], bool] = lambda packet: True) -> None:
        self.wire = [packet for packet in self.wire if not wanted(packet)]

    def isolate(self, *members: int) -> None:
        """Cut these off from all others, not from each other."""
        side = {node(n) for n in members}
        for other in self.boxes:
            for id_ in side:
                if other not in side:
                    self.blocked |= {(id_, other), (other, id_)}

    def elect(self, n: int, *among: int) -> None:
        """n stands and wins, heard by `among` (all) only."""
        self.campaign(n)
        self.stabilize(*among)
        assert self[n].role is Role.LEADER, self[n]

    def terms(self, n: int) -> list[int]:
        """Of n's log from index 1."""
        log = self[n].log
        return [log.term_at(index) or 0 for index in range(1, log.last_index + 1)]


def said(effect: fx.Effect) -> str:
    """What an effect looks like in a transcript; messages are shown when they arrive."""
    match effect:
        case fx.Persist():
            return f"{effect.point}: " + ", ".join(map(recorded, effect.records))
        case fx.Commit():
            return "commits " + " ".join(map(brief, effect.entries))
        case fx.ApplySnapshot():
            return f"applies snapshot {effect.snapshot.index}/{effect.snapshot.term}"
        case fx.BecameLeader():
            return f"becomes leader of term {effect.term}"
        case fx.SteppedDown():
            return f"steps down in term {effect.term}: {effect.why}"
        case fx.LeaderKnown():
            return f"follows {number(effect.leader)} in term {effect.term}"
        case fx.Refused():
            return f"refuses: {effect.why}"
        case fx.TransferAborted():
            return f"goes on leading: {number(effect.target)} did not take over"
        case fx.SnapshotWanted():
            return f"wants a snapshot of {effect.index}"
        case _:
            return ""


def names(ids: Iterable[NodeId]) -> str:
    return ",".join(map(number, ids))


def brief(entry: Entry) -> str:
    """index/term and what it is."""
    match entry.kind:
        case Kind.NOOP:
            what = "noop"
        case Kind.CONFIG:
            what = configured(entry.config)
        case _:
            what = f'"{entry.data.decode()}"'
    return f"{entry.index}/{entry.term} {what}"


def configured(config: Config) -> str:
    return f"({names(config.voters)}{'; ' + names(config.learners) if config.learners else ''})"


def recorded(record: Record) -> str:
    match record:
        case HardState():
            return f"term {record.term}" + (f" vote {number(record.vote)}" if record.vote else "")
        case Appended():
            return " ".join(map(brief, record.entries))
        case Snapshot():
            return f"snapshot {record.index}/{record.term} {configured(record.config)}"


def described(message: RaftMessage) -> str:
    match message:
        case RequestVote():
            name = "PreVote" if message.pre else "RequestVote"
            return f"{name} t{message.term} last {message.last_index}/{message.last_term}" + (" force" if message.force else "")
        case VoteReply():
            return f"{'PreVoteReply' if message.pre else 'VoteReply'} t{message.term} {'yes' if message.granted else 'no'}"
        case AppendEntries():
            entries = "".join(" " + brief(entry) for entry in message.entries)
            head = f"Append t{message.term} after {message.prev_index}/{message.prev_term} commit {message.commit}"
            return head + (":" + entries if entries else "")
        case AppendReply():
            hint = "" if message.ok else f" hint {message.hint_index}/{message.hint_term}"
            return f"AppendReply t{message.term} {'ok' if message.ok else 'no'} {message.index}{hint}"
        case InstallSnapshot():
            last = message.offset + len(message.data)
            head = f"Snapshot t{message.term} {message.index}/{message.last_term} {configured(message.config)}"
            return f"{head} bytes {message.offset}..{last} of {message.total_bytes}"
        case SnapshotReply():
            return f"SnapshotReply t{message.term} {message.index} has {message.offset}"
        case TimeoutNow():
            return f"TimeoutNow t{message.term}"
