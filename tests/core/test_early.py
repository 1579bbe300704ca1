"""Results that a worker sends to the driver, too: only where nothing else can come before them, and the peer has them first."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from grid.api import wire
from grid.core.deque import Work
from grid.leadjob import LeadJob, serve_driver
from grid.producer import Producer
from tests.core.fakes import FUNCTION, FakeChild, result_bytes, settle
from tests.core.test_leader import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """With one worker, which has an end of the socket; the stage is the driver's 7th."""
    async with trio.open_nursery() as nursery:
        world = World(nursery, tmp_path, slots=1)
        world.place.processes.takes_early = True
        world.leader.early = True
        world.producer.handle(wire.Define(0, "f"), FUNCTION)
        world.producer.handle(wire.Stage(7, 0, "f", False, wire.Options(retries=1), kind=wire.CALLS), b"")
        yield world
        nursery.cancel_scope.cancel()


async def page(world: World, *sizes: int) -> FakeChild:
    world.page(*sizes, stage=7)
    await settle()
    return world.place.children[0]


async def test_task_that_is_waited_for_alone_may_answer_early(world: World) -> None:
    for number in range(3):
        child = await page(world, 1)
        run = child.runs[number]
        assert (run.lo, run.hi, run.early) == (number, number + 1, 7)
        assert run.given_ns > 0
        child.finish(run)
        await settle()


async def test_tasks_in_company_may_not(world: World) -> None:
    child = await page(world, 1)
    await page(world, 1)
    child.finish(child.runs[0])
    await settle()
    assert [run.early for run in child.runs] == [7, -1]
    child.finish(child.runs[1])
    await page(world, 2)
    assert [run.early for run in child.runs[2:]] == [-1] * len(child.runs[2:])


async def test_task_that_failed_before_may_not(world: World) -> None:
    child = await page(world, 1)
    child.fail(child.runs[0], 0)
    await settle()
    assert [(run.early, run.attempt) for run in child.runs] == [(7, 0), (-1, 1)]


async def test_maps_may_not(world: World) -> None:
    world.producer.handle(wire.Stage(8, 0, "f", False), b"")
    world.page(1, stage=8)
    await settle()
    assert [run.early for run in world.place.children[0].runs] == [-1]


async def test_task_beside_another_stage_may_not(world: World) -> None:
    world.producer.handle(wire.Stage(8, 0, "f", False, kind=wire.CALLS), b"")
    child = await page(world, 1)
    child.finish(child.runs[0])
    await settle()
    world.place.workshop.draining = True
    world.page(1, stage=8)
    world.place.workshop.draining = False
    await page(world, 1)
    child.finish(child.runs[1])
    await settle()
    assert [run.early for run in child.runs[1:] if run.stage == world.job_stage(7)] == [-1]


async def test_task_that_was_elsewhere_meanwhile_may_not(world: World) -> None:
    """Another peer may have run it, too, however young it is here."""
    child = await page(world, 1)
    child.die(-9)
    await settle()
    world.leader.run_again(Work(world.job_stage(7), 0, 1))
    await settle()
    assert {run.early for child in world.place.children[1:] for run in child.runs} == {-1}


async def test_none_may_where_the_driver_does_not_listen(world: World) -> None:
    world.leader.early = False
    assert (await page(world, 1)).runs[0].early == -1


async def test_none_may_whose_worker_has_no_end_of_the_socket(world: World) -> None:
    world.place.processes.takes_early = False
    assert (await page(world, 1)).runs[0].early == -1


async def test_what_the_driver_may_know_is_heard_before_the_driver(world: World) -> None:
    """The driver's next frame may lie in its socket beside the worker's: `serve_driver` and `_copy_output` call `hear` first."""
    child = await page(world, 1)
    child.say(wire.Done(child.runs[0].ticket, 0, 1, 1, True, early=True), result_bytes(0, 1))
    assert world.driver.results(7) == []
    world.place.site.crew.hear()
    assert world.driver.results(7) == [(0, 1)]
    assert not world.place.site.crew.early
    await settle()
    assert world.driver.results(7) == [(0, 1)]


async def test_worker_that_died_is_not_heard_any_more(world: World) -> None:
    child = await page(world, 1)
    child.die(-9)
    await settle()
    assert not world.place.site.crew.early


