"""Identities, specs and news for the tests of this folder."""

from __future__ import annotations

from dht.core.identity import Identity
from dht.core.membership import Membership
from grid.core.job import BlobRef, JobSpec, SignedSpec, sign_spec
from grid.core.messages import JobNews

ROOT = Identity(b"r" * 32)
LEADER = Identity(b"l" * 32)
THIEF = Identity(b"t" * 32)
OTHER = Identity(b"o" * 32)
NOW_S = 1_700_000_000.0
MEMBERSHIP = Membership.found(LEADER, ROOT, NOW_S)


def spec(nonce: bytes = b"n", grid: bytes = ROOT.public, submitter: Identity = LEADER) -> JobSpec:
    return JobSpec(
        nonce=nonce,
        grid=grid,
        submitter=submitter.public,
        owner=submitter.id,
        name="job",
        script="job.py",
        argv=("a", "b"),
        code=BlobRef(b"c" * 32, 10),
        python="3.11",
        seed=7,
        created_s=NOW_S,
    )


def signed_spec(nonce: bytes = b"n") -> SignedSpec:
    return sign_spec(spec(nonce), LEADER, MEMBERSHIP.chain)


def news(
    nonce: bytes = b"n", *, epoch: int = 1, version: int = 1, state: str = "running", signed: SignedSpec | None = None
) -> JobNews:
    return JobNews(signed or signed_spec(nonce), epoch, LEADER.id, ("127.0.0.1", 4743), version, state, True)
