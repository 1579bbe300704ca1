"""Blob traffic: reads of up to 1 MiB over a link of their own, several in flight, so that no heartbeat waits behind megabytes.

A blob link is one-way: one end reads, the other serves. Rules this file keeps:

- memory is bounded at both ends: the reader has BLOB_READS_MAX chunks outstanding, the server works on BLOB_SERVED_AT_ONCE;
- the reader never stops reading the link, as each answer has a place that waits for it;
- what a server says is not believed: the caller checks hashes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from itertools import count

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.core.noise import Buffer
from grid.transport.channel import SecureChannel
from grid.transport.errors import BlobMissing, ChannelClosed, PeerUnreachable
from grid.transport.limits import (
    BLOB_CHUNK_BYTES,
    BLOB_IDLE_S,
    BLOB_READ_S,
    BLOB_READS_MAX,
    BLOB_SERVED_AT_ONCE,
    BLOB_WINDOW,
)
from grid.transport.link import Link
from grid.transport.outbox import DATA, MISSING, READ, Frame, Outbox
from grid.transport.pending import Pending

ReadBlob = Callable[[PeerId, bytes, int, int], Awaitable[Buffer | None]]
"""(who asks, blob, offset, length ≤ BLOB_CHUNK_BYTES) → exactly those bytes, or None when they are not held."""


class Read(codec.Struct, frozen=True):
    """Payload of a READ frame."""

    blob: bytes
    offset: int
    length: int


class BlobReader:
    """The reading end of one blob link."""

    def __init__(self, channel: SecureChannel, first: bytes | None = None) -> None:
        self.peer = channel.peer
        self.link = Link(channel, Outbox(), first)
        self._pending: dict[int, Pending] = {}
        self._numbers = count(1)
        self._places = trio.Semaphore(BLOB_READS_MAX)

    async def run(self) -> None:
        """Serve until the link ends; every read outstanding fails then."""
        why = "this peer stops"
        try:
            why = await _run(self.link, self._on_frame)
        finally:
            for pending in self._pending.values():
                pending.fail(PeerUnreachable(self.peer, why))
                self._places.release()
            self._pending.clear()

    async def ask(self, blob: bytes, offset: int, length: int) -> Pending:
        """Send one read; its answer is awaited on what is returned. Waits for a place when too many are outstanding."""
        await self._places.acquire()
        pending = Pending()
        if not self.link.active:
            self._places.release()
            pending.fail(PeerUnreachable(self.peer, "the connection for blobs broke"))
            return pending
        number = next(self._numbers)
        self._pending[number] = pending
        self.link.outbox.force(Frame(READ, number, codec.encode(Read(blob, offset, length))))
        return pending

    async def _on_frame(self, frame: Frame) -> None:
        pending = self._pending.pop(frame.id, None)
        if pending is None or frame.kind not in (DATA, MISSING):
            raise ChannelClosed("an answer to no question")
        self._places.release()
        if frame.kind == DATA:
            pending.resolve(bytes(frame.payload))
        else:
            pending.fail(BlobMissing(self.peer, b""))


class BlobChunks:
    """Iterates over a range of a blob in chunks of up to BLOB_CHUNK_BYTES, reading BLOB_WINDOW of them ahead.

    Raises BlobMissing, PeerUnreachable. Needs no closing: answers nobody waits for are dropped as they come.
    """

    def __init__(self, peer: PeerId, reader: Callable[[], Awaitable[BlobReader]], blob: bytes, offset: int, length: int):
        self._peer = peer
        self._open = reader
        self._reader: BlobReader | None = None
        self._blob = blob
        self._next = offset
        self._end = offset + length
        self._ahead: deque[tuple[int, Pending]] = deque()

    def __aiter__(self) -> BlobChunks:
        return self

    async def __anext__(self) -> bytes:
        if self._reader is None:
            self._reader = await self._open()
        while self._next < self._end and len(self._ahead) < BLOB_WINDOW:
            size = min(BLOB_CHUNK_BYTES, self._end - self._next)
            self._ahead.append((size, await self._reader.ask(self._blob, self._next, size)))
            self._next += size
        if not self._ahead:
            raise StopAsyncIteration
        size, pending = self._ahead.popleft()
        try:
            with trio.fail_after(BLOB_READ_S):
                chunk = await pending.wait()
        except BlobMissing:
            raise BlobMissing(self._peer, self._blob) from None
        except trio.TooSlowError:
            raise PeerUnreachable(self._peer, f"a piece of a blob took over {BLOB_READ_S:g} s") from None
        if len(chunk) != size:
            raise BlobMissing(self._peer, self._blob)
        return chunk


async def serve(channel: SecureChannel, read: ReadBlob, first: bytes | None = None) -> None:
    """The serving end of one blob link, until it ends."""
    link = Link(channel, Outbox(bytes_max=BLOB_SERVED_AT_ONCE * BLOB_CHUNK_BYTES), first)
    places = trio.Semaphore(BLOB_SERVED_AT_ONCE)

    async def answer(number: int, request: Read) -> None:
        try:
            data = await read(channel.peer, request.blob, request.offset, request.length)
            kind = MISSING if data is None or len(data) > request.length else DATA
            await link.outbox.put(Frame(kind, number, data if kind == DATA and data is not None else b""))
        finally:
            places.release()

    async def on_frame(frame: Frame) -> None:
        try:
            request = codec.decode(bytes(frame.payload), Read)
        except codec.CodecError as error:
            raise ChannelClosed("a request that can't be read") from error
        if frame.kind != READ or not 0 < request.length <= BLOB_CHUNK_BYTES or request.offset < 0:
            raise ChannelClosed("a request that makes no sense")
        await places.acquire()  # the reader's outstanding requests wait in the connection meanwhile
        link.nursery.start_soon(answer, frame.id, request)

    await _run(link, on_frame)


async def _run(link: Link, on_frame: Callable[[Frame], Awaitable[None]]) -> str:
    """Run a link that is closed when nothing was read for a while."""

    async def watch() -> None:
        while True:
            left_s = link.last_used + BLOB_IDLE_S - trio.current_time()
            if left_s <= 0:
                return link.finish("idle")
            await trio.sleep(left_s)

    why = "this peer stops"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        why = await link.run(on_frame)
        nursery.cancel_scope.cancel()
    return why
