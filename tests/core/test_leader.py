"""A job's leader with its producer and a site of fakes: every task's final word reaches the producer once, in order."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid import body as bodies
from grid import leader as leading
from grid.api import wire
from grid.body import Body, FileSlice
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.deque import RangeDeque, Work
from grid.core.errors import RefusedError
from grid.core.ledger import DIED, RAISED
from grid.leader import Leader, post_body
from grid.producer import Producer
from grid.siteworker import SiteWorker
from tests.core.fakes import DIGEST, FUNCTION, JOB, FakeChild, Place, result_bytes, segment_bytes, settle

ME, THIEF = PeerId(b"m" * 20), PeerId(b"t" * 20)


class Driver:
    """The child's end of a producer's channel: what it got."""

    def __init__(self, spool: bodies.Spool) -> None:
        self.got: list[tuple[Any, bytes]] = []
        self.spool = spool

    def post(self, message: wire.ToChild, body: Body) -> None:
        post_body(self.spool, self._frame, message, body)

    def _frame(self, message: wire.ToChild, data: bytes) -> None:
        self.got.append((message, data))

    def results(self, stage: int = 0) -> list[tuple[int, int]]:
        return [(m.lo, m.hi) for m, _ in self.got if isinstance(m, wire.Result) and m.stage == stage]

    def values(self, stage: int = 0) -> dict[int, int]:
        """The value of each task, read as a child reads it: of a segment only what the frame names, a file once."""
        found: dict[int, int] = {}
        for message, data in self.got:
            if not isinstance(message, wire.Result) or message.stage != stage:
                continue
            if message.path:
                data = Path(message.path).read_bytes()
                Path(message.path).unlink()
            values = json.loads(data)[message.skip : message.skip + message.hi - message.lo]
            assert len(values) == message.hi - message.lo
            for index, value in zip(range(message.lo, message.hi), values, strict=True):
                assert index not in found, "delivered twice"
                found[index] = value
        return found

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message, _ in self.got if isinstance(message, kind)]


class World:
    """A leader whose own site has no slot unless it is given some: the tests finish tasks themselves."""

    def __init__(self, nursery: trio.Nursery, folder: Path, slots: int = 0) -> None:
        self.prints: list[tuple[PeerId, int, int, int, bytes]] = []
        self.spool = bodies.Spool(folder)
        self.leader = Leader(JOB, ME, StageOptions(), self.spool, lambda *entry: self.prints.append(entry))
        self.place = Place(nursery, folder, self.leader, slots)
        self.leader.site = self.place.site
        self.driver = Driver(self.spool)
        self.producer = Producer(self.leader, self.driver.post, nested=False)

    def open(self, stage: int = 0, ordered: bool = True, **options: Any) -> None:
        self.producer.handle(wire.Define(0, "f"), FUNCTION)
        self.producer.handle(wire.Stage(stage, 0, "f", ordered, wire.Options(**options)), b"")

    def page(self, *sizes: int, stage: int = 0, final: bool = False, filler: int = 0) -> None:
        """Segments of so many tasks each."""
        first = lo = self.leader.ledger.stage(self.job_stage(stage)).declared
        pieces = []
        for size in sizes:
            pieces.append(segment_bytes(lo, lo + size) + b" " * filler)
            lo += size
        lengths = tuple(map(len, pieces))
        self.producer.handle(wire.Page(stage, first, sizes, lengths, final=final), b"".join(pieces))

    def job_stage(self, stage: int) -> int:
        return self.producer._stages[stage].index

    def done(self, lo: int, hi: int, stage: int = 0, peer: PeerId = THIEF, body: Body | None = None, first: int = -1) -> int:
        first = lo if first < 0 else first
        return self.leader.complete(peer, stage, DIGEST, lo, hi, first, result_bytes(first, hi) if body is None else body)

    def fails(self, index: int, kind: str = RAISED, stage: int = 0) -> None:
        failed = wire.Failed(0, index, kind, "ValueError", "no", "trace", 1, False)
        self.leader.fail(THIEF, stage, DIGEST, failed, b"pickle")

    def file(self, data: bytes) -> FileSlice:
        file = self.spool.write("result", data)
        file.owners = 1
        return FileSlice(file, 0, len(data))

    @property
    def files(self) -> list[Path]:
        return sorted(self.spool.folder.iterdir())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, tmp_path)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[World]:
    """With a slot of its own."""
    async with trio.open_nursery() as nursery:
        yield World(nursery, tmp_path, slots=1)
        nursery.cancel_scope.cancel()


def values(lo: int, hi: int) -> dict[int, int]:
    return {index: index * 10 for index in range(lo, hi)}


# ---- delivery --------------------------------------------------------------------------------------------------------


async def test_ordered_stage_delivers_in_order(world: World) -> None:
    world.open()
    world.page(10, final=True)
    world.done(5, 10)
    assert world.driver.results() == []
    world.done(0, 5)
    assert world.driver.results() == [(0, 5), (5, 10)]
    assert world.driver.values() == values(0, 10)
    assert world.leader.unsettled == 0


async def test_unordered_stage_delivers_as_they_come(world: World) -> None:
    world.open(ordered=False)
    world.page(10)
    world.done(5, 10)
    world.done(0, 5)
    assert world.driver.results() == [(5, 10), (0, 5)]


async def test_completion_that_overlaps_an_earlier_one(world: World) -> None:
    world.open()
    world.page(10)
    assert world.done(3, 6) == 3
    assert world.done(0, 10) == 7
    assert world.driver.values() == values(0, 10)
    assert world.leader.tallies[THIEF].done == 10
    assert world.leader.tallies[THIEF].executed == 13


async def test_large_result_that_overlaps_an_earlier_one(world: World) -> None:
    """Both of its new parts need the file, and a child unlinks what it gets."""
    world.open()
    world.page(10)
    world.done(3, 6)
    body = world.file(result_bytes(0, 10) + b" " * wire.INLINE_BYTES_MAX)
    world.done(0, 10, body=body)
    assert world.driver.values() == values(0, 10)
    assert world.files == []


async def test_late_completion_is_ignored_and_its_file_goes(world: World) -> None:
    world.open()
    world.page(4)
    world.done(0, 4)
    assert world.done(0, 4, body=world.file(b"x" * 2_000_000)) == 0
    assert world.files == []
    assert world.driver.results() == [(0, 4)]


async def test_completion_of_another_function_is_refused(world: World) -> None:
    world.open()
    world.page(4)
    with pytest.raises(RefusedError):
        world.leader.complete(THIEF, 0, b"other", 0, 4, 0, b"[]")
    assert world.leader.unsettled == 4


async def test_reader_that_does_not_read_gets_no_more_than_its_credit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.open()
    world.page(100)
    piece = b" " * 1_000_000
    for task in range(100):
        world.done(task, task + 1, body=result_bytes(task, task + 1) + piece)
    sent = len(world.driver.results())
    assert sent == limits.CREDIT_BYTES // 1_000_000 + 1
    world.producer.handle(wire.Consumed(0, 2_000_008), b"")
    assert len(world.driver.results()) == sent + 2


async def test_unread_results_are_spilled_and_come_back_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESULT_MEMORY_BYTES_MAX", 10_000)
    world.open()
    world.page(3000)
    for task in range(2999, 0, -1):
        world.done(task, task + 1, body=result_bytes(task, task + 1) + b" " * 100)
        assert world.producer._result_bytes <= 10_000
    assert 0 < len(world.files) < 100, "many results to a file"
    world.done(0, 1)
    assert world.driver.values() == values(0, 3000)
    assert world.files == []
    assert world.producer._result_bytes == 0


async def test_results_of_an_unread_stage_make_room_for_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every small result of the second stage may cost a file because the first holds the memory."""
    world.open()
    world.open(stage=1)
    world.page(100)
    world.page(1000, stage=1)
    for task in range(99, 0, -1):
        world.done(task, task + 1, body=result_bytes(task, task + 1) + b" " * 1000)
    monkeypatch.setattr(limits, "RESULT_MEMORY_BYTES_MAX", 100_000)
    for task in range(999, 0, -1):
        world.done(task, task + 1, stage=1, body=result_bytes(task, task + 1) + b" " * 10)
    assert len(world.files) <= 3
    world.done(0, 1)
    world.done(0, 1, stage=1)
    assert world.driver.values() == values(0, 100)
    assert world.driver.values(1) == values(0, 1000)


