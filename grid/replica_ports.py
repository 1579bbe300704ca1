"""What replicas need of the peer they belong to, and what they tell it.

Rules: hooks are called in the order in which things happened, never wait and never raise; after `gone` none follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import trio

from dht.core.identity import PeerId
from dht.network import Address
from grid.core.facts import AnyFact
from grid.core.job import JobId
from grid.core.recovery import Standing
from grid.transport.hello import Hello

if TYPE_CHECKING:
    from grid.replica import Replica


class Links(Protocol):
    """Of the mesh: see `grid.transport.mesh.Mesh`."""

    def connected(self) -> list[PeerId]: ...

    def hello(self, peer: PeerId) -> Hello | None: ...

    def post(self, peer: PeerId, message: bytes) -> bool: ...

    async def request(self, peer: PeerId, message: bytes, timeout_s: float) -> bytes: ...

    def keep(self, peer: PeerId, addresses: Sequence[Address] = ()) -> None: ...

    def unkeep(self, peer: PeerId) -> None: ...


class Hooks(Protocol):
    """What the peer is told of its replicas."""

    def enlisted(self, replica: Replica) -> None:
        """A replica is here: this peer founded it, was asked to hold it, or found it on its disk."""

    def applied(self, replica: Replica, fact: AnyFact) -> None:
        """A fact is final; told again after a restart, from the last snapshot on."""

    def restored(self, replica: Replica) -> None:
        """The chronicle is another object now, made from a snapshot."""

    def compacting(self, replica: Replica) -> None:
        """A snapshot is about to replace facts that were applied. May block for the disk."""

    def took_over(self, replica: Replica, term: int) -> None:
        """`leads()` holds and `mandate` is there."""

    def stepped_down(self, replica: Replica, why: str) -> None:
        """After took_over: it does not lead any more."""

    def changed(self, replica: Replica) -> None:
        """Voters or mandate of a leader changed: worth telling the neighbours."""

    def gone(self, replica: Replica) -> None:
        """The replica is destroyed; `replica.fate` says why."""


class Knowledge(Protocol):
    """What the peer has heard of jobs from others."""

    def standing(self, job: JobId) -> tuple[Standing, PeerId, float] | None:
        """The best news of a job, its leader, and the age of that news in seconds."""

    def is_final(self, job: JobId) -> bool:
        """Whether the job's outcome is kept here: that somebody said it was over is not enough, who said so may be gone."""

    async def learn_outcome(self, replica: Replica, peers: Sequence[PeerId]) -> bool:
        """Have the outcome here from a peer that keeps it; False: none of these gave it."""


class NoKnowledge:
    """Of a peer that hears nothing."""

    def standing(self, job: JobId) -> tuple[Standing, PeerId, float] | None:
        return None

    def is_final(self, job: JobId) -> bool:
        return False

    async def learn_outcome(self, replica: Replica, peers: Sequence[PeerId]) -> bool:
        await trio.lowlevel.checkpoint()
        return False
