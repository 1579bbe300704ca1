"""Connections that nobody needs: closed sooner the more there are, by both ends, without a loss."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.transport import spare as spare_module
from grid.transport.dialling import AddressBook
from grid.transport.limits import CLOSE_S, DEAD_S, IDLE_S, SPARE_CHECK_S, SPARE_S
from grid.transport.link import Link
from tests.transport.support import Grid, Peer, World
from tests.transport.test_mesh import hang, peers

Clock = trio.testing.MockClock
LONG_S = 4 * (SPARE_S + SPARE_CHECK_S)


@pytest.fixture(autouse=True)
def two_spare_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_module, "SPARE_LINKS", 2)


def connected(peer: Peer) -> set[PeerId]:
    return set(peer.mesh.connected())


def link(here: Peer, there: Peer) -> Link:
    found = here.mesh._remotes[there.id].link
    assert found is not None
    return found


async def test_longest_silent_of_too_many_go(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 6) as (one, *others):
        for other in others:
            await one.mesh.send(other.id, b"x")
            await trio.sleep(0.1)
        await trio.sleep(SPARE_S - 1)
        assert connected(one) == {other.id for other in others}, "none goes that carried something lately"
        await trio.sleep(LONG_S)
        assert connected(one) == {others[3].id, others[4].id}
        for gone in others[:3]:
            assert connected(gone) == set()
            assert gone.handler.messages(one.id) == [b"x"]
            assert one.handler.kinds(gone.id) == ["up", "down"]
        assert set(one.mesh._remotes) == connected(one), "nothing is remembered of the others"


async def test_as_many_as_may_be_spare_stay(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 3) as (one, two, three):
        await one.mesh.connect(two.id)
        await one.mesh.connect(three.id)
        await trio.sleep(IDLE_S / 2)
        assert connected(one) == {two.id, three.id}
        await trio.sleep(IDLE_S)
        assert connected(one) == connected(two) == connected(three) == set(), "until they were silent for very long"


async def test_kept_by_either_end_they_stay_and_do_not_count(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 6) as (one, two, three, four, five, six):
        one.mesh.keep(two.id)
        three.mesh.keep(one.id)
        for other in (four, five, six):
            await one.mesh.send(other.id, b"x")
            await trio.sleep(0.1)
        await trio.sleep(LONG_S)
        assert connected(one) == {two.id, three.id, five.id, six.id}
        one.mesh.unkeep(two.id)
        await trio.sleep(LONG_S)
        assert connected(one) == {three.id, five.id, six.id}, "what came over it last came before the others"


@pytest.mark.parametrize("needs_it", [0, 1])
async def test_needed_by_either_end_they_stay(autojump_clock: Clock, memory_world: World, grid: Grid, needs_it: int) -> None:
    """A helper's connection to its leader, say, over which nothing may come for many seconds."""
    needed: set[tuple[PeerId, PeerId]] = set()
    async with trio.open_nursery() as nursery:
        made = []
        for number in range(5):
            member = grid.member(number + 1)
            me = member.identity.id
            made.append(Peer(memory_world, member, f"host-{number}", in_use=lambda peer, me=me: (me, peer) in needed))
        for peer in made:
            await peer.start(nursery)
        one, *others = made
        one.knows(*others)
        needed.update(((one.id, others[0].id), (others[0].id, one.id))[needs_it : needs_it + 1])
        for other in others:
            await one.mesh.connect(other.id)
            await trio.sleep(0.1)
        await trio.sleep(LONG_S + IDLE_S / 2)
        assert connected(one) == {others[0].id, others[2].id, others[3].id}
        assert "down" not in others[0].handler.kinds(one.id)
        needed.clear()
        await trio.sleep(2 * IDLE_S)
        assert connected(one) == set()
        nursery.cancel_scope.cancel()


async def test_request_under_way_holds_its_connection(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 5) as (one, two, *others), trio.open_nursery() as nursery:
        two.handler.answer = hang
        nursery.start_soon(one.mesh.request, two.id, b"slow", 10 * LONG_S)
        for other in others:
            await one.mesh.connect(other.id)
        await trio.sleep(LONG_S)
        assert two.id in connected(one)
        assert len(connected(one)) == 3
        nursery.cancel_scope.cancel()