# ---- failures --------------------------------------------------------------------------------------------------------


async def test_failure_is_delivered_in_its_place(world: World) -> None:
    world.open()
    world.page(3)
    world.fails(1)
    world.done(2, 3)
    world.done(0, 1)
    kinds = [type(message) for message, _ in world.driver.got]
    assert kinds == [wire.Result, wire.Failure, wire.Result]
    failure, body = world.driver.got[1]
    assert (failure.index, failure.kind, failure.type_name, body) == (1, RAISED, "ValueError", b"pickle")
    assert world.leader.ledger.stage(0).failed == 1


async def test_task_that_may_be_retried_is_queued_first_with_its_attempt(world: World) -> None:
    world.open(retries=1)
    world.page(10)
    world.place.site.deque.remove(0, 0, 5)
    world.fails(3)
    assert next(iter(world.place.site.deque)) == Work(0, 3, 4)
    assert world.place.site.stages[0].attempts == {3: 1}
    assert world.driver.got == []
    world.fails(3)
    world.done(0, 3)
    assert [failure.index for failure in world.driver.of(wire.Failure)] == [3]


async def test_task_that_kills_its_workers_is_given_up(world: World) -> None:
    world.open()
    world.page(1)
    for _ in range(limits.RETRIES_LOST_MAX):
        world.fails(0, DIED)
        assert world.driver.got == []
    world.fails(0, DIED)
    assert [failure.kind for failure in world.driver.of(wire.Failure)] == [DIED]


