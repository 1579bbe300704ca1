"""A directory in the DHT's place: the methods of `dht.node.Node` that a peer uses, without datagrams.

One table for the whole world, seen by each node only as far as its network reaches: a peer that is dead, or cut off in either
direction, is a contact for `NOTICED_S` more, as with the DHT's pings, then is not. Records lie with the nearest nodes to their
key that were reachable when they were published, and are found while one of those is. Rules: no task of its own but `run`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import trio

from dht.contact import Contact
from dht.core.identity import PeerId
from dht.core.membership import Chain, Membership
from dht.core.records import Record, RecordError, Validator, make_record
from dht.memory import MemoryHost, MemoryNetwork
from dht.network import Address
from dht.rpc import Unanswered
from dht.upkeep import REPLICAS

NOTICED_S = 3.0
"""Until a lost contact is no contact any more."""
LOOKUP_S = 0.02
"""What a lookup takes."""
CONTACTS_MAX = 160
"""Of a node in a large grid: about what a routing table of 20 contacts a bucket holds; in a smaller grid it knows all."""
CHOSEN_S = 60.0
"""How long a node in a large grid keeps its choice of contacts."""


class Directory:
    """What all nodes of a world know together."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network
        self.nodes: dict[PeerId, DirectoryNode] = {}

    def sees(self, a: DirectoryNode, b: DirectoryNode) -> bool:
        """Whether two nodes can talk now."""
        return b.running and not (self.network.is_cut(a.host, b.host) or self.network.is_cut(b.host, a.host))


class DirectoryNode:
    """One peer's node."""

    def __init__(
        self,
        directory: Directory,
        *,
        membership: Membership,
        network: MemoryHost,
        address: Address,
        rng: random.Random,
        clock: Callable[[], float],
        info: Callable[[], bytes] = bytes,
        **_unused: Any,
    ) -> None:
        self.membership = membership
        self.ready = trio.Event()
        self.polite = True
        self.clock = clock
        self.address = address
        self.host = network.name
        self.contact = Contact(membership.identity.public, address)
        self.running = False
        self.counters: Counter[str] = Counter()
        self.versions_seen: Counter[int] = Counter()
        self.records: dict[tuple[bytes, str, bytes], Record] = {}
        self._directory = directory
        self._rng = rng
        self._info = info
        self._validators: dict[str, Validator] = {}
        self._seen_s: dict[PeerId, float] = {}
        self._chosen: list[PeerId] = []
        self._chosen_s = float("-inf")
        self._me = membership.identity.id

    async def run(
        self, *, bootstrap: Sequence[Address] = (), task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See `Node.run`."""
        self.running = True
        self._directory.nodes[self._me] = self
        try:
            task_status.started(self.address)
            self.ready.set()
            await trio.sleep_forever()
        finally:
            self.running = False

    def contacts(self) -> list[Contact]:
        """See `Node.contacts`."""
        now_s = trio.current_time()
        found = []
        for peer, node in self._known(now_s):
            if node is self:
                continue
            if self._directory.sees(self, node):
                self._seen_s[peer] = now_s
            if now_s - self._seen_s.get(peer, float("-inf")) <= NOTICED_S:
                found.append(node.contact)
        return found

    def _known(self, now_s: float) -> list[tuple[PeerId, DirectoryNode]]:
        """All nodes by id; in a large grid the nearest and some others, chosen anew now and then."""
        nodes = self._directory.nodes
        if len(nodes) <= CONTACTS_MAX:
            return sorted(nodes.items())
        if now_s - self._chosen_s > CHOSEN_S:
            self._chosen_s = now_s
            at = int.from_bytes(self._me, "big")
            by_distance = sorted(nodes, key=lambda peer: int.from_bytes(peer, "big") ^ at)
            near, far = by_distance[: CONTACTS_MAX // 8], by_distance[CONTACTS_MAX // 8 :]
            self._chosen = sorted([*near, *self._rng.sample(far, CONTACTS_MAX - len(near))])
        return [(peer, nodes[peer]) for peer in self._chosen]

    def neighbours(self, n: int) -> list[Contact]:
        """See `Node.neighbours`."""
        return self._nearest(self._me)[:n]

    def _nearest(self, key: bytes) -> list[Contact]:
        at = int.from_bytes(key, "big")
        return sorted(self.contacts(), key=lambda contact: int.from_bytes(contact.id, "big") ^ at)

    def sample(self, n: int) -> list[Contact]:
        """See `Node.sample`."""
        contacts = self.contacts()
        return self._rng.sample(contacts, min(n, len(contacts)))

    async def locate(self, peer: PeerId) -> Contact | None:
        """See `Node.locate`."""
        await trio.sleep(LOOKUP_S)
        return next((contact for contact in self.contacts() if contact.id == peer), None)

    async def crawl(self) -> list[Contact]:
        """See `Node.crawl`."""
        await trio.sleep(LOOKUP_S)
        return self.contacts()

    async def ask_info(self, contact: Contact, timeout_s: float = 2.0) -> bytes:
        """See `Node.ask_info`."""
        await trio.sleep(LOOKUP_S)
        node = self._directory.nodes.get(contact.id)
        if node is None or not self._directory.sees(self, node):
            raise Unanswered("it is gone")
        return node._info()

    async def add(self, address: Address, key: bytes | None = None, chain: Chain = ()) -> Contact | None:
        """See `Node.add`."""
        await trio.sleep(LOOKUP_S)
        return next((contact for contact in self.contacts() if contact.address == address), None)

    def chain_of(self, key: bytes) -> Chain | None:
        """See `Node.chain_of`."""
        for node in self._directory.nodes.values():
            if node.membership.identity.public == key:
                return node.membership.chain
        return None

    def validate(self, kind: str, validator: Validator) -> None:
        """See `Node.validate`."""
        self._validators[kind] = validator

    async def publish(self, record_kind: str, key: bytes, value: bytes, lifetime_s: float) -> int:
        """See `Node.publish`."""
        seq = int(self.clock() * 1000)
        expires_s = int(self.clock() + lifetime_s) + 1
        identity = self.membership.identity
        record = make_record(self.membership.grid, identity, key, record_kind, seq, expires_s, value)
        name = (key, record_kind, identity.public)
        self.records[name] = record
        await trio.sleep(LOOKUP_S)
        stored = 0
        for contact in self._nearest(key)[:REPLICAS]:
            node = self._directory.nodes[contact.id]
            if self._directory.sees(self, node):
                try:
                    if record_kind in node._validators:
                        node._validators[record_kind](record)
                except RecordError:
                    continue
                node.records[name] = record
                stored += 1
        return stored

    def withdraw(self, record_kind: str, key: bytes) -> None:
        """See `Node.withdraw`."""
        self.records.pop((key, record_kind, self.membership.identity.public), None)

    async def lookup(self, key: bytes, kind: str | None = None) -> list[Record]:
        """See `Node.lookup`."""
        await trio.sleep(LOOKUP_S)
        found: dict[tuple[bytes, str, bytes], Record] = {}
        for node in self._directory.nodes.values():
            if node is self or self._directory.sees(self, node):
                for name, record in node.records.items():
                    newer = name not in found or record.seq > found[name].seq
                    if name[0] == key and kind in (None, name[1]) and newer and record.expires_s > self.clock():
                        found[name] = record
        return [found[name] for name in sorted(found)]
