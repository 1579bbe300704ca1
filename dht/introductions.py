"""Getting acquainted: two peers show each other their certificates before anything else is said.

Rules this file keeps:

- a stranger's address is asked with the smallest datagram there is before certificates are sent to it;
- chains go root-first, several certificates a datagram, so that each is verified as it comes;
- tasks that want to meet the same peer at the same time do it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from dht.contact import Contact
from dht.core.codec import CodecError, decode, encode
from dht.core.datagram import Kind
from dht.core.membership import Certificate, Chain, Membership, MembershipError
from dht.core.messages import CERTIFICATES_MAX, Hello, Welcome
from dht.core.trust import Trust
from dht.rpc import Rpc, Unanswered
from dht.storage import Storage


@dataclass
class _Introduction:
    over: trio.Event = field(default_factory=trio.Event)
    failed: bool = False


class Introductions:
    """Who is known to be a member, and how to find out. `clock` gives unix time in seconds."""

    rpc: Rpc

    def __init__(self, membership: Membership, storage: Storage, clock: Callable[[], float]) -> None:
        self.trust = Trust(membership)
        self._membership = membership
        self._storage = storage
        self._clock = clock
        self._going_on: dict[bytes, _Introduction] = {}

    @property
    def going_on(self) -> int:
        """Introductions under way."""
        return len(self._going_on)

    def chain_of(self, key: bytes) -> Chain | None:
        """The valid chain of a peer or of the issuer of a held record."""
        now_s = self._clock()
        chain = self.trust.chain(key, now_s)
        if chain is None and (chain := self._storage.chain_of(key)) is not None:
            try:
                self._membership.check(chain, now_s)
            except MembershipError:
                return None
        return chain

    async def introduce(self, contact: Contact) -> None:
        """Show a contact our certificates and learn its own. Raises `Unanswered` unless both are members then."""
        while (going_on := self._going_on.get(contact.id)) is not None:
            await going_on.over.wait()
            if going_on.failed:
                raise Unanswered("the peer did not answer another task either")
            if self.trust.member(contact.key, self._clock()) is not None:
                return
        introduction = self._going_on[contact.id] = _Introduction()
        try:
            if not self.rpc.has_token(contact):
                found = await self.rpc.probe(contact.address)  # small: nobody is sent certificates at a false address
                if found.id != contact.id:
                    raise Unanswered("another peer is at that address")
            await self.push(contact, self._membership.chain)
            await self.pull(contact, contact.key)
        except Unanswered:
            introduction.failed = True
            raise
        finally:
            del self._going_on[contact.id]
            introduction.over.set()

    async def push(self, contact: Contact, chain: Sequence[Certificate]) -> None:
        """Send a chain root-first, so that the other side can verify each certificate as it comes."""
        for start in range(0, len(chain), CERTIFICATES_MAX):
            hello = Hello(tuple(chain[start : start + CERTIFICATES_MAX]), contact.key)
            packet = await self.rpc.ask(contact, Kind.HELLO, encode(hello))
            if packet.kind == Kind.ANSWER and start == 0:
                self._learn(packet.body)
        if packet.kind != Kind.ANSWER:
            raise Unanswered("the peer does not take us for a member")

    def _learn(self, body: bytes) -> int:
        """Take in a `Welcome`; returns the length of the whole chain. Raises `Unanswered` when it isn't one."""
        try:
            welcome = decode(body, Welcome)
            self.trust.learn(welcome.certificates, self._clock())
        except (CodecError, MembershipError) as error:
            self.rpc.counters["bad_certificate"] += 1
            raise Unanswered(f"a stranger: {error}") from None
        return welcome.length

    async def pull(self, contact: Contact, key: bytes) -> None:
        """Fetch the chain of `key` from a contact, unless it is known by now."""
        offset = 0
        while self.trust.member(key, self._clock()) is None:
            packet = await self.rpc.ask(contact, Kind.HELLO, encode(Hello((), key, offset)))
            if packet.kind != Kind.ANSWER:
                raise Unanswered("the peer does not take us for a member")
            offset += CERTIFICATES_MAX
            if self._learn(packet.body) <= offset and self.trust.member(key, self._clock()) is None:
                raise Unanswered("no certificate")
