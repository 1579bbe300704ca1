"""A helper goes over to another leader: what runs goes on, what is finished is offered, what is declared otherwise goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from blake3 import blake3

from grid.api import wire
from grid.core import limits
from grid.core.bundle import COMPLETION_DOMAIN, Completion, open_signed, segment_name
from grid.core.deque import Work
from grid.core.errors import FencedError, RefusedError
from grid.core.messages import Accepted, Claims, Completed, Give, GrantTaken, Have, Nothing, RelayClosed, Steal
from grid.reports import UNACKNOWLEDGED_MAX, Shelf
from grid.siteworker import SiteWorker
from tests.core.fakes import DIGEST, JOB, FakeChild, result_bytes, segment_bytes, settle
from tests.core.material import LEADER, OTHER
from tests.core.team import Helper, Team

OTHER_FUNCTION = b"another function"


class Handover:
    """A helper, its leader, and the one that comes after it."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.first = Team(nursery, folder / "1", helpers=2)
        self.second = Team(nursery, folder / "2", helpers=0, identity=OTHER, epoch=2)
        self.second.blobs = self.second.data.blobs = self.first.blobs
        self.thief, self.third = self.first.helpers
        for team in (self.first, self.second):
            team.open()

    async def page(self, *sizes: int) -> None:
        """The first leader declares these; the thief gets some half of them."""
        self.first.page(*sizes)
        await self.first.steal(self.thief)
        await self.first.deliver()

    def over(self, helper: Helper | None = None) -> None:
        """The helper hears of the second leader."""
        (helper or self.thief).remote.follow(OTHER.id, b"", 2)

    def report(self, lo: int, hi: int) -> None:
        """As if a worker had finished these."""
        self.thief.site.deque.remove(0, lo, hi)
        self.thief.remote.result(0, lo, hi, result_bytes(lo, hi), 10)

    async def send(self) -> Completed:
        batch, ranges = await self.thief.remote.reports.next()
        self.thief.remote._release_segments(ranges)
        self.thief.post.post(self.thief.remote.leader, batch)
        return batch

    async def deliver(self) -> None:
        """What the thief and the second leader have for each other."""
        while self.thief.post.sent or self.second.post.sent:
            sent, self.thief.post.sent = self.thief.post.sent, []
            for to, message in sent:
                if to == OTHER.id:
                    await self.second.outreach.handle(self.thief.id, message)
            sent, self.second.post.sent = self.second.post.sent, []
            for _, message in sent:
                await self.thief.remote.handle(OTHER.id, message)

    def queued(self) -> list[Work]:
        return list(self.thief.site.deque.ranges())


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Handover]:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
    async with trio.open_nursery() as nursery:
        yield Handover(nursery, tmp_path)
        nursery.cancel_scope.cancel()


def opened(message: Completed) -> Completion:
    return open_signed(message.signed, COMPLETION_DOMAIN, Completion)[1]


# ---- what is finished ------------------------------------------------------------------------------------------------


async def test_reports_name_the_arguments_they_were_made_from(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 7)
    job.thief.remote.failure(0, wire.Failed(0, 8, "raised", "ValueError", "no", "trace", 1, False), b"")
    completion = opened(await job.send())
    digest = blake3(segment_bytes(5, 10)).digest()
    assert [result.segment for result in completion.results] == [segment_name(5, digest)]
    assert [failure.segment for failure in completion.failures] == [segment_name(5, digest)]


async def test_what_no_leader_acknowledged_is_offered_to_the_next(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 7)
    lost = opened(await job.send())
    job.report(7, 9)
    job.over()
    assert list(job.thief.remote.held()[0]) == [(5, 10)]
    job.thief.post.sent.clear()
    again, fresh = opened(await job.send()), opened(await job.send())
    assert (again.results, again.epoch, again.number) == (lost.results, 2, 1)
    assert (fresh.epoch, fresh.number, fresh.session) == (2, 2, again.session)
    assert again.session != lost.session
    job.second.page(5, 5)
    await job.deliver()
    assert job.second.driver.values() == {}  # tasks 0 to 4 come first
    assert job.second.leader.ledger.stage(0).settled.covers(5, 9)
    assert list(job.thief.remote.held()[0]) == [(9, 10)]