@pytest.mark.parametrize("early", [False, True])
async def test_early_result_of_a_task_that_another_peer_settled_is_disputed(world: World, early: bool) -> None:
    disputed = watch(world)
    child = await page(world, 1)
    world.done(0, 1, stage=world.job_stage(7))
    child._said.append((wire.Done(child.runs[0].ticket, 0, 1, 1, True, early=early), result_bytes(0, 1)))  # it was on its way
    world.place.site.crew.hear()
    await settle()
    assert disputed == [True] * early
    assert world.driver.results(7) == [(0, 1)]


async def test_early_result_that_has_come_counts_before_another_peers(world: World) -> None:
    disputed = watch(world)
    child = await page(world, 1)
    child._said.append((wire.Done(child.runs[0].ticket, 0, 1, 1, True, early=True), b"[4]"))
    assert world.done(0, 1, stage=world.job_stage(7)) == 0
    await settle()
    assert disputed == []
    assert world.driver.values(7) == {0: 4}


async def test_early_result_of_a_task_that_the_script_cancelled_is_not_disputed(world: World) -> None:
    """Had the script seen it, the peer would have heard of it before it heard that it is cancelled."""
    disputed = watch(world)
    child = await page(world, 1)
    world.place.site.stages[world.job_stage(7)].pace.record(1000, 0.001)  # short: its worker is not ended
    world.producer.handle(wire.Cancel(7, 0, 1, "cancelled by the script"), b"")
    child.say(wire.Done(child.runs[0].ticket, 0, 1, 1, True, early=True), result_bytes(0, 1))
    await settle()
    assert disputed == []
    assert world.driver.results(7) == []


def watch(world: World) -> list[bool]:
    disputed: list[bool] = []
    world.leader.on_disputed = lambda: disputed.append(True)
    return disputed


async def test_peer_stays_awake_for_a_trivial_task_and_no_longer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = world.place.site.crew
    child = await page(world, 1)
    monkeypatch.setattr("grid.crew.AWAKE_NS", 60 * 10**9)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(crew.stay_awake)
        child.finish(child.runs[0])
    assert world.driver.results(7) == [(0, 1)]

    await page(world, 1)
    monkeypatch.setattr("grid.crew.AWAKE_NS", 1_000_000)
    await crew.stay_awake()
    assert crew.early
    monkeypatch.setattr("grid.crew.AWAKE_NS", 0)  # frames that come while a long task runs
    with trio.fail_after(0):
        await crew.stay_awake()


class Ears:
    """What the driver had been sent when something it said was taken in."""

    def __init__(self, world: World, child: FakeChild) -> None:
        self._world = world
        self.heard: list[list[tuple[int, int]]] = []
        done = wire.Done(child.runs[0].ticket, 0, 1, 1, True, early=True)
        child._said.append((done, result_bytes(0, 1)))  # it lies in its socket, and nobody has been woken yet

    def hear(self, *what: object) -> None:
        self.heard.append(self._world.driver.results(7))


async def test_driver_is_heard_after_the_worker_it_heard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ears = Ears(world, await page(world, 1))
    monkeypatch.setattr(Producer, "handle", ears.hear)

    async def frames() -> AsyncIterator[tuple[wire.Message, bytes]]:
        yield wire.Close(7, 1), b""

    driver = cast(Any, SimpleNamespace(frames=frames(), post=lambda *_: None))
    async with trio.open_nursery() as nursery:
        await serve_driver(driver, world.leader, cast(Any, world.place), nursery)
    assert ears.heard == [[(0, 1)]]


async def test_driver_that_ends_is_heard_after_the_worker_it_heard(world: World) -> None:
    Ears(world, await page(world, 1))

    async def frames() -> AsyncIterator[tuple[wire.Message, bytes]]:
        for frame in ():
            yield frame

    async with trio.open_nursery() as nursery:
        await serve_driver(cast(Any, SimpleNamespace(frames=frames())), world.leader, cast(Any, world.place), nursery)
    assert world.driver.results(7) == [(0, 1)]


async def test_output_is_recorded_after_what_it_is_written_because_of(world: World) -> None:
    ears = Ears(world, await page(world, 1))
    log = SimpleNamespace(read=lambda *_: b"")
    job = SimpleNamespace(_recorder=None, view=SimpleNamespace(log=lambda fd: log, write=ears.hear))
    read, write = os.pipe()
    os.write(write, b"0 was drawn\n")
    os.close(write)
    await LeadJob._copy_output(cast(Any, job), 1, read, cast(Any, world.place))
    assert ears.heard == [[(0, 1)]]
