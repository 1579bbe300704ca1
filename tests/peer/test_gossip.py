"""News among neighbours: taken, passed on once, and set right for who is behind."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from dht.core.identity import Identity, PeerId
from grid.core import limits
from grid.core.board import Board
from grid.core.errors import RefusedError
from grid.core.job import FINISHED, RUNNING, job_id
from grid.core.mandate import Mandate, endorse
from grid.core.messages import JobNews, JobsWanted
from grid.core.news import sign_news
from grid.gossip import Gossip
from tests.core.fakes import FakePost
from tests.core.material import LEADER, MEMBERSHIP, NOW_S, ROOT, signed_spec

ME, NEAR, FAR, OTHER = (PeerId(bytes([n]) * 20) for n in (1, 2, 3, 4))
SIGNED = signed_spec()
JOB = job_id(SIGNED.payload)
NEXT = Identity(b"2" * 32)
Clock = trio.testing.MockClock


class Peer:
    """One peer's gossip, and what it says to whom."""

    def __init__(self) -> None:
        self.board = Board()
        self.post = FakePost()
        links = [NEAR, FAR, OTHER]
        mesh = SimpleNamespace(
            connected=lambda: links, neighbours=lambda: [NEAR, FAR], learn=lambda *known: None, unkeep=lambda peer: None
        )
        self.gossip = Gossip(
            ME,
            ROOT.public,
            self.board,
            cast(Any, None),
            cast(Any, mesh),
            cast(Any, self.post),
            lambda chain: MEMBERSHIP.check(chain, NOW_S),
            random.Random(1),
            lambda job, entry: None,
        )

    def told(self, peer: PeerId) -> list[tuple[int, int, str]]:
        """What was said to it since the last time."""
        found = [(m.epoch, m.version, m.state) for to, m in self.post.sent if to == peer]
        self.post.sent = [(to, m) for to, m in self.post.sent if to != peer]
        return found


def first(version: int = 1, state: str = RUNNING) -> JobNews:
    return sign_news(JobNews(SIGNED, 1, LEADER.id, ("h", 1), version, state, True), LEADER)


def second(version: int = 1, voters: tuple[Identity, ...] = (LEADER, NEXT), epoch: int = 2) -> JobNews:
    mandate = Mandate(tuple(v.id for v in voters), tuple(endorse(JOB, b"", epoch, NEXT.id, v) for v in voters))
    return sign_news(JobNews(SIGNED, epoch, NEXT.id, ("h", 1), version, RUNNING, True, mandate=mandate), NEXT)


@pytest.fixture
def peer() -> Peer:
    return Peer()


async def test_news_of_an_elected_leader_are_passed_on_once(peer: Peer) -> None:
    for _ in range(2):
        peer.gossip.hear(second(), NEAR)
    assert peer.told(FAR) == [(2, 1, RUNNING)]
    assert peer.told(NEAR) == []
    assert peer.told(OTHER) == [], "a connection for work, which comes and goes, is no neighbour's"


async def test_neighbours_are_asked_what_they_know_when_they_are_chosen_or_come(peer: Peer) -> None:
    for other in (NEAR, OTHER):
        peer.gossip.up(other)
    assert peer.post.sent == []
    peer.gossip._choose({NEAR, PeerId(b"\x05" * 20)})
    assert peer.post.sent == [(NEAR, JobsWanted())]
    peer.gossip.up(PeerId(b"\x05" * 20))
    assert peer.post.sent[1:] == [(PeerId(b"\x05" * 20), JobsWanted())]


async def test_who_has_just_joined_has_neighbours_as_soon_as_it_knows_others(autojump_clock: Clock, peer: Peer) -> None:
    """News are told to neighbours only: a job of which a newcomer does not hear at its start it hears of seconds later."""
    contacts: list[Any] = []
    kept: dict[PeerId, float] = {}
    peer.gossip._node = cast(Any, SimpleNamespace(contacts=lambda: contacts))
    peer.gossip._mesh.keep = lambda peer, addresses: kept.setdefault(peer, trio.current_time())  # type: ignore[method-assign, assignment]
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.gossip.run)
        await trio.sleep(0.2)
        contacts.append(SimpleNamespace(id=NEAR, address=("h", 1)))
        await trio.sleep(60.0)
        contacts.append(SimpleNamespace(id=FAR, address=("h", 2)))
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert kept[NEAR] - began_s < 0.5
    assert FAR in kept


async def test_leader_that_nobody_elected_is_not_heard(peer: Peer) -> None:
    with pytest.raises(RefusedError):
        peer.gossip.hear(msgspec.structs.replace(second(), mandate=Mandate()), NEAR)
    assert peer.board.get(JOB) is None


async def test_who_tells_of_an_earlier_epoch_learns_of_the_present_one_now_and_then(autojump_clock: Clock, peer: Peer) -> None:
    peer.gossip.hear(second(), FAR)
    peer.told(NEAR)
    for version in range(5):
        peer.gossip.hear(first(version + 1), NEAR)
    assert peer.told(NEAR) == [(2, 1, RUNNING)]
    await trio.sleep(limits.ANNOUNCE_S)
    peer.gossip.hear(first(9), NEAR)
    assert peer.told(NEAR) == [(2, 1, RUNNING)]
    assert peer.told(FAR) == []


async def test_who_thinks_that_the_job_runs_learns_that_it_ended(peer: Peer) -> None:
    peer.gossip.hear(first(5, FINISHED), FAR)
    peer.told(NEAR)
    peer.gossip.hear(first(4), NEAR)
    assert peer.told(NEAR) == [(1, 5, FINISHED)]


async def test_older_word_of_the_same_leader_is_no_reason_to_answer(peer: Peer) -> None:
    peer.gossip.hear(first(5), FAR)
    peer.told(NEAR)
    peer.gossip.hear(first(4), NEAR)
    assert peer.told(NEAR) == []


async def test_replicas_that_were_all_replaced_are_known_to_a_newcomer_by_their_lineage(peer: Peer) -> None:
    peer.gossip.hear(first(), NEAR)
    peer.gossip.hear(second(), NEAR)
    stranger = Identity(b"3" * 32)
    peer.gossip.hear(second(1, (NEXT, stranger), 3), NEAR)
    late = second(2, (NEXT, stranger), 3)
    with pytest.raises(RefusedError):
        Peer().gossip.hear(late, NEAR)
    told = msgspec.structs.replace(late, lineage=peer.board.lineage(JOB, late))
    newcomer = Peer()
    newcomer.gossip.hear(told, NEAR)
    entry = newcomer.board.get(JOB)
    assert entry is not None
    assert entry.news.epoch == 3
