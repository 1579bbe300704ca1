"""The mesh: this peer's connections to all others, by peer id.

One control connection a pair carries messages and requests both ways; blobs have links of their own. Rules this file keeps:

- `send`, `request` and `read_blob` dial when needed; one dial at a time a peer, shared by all who wait;
- messages from one peer are handled one after the other, in order, between its `on_up` and `on_down`; requests run beside
  them, a bounded number at a time; a slow handler holds back that peer only;
- a connection that breaks loses what was in flight, not what was queued: delivery is at most once;
- whatever another peer does costs at most its own connection; a handler's fault too, and is logged with its traceback.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from dht.core import codec
from dht.core.identity import PeerId
from dht.core.membership import Membership, MembershipError
from dht.network import Address, Network
from grid.core.noise import Buffer
from grid.transport.bloblinks import BlobLinks
from grid.transport.blobs import BlobChunks
from grid.transport.channel import SecureChannel
from grid.transport.dialling import AddressBook, Dialler, Locate, format_address
from grid.transport.dispatch import Dispatch, check_size
from grid.transport.errors import (
    PeerUnreachable,
    Refused,
)
from grid.transport.handler import MeshHandler as MeshHandler
from grid.transport.hello import PEER, Code, Credentials, Hello, HelloInfo, Verdict
from grid.transport.limits import (
    CLOSE_S,
    CONNECTIONS_MAX,
    HANDSHAKE_S,
    HOUSEKEEPING_S,
    REDIAL_S_MAX,
    REDIAL_S_MIN,
    SPARE_CHECK_S,
    UNREACHABLE_S,
)
from grid.transport.link import Link
from grid.transport.outbox import CANCEL, KEPT, MESSAGE, REQUEST, Frame
from grid.transport.pending import Pending
from grid.transport.reception import Reception
from grid.transport.remote import Dial, Down, Remote, Up
from grid.transport.spare import Spare

log = logging.getLogger(__name__)

CONNECT_TRIES: Final = 3
"""Connections that break as soon as they stand, before `connect` gives up."""
ADDRESSES_TOLD_MAX: Final = 16
"""Members' addresses that a joiner gets: it finds the others itself."""


class _Superseded(Exception):
    """Our dial is of no use any more: there is a connection, or an earlier dial that got further."""


async def _nowhere(peer: PeerId) -> Sequence[Address]:
    return ()


