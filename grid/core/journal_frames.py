"""Frames of an append-only file: written in batches, read back up to the last batch that is surely whole.

Rules:
- a frame's checksum covers all before it (a chain): a swapped, replayed or missing frame in the middle is seen;
- a batch is one write and one fsync. It counts whole or not at all, and batch n+1 is written only after batch n was synced:
  so a frame of a later batch is proof that an earlier one was acknowledged;
- a reader that meets a bad frame tells a *torn tail* (the last batch, never surely synced: cut it off) from *damage*. A write
  that power loss cut short leaves sectors that hold either what was written or what was there before: zeroes, or the file's
  end. Bytes that are all there and wrong were changed later: damage. In doubt it is damage, as forgetting what was
  acknowledged is the one thing a journal may not do (Alagappan et al., "Protocol-Aware Recovery", FAST 2018);
- batch 0 was synced before the file got its name: a flaw in it is always damage.
What remains: the last batch, bit-flipped, with a payload that holds a whole sector of zeroes, passes for torn when the mark
of synced bytes (`finish`) was lost as well: three things at once. No I/O.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from blake3 import blake3

Buffer: TypeAlias = bytes | bytearray | memoryview

SECTOR_BYTES: Final = 512
"""The least that disks write at once: a sector is old or new, never a mixture (nor does a short write end within one)."""
FRAME_BYTES_MAX: Final = 64 << 20
"""The longest payload: a snapshot of a million tasks is a few MB."""

_FIELDS: Final = struct.Struct(">BBIQ")  # kind, flags, bytes of payload, batch
_CHECK: Final = struct.Struct(">I")
_MAGIC: Final = b"\xd7jfr"
_END: Final = b"\xa5"
_LAST: Final = 1
CHAIN_BYTES: Final = 16
HEAD_BYTES: Final = _FIELDS.size + _CHECK.size + len(_MAGIC)
TAIL_BYTES: Final = CHAIN_BYTES + len(_END)
"""A frame begins (its kind) and ends (head: magic; frame: _END) with bytes of two set bits or more: one flipped bit makes no
zeroes of what a sector holds of it, so never looks like a write cut short."""
OVERHEAD_BYTES: Final = HEAD_BYTES + TAIL_BYTES

_START: Final = blake3(b"grid/journal/1").digest(CHAIN_BYTES)


class Frame(NamedTuple):
    """One record as it is stored. `kind` is an ASCII letter."""

    kind: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Ending:
    """How a file ends. good_bytes: length of the part to be trusted; for "damaged" the rest, and all it implies, is lost."""

    verdict: Literal["clean", "torn", "damaged"]
    good_bytes: int
    why: str = ""


class _Chain:
    """Where a writer or a reader stands: the running checksum, and a salt so that no payload can pass for frames."""

    __slots__ = ("salt", "value")

    def __init__(self) -> None:
        self.value = _START
        self.salt: int | None = None  # the first frame's checksum: known after it

    def check(self, fields: Buffer) -> bytes:
        return _CHECK.pack(zlib.crc32(fields, self.salt or 0))

    def link(self, head: Buffer, payload: Buffer) -> bytes:
        hasher = blake3(self.value)
        hasher.update(head)
        hasher.update(payload)
        return hasher.digest(CHAIN_BYTES)

    def advance(self, value: bytes) -> None:
        self.value = value
        if self.salt is None:
            self.salt = int.from_bytes(value[:4], "big")


class FrameWriter:
    """Encodes a new file's batches in the order in which they are to be written."""

    def __init__(self) -> None:
        self._chain = _Chain()
        self._batch = 0

    def encode(self, frames: Sequence[Frame], *, more: bool = False) -> bytes:
        """Bytes of one batch (not empty), or with `more` of its first part. ValueError if a payload is too long."""
        parts: list[bytes] = []
        for place, frame in enumerate(frames, 1):
            if len(frame.payload) > FRAME_BYTES_MAX:
                raise ValueError(f"a record of {len(frame.payload)} bytes is too long for a journal")
            flags = _LAST if place == len(frames) and not more else 0
            fields = _FIELDS.pack(frame.kind, flags, len(frame.payload), self._batch)
            head = fields + self._chain.check(fields) + _MAGIC
            value = self._chain.link(head, frame.payload)
            self._chain.advance(value)
            parts += head, frame.payload, value, _END
        if not more:
            self._batch += 1
        return b"".join(parts)


