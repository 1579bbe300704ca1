"""The Kademlia protocol: the kademlia package's, with its RPC layer replaced and its faults mended.

Rules this file keeps:

- only members are heard, and only members' words are believed: a contact enters the table when it answered or asked
  with a proven address, never because somebody named it;
- a contact leaves after three misses in a row, or when it says goodbye;
- being heard costs the same however many records are held: handing records over is another, bounded, task's work;
- records are verified before they are held and before they are believed.

`rpc_*` answer a request (plain functions), `call_*` make one. A `call_*` raises `Unanswered`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import trio
from kademlia.protocol import KademliaProtocol

from dht.contact import Contact, Target
from dht.core.codec import CodecError, Struct, decode, encode
from dht.core.datagram import BODY_BYTES_MAX, Kind, Packet
from dht.core.membership import Chain, Membership, MembershipError
from dht.core.messages import (
    CERTIFICATES_MAX,
    HOST_CHARS_MAX,
    NEED_CHAIN,
    RECORDS_MAX,
    REFUSED,
    STALE,
    STORED,
    ContactInfo,
    Find,
    Found,
    Hello,
    Ping,
    Store,
    Stored,
    Value,
    Values,
    Welcome,
)
from dht.core.records import Record, RecordError, verify_record
from dht.introductions import Introductions
from dht.network import Address
from dht.routing import Table
from dht.rpc import Rpc, Unanswered
from dht.storage import Storage

K = 20
"""Contacts in a bucket and in an answer (the paper's k)."""
MISSES_MAX = 3
"""Misses in a row after which a contact is let go: one may be a blip, and where a tenth of all datagrams is lost, two in a row
come every some ten thousand pings."""
INTRODUCTIONS_MAX = 2
"""How often one call tells the other side who we are; it may have forgotten us, but not for ever."""
SUSPECTS_MAX = 256
"""Contacts waiting to be asked whether they still live."""
NAMED_MAX = 256
"""Contacts that others named and that would fit the table, waiting to be asked."""
GONE_MAX = 512
GONE_S = 10.0
"""Whoever was silent or said goodbye isn't sought again for so long because somebody names it."""
CLAIMS_MAX = 64
"""Addresses that peers advertise, waiting to be proven."""
PAGE_OVERHEAD_BYTES = 16
VALUE_CONTACTS_MAX = 8
"""Contacts in the first page of an answer with records."""
INFO_BYTES_MAX = 1_024
"""What a peer says about itself in one datagram."""

T = TypeVar("T")


class Protocol(KademliaProtocol):  # type: ignore[misc]
    """What this peer says and does; `attach` gives it the socket to speak through. `clock` gives unix time in seconds."""

    def __init__(
        self,
        membership: Membership,
        source: Contact,
        storage: Storage,
        *,
        rng: random.Random,
        clock: Callable[[], float],
        info: Callable[[], bytes],
        advertise: Address | None = None,
        k: int = K,
    ) -> None:
        # not the package's __init__: it makes a table that reads the system's clock
        self.rpc: Rpc
        self.introductions = Introductions(membership, storage, clock)
        self.router = Table(k, source, trio.current_time)
        self.storage: Storage = storage
        self.source_node: Contact = source
        self.membership = membership
        self.rng = rng
        self.clock = clock
        self.info = info
        self.advertise = advertise
        self.suspects: OrderedDict[bytes, Contact] = OrderedDict()
        self.claims: OrderedDict[bytes, Contact] = OrderedDict()
        self.named: OrderedDict[bytes, Contact] = OrderedDict()
        self._gone_s: OrderedDict[bytes, float] = OrderedDict()
        self.attention = trio.Event()
        self.lost_s = float("-inf")  # when a contact was last found dead
        self.on_kept: Callable[[bytes], None] = lambda key: None

    def __getattr__(self, name: str) -> NoReturn:
        """The package turns any unknown name into a remote call; here a typing error is one."""
        raise AttributeError(name)

    def attach(self, rpc: Rpc) -> None:
        """Speak through this socket from now on."""
        self.rpc = self.introductions.rpc = rpc

    # whom we know

    def chain_of(self, key: bytes) -> Chain | None:
        """The valid chain of a peer or of the issuer of a held record."""
        return self.introductions.chain_of(key)

    def heard(self, contact: Contact) -> None:
        """A member answered from this address, or asked from it with a token that proves it."""
        if contact.id == self.source_node.id:
            return
        state = self.rpc.states.of(contact.id)
        state.heard_s, state.misses = trio.current_time(), 0
        self.suspects.pop(contact.id, None)
        self.named.pop(contact.id, None)
        if state.advertised is not None:
            contact = Contact(contact.key, state.advertised)
        head = self.router.add_contact(contact)
        if head is not None:
            self.suspect(head)

    def missed(self, contact: Contact, asked_s: float) -> None:
        """A request made at `asked_s` stayed unanswered. Requests under way together are one miss, not many."""
        held = self.router.get(contact)
        if held is None:
            self._remember_gone(contact)
        if held is None or held.address != contact.address:
            return
        state = self.rpc.states.of(contact.id)
        if asked_s <= state.missed_s or asked_s < state.heard_s:
            return
        state.misses, state.missed_s = state.misses + 1, trio.current_time()
        if state.misses >= MISSES_MAX:
            self.lost_s = trio.current_time()
            self.let_go(held)
        else:
            self.suspect(held)

    def suspect(self, contact: Contact) -> None:
        """Have the contact asked soon whether it still lives."""
        if contact.id not in self.suspects and len(self.suspects) < SUSPECTS_MAX:
            self.suspects[contact.id] = contact
            self.attention.set()

    def suspect_if_known(self, contact: Contact) -> None:
        """Have a contact of the table checked that kept a lookup waiting."""
        held = self.router.get(contact)
        if held is not None and held.address == contact.address:
            self.suspect(held)

    def let_go(self, contact: Contact) -> None:
        """Take a contact out of the table; a replacement that comes in is asked whether it lives."""
        self.suspects.pop(contact.id, None)
        self._remember_gone(contact)
        bucket = self.router.buckets[self.router.get_bucket_for(contact)]
        before = set(bucket.nodes)
        self.router.remove_contact(contact)
        self.rpc.states.forget(contact.id)
        for id_, node in bucket.nodes.items():
            if id_ not in before:
                self.suspect(node)

    def _remember_gone(self, contact: Contact) -> None:
        self.named.pop(contact.id, None)
        self._gone_s[contact.id] = trio.current_time()
        self._gone_s.move_to_end(contact.id)
        if len(self._gone_s) > GONE_MAX:
            self._gone_s.popitem(last=False)

    def _meet(self, contact: Contact) -> None:
        """Have a contact that somebody named asked some time soon, if the table has room for it."""
        bucket = self.router.buckets[self.router.get_bucket_for(contact)]
        gone_s = self._gone_s.get(contact.id, float("-inf"))
        if (len(bucket) < self.router.ksize or bucket.has_in_range(self.source_node)) and (
            len(self.named) < NAMED_MAX and trio.current_time() > gone_s + GONE_S
        ):
            self.named.setdefault(contact.id, contact)

    def is_missing(self, contact: Contact) -> bool:
        """Whether the contact's last answer is overdue."""
        state = self.rpc.states.peek(contact.id)
        return state is not None and state.misses > 0

    def slow_after_s(self, contact: Contact, least_s: float) -> float:
        """How long a call to this contact may take before others should be asked beside it."""
        trips = 1 if self.rpc.has_token(contact) and self.chain_of(contact.key) else 3
        return max(least_s, 2.5 * self.rpc.states.rtt_s(contact.id) * trips)

    # answers

    def handle(self, sender: Contact, kind: Kind, packet: Packet) -> tuple[Kind, bytes] | None:
        """Answer a request whose sender's key and address are proven; whether it is a member is decided here."""
        if kind is Kind.HELLO:
            return self.rpc_hello(sender, decode(packet.body, Hello))
        if self.introductions.trust.member(sender.key, self.clock()) is None:
            self.rpc.counters["not_a_member"] += 1
            return Kind.WHO, b""
        is_repeated = self.rpc.is_repeated(sender, packet)
        if kind is Kind.BYE:
            if not is_repeated:
                self.let_go(sender)
            return None
        if not is_repeated:
            self.heard(sender)
        return Kind.ANSWER, self._answer(sender, kind, packet.body)

    def _answer(self, sender: Contact, kind: Kind, body: bytes) -> bytes:
        match kind:
            case Kind.PING:
                return self.rpc_ping(sender, decode(body, Ping))
            case Kind.FIND:
                return encode(self.rpc_find_node(sender, decode(body, Find)))
            case Kind.VALUE:
                return encode(self.rpc_find_value(sender, decode(body, Value)))
            case Kind.STORE:
                return encode(self.rpc_store(sender, decode(body, Store)))
            case Kind.INFO:
                return self.rpc_info(sender)
        raise CodecError("not a request")

    def rpc_hello(self, sender: Contact, hello: Hello) -> tuple[Kind, bytes]:
        """Take in the sender's certificates; show it the chain it wants if it is a member by now."""
        try:
            self.introductions.trust.learn(hello.certificates, self.clock())
        except MembershipError:
            self.rpc.counters["bad_certificate"] += 1
        if self.introductions.trust.member(sender.key, self.clock()) is None:
            return Kind.WHO, b""
        chain = self.chain_of(hello.want) or ()
        return Kind.ANSWER, encode(Welcome(chain[hello.offset : hello.offset + CERTIFICATES_MAX], len(chain)))

    def rpc_ping(self, sender: Contact, ping: Ping) -> bytes:
        state = self.rpc.states.of(sender.id)
        if ping.advertise is None:
            state.advertised = None
        elif ping.advertise != state.advertised and len(self.claims) < CLAIMS_MAX:
            self.claims[sender.id] = Contact(sender.key, ping.advertise)
            self.attention.set()
        return b""

    def rpc_find_node(self, sender: Contact, find: Find) -> Found:
        return Found(self._infos(find.target, sender, self.router.ksize))

    def rpc_find_value(self, sender: Contact, value: Value) -> Values:
        """Page 0 has contacts, and records if they fit beside them; page n begins with record n - 1."""
        contacts = self._infos(value.key, sender, VALUE_CONTACTS_MAX) if value.page == 0 else ()
        records = self.storage.records(value.key, value.kind)
        start = max(0, value.page - 1)
        room = BODY_BYTES_MAX - len(encode(contacts)) - PAGE_OVERHEAD_BYTES
        page: list[Record] = []
        for record in records[start : start + RECORDS_MAX]:
            room -= len(encode(record))
            if room < 0:
                break
            page.append(record)
        end = start + len(page)
        return Values(contacts, tuple(page), end + 1 if end < len(records) else 0)

    def rpc_store(self, sender: Contact, store: Store) -> Stored:
        record = store.record
        try:
            verify_record(self.membership.grid, record, self.clock())
            chain = self.chain_of(record.issuer)
            if chain is None:
                return Stored(NEED_CHAIN)
            return Stored(STORED if self.keep(record, chain) else STALE)
        except RecordError:
            self.rpc.counters["refused_record"] += 1
            return Stored(REFUSED)

    def keep(self, record: Record, chain: Chain) -> bool:
        """Hold a verified record; see `Storage.put`."""
        is_kept = self.storage.put(record, chain)
        self.on_kept(record.key)
        return is_kept

    def rpc_info(self, sender: Contact) -> bytes:
        return self.info()[:INFO_BYTES_MAX]

    def _infos(self, target: bytes, asker: Contact, count: int) -> tuple[ContactInfo, ...]:
        """The nearest contacts, as many as fit; what only this machine can reach isn't told to others."""
        nearest = self.router.find_neighbors(Target(target), count, exclude=asker)
        infos = [
            (c.key, c.ip, c.port)
            for c in nearest
            if len(c.ip) <= HOST_CHARS_MAX and (is_loopback(asker.ip) or not is_loopback(c.ip))
        ]
        while len(encode(infos)) > BODY_BYTES_MAX - 8:
            infos.pop()
        return tuple(infos)

    # requests

    async def call(self, contact: Contact, kind: Kind, body: bytes) -> bytes:
        """Ask a contact, getting acquainted first where needed. Raises `Unanswered`."""
        asked_s = trio.current_time()
        try:
            answer = await self._call(contact, kind, body)
        except Unanswered:
            self.missed(contact, asked_s)
            raise
        self.heard(contact)
        return answer

    async def _call(self, contact: Contact, kind: Kind, body: bytes) -> bytes:
        if contact.id == self.source_node.id:
            raise Unanswered("that is this peer itself")
        if self.introductions.trust.member(contact.key, self.clock()) is None:
            await self.introductions.introduce(contact)
        for _ in range(INTRODUCTIONS_MAX):
            packet = await self.rpc.ask(contact, kind, body)
            if packet.kind == Kind.ANSWER:
                return packet.body
            await self.introductions.introduce(contact)
        raise Unanswered("the peer does not take us for a member")

    async def _ask_for(self, contact: Contact, kind: Kind, body: Struct, type_: type[T]) -> T:
        answer = await self.call(contact, kind, encode(body))
        try:
            return decode(answer, type_)
        except CodecError as error:
            self.rpc.counters["malformed"] += 1
            raise Unanswered(f"a malformed answer: {error}") from None

    async def call_ping(self, node_to_ask: Contact) -> None:
        await self.call(node_to_ask, Kind.PING, encode(Ping(self.advertise)))

    async def call_find_node(self, node_to_ask: Contact, node_to_find: Any) -> list[Contact]:
        found = await self._ask_for(node_to_ask, Kind.FIND, Find(node_to_find.id), Found)
        return self._contacts(found.contacts)

    async def call_find_value(
        self, node_to_ask: Contact, node_to_find: Any, kind: str = "", page: int = 0
    ) -> tuple[list[Contact], tuple[Record, ...], int]:
        """Contacts, records (not verified yet), and the next page's number or 0."""
        values = await self._ask_for(node_to_ask, Kind.VALUE, Value(node_to_find.id, kind, page), Values)
        return self._contacts(values.contacts), values.records, values.next

    async def call_store(self, node_to_ask: Contact, record: Record) -> bool:
        """Whether the contact holds the record now (or a newer one of the same issuer and kind)."""
        stored = await self._ask_for(node_to_ask, Kind.STORE, Store(record), Stored)
        if stored.status == NEED_CHAIN:
            chain = self.chain_of(record.issuer)
            if chain is None:
                return False
            await self.introductions.push(node_to_ask, chain)
            stored = await self._ask_for(node_to_ask, Kind.STORE, Store(record), Stored)
        return stored.status in (STORED, STALE)

    async def call_info(self, node_to_ask: Contact) -> bytes:
        return await self.call(node_to_ask, Kind.INFO, b"")

    async def believe(self, source: Contact, record: Record) -> bool:
        """Whether a record got from `source` is valid and its issuer a member; fetches the issuer's chain if needed."""
        try:
            verify_record(self.membership.grid, record, self.clock())
            self.storage.check_value(record)
            if self.chain_of(record.issuer) is None:
                await self.introductions.pull(source, record.issuer)
        except (RecordError, Unanswered):
            self.rpc.counters["disbelieved_record"] += 1
            return False
        return True

    def _contacts(self, infos: Sequence[ContactInfo]) -> list[Contact]:
        """Contacts somebody named: where we know an address by proof, ours counts; this peer itself is left out."""
        contacts = []
        for named in (Contact(key, (host, port)) for key, host, port in infos):
            held = self.router.get(named)
            if held is None and named.id != self.source_node.id:
                self._meet(named)
            if named.id != self.source_node.id:
                contacts.append(held or named)
        return contacts


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