async def test_failure_after_another_peer_finished_the_task(world: World) -> None:
    world.open()
    world.page(1)
    world.done(0, 1)
    world.fails(0)
    assert [type(message) for message, _ in world.driver.got] == [wire.Result]


async def test_large_exception_goes_into_the_frame(world: World) -> None:
    world.open()
    world.page(1)
    failed = wire.Failed(0, 0, RAISED, "E", "", "", 1, True)
    world.leader.fail(THIEF, 0, DIGEST, failed, b"x" * wire.INLINE_BYTES_MAX)
    assert [type(message) for message, _ in world.driver.got] == [wire.Failure]


# ---- cancel, close ---------------------------------------------------------------------------------------------------


async def test_cancel_of_one_task_is_told_in_its_place(world: World) -> None:
    world.open()
    world.page(3)
    world.producer.handle(wire.Cancel(0, 1, 2), b"")
    assert not world.place.site.deque.holds(0, 1, 2)
    world.done(0, 1)
    world.done(2, 3)
    assert [type(message) for message, _ in world.driver.got] == [wire.Result, wire.Cancelled, wire.Result]


async def test_cancelled_stage_leaves_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that breaks off its loops over large maps, again and again."""
    monkeypatch.setattr(limits, "RESULT_MEMORY_BYTES_MAX", 10_000)
    for stage in range(5):
        world.open(stage=stage)
        world.page(100, stage=stage, filler=1000)
        for task in range(1, 60):
            world.done(task, task + 1, stage=stage, body=result_bytes(task, task + 1) + b" " * 1000)
        world.producer.handle(wire.Cancel(stage, 0, -1), b"")
        assert world.leader.ledger.stage(stage).complete
    assert world.producer._result_bytes == 0
    assert world.leader.argument_bytes == 0
    assert world.leader._argument_memory == 0
    assert world.files == []
    assert not world.place.site.deque
    assert world.driver.got == [], "whoever cancelled everything waits for nothing"


async def test_pages_that_come_after_the_cancel_are_let_go(world: World) -> None:
    world.open()
    world.page(5)
    world.producer.handle(wire.Cancel(0, 0, -1), b"")
    page = world.file(segment_bytes(5, 9))
    world.producer.handle(wire.Page(0, 5, (4,), (page.length,)), page)
    world.producer.handle(wire.Close(0, 9), b"")
    world.producer.handle(wire.Consumed(0, 100), b"")
    assert world.files == []
    assert world.leader.ledger.stage(0).complete
    assert not world.place.site.deque


async def test_end_of_the_child_cancels_its_stages(world: World) -> None:
    world.open()
    world.page(10)
    world.done(5, 6, body=world.file(b"x" * 2_000_000))
    world.producer.close()
    assert world.leader.unsettled == 0
    assert not world.place.site.deque
    assert world.files == []
    assert world.done(0, 1, body=world.file(b"x" * 2_000_000)) == 0
    assert world.files == []


async def test_those_who_hold_cancelled_ranges_are_found_by_the_listeners(world: World) -> None:
    """Asked before the claims forget them."""
    world.open()
    world.page(10)
    world.leader.claims.claim(THIEF, {0: [(0, 5)]}, 0.0)
    heard = []

    def listen(stage: int, lo: int, hi: int) -> None:
        heard.append((lo, hi, list(world.leader.claims.held(THIEF, stage))))

    world.leader.cancelled_listeners.append(listen)
    world.producer.handle(wire.Cancel(0, 2, 4), b"")
    assert heard == [(2, 4, [(0, 5)])]
    assert list(world.leader.claims.held(THIEF, 0)) == [(0, 2), (4, 5)]


async def test_empty_stage(world: World) -> None:
    world.open()
    world.producer.handle(wire.Close(0, 0), b"")
    assert world.leader.ledger.stage(0).complete


@pytest.mark.parametrize(
    "frame",
    [
        wire.Page(7, 0, (1,), (3,)),
        wire.Page(0, 0, (1, 1), (3,)),
        wire.Page(0, 0, (1,), (4,)),
        wire.Page(0, 0, (1,), (3,), ((), ())),
        wire.Page(0, 5, (1,), (3,)),
        wire.Page(0, 0, (0,), (3,)),
        wire.Stage(0, 0, "f", True),
        wire.Stage(1, 9, "f", True),
        wire.Close(0, 4),
        wire.Cancel(3),
        wire.Consumed(3, 5),
        wire.Ready(1, "3.11"),
    ],
)
async def test_frame_that_breaks_the_contract(world: World, frame: wire.Message) -> None:
    world.open()
    with pytest.raises(RefusedError):
        world.producer.handle(frame, b"[0]")
    assert world.leader.unsettled == 0


async def test_function_over_its_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FUNCTION_BYTES_MAX", 5)
    with pytest.raises(RefusedError, match="the function f is over"):
        world.producer.handle(wire.Define(0, "f"), b"123456")


# ---- arguments -------------------------------------------------------------------------------------------------------


async def test_arguments_over_the_memory_bound_are_on_disk_until_they_are_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ARGUMENT_MEMORY_BYTES_MAX", 1000)
    world.open()
    for _ in range(20):
        world.page(5, 5, filler=100)
    assert world.leader._argument_memory <= 1000
    assert len(world.files) >= 15
    for segment in range(40):
        held = world.place.site.stages[0].held[5 * segment]
        assert held.body is not None
        assert json.loads(bodies.read(held.body)) == list(range(5 * segment, 5 * segment + 5))
    world.done(0, 5)
    before = len(world.files)
    world.done(5, 200)
    assert before > 0
    assert world.files == []
    assert world.leader.argument_bytes == world.leader._argument_memory == 0
    assert len(world.leader.ledger.stage(0).segments) == 0


async def test_producer_that_runs_ahead_is_held_and_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TASKS_AHEAD_MAX", 100)
    world.open()
    for _ in range(11):
        world.page(10)
    assert [m.hold for m in world.driver.of(wire.Throttle)] == [True]
    world.done(0, 60)
    assert [m.hold for m in world.driver.of(wire.Throttle)] == [True]
    world.done(60, 70)
    assert [m.hold for m in world.driver.of(wire.Throttle)] == [True, False]


async def test_stage_held_for_the_bytes_of_another_goes_on_when_they_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the bytes are another child's, and nothing of the held stage is left to run."""
    monkeypatch.setattr(limits, "ARGUMENT_BYTES_AHEAD_MAX", 10_000)
    world.open()
    other = Driver(world.spool)
    nested = Producer(world.leader, other.post, nested=True)
    nested.handle(wire.Define(0, "f"), FUNCTION)
    nested.handle(wire.Stage(0, 0, "g", True, parent_stage=0, parent_index=0), b"")
    large = segment_bytes(0, 1) + b" " * 20_000
    nested.handle(wire.Page(0, 0, (1,), (len(large),)), large)
    world.page(1)
    assert [m.hold for m in world.driver.of(wire.Throttle)] == [True]
    world.done(0, 1, stage=0)
    world.done(0, 1, stage=1)
    assert [m.hold for m in world.driver.of(wire.Throttle)] == [True, False]
    assert [m.hold for m in other.of(wire.Throttle)] == [True, False]
    assert not world.leader.throttled


