"""Nodes find each other, notice who is gone, keep records and answer: in virtual time, and on loopback."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from dht.contact import Contact, Target
from dht.core.identity import peer_id
from dht.core.invite import make_invite
from dht.core.membership import ROLES, Membership, MembershipError
from dht.core.records import RecordError, make_record
from dht.grants import find_grant, publish_grant, register, spend, spent
from dht.node import Node, Unanswered
from dht.protocol import Protocol
from dht.storage import (
    BYTES_MAX,
    ISSUER_BYTES_MAX,
    ISSUER_KINDS_PER_KEY_MAX,
    ISSUER_RECORDS_MAX,
    KEYS_MAX,
    RECORDS_PER_KEY_MAX,
    Storage,
)
from tests.dht.world import (
    EPOCH_S,
    ROOT,
    Grid,
    founder,
    identity,
    loopback_grid,
    member,
    memory_grid,
    until,
    wall_clock,
)


def protocol_of(node: Node) -> Protocol:
    return node._protocol


def is_settled(node: Node) -> bool:
    """Whether the node has met whom it heard of, and is answered as fast as nodes that have nothing else to do."""
    protocol = protocol_of(node)
    return not protocol.named and not protocol.introductions.going_on and protocol.rpc.states.usual_rtt_s < 0.1


def failures(grid: Grid) -> int:
    return sum(node.counters["failed"] for node in grid.nodes.values())


# finding each other


@pytest.mark.parametrize("count", [2, 3, 5, 12])
async def test_a_few_peers_all_know_each_other_within_two_seconds(autojump_clock: MockClock, count: int) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(count)
        assert await grid.complete() < 2
        assert failures(grid) == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
async def test_a_few_peers_meet_on_a_bad_network(autojump_clock: MockClock, count: int, seed: int) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, seed, latency_s=0.05, jitter_s=0.05, loss=0.2, duplicate=0.1, reorder=0.1)
        await grid.start_all(count)
        await grid.complete(30)
        assert await grid.nodes[0].publish("test", bytes(20), b"v", 60) >= 1
        assert len(await grid.nodes[count - 1].lookup(bytes(20))) == 1
        assert failures(grid) == 0
        nursery.cancel_scope.cancel()


async def test_peers_started_before_their_bootstrap_meet_when_it_comes(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        for number in (1, 2, 3):
            await grid.start(number, [("h0", 4743)])
        await trio.sleep(30)
        await grid.start(0, [])
        await grid.complete(30)
        nursery.cancel_scope.cancel()


async def test_a_newcomer_joins_through_another_after_the_founder_stopped(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(4)
        await grid.complete()
        address = grid.nodes[0].address
        grid.stop(0)
        await grid.start(5, [address, grid.nodes[3].address])
        await grid.complete(5)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [2, 3, 5])
async def test_all_peers_restart_with_saved_contacts_only(autojump_clock: MockClock, tmp_path: Path, count: int) -> None:
    """The whole grid loses power: nobody is given a bootstrap address afterwards."""
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        for number in range(count):
            await grid.start(number, state_path=tmp_path / str(number))
        await grid.complete()
        await trio.sleep(15)
        for number in range(count):
            grid.stop(number, polite=False)
        await trio.sleep(100)
        for number in range(count):
            await grid.start(number, [], state_path=tmp_path / str(number))
            await trio.sleep(3)
        await grid.complete(20)
        nursery.cancel_scope.cancel()


async def test_contacts_of_peers_that_are_down_stay_saved(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start(0)
        await grid.start(1, state_path=tmp_path / "1")
        await grid.complete()
        await trio.sleep(4)
        grid.stop(0)
        await trio.sleep(30)  # alone: the file is not emptied
        grid.stop(1)
        await trio.sleep(1)
        await grid.start(0, [])
        await grid.start(1, [], state_path=tmp_path / "1")
        await grid.complete(5)
        nursery.cancel_scope.cancel()


async def test_a_split_grid_meets_again_when_the_link_heals(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        assert grid.memory is not None
        await grid.start_all(6)
        await grid.complete()
        halves = ["h0", "h1", "h2"], ["h3", "h4", "h5"]
        grid.memory.partition(*halves)
        await until(lambda: all(grid.knows(n) == 2 for n in grid.nodes), 20)
        grid.memory.heal()
        await grid.complete(60)
        nursery.cancel_scope.cancel()


async def test_no_subtree_of_ids_stays_unknown(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that all know only their own side of the id space never find the other by lookups alone."""
    monkeypatch.setitem(Protocol.__init__.__kwdefaults__, "k", 6)  # as 200 peers with the usual buckets
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, latency_s=0.01, jitter_s=0.04)
        await grid.start_all(60)
        await trio.sleep(20)
        ids = [Target(node.membership.identity.id) for node in grid.nodes.values()]
        for node in grid.nodes.values():
            for bucket in protocol_of(node).router.buckets:
                assert len(bucket) or sum(map(bucket.has_in_range, ids)) < 3
        nursery.cancel_scope.cancel()


