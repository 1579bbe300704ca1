"""A job of several threads, led by one leader after another: each replay sends the same calls in other company and another order,
nothing that was recorded runs again, and results reach the driver in the order in which they first did.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from grid.api.serialize import CALL, ONE, ClassTable, SegmentWriter, pickle_call
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.facts import AnyFact, RangeDone, Redo, SegmentsCut, StageOpened, Stored, Where
from grid.core.items import digest
from grid.core.records import Done
from grid.core.replay import Replay

T = TypeVar("T")
P = b"p" * 20
OPTIONS = StageOptions()
Call = tuple[str, int]
"""Function, argument."""


def segment(arguments: list[int], kind: int = CALL) -> bytes:
    writer = SegmentWriter(kind)
    table = ClassTable()
    for argument in arguments:
        if kind == CALL:
            writer.add_pickled(pickle_call((argument,), None, table))
        else:
            writer.add(argument)
    return b"".join(bytes(part) for part in writer.finish()[0])


class Blobs:
    """What lies outside of the log."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}

    def put(self, data: bytes) -> Stored:
        name = b"%032d" % len(self.data)
        self.data[name] = b"before" + data + b"after"
        return Stored(name, len(data) + 11, 6, len(data), (P,))

    def get(self, where: Where) -> bytes:
        if isinstance(where, Stored):
            return self.data[where.blob][where.offset : where.offset + where.size]
        assert where is not None
        return where


class Epoch:
    """One leader: it replays what the record has, runs the rest, records all of it."""

    def __init__(self, chronicle: Chronicle, blobs: Blobs, run: Callable[[Call], str], dice: random.Random) -> None:
        self.chronicle = chronicle
        self.blobs = blobs
        self.run = run
        self.dice = dice
        self.replay = Replay(chronicle)
        self.delivered: list[tuple[Call, str]] = []
        self.todo: list[tuple[int, list[tuple[int, Call]]]] = []
        self.offers: list[tuple[int, int, int, list[tuple[Call, str]]]] = []
        self.moved = 0

    def propose(self, *facts: AnyFact) -> None:
        for fact in facts:
            self.chronicle.apply(fact)

    def open(self, function: str, first: bytes, count: int, parent: tuple[int, int] | None = None, ordered: bool = False) -> int:
        name = function.encode() * 32
        stage = self.replay.open(name, function, ordered, parent, OPTIONS, (count, digest(first)))
        if stage is None:
            stage = self.chronicle.next_stage
            self.propose(StageOpened(stage, name, 10, function, ordered, OPTIONS, parent))
            self.replay.opened(stage, name, ordered, parent)
        return stage

    def declare(self, stage: int, first: int, calls: list[Call], data: bytes) -> None:
        count = len(calls)
        for stored in self.replay.needed_for(stage, first, count, digest(data), data):
            self.replay.supply(stored, self.blobs.get(stored))
        verdict = self.replay.segment(stage, first, count, digest(data), data)
        facts: list[AnyFact] = []
        if not verdict.same:
            arguments: Where = None
            if count > 1:
                arguments = self.blobs.put(data) if self.dice.random() < 0.5 else data
            facts.append(SegmentsCut(stage, first, ((count, len(data), digest(data)),), arguments))
            facts += [one.fact for one in verdict.reuse]
        self.propose(*facts)
        missing = dict(enumerate(calls, first))
        for one in verdict.reuse:
            assert isinstance(one.result, RangeDone)
            assert isinstance(one.fact, RangeDone)
            self.moved += (one.result.stage, one.source_first) != (stage, one.lo)
            values = self.values(one.fact)
            assert values == self.values(one.result)
            own = [missing.pop(task) for task in range(one.lo, one.hi)]
            assert len(own) == len(values)
            assert all(value.startswith(f"{call}") for call, value in zip(own, values, strict=True)), "of another call"
            self.offers.append((stage, one.lo, one.hi, list(zip(own, values, strict=True))))
        if missing:
            self.todo.append((stage, sorted(missing.items())))

    def values(self, done: RangeDone) -> list[str]:
        values: list[str] = msgspec.msgpack.decode(self.blobs.get(done.result))
        return values[done.lo - done.first : done.hi - done.first]

    def offer(self, stage: int, lo: int, hi: int, item: list[tuple[Call, str]]) -> None:
        for offer in self.replay.order.offer(stage, lo, hi, item):
            self.delivered += offer.item

    def offer_reused(self) -> None:
        for offer in shuffled(self.dice, self.offers):
            self.offer(*offer)
        self.offers.clear()

    def work(self, everything: bool) -> int:
        """Run some of what is missing, in ranges. Returns how many tasks."""
        ran = 0
        for stage, tasks in shuffled(self.dice, self.todo):
            while tasks and (everything or self.dice.random() < 0.8):
                length = self.dice.randint(1, 3)
                part = [one for at, one in enumerate(tasks[:length]) if one[0] == tasks[0][0] + at]
                del tasks[: len(part)]
                lo, hi = part[0][0], part[-1][0] + 1
                values = [self.run(call) for _, call in part]
                result: Where = msgspec.msgpack.encode(["pad", *values])
                if self.dice.random() < 0.5:
                    assert isinstance(result, bytes)
                    result = self.blobs.put(result)
                for a, b, turn in self.replay.order.cuts(stage, lo, hi):
                    self.propose(RangeDone(stage, a, b, lo - 1, result, P, 5, turn))
                    self.offer(stage, a, b, [(call, values[task - lo]) for task, call in part if a <= task < b])
                ran += hi - lo
        return ran