async def test_what_does_not_fit_into_the_deque_runs_later(busy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "OVERFLOW_RANGES_MIN", 1)
    busy.place.site.deque = RangeDeque(1)
    busy.open()
    busy.page(3)
    busy.open(stage=1)
    busy.page(5, stage=1)
    assert busy.leader.unsettled == 8
    busy.leader.cancel(1, 1, 3)
    await run_all(busy)
    assert busy.driver.values() == values(0, 3)
    assert busy.driver.values(1) == {0: 0, 3: 30, 4: 40}
    assert busy.leader.unsettled == 0


# ---- its own site ----------------------------------------------------------------------------------------------------


async def run_all(world: World) -> None:
    """Answer every bundle until none comes any more."""
    answered = 0
    while True:
        await settle()
        runs = [(child, run) for child in world.place.children for run in child.runs]
        if answered == len(runs):
            return
        for child, run in runs[answered:]:
            child.finish(run)
        answered = len(runs)


async def test_job_runs_on_the_leaders_own_slots(busy: World) -> None:
    busy.open()
    busy.page(50, 50, final=True)
    await run_all(busy)
    assert busy.driver.values() == values(0, 100)
    assert busy.leader.tallies[ME].done == 100
    assert busy.leader.ledger.stage(0).complete


async def test_children_of_a_task_run_before_what_waits_and_end_with_it(busy: World) -> None:
    busy.open()
    busy.page(10)
    await settle()
    child = busy.place.children[0]
    worker = busy.place.site.workers[0]
    child.say(wire.Define(0, "g"), FUNCTION)
    child.say(wire.Stage(0, 0, "g", True, parent_stage=0, parent_index=0))
    data = segment_bytes(0, 4)
    child.say(wire.Page(0, 0, (4,), (len(data),), final=True), data)
    child.say(wire.Waiting(True))
    await settle()
    second = busy.place.children[1]
    assert second.runs[0].stage == 1
    second.finish(second.runs[0])
    await settle()
    results = [message for message, _ in child.posted if isinstance(message, wire.Result)]
    assert [(result.stage, result.lo, result.hi) for result in results] == [(0, 0, 1)], "in the child's own numbers"
    assert worker.blocked
    child.cell = (0, 1)
    child.die(-9)
    await settle()
    assert busy.leader.ledger.stage(1).complete, "its children are cancelled with it"
    assert busy.leader.ledger.stage(0).lost == {0: 1}


