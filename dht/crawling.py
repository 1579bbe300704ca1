"""Lookups: the kademlia package's crawls, with requests always under way instead of rounds.

Rules this file keeps:

- alpha requests are under way at all times; one that takes longer than its peer usually does no longer counts, another
  is asked beside it: the dead stall nobody;
- a lookup is over when the nearest that answer have answered; whoever is slow is not waited for if there are enough;
- whoever failed is not asked again in this lookup, however many others name it;
- a cancelled or finished lookup leaves nothing behind; contacts found slow are told to the protocol, which checks them;
- a lookup asks a bounded number of contacts for a bounded time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import trio
from kademlia.crawling import SpiderCrawl
from kademlia.node import Node as KademliaNode

from dht.contact import Contact
from dht.core.records import Record, newest
from dht.protocol import Protocol
from dht.rpc import Unanswered

ALPHA = 5
"""Requests under way. The paper's 3 waits too long for the dead when a third of a grid is gone."""
SLOW_S_MIN = 0.15
"""No contact is called slow sooner, however near it is: processes pause."""
CRAWL_S_MAX = 8.0
"""A lookup ends with what it has by then."""
ASKED_MAX = 160
"""Contacts asked in one lookup: an ordinary one in 10,000 peers asks 30."""
PAGES_MAX = 64
"""Pages of records read from one holder: every record a key may have, one a page."""

CENSUS_ALPHA = 16
"""Members visited at a time when all are."""
MEMBERS_MAX = 20_000
"""Members one census visits; a few seconds for each thousand."""

Ask = Callable[[Contact, KademliaNode], Awaitable[list[Contact]]]


class Crawl(SpiderCrawl):  # type: ignore[misc]
    """Finds the `want` contacts nearest to `node` that answer."""

    def __init__(self, protocol: Protocol, node: KademliaNode, peers: Iterable[Contact], want: int, alpha: int = ALPHA) -> None:
        super().__init__(protocol, node, list(peers), max(want, protocol.router.ksize), alpha)
        self.want = want
        self.answered: dict[bytes, Contact] = {}
        self.failed: dict[bytes, None] = {}
        self._slow_at_s: dict[bytes, tuple[float, Contact]] = {}  # under way, not slow yet
        self._slow: dict[bytes, Contact] = {}  # under way and slow
        self._changed = trio.Event()

    async def find(self) -> list[Contact]:
        """The nearest contacts that answered, nearest first."""
        return await self._find(self.protocol.call_find_node)

    async def _find(self, rpcmethod: Ask) -> list[Contact]:
        with trio.move_on_after(CRAWL_S_MAX):
            async with trio.open_nursery() as nursery:
                while True:
                    self._launch(nursery, rpcmethod)
                    if self._is_over():
                        nursery.cancel_scope.cancel()
                        break
                    await self._wait()
        for contact in self._slow.values():
            self.protocol.suspect_if_known(contact)
        return self.in_order()[: self.want]

    def in_order(self) -> list[Contact]:
        """All that answered, nearest first."""
        return sorted(self.answered.values(), key=self.node.distance_to)

    def _candidates(self) -> list[Contact]:
        """The nearest contacts not known to be dead or slow."""
        nodes = [node for _, node in sorted(self.nearest.heap, key=lambda entry: entry[0])]
        return [n for n in nodes if n.id not in self.failed and n.id not in self._slow][: self.ksize]

    def _launch(self, nursery: trio.Nursery, ask: Ask) -> None:
        """Start requests until alpha are under way that aren't slow."""
        now_s = trio.current_time()
        for id_, (at_s, contact) in list(self._slow_at_s.items()):
            if at_s <= now_s:
                del self._slow_at_s[id_]
                self._slow[id_] = contact
        for contact in self._candidates():
            if len(self._slow_at_s) >= self.alpha or len(self.nearest.contacted) >= ASKED_MAX:
                return
            if contact.id in self.nearest.contacted:
                continue
            self.nearest.mark_contacted(contact)
            if self.protocol.is_missing(contact):
                self._slow[contact.id] = contact
            else:
                self._slow_at_s[contact.id] = (now_s + self.protocol.slow_after_s(contact, SLOW_S_MIN), contact)
            nursery.start_soon(self._ask, contact, ask)

    async def _ask(self, contact: Contact, ask: Ask) -> None:
        try:
            found = await ask(contact, self.node)
        except Unanswered:
            self.failed[contact.id] = None
        else:
            self.answered[contact.id] = contact
            self.nearest.push([c for c in found if c.id not in self.failed])
        finally:
            self._slow_at_s.pop(contact.id, None)
            if contact.id in self.answered or contact.id in self.failed:
                self._slow.pop(contact.id, None)
            self._changed.set()

    def _is_over(self) -> bool:
        nearest = self._candidates()[: self.want]
        if self._satisfied() or (len(nearest) == self.want and all(c.id in self.answered for c in nearest)):
            return True
        return not self._slow_at_s and not self._slow

    def _satisfied(self) -> bool:
        """Whether nothing more is needed, whoever hasn't answered yet."""
        return False

    async def _wait(self) -> None:
        next_s = min((at_s for at_s, _ in self._slow_at_s.values()), default=float("inf"))
        with trio.move_on_at(next_s):
            await self._changed.wait()
        self._changed = trio.Event()


