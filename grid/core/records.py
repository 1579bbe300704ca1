"""What a job's log says of one stage: its segments, its results, what failed, what is not wanted.

Rules: kept by ranges, in tables of integers; blobs and peers are named once a job (`Names`). What a later declaration voids is
void for everyone; only a replay may still take results from it (`left_segments`, `left_results`), until the tasks' places are
declared anew. No I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from grid.core.bundle import StageOptions
from grid.core.facts import DIGEST_BYTES, Stored, TaskFailed, Where
from grid.core.ranges import RangeSet
from grid.core.rangetable import RangeTable, Row

NO_TURN: Final = -(1 << 62)
"""In place of a bias: these tasks have no place in the order of delivery."""
NOWHERE: Final = -1
"""In place of a blob: the bytes are the row's object, or nobody keeps them."""
NUMBER_MAX: Final = 1 << 62
"""What a column holds, with room to add and subtract."""


_HALVES: Final = struct.Struct(">qq")
assert _HALVES.size == DIGEST_BYTES


class Done(NamedTuple):
    """Tasks [lo, hi) are done. turn: the place of `lo` in the order of delivery; -1: it has none."""

    lo: int
    hi: int
    first: int
    result: Where
    peer: bytes
    elapsed_us: int
    turn: int


class Piece(msgspec.Struct, frozen=True, gc=False):
    """The segment of tasks [first, first + count), of which [lo, hi) still stand. `size` is the whole segment's."""

    lo: int
    hi: int
    first: int
    count: int
    size: int
    digest: bytes
    arguments: Where


class Names:
    """Blobs (with their size, and who held them) and peers by number. Only ever grows: copies of a record may share it."""

    __slots__ = ("_blob_numbers", "_peer_numbers", "blobs", "peers")

    def __init__(self) -> None:
        self.blobs: list[tuple[bytes, int, tuple[bytes, ...]]] = []
        self.peers: list[bytes] = []
        self._blob_numbers: dict[tuple[bytes, int, tuple[bytes, ...]], int] = {}
        self._peer_numbers: dict[bytes, int] = {}

    def blob(self, stored: Stored) -> int:
        key = (stored.blob, stored.blob_size, stored.peers)
        number = self._blob_numbers.get(key)
        if number is None:
            number = self._blob_numbers[key] = len(self.blobs)
            self.blobs.append(key)
        return number

    def peer(self, peer: bytes) -> int:
        number = self._peer_numbers.get(peer)
        if number is None:
            number = self._peer_numbers[peer] = len(self.peers)
            self.peers.append(peer)
        return number

    def index(self) -> None:
        """The lists were filled: number what is in them."""
        self._blob_numbers = {key: number for number, key in enumerate(self.blobs)}
        self._peer_numbers = {key: number for number, key in enumerate(self.peers)}

    def where(self, blob: int, offset: int, size: int, thing: bytes | None) -> Where:
        """What `place` was given."""
        if blob == NOWHERE:
            return thing
        name, blob_size, peers = self.blobs[blob]
        return Stored(name, blob_size, offset, size, peers)

    def place(self, where: Where) -> tuple[int, int, int, bytes | None]:
        """(blob, offset, size, object) of a row."""
        if isinstance(where, Stored):
            return self.blob(where), where.offset, where.size, None
        return NOWHERE, 0, 0, where


class Results(RangeTable):
    """Columns: first, blob, offset, size, peer, elapsed_us, turn - lo (so that it holds for each part)."""

    __slots__ = ("names",)

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names

    def record(self, lo: int, hi: int, first: int, result: Where, peer: bytes, elapsed_us: int, turn: int) -> None:
        """Add what overlaps nothing here; see `Done`."""
        names = self.names
        blob, offset, size, thing = names.place(result)
        self.put(lo, hi, (first, blob, offset, size, names.peer(peer), elapsed_us, NO_TURN if turn < 0 else turn - lo), thing)

    def read(self, row: Row) -> Done:
        """A row of this table."""
        first, blob, offset, size, peer, elapsed_us, bias = row.columns
        where = self.names.where(blob, offset, size, row.thing)
        turn = -1 if bias == NO_TURN else bias + row.lo
        return Done(row.lo, row.hi, first, where, self.names.peers[peer], elapsed_us, turn)

    def all(self) -> Iterator[Done]:
        """In order of their tasks."""
        return map(self.read, self)

    def of(self, lo: int, hi: int) -> list[Done]:
        """What there is of [lo, hi), cut to it."""
        return [self.read(row) for row in self.between(lo, hi)]

    def copy(self) -> Results:
        twin = Results(self.names)
        self.copy_to(twin)
        return twin


