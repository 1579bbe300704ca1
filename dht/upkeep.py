"""What a node does unasked: it pings, discovers, finds its grid again, hands records over and renews its own.

Rules this file keeps:

- every round is bounded in requests, every request in time, every interval has some randomness so that peers started
  together don't act together;
- records are handed over only to contacts that are in the table, by the two holders nearest to the key, and once;
- a peer that is alone tries all addresses it knows, for ever, with growing pauses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import ceil

import trio

from dht.contact import Contact, Target
from dht.core.records import Record
from dht.crawling import Crawl
from dht.network import Address
from dht.protocol import Protocol
from dht.routing import ID_BITS
from dht.rpc import Unanswered
from dht.tuning import Tuning

REPLICAS = 8
"""Contacts that hold a record: all of them gone at once, of 50 with 15 lost, happens once in 100,000 times."""
SMALL_GRID = 20
"""Up to so many contacts are all pinged in turn within `alive_for_s`."""
TICK_S = 0.5
NAMED_PER_TICK = 8
"""Contacts others named that are met in a tick: 16 a second fill a table in a minute at most."""
ALARM_S = 5.0
ALARM_FACTOR = 4
"""For so long after a contact was found dead the others are pinged so much faster: deaths come in groups."""
PINGS_AT_ONCE_MAX = 32
BOOTSTRAPS_AT_ONCE_MAX = 16
KEYS_PER_ROUND = 64
"""Held keys looked through in a round of handing over."""
STORES_PER_ROUND = 64
"""Records handed over in a round: 13 a second at most, whatever is held and whoever comes."""
REFRESHES_PER_ROUND = 4
EXPLORED_PER_ROUND = 4
"""Contacts asked about buckets with few contacts in a round of discovery."""
EMPTIEST_BUCKETS = 3
SUBTREES_ASKED = 8
"""Subtrees a newcomer asks about: in one more level only a 256th of all peers could hide."""
RESPONSIBLE = 2
"""The nearest holders of a key that hand its records over; two, as one may have just died."""


@dataclass
class _Placed:
    """Who should hold a key as of the last look, and when its records were last offered to all."""

    holders: dict[bytes, None]
    offered_s: float


class Upkeep:
    """The background work of one node."""

    def __init__(self, protocol: Protocol, tuning: Tuning, addresses: Sequence[Address], ready: trio.Event) -> None:
        self._protocol = protocol
        self._tuning = tuning
        self._addresses = list(dict.fromkeys(addresses))
        self._placed: dict[bytes, _Placed] = {}
        self._pinging: dict[bytes, None] = {}
        self._keys: list[bytes] = []
        self.ready = ready
        self._found_somebody = trio.Event()
        protocol.on_kept = self._note_kept

    def _varied(self, seconds: float) -> float:
        return seconds * self._protocol.rng.uniform(0.75, 1.25)

    async def every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` for ever, about every so many seconds."""
        while True:
            await trio.sleep(self._varied(seconds))
            await work()

    async def run(self) -> None:
        """All of it, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._bootstrap)
            nursery.start_soon(self._discover)
            nursery.start_soon(self._keep_pinging)
            nursery.start_soon(self.every, self._tuning.replicate_s, self.replicate)
            nursery.start_soon(self.every, self._tuning.refresh_s, self._refresh)

    # who lives

    async def _keep_pinging(self) -> None:
        protocol = self._protocol
        async with trio.open_nursery() as nursery:
            while True:
                protocol.attention = trio.Event()
                for contact in self._due():
                    if contact.id not in self._pinging and len(self._pinging) < PINGS_AT_ONCE_MAX:
                        self._pinging[contact.id] = None
                        nursery.start_soon(self._ping, contact)
                while protocol.claims:
                    nursery.start_soon(self._prove, protocol.claims.popitem(last=False)[1])
                with trio.move_on_after(self._varied(TICK_S)):
                    await protocol.attention.wait()

    def _due(self) -> list[Contact]:
        """Suspects, and the contacts unheard for longest, within the rate."""
        protocol, now_s = self._protocol, trio.current_time()
        due = []
        for contact in list(protocol.suspects.values()):
            state = protocol.rpc.states.of(contact.id)
            pause_s = self._tuning.second_miss_after_s if state.misses < 2 else 0.0  # the third follows at once
            if now_s >= state.missed_s + pause_s:
                del protocol.suspects[contact.id]
                due.append(contact)
        heard = [(protocol.rpc.states.of(c.id).heard_s, c) for c in protocol.router]
        is_small = len(heard) <= SMALL_GRID
        rate = self._tuning.pings_per_s if is_small else self._tuning.pings_per_s_large
        if now_s - protocol.lost_s < ALARM_S:
            rate *= ALARM_FACTOR
        due += [protocol.named.popitem(last=False)[1] for _ in range(min(NAMED_PER_TICK, len(protocol.named)))]
        old = [(at_s, c) for at_s, c in heard if now_s - at_s >= self._tuning.alive_for_s]
        old.sort(key=lambda entry: entry[0])
        return due + [contact for _, contact in old[: ceil(rate * TICK_S)]]

    async def _ping(self, contact: Contact) -> None:
        try:
            await self._protocol.call_ping(contact)
        except Unanswered:
            pass  # counted by the call
        finally:
            del self._pinging[contact.id]

    async def _prove(self, contact: Contact) -> None:
        """Ask a peer at the address it advertises; if it answers there, that is its address from now on."""
        try:
            await self._protocol.call_ping(contact)
        except Unanswered:
            return
        self._protocol.rpc.states.of(contact.id).advertised = contact.address
        self._protocol.heard(contact)

    # whom to know

    async def _bootstrap(self) -> None:
        """Try every address known, at first and while alone all, later those from which nobody is in the table."""
        protocol, pause_s = self._protocol, 0.5
        if not self._addresses:
            self.ready.set()
        while True:
            here = {contact.address for contact in protocol.router}
            missing = [address for address in self._addresses if address not in here]
            limiter = trio.CapacityLimiter(BOOTSTRAPS_AT_ONCE_MAX)
            async with trio.open_nursery() as nursery:
                for address in missing:
                    nursery.start_soon(self._try, address, limiter)
            self.ready.set()
            if len(protocol.router):
                await trio.sleep(self._varied(self._tuning.rebootstrap_s))
                pause_s = 0.5
            else:
                self._found_somebody = trio.Event()
                with trio.move_on_after(self._varied(pause_s)):
                    await self._found_somebody.wait()
                pause_s = min(2 * pause_s, self._tuning.bootstrap_s_max)

    async def _try(self, address: Address, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            try:
                contact = await self._protocol.rpc.probe(address)
                await self._protocol.call_ping(contact)
            except Unanswered:
                return
        await self.look_around()
        await self._ask_subtrees(contact)
        self._found_somebody.set()
        self.ready.set()

    async def look_around(self) -> None:
        """Look up the own id: the kademlia way to meet the neighbours and be met by them."""
        await self._crawl(self._protocol.source_node.id)

    async def _explore(self) -> None:
        """Ask some contacts, wherever they are, about the emptiest buckets.

        A lookup would ask those nearest to the target only: if none of them knows a whole subtree, it stays unknown.
        """
        protocol = self._protocol
        emptiest = sorted(protocol.router.buckets, key=len)[:EMPTIEST_BUCKETS]
        contacts = list(protocol.router)
        async with trio.open_nursery() as nursery:
            for contact in protocol.rng.sample(contacts, min(EXPLORED_PER_ROUND, len(contacts))):
                target = protocol.rng.randint(*protocol.rng.choice(emptiest).range)
                nursery.start_soon(self._ask_about, contact, target)

    async def _ask_subtrees(self, contact: Contact) -> None:
        """On joining: ask the first contact about every subtree beside the own one, down to a small one."""
        own = self._protocol.source_node.long_id
        async with trio.open_nursery() as nursery:
            for depth in range(SUBTREES_ASKED):
                rest = self._protocol.rng.getrandbits(ID_BITS - 1 - depth)
                target = ((own >> (ID_BITS - 1 - depth)) ^ 1) << (ID_BITS - 1 - depth) | rest
                nursery.start_soon(self._ask_about, contact, target)

    async def _ask_about(self, contact: Contact, target: int) -> None:
        """Whom the contact names is met in time."""
        with contextlib.suppress(Unanswered):
            await self._protocol.call_find_node(contact, Target(target.to_bytes(20, "big")))

    async def _crawl(self, target: bytes) -> None:
        protocol = self._protocol
        node = Target(target)
        await Crawl(protocol, node, protocol.router.find_neighbors(node), protocol.router.ksize).find()

    async def _discover(self) -> None:
        pause_s = 1.0
        while True:
            await trio.sleep(self._varied(pause_s))
            before = len(self._protocol.router)
            if before:
                await self.look_around()
                await self._explore()
            grew = len(self._protocol.router) > before
            pause_s = 1.0 if grew or not before else min(2 * pause_s, self._tuning.discover_s_max)

    async def _refresh(self) -> None:
        rng = self._protocol.rng
        lonely = self._protocol.router.lonely_buckets()
        for bucket in lonely[:REFRESHES_PER_ROUND]:
            bucket.touch_last_updated()
            await self._crawl(rng.randint(*bucket.range).to_bytes(20, "big"))

    # who holds what

    async def replicate(self) -> None:
        """Look through some held keys and hand their records to contacts that should hold them and didn't before."""
        storage, budget = self._protocol.storage, STORES_PER_ROUND
        if not self._keys:
            storage.cull()
            self._keys = storage.held_keys()
            held = set(self._keys)
            self._placed = {key: placed for key, placed in self._placed.items() if key in held}
        for _ in range(min(KEYS_PER_ROUND, len(self._keys))):
            if budget <= 0:
                return
            key = self._keys.pop()
            records = storage.records(key)
            new = self._newcomers(key) if records else []
            budget -= len(new) * len(records)
            async with trio.open_nursery() as nursery:
                for contact in new:
                    nursery.start_soon(self._hand_over, key, records, contact)

    def _note_kept(self, key: bytes) -> None:
        """Whoever brings a record brings it to all who should hold it now: only later comers need to be told."""
        if key not in self._placed:
            nearest = self._protocol.router.find_neighbors(Target(key), REPLICAS)
            offered_s = trio.current_time() + self._varied(0.5 * self._tuning.reoffer_s)
            self._placed[key] = _Placed({c.id: None for c in nearest}, offered_s)

    def _newcomers(self, key: bytes) -> list[Contact]:
        """The contacts that should hold `key`, did not at the last look, and are this peer's to tell."""
        protocol, now_s, target = self._protocol, trio.current_time(), Target(key)
        me = protocol.source_node
        nearest = protocol.router.find_neighbors(target, REPLICAS)
        own_place = sum(target.distance_to(c) < target.distance_to(me) for c in nearest)
        holders: dict[bytes, None] = {c.id: None for c in nearest}
        placed = self._placed.setdefault(key, _Placed(holders, now_s))
        if own_place >= REPLICAS:
            placed.holders = holders
            return []
        if now_s - placed.offered_s > self._tuning.reoffer_s:
            placed.holders, placed.offered_s = {}, now_s
        before = placed.holders
        nearer = sum(target.distance_to(c) < target.distance_to(me) for c in nearest if c.id in before)
        new = [c for c in nearest if c.id not in before]
        placed.holders = holders
        return new if nearer < RESPONSIBLE else []

    async def _hand_over(self, key: bytes, records: Sequence[Record], contact: Contact) -> None:
        try:
            for record in records:
                await self._protocol.call_store(contact, record)
        except Unanswered:
            if key in self._placed:
                self._placed[key].holders.pop(contact.id, None)
