"""Recorded calls by content: which of them are equal to one that a replay makes.

Rules: a call is known by the keys of its item (grid/core/items.py); equal calls are handed out lowest turn first, each once.
Arguments that lie in blobs have to be supplied; those of a segment of one item are not needed, its digest is the key. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from grid.core.facts import Stored
from grid.core.items import Keys, NotItemsError, digest, split
from grid.core.records import Piece

KEYS_KEPT_MAX: Final = 1 << 16
"""Items of segments split last, whose keys are remembered: a few MB. Segments of a stage come about in order."""


class Arguments:
    """The arguments at hand."""

    def __init__(self) -> None:
        self._given: dict[bytes, list[tuple[int, int, bytes | None]]] = {}
        self._split: dict[bytes, list[Keys] | None] = {}
        self._kept = 0

    def supply(self, stored: Stored, data: bytes | None) -> None:
        """These are the bytes; None: they can't be had."""
        given = data if data is not None and len(data) == stored.size else None
        self._given.setdefault(stored.blob, []).append((stored.offset, stored.offset + stored.size, given))
        self._split.clear()

    def is_settled(self, stored: Stored) -> bool:
        """Whether these bytes were supplied, or can't be."""
        return any(lo <= stored.offset and stored.offset + stored.size <= hi for lo, hi, _ in self._given.get(stored.blob, ()))

    def keys(self, piece: Piece) -> list[Keys] | None:
        """Of each item of a recorded segment; None: its bytes are not at hand, or are no calls."""
        if piece.count == 1:
            return [(piece.digest,)]
        if piece.digest not in self._split:
            data = self._bytes(piece)
            keys = None
            if data is not None and digest(data) == piece.digest:
                keys = _split_into(piece.count, data)
            if self._kept > KEYS_KEPT_MAX:
                self._split.clear()
                self._kept = 0
            self._split[piece.digest] = keys
            self._kept += len(keys or ())
        return self._split[piece.digest]

    def keys_of(self, count: int, name: bytes, data: bytes | None) -> list[Keys] | None:
        """Of each item of a segment that is declared now."""
        if count == 1:
            return [(name,)]
        return None if data is None else _split_into(count, data)

    def _bytes(self, piece: Piece) -> bytes | None:
        where = piece.arguments
        if not isinstance(where, Stored):
            return where
        for lo, hi, data in self._given.get(where.blob, ()):
            if data is not None and lo <= where.offset and where.offset + where.size <= hi:
                return data[where.offset - lo : where.offset - lo + where.size]
        return None


def _split_into(count: int, data: bytes) -> list[Keys] | None:
    try:
        keys = split(data)
    except NotItemsError:
        return None
    return keys if len(keys) == count else None


class Call(NamedTuple):
    """A recorded task. turn: -1, it has none."""

    turn: int
    stage: int
    task: int


class Pool:
    """Recorded calls of one function, and parent."""

    def __init__(self, calls: Iterable[tuple[Keys, Call]]) -> None:
        self._calls: dict[bytes, list[Call]] = {}
        for keys, call in sorted(calls, key=lambda one: one[1], reverse=True):
            for key in keys:
                self._calls.setdefault(key, []).append(call)

    def take(self, keys: Keys, is_used: Callable[[Call], bool]) -> Call | None:
        """An equal call that was not used yet."""
        for key in keys:
            calls = self._calls.get(key)
            while calls:
                call = calls.pop()
                if not is_used(call):
                    return call
        return None
