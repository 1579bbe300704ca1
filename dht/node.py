"""The node: what the rest of the program knows of the DHT, on trio.

Rules this file keeps:

- every task lives in the nursery of `run`; when that ends, nothing is left, and the others were told goodbye;
- what is returned was verified: contacts answered, records are valid and of members;
- what the caller publishes is bounded and renewed until its lifetime ends or it is withdrawn.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from dht.contact import Contact, Target
from dht.core.datagram import Kind
from dht.core.identity import PeerId
from dht.core.membership import Chain, Membership, MembershipError
from dht.core.records import LIFETIME_S_MAX, Record, RecordError, Validator, make_record, newest
from dht.crawling import Census, ContactCrawl, Crawl, ValueCrawl
from dht.network import Address, Network
from dht.protocol import Protocol
from dht.rpc import Rpc, Unanswered
from dht.saved import SavedContacts
from dht.storage import Storage
from dht.tuning import Tuning
from dht.upkeep import REPLICAS, Upkeep

__all__ = ["Contact", "Node", "Unanswered"]

PUBLISHED_MAX = 500
"""Records one node keeps publishing; a little under an issuer's share at any holder."""
REPUBLISH_S_MIN = 30.0
REPUBLISH_TICK_S = 5.0
REPUBLISHED_PER_TICK = 16
LOOKUP_TRIES = 2
"""A lookup that nobody at all answered is made once more: in a grid of two, three lost datagrams in a row do that."""
GOODBYES_MAX = 64
GOODBYE_S_MAX = 0.5
"""How long leaving may take: sending some datagrams."""


@dataclass
class _Published:
    record: Record
    until_s: float  # unix time
    due_s: float  # monotonic
    pause_s: float = REPUBLISH_S_MIN


