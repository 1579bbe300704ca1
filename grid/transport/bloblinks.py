"""All blob links of one mesh: which peers we read from, which we serve."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.transport.blobs import BlobReader, ReadBlob, serve
from grid.transport.channel import SecureChannel
from grid.transport.dialling import Dialler
from grid.transport.errors import HandshakeError, PeerUnreachable, Refused
from grid.transport.hello import BLOBS, SERVE, Code, Verdict
from grid.transport.limits import BLOB_LINKS_MAX, CLOSE_S, CONNECT_S, HANDSHAKE_S
from grid.transport.outbox import SERVE_ME, Frame
from grid.transport.remote import Remote

log = logging.getLogger(__name__)


class BlobLinks:
    """Opened on demand, one for each peer read from; closed when idle."""

    def __init__(
        self,
        dialler: Dialler,
        remote_of: Callable[[PeerId], Remote],
        nursery: Callable[[], trio.Nursery],
        read: ReadBlob,
    ) -> None:
        """read: what this peer holds itself; must not raise.

        nursery: where links run; raises PeerUnreachable when there is none.
        """
        self._dialler = dialler
        self._remote_of = remote_of
        self._nursery = nursery
        self._read = read
        self._served = 0

    async def reader(self, peer: PeerId) -> BlobReader:
        """The link we read this peer's blobs over. Raises PeerUnreachable."""
        remote = self._remote_of(peer)
        self._nursery()
        async with remote.reader_lock:
            if remote.reader is not None and remote.reader.link.active:
                return remote.reader
            try:
                return self._adopt(remote, await self._dialler.reach(peer, BLOBS))
            except Refused as error:
                raise PeerUnreachable(peer, error.text) from error
            except PeerUnreachable:
                if remote.link is None:
                    raise
                return await self._called(remote)

    async def _called(self, remote: Remote) -> BlobReader:
        """It can't be dialled though it is connected: ask it to dial us."""
        remote.called = trio.Event()  # from now on the connection is in use
        if remote.link is not None and remote.link.finishing:
            with trio.move_on_after(CLOSE_S):
                await remote.link.settled.wait()
        remote.outbox.force(Frame(SERVE_ME, 0, b""))
        try:
            with trio.move_on_after(CONNECT_S + HANDSHAKE_S):
                await remote.called.wait()
        finally:
            remote.called = None
        if remote.reader is None:
            raise PeerUnreachable(remote.id, "no connection for blobs could be made in either direction")
        return remote.reader

    def take_in(self, channel: SecureChannel) -> Verdict:
        """A peer dialled us to serve; taken only if we asked for it."""
        remote = self._remote_of(channel.peer)
        if remote.called is None or remote.called.is_set():
            return Verdict(Code.REFUSED, "nobody asked for these blobs")
        verdict = Verdict(Code.OK)
        self._adopt(remote, channel, codec.encode(verdict))
        remote.called.set()
        return verdict

    def _adopt(self, remote: Remote, channel: SecureChannel, first: bytes | None = None) -> BlobReader:
        reader = remote.reader = BlobReader(channel, first)
        self._nursery().start_soon(self._run, remote, reader)
        return reader

    async def _run(self, remote: Remote, reader: BlobReader) -> None:
        try:
            await reader.run()
        finally:
            if remote.reader is reader:
                remote.reader = None

    def may_serve(self) -> bool:
        return self._served < BLOB_LINKS_MAX

    async def serve(self, channel: SecureChannel, first: bytes | None = None) -> None:
        """Serve one link to its end."""
        self._served += 1
        try:
            await serve(channel, self._read, first)
        finally:
            self._served -= 1

    def serve_back(self, remote: Remote) -> None:
        """The peer asked to be dialled: do it once at a time."""
        if not remote.serving and self.may_serve():
            remote.serving = True
            self._nursery().start_soon(self._serve_back, remote)

    async def _serve_back(self, remote: Remote) -> None:
        try:
            await self.serve(await self._dialler.reach(remote.id, SERVE))
        except (PeerUnreachable, HandshakeError) as error:
            log.debug("dialling %s to serve it blobs: %s", remote.id.hex()[:10], error)
        finally:
            remote.serving = False
