"""What leaves a peer for another one, signed: stage declarations, grants of ranges, completions.

Rules:
- a peer runs nothing it can't trace: grant (signed by its giver, a member) → declaration (signed by the epoch's leader) →
  spec (signed by the submitter), the same job and epoch in all three;
- one signature a message, whatever its number of ranges;
- signed bytes are sent as they were signed and decoded after the check, under a domain of their own. No I/O.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from dht.core import codec
from dht.core.identity import Identity, PeerId, peer_id, verify
from grid.core import limits
from grid.core.deque import Work
from grid.core.errors import FencedError, RefusedError

DECLARATION_DOMAIN: Final = "grid/stage/1"
GRANT_DOMAIN: Final = "grid/bundle/1"
COMPLETION_DOMAIN: Final = "grid/completion/1"

T = TypeVar("T")


class Signed(msgspec.Struct, array_like=True, frozen=True):
    """Bytes, who signed them, the signature. Nothing in `payload` may be used before `open_signed`."""

    payload: bytes
    key: bytes
    signature: bytes


def sign(value: Any, domain: str, identity: Identity) -> Signed:
    """Encode canonically and sign."""
    payload = codec.encode(value)
    return Signed(payload, identity.public, identity.sign(domain, payload))


def open_signed(signed: Signed, domain: str, type_: type[T]) -> tuple[PeerId, T]:
    """Return (signer, value). Raises BadSignature, CodecError."""
    verify(signed.key, domain, signed.payload, signed.signature)
    return peer_id(signed.key), codec.decode(signed.payload, type_)


class StageOptions(msgspec.Struct, array_like=True, frozen=True):
    """What a peer must know to run a stage's tasks. 0: no limit."""

    retries: int = 0
    task_timeout_s: float = 0.0
    cpus: int = 1
    memory_bytes: int = 0
    tags: tuple[str, ...] = ()
    pure: bool = True


class Declaration(msgspec.Struct, array_like=True, frozen=True):
    """A stage as its leader declares it, once an epoch. The function is a blob; a short one comes along in the grant."""

    job: bytes
    epoch: int
    stage: int
    function: bytes  # BLAKE3
    function_size: int
    name: str
    options: StageOptions


class SegmentRef(msgspec.Struct, array_like=True, frozen=True):
    """Tasks [first, first + count) of a stage: their pickled arguments, by hash. `refs`: blobs the tasks will read."""

    stage: int
    first: int
    count: int
    blob: bytes
    size: int
    refs: tuple[bytes, ...] = ()


class Grant(msgspec.Struct, array_like=True, frozen=True):
    """Ranges that change hands. The giver goes on claiming them until the thief acknowledges."""

    job: bytes
    epoch: int
    to: bytes
    number: int
    works: tuple[tuple[int, int, int], ...]
    segments: tuple[SegmentRef, ...]
    attempts: tuple[tuple[int, int, int], ...] = ()  # (stage, index, attempt) where not 0
    pace_us: tuple[tuple[int, int], ...] = ()  # (stage, microseconds a task) as the giver measured it


class ResultRange(msgspec.Struct, array_like=True, frozen=True):
    """Tasks [lo, hi) done; their results are values [lo - first, hi - first) of one result segment, inline or a blob."""

    stage: int
    function: bytes
    lo: int
    hi: int
    first: int
    inline: bytes
    blob: bytes  # b"" when inline
    size: int
    elapsed_us: int
    segment: bytes = b""  # `segment_name` of the arguments: a later leader may have declared other ones, or elsewhere


def segment_name(first: int, digest: bytes) -> bytes:
    """What a task was run with: the same bytes at another place are other tasks' arguments. digest: BLAKE3."""
    return first.to_bytes(8, "big") + digest


class TaskFailure(msgspec.Struct, array_like=True, frozen=True):
    """One task that failed where it ran; whether it runs again is its leader's choice."""

    stage: int
    function: bytes
    index: int
    kind: str
    type_name: str
    message: str
    traceback: str
    exception: bytes
    elapsed_us: int
    segment: bytes = b""


class Completion(msgspec.Struct, array_like=True, frozen=True):
    """A batch of what a peer finished, in the order it finished. `number` counts the batches of one `session`: a peer that
    was restarted, or left the job and came back, begins a new one.
    """

    job: bytes
    epoch: int
    number: int
    results: tuple[ResultRange, ...]
    failures: tuple[TaskFailure, ...] = ()
    session: int = 0


def check_declaration(signed: Signed, job: bytes, epoch: int, leader: PeerId) -> Declaration:
    """Raises RefusedError unless the job's leader of this epoch signed it for this job; FencedError on another epoch."""
    signer, declaration = open_signed(signed, DECLARATION_DOMAIN, Declaration)
    if declaration.job != job:
        raise RefusedError("the declaration belongs to another job")
    if declaration.epoch != epoch:
        raise FencedError(f"the declaration is of epoch {declaration.epoch}, not {epoch}")
    if signer != leader:
        raise RefusedError("the declaration is not signed by the job's leader")
    if declaration.function_size > limits.FUNCTION_BYTES_MAX:
        raise RefusedError("the function is over its bound")
    return declaration


def check_grant(signed: Signed, giver: PeerId, to: PeerId, job: bytes, epoch: int) -> tuple[Grant, list[Work]]:
    """Raises RefusedError unless `giver` signed it for `to`, and every range lies in the segments that it names."""
    signer, grant = open_signed(signed, GRANT_DOMAIN, Grant)
    if signer != giver or grant.to != to:
        raise RefusedError("the grant is not from its sender, or not for this peer")
    if grant.job != job:
        raise RefusedError("the grant belongs to another job")
    if grant.epoch != epoch:
        raise FencedError(f"the grant is of epoch {grant.epoch}, not {epoch}")
    covered: dict[int, list[tuple[int, int]]] = {}
    for segment in sorted(grant.segments, key=lambda s: (s.stage, s.first)):
        if segment.count <= 0 or segment.first < 0 or segment.first + segment.count > limits.TASKS_MAX:
            raise RefusedError("a segment without tasks")
        covered.setdefault(segment.stage, []).append((segment.first, segment.first + segment.count))
    works = [Work(*work) for work in grant.works]
    for work in works:
        at = work.lo
        for lo, hi in covered.get(work.stage, ()):
            if lo <= at < hi:
                at = hi
        if not work.lo < work.hi <= at:
            raise RefusedError("the grant names tasks without their arguments")
    return grant, works