class Node:
    """One peer's place in the DHT.

    `rng` decides tokens and message ids: outside tests `random.SystemRandom()`. `clock` gives unix time in seconds.
    `info` gives what `ask_info` shows of this peer, up to 1 KiB. `polite`: whether `run` says goodbye when it ends.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        network: Network,
        address: Address,
        advertise: Address | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
        state_path: Path | None = None,
        info: Callable[[], bytes] = bytes,
        tuning: Tuning | None = None,
    ) -> None:
        self.membership = membership
        self.ready = trio.Event()
        self.polite = True
        self._network = network
        self._address = address
        self._advertise = advertise
        self._rng = rng if rng is not None else random.SystemRandom()
        self.clock = clock
        self._info = info
        self._tuning = tuning or Tuning()
        self._saved = SavedContacts(state_path)
        self._storage = Storage(membership.identity.id, clock)
        self._published: dict[tuple[bytes, str], _Published] = {}
        self._running: Protocol | None = None

    # life

    async def run(
        self, *, bootstrap: Sequence[Address] = (), task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; `started` gets the bound address.

        Tries all `bootstrap` addresses and the contacts saved by an earlier run, any of which may be dead, and goes on
        trying while alone. `ready` is set at the first contact's answer, or when nobody answered in the first round.
        Raises `OSError` when the address can't be bound, `MembershipError` when the own certificate isn't valid.
        """
        self.membership.check(self.membership.chain, self.clock())
        socket = await self._network.open_datagram(self._address)
        try:
            self.address: Address = socket.address
            protocol = self._protocol_at(socket.address)
            protocol.attach(Rpc(self.membership, socket, self._rng, protocol.handle))
            addresses = [*bootstrap, *(contact.address for contact in self._saved.load())]
            upkeep = Upkeep(protocol, self._tuning, addresses, self.ready)
            self._running = protocol
            async with trio.open_nursery() as nursery:
                nursery.start_soon(protocol.rpc.serve)
                nursery.start_soon(upkeep.run)
                nursery.start_soon(upkeep.every, REPUBLISH_TICK_S, self._republish)
                nursery.start_soon(upkeep.every, self._tuning.save_s, self._save)
                task_status.started(socket.address)
        finally:
            if self._running is not None:
                await self._leave(self._running)
            self._running = None
            socket.close()

    def _protocol_at(self, address: Address) -> Protocol:
        source = Contact(self.membership.identity.public, self._advertise or address)
        return Protocol(
            self.membership,
            source,
            self._storage,
            rng=self._rng,
            clock=self.clock,
            info=self._info,
            advertise=self._advertise,
        )

    async def _leave(self, protocol: Protocol) -> None:
        await self._save()
        if self.polite:
            with trio.move_on_after(GOODBYE_S_MAX, shield=True):
                try:
                    for contact in protocol.router.find_neighbors(protocol.source_node, GOODBYES_MAX):
                        await protocol.rpc.tell(contact, Kind.BYE)
                except trio.ClosedResourceError:
                    pass  # the host is gone, and with it whom we would tell

    async def _save(self) -> None:
        self._saved.save(self._protocol.router)

    @property
    def _protocol(self) -> Protocol:
        if self._running is None:
            raise RuntimeError("the node is not running")
        return self._running

    @property
    def counters(self) -> Counter[str]:
        """What was received, sent and dropped, by reason; for `grid doctor` and tests."""
        return self._protocol.rpc.counters

    @property
    def versions_seen(self) -> Counter[int]:
        """Datagrams of other protocol versions, by version."""
        return self._protocol.rpc.versions_seen

    # peers

    def contacts(self) -> list[Contact]:
        """The live contacts, by id. In grids up to some hundred peers that is everybody."""
        return [] if self._running is None else sorted(self._running.router, key=lambda contact: contact.id)

    def neighbours(self, n: int) -> list[Contact]:
        """The `n` live contacts nearest to this peer's id."""
        return self._protocol.router.find_neighbors(self._protocol.source_node, n)

    def sample(self, n: int) -> list[Contact]:
        """Up to `n` live contacts at random."""
        contacts = self.contacts()
        return self._rng.sample(contacts, min(n, len(contacts)))

    async def locate(self, peer: PeerId) -> Contact | None:
        """Where a peer is: from the table, else looked up. None when nobody of that id answers."""
        protocol, target = self._protocol, Target(peer)
        held = protocol.router.get(target)
        if held is not None and not protocol.is_missing(held):
            return held
        return await ContactCrawl(protocol, target, protocol.router.find_neighbors(target), 1).locate()

    async def crawl(self) -> list[Contact]:
        """All members that can be reached, each asked; this peer itself is not among them."""
        return await Census(self._protocol).count()

    async def ask_info(self, contact: Contact, timeout_s: float = 2.0) -> bytes:
        """What `info` gives at another node. Raises `Unanswered`."""
        with trio.move_on_after(timeout_s):
            return await self._protocol.call_info(contact)
        raise Unanswered(f"no answer from {contact.ip}:{contact.port} within {timeout_s} s")

    async def add(self, address: Address, key: bytes | None = None, chain: Chain = ()) -> Contact | None:
        """Learn of a contact, seen by the transport for example: it is asked, and kept if it answers as a member.

        `key` is its public key and `chain` its certificates, where known.
        """
        protocol = self._protocol
        try:
            if chain:
                protocol.introductions.trust.learn(chain, self.clock())
            contact = Contact(key, address) if key is not None else await protocol.rpc.probe(address)
            await protocol.call_ping(contact)
        except (Unanswered, MembershipError):
            return None
        return protocol.router.get(contact) or contact

    def chain_of(self, key: bytes) -> Chain | None:
        """The verified certificates of a peer or a record's issuer, if this node knows them."""
        return self._protocol.chain_of(key)

    # records

    def validate(self, kind: str, validator: Validator) -> None:
        """Records of `kind` must satisfy `validator`, when stored here and when read."""
        self._storage.validate(kind, validator)

    async def publish(self, record_kind: str, key: bytes, value: bytes, lifetime_s: float) -> int:
        """Store a record at the peers nearest to `key` and keep it there until its lifetime ends.

        Returns the number of other peers that acknowledged it now: 0 in a grid of one. This peer holds it too.
        Raises `RecordError` when it is too large or this node publishes too much.
        """
        protocol = self._protocol
        now_s = self.clock()
        old = self._published.get((key, record_kind))
        if old is None and len(self._published) >= PUBLISHED_MAX:
            raise RecordError(f"this peer publishes {PUBLISHED_MAX} records already")
        held = [r for r in self._storage.records(key, record_kind) if r.issuer == self.membership.identity.public]
        seq = max([int(now_s * 1000), *(r.seq + 1 for r in held)])
        record = self._sign(key, record_kind, seq, value, now_s + lifetime_s)
        published = _Published(record, now_s + lifetime_s, trio.current_time() + REPUBLISH_S_MIN)
        self._published[key, record_kind] = published
        protocol.keep(record, self.membership.chain)
        return await self._store(record)

    def withdraw(self, record_kind: str, key: bytes) -> None:
        """Stop renewing a record; what is stored elsewhere expires by itself."""
        published = self._published.pop((key, record_kind), None)
        if published is not None:
            self._storage.remove(published.record)

    async def lookup(self, key: bytes, kind: str | None = None) -> list[Record]:
        """The newest record of each issuer and kind under `key`, from the nearest peers and this one."""
        protocol, target = self._protocol, Target(key)
        for _ in range(LOOKUP_TRIES):
            crawl = ValueCrawl(protocol, target, protocol.router.find_neighbors(target), REPLICAS, kind or "")
            found = await crawl.collect()
            if crawl.answered:
                break
        own = [r for r in self._storage.records(key, kind or "") if protocol.chain_of(r.issuer) is not None]
        return newest([*found, *own])

    def _sign(self, key: bytes, kind: str, seq: int, value: bytes, until_s: float) -> Record:
        expires_s = int(min(until_s, self.clock() + LIFETIME_S_MAX)) + 1
        return make_record(self.membership.grid, self.membership.identity, key, kind, seq, expires_s, value)

    async def _store(self, record: Record) -> int:
        """Store at the nearest contacts that answer; the number of acknowledgements. Tried twice if there is none."""
        return await self._store_once(record) or (await self._store_once(record) if self.contacts() else 0)

    async def _store_once(self, record: Record) -> int:
        """Store at the nearest contacts that answer; whoever then fails to has the next nearest asked in its place."""
        protocol, target = self._protocol, Target(record.key)
        crawl = Crawl(protocol, target, protocol.router.find_neighbors(target), REPLICAS)
        await crawl.find()
        candidates = iter(crawl.in_order())
        acknowledged = 0

        async def store() -> None:
            nonlocal acknowledged
            for contact in candidates:
                try:
                    holds = await protocol.call_store(contact, record)
                except Unanswered:
                    protocol.rpc.counters["store_unanswered"] += 1
                else:
                    acknowledged += holds
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(REPLICAS):
                nursery.start_soon(store)
        return acknowledged

    async def _republish(self) -> None:
        now_s, done = self.clock(), 0
        for name, published in list(self._published.items()):
            if published.until_s <= now_s:
                del self._published[name]
            elif published.due_s <= trio.current_time() and done < REPUBLISHED_PER_TICK:
                done += 1
                await self._renew(published)

    async def _renew(self, published: _Published) -> None:
        record = published.record
        if record.expires_s < min(published.until_s, self.clock() + LIFETIME_S_MAX / 2):
            record = self._sign(record.key, record.kind, record.seq + 1, record.value, published.until_s)
            published.record = record
        published.pause_s = min(2 * published.pause_s, self._tuning.republish_s_max)
        published.due_s = trio.current_time() + self._rng.uniform(0.75, 1.25) * published.pause_s
        try:
            self._protocol.keep(record, self.membership.chain)
        except RecordError:
            self.counters["refused_record"] += 1
        await self._store(record)
