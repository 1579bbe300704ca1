"""Requests and answers over signed datagrams, on trio.

Rules this file keeps:

- whatever arrives, the receive loop goes on: what can't be parsed, isn't for us, or isn't signed right is dropped and
  counted;
- an answer is only given to who proved its address, or is no longer than the question;
- one request is one message id, sent up to three times; cancelling it leaves nothing behind;
- the waits follow what the peer needs and how busy everything is, by late answers too: overload never makes more load;
- requests under way are bounded; the handler is a plain function, so a datagram never starts a task;
- a datagram seen before is answered again, as its answer may have been lost, but proves nothing new.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from dht.contact import Contact, PeerStates
from dht.core.codec import CodecError
from dht.core.datagram import ANYBODY, ID_LENGTH, NO_TOKEN, Envelope, Kind, OtherVersion, Packet, check_signature, seal
from dht.core.datagram import parse as parse_datagram
from dht.core.identity import BadSignature
from dht.core.membership import Membership
from dht.core.tokens import Tokens
from dht.network import Address, DatagramSocket

log = logging.getLogger(__name__)

WAITS_S = (0.15, 0.2, 0.35)
"""How long to wait after each sending for peers as near as usual: 0.7 s until a peer counts as silent."""
RTTS_PER_WAIT = 2.0
"""The first wait is at least so many of the peer's smoothed round trips; the others grow with it."""
RTT_S_MAX = 2.0
"""Longer round trips are not believed: a liar must not make us wait for ever."""
LATE_S = 0.1
"""A wait that ends so much later than it should was ours to miss (a busy or stopped process): the answer may be in the
socket already, so it is waited for once more."""
RETRIES_MAX = 2
"""Address tokens accepted in one request; more is a peer that plays with us."""
REQUESTS_MAX = 512
"""Requests under way; further callers wait."""
GIVEN_UP_MAX = 256
"""Unanswered requests remembered: an answer that comes late still tells how long to wait next time."""
SEEN_MAX = 8_192
"""Message ids remembered against replays; tokens die after two minutes anyway."""


class Unanswered(Exception):
    """The peer didn't answer, or not as a member of this grid does."""