def shuffled(dice: random.Random, items: Sequence[T]) -> list[T]:
    """In another order."""
    return dice.sample(items, len(items))


def chunks(dice: random.Random, items: list[T], most: int) -> list[list[T]]:
    """Cut somewhere."""
    out: list[list[T]] = []
    while items:
        length = dice.randint(1, most)
        out.append(items[:length])
        items = items[length:]
    return out


class Leaders(RuleBasedStateMachine):
    """`history`: what the driver was given and the record has, in order: (call, value), value None when no copy is left."""

    def __init__(self) -> None:
        super().__init__()
        self.chronicle = Chronicle()
        self.blobs = Blobs()
        self.runs = 0
        self.calls: list[Call] = []
        self.history: list[tuple[Call, str | None]] = []

    @initialize(calls=st.lists(st.tuples(st.sampled_from("fg"), st.integers(0, 3)), min_size=1, max_size=14))
    def job(self, calls: list[Call]) -> None:
        self.calls = calls

    def run(self, call: Call) -> str:
        self.runs += 1
        return f"{call} run {self.runs}"

    def sent(self, dice: random.Random, threads: bool) -> list[tuple[str, list[list[Call]]]]:
        """The job's calls as stages of segments."""
        stages = []
        calls = shuffled(dice, self.calls) if threads else self.calls
        for function in "fg":
            own = [call for call in calls if call[0] == function]
            stages += [(function, chunks(dice, stage, 5)) for stage in chunks(dice, own, 14)]
        return shuffled(dice, stages) if threads else stages

    @rule(seed=st.integers(0, 1 << 32), threads=st.booleans())
    def lead(self, seed: int, threads: bool) -> None:
        epoch = Epoch(self.chronicle, self.blobs, self.run, random.Random(seed))
        for function, segments in self.sent(epoch.dice, threads):
            first = segment([argument for _, argument in segments[0]])
            stage = epoch.open(function, first, len(segments[0]))
            at = 0
            for calls in segments:
                epoch.declare(stage, at, calls, segment([argument for _, argument in calls]))
                at += len(calls)
        missing = Counter(call for _, tasks in epoch.todo for _, call in tasks)
        known = Counter(call for call, value in self.history if value is not None)
        assert missing == Counter(self.calls) - known, "ran again, or was lost"
        epoch.offer_reused()
        ran = epoch.work(everything=any(value is None for _, value in self.history))  # else a call loses its turn, too
        self.check(epoch, ran)

    def check(self, epoch: Epoch, ran: int) -> None:
        """What is recorded came in the recorded order, what ran for the first time behind it."""
        assert epoch.replay.order.over
        assert not epoch.replay.order.held
        recorded = [value for _, value in self.history]
        values = [value for _, value in epoch.delivered]
        assert len(set(values)) == len(values) == len([value for value in recorded if value is not None]) + ran
        history: list[tuple[Call, str | None]] = []
        fresh = [one for one in epoch.delivered if one[1] not in recorded]
        for call, value in self.history:
            if value is not None:
                history.append((call, value))
            else:  # lost: an equal call ran again in its place, if it ran
                again = next((one for one in fresh if one[0] == call), None)
                if again is not None:
                    fresh.remove(again)
                history.append(again or (call, None))
        history += fresh
        assert epoch.delivered == history, "delivered in another order"
        self.history = history

    @precondition(lambda self: any(value for _, value in self.history))
    @rule(seed=st.integers(0, 1 << 32))
    def lose(self, seed: int) -> None:
        """No copy of some results is left."""
        value = random.Random(seed).choice([value for _, value in self.history if value])
        gone = {value}
        while True:  # ranges of one result go together, and so do the places where one was recorded again
            before = len(gone)
            for stage, one, values in self.recorded():
                if gone & set(values):
                    gone.update(values)
                    self.chronicle.apply(Redo(stage, one.lo, one.hi))
            if len(gone) == before:
                break
        self.history = [(call, None if value in gone else value) for call, value in self.history]

    def recorded(self) -> list[tuple[int, Done, list[str]]]:
        return [
            (stage.index, one, msgspec.msgpack.decode(self.blobs.get(one.result))[one.lo - one.first : one.hi - one.first])
            for stage in self.chronicle.stages.values()
            for table in (stage.results, stage.left_results)
            for one in (table.all() if table is not None else ())
        ]

    @rule()
    def power_off(self) -> None:
        self.chronicle = Chronicle.restore(self.chronicle.snapshot())


