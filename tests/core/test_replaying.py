"""A later leader: the driver makes its calls anew, what is recorded is delivered, the rest runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from grid import body as bodies
from grid.api import wire
from grid.core import limits
from grid.core.bundle import segment_name
from grid.core.chronicle import Chronicle
from grid.core.errors import RefusedError
from grid.core.facts import RangeDone, SegmentsCut, StageClosed, StageOpened, TaskFailed
from grid.core.ledger import RAISED
from grid.core.liveness import Claims
from grid.recorder import LogRecorder
from grid.replaying import COMPARE_S, GRACE_S, Replaying
from tests.core.fakes import result_bytes, segment_bytes
from tests.core.test_leader import ME, THIEF, World, values


class Log:
    """A replica that commits at once."""

    def __init__(self, chronicle: Chronicle) -> None:
        self.chronicle = chronicle
        self.facts: list[Any] = []

    def propose(self, facts: Sequence[Any], patient: bool = False) -> int:
        for fact in facts:
            self.chronicle.apply(fact)
        self.facts += facts
        return len(self.facts)


class Led(World):
    """A leadership that records, and replays what is recorded."""

    def __init__(self, nursery: trio.Nursery, folder: Path, chronicle: Chronicle) -> None:
        super().__init__(nursery, folder)
        self.log = Log(chronicle)
        self.told: list[str] = []
        leader = self.leader
        leader.ledger.next_stage = chronicle.next_stage
        recorder = LogRecorder(leader.job, ME, self.log, None, self.spool)  # type: ignore[arg-type]
        leader.recorder = recorder
        if chronicle.stages:
            leader.replaying = Replaying(chronicle, leader, recorder, None, nursery, lambda key, text: self.told.append(key))

    def job_stage(self, stage: int) -> int:
        known = self.producer._stages.get(stage)
        return known.index if known is not None else -1

    def page(self, *sizes: int, stage: int = 0, final: bool = False, filler: int = 0, first: int = -1, shift: int = 0) -> None:
        """shift: added to the tasks' arguments, so that their bytes differ."""
        lo = (
            first if first >= 0 else self.leader.ledger.stage(self.job_stage(stage)).declared if self.job_stage(stage) >= 0 else 0
        )
        first = lo
        pieces = []
        for size in sizes:
            pieces.append(segment_bytes(lo + shift, lo + size + shift) + b" " * filler)
            lo += size
        lengths = tuple(map(len, pieces))
        self.producer.handle(wire.Page(stage, first, sizes, lengths, final=final), b"".join(pieces))

    @property
    def queued(self) -> int:
        return self.leader.site.deque.total

    def kinds(self) -> list[type[Any]]:
        return [type(fact) for fact in self.log.facts]