async def test_worker_whose_calls_break_the_contract_is_ended_with_the_reason(busy: World) -> None:
    busy.open()
    busy.page(2)
    await settle()
    child = busy.place.children[0]
    child.cell = (0, 1)
    child.say(wire.Cancel(5))
    await settle()
    assert child.why == "stage 5 was never opened"
    assert busy.leader.ledger.stage(0).lost == {0: 1}


async def test_prints_are_told_with_their_peer(busy: World) -> None:
    busy.open()
    busy.page(1)
    await settle()
    busy.place.children[0].say(wire.Print(0, 0, 2), b"oh")
    await settle()
    assert busy.prints == [(ME, 0, 0, 2, b"oh")]


# ---- what is lost ----------------------------------------------------------------------------------------------------


async def test_range_that_nobody_claims_any_more_is_queued_again(world: World) -> None:
    world.open()
    world.page(10)
    deque = world.place.site.deque
    deque.remove(0, 0, 10)
    world.leader.claims.claim(THIEF, {0: [(0, 4)]}, 0.0)
    world.leader.giving = [Work(0, 8, 10)]
    assert world.leader.sweep(0.0) == []
    assert world.leader.sweep(0.5) == [Work(0, 4, 8)]
    assert deque.ranges() == [Work(0, 4, 8)]
    world.leader.claims.lose(THIEF)
    assert world.leader.sweep(1.0) == []
    assert world.leader.sweep(1.5) == [Work(0, 0, 4)]


