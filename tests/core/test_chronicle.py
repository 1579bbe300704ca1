"""The fold of a job's facts, against a naive twin that keeps a dict of tasks; snapshots at any point."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dht.core import codec
from dht.core.codec import CodecError
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.facts import (
    AnyFact,
    Ended,
    Output,
    RangeCancelled,
    RangeDone,
    Redo,
    SegmentsCut,
    StageClosed,
    StageOpened,
    Stored,
    TaskFailed,
    Told,
)

F = b"f" * 32
P, Q = b"p" * 20, b"q" * 20
BOUND = 30


def digest(number: int) -> bytes:
    return b"%016d" % number


def opened(stage: int = 0, *, ordered: bool = False, parent: tuple[int, int] | None = None) -> StageOpened:
    return StageOpened(stage, F, 10, "count", ordered, StageOptions(), parent)


def cut(first: int, *counts: int, stage: int = 0, salt: int = 0) -> SegmentsCut:
    pieces = tuple((count, 3, digest(100 * salt + at)) for at, count in enumerate(counts))
    return SegmentsCut(stage, first, pieces, b"abc" * len(counts))


def done(lo: int, hi: int, result: Any = b"r", *, stage: int = 0, peer: bytes = P, turn: int = -1) -> RangeDone:
    return RangeDone(stage, lo, hi, lo, result, peer, 7, turn)


def failed(index: int, stage: int = 0) -> TaskFailed:
    return TaskFailed(stage, index, "raised", "ValueError", "no", "trace", b"x")


def fold(*facts: AnyFact) -> Chronicle:
    chronicle = Chronicle()
    for fact in facts:
        chronicle.apply(fact)
    return chronicle


def ranges(chronicle: Chronicle, stage: int = 0) -> list[tuple[int, int, Any]]:
    return [(one.lo, one.hi, one.result) for one in chronicle.stages[stage].results.all()]


# ---- the twin --------------------------------------------------------------------------------------------------------


class Twin:
    """Task by task."""

    def __init__(self) -> None:
        self.stages: dict[int, dict[str, Any]] = {}
        self.turn = 0
        self.lengths = {1: 0, 2: 0}
        self.outcome: bytes | None = None
        self.told: set[str] = set()

    def apply(self, fact: AnyFact) -> None:
        match fact:
            case StageOpened(stage=number, ordered=ordered, parent=parent):
                if number not in self.stages:
                    queues = parent is None and not ordered
                    self.stages[number] = {"queues": queues, "total": None, "cancelled": False}
                    self.stages[number] |= {key: {} for key in ("segment", "state", "lost", "left", "left_segment")}
            case Output(fd, at, data):
                if self.lengths.get(fd) == at:
                    self.lengths[fd] += len(data)
            case Ended(outcome):
                self.outcome = outcome if self.outcome is None else self.outcome
            case Told(key):
                self.told.add(key)
            case _ if fact.stage in self.stages:
                self.of_stage(self.stages[fact.stage], fact)

    def of_stage(self, s: dict[str, Any], fact: Any) -> None:
        match fact:
            case SegmentsCut(first=first, pieces=pieces, arguments=arguments):
                end = first + sum(count for count, _, _ in pieces)
                self.void(s, first, end)
                if s["total"] is not None and end > s["total"]:
                    s["total"] = None
                at = first
                for number, (count, size, name) in enumerate(pieces):
                    piece = (at, count, size, name, arguments[3 * number : 3 * number + 3])
                    for task in range(at, at + count):
                        s["segment"][task] = piece
                        if s["cancelled"]:
                            s["state"][task] = "cancelled"
                    at += count
            case StageClosed(total=total):
                self.void(s, total, BOUND * 3)
                s["total"] = total
            case RangeDone(lo=lo, hi=hi):
                for task in range(lo, hi):
                    state = s["state"].get(task)
                    repeated = fact.turn >= 0 and s["queues"] and state == "cancelled"
                    if task in s["segment"] and (state is None or repeated):
                        turn = self.next_turn(s, task, fact.turn, lo)
                        s["state"][task] = (fact.first, fact.result, fact.peer, fact.elapsed_us, turn)
            case TaskFailed(index=task):
                if task in s["segment"] and s["state"].get(task) is None:
                    s["state"][task] = msgspec.structs.replace(fact, turn=self.next_turn(s, task, -1, task))
            case RangeCancelled(lo=lo, hi=hi):
                s["cancelled"] |= hi < 0
                for task in range(lo, hi if hi >= 0 else BOUND * 3):
                    if task in s["segment"]:
                        s["state"].setdefault(task, "cancelled")
            case Redo(lo=lo, hi=hi):
                for task in range(lo, hi):
                    s["left"].pop(task, None)
                    if type(s["state"].get(task)) is tuple:
                        turn = s["state"].pop(task)[4]
                        if s["queues"]:
                            s["lost"][task] = turn

    def next_turn(self, s: dict[str, Any], task: int, turn: int, lo: int) -> int:
        if not s["queues"]:
            return -1
        lost = s["lost"].pop(task, None)
        if turn >= 0:
            self.turn = max(self.turn, turn + task - lo + 1)
            return turn + task - lo
        if lost is not None:
            return lost
        self.turn += 1
        return self.turn - 1

    def void(self, s: dict[str, Any], lo: int, hi: int) -> None:
        for task in range(lo, hi):
            s["left"].pop(task, None)
            s["left_segment"].pop(task, None)
        touched = {s["segment"][task] for task in range(lo, hi) if task in s["segment"]}
        for task in [task for task, piece in s["segment"].items() if piece in touched]:
            piece = s["segment"].pop(task)
            state = s["state"].pop(task, None)
            s["lost"].pop(task, None)
            if not lo <= task < hi:
                s["left_segment"][task] = piece
                if type(state) is tuple:
                    s["left"][task] = state


def by_task(table: Any) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for one in table.all() if table is not None else ():
        for task in range(one.lo, one.hi):
            turn = one.turn if one.turn < 0 else one.turn + task - one.lo
            found[task] = (one.first, one.result, one.peer, one.elapsed_us, turn)
    return found


def pieces_by_task(table: Any) -> dict[int, Any]:
    return {
        task: (one.first, one.count, one.size, one.digest, one.arguments)
        for one in (table.all() if table is not None else ())
        for task in range(one.lo, one.hi)
    }


class ChronicleTwin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = Chronicle()
        self.restored = Chronicle()
        self.twin = Twin()
        self.facts = 0

    def feed(self, fact: AnyFact) -> None:
        self.real.apply(fact)
        self.restored.apply(fact)
        self.twin.apply(fact)
        self.facts += 1

    stages = st.integers(0, 3)
    tasks = st.integers(0, BOUND)
    wheres = st.one_of(
        st.sampled_from([b"a", b"bb", b"", None]),
        st.builds(Stored, st.sampled_from([b"x" * 32, b"y" * 32]), st.just(100), st.integers(0, 50), st.just(5), st.just((P,))),
    )

    @initialize()
    def some_stages(self) -> None:
        self.feed(opened(0))
        self.feed(opened(1, ordered=True))
        self.feed(opened(2, parent=(0, 1)))
        self.feed(opened(2))

    @rule(stage=stages, first=tasks, counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), salt=st.integers(0, 50))
    def declare(self, stage: int, first: int, counts: list[int], salt: int) -> None:
        self.feed(cut(first, *counts, stage=stage, salt=salt))

    @rule(stage=stages, lo=tasks, length=st.integers(1, 9), back=st.integers(-2, 3), where=wheres, turn=st.integers(-4, 9))
    def complete(self, stage: int, lo: int, length: int, back: int, where: Any, turn: int) -> None:
        peer = Q if length % 2 else P
        self.feed(RangeDone(stage, lo, lo + length, lo - max(back, 0), where, peer, length, max(turn, -1)))

    @rule(stage=stages, index=tasks)
    def fail(self, stage: int, index: int) -> None:
        self.feed(failed(index, stage))

    @rule(stage=stages, lo=tasks, length=st.integers(0, 9))
    def cancel(self, stage: int, lo: int, length: int) -> None:
        self.feed(RangeCancelled(stage, lo, lo + length) if length else RangeCancelled(stage, 0, -1))

    @rule(stage=stages, lo=tasks, length=st.integers(1, 9))
    def lose(self, stage: int, lo: int, length: int) -> None:
        self.feed(Redo(stage, lo, lo + length))

    @rule(stage=stages, total=tasks)
    def close(self, stage: int, total: int) -> None:
        self.feed(StageClosed(stage, total))

    @rule(fd=st.integers(0, 3), at=st.integers(0, 6), data=st.binary(max_size=4))
    def write(self, fd: int, at: int, data: bytes) -> None:
        self.feed(Output(fd, at, data))

    @rule(text=st.sampled_from(["a", "b"]))
    def tell_and_end(self, text: str) -> None:
        self.feed(Told(text))
        self.feed(Ended(text.encode()))

    @rule()
    def snapshot_and_restore(self) -> None:
        self.restored = Chronicle.restore(self.restored.snapshot())

    @invariant()
    def restored_is_the_same(self) -> None:
        assert self.restored.snapshot() == self.real.snapshot()
        for name in ("next_stage", "next_turn", "tallies", "inline_bytes", "done_count", "ignored", "told", "output_length"):
            assert getattr(self.restored, name) == getattr(self.real, name), name
        assert set(self.restored.blobs()) == set(self.real.blobs())

    @invariant()
    def twin_is_the_same(self) -> None:
        real, twin = self.real, self.twin
        assert set(real.stages) == set(twin.stages)
        assert real.output_length == twin.lengths
        assert (real.outcome, real.told) == (twin.outcome, twin.told)
        assert real.next_turn == twin.turn
        tallies: Counter[bytes] = Counter()
        inline = 0
        for number, s in twin.stages.items():
            record = real.stages[number]
            finished = {task: state for task, state in s["state"].items() if type(state) is tuple}
            assert by_task(record.results) == finished
            assert record.done == len(finished)
            assert by_task(record.left_results) == s["left"]
            assert record.failures == {task: state for task, state in s["state"].items() if type(state) is TaskFailed}
            assert list(record.cancelled_ranges.indexes()) == sorted(t for t, state in s["state"].items() if state == "cancelled")
            assert pieces_by_task(record.segments) == s["segment"]
            assert pieces_by_task(record.left_segments) == s["left_segment"]
            assert list(record.declared.indexes()) == sorted(s["segment"])
            assert {task: state[4] for task, state in by_task(record.lost).items()} == s["lost"]
            assert (record.total, record.cancelled) == (s["total"], s["cancelled"])
            tallies.update(state[2] for state in finished.values())
            inline += record.weight
        assert real.tallies == dict(tallies)
        assert real.done_count == tallies.total()
        assert real.inline_bytes == inline


TestChronicleTwin = ChronicleTwin.TestCase
TestChronicleTwin.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# ---- scenarios -------------------------------------------------------------------------------------------------------


def test_longer_streams_of_facts_than_hypothesis_comes_to() -> None:
    for seed in range(12):
        dice = random.Random(seed)
        machine = ChronicleTwin()
        machine.some_stages()
        for _ in range(120):
            stage, lo, length = dice.randint(0, 2), dice.randint(0, BOUND), dice.randint(1, 9)
            where = dice.choice([b"a", b"bb", None, Stored(dice.randbytes(1) * 32, 100, dice.randint(0, 9), 5, (P,))])
            roll = dice.random()
            if roll < 0.3:
                machine.declare(stage, lo, [dice.randint(1, 6) for _ in range(dice.randint(1, 4))], dice.randint(0, 50))
            elif roll < 0.75:
                machine.complete(stage, lo, length, dice.randint(-2, 3), where, dice.randint(-12, 9))
            elif roll < 0.8:
                machine.fail(stage, lo)
            elif roll < 0.84:
                machine.cancel(stage, lo, length if dice.random() < 0.98 else 0)
            elif roll < 0.92:
                machine.lose(stage, lo, length)
            elif roll < 0.94:
                machine.close(stage, lo)
            else:
                machine.snapshot_and_restore()
            machine.restored_is_the_same()
            machine.twin_is_the_same()


def test_completion_that_comes_twice_counts_where_it_is_new() -> None:
    chronicle = fold(opened(), cut(0, 20), done(5, 10, b"a"), done(0, 15, b"b", peer=Q), done(5, 10, b"c"))
    assert ranges(chronicle) == [(0, 5, b"b"), (5, 10, b"a"), (10, 15, b"b")]
    assert [one.first for one in chronicle.stages[0].results.all()] == [0, 5, 0]
    assert chronicle.tallies == {P: 5, Q: 10}
    assert (chronicle.done_count, chronicle.ignored) == (15, 0)


def test_other_declaration_voids_whole_segments() -> None:
    chronicle = fold(opened(), cut(0, 10, 10, 10), done(0, 30), cut(5, 10, salt=1))
    stage = chronicle.stages[0]
    assert ranges(chronicle) == [(20, 30, b"r")]
    assert list(stage.declared) == [(5, 15), (20, 30)]
    assert [(piece.lo, piece.hi, piece.first) for piece in stage.left_segments.all()] == [(0, 5, 0), (15, 20, 10)]
    chronicle.apply(cut(0, 5, salt=2))
    chronicle.apply(cut(15, 5, salt=3))
    assert not stage.left_segments.rows
    assert not stage.left_results.rows


def test_completion_of_what_is_not_declared_is_ignored() -> None:
    """It may be an old leader's, of a segment that was declared otherwise since."""
    chronicle = fold(opened(), cut(0, 10), cut(0, 4, salt=1), done(0, 10))
    assert ranges(chronicle) == [(0, 4, b"r")]


