"""A peer that helps comes to lead, or another one leads: the helper's place goes over, or is handed over."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid import helping as helping_module
from grid.blobs.store import BlobStore
from grid.core import limits
from grid.core.board import Board
from grid.core.bundle import COMPLETION_DOMAIN, Completion, open_signed
from grid.core.job import FINISHED, RUNNING, JobId
from grid.core.messages import Claims, Drop, Nothing, decode, encode
from grid.helping import Helping
from grid.worker.environment import python_minor
from grid.workshop import Workshop
from tests.core.fakes import JOB, FakePost, Place, result_bytes, settle
from tests.core.material import LEADER, OTHER, THIEF, news, signed_spec, spec
from tests.core.team import Team

SPEC, SIGNED = msgspec.structs.replace(spec(), python=python_minor()), signed_spec()
Clock = trio.testing.MockClock


class World:
    """One helper, and a leader in the same process that it steals from."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.team = Team(nursery, folder / "leader", helpers=0)
        self.team.open()
        self.team.page(5, 5)
        self.board = Board()
        self.post = FakePost()
        self.places: list[Place] = []
        self.closed = 0
        self.leads = False
        self.asked: list[PeerId] = []
        self.store = BlobStore(folder / "blobs", 1 << 30)
        self.workshop = Workshop(cast(Any, None), 0)
        services = SimpleNamespace(
            me=THIEF.id, name="", jobs=folder, environments=folder, store=self.store, fetcher=None, workshop=self.workshop
        )
        self.folder = folder
        self.nursery = nursery
        self.helping = Helping(
            cast(Any, services),
            THIEF,
            self.board,
            cast(Any, self),
            cast(Any, self.post),
            nursery,
            random.Random(1),
            (),
            lambda job: self.leads,
        )

    async def request(self, peer: PeerId, message: bytes, timeout_s: float) -> bytes:
        """The mesh."""
        self.asked.append(peer)
        await trio.lowlevel.checkpoint()
        if peer != LEADER.id:
            return encode(Nothing())
        return encode(await self.team.outreach.steal(THIEF.id, cast(Any, decode(message))))

    @asynccontextmanager
    async def open_place(
        self, job: JobId, known: Any, services: Any, uplink: Any, data: Any, epoch: int, nursery: trio.Nursery
    ) -> AsyncIterator[Any]:
        place = Place(nursery, self.folder / f"place{len(self.places)}", uplink, workshop=self.workshop)
        self.places.append(place)
        try:
            yield place
        finally:
            self.workshop.sites.remove(place.site)
            data.close()
            self.closed += 1

    def hear(self, leader: PeerId = LEADER.id, epoch: int = 1, version: int = 1, state: str = RUNNING) -> None:
        told = msgspec.structs.replace(news(epoch=epoch, version=version, state=state, signed=SIGNED), leader=leader)
        self.board.hear(JOB, SPEC, told, trio.current_time())
        entry = self.board.get(JOB)
        assert entry is not None
        self.helping.heard(JOB, entry)

    async def begin(self) -> None:
        """The helper asks for work, and opens a place for what it gets."""
        self.nursery.start_soon(self.helping.run)
        self.hear()
        self.workshop.slots = 1
        self.helping._hungry()
        while JOB not in self.helping.jobs:
            await settle()

    async def help(self) -> None:
        """The helper has tasks [5, 10)."""
        await self.begin()
        while not self.helping.jobs[JOB].remote or not self.site.deque:
            await settle()
        self.workshop.slots = 0

    @property
    def site(self) -> Any:
        return self.places[-1].site

    def report(self, lo: int, hi: int, filler: int = 0) -> bytes:
        self.site.deque.remove(0, lo, hi)
        remote = self.helping.jobs[JOB].remote
        assert remote is not None
        body = result_bytes(lo, hi) + b" " * filler
        remote.result(0, lo, hi, body, 1)
        return body


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    (tmp_path / "leader").mkdir()
    async with trio.open_nursery() as nursery:
        made = World(nursery, tmp_path)
        monkeypatch.setattr(helping_module, "open_place", made.open_place)
        yield made
        nursery.cancel_scope.cancel()


async def test_place_goes_over_to_the_new_leader_as_it_is(autojump_clock: Clock, world: World) -> None:
    await world.help()
    world.hear(OTHER.id, 2)
    (claims,) = [message for to, message in world.post.sent if to == OTHER.id and isinstance(message, Claims)]
    assert (claims.epoch, claims.held) == (2, ((0, ((5, 10),)),))
    assert world.closed == 0
    assert list(world.site.deque.ranges())


