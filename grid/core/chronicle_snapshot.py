"""A chronicle as bytes: ranges as differences to the range before, blobs and peers by number. A million tasks take a few MB.

Rules: equal chronicles give equal bytes, whatever their tables look like inside; bytes that no chronicle gives raise
CodecError. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import msgspec

from dht.core import codec
from dht.core.codec import CodecError
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.facts import TaskFailed
from grid.core.ranges import RangeSet
from grid.core.rangetable import Columns
from grid.core.records import NO_TURN, NOWHERE, NUMBER_MAX, Names, Results, Segments, StageRecord

VERSION: Final = 1
NUMBERS: Final = 9
"""Of a row on the wire."""

Table: TypeAlias = tuple[tuple[int, ...], tuple[bytes, ...]]
"""NUMBERS numbers a row, and the objects of the rows that have one."""
_EMPTY: Table = ((), ())

if TYPE_CHECKING:
    from grid.core.chronicle import Chronicle

_T = TypeVar("_T", Results, Segments)


class _Stage(msgspec.Struct, array_like=True, frozen=True):
    index: int
    function: bytes
    function_size: int
    name: str
    ordered: bool
    options: StageOptions
    parent: tuple[int, int] | None
    total: int | None
    cancelled: bool
    cancelled_ranges: tuple[int, ...]
    segments: Table
    results: Table
    failures: tuple[TaskFailed, ...]
    lost: Table
    left_segments: Table
    left_results: Table


class _Snapshot(msgspec.Struct, array_like=True, frozen=True):
    version: int
    next_stage: int
    next_turn: int
    ignored: int
    lengths: tuple[int, ...]
    outcome: bytes | None
    told: tuple[str, ...]
    blobs: tuple[tuple[bytes, int, tuple[bytes, ...]], ...]
    peers: tuple[bytes, ...]
    stages: tuple[_Stage, ...]
    output: tuple[bytes, ...] = ()


class _Renumbering:
    """Blobs and peers in the order in which the walk meets them: what nothing names any more is left out."""

    def __init__(self) -> None:
        self.blobs: dict[int, int] = {NOWHERE: NOWHERE}
        self.peers: dict[int, int] = {}


def encode(chronicle: Chronicle) -> bytes:
    """The bytes of all of it."""
    renumbering = _Renumbering()
    stages = tuple(_stage(chronicle.stages[index], renumbering) for index in sorted(chronicle.stages))
    names = chronicle.names
    del renumbering.blobs[NOWHERE]
    return codec.encode(
        _Snapshot(
            VERSION,
            chronicle.next_stage,
            chronicle.next_turn,
            chronicle.ignored,
            tuple(chronicle.output_length[fd] for fd in sorted(chronicle.output_length)),
            chronicle.outcome,
            tuple(sorted(chronicle.told)),
            tuple(names.blobs[number] for number in renumbering.blobs),
            tuple(names.peers[number] for number in renumbering.peers),
            stages,
            tuple(bytes(chronicle.output[fd]) for fd in sorted(chronicle.output)),
        )
    )


def _stage(stage: StageRecord, renumbering: _Renumbering) -> _Stage:
    return _Stage(
        stage.index,
        stage.function,
        stage.function_size,
        stage.name,
        stage.ordered,
        stage.options,
        stage.parent,
        stage.total,
        stage.cancelled,
        stage.cancelled_ranges.to_compact(),
        _segments(stage.segments, renumbering),
        _results(stage.results, renumbering),
        tuple(stage.failures[index] for index in sorted(stage.failures)),
        _results(stage.lost, renumbering),
        _segments(stage.left_segments, renumbering),
        _results(stage.left_results, renumbering),
    )


# Where a row begins is told from where the last one ended, its bytes' offset likewise while the blob is the same, its turn from
# the last one's: mostly 0. Blobs: 0 is the next object, 1 nobody keeps it, from 2 on they are numbered; turns: 0 is none.


def _results(table: Results | None, renumbering: _Renumbering) -> Table:
    if table is None or not table.rows:
        return _EMPTY
    out: list[int] = []
    things: list[bytes] = []
    end = last_blob = offset_end = last_bias = 0
    for lo, hi, (first, blob, offset, size, peer, elapsed_us, bias), thing in table:
        named = renumbering.blobs.setdefault(blob, len(renumbering.blobs) - 1)
        peer = renumbering.peers.setdefault(peer, len(renumbering.peers))
        if thing is not None:
            things.append(thing)
        kind = 0 if thing is not None else named + 2
        if kind != last_blob:
            last_blob, offset_end = kind, 0
        has_turn = bias != NO_TURN
        out += (lo - end, hi - lo, lo - first, kind, offset - offset_end, size, peer, elapsed_us)
        out.append(_fold(bias - last_bias) + 1 if has_turn else 0)
        end, offset_end = hi, offset + size
        last_bias = bias if has_turn else last_bias
    return tuple(out), tuple(things)


def _segments(table: Segments | None, renumbering: _Renumbering) -> Table:
    if table is None or not table.rows:
        return _EMPTY
    out: list[int] = []
    things: list[bytes] = []
    end = last_blob = offset_end = 0
    for lo, hi, (first, count, size, blob, offset, high, low), thing in table:
        named = renumbering.blobs.setdefault(blob, len(renumbering.blobs) - 1)
        if thing is not None:
            things.append(thing)
        kind = 0 if thing is not None else named + 2
        if kind != last_blob:
            last_blob, offset_end = kind, 0
        out += (lo - end, hi - lo, lo - first, first + count - hi, size, kind, offset - offset_end, high, low)
        end, offset_end = hi, offset + size if blob != NOWHERE else 0
    return tuple(out), tuple(things)


def _fold(number: int) -> int:
    """Numbers of either sign as small ones of one."""
    return 2 * number if number >= 0 else -2 * number - 1


def _unfold(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number // 2) - 1


# ---- back ------------------------------------------------------------------------------------------------------------


def restore(data: bytes, chronicle: Chronicle) -> Chronicle:
    """Fill an empty chronicle. Raises CodecError."""
    snapshot = codec.decode(data, _Snapshot)
    try:
        return _restore(snapshot, chronicle)
    except (ValueError, OverflowError, IndexError) as error:
        raise CodecError(f"not a chronicle: {error}") from None


def _restore(snapshot: _Snapshot, chronicle: Chronicle) -> Chronicle:
    if snapshot.version != VERSION or len(snapshot.lengths) != len(chronicle.output_length) or min(snapshot.lengths) < 0:
        raise ValueError("of another version")
    names = chronicle.names
    for blob, blob_size, peers in snapshot.blobs:
        names.blobs.append((blob, blob_size, peers))
    for peer in snapshot.peers:
        names.peers.append(peer)
    names.index()
    chronicle.next_stage, chronicle.next_turn, chronicle.ignored = snapshot.next_stage, snapshot.next_turn, snapshot.ignored
    chronicle.output_length = dict(zip(sorted(chronicle.output_length), snapshot.lengths, strict=True))
    chronicle.outcome = snapshot.outcome
    chronicle.told = set(snapshot.told)
    for fd, length, kept in zip(sorted(chronicle.output), snapshot.lengths, snapshot.output, strict=False):
        if len(kept) > length:
            raise CodecError("more output than was written")
        chronicle.output[fd] = bytearray(kept)
    before = -1
    for packed in snapshot.stages:
        if not before < packed.index < snapshot.next_stage:
            raise ValueError("stages out of order")
        before = packed.index
        _restore_stage(chronicle, names, packed)
    return chronicle


def _restore_stage(chronicle: Chronicle, names: Names, packed: _Stage) -> None:
    stage = StageRecord(
        names, packed.index, packed.function, packed.function_size, packed.name, packed.ordered, packed.options, packed.parent
    )
    stage.total, stage.cancelled = packed.total, packed.cancelled
    stage.cancelled_ranges = RangeSet.from_compact(packed.cancelled_ranges)
    _fill(stage.segments, packed.segments, _segment_row)
    for row in stage.segments:
        stage.declared.add(row.lo, row.hi)
    _fill(stage.results, packed.results, _result_row)
    stage.failures = {failure.index: failure for failure in packed.failures}
    stage.failed = RangeSet((index, index + 1) for index in stage.failures)
    if packed.lost[0]:
        stage.lost = Results(names)
        _fill(stage.lost, packed.lost, _result_row)
    if packed.left_segments[0] or packed.left_results[0]:
        stage.left_segments, stage.left_results = Segments(names), Results(names)
        _fill(stage.left_segments, packed.left_segments, _segment_row)
        _fill(stage.left_results, packed.left_results, _result_row)
    _check(stage)
    for row in stage.results:
        peer = names.peers[row.columns[4]]
        chronicle.tallies[peer] = chronicle.tallies.get(peer, 0) + row.hi - row.lo
    chronicle.done_count += stage.done
    chronicle.inline_bytes += stage.weight
    chronicle.stages[stage.index] = stage


def _check(stage: StageRecord) -> None:
    settled = [*stage.cancelled_ranges, *((row.lo, row.hi) for row in stage.results), *stage.failed]
    covered = RangeSet(settled)
    if covered.count != sum(hi - lo for lo, hi in settled) or not all(stage.declared.covers(lo, hi) for lo, hi in covered):
        raise ValueError("tasks settled twice, or never declared")
    if stage.total is not None and not 0 <= stage.total <= limits.TASKS_MAX:
        raise ValueError("a total out of bounds")


def _fill(table: _T, packed: Table, read: Callable[[_T, _Reader, list[int]], tuple[Columns, bytes | None]]) -> None:
    numbers, things = packed
    if len(numbers) % NUMBERS:
        raise ValueError("half a row")
    reader = _Reader(things)
    end = 0
    for at in range(0, len(numbers), NUMBERS):
        gap, length, *rest = numbers[at : at + NUMBERS]
        if gap < 0 or length < 1:
            raise ValueError("rows out of order")
        reader.lo, reader.hi = lo, end = end + gap, end + gap + length
        if end > limits.TASKS_MAX:
            raise ValueError("a row out of bounds")
        columns, thing = read(table, reader, rest)
        if not all(-NUMBER_MAX <= number <= NUMBER_MAX for number in columns[:5]):
            raise ValueError("a number out of bounds")
        table.put(lo, end, columns, thing)
    if next(reader.things, None) is not None:
        raise ValueError("an object of no row")


class _Reader:
    """What reading a row takes from the row before."""

    def __init__(self, things: tuple[bytes, ...]) -> None:
        self.things = iter(things)
        self.lo = self.hi = 0
        self.last_blob = self.offset_end = self.last_bias = 0

    def place(self, names: Names, kind: int, delta: int) -> tuple[int, int, bytes | None]:
        """(blob, offset, object)"""
        if kind != self.last_blob:
            self.last_blob, self.offset_end = kind, 0
        if kind == 0:
            thing = next(self.things, None)
            if thing is None:
                raise ValueError("a row without its object")
            return NOWHERE, self.offset_end + delta, thing
        if kind == 1:
            return NOWHERE, self.offset_end + delta, None
        if not 2 <= kind < len(names.blobs) + 2:
            raise ValueError("a blob that was not named")
        return kind - 2, self.offset_end + delta, None


def _result_row(table: Results, reader: _Reader, numbers: list[int]) -> tuple[Columns, bytes | None]:
    back, kind, delta, size, peer, elapsed_us, turn = numbers
    blob, offset, thing = reader.place(table.names, kind, delta)
    reader.offset_end = offset + size
    bias = NO_TURN
    if turn:
        bias = reader.last_bias = reader.last_bias + _unfold(turn - 1)
        if not 0 <= bias + reader.lo <= NUMBER_MAX:
            raise ValueError("a turn out of bounds")
    if not 0 <= peer < len(table.names.peers):
        raise ValueError("a peer that was not named")
    return (reader.lo - back, blob, offset, size, peer, elapsed_us, bias), thing


def _segment_row(table: Segments, reader: _Reader, numbers: list[int]) -> tuple[Columns, bytes | None]:
    back, ahead, size, kind, delta, high, low = numbers
    blob, offset, thing = reader.place(table.names, kind, delta)
    reader.offset_end = offset + size if blob != NOWHERE else 0
    first = reader.lo - back
    count = reader.hi + ahead - first
    if min(back, ahead, size) < 0:
        raise ValueError("a segment out of bounds")
    return (first, count, size, blob, offset, high, low), thing