class Job:
    """One job under one leader after the other."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.chronicle = Chronicle()
        self._nursery = nursery
        self._folder = folder
        self._count = 0

    def lead(self) -> Led:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return Led(self._nursery, folder, Chronicle.restore(self.chronicle.snapshot()) if self._count > 1 else self.chronicle)

    def next(self, led: Led) -> Led:
        """The leader is gone; another has its log."""
        self.chronicle = led.log.chronicle
        return self.lead()


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Job]:
    async with trio.open_nursery() as nursery:
        yield Job(nursery, tmp_path)
        nursery.cancel_scope.cancel()


async def test_finished_tasks_do_not_run_again(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(10, 10, final=True)
    first.done(0, 7)
    first.done(12, 20)
    assert first.kinds() == [StageOpened, SegmentsCut, StageClosed, RangeDone, RangeDone]
    second = job.next(first)
    second.open()
    second.page(10, 10, final=True)
    assert second.driver.values() == values(0, 7)
    await trio.sleep(GRACE_S * 1.5)
    assert second.queued == 5
    assert second.log.facts == []  # everything is recorded already
    second.done(7, 12)
    assert second.driver.values() == values(0, 20)


async def test_third_leader_has_what_the_second_did(job: Job, autojump_clock: Any) -> None:
    led = job.lead()
    for done in ((0, 4), (4, 8), (8, 12)):
        led.open()
        led.page(12, final=True)
        await trio.sleep(GRACE_S * 1.5)
        led.done(*done)
        led = job.next(led)
    led.open()
    led.page(12, final=True)
    assert led.driver.values() == values(0, 12)
    assert led.leader.unsettled == 0


async def test_failure_for_good_is_told_again_not_run_again(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(3, final=True)
    first.fails(1)
    assert TaskFailed in first.kinds()
    second = job.next(first)
    second.open()
    second.page(3, final=True)
    second.done(0, 1)
    second.done(2, 3)
    (failure,) = second.driver.of(wire.Failure)
    assert (failure.index, failure.kind, failure.message, failure.traceback) == (1, RAISED, "no", "trace")


async def test_other_arguments_run(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(5, 5, final=True)
    first.done(0, 10)
    second = job.next(first)
    second.open()
    second.page(5, first=0)
    second.page(5, shift=100, final=True)
    await trio.sleep(GRACE_S * 1.5)
    assert second.queued == 0
    second.producer.handle(wire.Same(1, ()), b"")
    assert second.driver.values() == values(0, 5)
    assert second.queued == 5
    assert [type(fact) for fact in second.log.facts] == [SegmentsCut]


async def test_results_of_an_unordered_stage_come_in_the_recorded_order(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open(ordered=False)
    first.page(2, 2, 2, final=True)
    for lo in (4, 0, 2):
        first.done(lo, lo + 2)
    assert first.driver.results() == [(4, 6), (0, 2), (2, 4)]
    second = job.next(first)
    second.open(ordered=False)
    second.page(2)
    assert second.driver.results() == []
    second.page(2, 2, final=True)
    assert second.driver.results() == [(4, 6), (0, 2), (2, 4)]


async def test_recorded_order_that_the_driver_does_not_follow_is_given_up(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open(ordered=False)
    first.page(2, 2)
    first.done(2, 4)
    first.done(0, 2)
    second = job.next(first)
    second.open(ordered=False)
    second.page(2)  # and waits for these before it goes on
    await trio.sleep(GRACE_S * 1.5)
    for _ in range(4):
        assert second.driver.results() == []
        second.leader.sweep(trio.current_time())
        if second.driver.results():
            break
    assert second.driver.results() == [(0, 2)]


async def test_what_helpers_hold_does_not_run_here_too(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(10, final=True)
    second = job.next(first)
    second.open()
    second.page(10, final=True)
    assert second.queued == 0
    second.leader.claims.claim(THIEF, {0: [(3, 8)]}, trio.current_time())
    await trio.sleep(GRACE_S * 1.5)
    assert [(work.lo, work.hi) for work in second.leader.site.deque.ranges()] == [(0, 3), (8, 10)]


async def test_sweeps_in_the_grace_do_not_requeue(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(10, final=True)
    second = job.next(first)
    second.open()
    second.page(10, final=True)
    assert isinstance(second.leader.claims, Claims)
    for _ in range(4):
        assert second.leader.sweep(trio.current_time()) == []
    assert second.queued == 0


async def test_results_without_bytes_run_again(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(4, final=True)
    large = json.dumps([index * 10 for index in range(4)]).encode() + b" " * 5000  # cheap to make: not kept
    first.done(0, 4, body=large)
    assert first.log.facts[-1].result is None
    second = job.next(first)
    second.open()
    second.page(4, final=True)
    await trio.sleep(GRACE_S * 1.5)
    assert second.driver.values() == {}
    assert second.queued == 4
    second.done(0, 4)
    third = job.next(second)
    third.open()
    third.page(4, final=True)
    assert third.driver.values() == values(0, 4)


async def test_completion_for_other_arguments_is_refused(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(4, final=True)
    held = first.leader.site.stages[0].held[0]
    second = job.next(first)
    second.open()
    second.page(4, shift=7, final=True)
    with pytest.raises(RefusedError, match="other arguments"):
        second.leader.check_segment(0, 0, segment_name(0, held.digest))
    digest = second.leader.site.stages[0].held[0].digest
    second.leader.check_segment(0, 0, segment_name(0, digest))
    with pytest.raises(RefusedError, match="other arguments"):
        second.leader.check_segment(0, 1, segment_name(1, digest))  # the same bytes, declared one task further on


async def test_completion_for_a_segment_that_is_being_hashed(job: Job, tmp_path: Path, autojump_clock: Any) -> None:
    """A large one runs before its name is known; who says what it ran is believed only if that is its name."""
    led = job.lead()
    led.open()
    data = segment_bytes(0, 1) + b" " * limits.SEGMENT_INLINE_BYTES
    page = tmp_path / "page"
    page.write_bytes(data)
    led.producer.handle(wire.Page(0, 0, (1,), (len(data),), final=True), bodies.whole_file(str(page)))
    assert led.queued == 1
    held = led.leader.site.stages[0].held[0]
    assert not held.digest
    assert SegmentsCut not in led.kinds()
    with pytest.raises(RefusedError, match="other arguments"):
        led.leader.check_segment(0, 0, segment_name(0, bytes(32)))
    led.leader.check_segment(0, 0, segment_name(0, bodies.hash_of(data)))


async def test_two_stages_alike_go_on_as_they_began(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    for stage in (0, 1):
        first.open(stage)
        first.page(3, stage=stage, final=True, shift=stage * 50)
    first.leader.complete(THIEF, 1, first.leader.ledger.stage(1).function, 0, 3, 0, result_bytes(0, 3))
    second = job.next(first)
    for stage in (1, 0):  # opened in another order
        second.producer.handle(wire.Define(stage, "f"), first.leader.functions[first.leader.ledger.stage(0).function])  # type: ignore[arg-type]
        second.producer.handle(wire.Stage(stage, stage, "f", True), b"")
        second.page(3, stage=stage, final=True, shift=stage * 50)
    assert second.job_stage(1) == 1
    assert second.job_stage(0) == 0
    assert second.driver.values(1) == values(0, 3)
    assert second.driver.values(0) == {}


async def test_items_that_differ_in_their_bytes_only_are_compared_by_the_driver(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(10, final=True)
    first.done(0, 8)
    second = job.next(first)
    second.open()
    second.page(10, filler=3, final=True)
    await trio.sleep(GRACE_S * 1.5)
    assert second.queued == 0  # nothing runs before the driver has answered
    ((question, body),) = [(m, data) for m, data in second.driver.got if isinstance(m, wire.Compare)]
    assert (question.stage, question.first, question.count) == (0, 0, 10)
    assert body[: question.old_bytes] == segment_bytes(0, 10)
    assert body[question.old_bytes :] == segment_bytes(0, 10) + b"   "
    second.producer.handle(wire.Same(question.id, ((0, 3), (4, 9))), b"")
    assert second.driver.results() == [(0, 3)]  # task 3 comes first
    assert [(work.lo, work.hi) for work in second.leader.site.deque.ranges()] == [(3, 4), (8, 10)]
    second.done(3, 4)
    assert second.driver.values() == values(0, 8)
    second.leader.replaying.end()
    assert second.told == ["calls"]  # the recorded result of task 3 was of no use
    third = job.next(second)
    third.open()
    third.page(10, filler=3, final=True)
    assert third.driver.values() == values(0, 8)


async def test_driver_that_does_not_answer_has_its_tasks_run(job: Job, autojump_clock: Any) -> None:
    first = job.lead()
    first.open()
    first.page(10, final=True)
    first.done(0, 10)
    second = job.next(first)
    second.open()
    second.page(10, filler=3, final=True)
    await trio.sleep(COMPARE_S * 1.5)
    assert second.queued == 10
    second.producer.handle(wire.Same(1, ((0, 10),)), b"")  # too late
    assert second.driver.values() == {}