def test_results_keep_their_turns_when_they_are_recorded_elsewhere_or_made_again() -> None:
    chronicle = fold(opened(), cut(0, 10), done(4, 6), done(0, 2), failed(3), Redo(0, 4, 6), cut(10, 5), done(10, 12))
    chronicle.apply(done(4, 6, b"again"))
    turns = {one.lo: one.turn for one in chronicle.stages[0].results.all()}
    assert turns == {4: 0, 0: 2, 10: 5}
    assert chronicle.stages[0].failures[3].turn == 4
    chronicle.apply(opened(1))
    chronicle.apply(cut(0, 2, stage=1))
    chronicle.apply(done(0, 2, stage=1, turn=2))
    chronicle.apply(done(12, 13))
    assert [one.turn for one in chronicle.stages[1].results.all()] == [2]
    assert chronicle.next_turn == 8


def test_ordered_and_nested_stages_have_no_turns() -> None:
    chronicle = fold(opened(0, ordered=True), opened(1, parent=(0, 3)), cut(0, 5), cut(0, 5, stage=1))
    chronicle.apply(done(0, 5))
    chronicle.apply(done(0, 5, stage=1))
    assert chronicle.next_turn == 0
    assert [one.turn for stage in chronicle.stages.values() for one in stage.results.all()] == [-1, -1]