class Dropped(Exception):
    """Nothing to be done with this datagram but to count it under `why`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass
class _Pending:
    key: bytes | None
    answered: trio.Event = field(default_factory=trio.Event)
    answer: tuple[Contact, Packet] | None = None
    sent_s: float = 0.0  # the first time, since the last answer
    sendings: int = 0  # since the last answer


Handler = Callable[[Contact, Kind, Packet], tuple[Kind, bytes] | None]
"""Called with a request whose sender proved its key and address; returns the answer or None."""


class Rpc:
    """One peer's datagram socket. `now` is `trio.current_time` unless a test says otherwise."""

    def __init__(self, membership: Membership, socket: DatagramSocket, rng: random.Random, handler: Handler) -> None:
        self._membership = membership
        self._socket = socket
        self._rng = rng
        self._handler = handler
        self._tokens = Tokens(rng)
        self._pending: dict[bytes, _Pending] = {}
        self._given_up: OrderedDict[bytes, _Pending] = OrderedDict()
        self._seen: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._slots = trio.Semaphore(REQUESTS_MAX)
        self.states = PeerStates()
        self.counters: Counter[str] = Counter()
        self.versions_seen: Counter[int] = Counter()

    @property
    def pending(self) -> int:
        """Requests under way."""
        return len(self._pending)

    async def serve(self) -> None:
        """Receive until cancelled."""
        while True:
            data, address = await self._socket.receive_from()
            self.counters["received"] += 1
            try:
                answer = self._receive(data, address)
            except Dropped as dropped:
                self.counters[dropped.why] += 1
                continue
            except Exception:  # a fault of ours must not cost the peer its place in the grid
                self.counters["failed"] += 1
                log.exception("a datagram from %s could not be handled", address)
                continue
            if answer is not None:
                await self._send(answer, address)

    async def _send(self, datagram: bytes, address: Address) -> None:
        self.counters["sent"] += 1
        await self._socket.send_to(datagram, address)

    def _receive(self, data: bytes, address: Address) -> bytes | None:
        """Handle one datagram; returns the datagram to answer with."""
        try:
            envelope = parse_datagram(data)
            kind = Kind(envelope.packet.kind)
        except OtherVersion as version:
            self.versions_seen[version.args[0]] += 1
            raise Dropped("other_version") from None
        except (CodecError, ValueError):
            raise Dropped("malformed") from None
        me = self._membership.identity
        if envelope.key == me.public:
            raise Dropped("own")
        if envelope.packet.to != (ANYBODY if kind is Kind.PROBE else me.id):
            raise Dropped("misdirected")
        if kind >= Kind.ANSWER:
            self._receive_answer(envelope, address)
            return None
        try:
            check_signature(self._membership.grid, envelope)
        except BadSignature:
            raise Dropped("bad_signature") from None
        answer = self._answer(kind, envelope, address)
        if answer is None:
            return None
        datagram = self._seal(answer[0], envelope.packet.id, Contact(envelope.key, address), answer[1], address)
        if answer[0] is not Kind.ANSWER and len(datagram) > len(data):
            raise Dropped("short_request")
        return datagram

    def _answer(self, kind: Kind, envelope: Envelope, address: Address) -> tuple[Kind, bytes] | None:
        packet = envelope.packet
        if kind is Kind.PROBE:
            return Kind.RETRY, b""
        if not self._tokens.check(packet.token, envelope.key, address, trio.current_time()):
            self.counters["no_token"] += 1
            return None if kind is Kind.BYE else (Kind.RETRY, b"")
        try:
            return self._handler(Contact(envelope.key, address), kind, packet)
        except CodecError:
            raise Dropped("malformed") from None

    def is_repeated(self, sender: Contact, packet: Packet) -> bool:
        """Whether this request of a member was handled before. Remembers it."""
        name = (sender.key, packet.id)
        if name in self._seen:
            self.counters["repeated"] += 1
            return True
        self._seen[name] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        return False

    def _receive_answer(self, envelope: Envelope, address: Address) -> None:
        id_, sender = envelope.packet.id, Contact(envelope.key, address)
        pending, is_late = self._pending.get(id_), False
        if pending is None:
            pending, is_late = self._given_up.get(id_), True
        if pending is None or pending.answer is not None:
            raise Dropped("unasked")
        if pending.key is not None and pending.key != envelope.key:
            raise Dropped("wrong_key")
        try:
            check_signature(self._membership.grid, envelope)
        except BadSignature:
            raise Dropped("bad_signature") from None
        pending.answer = (sender, envelope.packet)
        pending.answered.set()
        if is_late:
            del self._given_up[id_]
            self.counters["late"] += 1
            self._sample(sender, pending)

    def _seal(self, kind: Kind, id_: bytes, to: Contact | None, body: bytes, address: Address) -> bytes:
        if to is None:
            receiver, token = ANYBODY, NO_TOKEN
        elif kind >= Kind.ANSWER:
            receiver, token = to.id, self._tokens.give(to.key, address, trio.current_time())
        else:
            state = self.states.of(to.id)
            receiver, token = to.id, state.token if state.token_address == address else NO_TOKEN
        packet = Packet(int(kind), id_, receiver, token, body)
        return seal(self._membership.grid, self._membership.identity, packet)

    def has_token(self, contact: Contact) -> bool:
        """Whether this peer holds a token for the contact's address (it may have expired)."""
        state = self.states.peek(contact.id)
        return state is not None and state.token_address == contact.address

    async def probe(self, address: Address) -> Contact:
        """Who is at this address. Raises `Unanswered`. That it is a member isn't known yet.

        The contact has the address the answer came from: a numeric one, even if `address` has a name.
        """
        contact, packet = await self._exchange(None, address, Kind.PROBE, b"")
        self._keep_token(contact, packet)
        return contact

    async def ask(self, contact: Contact, kind: Kind, body: bytes) -> Packet:
        """One request; the answer's kind is `ANSWER` or `WHO`. Raises `Unanswered`."""
        _, packet = await self._exchange(contact, contact.address, kind, body)
        return packet

    async def tell(self, contact: Contact, kind: Kind, body: bytes = b"") -> None:
        """Send without waiting for anything."""
        await self._send(self._seal(kind, self._rng.randbytes(ID_LENGTH), contact, body, contact.address), contact.address)

    def _keep_token(self, contact: Contact, packet: Packet) -> None:
        state = self.states.of(contact.id)
        state.token, state.token_address = packet.token, contact.address

    async def _exchange(self, contact: Contact | None, address: Address, kind: Kind, body: bytes) -> tuple[Contact, Packet]:
        async with self._slots:
            id_ = self._rng.randbytes(ID_LENGTH)
            pending = self._pending[id_] = _Pending(None if contact is None else contact.key)
            try:
                return await self._send_until_answered(pending, id_, contact, address, kind, body)
            finally:
                del self._pending[id_]

    async def _send_until_answered(
        self, pending: _Pending, id_: bytes, contact: Contact | None, address: Address, kind: Kind, body: bytes
    ) -> tuple[Contact, Packet]:
        retries = 0
        waits_s = list(self.waits_s(contact))
        while waits_s:
            pending.sendings += 1
            if pending.sendings == 1:
                pending.sent_s = trio.current_time()
            await self._send(self._seal(kind, id_, contact, body, address), address)
            await _answer_within(pending, waits_s[0])
            if pending.answer is None:
                waits_s.pop(0)
                continue
            sender, packet = pending.answer
            if contact is not None:
                self._keep_token(contact, packet)
                self._sample(contact, pending)
            if packet.kind != Kind.RETRY or contact is None:
                return sender, packet
            retries += 1
            if retries > RETRIES_MAX:
                break
            pending.answer, pending.answered, pending.sendings = None, trio.Event(), 0
        self._give_up(id_, pending)
        raise Unanswered(f"no answer from {address[0]}:{address[1]}")

    def _give_up(self, id_: bytes, pending: _Pending) -> None:
        self._given_up[id_] = pending
        if len(self._given_up) > GIVEN_UP_MAX:
            self._given_up.popitem(last=False)

    def _sample(self, contact: Contact, pending: _Pending) -> None:
        rtt_s = min(trio.current_time() - pending.sent_s, RTT_S_MAX)
        self.states.sample(contact.id, rtt_s, is_exact=pending.sendings == 1)

    def waits_s(self, contact: Contact | None) -> tuple[float, ...]:
        """How long to wait after each sending."""
        rtt_s = self.states.usual_rtt_s if contact is None else self.states.rtt_s(contact.id)
        factor = max(1.0, RTTS_PER_WAIT * rtt_s / WAITS_S[0])
        return tuple(factor * wait_s for wait_s in WAITS_S)


async def _answer_within(pending: _Pending, wait_s: float) -> None:
    until_s = trio.current_time() + wait_s
    with trio.move_on_at(until_s):
        await pending.answered.wait()
    if pending.answer is None and trio.current_time() > until_s + LATE_S:
        with trio.move_on_after(wait_s):
            await pending.answered.wait()
