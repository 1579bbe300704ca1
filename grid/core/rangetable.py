"""Ranges of task numbers with something said of each, sorted and disjoint: seven integers and one object a range.

Rules this file keeps:
- what is said of a range holds for each part of it: cutting a range leaves its columns as they are;
- neighbours are never merged;
- a range costs about 80 bytes, and any change O(log n + BLOCK_ROWS_MAX + ranges touched).

Rows live in blocks of arrays, for a million small objects would cost ten times as much. No I/O.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from grid.core.ranges import Range

BLOCK_ROWS_MAX: Final = 512
"""Rows moved by one insertion at most: a few KiB."""
WIDTH: Final = 8
"""Integers of a row besides its first task: where it ends, and its seven columns."""

Columns: TypeAlias = tuple[int, int, int, int, int, int, int]


class Row(NamedTuple):
    """[lo, hi), its columns, its object."""

    lo: int
    hi: int
    columns: Columns
    thing: bytes | None


class _Block:
    __slots__ = ("lows", "rest", "things")

    def __init__(self, lows: array[int], rest: array[int], things: list[bytes | None]) -> None:
        self.lows = lows
        self.rest = rest
        self.things = things


class RangeTable:
    """`count`: tasks in it. `rows`: ranges. `weight`: bytes of the rows' objects; one that two parts share counts twice."""

    __slots__ = ("_blocks", "_starts", "count", "rows", "weight")

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._starts: list[int] = []
        self.count = 0
        self.rows = 0
        self.weight = 0

    # ---- look ----

    def is_free(self, lo: int, hi: int) -> bool:
        """Whether no row holds any of [lo, hi)."""
        if not self._blocks or self._blocks[-1].rest[-WIDTH] <= lo:  # behind all there is, as tasks mostly come
            return True
        at = bisect_right(self._starts, lo) - 1
        if at >= 0:
            block = self._blocks[at]
            position = bisect_right(block.lows, lo) - 1
            if block.rest[WIDTH * position] > lo:
                return False
            if position + 1 < len(block.lows):
                return block.lows[position + 1] >= hi
        return at + 1 == len(self._starts) or self._starts[at + 1] >= hi

    def overlapping(self, lo: int, hi: int) -> list[Row]:
        """The rows that hold some of [lo, hi), whole, in order."""
        found: list[Row] = []
        for at in range(max(0, bisect_right(self._starts, lo) - 1), bisect_left(self._starts, hi)):
            block = self._blocks[at]
            first, last = _span(block, lo, hi)
            found.extend(_row(block, position) for position in range(first, last))
        return found

    def between(self, lo: int, hi: int) -> list[Row]:
        """What is said of [lo, hi): the rows' parts that lie in it."""
        return [Row(max(lo, row.lo), min(hi, row.hi), row.columns, row.thing) for row in self.overlapping(lo, hi)]

    def gaps(self, lo: int, hi: int) -> list[Range]:
        """The parts of [lo, hi) that no row holds."""
        missing = []
        for row in self.overlapping(lo, hi):
            if lo < row.lo:
                missing.append((lo, row.lo))
            lo = row.hi
        if lo < hi:
            missing.append((lo, hi))
        return missing

    def __iter__(self) -> Iterator[Row]:
        for block in self._blocks:
            for position in range(len(block.lows)):
                yield _row(block, position)

    # ---- change ----

    def put(self, lo: int, hi: int, columns: Columns, thing: bytes | None) -> None:
        """Add a row that overlaps none; all is of 64 bits."""
        starts = self._starts
        self.count += hi - lo
        self.rows += 1
        if thing is not None:
            self.weight += len(thing)
        at = bisect_right(starts, lo) - 1
        if at < 0:
            if not starts or len(self._blocks[0].lows) >= BLOCK_ROWS_MAX:
                starts.insert(0, lo)
                self._blocks.insert(0, _Block(array("q", (lo,)), array("q", (hi, *columns)), [thing]))
                return
            starts[0] = lo
            at = 0
        block = self._blocks[at]
        lows = block.lows
        if lo > lows[-1]:
            if len(lows) >= BLOCK_ROWS_MAX:
                starts.insert(at + 1, lo)
                self._blocks.insert(at + 1, _Block(array("q", (lo,)), array("q", (hi, *columns)), [thing]))
                return
            lows.append(lo)
            block.rest.extend((hi, *columns))
            block.things.append(thing)
            return
        position = bisect_right(lows, lo)
        lows.insert(position, lo)
        block.rest[WIDTH * position : WIDTH * position] = array("q", (hi, *columns))
        block.things.insert(position, thing)
        if len(lows) > BLOCK_ROWS_MAX:
            self._split(at)

    def cut(self, lo: int, hi: int) -> list[Row]:
        """Take [lo, hi) out and return what was said of it; the parts of its rows outside stay."""
        rows = self.overlapping(lo, hi)
        if not rows:
            return rows
        for at in range(bisect_left(self._starts, hi) - 1, max(0, bisect_right(self._starts, lo) - 1) - 1, -1):
            block = self._blocks[at]
            first, last = _span(block, lo, hi)
            if last - first == len(block.lows):
                del self._blocks[at], self._starts[at]
            elif first < last:
                del block.lows[first:last], block.rest[WIDTH * first : WIDTH * last], block.things[first:last]
                self._starts[at] = block.lows[0]
        self.rows -= len(rows)
        for row in rows:
            self.count -= row.hi - row.lo
            if row.thing is not None:
                self.weight -= len(row.thing)
        head, tail = rows[0], rows[-1]
        if head.lo < lo:
            self.put(head.lo, lo, head.columns, head.thing)
        if tail.hi > hi:
            self.put(hi, tail.hi, tail.columns, tail.thing)
        rows[0] = Row(max(lo, head.lo), *rows[0][1:])
        rows[-1] = Row(rows[-1].lo, min(hi, tail.hi), tail.columns, tail.thing)
        return rows

    def copy_to(self, twin: RangeTable) -> None:
        """Make `twin`, an empty table, equal."""
        twin._blocks = [_Block(block.lows[:], block.rest[:], block.things.copy()) for block in self._blocks]
        twin._starts = self._starts.copy()
        twin.count, twin.rows, twin.weight = self.count, self.rows, self.weight

    def _split(self, at: int) -> None:
        block = self._blocks[at]
        half = len(block.lows) // 2
        upper = _Block(block.lows[half:], block.rest[WIDTH * half :], block.things[half:])
        del block.lows[half:], block.rest[WIDTH * half :], block.things[half:]
        self._blocks.insert(at + 1, upper)
        self._starts.insert(at + 1, upper.lows[0])


def _span(block: _Block, lo: int, hi: int) -> tuple[int, int]:
    """Positions [first, last) of a block's rows that hold some of [lo, hi)."""
    first = bisect_right(block.lows, lo) - 1
    if first < 0 or block.rest[WIDTH * first] <= lo:
        first += 1
    return first, max(first, bisect_left(block.lows, hi))


def _row(block: _Block, position: int) -> Row:
    hi, a, b, c, d, e, f, g = block.rest[WIDTH * position : WIDTH * (position + 1)]
    return Row(block.lows[position], hi, (a, b, c, d, e, f, g), block.things[position])