class ContactCrawl(Crawl):
    """Finds one contact by its id."""

    async def locate(self) -> Contact | None:
        await self.find()
        return self.answered.get(self.node.id)

    def _satisfied(self) -> bool:
        return self.node.id in self.answered


class ValueCrawl(Crawl):
    """Collects the records under `node.id` from the `want` nearest contacts that answer."""

    def __init__(self, protocol: Protocol, node: KademliaNode, peers: Iterable[Contact], want: int, kind: str = "") -> None:
        super().__init__(protocol, node, peers, want)
        self.kind = kind
        self.records: dict[bytes, Record] = {}
        self.holders: dict[bytes, list[Record]] = {}

    async def collect(self) -> list[Record]:
        """The newest record of each issuer and kind, each verified."""
        await self._find(self._ask_for_records)
        return newest(self.records.values())

    async def _ask_for_records(self, contact: Contact, node: KademliaNode) -> list[Contact]:
        contacts, records, page = await self.protocol.call_find_value(contact, node, self.kind)
        await self._take(contact, records)
        for _ in range(PAGES_MAX):
            if not page:
                break
            _, records, following = await self.protocol.call_find_value(contact, node, self.kind, page)
            await self._take(contact, records)
            page = following if following > page else 0
        found: list[Contact] = contacts
        return found

    async def _take(self, contact: Contact, records: Iterable[Record]) -> None:
        for record in records:
            if record.key != self.node.id or (self.kind and record.kind != self.kind):
                continue
            if record.signature not in self.records and await self.protocol.believe(contact, record):
                self.records[record.signature] = record
            if self.records.get(record.signature) == record:
                self.holders.setdefault(contact.id, []).append(record)


class Census:
    """Visits every member that can be reached, asking each for its own neighbourhood."""

    def __init__(self, protocol: Protocol, alpha: int = CENSUS_ALPHA) -> None:
        self._protocol = protocol
        self._waiting: deque[Contact] = deque()
        self._named: dict[bytes, None] = {protocol.source_node.id: None}
        self._members: list[Contact] = []
        self._alpha = alpha

    async def count(self) -> list[Contact]:
        """The members that answered, without this peer itself."""
        self._take(self._protocol.router)
        limiter = trio.CapacityLimiter(self._alpha)
        async with trio.open_nursery() as nursery:
            going = 0
            done = trio.Event()

            async def visit(contact: Contact) -> None:
                nonlocal going, done
                async with limiter:
                    await self._visit(contact)
                going -= 1
                done.set()

            while self._waiting or going:
                while self._waiting and going < 2 * self._alpha:
                    going += 1
                    nursery.start_soon(visit, self._waiting.popleft())
                await done.wait()
                done = trio.Event()
        return sorted(self._members, key=lambda contact: contact.id)

    def _take(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            if contact.id not in self._named and len(self._named) < MEMBERS_MAX:
                self._named[contact.id] = None
                self._waiting.append(contact)

    async def _visit(self, contact: Contact) -> None:
        try:
            found = await self._protocol.call_find_node(contact, contact)
        except Unanswered:
            return
        self._members.append(contact)
        self._take(found)