def test_what_is_cancelled_stays_so_unless_it_was_done_before() -> None:
    chronicle = fold(opened(), cut(0, 10), done(0, 3), RangeCancelled(0, 0, -1), done(2, 8), cut(10, 5), done(10, 12))
    assert ranges(chronicle) == [(0, 3, b"r")]
    assert list(chronicle.stages[0].cancelled_ranges) == [(3, 15)]
    chronicle.apply(cut(0, 10, salt=1))
    chronicle.apply(done(0, 3, turn=0))
    assert ranges(chronicle) == [(0, 3, b"r")]


def test_stage_that_ends_earlier_forgets_the_rest() -> None:
    chronicle = fold(opened(), cut(0, 5, 5), done(0, 10), StageClosed(0, 10), StageClosed(0, 5))
    assert ranges(chronicle) == [(0, 5, b"r")]
    chronicle.apply(cut(5, 5))
    assert chronicle.stages[0].total is None


def test_arguments_of_each_segment_are_found_in_the_page() -> None:
    page = Stored(b"x" * 32, 1000, 100, 12, (P,))
    pieces = ((4, 5, digest(1)), (1, 7, digest(2)))
    chronicle = fold(opened(), SegmentsCut(0, 0, pieces, page), SegmentsCut(0, 5, pieces, b"12345abcdefg"))
    chronicle.apply(SegmentsCut(0, 10, pieces, b"of another length"))
    found = [piece.arguments for piece in chronicle.stages[0].segments.all()]
    assert [(one.offset, one.size) for one in found[:2]] == [(100, 5), (105, 7)]
    assert found[2:] == [b"12345", b"abcdefg", None, None]
    assert chronicle.inline_bytes == 12


