"""Recorded conversations of small groups, in the manner of etcd-io/raft's testdata: readable, and exact.

A transcript holds commands, `----`, and what happened; RAFT_TRANSCRIPTS_UPDATE=1 writes the latter anew: read the diff. The
commands: batch 1 · add-nodes VOTERS [learners=N] · node N term=T log=TERMS members=N · newcomer N[.INCARNATION] ·
campaign N · tick N · sleep SECONDS (nobody notices) · advance SECONDS · propose N TEXT… ·
change N voters=… [learners=…] · transfer N [TO] · compact N · deliver [A->B…] · drop [A->B…] · repeat A->B ·
stabilize [N…] · isolate N… · cut A->B · heal · crash N · restart N · status · log N · wire. A command that ends in `quiet`
shows only who becomes leader, steps down, refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from grid.core import raft_effects as fx
from grid.core.raft_messages import NodeId, config_of
from tests.raft.cluster import Cluster, Packet, brief, configured, described, number
from tests.raft.world import SmallRaft, node

FOLDER = Path(__file__).parent / "transcripts"
LOUD = ("becomes leader", "steps down", "refuses", "goes on leading")


def one(text: str) -> NodeId:
    """1 or 1.2."""
    peer, _, incarnation = text.partition(".")
    return node(int(peer), int(incarnation or 0))


def many(text: str) -> list[NodeId]:
    return [one(part) for part in text.split(",") if part]


def on_links(links: list[str]) -> Callable[[Packet], bool]:
    """Whether a packet is on one of the links named: A->B, A->, ->B, or none for all."""

    def wanted(packet: Packet) -> bool:
        for link in links:
            sender, _, to = link.partition("->")
            if (not sender or packet.sender == one(sender)) and (not to or packet.to == one(to)):
                return True
        return not links

    return wanted


class Play:
    """One transcript's group and its commands."""

    def __init__(self) -> None:
        self.group = Cluster()

    def run(self, line: str) -> list[str]:
        words = line.split()
        quiet = words[-1] == "quiet"
        if quiet:
            words.pop()
        name, *rest = words
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        arguments = [word for word in rest if "=" not in word]
        self.group.lines = []
        shown = getattr(self, name.replace("-", "_"))(arguments, options)
        lines = shown if shown is not None else self.group.lines
        if quiet:
            lines = [text for text in lines if any(loud in text for loud in LOUD)]
        return lines or ["ok"]

    def add_nodes(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.found(int(arguments[0]), learners=int(options.get("learners", 0)))

    def node(self, arguments: list[str], options: dict[str, str]) -> None:
        config = config_of(node(n) for n in range(1, int(options["members"]) + 1))
        self.group.add_log(one(arguments[0]), config, int(options["term"]), map(int, options["log"].split(",")))

    def batch(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.kind = SmallRaft

    def newcomer(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.add(one(arguments[0]))

    def campaign(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.campaign(int(arguments[0]))

    def tick(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.tick(int(arguments[0]))

    def sleep(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.now_s += float(arguments[0])

    def advance(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.advance(float(arguments[0]))

    def propose(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.propose(int(arguments[0]), *(text.encode() for text in arguments[1:]))

    def change(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.change(int(arguments[0]), many(options["voters"]), many(options.get("learners", "")))

    def transfer(self, arguments: list[str], options: dict[str, str]) -> None:
        target = one(arguments[1]) if arguments[1:] else None
        self.group.handle(one(arguments[0]), fx.Transfer(target))

    def compact(self, arguments: list[str], options: dict[str, str]) -> None:
        raft = self.group[int(arguments[0])]
        raft.log.trail_bytes_max = 0
        self.group.handle(raft.node, fx.Compacted(raft.commit, b"state %d" % raft.commit))

    def deliver(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.deliver(on_links(arguments))

    def repeat(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.deliver(on_links(arguments), keep=True)

    def drop(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.drop(on_links(arguments))

    def stabilize(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.stabilize(*map(int, arguments))

    def isolate(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.isolate(*map(int, arguments))

    def cut(self, arguments: list[str], options: dict[str, str]) -> None:
        for link in arguments:
            sender, _, to = link.partition("->")
            self.group.blocked.add((one(sender), one(to)))

    def heal(self, arguments: list[str], options: dict[str, str]) -> None:
        self.group.blocked.clear()

    def crash(self, arguments: list[str], options: dict[str, str]) -> None:
        for name in arguments:
            self.group.crash(one(name))

    def restart(self, arguments: list[str], options: dict[str, str]) -> None:
        for name in arguments:
            self.group.restart(one(name))

    def status(self, arguments: list[str], options: dict[str, str]) -> list[str]:
        lines = []
        for id_, box in self.group.boxes.items():
            raft = box.raft
            if raft is None:
                lines.append(f"{number(id_)} down")
                continue
            leader = number(raft.leader) if raft.leader else "nobody"
            voter = "" if id_ in raft.log.config.voters else " (no voter)"
            lines.append(
                f"{number(id_)} {raft.role.value}{voter} t{raft.term} of {leader}, "
                f"log {raft.log.last_index}/{raft.log.last_term} commit {raft.commit}"
            )
        return lines

    def log(self, arguments: list[str], options: dict[str, str]) -> list[str]:
        log = self.group[int(arguments[0])].log
        lines = [f"snapshot {log.snapshot.index}/{log.snapshot.term} {configured(log.snapshot.config)}"]
        return lines + [brief(entry) for entry in log.slice(log.snapshot.index + 1, log.last_index)]

    def wire(self, arguments: list[str], options: dict[str, str]) -> list[str]:
        return [f"{number(p.sender)}->{number(p.to)} {described(p.message)}" for p in self.group.wire]


def replay(text: str) -> str:
    """The transcript with what happens now."""
    play, out, skipping = Play(), [], False
    for line in text.splitlines():
        if line == "----":
            skipping = True
        elif not line:
            skipping = False
            out.append("")
        elif skipping:
            continue
        elif line.startswith("#"):
            out.append(line)
        else:
            out += [line, "----", *play.run(line)]
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript_is_as_recorded(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    now = replay(text)
    if os.environ.get("RAFT_TRANSCRIPTS_UPDATE"):
        path.write_text(now, encoding="utf-8")
    else:
        assert now == text


def test_there_are_transcripts() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 10
