"""Who may lead a job, for those who hold no replica of it: branches, and the endorsements of a leader by its replicas.

A *branch* is one history of a job's log. The root branch has no name; another is opened by survivors that lost their
majority, is named by the hash of what it is based on, and knows its ancestors (DESIGN, section 6). Epochs compare only within
a branch. A *mandate* is the signatures of a majority of a branch's voters for one leader in one epoch. Rules: no I/O; what is
checked here is signatures and counts, never a claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from blake3 import blake3

from dht.core import codec
from dht.core.identity import Identity, PeerId, peer_id, verify
from grid.core.errors import RefusedError

ENDORSEMENT_DOMAIN: Final = "grid/epoch/1"
VOTERS_MAX: Final = 32
"""Of one group, as in the consensus core."""
DEPTH_MAX: Final = 16
"""Branches of branches: each costs a majority lost at once."""


class Branch(msgspec.Struct, array_like=True, frozen=True):
    """name b"": the root. base_epoch, base_version: the newest news of the parent that was known when it was opened. bases: of
    the parent's ancestors, root first, when the branches after them were opened."""

    name: bytes = b""
    ancestors: tuple[bytes, ...] = ()  # the root's b"" first
    base_epoch: int = 0
    base_version: int = 0
    bases: tuple[tuple[int, int], ...] = ()

    def base(self, ancestor: bytes) -> tuple[int, int]:
        """(epoch, version) of this ancestor that the history after it began with. Raises ValueError: it is none."""
        bases = (*self.bases, (self.base_epoch, self.base_version))
        at = self.ancestors.index(ancestor)
        return bases[at] if len(bases) == len(self.ancestors) else bases[-1]  # who sent it may have left some out

    def child(self, last_term: int, last_index: int, state: bytes, opener: bytes, epoch: int, version: int) -> Branch:
        """The branch that `opener` opens from this one at that entry with that state. Raises RefusedError when too deep."""
        if len(self.ancestors) >= DEPTH_MAX:
            raise RefusedError("the job lost its majority too often")
        name = blake3(codec.encode((self.name, last_term, last_index, blake3(state).digest(), opener))).digest(20)
        bases = (*self.bases, (self.base_epoch, self.base_version)) if self.ancestors else ()
        return Branch(name, (*self.ancestors, self.name), epoch, version, bases)


class Endorsement(msgspec.Struct, array_like=True, frozen=True):
    """One voter's signature over (job, branch, epoch, leader)."""

    key: bytes
    signature: bytes


class Mandate(msgspec.Struct, array_like=True, frozen=True):
    """A branch's voters, and those who endorsed the leader. Empty: epoch 1 of the root, whose leader the spec names."""

    voters: tuple[bytes, ...] = ()
    endorsements: tuple[Endorsement, ...] = ()


def _statement(job: bytes, branch: bytes, epoch: int, leader: bytes) -> bytes:
    return codec.encode((job, branch, epoch, leader))


def endorse(job: bytes, branch: bytes, epoch: int, leader: PeerId, voter: Identity) -> Endorsement:
    """A voter's word for the leader it follows in this epoch."""
    return Endorsement(voter.public, voter.sign(ENDORSEMENT_DOMAIN, _statement(job, branch, epoch, leader)))


def check_endorsement(endorsement: Endorsement, job: bytes, branch: bytes, epoch: int, leader: PeerId) -> PeerId:
    """Whose word for the leader it is. Raises BadSignature."""
    verify(endorsement.key, ENDORSEMENT_DOMAIN, _statement(job, branch, epoch, leader), endorsement.signature)
    return peer_id(endorsement.key)


def check_mandate(
    mandate: Mandate, job: bytes, branch: bytes, epoch: int, leader: PeerId, known: Iterable[bytes]
) -> None:
    """Raises RefusedError, BadSignature unless a majority of the voters endorsed the leader, one that is `known` among them.

    known: peers that the spec, or an earlier mandate that was accepted, names as the job's replicas.
    """
    voters = set(mandate.voters)
    if not voters or len(mandate.voters) > VOTERS_MAX or len(mandate.endorsements) > VOTERS_MAX:
        raise RefusedError("a mandate without voters, or with too many")
    if leader not in voters:
        raise RefusedError("the leader is no voter of its own mandate")
    known = frozenset(known)
    endorsed: set[bytes] = set()
    for endorsement in mandate.endorsements:
        voter = peer_id(endorsement.key)
        if voter not in voters or voter in endorsed:
            raise RefusedError("an endorsement by nobody, or twice by one")
        verify(endorsement.key, ENDORSEMENT_DOMAIN, _statement(job, branch, epoch, leader), endorsement.signature)
        endorsed.add(voter)
    if 2 * len(endorsed) <= len(voters):
        raise RefusedError(f"{len(endorsed)} of {len(voters)} voters endorse the leader: that is no majority")
    if endorsed.isdisjoint(known):
        raise RefusedError("nobody who is known to hold the job endorses the leader")
