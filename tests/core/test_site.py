"""A job's place on one peer, with fake workers: no range is lost or run twice, whatever ends a worker."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from grid import body as bodies
from grid import siteworker
from grid.api import wire
from grid.core import limits
from grid.core.bundle import StageOptions
from grid.core.deque import RangeDeque, Work
from grid.core.ledger import DIED, TIMEOUT
from grid.core.segments import Segment
from grid.site import Site
from grid.worker.fork_server import WorkerStartError
from grid.workshop import Workshop
from tests.core.fakes import DIGEST, FUNCTION, FakeChild, FakeUplink, Place, result_bytes, segment_bytes, settle

Make = Callable[..., Place]


@pytest.fixture
def uplink() -> FakeUplink:
    return FakeUplink()


@pytest.fixture
async def make(tmp_path: Path, uplink: FakeUplink) -> AsyncIterator[Make]:
    places = 0

    async with trio.open_nursery() as nursery:

        def place(slots: int = 1, workshop: Workshop | None = None, **options: object) -> Place:
            nonlocal places
            places += 1
            made = StageOptions(**options)  # type: ignore[arg-type]
            return Place(nursery, tmp_path / f"spool{places}", uplink, slots, workshop, made)

        yield place
        nursery.cancel_scope.cancel()


def held(site: Site, stage: int = 0) -> list[tuple[int, int]]:
    return list(site.held().get(stage, ()))


def known_pace(place: Place, per_task_s: float, stage: int = 0) -> None:
    """As if bundles of 1000 such tasks had been measured."""
    place.site.stages[stage].pace.record(1000, 1000 * per_task_s)


async def started(place: Place, tasks: int, segment: int = 0) -> FakeChild:
    """Tasks are queued, and the first worker runs its first bundle."""
    segment = segment or tasks
    for first in range(0, tasks, segment):
        place.hold(first, min(segment, tasks - first))
    place.site.push([Work(0, 0, tasks)])
    await settle()
    return place.children[0]


# ---- bundles ---------------------------------------------------------------------------------------------------------


async def test_worker_runs_everything_in_order(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 100, 30)
    done = 0
    while len(uplink.results) < 60 and done < len(child.runs):
        while done < len(child.runs):
            child.finish(child.runs[done])
            done += 1
        await settle()
    ranges = [(lo, hi) for _, lo, hi, _ in uplink.results]
    assert ranges[0] == (0, 1), "an unknown pace starts with one task"
    assert [lo for lo, _ in ranges] == [0, *[hi for _, hi in ranges[:-1]]]
    assert ranges[-1][1] == 100
    assert not place.site.held()
    assert place.site.crew.executed == 100


async def test_function_is_sent_once_and_before_its_first_bundle(make: Make) -> None:
    place = make()
    child = await started(place, 10)
    child.finish(child.runs[0])
    await settle()
    kinds = [type(message) for message, _ in child.posted]
    assert kinds.count(wire.Function) == 1
    assert kinds[0] is wire.Function
    assert child.posted[0][1] == FUNCTION


async def test_tasks_wait_for_their_function(make: Make, uplink: FakeUplink) -> None:
    place = make()
    number = place.site.add_function(b"other", None)
    place.site.add_stage(1, StageOptions(), number)
    place.hold(0, 5, stage=1)
    place.site.push([Work(1, 0, 5)])
    await started(place, 3)
    assert [run.stage for child in place.children for run in child.runs] == [0]
    place.site.add_function(b"other", b"code")
    place.children[0].finish(place.children[0].runs[0])
    await settle()
    assert {run.stage for child in place.children for run in child.runs} == {0, 1}


async def test_second_bundle_ahead_only_while_tasks_are_short(make: Make) -> None:
    place = make()
    known_pace(place, 1e-5)
    child = await started(place, 1_000_000, 100_000)
    assert len(child.runs) >= limits.TICKETS_AHEAD
    slow = make()
    known_pace(slow, 1.0)
    child = await started(slow, 100)
    assert len(child.runs) == 1


async def test_bundle_never_crosses_a_segment(make: Make) -> None:
    place = make()
    known_pace(place, 1e-5)
    child = await started(place, 100, 7)
    assert all(run.first == run.lo - run.lo % 7 and run.hi <= run.first + 7 for run in child.runs)


async def test_as_many_workers_as_tasks_and_slots_start_at_once(make: Make) -> None:
    place = make(slots=4)
    place.processes.gate = trio.Event()
    place.hold(0, 3)
    place.site.push([Work(0, 0, 3)])
    await settle()
    assert place.site.crew.starting == 3
    place.processes.gate.set()
    await settle()
    assert sorted(run.lo for child in place.children for run in child.runs) == [0, 1, 2]


async def test_wide_tasks_take_their_slots(make: Make) -> None:
    place = make(slots=4, cpus=2)
    await started(place, 100)
    assert place.site.busy == 4
    assert sum(len(child.runs) for child in place.children) == 2


async def test_task_wider_than_the_machine_takes_all_of_it(make: Make) -> None:
    place = make(slots=2, cpus=64)
    await started(place, 3)
    assert place.workshop.free == 0
    assert sum(len(child.runs) for child in place.children) == 1


async def test_retried_task_runs_alone_with_its_attempt(make: Make) -> None:
    place = make()
    known_pace(place, 1e-3)
    place.site.stages[0].attempts[5] = 2
    child = await started(place, 20)
    assert [(run.lo, run.hi, run.attempt) for run in child.runs][:3] == [(0, 5, 0), (5, 6, 2), (6, 10, 0)]


async def test_held_is_exact_while_bundles_progress(make: Make) -> None:
    place = make()
    known_pace(place, 0.01)
    child = await started(place, 30)
    run = child.runs[0]
    assert held(place.site) == [(0, 30)]
    assert run.hi > 2
    child.finish(run, hi=2)
    await settle()
    assert held(place.site) == [(2, 30)]
    child.finish(run, lo=2)
    await settle()
    assert held(place.site) == [(run.hi, 30)]


# ---- workers that end ------------------------------------------------------------------------------------------------


async def test_worker_that_dies_is_blamed_for_the_task_it_ran_only(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 0.001)
    child = await started(place, 100)
    run = child.runs[0]
    assert run.hi > 12
    child.finish(run, hi=5)
    child.cell = (10, 1)
    await settle()
    child.die(-11)
    await settle()
    ((stage, failure),) = uplink.failures
    assert (stage, failure.index, failure.kind) == (0, 10, DIED)
    assert "signal 11" in failure.message
    assert held(place.site) == [(5, 10), (11, 100)]
    second = place.children[1]
    assert second.runs[0].lo == 5, "what was lost runs first"


async def test_bundles_ahead_of_a_dead_worker_run_again_in_order(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 10_000, 100)
    assert len(child.runs) > 1
    child.cell = (0, 1)
    child.die(1)
    await settle()
    assert [failure.index for _, failure in uplink.failures] == [0]
    assert "exit status 1" in uplink.failures[0][1].message
    again = place.children[1].runs
    assert again[0].lo == 1
    assert [run.lo for run in again] == sorted(run.lo for run in again)
    assert held(place.site) == [(1, 10_000)]


async def test_worker_that_dies_between_tasks_costs_nothing(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 10)
    child.die(0)
    await settle()
    assert uplink.failures == []
    assert held(place.site) == [(0, 10)]
    assert place.children[1].runs[0].lo == 0


async def test_task_that_can_not_even_begin_is_given_up(make: Make, uplink: FakeUplink) -> None:
    """Its arguments crash the worker as they are loaded: nothing ever runs."""
    place = make()
    await started(place, 10)
    for _ in range(limits.RETRIES_LOST_MAX):
        place.children[-1].die(-11)
        await settle()
        assert uplink.failures == []
    place.children[-1].die(-11)
    await settle()
    assert [failure.index for _, failure in uplink.failures] == [0]
    assert held(place.site) == [(1, 10)]


async def test_worker_that_closes_its_channel_and_lives_on_is_ended(
    make: Make, uplink: FakeUplink, autojump_clock: trio.testing.MockClock
) -> None:
    place = make()
    child = await started(place, 10)
    child.cell = (0, 1)
    child.close_channel()
    await settle()
    assert held(place.site) == [(0, 10)], "held as long as it may run"
    assert len(place.children) == 1, "and its slot with it"
    await trio.sleep(limits.WORKER_EXIT_S * 1.1)
    assert child.exited.is_set()
    assert [failure.index for _, failure in uplink.failures] == [0]
    assert place.children[1].runs[0].lo == 1


@pytest.mark.parametrize("frame", ["unknown ticket", "gap", "beyond", "empty", "failure out of turn", "no file"])
async def test_worker_that_breaks_the_protocol_is_ended_and_its_work_runs_again(
    make: Make, uplink: FakeUplink, frame: str, tmp_path: Path
) -> None:
    place = make()
    known_pace(place, 0.001)
    child = await started(place, 100)
    run = child.runs[0]
    child.say(
        {
            "unknown ticket": wire.Done(99, run.lo, run.hi, 1, True),
            "gap": wire.Done(run.ticket, run.lo + 1, run.hi, 1, True),
            "beyond": wire.Done(run.ticket, run.lo, run.hi + 1, 1, True),
            "empty": wire.Done(run.ticket, run.lo, run.lo, 1, False),
            "failure out of turn": wire.Failed(run.ticket, run.lo + 1, "raised", "", "", "", 1, False),
            "no file": wire.Done(run.ticket, run.lo, run.hi, 1, True, str(tmp_path / "nowhere")),
        }[frame]
    )
    await settle()
    assert child.why == "broke the protocol"
    assert uplink.results == []
    assert held(place.site) == [(0, 100)]
    assert place.children[1].runs[0].lo == 0


async def test_worker_that_can_not_start_is_tried_again_a_few_times(
    make: Make, uplink: FakeUplink, autojump_clock: trio.testing.MockClock
) -> None:
    place = make()
    place.processes.errors = [WorkerStartError("no memory")] * limits.RETRIES_LOST_MAX
    place.hold(0, 3)
    place.site.push([Work(0, 0, 3)])
    await trio.sleep(limits.WORKER_RESTART_S * (limits.RETRIES_LOST_MAX + 1))
    assert place.children[0].runs[0].lo == 0


async def test_job_whose_workers_never_start_fails(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    with pytest.RaisesGroup(WorkerStartError):
        async with trio.open_nursery() as nursery:
            place = Place(nursery, tmp_path, FakeUplink(), options=StageOptions())
            place.processes.errors = [WorkerStartError("no such library")] * 99
            place.hold(0, 3)
            place.site.push([Work(0, 0, 3)])
            await trio.sleep(60)
            nursery.cancel_scope.cancel()


async def test_idle_workers_are_let_go_and_others_come_when_there_is_work(
    make: Make, uplink: FakeUplink, autojump_clock: trio.testing.MockClock
) -> None:
    place = make()
    child = await started(place, 1)
    child.finish(child.runs[0])
    await settle()
    place.site.crew.rest(trio.current_time())
    assert not child.exited.is_set()
    await trio.sleep(limits.WORKER_IDLE_S)
    place.site.crew.rest(trio.current_time())
    place.hold(1, 1)
    place.site.push([Work(0, 1, 2)])
    await settle()
    assert child.why == "idle"
    assert [run.lo for run in place.children[1].runs] == [1]
    assert uplink.failures == []


async def test_long_task_is_no_rest(make: Make, autojump_clock: trio.testing.MockClock) -> None:
    place = make()
    child = await started(place, 1)
    await trio.sleep(2 * limits.WORKER_IDLE_S)
    place.site.crew.rest(trio.current_time())
    assert not child.exited.is_set()


async def test_task_over_its_time_limit(make: Make, uplink: FakeUplink) -> None:
    place = make(task_timeout_s=5.0)
    assert place.site.has_timeouts
    child = await started(place, 3)
    child.cell = (0, time.monotonic_ns() - 4_000_000_000)
    place.site.crew.check_timeouts()
    assert not child.exited.is_set()
    child.cell = (0, time.monotonic_ns() - 6_000_000_000)
    place.site.crew.check_timeouts()
    await settle()
    assert [(failure.index, failure.kind) for _, failure in uplink.failures] == [(0, TIMEOUT)]
    assert held(place.site) == [(1, 3)]


# ---- cancel, drop ----------------------------------------------------------------------------------------------------


async def test_dropped_tasks_do_not_run(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 0.01)
    child = await started(place, 100)
    begun = child.runs[-1].hi
    place.site.drop(0, 50, 60)
    assert held(place.site) == [(0, 50), (60, 100)]
    place.site.drop(0, begun, 100)
    for run in list(child.runs):
        child.finish(run)
    await settle()
    assert not place.site.held()
    assert sum(hi - lo for _, lo, hi, _ in uplink.results) == begun


async def test_long_task_that_is_dropped_is_ended_and_nobody_blamed(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 10.0)
    child = await started(place, 3)
    child.cell = (0, 1)
    place.site.drop(0, 0, 1)
    await settle()
    assert child.why == "dropped"
    assert uplink.failures == []
    assert held(place.site) == [(1, 3)]


async def test_drop_in_pieces_ends_a_long_bundle_too(make: Make) -> None:
    place = make()
    known_pace(place, 0.02)
    child = await started(place, 100)
    run = child.runs[0]
    assert run.hi == 2
    place.site.stages[0].pace.record(10, 1000.0)
    place.site.drop(0, 0, 1)
    assert not child.exited.is_set(), "task 1 is wanted"
    place.site.drop(0, 1, 2)
    assert child.exited.is_set()


async def test_short_tasks_that_are_dropped_just_run_out(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 0.001)
    child = await started(place, 1000)
    place.site.drop(0, 0, 1000)
    assert not child.exited.is_set()


async def test_dropped_part_of_a_bundle_does_not_come_back_with_its_dead_worker(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 0.001)
    child = await started(place, 40)
    run = child.runs[0]
    assert run.hi > 12
    place.site.drop(0, 2, 4)
    place.site.drop(0, 6, 8)
    child.cell = (0, 1)
    child.die(-9)
    await settle()
    assert held(place.site) == [(1, 2), (4, 6), (8, 40)]
    assert place.children[1].runs[0].lo == 1


async def test_drop_of_a_bundle_ahead_asks_it_back_and_spares_what_runs(make: Make, uplink: FakeUplink) -> None:
    """The bundle that runs is of another stage, and wanted."""
    place = make()
    known_pace(place, 1e-5)
    place.site.add_stage(1, StageOptions(), place.site.add_function(DIGEST, FUNCTION))
    known_pace(place, 1e-5, stage=1)
    place.hold(0, 1)
    place.hold(0, 10, stage=1)
    place.site.push([Work(0, 0, 1), Work(1, 0, 10)])
    await settle()
    child = place.children[0]
    first, ahead = child.runs
    assert (first.stage, ahead.stage) == (0, 1)
    place.site.stages[1].pace.record(1000, 1e6)
    place.site.drop(1, 0, 10)
    assert not child.exited.is_set()
    assert (wire.Revoke(ahead.ticket), b"") in child.posted
    child.say(wire.Returned(ahead.ticket))
    await settle()
    assert 1 not in place.site.held()


async def test_rest_of_a_bundle_that_takes_too_long_is_given_back(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 10_000)
    run = child.runs[0]
    child.finish(run, hi=run.lo + 10)
    child.say(wire.Returned(run.ticket, run.lo + 12, 2_000_000))
    await settle()
    assert held(place.site) == [(run.lo + 10, 10_000)]
    assert place.site.seconds_per_task(0) > 1e-3
    child.say(wire.Done(run.ticket, run.lo + 10, run.lo + 12, 1, True), result_bytes(run.lo + 10, run.lo + 12))
    await settle()
    assert held(place.site) == [(run.lo + 12, 10_000)]
    assert child.why == ""
    later = child.runs[-1]
    assert later.ticket != run.ticket


async def test_bundle_given_back_behind_its_last_result_is_over(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 10_000)
    run = child.runs[0]
    child.finish(run, hi=run.lo + 10)
    child.say(wire.Returned(run.ticket, run.lo + 10, 1))
    child.say(wire.Returned(run.ticket, run.lo + 10, 1))  # of a ticket that is no more: nothing
    await settle()
    assert held(place.site) == [(run.lo + 10, 10_000)]
    assert run.ticket not in place.site.workers[0].tickets
    assert child.why == ""


async def test_stage_of_a_known_function_begins_with_more_than_one_task(make: Make) -> None:
    place = make()
    known_pace(place, 1e-4)
    place.site.add_stage(1, StageOptions(), place.site.add_function(DIGEST, FUNCTION))
    place.hold(0, 1000, stage=1)
    place.site.push([Work(1, 0, 1000)])
    await settle()
    assert [(run.stage, run.lo, run.hi) for run in place.children[0].runs] == [(1, 0, 50)]


# ---- nested calls ----------------------------------------------------------------------------------------------------


async def test_blocked_worker_frees_its_slot_and_gives_its_bundles_back(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 10_000, 500)
    ahead = child.runs[1:]
    assert ahead
    child.say(wire.Waiting(True))
    await settle()
    assert [message.ticket for message, _ in child.posted if isinstance(message, wire.Revoke)] == [r.ticket for r in ahead]
    assert place.site.blocked == 1
    assert len(place.children) == 2, "another worker has the slot"
    for run in ahead:
        child.say(wire.Returned(run.ticket))
    await settle()
    first = child.runs[0]
    assert held(place.site) == [(0, 10_000)]
    child.say(wire.Waiting(False))
    child.finish(first)
    await settle()
    assert held(place.site) == [(first.hi, 10_000)]


async def test_bundle_that_was_begun_before_it_was_asked_back(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 10_000, 500)
    first, second = child.runs[:2]
    child.say(wire.Waiting(True))
    child.say(wire.Waiting(False))
    child.finish(first)
    child.finish(second)
    child.say(wire.Returned(second.ticket))
    await settle()
    assert [(lo, hi) for _, lo, hi, _ in uplink.results] == [(first.lo, first.hi), (second.lo, second.hi)]
    assert child.why == ""


async def test_worker_with_stages_of_its_own_gets_no_bundle_ahead(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 1000)
    child.say(wire.Define(0, "g"), b"code")
    await settle()
    known_pace(place, 1e-5)
    child.finish(child.runs[0])
    await settle()
    assert len(child.runs) == 2
    assert [type(message) for message in uplink.relayed] == [wire.Define]


async def test_death_of_a_worker_with_stages_is_told(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 10)
    child.say(wire.Define(0, "g"), b"code")
    child.say(wire.Waiting(True))
    await settle()
    child.cell = (0, 1)
    child.die(-9)
    await settle()
    assert [id(worker.child) for worker in uplink.closed] == [id(child)]
    assert place.site.blocked == 0
    assert [failure.index for _, failure in uplink.failures] == [0]


async def test_prints_reach_the_uplink(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 1)
    child.say(wire.Print(0, 0, 1), b"hello")
    await settle()
    assert uplink.prints == [b"hello"]


# ---- segments that are elsewhere -------------------------------------------------------------------------------------


async def test_segment_is_fetched_and_its_tasks_run_first(make: Make) -> None:
    place = make()
    place.fetches.gate = trio.Event()
    place.hold(0, 5, here=False)
    place.hold(5, 5)
    place.site.push([Work(0, 0, 10)])
    await settle()
    assert place.fetches.began == [0]
    child = place.children[0]
    assert child.runs[0].lo == 5, "what is here need not wait"
    assert held(place.site) == [(0, 10)]
    place.fetches.gate.set()
    await settle()
    child.finish(child.runs[0])
    await settle()
    assert child.runs[1].lo == 0


async def test_segment_that_is_not_to_be_had_is_returned(make: Make, uplink: FakeUplink) -> None:
    place = make()
    place.fetches.fails = True
    place.hold(0, 5, here=False)
    place.site.push([Work(0, 0, 5)])
    await settle()
    assert sum(hi - lo for _, lo, hi in uplink.back) == 5
    assert not place.site.held()


async def test_segment_that_could_not_be_fetched_is_asked_of_its_new_holder(make: Make) -> None:
    place = make()
    place.fetches.fails = True
    place.hold(0, 5, here=False)
    place.site.push([Work(0, 0, 5)])
    await settle()
    place.fetches.fails = False
    place.hold(0, 5, here=True)
    place.site.push([Work(0, 0, 5)])
    await settle()
    assert place.children[0].runs[0].lo == 0


async def test_cancel_during_fetch(make: Make, uplink: FakeUplink) -> None:
    place = make()
    place.fetches.gate = trio.Event()
    place.hold(0, 5, here=False)
    place.site.push([Work(0, 0, 5)])
    await settle()
    place.site.drop(0, 0, 5)
    place.site.forget(0, 0, 5)
    assert not place.site.held()
    place.fetches.gate.set()
    await settle()
    assert not place.site.held()
    assert uplink.back == []
    assert all(not child.runs for child in place.children)


async def test_part_of_a_segment_is_cancelled_while_it_is_fetched(make: Make) -> None:
    place = make()
    place.fetches.gate = trio.Event()
    place.hold(0, 5, here=False)
    place.site.push([Work(0, 0, 2)])
    await settle()
    place.site.drop(0, 0, 2)
    place.site.push([Work(0, 2, 5)])
    await settle()
    assert place.fetches.began == [0], "one fetch serves all"
    assert held(place.site) == [(2, 5)]
    place.fetches.gate.set()
    await settle()
    assert place.children[0].runs[0].lo == 2
    assert held(place.site) == [(2, 5)]


async def test_tasks_without_a_segment_are_returned_and_the_others_run(make: Make, uplink: FakeUplink) -> None:
    place = make()
    known_pace(place, 1e-5)
    place.hold(2, 3)
    place.hold(7, 3)
    place.site.push([Work(0, 0, 12)])
    await settle()
    while (runs := place.children[0].runs) and len(uplink.results) < len(runs):
        place.children[0].finish(runs[len(uplink.results)])
        await settle()
    assert sorted(i for _, lo, hi in uplink.back for i in range(lo, hi)) == [0, 1, 5, 6, 10, 11]
    assert sorted(i for _, lo, hi, _ in uplink.results for i in range(lo, hi)) == [2, 3, 4, 7, 8, 9]


async def test_large_slice_of_a_page_is_copied_once_and_let_go(make: Make, tmp_path: Path) -> None:
    place = make()
    filler = b" " * (wire.INLINE_BYTES_MAX + 1)
    data = segment_bytes(0, 4) + filler
    page = place.spool.write("page", data + segment_bytes(4, 8))
    page.owners = 2
    place.site.hold(0, Segment(0, 4, len(data)), bodies.FileSlice(page, 0, len(data)))
    rest = bodies.FileSlice(page, len(data), len(segment_bytes(4, 8)))
    place.site.hold(0, Segment(4, 4, rest.length), rest)
    place.site.push([Work(0, 0, 8)])
    await settle()
    child = place.children[0]
    for at in range(8):
        child.finish(child.runs[at])
        await settle()
        if at + 1 == len(child.runs):
            break
    paths = {run.path for run in child.runs if run.first == 0}
    assert len(paths) == 1
    assert await trio.Path(paths.pop()).read_bytes() == data
    assert len(list(place.spool.folder.iterdir())) == 2
    place.site.forget(0, 0, 8)
    assert list(place.spool.folder.iterdir()) == []


async def test_segment_that_is_run_in_many_parts_is_sent_through_one_file(make: Make) -> None:
    """Else each of its tasks would cost as much as all of its bytes."""
    place = make()
    data = segment_bytes(0, 8) + b" " * siteworker.PARTS_BYTES_MIN
    place.site.hold(0, Segment(0, 8, len(data)), data)
    small = segment_bytes(8, 16)
    place.site.hold(0, Segment(8, 8, len(small)), small)
    place.site.push([Work(0, 0, 1), Work(0, 8, 9), Work(0, 1, 2)])
    await settle()
    finished = [(child, run) for child in place.children for run in child.runs]
    for child, run in finished:
        child.finish(run)
    await settle()
    runs = [run for child in place.children for run in child.runs]
    assert len({run.path for run in runs if run.first == 0}) == 1
    assert {run.path for run in runs if run.first == 8} == {""}
    path = trio.Path(next(run.path for run in runs if run.first == 0))
    assert await path.read_bytes() == data
    place.site.forget(0, 0, 16)
    assert await path.exists(), "a worker may still have to open it"
    for child in place.children:
        for run in child.runs:
            if (child, run) not in finished:
                child.finish(run)
    await settle()
    assert list(place.spool.folder.iterdir()) == []


async def test_forget_keeps_segments_that_are_only_touched(make: Make) -> None:
    place = make()
    place.hold(0, 5)
    place.hold(5, 5)
    place.site.forget(0, 1, 10)
    assert list(place.site.stages[0].held) == [0]


# ---- a full deque ----------------------------------------------------------------------------------------------------


async def test_work_that_finds_no_room_in_the_deque_is_returned(make: Make, uplink: FakeUplink) -> None:
    place = make()
    place.site.deque = RangeDeque(2)
    place.hold(0, 100)
    place.site.push([Work(0, 0, 1), Work(0, 50, 51)])
    await settle()
    place.site.push([Work(0, 60, 61)])
    child = place.children[0]
    assert child.runs[0].lo == 0
    child.die(0)
    await settle()
    everything = sorted([*held(place.site), *((lo, hi) for _, lo, hi in uplink.back)])
    assert everything == [(0, 1), (50, 51), (60, 61)]


# ---- several jobs ----------------------------------------------------------------------------------------------------


async def test_jobs_share_one_slot_in_turns(make: Make, uplink: FakeUplink) -> None:
    workshop = Workshop(None, 1)  # type: ignore[arg-type]
    places = [make(workshop=workshop) for _ in range(2)]
    for place in places:
        known_pace(place, 1e-4)
        place.hold(0, 100_000)
        place.site.push([Work(0, 0, 100_000)])
    finished = {id(place): 0 for place in places}
    for _ in range(40):
        await settle()
        for place in places:
            for child in place.children:
                while finished[id(place)] < len(child.runs):
                    child.finish(child.runs[finished[id(place)]])
                    finished[id(place)] += 1
                    await settle()
    one, two = finished.values()
    assert one > 5
    assert two > 5


async def test_slots_of_a_busy_job_come_free_for_another(make: Make) -> None:
    workshop = Workshop(None, 2)  # type: ignore[arg-type]
    first, second = make(workshop=workshop), make(workshop=workshop)
    known_pace(first, 1e-4)
    known_pace(second, 1e-4)
    await started(first, 100_000)
    assert first.site.busy == 2
    second.hold(0, 100_000)
    second.site.push([Work(0, 0, 100_000)])
    await settle()
    finished = dict.fromkeys(first.children, 0)
    for _ in range(3):  # the second job's worker must start first
        for child in first.children:
            for run in child.runs[finished[child] :]:
                child.finish(run)
                finished[child] += 1
        await settle()
    assert second.site.busy == 1


async def test_peer_that_leaves_begins_nothing_new(make: Make) -> None:
    place = make()
    known_pace(place, 1e-4)
    child = await started(place, 100_000)
    place.workshop.draining = True
    given = len(child.runs)
    for run in list(child.runs):
        child.finish(run)
    await settle()
    assert len(child.runs) == given


async def test_closed_site_starts_nothing(make: Make, uplink: FakeUplink) -> None:
    place = make()
    child = await started(place, 10)
    place.site.closed = True
    child.cell = (0, 1)
    child.die(-9)
    await settle()
    assert uplink.failures == []
    assert len(place.children) == 1