TestLeaders = Leaders.TestCase
TestLeaders.settings = settings(deadline=None, max_examples=400, stateful_step_count=8)


def test_call_without_a_result_takes_the_turn_of_an_equal_one_that_was_lost() -> None:
    """The second of three equal calls is recorded alike, but at a place that never had a result; two others' were lost."""
    leaders = Leaders()
    leaders.job([("f", 0), ("f", 0), ("g", 1), ("g", 1), ("g", 1)])
    leaders.lead(95148, True)
    leaders.lead(0, False)
    leaders.lose(0)
    leaders.lose(8192)
    leaders.lead(3142732, True)
    assert len(leaders.history) == 5


@pytest.mark.parametrize("seed", range(60))
def test_many_leaders_in_a_row(seed: int) -> None:
    """Longer jobs than Hypothesis comes to."""
    dice = random.Random(seed)
    leaders = Leaders()
    leaders.job([(dice.choice("fg"), dice.randint(0, dice.choice((2, 30)))) for _ in range(dice.randint(5, 40))])
    for _ in range(8):
        leaders.lead(dice.getrandbits(32), dice.random() < 0.5)
        if dice.random() < 0.3 and leaders.history:
            leaders.lose(dice.getrandbits(32))
        if dice.random() < 0.3:
            leaders.power_off()
    assert len(leaders.history) == len(leaders.calls)


@pytest.mark.parametrize("seed", range(40))
def test_leaders_die_while_they_replay(seed: int) -> None:
    """One thread sends its calls in bursts that are cut elsewhere each time; its leader dies between two of them."""
    dice = random.Random(seed)
    leaders = Leaders()
    calls = [("f", dice.randint(0, 5)) for _ in range(25)]
    leaders.job(calls)
    for _ in range(6):
        epoch = Epoch(leaders.chronicle, leaders.blobs, leaders.run, random.Random(dice.getrandbits(32)))
        segments = chunks(dice, calls, 9)
        stage = epoch.open("f", segment([argument for _, argument in segments[0]]), len(segments[0]))
        at = 0
        for part in segments[: dice.randint(1, len(segments))]:
            epoch.declare(stage, at, part, segment([argument for _, argument in part]))
            at += len(part)
        missing = sum(len(tasks) for _, tasks in epoch.todo)
        recorded = sum(1 for value in leaders.history if value)
        epoch.offer_reused()
        if at < len(calls):
            assert epoch.delivered == leaders.history[: len(epoch.delivered)]
            continue
        assert missing == len(calls) - recorded, "a result was lost with a leader"
        leaders.check(epoch, epoch.work(everything=False))


def test_nested_calls_and_maps_of_a_task_that_runs_again() -> None:
    """They have no turns; each parent has its own."""
    blobs, chronicle = Blobs(), Chronicle()
    runs: list[Call] = []

    def run(call: Call) -> str:
        runs.append(call)
        return f"{call} run {len(runs)}"

    for cuts in ((3, 3), (6,), (1, 5), (2, 2, 2)):
        epoch = Epoch(chronicle, blobs, run, random.Random(1))
        for parent in ((9, 0), (9, 1)):
            stage = epoch.open("f", segment(list(range(cuts[0]))), cuts[0], parent)
            at = 0
            for count in cuts:
                numbers = list(range(at, at + count))
                epoch.declare(stage, at, [("f", number) for number in numbers], segment(numbers))
                at += count
        for kind in (True, False):
            data = segment([7, 8, 9], kind=ONE)
            stage = epoch.open("g", data, 3, (9, 1), ordered=kind)
            epoch.declare(stage, 0, [("g", number) for number in (7, 8, 9)], data)
        epoch.offer_reused()
        epoch.work(everything=True)
        assert not epoch.replay.order.held
    assert Counter(runs) == Counter([("f", number) for number in range(6)] * 2 + [("g", number) for number in (7, 8, 9)] * 2)