async def test_settled_tasks_are_not_queued_again(world: World) -> None:
    world.open()
    world.page(10)
    world.place.site.deque.remove(0, 0, 10)
    world.leader.sweep(0.0)
    world.done(2, 5)
    assert world.leader.sweep(0.5) == [Work(0, 0, 2), Work(0, 5, 10)]


async def test_task_finished_elsewhere_leaves_the_deque(world: World) -> None:
    world.open()
    world.page(10)
    world.done(2, 5)
    assert world.place.site.deque.ranges() == [Work(0, 0, 2), Work(0, 5, 10)]


async def test_producers_of_a_lost_peer_are_closed(world: World) -> None:
    driver = Driver(world.spool)
    for token in (1, 2):
        world.leader.relay_from((THIEF, token), driver.post, wire.Define(0, "f"), FUNCTION)
        world.leader.relay_from((THIEF, token), driver.post, wire.Stage(0, 0, "g", True, parent_stage=0), b"")
    assert world.leader.close_children(lambda key: isinstance(key, tuple) and key[1] == 2) == [(THIEF, 2)]
    assert [stage.complete for stage in world.leader.ledger.stages] == [False, True]
    world.leader.close_child((THIEF, 1))
    world.leader.close_child((THIEF, 1))
    assert world.leader.ledger.stage(0).complete


# ---- bodies to a child -----------------------------------------------------------------------------------------------


async def test_file_that_others_need_too_is_linked(world: World) -> None:
    body = world.file(b"x" * 2_000_000)
    body.file.owners = 2
    for _ in range(2):
        post_body(world.spool, world.driver._frame, wire.Result(0, 0, 1), body)
    first, second = (Path(message.path) for message in world.driver.of(wire.Result))
    assert first != second
    first.unlink()
    assert second.stat().st_size == 2_000_000
    second.unlink()
    assert world.files == []


async def test_file_of_the_blob_store_is_never_given_away(world: World) -> None:
    path = world.spool.folder / "blob"
    path.write_bytes(b"x" * 2_000_000)
    post_body(world.spool, world.driver._frame, wire.Result(0, 0, 1), bodies.whole_file(str(path), owned=False))
    (message,) = world.driver.of(wire.Result)
    assert message.path != str(path)
    await trio.Path(message.path).unlink()
    assert path.exists()


def test_site_worker_survives_a_child_that_is_gone() -> None:
    child = FakeChild()
    child.die(0)
    worker = SiteWorker(child, 1)  # type: ignore[arg-type]
    worker.post(wire.Stop())
    worker.end("idle")
    assert child.why == ""
