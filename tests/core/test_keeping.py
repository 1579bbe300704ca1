"""Who shall hold copies of a job's blobs: each rule by itself, then all of them against a world of peers that come and go."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dht.core.identity import PeerId
from grid.core import asks, keeping
from grid.core.hashring import HashRing
from grid.core.keeping import Keeping, Order, worth_a_copy

ME = PeerId(b"m" * 20)
PEERS = [PeerId(bytes([n]) * 20) for n in range(1, 9)]
A, B, C, D = PEERS[:4]


def name(number: int) -> bytes:
    return blake3(str(number).encode()).digest()


def table(*peers: PeerId) -> Keeping:
    made = Keeping(ME)
    for peer in peers:
        made.up(peer)
    return made


def asked(orders: Iterable[Order]) -> dict[PeerId, list[bytes]]:
    return {order.peer: [blob for blob, _ in order.blobs] for order in orders}


def obey(keeper: Keeping, now_s: float = 0.0) -> dict[PeerId, list[bytes]]:
    """Everybody keeps what they are asked to, until nobody is asked any more."""
    found: dict[PeerId, list[bytes]] = {}
    while orders := keeper.plan(now_s):
        for order in orders:
            for blob, _ in order.blobs:
                keeper.kept(order.peer, blob)
                found.setdefault(order.peer, []).append(blob)
    return found


def refuse_all(keeper: Keeping, now_s: float) -> None:
    """Nobody has what they are asked for."""
    while orders := keeper.plan(now_s):
        for order in orders:
            for blob, _ in order.blobs:
                keeper.refused(order.peer, blob, now_s)


# ---- what is worth a copy -----------------------------------------------------------------------------------------------


def test_result_is_copied_only_if_it_took_longer_to_make_than_to_copy() -> None:
    assert worth_a_copy(100_000_000, 1.1)
    assert not worth_a_copy(100_000_000, 0.9)
    assert not worth_a_copy(1 << 20, 0.0)


# ---- whom to ask ----------------------------------------------------------------------------------------------------------


def test_who_has_the_bytes_already_is_asked_before_anyone_copies() -> None:
    keeper = table(A, B, C)
    keeper.add(name(1), 10, 2, near=(ME, C), now_s=0.0)
    orders = asked(keeper.plan(0.0))
    assert orders == {ME: [name(1)], C: [name(1)]}
    assert keeper.plan(0.0) == []
    keeper.kept(ME, name(1))
    keeper.kept(C, name(1))
    assert keeper.short() == []
    assert keeper.holders(name(1)) == [ME, C]


def test_vital_blobs_go_to_replicas_first_then_to_others() -> None:
    keeper = table(*PEERS)
    keeper.set_replicas([ME, D, B])
    keeper.add(name(1), 10, 3, vital=True, near=(ME,), now_s=0.0)
    assert asked(keeper.plan(0.0)).keys() == {ME, D, B}
    keeper.add(name(2), 10, 5, vital=True, near=(ME,), now_s=0.0)
    assert asked(keeper.plan(0.0)).keys() > {ME, D, B}


def test_vital_blobs_are_asked_for_before_results() -> None:
    keeper = table(A)
    for number in range(2 * asks.ASKS_MAX):
        keeper.add(name(number), 10, 2, near=(ME,), now_s=0.0)
    keeper.add(name(-1), 10, 2, vital=True, near=(ME,), now_s=0.0)
    orders = asked(keeper.plan(0.0))
    assert name(-1) in orders[A]
    assert name(-1) in orders[ME]


def test_result_copies_are_spread_and_found_again_by_a_leader_that_knows_nothing() -> None:
    keeper = table(*PEERS)
    names = [name(number) for number in range(200)]
    for each in names:
        keeper.add(each, 10, 2, near=(ME,), now_s=0.0)
    second: dict[bytes, PeerId] = {}
    loads = {}
    for peer, blobs in obey(keeper).items():
        loads[peer] = len(blobs)
        if peer != ME:
            second.update(dict.fromkeys(blobs, peer))
    assert second.keys() == set(names) - {each for each in names if keeper.holders(each) == [ME]}
    assert max(load for peer, load in loads.items() if peer != ME) < 200 // 2
    later = Keeping(PEERS[0])
    for peer in PEERS[1:]:
        later.up(peer)
    places = [later.search(each).index(peer) for each, peer in second.items() if peer != PEERS[0]]
    assert sum(place == 0 for place in places) > 0.6 * len(places)


def test_in_flight_is_bounded_for_each_peer_and_in_bytes() -> None:
    keeper = table(A, B)
    for number in range(500):
        keeper.add(name(number), 10, 3, near=(ME,), now_s=0.0)
    orders = asked(keeper.plan(0.0))
    assert {peer: len(blobs) for peer, blobs in orders.items()} == dict.fromkeys((ME, A, B), asks.ASKS_PER_PEER_MAX)
    large = table(A)
    for number in range(10):
        large.add(name(number), asks.ASKED_BYTES_PER_PEER_MAX - 1, 2, near=(ME,), now_s=0.0)
    assert {peer: len(blobs) for peer, blobs in asked(large.plan(0.0)).items()} == {ME: 1, A: 1}


def test_no_third_peer_copies_what_waits_for_room_at_who_has_it() -> None:
    keeper = table(A, B)
    for number in range(100):
        keeper.add(name(number), 10, 2, near=(ME, A), now_s=0.0)
    assert obey(keeper).keys() == {ME, A}


def test_everything_is_asked_for_in_the_end_though_little_at_a_time() -> None:
    keeper = table(A, B)
    for number in range(1000):
        keeper.add(name(number), 10, 3, near=(ME,), now_s=0.0)
    obey(keeper)
    assert keeper.short() == []
    assert keeper.asks == 0


def test_required_peers_are_asked_beyond_the_wanted_copies() -> None:
    keeper = table(A, B, C)
    keeper.add(name(1), 10, 1, vital=True, near=(ME,), now_s=0.0)
    obey(keeper)
    keeper.require(name(1), [ME, B, D])
    assert asked(keeper.plan(0.0)) == {B: [name(1)]}
    keeper.kept(B, name(1))
    keeper.up(D)
    assert asked(keeper.plan(0.0)) == {D: [name(1)]}


# ---- losses ---------------------------------------------------------------------------------------------------------------


def test_lost_holder_is_replaced_at_once() -> None:
    keeper = table(A, B)
    keeper.add(name(1), 10, 2, near=(ME, A), now_s=0.0)
    obey(keeper)
    keeper.down(A, 1.0)
    [order] = keeper.plan(1.0)
    assert (order.peer, order.blobs) == (B, ((name(1), 10),))


def test_holder_that_returns_is_asked_for_its_word_and_nothing_is_copied() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 2, near=(ME,), now_s=0.0)
    obey(keeper)
    keeper.down(A, 1.0)
    assert keeper.plan(1.0) == []
    keeper.up(A)
    assert asked(keeper.plan(1.0)) == {A: [name(1)]}


def test_peer_that_refuses_is_left_alone_for_a_while_and_another_asked() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 2, near=(ME,), now_s=0.0)
    keeper.plan(0.0)
    keeper.kept(ME, name(1))
    keeper.refused(A, name(1), 0.0)
    assert keeper.plan(0.0) == []
    keeper.up(B)
    assert asked(keeper.plan(0.0)) == {B: [name(1)]}
    keeper.refused(B, name(1), 1.0)
    wake_s = keeper.wake_s(1.0)
    while wake_s is not None and wake_s < keeping.SHUN_S - 1:
        assert keeper.plan(wake_s) == []
        wake_s = keeper.wake_s(wake_s)
    assert asked(keeper.plan(keeping.SHUN_S)) == {A: [name(1)]}


def test_full_peer_is_not_asked_blob_by_blob() -> None:
    keeper = table(A)
    for number in range(2000):
        keeper.add(name(number), 10, 2, near=(ME,), now_s=0.0)
    count, now_s = 0, 0.0
    while now_s < 60.0:
        for order in keeper.plan(now_s):
            for blob, _ in order.blobs:
                if order.peer == A:
                    count += 1
                    keeper.refused(A, blob, now_s)
                else:
                    keeper.kept(ME, blob)
        now_s += 0.5
    assert count < 200


def test_silent_peer_counts_as_refusing_after_a_patience_that_grows_with_the_bytes() -> None:
    keeper = table(A)
    keeper.add(name(1), 10_000_000, 2, near=(ME,), now_s=0.0)
    keeper.plan(0.0)
    keeper.kept(ME, name(1))
    keeper.up(B)
    assert keeper.plan(24.0) == []
    assert asked(keeper.plan(26.0)) == {B: [name(1)]}
    keeper.kept(A, name(1))  # after all
    assert keeper.keeps(A, name(1))


def test_unasked_word_is_a_place_to_copy_from_and_no_copy() -> None:
    keeper = table(A, B)
    keeper.add(name(1), 10, 1, near=(), now_s=0.0)
    for order in keeper.plan(0.0):
        keeper.refused(order.peer, name(1), 0.0)
    keeper.up(C)
    keeper.said(C, name(1))
    keeper.kept(C, name(1))
    assert not keeper.keeps(C, name(1))
    assert asked(keeper.plan(0.0)) == {C: [name(1)]}
    keeper.kept(C, name(1))
    assert keeper.keeps(C, name(1))


def test_peer_that_comes_back_is_asked_again_though_it_gave_no_answer_before() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 2, near=(ME,), now_s=0.0)
    keeper.plan(0.0)
    keeper.kept(ME, name(1))
    assert keeper.plan(20.0) == []
    keeper.down(A, 21.0)
    keeper.up(A)
    assert asked(keeper.plan(21.0)) == {A: [name(1)]}


def test_blob_is_not_lost_while_its_old_holder_is_back_and_to_be_asked() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 1, near=(A,), now_s=0.0)
    obey(keeper)
    keeper.down(A, 0.0)
    refuse_all(keeper, 0.0)
    keeper.up(A)
    assert keeper.wake_s(0.0) != keeping.LOST_AFTER_S
    assert keeper.lost(keeping.LOST_AFTER_S + 1) == []


def test_blob_whose_recorded_holder_is_gone_is_searched_among_replicas_and_the_ring() -> None:
    keeper = table(*PEERS[1:])
    keeper.set_replicas([ME, D])
    keeper.add(name(1), 10, 1, near=(A,), now_s=0.0)
    ever: set[PeerId] = set()
    while orders := keeper.plan(0.0):
        assert len(orders) <= keeping.SEARCH_AT_ONCE
        for order in orders:
            assert order.sources == ()
            ever.add(order.peer)
            keeper.refused(order.peer, name(1), 0.0)
    assert ever == {ME, *PEERS[1:]}
    assert keeper.lost(1.0) == []
    assert keeper.lost(keeping.LOST_AFTER_S) == [name(1)]
    assert keeper.lost(keeping.LOST_AFTER_S + 1) == []


def test_who_refused_while_nobody_had_the_blob_is_asked_again_once_somebody_has() -> None:
    keeper = table(A, B)
    keeper.add(name(1), 10, 3, vital=True, near=(), now_s=0.0)
    for order in keeper.plan(0.0):
        if order.peer == B:
            keeper.kept(B, name(1))
        else:
            keeper.refused(order.peer, name(1), 0.0)
    orders = keeper.plan(0.1)
    assert asked(orders) == {ME: [name(1)], A: [name(1)]}
    assert all(order.sources == (B,) for order in orders)


def test_lost_blob_that_was_made_again_can_be_lost_again() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 1, near=(B,), now_s=0.0)
    refuse_all(keeper, 0.0)
    assert keeper.lost(20.0) == [name(1)]
    keeper.add(name(1), 10, 1, near=(A,), now_s=60.0)
    obey(keeper, 60.0)
    assert keeper.holders(name(1)) == [A]
    keeper.down(A, 61.0)
    refuse_all(keeper, 61.0)
    assert keeper.lost(62.0) == []
    assert keeper.lost(80.0) == [name(1)]


def test_forgotten_blob_frees_what_was_in_flight() -> None:
    keeper = table(A)
    keeper.add(name(1), 10, 2, near=(ME,), now_s=0.0)
    keeper.plan(0.0)
    assert keeper.asks == 2
    keeper.forget(name(1))
    assert (keeper.asks, len(keeper)) == (0, 0)
    keeper.kept(A, name(1))
    keeper.down(A, 1.0)


def test_table_of_results_is_bounded_and_vital_blobs_always_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = table()
    monkeypatch.setattr(keeping, "BLOBS_MAX", 3)
    assert [keeper.add(name(n), 1, 1, near=(ME,), now_s=0.0) for n in range(4)] == [True, True, True, False]
    assert keeper.add(name(9), 1, 1, vital=True, near=(ME,), now_s=0.0)
    assert keeper.add(name(0), 1, 1, vital=True, near=(ME,), now_s=0.0)  # becomes vital: room for a result
    assert keeper.add(name(5), 1, 1, near=(ME,), now_s=0.0)


# ---- the ring -------------------------------------------------------------------------------------------------------------


def test_ring_gives_every_peer_once_and_moves_only_what_falls_to_the_one_that_left() -> None:
    ring = HashRing()
    for peer in PEERS:
        ring.add(peer)
        ring.add(peer)
    first = {name(n): next(ring.walk(name(n))) for n in range(300)}
    assert all(sorted(ring.walk(name(n))) == sorted(PEERS) for n in range(20))
    ring.remove(A)
    ring.remove(A)
    moved = [n for n, peer in first.items() if next(ring.walk(n)) != peer]
    assert moved == [n for n, peer in first.items() if peer == A]
    assert moved


# ---- all together ---------------------------------------------------------------------------------------------------------


class World(RuleBasedStateMachine):
    """Peers with disks; the table's orders are obeyed, refused or lost at will."""

    @initialize()
    def begin(self) -> None:
        self.keeper = Keeping(ME)
        self.now_s = 0.0
        self.up = {ME}
        self.disks: dict[PeerId, set[bytes]] = {peer: set() for peer in [ME, *PEERS]}
        self.full: set[PeerId] = set()
        self.waiting: list[tuple[PeerId, bytes, tuple[PeerId, ...]]] = []
        self.wanted: dict[bytes, int] = {}
        self.told: dict[bytes, int] = {}

    # ---- what happens ----

    @rule(number=st.integers(0, 11), copies=st.integers(1, 4), vital=st.booleans(), at=st.sampled_from([ME, *PEERS]))
    def add(self, number: int, copies: int, vital: bool, at: PeerId) -> None:
        blob = name(number)
        self.disks[at].add(blob)
        self.wanted[blob] = max(copies, self.wanted.get(blob, 0))
        self.told.pop(blob, None)
        assert self.keeper.add(blob, 1 + number, copies, vital=vital, near=(at,), now_s=self.now_s)

    @rule(peer=st.sampled_from(PEERS), wiped=st.booleans())
    def toggle(self, peer: PeerId, wiped: bool) -> None:
        if peer in self.up:
            self.up.discard(peer)
            self.waiting = [each for each in self.waiting if each[0] != peer]
            self.keeper.down(peer, self.now_s)
            if wiped:
                self.disks[peer].clear()
        else:
            self.up.add(peer)
            self.keeper.up(peer)

    @rule(peer=st.sampled_from(PEERS))
    def fill_or_empty(self, peer: PeerId) -> None:
        self.full ^= {peer}

    @rule(peers=st.lists(st.sampled_from([ME, *PEERS]), max_size=3, unique=True))
    def replicas(self, peers: list[PeerId]) -> None:
        self.keeper.set_replicas(peers)

    @rule()
    def plan(self) -> None:
        for order in self.keeper.plan(self.now_s):
            assert order.peer in self.up
            assert order.peer not in order.sources
            for blob, size in order.blobs:
                assert size == self.keeper.size(blob)
                self.waiting.append((order.peer, blob, order.sources))
        self._lost()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self._answer(*self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def lose_an_answer(self, data: st.DataObject) -> None:
        self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))

    @rule(seconds=st.sampled_from([0.1, 5.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def _answer(self, peer: PeerId, blob: bytes, sources: tuple[PeerId, ...]) -> None:
        found = blob in self.disks[peer]
        if not found and peer not in self.full:
            found = any(blob in self.disks[source] for source in [*sources, ME] if source in self.up)
            if found:
                self.disks[peer].add(blob)
        if found:
            self.keeper.kept(peer, blob)
        else:
            self.keeper.refused(peer, blob, self.now_s)

    def _lost(self) -> None:
        for blob in self.keeper.lost(self.now_s):
            assert not any(blob in self.disks[peer] and self.keeper.keeps(peer, blob) for peer in self.up)
            self.told[blob] = self.told.get(blob, 0) + 1

    # ---- what must hold ----

    @invariant()
    def in_flight_is_bounded(self) -> None:
        assert 0 <= self.keeper.asks <= asks.ASKS_MAX
        assert all(0 <= known.asks <= asks.ASKS_PER_PEER_MAX for known in self.keeper._peers.values())
        assert self.keeper._asks.asked_bytes >= 0

    @invariant()
    def lost_once(self) -> None:
        assert all(count == 1 for count in self.told.values()), "told twice without having been found between"
        self.told = {blob: n for blob, n in self.told.items() if blob in self.keeper._told}

    def teardown(self) -> None:
        """Once faults end, all that can have its copies has them, and what nobody has was told."""
        if not hasattr(self, "keeper"):
            return
        self.full.clear()
        self.waiting.clear()
        lost = dict(self.told)
        for _ in range(400):
            for order in self.keeper.plan(self.now_s):
                for blob, _ in order.blobs:
                    self._answer(order.peer, blob, order.sources)
            for blob in self.keeper.lost(self.now_s):
                assert blob not in lost
                lost[blob] = 1
            self.now_s += 1.0
        for blob, copies in self.wanted.items():
            on_disk = [peer for peer in self.up if blob in self.disks[peer]]
            keeping_it = [peer for peer in self.up if self.keeper.keeps(peer, blob)]
            assert all(blob in self.disks[peer] for peer in keeping_it)
            if on_disk:
                assert len(keeping_it) >= min(copies, len(self.up)), f"{len(keeping_it)} of {copies} copies"
            else:
                assert blob in lost
        assert self.keeper.asks == 0
        assert self.keeper._asks.asked_bytes == 0
        assert all(known.asks == known.asked_bytes == 0 for known in self.keeper._peers.values())


World.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