class Segments(RangeTable):
    """Columns: first, count, size, blob, offset, and the two halves of the digest."""

    __slots__ = ("names",)

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names

    def record(self, lo: int, hi: int, first: int, count: int, size: int, digest: bytes, arguments: Where) -> None:
        """Add what overlaps nothing here; see `Piece`. The digest has DIGEST_BYTES."""
        blob, offset, _, thing = self.names.place(arguments) if arguments is not None else (NOWHERE, 0, 0, None)
        high, low = _HALVES.unpack(digest)
        self.put(lo, hi, (first, count, size, blob, offset, high, low), thing)

    def read(self, row: Row) -> Piece:
        """A row of this table."""
        first, count, size, blob, offset, high, low = row.columns
        return Piece(row.lo, row.hi, first, count, size, _HALVES.pack(high, low), self.names.where(blob, offset, size, row.thing))

    def all(self) -> Iterator[Piece]:
        """In order of their tasks."""
        return map(self.read, self)

    def of(self, lo: int, hi: int) -> list[Piece]:
        """The segments that hold some of [lo, hi), whole."""
        return [self.read(row) for row in self.overlapping(lo, hi)]

    def starting(self, first: int) -> Piece | None:
        """The segment that begins with that task and stands whole."""
        for piece in self.of(first, first + 1):
            if piece.first == piece.lo == first and piece.hi == first + piece.count:
                return piece
        return None

    def copy(self) -> Segments:
        twin = Segments(self.names)
        self.copy_to(twin)
        return twin


class StageRecord:
    """One stage. Done, failed and cancelled tasks are disjoint, and all of them are declared.

    declared: what `segments` cover. cancelled: nothing of it is wanted any more, also what is declared later. lost: tasks whose
    results no one has any more, with their old turns.
    """

    __slots__ = (
        "cancelled",
        "cancelled_ranges",
        "declared",
        "failed",
        "failures",
        "function",
        "function_size",
        "index",
        "left_results",
        "left_segments",
        "lost",
        "name",
        "options",
        "ordered",
        "parent",
        "results",
        "segments",
        "total",
    )

    def __init__(
        self,
        names: Names,
        index: int,
        function: bytes,
        function_size: int,
        name: str,
        ordered: bool,
        options: StageOptions,
        parent: tuple[int, int] | None,
    ) -> None:
        self.index = index
        self.function = function
        self.function_size = function_size
        self.name = name
        self.ordered = ordered
        self.options = options
        self.parent = parent
        self.total: int | None = None
        self.cancelled = False
        self.cancelled_ranges = RangeSet()
        self.declared = RangeSet()
        self.failed = RangeSet()
        self.failures: dict[int, TaskFailed] = {}
        self.segments = Segments(names)
        self.results = Results(names)
        self.lost: Results | None = None
        self.left_segments: Segments | None = None
        self.left_results: Results | None = None

    @property
    def done(self) -> int:
        """Tasks whose results are known."""
        return self.results.count

    @property
    def queues(self) -> bool:
        """Whether its results have turns: the driver takes them as they come."""
        return self.parent is None and not self.ordered

    @property
    def weight(self) -> int:
        """Bytes of arguments and results in the record itself."""
        tables = (self.segments, self.results, self.left_segments, self.left_results)
        return sum(table.weight for table in tables if table is not None)

    def copy(self) -> StageRecord:
        """A record that changes alone."""
        names = self.segments.names
        twin = StageRecord(
            names, self.index, self.function, self.function_size, self.name, self.ordered, self.options, self.parent
        )
        twin.total, twin.cancelled = self.total, self.cancelled
        twin.cancelled_ranges, twin.declared = self.cancelled_ranges.copy(), self.declared.copy()
        twin.failed, twin.failures = self.failed.copy(), self.failures.copy()
        twin.segments, twin.results = self.segments.copy(), self.results.copy()
        twin.lost = self.lost and self.lost.copy()
        twin.left_segments = self.left_segments and self.left_segments.copy()
        twin.left_results = self.left_results and self.left_results.copy()
        return twin
