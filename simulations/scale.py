"""How load grows with the number of peers: one job on 100 and on 1,000 machines under office churn, the same work for each.

What an ordinary peer sends, receives and remembers may grow no faster than log n; the load of the leader, and of the few
that hold a replica of its log, may follow completions, but not the number of peers. Rules: the worlds are like all others
(checked, replayable); figures are of the time from the job's submit to its end, and a request counts as two messages, its answer
being one; rates are of the time that a peer was up, connections and entries means over that time; whoever led or held a replica
at any sample is no ordinary peer.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import msgspec
import trio

from grid.peer import Peer
from simulations import scenario, world

SAMPLE_S = 0.5
BUSY_SHARE = 0.9
UP_SHARE_MIN = 0.25
"""Of the job's time: a machine that was up for less is not among those of which the most loaded is looked for."""


@dataclass
class Figures:
    """Of one world. Rates are messages a second; connections and entries a mean over the job's time."""

    peers: int
    report: world.Report
    sent: float = 0.0
    received: float = 0.0
    received_most: float = 0.0
    connections: float = 0.0
    connections_most: float = 0.0
    dials: float = 0.0
    remembered: float = 0.0
    replica_sent: float = 0.0
    replica_received: float = 0.0
    leader_sent: float = 0.0
    leader_received: float = 0.0
    completions: float = 0.0
    busy_s: float = math.nan
    job_s: float = 0.0


@dataclass
class Seen:
    """One machine, sampled."""

    samples: int = 0
    connections: int = 0
    remembered: int = 0
    dials: int = 0
    role: int = 0  # 1: held a replica, 2: led

    def look(self, peer: Peer) -> None:
        """Once a SAMPLE_S, while the job goes on."""
        self.samples += 1
        self.connections += len(peer.mesh.connected())
        self.remembered += len(peer.mesh._book) + len(peer.mesh._remotes) + len(peer.board)
        leads = any(lead.view.outcome is None for lead in peer.jobs.led.values())
        self.role = max(self.role, 2 if leads else 1 if peer.replicas.all() else 0)


class ScaleWorld(world.World):
    """Measures while it runs."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.busy_s = math.nan
        self.seen: dict[str, Seen] = {}
        self._dials: dict[str, tuple[Peer, int]] = {}

    async def _begin(self) -> None:
        await super()._begin()
        self.nursery.start_soon(self._sample)

    async def _sample(self) -> None:
        while True:
            await trio.sleep(SAMPLE_S)
            up = {host.name: host.peer for host in self.hosts if host.ready.is_set() and host.up and host.peer is not None}
            if not self.jobs:
                self.meter.reset()
                self._dials = {name: (peer, peer.mesh.counters["dials"]) for name, peer in up.items()}
                continue
            if self.jobs[0].final_s:
                continue
            for name, peer in up.items():
                seen = self.seen.setdefault(name, Seen())
                seen.look(peer)
                before = self._dials.get(name)
                dials = peer.mesh.counters["dials"]
                seen.dials += dials - (before[1] if before is not None and before[0] is peer else 0)
                self._dials[name] = peer, dials
            busy = sum(1 for peer in up.values() if peer.services.workshop.busy)
            if math.isnan(self.busy_s) and busy >= BUSY_SHARE * len(up):
                self.busy_s = trio.current_time() - self.jobs[0].submitted_s


def measure(peers: int, tasks: int, seed: int) -> Figures:
    """Run one world."""
    of = scenario.load("scale")
    of = msgspec.structs.replace(of, peers=peers, job=(msgspec.structs.replace(of.job[0], tasks=tasks),))
    made: list[ScaleWorld] = []

    def make(*arguments: object) -> world.World:
        made.append(ScaleWorld(*arguments))
        return made[0]

    report = world.run(of, seed, make=make)
    this = made[0]
    figures = Figures(peers, report)
    if not this.jobs or not this.jobs[0].final_s:
        return figures
    job = this.jobs[0]
    figures.job_s = job.final_s - job.submitted_s
    figures.completions = this.meter.kinds["Completed"] / figures.job_s
    figures.busy_s = this.busy_s
    _rates(figures, this)
    return figures


def _rates(figures: Figures, this: ScaleWorld) -> None:
    sent, received = this.meter.sent, this.meter.received
    groups: tuple[list[str], ...] = ([], [], [])
    for name, seen in this.seen.items():
        groups[seen.role].append(name)
    ordinary, replicas, leaders = groups

    def samples(names: list[str]) -> int:
        return sum(this.seen[name].samples for name in names)

    def rate(counter: Counter[str], names: list[str]) -> float:
        return sum(counter[name] for name in names) / (samples(names) * SAMPLE_S) if samples(names) else math.nan

    def mean(what: str) -> float:
        return sum(int(getattr(this.seen[name], what)) for name in ordinary) / max(1, samples(ordinary))

    long = [name for name in ordinary if this.seen[name].samples * SAMPLE_S >= UP_SHARE_MIN * figures.job_s]
    figures.sent, figures.received = rate(sent, ordinary), rate(received, ordinary)
    figures.received_most = max((rate(received, [name]) for name in long), default=math.nan)
    figures.connections, figures.remembered, figures.dials = mean("connections"), mean("remembered"), mean("dials") / SAMPLE_S
    figures.connections_most = max((this.seen[name].connections / this.seen[name].samples for name in long), default=math.nan)
    figures.replica_sent, figures.replica_received = rate(sent, replicas), rate(received, replicas)
    leader = max(leaders, key=lambda name: received[name], default="")
    if leader:
        figures.leader_sent, figures.leader_received = rate(sent, [leader]), rate(received, [leader])


def compare(seed: int, sizes: tuple[int, int] = (100, 1000)) -> list[Figures]:
    """The scale run: a tenth of the machines with a tenth of the work, and all."""
    tasks = scenario.load("scale").job[0].tasks
    return [measure(size, tasks * size // sizes[-1], seed) for size in sizes]


def table(found: list[Figures]) -> str:
    """For people, with each figure's growth; log n grows by log(n2)/log(n1)."""
    small, large = found[0], found[-1]
    allowed = math.log(large.peers) / math.log(small.peers)
    lines = [f"{'':34}" + "".join(f"{figures.peers:>12}" for figures in found) + f"{'growth':>10}"]
    rows = {
        "job, s": "job_s",
        "submit to 90 % of peers busy, s": "busy_s",
        "a peer sends, messages/s": "sent",
        "a peer receives, messages/s": "received",
        "the busiest peer receives": "received_most",
        "a peer's connections": "connections",
        "the most connections": "connections_most",
        "a peer dials, a second": "dials",
        "entries a peer remembers": "remembered",
        "a replica sends, messages/s": "replica_sent",
        "a replica receives, messages/s": "replica_received",
        "the leader sends, messages/s": "leader_sent",
        "the leader receives, messages/s": "leader_received",
        "completion messages/s": "completions",
    }
    for text, name in rows.items():
        values = [float(getattr(figures, name)) for figures in found]
        growth = values[-1] / values[0] if values[0] else math.nan
        lines.append(f"{text:34}" + "".join(f"{value:12.2f}" for value in values) + f"{growth:10.2f}")
    lines.append(f"log n grows by {allowed:.2f}")
    return "\n".join(lines)