def test_blobs_that_the_record_needs() -> None:
    def at(name: bytes, offset: int) -> Stored:
        return Stored(name * 32, 100, offset, 5, (P,))

    chronicle = fold(opened(), SegmentsCut(0, 0, ((9, 5, digest(1)),), at(b"a", 0)))
    chronicle.apply(done(0, 2, at(b"b", 5)))
    chronicle.apply(done(2, 4, at(b"b", 10)))
    chronicle.apply(done(4, 6, at(b"c", 0)))
    assert {(one.blob[:1], one.offset, one.size) for one in chronicle.blobs()} == {(b"a", 0, 100), (b"b", 0, 100), (b"c", 0, 100)}
    assert chronicle.results_in(b"b" * 32) == [(0, 0, 2), (0, 2, 4)]
    assert chronicle.results_in(b"z" * 32) == []
    for stage, lo, hi in chronicle.results_in(b"b" * 32):
        chronicle.apply(Redo(stage, lo, hi))
    assert {one.blob[:1] for one in chronicle.blobs()} == {b"a", b"c"}
    assert ranges(chronicle) == [(4, 6, at(b"c", 0))]


def test_output_goes_on_where_it_was() -> None:
    chronicle = fold(Output(1, 0, b"abc"), Output(1, 0, b"late"), Output(1, 3, b"de"), Output(2, 1, b"gap"), Output(7, 0, b"x"))
    assert chronicle.output_length == {1: 5, 2: 0}