async def test_batches_that_went_to_nobody_reach_the_next_leader_as_one(job: Handover) -> None:
    """Else what a helper finished while nobody led trickles in, and dies with it meanwhile."""
    await job.page(100, 100)
    for at in range(100, 180, 2):
        job.report(at, at + 2)
        await job.send()
    job.report(180, 182)
    job.over()
    job.thief.post.sent.clear()
    again, fresh = opened(await job.send()), opened(await job.send())
    assert [(result.lo, result.hi) for result in again.results] == [(at, at + 2) for at in range(100, 180, 2)]
    assert [(result.lo, result.hi) for result in fresh.results] == [(180, 182)]
    assert not job.thief.remote.reports.ready
    assert sorted(job.thief.remote.reports.offered()) == [(0, at, at + 2) for at in range(100, 180, 2)]
    job.second.page(100, 100)
    await job.deliver()
    assert job.second.leader.ledger.stage(0).settled.covers(100, 182)
    assert list(job.thief.remote.held()[0]) == [(182, 200)]


async def test_batches_too_large_for_one_message_go_on_in_several(job: Handover, monkeypatch: pytest.MonkeyPatch) -> None:
    await job.page(100, 100)
    for at in range(100, 200, 5):
        job.report(at, at + 5)
        await job.send()
    one = len(job.thief.remote.reports.unacknowledged()[0].signed.payload)
    monkeypatch.setattr(limits, "COMPLETION_BYTES_MAX", 3 * one + one // 2)
    job.over()
    job.thief.post.sent.clear()
    found = []
    while job.thief.remote.reports.ready:
        found.append([(result.lo, result.hi) for result in opened(await job.send()).results])
    assert [len(each) for each in found] == [3] * 6 + [2]
    assert [part for each in found for part in each] == [(at, at + 5) for at in range(100, 200, 5)]


async def test_word_of_the_earlier_leader_says_nothing_of_what_the_next_has(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 10)
    session = opened(await job.send()).session
    job.over()
    with pytest.raises(RefusedError):
        await job.thief.remote.handle(LEADER.id, Accepted(JOB, 1, session))
    await job.send()
    await job.thief.remote.handle(OTHER.id, Accepted(JOB, 1, session))
    assert list(job.thief.remote.held()[0]) == [(5, 10)]


async def test_what_an_earlier_leader_acknowledged_is_not_sent_again(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 10)
    await job.send()
    await job.first.deliver()
    job.over()
    assert not job.thief.remote.reports.ready
    assert not job.thief.remote.held()


async def test_full_window_of_unacknowledged_batches_opens_for_the_next_leader(job: Handover) -> None:
    await job.page(400, 400)
    for index in range(UNACKNOWLEDGED_MAX):
        job.report(400 + index, 401 + index)
        await job.send()
    job.report(700, 701)
    assert not job.thief.remote.reports.ready
    job.over()
    assert job.thief.remote.reports.ready
    sessions = {opened(await job.send()).session for _ in range(UNACKNOWLEDGED_MAX)}
    assert len(sessions) == 1
    assert not job.thief.remote.reports.ready


async def test_everything_is_collected_for_a_leadership_of_this_peer(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 6)
    await job.send()
    job.report(6, 9)
    collected = [opened(message) for message in await job.thief.remote.reports.collect()]
    assert [(r.lo, r.hi) for completion in collected for r in completion.results] == [(5, 6), (6, 9)]
    assert [completion.number for completion in collected] == [1, 2]


# ---- what is held ----------------------------------------------------------------------------------------------------


async def test_claims_go_to_the_new_leader_at_once(job: Handover) -> None:
    await job.page(5, 5)
    job.over()
    claims = [message for to, message in job.thief.post.sent if to == OTHER.id and isinstance(message, Claims)]
    assert claims[0].epoch == 2
    assert claims[0].held == ((0, ((5, 10),)),)
    await job.deliver()
    assert job.second.leader.claims.total(job.thief.id) == 5


async def test_queue_and_running_bundles_go_on(job: Handover) -> None:
    await job.page(20, 20)
    job.thief.place.workshop.slots = 1
    job.thief.place.workshop.pump()
    await settle()
    job.thief.place.workshop.pump()
    await settle()
    (child,) = job.thief.place.children
    run = child.runs[0]
    job.over()
    child.finish(run)
    await settle()
    assert list(job.thief.remote.held()[0]) == [(20, 40)]
    assert child.runs[1:], "it got the next bundle"
    assert not child.exited.is_set()


async def test_worker_whose_task_waits_for_children_ends(job: Handover) -> None:
    child = FakeChild()
    worker = SiteWorker(cast(Any, child), 1)
    worker.nests = True
    job.thief.site.crew.workers.append(worker)
    job.over()
    assert child.why == "dropped"


async def test_same_leadership_heard_again_changes_nothing(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 10)
    await job.send()
    job.thief.post.sent.clear()
    job.thief.remote.follow(LEADER.id, b"", 1)
    assert job.thief.post.sent == []
    assert not job.thief.remote.reports.ready


async def test_branch_is_another_leadership_though_peer_and_epoch_are_the_same(job: Handover) -> None:
    job.thief.remote.follow(LEADER.id, b"branch", 1)
    assert job.thief.post.take(Claims)


async def test_blobs_that_tasks_stored_are_told_before_anything_names_them(job: Handover) -> None:
    for number in range(limits.HAVE_MAX + 1):
        job.thief.remote._stored(b"%032d" % number)
    await job.page(5, 5)
    job.thief.post.sent.clear()
    job.over()
    kinds = [type(message) for to, message in job.thief.post.sent if to == OTHER.id]
    assert kinds[:3] == [Have, Have, Claims]
    assert sum(len(message.blobs) for message in job.thief.post.take(Have)) == limits.HAVE_MAX + 1


async def test_range_that_is_here_already_is_not_queued_twice(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 7)
    job.over()
    job.second.page(5, 5)
    answer = await job.second.outreach.steal(job.thief.id, job.thief.remote.ask(1))  # it doesn't know yet what is held here
    assert isinstance(answer, Give)
    assert await job.thief.remote.take(OTHER.id, answer) == 5
    assert job.queued() == [Work(0, 7, 10)]


async def test_what_was_offered_and_refused_is_run_when_it_is_granted(job: Handover) -> None:
    await job.page(5, 5)
    job.report(5, 10)
    await job.send()
    job.over()
    await job.send()
    await job.deliver()  # the second leader knows no such stage yet: refused, and acknowledged
    job.thief.remote._claim()  # a heartbeat later it is claimed no more
    await job.deliver()
    job.second.page(5, 5)
    await job.second.steal(job.thief)
    assert job.queued() == [Work(0, 5, 10)]


# ---- what others get -------------------------------------------------------------------------------------------------


async def test_stage_not_declared_anew_is_given_only_to_who_knows_it(job: Handover) -> None:
    await job.page(5, 5)
    job.over()
    job.over(job.third)
    unknowing = await job.thief.remote.steal(job.third.id, job.third.remote.ask(1))
    assert isinstance(unknowing, Nothing)
    leader = Steal(JOB, 2, 1, (), ((0, 1),), bare=True)
    assert isinstance(await job.thief.remote.steal(OTHER.id, leader), Give)


async def test_grants_are_of_the_new_epoch(job: Handover) -> None:
    await job.page(5, 5)
    job.over()
    old = await job.thief.remote.steal(job.third.id, job.third.remote.ask(1))
    assert isinstance(old, Nothing)
    assert old.fence == 2
    job.second.page(5, 5)
    await job.second.steal(job.thief)
    job.over(job.third)
    answer = await job.thief.remote.steal(job.third.id, job.third.remote.ask(1))
    assert isinstance(answer, Give)
    await job.third.remote.take(job.thief.id, answer)
    assert job.third.site.deque.total


async def test_grant_of_the_earlier_leader_comes_too_late(job: Handover) -> None:
    job.first.page(5, 5)
    answer = await job.first.outreach.steal(job.thief.id, job.thief.remote.ask(1))
    job.over()
    assert isinstance(answer, Give)
    with pytest.raises(FencedError):
        await job.thief.remote.take(LEADER.id, answer)
    assert not job.thief.remote.held()


# ---- what is declared otherwise --------------------------------------------------------------------------------------


async def running(job: Handover) -> FakeChild:
    """A worker of the thief that has a bundle."""
    job.thief.place.workshop.slots = 1
    for _ in range(2):
        job.thief.place.workshop.pump()
        await settle()
    (child,) = job.thief.place.children
    assert child.runs
    return child


async def test_segment_cut_otherwise_replaces_what_is_here_of_it(job: Handover) -> None:
    await job.page(5, 5, 5, 5)
    assert job.queued() == [Work(0, 10, 20)]
    child = await running(job)
    lo = child.runs[0].lo
    job.over()
    job.thief.place.workshop.slots = 0
    job.second.page(20)
    await job.second.steal(job.thief)
    assert child.why == "dropped"
    held = job.thief.site.stages[0].held
    assert [(each.segment.first, each.segment.count) for each in held.values()] == [(0, 20)]
    assert job.thief.site.deque.total == 10
    assert lo >= 10


async def test_result_of_arguments_that_were_replaced_names_those(job: Handover) -> None:
    await job.page(5, 5)
    child = await running(job)
    child.finish(child.runs[0], 6, 5)  # said before it is ended
    job.over()
    job.thief.place.workshop.slots = 0
    job.second.open(1, OTHER_FUNCTION)
    job.second.producer.handle(wire.Page(0, 0, (10,), (len(segment_bytes(0, 10)),)), segment_bytes(0, 10))
    await job.second.steal(job.thief)
    (result,) = opened(await job.send()).results
    assert result.segment == segment_name(5, blake3(segment_bytes(5, 10)).digest())


async def test_stage_of_another_function_replaces_the_stage(job: Handover, tmp_path: Path) -> None:
    await job.page(5, 5)
    child = await running(job)
    job.report(9, 10)
    (tmp_path / "3").mkdir()
    other = Team(job.first.nursery, tmp_path / "3", helpers=0, identity=OTHER, epoch=2)
    other.open(function=OTHER_FUNCTION)
    other.page(5, 5)
    job.over()
    job.thief.place.workshop.slots = 0
    await other.steal(job.thief)
    assert child.exited.is_set()
    assert job.thief.site.function_hash(0) == blake3(OTHER_FUNCTION).digest()
    assert job.queued() == [Work(0, 5, 9)]  # task 9 is on offer: of the old function, as the report says
    (result,) = opened(await job.send()).results
    assert result.function == DIGEST


async def test_segment_cut_otherwise_in_the_same_epoch_is_refused(job: Handover) -> None:
    await job.page(5, 5)
    job.thief.site.deque.remove(0, 5, 10)
    other = Team(job.first.nursery, job.first.folder / "more", helpers=0)
    other.open()
    other.page(10)
    answer = await other.outreach.steal(job.thief.id, job.thief.remote.ask(1))
    assert isinstance(answer, Give)
    with pytest.raises(RefusedError, match="cut otherwise"):
        await job.thief.remote.take(LEADER.id, answer)
    assert not job.thief.post.take(GrantTaken)


async def test_worker_that_does_not_end_refuses_the_grant_for_now(
    autojump_clock: trio.testing.MockClock, job: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    await job.page(5, 5)
    child = await running(job)
    monkeypatch.setattr(child, "kill", lambda why: None)
    job.over()
    job.thief.place.workshop.slots = 0
    job.second.page(10)
    answer = await job.second.outreach.steal(job.thief.id, job.thief.remote.ask(1))
    assert isinstance(answer, Give)
    with pytest.raises(RefusedError, match="declared otherwise"):
        await job.thief.remote.take(OTHER.id, answer)


async def test_child_that_the_new_leader_forgot_is_no_concern_of_the_old(job: Handover) -> None:
    job.over()
    with pytest.raises(RefusedError):
        await job.thief.remote.handle(LEADER.id, RelayClosed(JOB, 1))


# ---- results kept for later leaders ----------------------------------------------------------------------------------


class Store:
    def __init__(self) -> None:
        self.pins: set[tuple[str, bytes]] = set()

    def pin(self, owner: str, blob: bytes) -> None:
        self.pins.add((owner, blob))

    def unpin(self, owner: str, blob: bytes | None = None) -> None:
        self.pins = {pin for pin in self.pins if pin[0] != owner or (blob is not None and pin[1] != blob)}


def test_oldest_results_make_room_on_the_shelf() -> None:
    store = Store()
    shelf = Shelf(cast(Any, store), 100)
    for number in range(4):
        shelf.keep(JOB, b"%d" % number, 40)
    assert shelf.blobs(JOB) == [b"2", b"3"]
    assert {blob for _, blob in store.pins} == {b"2", b"3"}
    assert shelf.used_bytes == 80
    shelf.clear(JOB)
    assert (store.pins, shelf.used_bytes) == (set(), 0)


async def test_large_result_stays_after_its_leader_took_it(job: Handover) -> None:
    store = Store()
    job.thief.remote.reports._shelf = Shelf(cast(Any, store), 1 << 20)
    await job.page(5, 5)
    body = result_bytes(5, 10) + b" " * limits.RESULT_INLINE_BYTES
    job.thief.site.deque.remove(0, 5, 10)
    job.thief.remote.result(0, 5, 10, body, 10)
    await job.send()
    await job.first.deliver()
    await settle()
    await job.first.deliver()
    assert not job.thief.remote.held()
    assert store.pins == {(f"results:{JOB.hex()}", blake3(body).digest())}
