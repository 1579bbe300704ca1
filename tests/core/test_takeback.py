"""A leader whose slots are free takes queued ranges back from its thieves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.errors import RefusedError
from grid.core.messages import Give, Message, Nothing
from grid.takeback import TakeBack
from tests.core.team import Team


async def thief_with(team: Team, *sizes: int) -> None:
    """The first helper took about half of a stage, and said so; then the leader's own queue is emptied into it."""
    helper = team.helpers[0]
    team.open()
    team.page(*sizes)
    while team.site.deque:
        await team.steal(helper)
        await team.deliver()
    helper.remote._claim()
    await team.deliver()


def take_back(team: Team, asked: list[PeerId], empty: bool = False) -> TakeBack:
    async def request(peer: PeerId, message: Message, timeout_s: float) -> Message:
        asked.append(peer)
        assert message.bare  # type: ignore[attr-defined]
        if empty:
            return Nothing()
        return await team.helpers[0].remote.steal(team.leader.me, cast(Any, message))

    return TakeBack(team.leader, team.outreach, 1, cast(Any, team.post), request)


async def test_idle_leader_gets_about_half_of_a_thiefs_queue(tmp_path: Path, nursery: Any) -> None:
    team = Team(nursery, tmp_path, slots=2)
    team.place.workshop.draining = True  # nothing runs while the thief takes it all
    await thief_with(team, 40, 40)
    team.place.workshop.draining = False
    team.site.closed = True
    asked: list[PeerId] = []
    assert await take_back(team, asked)._ask_one()
    assert asked == [team.helpers[0].id]
    back, left = team.site.deque.total, team.helpers[0].site.deque.total
    assert back + left == 80
    assert 20 <= back <= 60
    assert team.leader.tallies[team.leader.me].stolen == back
    await team.deliver()
    assert team.helpers[0].remote.giver.held() == []


async def test_tasks_settled_meanwhile_do_not_come_back(tmp_path: Path, nursery: Any) -> None:
    team = Team(nursery, tmp_path, slots=1)
    team.place.workshop.draining = True
    await thief_with(team, 10)
    team.site.closed = True
    team.leader.cancel(0, 0, 10)
    assert not await take_back(team, [])._ask_one()
    assert team.site.deque.total == 0


async def test_forged_grant_is_refused(tmp_path: Path, nursery: Any) -> None:
    team = Team(nursery, tmp_path, slots=1, helpers=2)
    team.place.workshop.draining = True
    await thief_with(team, 10)
    genuine = await team.helpers[0].remote.steal(team.leader.me, team.helpers[1].remote.ask(1))
    assert isinstance(genuine, Give)
    with pytest.raises(RefusedError):
        take_back(team, [])._take(team.helpers[1].id, genuine)


async def test_busy_leader_does_not_ask(tmp_path: Path, nursery: Any, autojump_clock: Any) -> None:
    team = Team(nursery, tmp_path, slots=0)
    await thief_with(team, 10)
    asked: list[PeerId] = []
    with trio.move_on_after(30):
        await take_back(team, asked).run()
    assert asked == []


async def test_thief_with_nothing_queued_is_asked_less_and_less_often(tmp_path: Path, nursery: Any, autojump_clock: Any) -> None:
    team = Team(nursery, tmp_path, slots=1)
    team.place.workshop.draining = True
    await thief_with(team, 10)
    team.place.workshop.draining = False
    asked: list[PeerId] = []

    async def claim() -> None:
        while True:  # a thief that is silent is not asked at all
            team.helpers[0].remote._claim()
            await team.deliver()
            await trio.sleep(limits.HEARTBEAT_S)

    nursery.start_soon(claim)
    with trio.move_on_after(30):
        await take_back(team, asked, empty=True).run()
    assert 20 < len(asked) < 60


async def test_leader_whose_own_workers_have_all_that_is_left_wants_nothing(tmp_path: Path, nursery: Any) -> None:
    team = Team(nursery, tmp_path, slots=2)
    mine = take_back(team, [])
    team.open()
    team.page(1)
    await trio.testing.wait_all_tasks_blocked()
    assert team.leader.unsettled == team.site.in_hand == 1
    assert team.place.workshop.free == 1
    assert not mine._wanting()
    team.place.workshop.draining = True
    team.page(40)
    while team.site.deque:
        await team.steal(team.helpers[0])
        await team.deliver()
    team.place.workshop.draining = False
    assert mine._wanting()