class JournalReader:
    """Is fed a file from its start; yields the frames of whole batches; tells at the end what became of the rest."""

    def __init__(self) -> None:
        self._chain = _Chain()
        self._buffer = bytearray()
        self._offset = 0  # of the buffer's first byte in the file
        self._batch = 0  # of the next frame
        self._held: list[Frame] = []  # of a batch not yet whole
        self._good_bytes = 0
        self._fault = ""

    @property
    def good_bytes(self) -> int:
        """Bytes of the whole batches so far."""
        return self._good_bytes

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next bytes; return the frames of the batches that they complete."""
        self._buffer += data
        done: list[Frame] = []
        position = 0
        while not self._fault and (found := self._take(position)) is not None:
            frame, last, position = found
            self._held.append(frame)
            if last:
                done += self._held
                self._held.clear()
                self._batch += 1
                self._good_bytes = self._offset + position
        del self._buffer[:position]
        self._offset += position
        return done

    def finish(self, synced_bytes: int = 0) -> Ending:
        """The file has no more bytes. synced_bytes: how long it surely was once, 0 if that isn't known."""
        good = self._good_bytes
        if good < synced_bytes:
            return Ending("damaged", good, self._fault or "acknowledged records are missing at the end")
        if not self._buffer and not self._held and self._batch:
            return Ending("clean", good)
        if self._batch == 0:
            return Ending("damaged", good, self._fault or "its beginning is incomplete")
        if self._is_followed():
            return Ending("damaged", good, self._fault or "records are missing in the middle")
        if self._buffer and not self._is_cut_short():
            return Ending("damaged", good, self._fault or "the last record is bad")
        return Ending("torn", good, "the last write was cut short")

    def _take(self, start: int) -> tuple[Frame, bool, int] | None:
        """The frame at `start`, whether its batch ends with it, and its end; None if it is incomplete or bad."""
        fields = self._fields_at(start)
        if fields is None:
            if len(self._buffer) >= start + HEAD_BYTES:
                self._fault = "a record's head is bad"
            return None
        kind, flags, length, batch = fields
        if batch != self._batch or length > FRAME_BYTES_MAX:
            self._fault = "records are missing or not in order"
            return None
        body = start + HEAD_BYTES
        end = body + length + TAIL_BYTES
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            value = self._chain.link(view[start:body], view[body : body + length])
            if view[body + length : end] != value + _END:
                self._fault = "a record's checksum is bad"
                return None
            self._chain.advance(value)
            return Frame(kind, bytes(view[body : body + length])), bool(flags & _LAST), end

    def _fields_at(self, start: int) -> tuple[int, int, int, int] | None:
        head = self._buffer[start : start + HEAD_BYTES]
        if len(head) < HEAD_BYTES or not head.endswith(_MAGIC):
            return None
        fields = head[: _FIELDS.size]
        if head[_FIELDS.size : -len(_MAGIC)] != self._chain.check(fields):
            return None
        kind, flags, length, batch = _FIELDS.unpack(fields)
        return kind, flags, length, batch

    def _is_followed(self) -> bool:
        """Does a later batch's frame stand anywhere after the bad one? Then the bad one was synced once."""
        position = self._buffer.find(_MAGIC)
        while position >= 0:
            start = position + len(_MAGIC) - HEAD_BYTES
            if start >= 0 and (fields := self._fields_at(start)) is not None and fields[3] > self._batch:
                return True
            position = self._buffer.find(_MAGIC, position + 1)
        return False

    def _is_cut_short(self) -> bool:
        """Does the bad frame (the buffer's first) look like a write of which only some sectors arrived?"""
        fields = self._fields_at(0)
        if fields is not None and fields[3] != self._batch:
            return False
        span = HEAD_BYTES if fields is None else OVERHEAD_BYTES + fields[2]
        if len(self._buffer.rstrip(b"\0")) < span:
            return True  # it reaches beyond the file's end, or beyond its last byte that is no zero
        start = 0
        while start < span:
            end = start + SECTOR_BYTES - (self._offset + start) % SECTOR_BYTES
            if not any(self._buffer[start:end]):
                return True
            start = end
        return False