def test_first_outcome_counts() -> None:
    assert fold(Ended(b"one"), Ended(b"two")).outcome == b"one"


numbers = st.one_of(st.integers(-5, 40), st.sampled_from([-(1 << 63), 1 << 62, (1 << 63) - 1, (1 << 64) - 1, limits.TASKS_MAX]))
wild_wheres = st.one_of(st.binary(max_size=3), st.none(), st.builds(Stored, st.binary(max_size=3), numbers, numbers, numbers))
small = st.integers(0, 1)
wild_pieces = st.lists(st.tuples(numbers, numbers, st.sampled_from([b"", bytes(16)]))).map(tuple)
wild = st.one_of(
    st.builds(opened, numbers),
    st.builds(SegmentsCut, small, numbers, wild_pieces, wild_wheres),
    st.builds(StageClosed, small, numbers),
    st.builds(RangeDone, small, numbers, numbers, numbers, wild_wheres, st.binary(max_size=2), numbers, numbers),
    st.builds(failed, numbers, small),
    st.builds(RangeCancelled, small, numbers, numbers),
    st.builds(Redo, small, numbers, numbers),
    st.builds(Output, numbers, numbers, st.binary(max_size=3)),
)


@given(st.lists(wild, max_size=20))
@settings(deadline=None)
def test_no_fact_raises_whatever_its_numbers(stream: list[AnyFact]) -> None:
    chronicle = fold(opened(), cut(0, 20), *stream)
    assert Chronicle.restore(chronicle.snapshot()).snapshot() == chronicle.snapshot()


@given(st.data())
@settings(deadline=None)
def test_damaged_snapshot_raises_nothing_but_codec_error(data: st.DataObject) -> None:
    chronicle = fold(opened(), cut(0, 9, 9), done(3, 6), failed(8), cut(12, 9, salt=1))
    chronicle.apply(done(0, 2, Stored(b"x" * 32, 100, 0, 5, (P,))))
    chronicle.apply(RangeCancelled(0, 7, 8))
    raw = bytearray(chronicle.snapshot())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = Chronicle.restore(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    except CodecError:
        return
    again.snapshot()
    again.apply(cut(0, 30, salt=5))


@pytest.mark.parametrize("data", [b"", b"\xc0", codec.encode([1, 2]), codec.encode(99)])
def test_what_is_no_snapshot(data: bytes) -> None:
    with pytest.raises(CodecError):
        Chronicle.restore(data)


def test_million_tasks_take_a_few_megabytes() -> None:
    dice = random.Random(1)
    result_bytes = 0
    tracemalloc.start()
    try:
        chronicle = fold(opened(), *(cut(first, 10_000, salt=first) for first in range(0, 1_000_000, 10_000)))
        fronts = [[first, first + 100_000] for first in range(0, 1_000_000, 100_000)]  # ten peers, each at a place of its own
        while fronts:
            front = dice.choice(fronts)
            hi = min(front[0] + dice.randint(1, 100), front[1])
            result_bytes += 150
            chronicle.apply(done(front[0], hi, dice.randbytes(150), peer=bytes([len(fronts)]) * 20))
            front[0] = hi
            if hi == front[1]:
                fronts.remove(front)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert chronicle.done_count == 1_000_000
    assert used - result_bytes < 4 << 20
    assert len(chronicle.snapshot()) - result_bytes < 1 << 20
