"""What the consensus core's tests are made of: members, their disks, what may go wrong with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from grid.core import raft_effects as fx
from grid.core.raft import Raft
from grid.core.raft_log import Durable
from grid.core.raft_messages import NodeId


def node(number: int, incarnation: int = 0) -> NodeId:
    """n1, n2, …"""
    return NodeId(b"n%d" % number, incarnation)


@dataclass
class Chaos:
    """Probabilities a step, and of a message."""

    loss: float = 0.03
    duplicate: float = 0.03
    late: float = 0.05  # a delay of up to 2 s: overtaken by hundreds
    propose: float = 0.15
    crash: float = 0.008
    crash_at_point: float = 0.02
    restart: float = 0.03
    bounce: float = 0.01  # a process that is there again at once
    cut: float = 0.012
    heal: float = 0.02
    transfer: float = 0.006
    change: float = 0.02
    wipe: float = 0.003
    compact: float = 0.01
    stall: float = 0.003
    grouped: float = 0.0
    on_wire: bool = False


ACTIONS = (
    "propose", "crash", "crash_at_point", "restart", "bounce", "cut", "heal", "transfer", "change", "wipe", "compact", "stall"
)
HOWS = ("before", "after", "torn")
CALM = Chaos(**dict.fromkeys(("loss", "duplicate", "late", *ACTIONS), 0.0))  # type: ignore[arg-type]


@dataclass
class Member:
    """One incarnation. raft is None while it is down."""

    id: NodeId
    disk: Durable = field(default_factory=Durable)
    raft: Raft | None = None
    wake_s: float = math.inf
    held: list[fx.Effect] = field(default_factory=list)
    applied: list[int] = field(default_factory=list)
    stalled_until_s: float = 0.0


class SmallRaft(Raft):
    """Batches of one or two, snapshots of several chunks: so that what a message holds doesn't hide an order."""

    append_entries_max = 1
    snapshot_chunk_bytes = 3

    def _start(self) -> None:
        self.log.trail_bytes_max = 0
        super()._start()


class CrashedError(Exception):
    """The member died while it carried out effects."""