class Mesh:
    """Connections of one peer. `run` it in a nursery; all other methods belong to the same thread."""

    def __init__(
        self,
        *,
        membership: Membership,
        network: Network,
        handler: MeshHandler,
        locate: Locate = _nowhere,
        describe: Callable[[], HelloInfo] = HelloInfo,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        in_use: Callable[[PeerId], bool] = lambda peer: False,
    ) -> None:
        """locate: where a peer listens, asked when no known address answers. clock: unix time, for certificates.

        in_use: whether a connection that stands is of use although nothing may come over it for a while.
        rng: jitter only. entropy: secret randomness for keys; only a simulation passes anything but os.urandom.
        """
        self.id = membership.identity.id
        self.counters: Counter[str] = Counter()
        """What happened so far: handshakes that failed by kind, dials, connections, faults of the handler."""
        self._membership = membership
        self._network = network
        self._handler = handler
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._credentials = Credentials(
            membership.grid,
            membership.identity,
            chain=lambda: membership.chain,
            check=lambda chain: membership.check(chain, clock()),
            describe=describe,
            entropy=entropy,
        )
        self._remotes: dict[PeerId, Remote] = {}
        self._book = AddressBook(self._remotes.__contains__)
        self._dialler = Dialler(network, self._credentials, locate, self._book)
        self._spare = Spare(self._remotes, in_use)
        self._nursery: trio.Nursery | None = None
        self._blobs = BlobLinks(self._dialler, self._remote, lambda: self.running, self._read_own)
        self._dispatch = Dispatch(handler, self.counters, self._spawn, self._lose, self._blobs.serve_back)

    # ---- life --------------------------------------------------------------------------------------------------------

    async def run(self, listen: Address, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled; started(the actual address). Raises OSError when the port is taken."""
        listener = await self._network.listen_stream(listen)
        reception = Reception(self, self._blobs, self._dispatch, self._credentials, self._handler)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._housekeeping)
                nursery.start_soon(reception.run, listener)
                task_status.started(listener.address)
        finally:
            self._nursery = None
            stopped = "this peer stops"
            for remote in self._remotes.values():
                self._fail_pending(remote, stopped)
                remote.outbox.give_up(PeerUnreachable(remote.id, stopped))
            with trio.CancelScope(shield=True):
                await listener.aclose()

    @property
    def running(self) -> trio.Nursery:
        """Where this mesh's tasks live. Raises PeerUnreachable before and after `run`."""
        if self._nursery is None:
            raise PeerUnreachable(self.id, "its mesh is not running")
        return self._nursery

    def _spawn(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        if self._nursery is not None:  # else all is over, and nobody waits for it
            self._nursery.start_soon(function, *arguments)

    async def _housekeeping(self) -> None:
        checked = trio.current_time()
        while True:
            await trio.sleep(SPARE_CHECK_S)
            now = trio.current_time()
            if now - checked >= HOUSEKEEPING_S:
                checked = now
                self.recheck()
            self._spare.thin(now)
            for remote in list(self._remotes.values()):
                if remote.forgettable:
                    del self._remotes[remote.id]
            self._book.tidy()

    def recheck(self) -> None:
        """Close connections of peers that are no members any more: call it when a revocation was learnt."""
        for remote in list(self._remotes.values()):
            if remote.link is not None and remote.hello is not None:
                try:
                    self._credentials.check(remote.hello.chain)
                except MembershipError as error:
                    self._lose(remote, remote.link, f"no member any more: {error}")

    # ---- connections -------------------------------------------------------------------------------------------------

    def connected(self) -> list[PeerId]:
        return [remote.id for remote in self._remotes.values() if remote.link is not None]

    def neighbours(self) -> list[PeerId]:
        """Those connected that either end keeps."""
        links = {remote.id: remote.link for remote in self._remotes.values() if remote.link is not None}
        return [peer for peer, link in links.items() if self._remotes[peer].wanted or link.use_there == KEPT]

    def hello(self, peer: PeerId) -> Hello | None:
        """What the peer said of itself on the present connection; None when there is none."""
        remote = self._remotes.get(peer)
        return remote.hello if remote is not None and remote.link is not None else None

    def addresses(self, peer: PeerId) -> list[Address]:
        """Where it was last reached or says it listens, best first."""
        return self._book.get(peer)

    def learn(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Addresses to try first when this peer is dialled next."""
        self._book.learn(peer, addresses)

    def addresses_to_tell(self) -> list[str]:
        """Ours and some members', for a joiner."""
        known = [self._book.get(peer)[:1] for peer in self.connected()]
        told = [self._credentials.describe().address, *(format_address(a) for found in known for a in found)]
        return [address for address in dict.fromkeys(told) if address][:ADDRESSES_TOLD_MAX]

    async def connect(self, peer: PeerId, addresses: Sequence[Address] = ()) -> None:
        """Return once there is a connection. Raises PeerUnreachable."""
        remote = self._remote(peer)
        for _ in range(CONNECT_TRIES):
            if remote.link is not None:
                return
            dial = remote.dial or self._start_dial(remote, addresses)
            await dial.done.wait()
            if dial.error is not None:
                raise PeerUnreachable(peer, dial.error.why)
        if remote.link is None:
            raise PeerUnreachable(peer, "its connections break as soon as they stand")

    async def connect_address(self, address: Address) -> PeerId:
        """Connect to whichever member listens there. Raises OSError, TimeoutError, HandshakeError, PeerUnreachable."""
        dial = Dial()
        found: list[Remote] = []

        def authenticated(hello: Hello) -> None:
            found.append(self._remote(hello.id))
            self._authenticated(found[0], dial, hello)
            if found[0].dial is not None:
                found[0].dial.scope.cancel()
            found[0].dial = dial

        _ = self.running
        try:
            with dial.scope:
                channel = await self._dialler.open(address, PEER, authenticated=authenticated)
                self._adopt(found[0], channel)
        except (_Superseded, Refused) as error:
            if isinstance(error, Refused) and error.code != Code.DUPLICATE:
                raise
        finally:
            if found and found[0].dial is dial:
                found[0].dial = None
            dial.done.set()
        await self.connect(found[0].id, [address])
        return found[0].id

    def keep(self, peer: PeerId, addresses: Sequence[Address] = ()) -> None:
        """Stay connected to this peer, dialling again whenever the connection breaks, until `unkeep`."""
        self._book.learn(peer, addresses)
        remote = self._remote(peer)
        told, remote.wanted = remote.wanted, True
        if remote.link is not None and not told:
            remote.link.tell_use()
        self._redial_soon(remote)

    def unkeep(self, peer: PeerId) -> None:
        self._remote(peer).wanted = False

    async def close(self, peer: PeerId) -> None:
        """Send what is queued, say goodbye, close."""
        self.unkeep(peer)
        link = self._remote(peer).link
        if link is not None:
            link.finish("closed")
            with trio.move_on_after(2 * CLOSE_S):
                await link.ended.wait()
            link.end("closed")

    def _remote(self, peer: PeerId) -> Remote:
        if peer == self.id:
            raise PeerUnreachable(peer, "it is this peer itself")
        remote = self._remotes.get(peer)
        if remote is None:
            remote = self._remotes[peer] = Remote(peer)
        return remote

    def take_in(self, channel: SecureChannel, address: Address, began: float) -> Verdict:
        """A member's control connection from `address`: adopted when the verdict is OK. One step, no wait within.

        Of two simultaneous dials the lower id's wins: the lower refuses the other's once it knows its own gets through,
        the higher takes the lower's and drops its own. began: when it came; if that was before our own got through, the other end
        has given it up meanwhile, and taking it in would break the one that stands, also while that one is about to end.
        """
        remote = self._remote(channel.peer)
        self._book.learn_from(channel.hello, address, dialled=False)
        dial = remote.dial
        if dial is not None and dial.authenticated and self.id < remote.id:
            return Verdict(Code.DUPLICATE, "the peer's own dial to this one is about to succeed")
        link = remote.link
        if link is not None and link.channel.initiator and began <= link.began and self.id < remote.id:
            return Verdict(Code.DUPLICATE, "the peer's own dial to this one has succeeded")
        if remote.inbox.full or (remote.link is None and not self._make_room()):
            return Verdict(Code.FULL, "the peer has too many connections: try again later")
        verdict = Verdict(Code.OK)
        self._adopt(remote, channel, codec.encode(verdict))
        return verdict

    def _make_room(self) -> bool:
        links = [remote.link for remote in self._remotes.values() if remote.link is not None]
        if len(links) < CONNECTIONS_MAX:
            return True
        idle = [link for link in links if link.quiet and not link.use()]
        oldest = min(idle, key=lambda link: link.last_used, default=None)
        if oldest is None or trio.current_time() - oldest.last_used < HOUSEKEEPING_S:
            return False
        self._lose(self._remotes[oldest.peer], oldest, "too many connections, this one was idle longest")
        return True

    def _adopt(self, remote: Remote, channel: SecureChannel, first: bytes | None = None) -> None:
        """Make this the peer's connection."""
        if remote.link is not None:
            self._lose(remote, remote.link, "replaced by a newer connection")
        if remote.dial is not None and not channel.initiator:
            remote.dial.scope.cancel()
        link = Link(channel, remote.outbox, first)
        link.use = partial(self._spare.use, remote)
        remote.link, remote.hello, remote.failures = link, channel.hello, 0
        self.counters["connections"] += 1
        remote.inbox.push(Up(channel.hello, link))
        if remote.wanted:
            link.tell_use()
        self._dispatch.pump_soon(remote)
        remote.up.set()
        self.running.start_soon(self._run_link, remote, link)

    async def _run_link(self, remote: Remote, link: Link) -> None:
        why = await link.run(partial(self._dispatch.on_frame, remote, link))
        self._lose(remote, link, why)

    def _lose(self, remote: Remote, link: Link, why: str) -> None:
        """The link is to end, or has; the first call does all that follows from it."""
        link.end(why)
        if remote.link is not link:
            return
        log.debug("connection to %s: %s", remote.id.hex()[:10], why)
        remote.link = None
        remote.up = trio.Event()
        remote.outbox.connection_lost()
        self._fail_pending(remote, why)
        remote.inbox.push(Down(why))
        self._dispatch.pump_soon(remote)
        self._redial_soon(remote)

    def _fail_pending(self, remote: Remote, why: str) -> None:
        for pending in remote.pending.values():
            pending.fail(PeerUnreachable(remote.id, why))
        remote.pending.clear()

    # ---- dialling ----------------------------------------------------------------------------------------------------

    def _start_dial(self, remote: Remote, addresses: Sequence[Address]) -> Dial:
        nursery = self.running
        remote.dial = Dial()
        nursery.start_soon(self._dial, remote, remote.dial, addresses)
        return remote.dial

    async def _dial(self, remote: Remote, dial: Dial, addresses: Sequence[Address]) -> None:
        why = ""
        self.counters["dials"] += 1
        try:
            with dial.scope:
                authenticated = partial(self._authenticated, remote, dial)
                self._adopt(remote, await self._dialler.reach(remote.id, PEER, addresses, authenticated))
        except _Superseded:
            pass
        except Refused as refused:
            why = refused.text
            if refused.code == Code.DUPLICATE:
                with trio.move_on_after(HANDSHAKE_S):
                    await remote.up.wait()
        except PeerUnreachable as error:
            why = error.why
        finally:
            if why and remote.link is None:
                remote.failures += 1
                remote.why = why
                remote.retry_at = trio.current_time() + self._pause_s(remote)
                dial.error = PeerUnreachable(remote.id, why)
            if remote.dial is dial:
                remote.dial = None
            dial.done.set()

    def _authenticated(self, remote: Remote, dial: Dial, hello: Hello) -> None:
        """The peer we dialled has proven itself; last chance not to show ourselves."""
        other = remote.dial
        if remote.link is not None or (other is not None and other is not dial and other.authenticated):
            raise _Superseded
        dial.authenticated = True

    def _pause_s(self, remote: Remote) -> float:
        most = min(REDIAL_S_MAX, REDIAL_S_MIN * 2.0 ** min(remote.failures, 16))
        return most * (0.5 + self._rng.random() / 2)

    def _redial_soon(self, remote: Remote) -> None:
        wanted = remote.wanted or len(remote.outbox)
        if self._nursery is not None and wanted and remote.link is None and not remote.redialing:
            remote.redialing = True
            self._nursery.start_soon(self._redial, remote)

    async def _redial(self, remote: Remote) -> None:
        """Dial until there is a connection or nobody wants one; messages wait UNREACHABLE_S for it."""
        since = trio.current_time()
        try:
            while remote.link is None and (remote.wanted or len(remote.outbox)):
                with trio.move_on_after(self._pause_s(remote)):
                    await remote.up.wait()
                try:
                    await self.connect(remote.id)
                except PeerUnreachable as error:
                    if trio.current_time() - since > UNREACHABLE_S:
                        self.counters["messages_given_up"] += remote.outbox.give_up(error)
        finally:
            remote.redialing = False

    # ---- messages ----------------------------------------------------------------------------------------------------

    async def send(self, peer: PeerId, message: bytes) -> None:
        """Queue a message (up to MESSAGE_BYTES_MAX), dialling when needed, waiting when the queue is full.

        Raises PeerUnreachable. On return it is queued, not delivered: what a connection has in flight dies with it.
        """
        remote = await self._reach(peer, message)
        await remote.outbox.put(Frame(MESSAGE, 0, message))

    def post(self, peer: PeerId, message: bytes) -> bool:
        """Queue a message without ever waiting; False when the peer is not connected or its queue is full."""
        check_size(message)
        remote = self._remotes.get(peer)
        return remote is not None and remote.link is not None and remote.outbox.offer(Frame(MESSAGE, 0, message))

    async def request(self, peer: PeerId, message: bytes, timeout_s: float) -> bytes:
        """The peer's answer. Raises PeerUnreachable, RemoteError, trio.TooSlowError."""
        with trio.fail_after(timeout_s):
            remote = await self._reach(peer, message)
            number = next(remote.numbers) & 0xFFFFFFFF
            pending = remote.pending[number] = Pending()
            try:
                await remote.outbox.put(Frame(REQUEST, number, message))
                return await pending.wait()
            finally:
                if remote.pending.pop(number, None) is not None and remote.link is not None:
                    remote.outbox.offer(Frame(CANCEL, number, b""))

    async def _reach(self, peer: PeerId, message: bytes) -> Remote:
        check_size(message)
        remote = self._remote(peer)
        while (link := remote.link) is None or link.finishing:
            if link is not None:
                await link.settled.wait()
                if not link.active:
                    self._lose(remote, link, "closed")
            elif remote.dial is None and trio.current_time() < remote.retry_at:
                raise PeerUnreachable(peer, remote.why)
            else:
                await self.connect(peer)
        return remote

    # ---- blobs -------------------------------------------------------------------------------------------------------

    async def read_blob(self, peer: PeerId, blob: bytes, offset: int, length: int) -> bytes:
        """These bytes of a blob, unverified, in memory. Raises BlobMissing, PeerUnreachable."""
        return b"".join([chunk async for chunk in self.blob_chunks(peer, blob, offset, length)])

    def blob_chunks(self, peer: PeerId, blob: bytes, offset: int, length: int) -> BlobChunks:
        """The same as an async iterator of chunks of 1 MiB (the last may be shorter), read ahead by a few."""
        return BlobChunks(peer, partial(self._blobs.reader, peer), blob, offset, length)

    async def _read_own(self, peer: PeerId, blob: bytes, offset: int, length: int) -> Buffer | None:
        """What the handler holds; its faults are told as nothing held."""
        try:
            return await self._handler.read_blob(peer, blob, offset, length)
        except Exception:
            self._dispatch.fault(peer)
            return None