async def test_a_long_chain_of_invitations_still_introduces(autojump_clock: MockClock) -> None:
    """Chains of over six certificates need several datagrams; they are sent root-first."""
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, loss=0.1, reorder=0.2)
        last = grid.membership(0)
        for number in range(100, 129):
            last = member(last, number)
        for number in (1, 2):
            grid.members[number] = member(last, number)
        assert len(grid.members[1].chain) == 31
        await grid.start_all(3)
        await grid.complete(20)
        await grid.nodes[1].publish("test", bytes(20), b"v", 60)
        grid.stop(1)
        assert len(await grid.nodes[2].lookup(bytes(20))) == 1
        nursery.cancel_scope.cancel()


async def test_a_revoked_or_expired_member_is_nobody(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        chain = grid.membership(0).admit(identity(2).public, ROLES["member"], b"", EPOCH_S, lifetime_s=30)
        grid.members[2] = Membership(ROOT.public, identity(2), chain)
        await grid.start_all(3)
        await grid.complete()
        await grid.nodes[1].publish("test", bytes(20), b"v", 600)
        grid.membership(0).revoke([identity(1).public])
        await until(lambda: all(c.id != identity(1).id for c in grid.nodes[0].contacts()), 30)
        assert await grid.nodes[0].lookup(bytes(20)) == []
        await until(lambda: grid.knows(0) == 0, 60)  # node 2's certificate ran out
        nursery.cancel_scope.cancel()


async def test_a_node_without_valid_certificate_does_not_start(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        chain = grid.membership(0).admit(identity(2).public, ROLES["member"], b"", EPOCH_S, lifetime_s=-1)
        grid.members[2] = Membership(ROOT.public, identity(2), chain)
        with pytest.raises(MembershipError, match="expired"):
            await grid.make(2).run()
        nursery.cancel_scope.cancel()


async def test_peers_farther_than_any_first_wait_meet_and_then_ask_once(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, latency_s=0.5)
        await grid.start_all(5)
        await grid.complete()
        assert any(node.counters["late"] for node in grid.nodes.values())
        await trio.sleep(20)
        before = sum((node.counters for node in grid.nodes.values()), start=Counter())
        await trio.sleep(60)
        later = sum((node.counters for node in grid.nodes.values()), start=Counter()) - before
        assert later["sent"] > 300
        assert later["repeated"] < 0.05 * later["sent"]
        assert all(grid.knows(n) == 4 for n in grid.nodes)
        nursery.cancel_scope.cancel()


async def test_a_record_that_a_near_peer_fails_to_take_goes_to_the_next_nearest(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(12)
        await grid.complete()
        key = bytes(20)
        near = sorted((n for n in grid.nodes if n), key=lambda n: Target(identity(n).id).distance_to(Target(key)))
        for number in near[:2]:
            protocol_of(grid.nodes[number]).rpc_store = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        assert await grid.nodes[0].publish("test", key, b"v", 600) == 8
        assert [n for n in near if grid.nodes[n]._storage.records(key)] == near[2:10]
        nursery.cancel_scope.cancel()


async def test_an_advertised_address_is_used_once_it_is_proven(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(2)
        await grid.start(2, node=grid.make(2, advertise=("h2", 4743)))
        await grid.start(3, node=grid.make(3, advertise=("nowhere", 9)))
        await grid.complete()
        await trio.sleep(20)
        for number in (0, 1):
            found = {c.id: c.address for c in grid.nodes[number].contacts()}
            assert found[identity(2).id] == ("h2", 4743)
            assert found[identity(3).id] == ("h3", 4743)
        nursery.cancel_scope.cancel()


def test_loopback_addresses_are_told_on_loopback_only() -> None:
    membership = founder()
    source = Contact(membership.identity.public, ("10.0.0.1", 1))

    async def check() -> None:
        protocol = Protocol(
            membership,
            source,
            Storage(source.id, wall_clock),
            rng=random.Random(1),
            clock=wall_clock,
            info=bytes,
        )
        near, far = Contact(identity(1).public, ("127.0.0.1", 2)), Contact(identity(2).public, ("10.0.0.2", 2))
        protocol.router.add_contact(near)
        protocol.router.add_contact(far)
        told = protocol._infos(bytes(20), Contact(identity(3).public, ("10.0.0.3", 3)), 20)
        assert [key for key, _, _ in told] == [far.key]
        assert len(protocol._infos(bytes(20), Contact(identity(3).public, ("127.0.0.1", 3)), 20)) == 2

    trio.run(check)


# noticing who is gone


async def test_who_says_goodbye_is_dropped_at_once(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(5)
        await grid.complete()
        grid.stop(4)
        assert await until(lambda: all(grid.knows(n) == 3 for n in grid.nodes), 1, 0.01) < 0.1
        await trio.sleep(10)
        assert all(grid.knows(n) == 3 for n in grid.nodes)  # and nobody brings it back
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [2, 5, 15])
async def test_who_dies_without_a_word_is_dropped_within_ten_seconds(autojump_clock: MockClock, count: int) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(count)
        await grid.complete()
        await trio.sleep(7)
        grid.stop(count - 1, polite=False)
        assert await until(lambda: all(grid.knows(n) == count - 2 for n in grid.nodes)) < 10
        await trio.sleep(20)
        assert all(grid.knows(n) == count - 2 for n in grid.nodes)
        nursery.cancel_scope.cancel()


async def test_nobody_is_dropped_on_a_lossy_network(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, loss=0.1)
        await grid.start_all(6)
        await grid.complete()
        for _ in range(100):
            await trio.sleep(1)
            assert all(grid.knows(n) == 5 for n in grid.nodes)
        nursery.cancel_scope.cancel()


async def test_with_15_of_50_gone_every_lookup_answers_in_two_seconds(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery, latency_s=0.01, jitter_s=0.04)
        await _fifty_minus_fifteen(grid, lookups=20)
        assert failures(grid) == 0
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_with_15_of_50_gone_every_lookup_answers_in_two_seconds_on_loopback() -> None:
    async with trio.open_nursery() as nursery:
        grid = loopback_grid(nursery)
        await _fifty_minus_fifteen(grid, lookups=20)
        assert failures(grid) == 0
        nursery.cancel_scope.cancel()


async def _fifty_minus_fifteen(grid: Grid, lookups: int) -> None:
    rng = random.Random(3)
    await grid.start_all(50)
    # fifty nodes that found a grid in one process are busy with each other's signatures first, which is not asked here
    await until(lambda: all(grid.knows(n) >= 25 and is_settled(node) for n, node in grid.nodes.items()), 60)
    keys = [rng.randbytes(20) for _ in range(lookups)]
    for i, key in enumerate(keys):
        assert await grid.nodes[i].publish("test", key, b"v", 3_600) >= 6
    for number in rng.sample(sorted(grid.nodes), 15):
        grid.stop(number, polite=False)
    alive = sorted(grid.nodes)
    for i, key in enumerate(keys):
        node = grid.nodes[alive[i % len(alive)]]
        with trio.fail_after(2):
            assert [r.value for r in await node.lookup(key)] == [b"v"]
        with trio.fail_after(2):
            await node.locate(peer_id(key))
    with trio.fail_after(4):
        assert len(await grid.nodes[alive[0]].crawl()) == 34


async def test_a_thousand_contacts_named_by_a_liar_do_not_stall_a_lookup(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(6)
        await grid.complete()
        await grid.nodes[1].publish("test", bytes(20), b"v", 600)
        liar = protocol_of(grid.nodes[5])
        liar._infos = lambda *_: tuple((random.randbytes(32), f"f{n}", 1) for n in range(20))  # type: ignore[method-assign]
        start_s = trio.current_time()
        assert len(await grid.nodes[0].lookup(bytes(20))) == 1
        assert trio.current_time() - start_s < 8.5
        await trio.sleep(30)
        assert grid.knows(0) == 5
        nursery.cancel_scope.cancel()


# status


async def test_crawl_and_info_tell_about_everybody(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(40)
        await grid.nodes[39].ready.wait()
        found = await grid.nodes[7].crawl()
        assert [c.id for c in found] == sorted(identity(n).id for n in range(40) if n != 7)
        told = {await grid.nodes[7].ask_info(contact) for contact in found}
        assert told == {f"node {n}".encode() for n in range(40) if n != 7}
        grid.stop(3, polite=False)
        gone = next(c for c in found if c.id == identity(3).id)
        with pytest.raises(Unanswered):
            await grid.nodes[7].ask_info(gone)
        assert len(await grid.nodes[7].crawl()) == 38
        nursery.cancel_scope.cancel()


async def test_neighbours_sample_and_add(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(6)
        await grid.complete()
        node = grid.nodes[0]
        assert len(node.neighbours(3)) == 3
        assert len(node.sample(3)) == len({c.id for c in node.sample(3)}) == 3
        assert len(node.sample(99)) == 5
        late = await grid.start(8, [])
        added = await late.add(grid.nodes[2].address, identity(2).public, grid.membership(2).chain)
        assert added is not None
        assert added.id == identity(2).id
        assert await late.add(("h77", 1)) is None
        assert await late.add(grid.nodes[1].address, identity(2).public) is None  # somebody else is there
        await until(lambda: grid.knows(8) == 6, 10)
        nursery.cancel_scope.cancel()


async def test_a_node_runs_again_after_it_was_stopped(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(2)
        await grid.complete()
        node = grid.nodes[1]
        grid.stop(1)
        await trio.sleep(1)
        assert node.contacts() == []
        with pytest.raises(RuntimeError, match="not running"):
            await node.lookup(bytes(20))
        await grid.start(1, node=node)
        await grid.complete(5)
        nursery.cancel_scope.cancel()


async def test_a_taken_port_is_an_os_error(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start(0)
        with pytest.raises(OSError, match="taken"):
            await grid.make(0).run()
        nursery.cancel_scope.cancel()


# records


async def test_a_key_holds_one_record_for_each_issuer_and_the_newest_wins(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(5)
        await grid.complete()
        for number in range(4):
            await grid.nodes[number].publish("test", bytes(20), b"old", 600)
            await grid.nodes[number].publish("test", bytes(20), b"new", 600)
            await grid.nodes[number].publish("other", bytes(20), b"x", 600)
        found = await grid.nodes[4].lookup(bytes(20), "test")
        assert [r.value for r in found] == [b"new"] * 4
        assert len(await grid.nodes[4].lookup(bytes(20))) == 8
        nursery.cancel_scope.cancel()


async def test_an_old_version_does_not_come_back_with_a_returning_holder(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        assert grid.memory is not None
        await grid.start_all(4)
        await grid.complete()
        await grid.nodes[1].publish("test", bytes(20), b"old", 3_000)
        grid.memory.partition("h3", ["h0", "h1", "h2"])
        await grid.nodes[1].publish("test", bytes(20), b"new", 3_000)
        await trio.sleep(20)
        grid.memory.heal()
        await grid.complete(60)
        await trio.sleep(10)
        for node in grid.nodes.values():
            assert [r.value for r in await node.lookup(bytes(20))] == [b"new"]
        nursery.cancel_scope.cancel()


async def test_many_large_records_under_one_key_are_read_in_pages(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(12)
        await grid.complete()
        for number in range(12):
            await grid.nodes[number].publish("large", bytes(20), bytes([number]) * 900, 600)
        found = await grid.nodes[5].lookup(bytes(20))
        assert sorted(r.value[0] for r in found) == list(range(12))
        nursery.cancel_scope.cancel()


async def test_records_outlive_their_issuer_and_churn(autojump_clock: MockClock) -> None:
    """The issuer leaves, then every holder in turn is replaced by a newcomer; the reader was never one of them."""
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(10)
        await grid.complete()
        assert await grid.nodes[3].publish("test", bytes(20), b"v", 7 * 86_400) == 8
        grid.stop(3)
        for number in (0, 1, 2, 4, 5, 6, 7, 8, 9):
            await grid.start(number + 20, [grid.nodes[max(grid.nodes)].address])
            await trio.sleep(12)
            grid.stop(number, polite=number % 2 == 0)
            await trio.sleep(12)
        for node in grid.nodes.values():
            assert [r.value for r in await node.lookup(bytes(20))] == [b"v"]
        nursery.cancel_scope.cancel()


async def test_an_issuer_renews_its_record_until_the_end_of_its_life(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(2)
        await grid.complete()
        await grid.nodes[0].publish("test", bytes(20), b"v", 2_000)
        await grid.nodes[0].publish("gone", bytes(20), b"v", 2_000)
        grid.nodes[0].withdraw("gone", bytes(20))
        grid.stop(1, polite=False)
        await trio.sleep(100)
        fresh = await grid.start(5)  # nobody holds it but the issuer
        await until(lambda: bool(protocol_of(fresh).storage.records(bytes(20))), 700, 1)
        assert [r.kind for r in protocol_of(fresh).storage.records(bytes(20))] == ["test"]
        await trio.sleep(2_000)
        assert protocol_of(fresh).storage.records(bytes(20)) == []
        nursery.cancel_scope.cancel()


async def test_publishing_is_bounded(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        node = await grid.start(0)
        for number in range(500):
            await node.publish("test", number.to_bytes(20, "big"), b"v", 60)
        with pytest.raises(RecordError, match="publishes 500 records already"):
            await node.publish("test", b"x" * 20, b"v", 60)
        with pytest.raises(RecordError, match="limited to 900 bytes"):
            await node.publish("test", bytes(20), bytes(901), 60)
        nursery.cancel_scope.cancel()


# storage


def _storage() -> Storage:
    return Storage(bytes(20), lambda: EPOCH_S)


def _put(storage: Storage, number: int, key: bytes, kind: str = "test", value: bytes = b"") -> bool:
    record = make_record(ROOT.public, identity(number), key, kind, 1, int(EPOCH_S) + 60, value)
    return storage.put(record, founder().chain)


def test_storage_bounds_the_records_of_a_key() -> None:
    storage = _storage()
    for number in range(RECORDS_PER_KEY_MAX):
        _put(storage, number, bytes(20))
    with pytest.raises(RecordError, match="under this key"):
        _put(storage, 999, bytes(20))
    for number in range(ISSUER_KINDS_PER_KEY_MAX):
        _put(storage, 0, b"k" * 20, f"kind{number}")
    with pytest.raises(RecordError, match="kinds"):
        _put(storage, 0, b"k" * 20, "one more")


def test_storage_bounds_an_issuers_share() -> None:
    storage = _storage()
    for number in range(ISSUER_RECORDS_MAX):
        _put(storage, 0, number.to_bytes(20, "big"))
    with pytest.raises(RecordError, match="share"):
        _put(storage, 0, b"x" * 20)
    _put(storage, 1, b"x" * 20)
    greedy = _storage()
    _put(greedy, 0, b"first".ljust(20), value=bytes(900))
    for number in range(ISSUER_BYTES_MAX // greedy.bytes_held - 1):
        _put(greedy, 0, number.to_bytes(20, "big"), value=bytes(900))
    with pytest.raises(RecordError, match="share"):
        _put(greedy, 0, b"x" * 20, value=bytes(900))


def test_storage_lets_the_farthest_keys_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.storage.KEYS_MAX", 20)
    storage = _storage()
    for number in range(20):
        _put(storage, number % 3, (100 + number).to_bytes(20, "big"))
    with pytest.raises(RecordError, match="no room"):
        _put(storage, 1, (999).to_bytes(20, "big"))
    _put(storage, 1, (1).to_bytes(20, "big"))
    assert (119).to_bytes(20, "big") not in storage.held_keys()
    assert len(storage.held_keys()) == 20
    assert KEYS_MAX * 2_000 <= BYTES_MAX


def test_storage_bounds_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.storage.BYTES_MAX", 10_000)
    storage = _storage()
    for number in range(100, 0, -1):
        _put(storage, number, number.to_bytes(20, "big"), value=bytes(900))
        assert storage.bytes_held <= 10_000
    assert (1).to_bytes(20, "big") in storage.held_keys()
    for key in storage.held_keys():
        for record in storage.records(key):
            storage.remove(record)
    assert storage.bytes_held == 0
    assert not storage._shares


def test_storage_forgets_what_expired() -> None:
    now_s = [EPOCH_S]
    storage = Storage(bytes(20), lambda: now_s[0])
    _put(storage, 0, bytes(20))
    assert storage.get(bytes(20))
    now_s[0] += 60
    assert storage.get(bytes(20)) is None
    with pytest.raises(KeyError):
        storage[bytes(20)]
    assert list(storage) == []
    assert storage.bytes_held == 0


# invites in the DHT


async def test_any_member_can_admit_after_the_inviter_left(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        for number in range(4):
            register(await grid.start(number))
        await grid.complete()
        inviter = grid.membership(1)
        invite, grant = make_invite(inviter, ("h1:4743",), ROLES["worker"], b"", 2, wall_clock(), 200, random.Random(5))
        assert await publish_grant(grid.nodes[1], grant) == 3
        grid.stop(1)
        admitter = grid.nodes[2]
        found = await find_grant(admitter, invite.key.public)
        assert found == grant
        assert await find_grant(admitter, identity(77).public) is None
        for joiner in (50, 51, 50):
            await spend(admitter if joiner == 50 else grid.nodes[3], grant, identity(joiner).public)
        assert sorted(await spent(grid.nodes[0], grant.key)) == sorted(identity(n).id for n in (50, 51))
        with pytest.raises(MembershipError, match="used already"):
            await spend(grid.nodes[0], grant, identity(52).public)
        with pytest.raises(MembershipError, match="only the inviter"):
            await publish_grant(admitter, grant)
        await trio.sleep(210)
        assert await find_grant(admitter, invite.key.public) is None
        nursery.cancel_scope.cancel()


async def test_a_forged_grant_is_not_found(autojump_clock: MockClock) -> None:
    """A worker, who may not invite, publishes a grant for a key of its own."""
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        grid.members[1] = member(grid.membership(0), 1, ROLES["worker"])
        await grid.start_all(2)
        await grid.complete()
        honest = make_invite(grid.membership(0), (), ROLES["worker"], b"", 1, wall_clock(), 600, random.Random(5))[1]
        forged = type(honest)(*(getattr(honest, f) for f in honest.__struct_fields__[:5]), grid.members[1].chain, bytes(64))
        await publish_grant(grid.nodes[1], forged)
        assert await find_grant(grid.nodes[0], honest.key) is None
        nursery.cancel_scope.cancel()
