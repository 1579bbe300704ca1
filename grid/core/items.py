"""The items of a segment of submitted calls, told apart by their bytes: by its header alone, nothing is unpickled.

An item's *key* is what the digest of a segment with this item alone would be, so that calls match whatever company they
were sent in. Two things of a segment are said for all its items together, and are an item's own only when it is alone: that
blobs are read by some (an item then has two keys, with and without), and the classes that some use (they count for items that
name one). Layout: grid/api/serialize.py. No I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, TypeAlias

from blake3 import blake3

from grid.api.serialize import ALIGNMENT, BUFFER, CALL, CHUNK, HAS_REFS, HEAD, MAGIC
from grid.core.facts import DIGEST_BYTES

Keys: TypeAlias = tuple[bytes, ...]
"""Of one item: equal items share at least one."""
_CLASS_AT: Final = b"_class_at"
"""In the pickle of whatever names a class of its segment's table (grid/api/cloud.py)."""


class NotItemsError(ValueError):
    """The bytes are no segment, or one whose items only unpickling tells apart."""


def kind_of(data: bytes) -> int:
    """ONE, MANY or CALL (grid/api/serialize.py); -1: these bytes are no segment."""
    return data[len(MAGIC)] if len(data) >= HEAD.size and data.startswith(MAGIC) else -1


def digest(data: bytes) -> bytes:
    """A segment's name in the log."""
    return blake3(data).digest(DIGEST_BYTES)


def split(data: bytes) -> list[Keys]:
    """The keys of each item of a segment of calls. Raises NotItemsError."""
    if kind_of(data) != CALL:
        raise NotItemsError("no segment of calls")
    try:
        return list(_split(memoryview(data)))
    except struct.error as error:
        raise NotItemsError("a segment cut short") from error


def _split(view: memoryview) -> Iterator[Keys]:
    _, _, flags, chunks, buffers, classes_length = HEAD.unpack_from(view)
    tables = HEAD.size + CHUNK.size * chunks
    start = tables + BUFFER.size * buffers
    at = start + classes_length
    if at > len(view):
        raise NotItemsError("a segment cut short")
    classes = bytes(view[start:at])
    areas: list[memoryview] = []
    for offset, length in BUFFER.iter_unpack(view[tables:start]):
        if offset + length > len(view):
            raise NotItemsError("a buffer outside of its segment")
        areas.append(view[offset : offset + length])
    area = 0
    for length, count, own in CHUNK.iter_unpack(view[HEAD.size : tables]):
        if count or at + length > len(view) or area + own > len(areas):
            raise NotItemsError("items in one pickle, or cut short")
        item = bytes(view[at : at + length])
        yield _keys(item, areas[area : area + own], flags, classes)
        at += length
        area += own
    if area != len(areas):
        raise NotItemsError("buffers of no item")


def _keys(item: bytes, areas: list[memoryview], flags: int, classes: bytes) -> Keys:
    table = classes if _CLASS_AT in item else b""
    if flags & HAS_REFS:
        return _digest_alone(item, areas, 0, table), _digest_alone(item, areas, HAS_REFS, table)
    return (_digest_alone(item, areas, 0, table),)


def _digest_alone(item: bytes, areas: list[memoryview], flags: int, classes: bytes) -> bytes:
    """As `SegmentWriter.finish` would write it."""
    end = HEAD.size + CHUNK.size + BUFFER.size * len(areas) + len(classes) + len(item)
    head = HEAD.pack(MAGIC, CALL, flags, 1, len(areas), len(classes)) + CHUNK.pack(len(item), 0, len(areas))
    if not areas:
        return digest(b"".join((head, classes, item, bytes(-end % ALIGNMENT))))
    table: list[bytes] = []
    tail: list[bytes | memoryview] = []
    for view in areas:
        padding = -end % ALIGNMENT
        table.append(BUFFER.pack(end + padding, view.nbytes))
        tail += (bytes(padding), view)
        end += padding + view.nbytes
    hasher = blake3(b"".join((head, *table, classes, item)))
    for part in tail:
        hasher.update(part)
    hasher.update(bytes(-end % ALIGNMENT))
    return hasher.digest(DIGEST_BYTES)