async def test_job_is_kept_while_any_leader_of_it_is_heard(autojump_clock: Clock, world: World) -> None:
    await world.help()
    await trio.sleep(limits.JOB_FORGET_S - 5)
    world.hear(OTHER.id, 2)
    await trio.sleep(limits.JOB_FORGET_S - 5)
    world.hear(THIEF.id, 3)  # news of ourselves: an earlier life
    world.hear(OTHER.id, 4)
    assert world.closed == 0
    await trio.sleep(limits.JOB_FORGET_S + 1)
    assert world.closed == 1
    assert JOB not in world.helping.jobs


async def test_leadership_gets_what_no_leader_acknowledged(autojump_clock: Clock, world: World) -> None:
    await world.help()
    world.report(5, 6)
    await trio.sleep(1.0)  # it was sent
    large = world.report(6, 8, filler=limits.RESULT_INLINE_BYTES)
    world.report(8, 9)
    offers = await world.helping.hand_over(JOB)
    assert world.closed == 1
    completions = [open_signed(offer.signed, COMPLETION_DOMAIN, Completion) for offer in offers]
    assert {signer for signer, _ in completions} == {THIEF.id}
    results = [result for _, completion in completions for result in completion.results]
    assert [(result.lo, result.hi) for result in results] == [(5, 6), (6, 8), (8, 9)]
    blob = next(result.blob for result in results if result.blob)
    assert world.store.pinned(blob)  # type: ignore[arg-type]
    assert await world.store.read(blob, 0, len(large)) == large  # type: ignore[arg-type]
    world.hear(LEADER.id, 1, 9, FINISHED)
    assert not world.store.pinned(blob)  # type: ignore[arg-type]


async def test_peer_that_leads_helps_no_more_until_it_resumes(autojump_clock: Clock, world: World) -> None:
    await world.help()
    await world.helping.hand_over(JOB)
    world.workshop.slots = 1
    world.hear(OTHER.id, 2)
    world.asked.clear()
    await trio.sleep(3.0)
    assert world.asked == []
    world.helping.resume(JOB)
    await trio.sleep(3.0)
    assert set(world.asked) == {OTHER.id}


async def test_handing_over_what_was_never_helped(autojump_clock: Clock, world: World) -> None:
    assert await world.helping.hand_over(JOB) == []


async def test_handing_over_while_the_place_is_being_opened(
    autojump_clock: Clock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def slow(*arguments: Any) -> AsyncIterator[Any]:
        await trio.sleep(5.0)
        yield None

    monkeypatch.setattr(helping_module, "open_place", slow)
    await world.begin()
    with trio.fail_after(1.0):
        assert await world.helping.hand_over(JOB) == []
    assert JOB not in world.helping.jobs


async def test_new_leader_is_asked_though_the_old_one_has_not_answered(autojump_clock: Clock, world: World) -> None:
    never = trio.Event()
    real = world.request

    async def request(peer: PeerId, message: bytes, timeout_s: float) -> bytes:
        if peer == LEADER.id:
            world.asked.append(peer)
            with trio.fail_after(timeout_s):
                await never.wait()
        return await real(peer, message, timeout_s)

    world.request = request  # type: ignore[method-assign]
    world.workshop.slots = 1
    world.nursery.start_soon(world.helping.run)
    world.hear()
    await trio.sleep(1.0)
    world.hear(OTHER.id, 2)
    await settle()
    assert world.asked == [LEADER.id, OTHER.id]
    before = len(world.asked)
    await trio.sleep(limits.STEAL_TIMEOUT_S + 3)
    assert world.asked[before:].count(OTHER.id) >= 5


async def test_each_leader_is_told_once_that_the_job_can_not_run_here(autojump_clock: Clock, world: World) -> None:
    world.hear()
    world.helping.unfit[JOB] = "no such package"
    world.hear(LEADER.id, 1, 2)
    world.hear(LEADER.id, 1, 3)
    world.hear(OTHER.id, 2)
    told = [(to, message.blocked) for to, message in world.post.sent if isinstance(message, Claims)]
    assert told == [(LEADER.id, "no such package"), (OTHER.id, "no such package")]


async def test_what_is_done_elsewhere_while_the_place_is_being_opened_does_not_run(
    autojump_clock: Clock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def slow(*arguments: Any) -> AsyncIterator[Any]:
        await trio.sleep(0.5)
        async with world.open_place(*arguments) as place:
            yield place

    monkeypatch.setattr(helping_module, "open_place", slow)
    await world.begin()
    world.workshop.slots = 0
    world.helping.dropped(LEADER.id, Drop(JOB, 1, ((0, ((5, 7),)),)))
    world.helping.dropped(OTHER.id, Drop(JOB, 1, ((0, ((7, 9),)),)))  # who does not lead has no say
    await trio.sleep(1.0)
    assert list(world.site.deque.ranges()) == [(0, 7, 10)]
    assert world.helping._early == []
