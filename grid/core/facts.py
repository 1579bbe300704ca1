"""What a job's replicated log carries: facts about ranges of tasks, the driver's output, the outcome.

One log entry holds a batch of facts in their order (`encode`, `decode`). Rules: a fact is small, speaks of ranges and is true
for ever once it is committed; bytes that are large are named by hash (`Stored`); field order is the wire format, fields are
only added at the end, with a default. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from dht.core import codec
from grid.core.bundle import StageOptions

DIGEST_BYTES: Final = 16
"""Of a segment's BLAKE3: enough to tell segments of one job apart, half the bytes."""


class Stored(msgspec.Struct, array_like=True, frozen=True):
    """Bytes [offset, offset + size) of a blob of `blob_size` bytes. `peers`: who held it when this was said, by id."""

    blob: bytes
    blob_size: int
    offset: int
    size: int
    peers: tuple[bytes, ...] = ()


Where: TypeAlias = bytes | Stored | None
"""Bytes in the log itself, bytes elsewhere, or bytes that nobody keeps."""


class Fact(msgspec.Struct, array_like=True, frozen=True):
    """Base."""


class StageOpened(Fact, tag=1, frozen=True):
    """Stage `stage` exists. `parent`: the task (stage, index) that made it; None: the driver."""

    stage: int
    function: bytes  # BLAKE3
    function_size: int
    name: str
    ordered: bool
    options: StageOptions
    parent: tuple[int, int] | None = None


class SegmentsCut(Fact, tag=2, frozen=True):
    """Tasks from `first` on are declared: (count, size in bytes, digest) a segment; `arguments`: their bytes, joined.

    What was recorded before of segments that these overlap is void, their results too: a replay declared something else.
    """

    stage: int
    first: int
    pieces: tuple[tuple[int, int, bytes], ...]
    arguments: Where = None


class StageClosed(Fact, tag=3, frozen=True):
    """No task follows."""

    stage: int
    total: int


class RangeDone(Fact, tag=4, frozen=True):
    """Tasks [lo, hi) are done on `peer`: values [lo - first, hi - first) of one result segment. Delivered in this order.

    turn: the place of task `lo` in the order of delivery, the others' follow, when this repeats what was recorded elsewhere;
    -1: its turn is now. `first` is negative where a repeated range lies further to the front than it did.
    """

    stage: int
    lo: int
    hi: int
    first: int
    result: Where
    peer: bytes
    elapsed_us: int = 0
    turn: int = -1


class TaskFailed(Fact, tag=5, frozen=True):
    """Task `index` failed for good; its caller gets this."""

    stage: int
    index: int
    kind: str
    type_name: str
    message: str
    traceback: str
    exception: bytes
    peer: bytes = b""
    turn: int = -1


class RangeCancelled(Fact, tag=6, frozen=True):
    """Tasks [lo, hi) are not wanted any more; hi = -1: all, those declared later too."""

    stage: int
    lo: int
    hi: int


class Redo(Fact, tag=7, frozen=True):
    """No copy of these results is left: the tasks run again."""

    stage: int
    lo: int
    hi: int


class Output(Fact, tag=8, frozen=True):
    """The driver wrote `data` to its stdout (1) or stderr (2); it is byte `at` of that stream. Shown once committed."""

    fd: int
    at: int
    data: bytes


class Ended(Fact, tag=9, frozen=True):
    """The outcome (an encoded `grid.core.job.Outcome`): the first one in the log counts. shown: what its leader tells of the
    job (stages, peers) for `grid show`, as JSON.
    """

    outcome: bytes
    shown: bytes = b""


class Told(Fact, tag=10, frozen=True):
    """The user was told, once, what `key` names (that a replay differed, say)."""

    key: str


AnyFact: TypeAlias = (
    StageOpened | SegmentsCut | StageClosed | RangeDone | TaskFailed | RangeCancelled | Redo | Output | Ended | Told
)

_decoder: msgspec.msgpack.Decoder[tuple[AnyFact, ...]] = msgspec.msgpack.Decoder(tuple[AnyFact, ...])


def encode(facts: Sequence[AnyFact]) -> bytes:
    """One entry's payload."""
    return codec.encode(tuple(facts))


def decode(payload: bytes) -> tuple[AnyFact, ...]:
    """Raises codec.CodecError."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise codec.CodecError(f"not a batch of facts: {error}") from None
