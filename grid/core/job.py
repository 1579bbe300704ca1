"""What a job is: its signed specification, its name, the states it can be in, its outcome.

Rules: a JobId is the BLAKE3 hash of the signed payload, so a resent spec is the same job and two submits are two (nonce).
The submitter signs; whoever reads a spec checks it with `open_spec` before it believes a word. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NewType

import msgspec
from blake3 import blake3

from dht.core import codec
from dht.core.identity import Identity, PeerId, peer_id, verify
from dht.core.membership import Certificate, Chain
from grid.core.errors import IllegalTransitionError, RefusedError

JobId = NewType("JobId", bytes)
BlobId = bytes

SPEC_DOMAIN: Final = "grid/job/1"

PENDING: Final = "pending"
RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
FINAL: Final = frozenset({FINISHED, FAILED, CANCELLED})

TRANSITIONS: Final[dict[str, frozenset[str]]] = {
    PENDING: frozenset({RUNNING, FAILED, CANCELLED}),
    RUNNING: frozenset({FINISHED, FAILED, CANCELLED}),
    FINISHED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}
"""The whole table; anything else raises."""


def transition(state: str, to: str) -> str:
    """Return `to` if the table allows it; raise IllegalTransitionError otherwise."""
    if to not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"a job that is {state} can't become {to}")
    return to


class BlobRef(msgspec.Struct, array_like=True, frozen=True):
    """A blob and its size in bytes."""

    id: bytes
    size: int


class JobOptions(msgspec.Struct, array_like=True, frozen=True):
    """Options of a whole job; a stage's own beat them. 0 and () mean: no limit, none."""

    retries: int = 0
    task_timeout_s: float = 0.0
    timeout_s: float = 0.0
    cpus: int = 1
    memory_bytes: int = 0
    tags: tuple[str, ...] = ()
    replicas: int = 5
    strict: bool = False
    verify: str = ""
    network: bool = False


class JobSpec(msgspec.Struct, array_like=True, frozen=True):
    """All that a peer must know to run a job. `code` is an archive with the script and its local modules."""

    nonce: bytes
    grid: bytes
    submitter: bytes  # ed25519 public key
    owner: bytes
    name: str
    script: str  # path inside the archive
    argv: tuple[str, ...]
    code: BlobRef
    python: str  # "3.11"
    seed: int
    created_s: float
    options: JobOptions = JobOptions()
    lock: BlobRef | None = None
    inputs: BlobRef | None = None
    stdin: BlobRef | None = None
    env: tuple[tuple[str, str], ...] = ()
    replicas: tuple[bytes, ...] = ()
    owner_name: str = ""


class SignedSpec(msgspec.Struct, array_like=True, frozen=True):
    """The spec as its submitter signed it, with the chain that makes the submitter a member."""

    payload: bytes
    signature: bytes
    chain: Chain


def job_id(payload: bytes) -> JobId:
    """BLAKE3 of the signed bytes."""
    return JobId(blake3(payload).digest())


def sign_spec(spec: JobSpec, identity: Identity, chain: Chain) -> SignedSpec:
    """The submitter's signature over the canonical bytes."""
    assert spec.submitter == identity.public
    payload = codec.encode(spec)
    return SignedSpec(payload, identity.sign(SPEC_DOMAIN, payload), chain)


def open_spec(signed: SignedSpec, check: Callable[[Chain], Certificate], grid: bytes) -> tuple[JobId, JobSpec]:
    """Verify and decode. `check` raises when the chain is no member's. Raises RefusedError, BadSignature, MembershipError."""
    spec = codec.decode(signed.payload, JobSpec)
    if spec.grid != grid:
        raise RefusedError("the job belongs to another grid")
    certificate = check(signed.chain)
    if certificate.key != spec.submitter:
        raise RefusedError("the job is not signed by its submitter")
    if certificate.owner != spec.owner:
        raise RefusedError("the job names an owner its submitter does not belong to")
    if not certificate.roles & 1:
        raise RefusedError("its submitter may not submit")
    verify(spec.submitter, SPEC_DOMAIN, signed.payload, signed.signature)
    return job_id(signed.payload), spec


def first_leader(spec: JobSpec) -> PeerId:
    """The submitter's peer leads epoch 1."""
    return peer_id(spec.submitter)


class OutputFile(msgspec.Struct, array_like=True, frozen=True):
    """A file that the driver left: name relative to its working folder."""

    name: str
    blob: BlobRef
    mode: int = 0o644


class Outcome(msgspec.Struct, array_like=True, frozen=True):
    """How a job ended; write-once. exit_code is the driver's (128+n for a signal) or None where it never ended by itself."""

    state: str
    exit_code: int | None
    error: str = ""
    ended_s: float = 0.0
    files: tuple[OutputFile, ...] = ()
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    recovered: bool = False
    signal: int = 0  # that ended the driver
    code: str = ""  # of the error, for programs
