"""Joining with an invite, and every way that fails."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
import trio

from dht.core.invite import Invite, make_invite
from dht.core.membership import Chain, Membership, MembershipError
from dht.network import Address
from grid.transport.channel import MAGIC, initiate
from grid.transport.errors import JoinError, Refused, RemoteError
from grid.transport.hello import JOIN, Credentials
from grid.transport.join import join
from grid.transport.limits import JOINS_MAX
from tests.transport.support import MEMBER, NOW_S, Grid, World, identity
from tests.transport.test_mesh import peers

JOINER = identity(77)


def invite_to(grid: Grid, *addresses: Address, lifetime_s: int = 3600) -> Invite:
    names = tuple(f"{host}:{port}" for host, port in addresses)
    return make_invite(grid.founder, names, MEMBER, b"", 1, NOW_S, lifetime_s, random.Random(5))[0]


def admit_by(member: Membership) -> Any:
    def admit(invite: bytes, key: bytes) -> Chain:
        return member.admit(key, MEMBER, b"", NOW_S)

    return admit


async def test_joins_and_connects(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        one.handler.admitter = admit_by(one.mesh._membership)
        invite = Invite.decode(invite_to(grid, one.address).encode())
        membership, known = await join(world.network("new"), invite, JOINER, NOW_S)
        assert membership.identity is JOINER
        assert membership.check(membership.chain, NOW_S).key == JOINER.public
        assert known == [one.address, two.address]
        (_, who, (invite_key, key, hello)) = next(event for event in one.handler.events if event[0] == "admit")
        assert (who, invite_key, key) == (JOINER.id, invite.key.public, JOINER.public)
        assert (hello.chain, hello.name, hello.address) == ((), "", "")  # it told nothing else
        assert one.mesh.counters["joins"] == 1


@pytest.mark.parametrize("code", ["expired", "used"])
async def test_a_members_no_is_final(clock: Any, world: World, grid: Grid, code: str) -> None:
    async with peers(world, grid, 2) as (one, two):

        def admit(invite: bytes, key: bytes) -> Chain:
            raise RemoteError(code, f"this invite is {code}: ask for a new one")

        one.handler.admitter, two.handler.admitter = admit, admit_by(two.mesh._membership)
        with pytest.raises(JoinError) as caught:
            await join(world.network("new"), invite_to(grid, one.address, two.address), JOINER, NOW_S)
        assert (caught.value.code, caught.value.text) == (code, f"this invite is {code}: ask for a new one")
        assert one.mesh.counters["joins_refused"] == 1


async def test_unknown_here_is_tried_elsewhere(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        with pytest.raises(JoinError, match="no such invite") as caught:
            await join(world.network("new"), invite_to(grid, one.address, two.address), JOINER, NOW_S)
        assert caught.value.code == "unknown"
        two.handler.admitter = admit_by(two.mesh._membership)
        membership, _ = await join(world.network("new"), invite_to(grid, one.address, two.address), JOINER, NOW_S)
        assert membership.chain[-2].key == two.mesh._membership.identity.public


async def test_dead_addresses_are_passed_over(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await two.stop()
        one.handler.admitter = admit_by(one.mesh._membership)
        invite = invite_to(grid, two.address, ("127.0.0.1", 1), one.address)
        _, known = await join(world.network("new"), invite, JOINER, NOW_S)
        assert known[0] == one.address


async def test_nobody_answers(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 1) as (one,):
        await one.stop()
        with pytest.raises(JoinError) as caught:
            await join(world.network("new"), invite_to(grid, one.address, ("127.0.0.1", 1)), JOINER, NOW_S)
        assert caught.value.code == "unreachable"
        assert f"{one.address[0]}:{one.address[1]}, 127.0.0.1:1" in str(caught.value)
        with pytest.raises(JoinError, match="names no address"):
            await join(world.network("new"), invite_to(grid), JOINER, NOW_S)


async def test_silent_address_costs_seconds_not_minutes(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    assert memory_world.memory is not None
    async with peers(memory_world, grid, 2) as (one, two):
        memory_world.memory.partition("new", two.name)
        one.handler.admitter = admit_by(one.mesh._membership)
        start = trio.current_time()
        await join(memory_world.network("new"), invite_to(grid, two.address, one.address), JOINER, NOW_S)
        assert trio.current_time() - start < 6


async def test_another_grid_answers(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, Grid(root=2000), 1) as (foreign,):
        with pytest.raises(JoinError, match="belongs to another grid") as caught:
            await join(world.network("new"), invite_to(grid, foreign.address), JOINER, NOW_S)
        assert caught.value.code == "wrong-grid"
        assert foreign.handler.events == []


async def test_another_version_answers(clock: Any, world: World, grid: Grid) -> None:
    async with trio.open_nursery() as nursery:
        listener = await world.network("old").listen_stream(world.any_port("old"))

        async def old_peer() -> None:
            stream, _ = await listener.accept()
            await stream.receive_some(100)
            await stream.send_all(struct.pack(">8sH", MAGIC, 7))
            await stream.aclose()

        nursery.start_soon(old_peer)
        with pytest.raises(JoinError, match=r"version 7.*update peergrid here") as caught:
            await join(world.network("new"), invite_to(grid, listener.address), JOINER, NOW_S)
        assert caught.value.code == "version"
        await listener.aclose()


async def test_expired_invite_sends_nothing(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 1) as (one,):
        with pytest.raises(JoinError, match="has expired"):
            await join(world.network("new"), invite_to(grid, one.address), JOINER, NOW_S + 3600)
        assert one.mesh.counters["accepted"] == 0


async def test_stranger_without_the_invites_key(clock: Any, world: World, grid: Grid) -> None:
    """Who saw an invite's public key in the DHT can't use it."""
    async with peers(world, grid, 1) as (one,):
        one.handler.admitter = admit_by(one.mesh._membership)
        invite = invite_to(grid, one.address)
        forged = identity(666)
        forged.public = invite.key.public
        credentials = Credentials(grid.root.public, JOINER, chain=lambda: (), check=lambda chain: chain[-1])
        stream = await world.network("new").open_stream(one.address)
        with pytest.raises(Exception, match="broke off"):
            await initiate(stream, credentials, JOIN, invite=forged)
        stream = await world.network("new").open_stream(one.address)
        with pytest.raises(Refused, match="no certificate"):
            await initiate(stream, credentials, JOIN)
        assert one.handler.events == []


async def test_false_certificate_is_not_believed(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 1) as (one,):
        for chain in ((), grid.member(5).chain, Grid(root=2000).member(77).chain):
            one.handler.admitter = lambda invite, key, chain=chain: chain
            with pytest.raises(JoinError, match="does not hold"):
                await join(world.network("new"), invite_to(grid, one.address), JOINER, NOW_S)


async def test_fault_and_hang_of_the_admitting_peer(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 1) as (one,):

        def fault(invite: bytes, key: bytes) -> Chain:
            raise MembershipError("this peer may not invite")

        one.handler.admitter = fault
        with pytest.raises(JoinError, match="failed on this invite"):
            await join(memory_world.network("new"), invite_to(grid, one.address), JOINER, NOW_S)

        async def hang(invite: bytes, key: bytes, hello: Any) -> Chain:
            await trio.sleep_forever()
            return ()

        one.handler.admit = hang  # type: ignore[method-assign]
        errors: list[str] = []

        async def ask(number: int) -> None:
            try:
                await join(memory_world.network("new"), invite_to(grid, one.address), identity(number), NOW_S)
            except JoinError as error:
                errors.append(str(error))

        async with trio.open_nursery() as nursery:
            for number in range(JOINS_MAX + 3):
                nursery.start_soon(ask, 700 + number)
        assert sum("too many" in error for error in errors) == 3
        assert sum("in time" in error for error in errors) == JOINS_MAX
