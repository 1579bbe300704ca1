"""What a journal says: Raft's log entries, cuts and snapshots; and the hard state (term, vote) in its slots. No I/O."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, TypeAlias, TypeVar

from blake3 import blake3

from dht.core import codec
from grid.core.journal_frames import FRAME_BYTES_MAX, Frame

FORMAT: Final = 1
JOB_BYTES_MAX: Final = 64
VOTE_BYTES_MAX: Final = 64
"""A PeerId has 20 bytes; a slot must hold it in one sector."""

BLOCK_BYTES: Final = 512
"""A slot or mark: one sector, so that it is written whole or not at all."""
BLOCK_STRIDE_BYTES: Final = 4096
"""Between blocks: none shares a page or a large sector with another."""
FIRST_SLOT, SECOND_SLOT, MARK = range(3)
"""Places of the blocks in the state file."""

_ENTRY: Final = struct.Struct(">QQ")
DATA_BYTES_MAX: Final = FRAME_BYTES_MAX - _ENTRY.size
"""Of one entry or snapshot."""
_CUT: Final = struct.Struct(">Q")
_BLOCK: Final = struct.Struct(">4sBH")
_BLOCK_MAGIC: Final = b"\xd7jbk"
_BLOCK_CHECK_BYTES: Final = 16

HEADER_KIND: Final = ord("H")
SNAPSHOT_KIND: Final = ord("S")
ENTRY_KIND: Final = ord("E")
CUT_KIND: Final = ord("T")


class HardState(NamedTuple):
    """What a Raft server may never forget: its term, and whom it voted for in it."""

    term: int = 0
    vote: bytes | None = None


NEVER_VOTED: Final = HardState()


class Entry(codec.Struct, frozen=True):
    """One log entry."""

    index: int
    term: int
    data: bytes


class Cut(codec.Struct, frozen=True):
    """The entry at `index` and all that follow it are gone."""

    index: int


class Snapshot(codec.Struct, frozen=True):
    """The state after the entry at `index`, which had `term`."""

    index: int
    term: int
    data: bytes


class Header(codec.Struct, frozen=True):
    """A log file's first record. generation: of the file, higher with each rewrite. state_seq: the slots' are no older."""

    format: int
    job: bytes
    incarnation: int
    generation: int
    state_seq: int


class Slot(codec.Struct, frozen=True):
    """A copy of the hard state; of two that differ the higher seq is the newer."""

    job: bytes
    incarnation: int
    seq: int
    term: int
    vote: bytes | None


class Mark(codec.Struct, frozen=True):
    """The log file of this generation surely has this many bytes on the disk. A hint: written after, never synced for itself."""

    generation: int
    synced_bytes: int


Record: TypeAlias = Entry | Cut
B = TypeVar("B", Slot, Mark)


def to_frame(record: Entry | Cut | Snapshot | Header) -> Frame:
    match record:
        case Entry(index, term, data):
            return Frame(ENTRY_KIND, _ENTRY.pack(index, term) + data)
        case Cut(index):
            return Frame(CUT_KIND, _CUT.pack(index))
        case Snapshot(index, term, data):
            return Frame(SNAPSHOT_KIND, _ENTRY.pack(index, term) + data)
    return Frame(HEADER_KIND, codec.encode(record))


def from_frame(frame: Frame) -> Entry | Cut | Snapshot | Header:
    """ValueError for what no journal writes."""
    kind, payload = frame
    try:
        if kind in (ENTRY_KIND, SNAPSHOT_KIND):
            index, term = _ENTRY.unpack_from(payload)
            made = Entry if kind == ENTRY_KIND else Snapshot
            return made(index, term, payload[_ENTRY.size :])
        if kind == CUT_KIND:
            return Cut(*_CUT.unpack(payload))
    except struct.error:
        raise ValueError("a record is too short") from None
    if kind == HEADER_KIND:
        return codec.decode(payload, Header)
    raise ValueError(f"a record of unknown kind {kind}")


def to_block(value: Slot | Mark) -> bytes:
    """One sector with its checksum."""
    payload = codec.encode(value)
    kind = FIRST_SLOT if isinstance(value, Slot) else MARK
    body = _BLOCK.pack(_BLOCK_MAGIC, kind, len(payload)) + payload
    body = body.ljust(BLOCK_BYTES - _BLOCK_CHECK_BYTES, b"\0")
    if len(body) + _BLOCK_CHECK_BYTES != BLOCK_BYTES:
        raise ValueError("too long for a sector")
    return body + blake3(body).digest(_BLOCK_CHECK_BYTES)


def from_block(block: bytes, type_: type[B]) -> B | None:
    """What a sector holds; None if any bit of it is wrong."""
    body, check = block[:-_BLOCK_CHECK_BYTES], block[-_BLOCK_CHECK_BYTES:]
    if len(block) != BLOCK_BYTES or blake3(body).digest(_BLOCK_CHECK_BYTES) != check:
        return None
    magic, kind, length = _BLOCK.unpack_from(body)
    if magic != _BLOCK_MAGIC or kind != (FIRST_SLOT if type_ is Slot else MARK):
        return None
    try:
        return codec.decode(body[_BLOCK.size : _BLOCK.size + length], type_)
    except codec.CodecError:
        return None
