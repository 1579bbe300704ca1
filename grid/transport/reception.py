"""The mesh's front door: connections that others open, from their first byte to a verdict.

Rules this file keeps: half-open connections are bounded in number (the oldest goes) and in time; nothing is believed
before the handshake proves it; every failure is counted by its kind and costs only its own connection.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio
from trio.abc import HalfCloseableStream

from dht.core import codec
from dht.network import Address, Listener
from grid.transport.bloblinks import BlobLinks
from grid.transport.channel import SecureChannel, respond
from grid.transport.dialling import format_address
from grid.transport.dispatch import Dispatch
from grid.transport.errors import ChannelClosed, HandshakeError, NotAMember, PeerUnreachable, RemoteError
from grid.transport.handler import MeshHandler
from grid.transport.hello import BLOBS, JOIN, PEER, SERVE, Code, Credentials, Verdict
from grid.transport.limits import ADMIT_S, HALF_OPEN_MAX, HANDSHAKE_S, JOINS_MAX

if TYPE_CHECKING:
    from grid.transport.mesh import Mesh

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S: Final = 0.1
"""After a failure to accept (no file descriptors left, say): some may come free."""
ADMIT_MARGIN_S: Final = 1.0
"""The joiner hears that we were too slow before it gives up itself."""


class Reception:
    """Accepts for one mesh."""

    def __init__(self, mesh: Mesh, blobs: BlobLinks, dispatch: Dispatch, credentials: Credentials, handler: MeshHandler) -> None:
        self._mesh = mesh
        self._blobs = blobs
        self._dispatch = dispatch
        self._credentials = credentials
        self._handler = handler
        self._half_open: dict[object, trio.CancelScope] = {}
        self._joins = 0

    async def run(self, listener: Listener) -> None:
        """Accept until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream, remote = await listener.accept()
                except OSError as error:
                    log.warning("can't accept connections for now: %s", error)
                    await trio.sleep(ACCEPT_PAUSE_S)
                    continue
                except trio.ClosedResourceError:  # the host is shutting down (in a simulation: was killed)
                    log.warning("no longer listening: the socket was closed")
                    return
                nursery.start_soon(self._welcome, stream, remote)

    async def _welcome(self, stream: HalfCloseableStream, remote: Address) -> None:
        count = self._mesh.counters
        count["accepted"] += 1
        began = trio.current_time()
        try:
            channel = await self._handshake(stream)
            if channel is not None:
                await self._decide(channel, remote, began)
        except (HandshakeError, ChannelClosed, PeerUnreachable) as error:
            count[type(error).__name__] += 1
            log.debug("connection from %s: %s", format_address(remote), error)

    async def _handshake(self, stream: HalfCloseableStream) -> SecureChannel | None:
        """The channel, or None when this half-open connection was cut off to make place for a newer one."""
        if len(self._half_open) >= HALF_OPEN_MAX:
            oldest = next(iter(self._half_open))
            self._half_open.pop(oldest).cancel()
            self._mesh.counters["half_open_cut"] += 1
        scope = self._half_open[stream] = trio.CancelScope()
        try:
            with scope:
                return await respond(stream, self._credentials)
        finally:
            self._half_open.pop(stream, None)
        return None

    async def _decide(self, channel: SecureChannel, remote: Address, began: float) -> None:
        """The verdict, and what follows from it."""
        purpose = channel.hello.purpose
        if purpose == JOIN and channel.hello.invite:
            return await self._admit(channel)
        try:
            self._credentials.check_member(channel.hello)
        except NotAMember as error:
            await self._say(channel, Verdict(Code.REFUSED, str(error)))
            raise
        verdict = Verdict(Code.REFUSED, "the peer has no use for this connection")
        if channel.peer == self._mesh.id:
            verdict = Verdict(Code.REFUSED, "the peer called itself")
        elif purpose == PEER:
            verdict = self._mesh.take_in(channel, remote, began)
        elif purpose == SERVE:
            verdict = self._blobs.take_in(channel)
        elif purpose == BLOBS:
            if self._blobs.may_serve():
                return await self._blobs.serve(channel, codec.encode(Verdict(Code.OK)))
            verdict = Verdict(Code.FULL, "the peer serves too many blob connections: try again later")
        if verdict.code != Code.OK:
            await self._say(channel, verdict)
            self._mesh.counters[f"verdict_{verdict.code}"] += 1
        return None

    async def _admit(self, channel: SecureChannel) -> None:
        """Let a joiner in, or tell it in one line why not."""
        if self._joins >= JOINS_MAX:
            return await self._say(channel, Verdict(Code.FULL, "the peer admits too many others just now: try again"))
        self._joins += 1
        try:
            with trio.move_on_after(ADMIT_S - ADMIT_MARGIN_S) as scope:
                verdict = await self._admission(channel)
            if scope.cancelled_caught:
                verdict = Verdict(Code.FULL, "the peer could not check this invite in time: try again")
            self._mesh.counters["joins" if verdict.code == Code.OK else "joins_refused"] += 1
            return await self._say(channel, verdict)
        finally:
            self._joins -= 1

    async def _admission(self, channel: SecureChannel) -> Verdict:
        hello = channel.hello
        try:
            chain = await self._handler.admit(hello.invite, hello.public, hello)
        except RemoteError as error:
            return Verdict(error.code, error.text)
        except Exception as error:
            self._dispatch.fault(channel.peer)
            return Verdict(Code.REFUSED, f"the peer failed on this invite: {type(error).__name__}")
        return Verdict(Code.OK, "", chain, tuple(self._mesh.addresses_to_tell()))

    async def _say(self, channel: SecureChannel, verdict: Verdict) -> None:
        """Send it, close."""
        try:
            with trio.move_on_after(HANDSHAKE_S):
                await channel.send(codec.encode(verdict))
        finally:
            await channel.aclose()