async def test_call_for_blobs_holds_its_connection(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    """The other end was asked to dial with blobs, and has not yet."""
    async with peers(memory_world, grid, 5) as (one, two, *others):
        await one.mesh.connect(two.id)
        one.mesh._remotes[two.id].called = trio.Event()
        for other in others:
            await one.mesh.connect(other.id)
        await trio.sleep(LONG_S)
        assert two.id in connected(one)
        one.mesh._remotes[two.id].called = None
        await trio.sleep(LONG_S)
        assert two.id not in connected(one)


async def test_closed_one_is_dialled_again_when_needed(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 5) as (one, two, *others):
        await one.mesh.send(two.id, b"first")
        for other in others:
            await one.mesh.connect(other.id)
        await trio.sleep(LONG_S)
        assert two.id not in connected(one)
        assert await two.mesh.request(one.id, b"second", 5) == b"second"
        await one.mesh.send(two.id, b"third")
        await two.handler.until(lambda: two.handler.messages() == [b"first", b"third"])


@pytest.mark.parametrize("seed", range(60))
async def test_nothing_is_lost_whatever_is_said_meanwhile(autojump_clock: Clock, grid: Grid, seed: int) -> None:
    """Both ends send and ask at random moments while one, or both, propose to part: all arrives once, all is answered."""
    rng = random.Random(seed)
    world = World(memory=True, latency_s=0.02, jitter_s=0.01)
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        sent: dict[Peer, list[bytes]] = {one: [], two: []}
        parted = 0

        async def talk(here: Peer, there: Peer) -> None:
            for number in range(40):
                await trio.sleep(rng.random() * 0.1)
                message = b"%d" % number
                if rng.random() < 0.4:
                    assert await here.mesh.request(there.id, message, 10) == message
                    continue
                sent[here].append(message)
                if rng.random() < 0.5 and here.mesh.post(there.id, message):
                    continue
                await here.mesh.send(there.id, message)

        async def part() -> None:
            nonlocal parted
            while True:
                await trio.sleep(rng.random() * 0.1)
                for here, there in ((one, two), (two, one)):
                    remote = here.mesh._remotes.get(there.id)
                    if rng.random() < 0.5 and remote is not None and remote.link is not None and not remote.pending:
                        remote.link.propose_end()
                        parted += remote.link.finishing

        async with trio.open_nursery() as parting:
            parting.start_soon(part)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk, one, two)
                nursery.start_soon(talk, two, one)
            parting.cancel_scope.cancel()
        await trio.sleep(10)
        assert parted > 5
        assert one.handler.messages() == sent[two]
        assert two.handler.messages() == sent[one]


async def test_real_sockets_part_in_friendship(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.send(two.id, b"x")
        await two.handler.until(two.handler.got("message", 1))
        link(one, two).propose_end()
        for each in (one, two):
            await each.handler.until(each.handler.got("down", 1))
        assert await one.mesh.request(two.id, b"y", 5) == b"y"


async def test_proposal_that_gets_no_answer_ends_it(
    autojump_clock: Clock, memory_world: World, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with peers(memory_world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        await trio.sleep(1)
        monkeypatch.setattr(link(two, one), "_answer_spare", lambda: None)
        link(one, two).propose_end()
        with trio.fail_after(DEAD_S + CLOSE_S):
            await one.mesh.send(two.id, b"waits for the end")
        await two.handler.until(two.handler.got("message", 1))


async def test_neighbours_are_known_at_both_ends(autojump_clock: Clock, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 3) as (one, two, three):
        one.mesh.keep(two.id)
        await three.mesh.connect(one.id)
        await two.handler.until(two.handler.got("up", 1))
        await trio.sleep(0.1)
        assert one.mesh.neighbours() == [two.id]
        assert two.mesh.neighbours() == [one.id]
        assert three.mesh.neighbours() == []
        three.mesh.keep(one.id)
        await trio.sleep(0.1)
        assert set(one.mesh.neighbours()) == {two.id, three.id}
        one.mesh.unkeep(two.id)
        await trio.sleep(SPARE_S)
        assert one.mesh.neighbours() == [three.id]
        assert two.mesh.neighbours() == []


def test_addresses_of_those_connected_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.transport.dialling.ADDRESSES_KNOWN_MAX", 2)
    names = [PeerId(bytes([n]) * 20) for n in range(6)]
    held = {names[0], names[1], names[2]}
    book = AddressBook(held.__contains__)
    for name in names:
        book.learn(name, [("host", 1)])
    assert [name for name in names if book.get(name)] == [*names[:3], *names[4:]]
    held.discard(names[0])
    book.tidy()
    assert [name for name in names if book.get(name)] == [*names[1:3], *names[4:]]
