"""One connection at work: frames out of an outbox into records, records into frames, signs of life.

A record holds frames behind 9-byte headers (kind, id, length); the payload of a bulk frame is the next record, whole, so
that it is never copied. Rules this file keeps:

- everything of a link ends together: writer, reader, the tasks started in `nursery`; `run` returns why;
- links that are no longer needed end without a loss: who proposes it (`propose_end`) sends nothing more until the other end, that
  has nothing under way either, has said goodbye, or has declined;
- silence counts against the other end only while we wait for its bytes, never while our own handler is slow.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from grid.core.noise import Buffer
from grid.transport.channel import SecureChannel
from grid.transport.errors import ChannelClosed
from grid.transport.limits import BULK_BYTES_MIN, CLOSE_S, DEAD_S, KEEPALIVE_S, MESSAGE_BYTES_MAX, QUIET_S, TICK_S
from grid.transport.outbox import BYE, DECLINED, PING, SPARE, Frame, Outbox

_HEADER: Final = struct.Struct(">BII")
_BULK: Final = 0x80


class Link:
    """Runs one SecureChannel for one Outbox. `end` may be called at any time, from any task of the same thread."""

    def __init__(self, channel: SecureChannel, outbox: Outbox, first: bytes | None = None) -> None:
        """first: a record to send before all frames (a responder's verdict)."""
        self.channel = channel
        self.peer = channel.peer
        self.outbox = outbox
        self.active = True
        self.announced = trio.Event()
        """Set by the owner once its handler knows of this connection."""
        self.began = trio.current_time()
        self.last_used = self.began
        """When a frame other than a ping went either way."""
        self.nursery: trio.Nursery
        """For tasks that make no sense without this link; cancelled with it."""
        self.running: dict[int, trio.CancelScope] = {}
        """Requests of theirs that are handled, by their number."""
        self.ended = trio.Event()
        self.use: Callable[[], int] = lambda: 0
        """What this end needs the connection for although it may be silent: KEPT, IN_USE or 0. Set by the owner."""
        self.use_there = 0
        """What the other end said last."""
        self.finishing = False
        """A goodbye is queued, sent or proposed: what is asked now gets no answer on this link, or has to wait (`settled`)."""
        self.settled = trio.Event()
        """Set when `finishing` is decided: the link has ended, or goes on. Replaced when it goes on."""
        self._proposed = False
        self._idle = False
        self._resumed = trio.Event()
        self._first = first
        self._why = ""
        self._last_sent = trio.current_time()
        self._scope = trio.CancelScope()

    def end(self, why: str) -> None:
        """Stop at once; `run` will return `why`."""
        self._why = self._why or why
        self.active = False
        self._scope.cancel()

    def finish(self, why: str) -> None:
        """Send what is queued, say goodbye, keep reading until the other end closes (CLOSE_S at most)."""
        if not self.finishing or self._proposed:
            self.finishing = True
            self._proposed = False
            self.outbox.force(Frame(BYE, 0, why.encode()))
            self._resumed.set()

    @property
    def quiet(self) -> bool:
        """Nothing is queued or handled here."""
        return not self.running and not len(self.outbox)

    def propose_end(self) -> None:
        """Ask the other end to say goodbye if it has no use for this link either; or it declines, and all goes on."""
        if not self.finishing and self.quiet:
            self.finishing = self._proposed = True
            self._resumed = trio.Event()
            self.outbox.append(Frame(PING, SPARE, b""))
            self.nursery.start_soon(self._await_answer, self._resumed)

    async def _await_answer(self, resumed: trio.Event) -> None:
        with trio.move_on_after(DEAD_S):
            await resumed.wait()
            return
        self.end(f"no answer for {DEAD_S:g} s")

    def _answer_spare(self) -> None:
        if self.quiet and not self.use():
            self.finish("idle, and neither end has a use for it")
        else:
            self.outbox.force(Frame(PING, DECLINED, b""))

    def _declined(self) -> None:
        if self._proposed:
            self.finishing = self._proposed = False
            self._resumed.set()
            self.settled.set()
            self.settled = trio.Event()

    async def run(self, on_frame: Callable[[Frame], Awaitable[None]]) -> str:
        """Serve until either end stops; then the connection is closed and the reason returned."""
        try:
            with self._scope:
                async with trio.open_nursery() as self.nursery:
                    self.nursery.start_soon(self._write)
                    self.nursery.start_soon(self._tend)
                    await self._read(on_frame)
        finally:
            self.active = False
            if self.outbox.shortcut == self._send_now:
                self.outbox.shortcut = None
            self.ended.set()
            self.settled.set()
            await self.channel.aclose()
        return self._why

    async def _write(self) -> None:
        try:
            if self._first is not None:
                await self.channel.send(self._first)
            self.outbox.shortcut = self._send_now
            while True:
                self._idle = True
                await self.outbox.wait()
                self._idle = False
                if not self.active:
                    return
                batch = self.outbox.take()
                await self.channel.send(*_records(batch))
                self._last_sent = trio.current_time()
                if batch[-1].kind == PING and batch[-1].id == SPARE:
                    await self._resumed.wait()
                elif batch[-1].kind == BYE:
                    await trio.sleep(CLOSE_S)
                    self.end(f"closed: {bytes(batch[-1].payload).decode()}")
                if len(batch) > 1 or batch[0].kind != PING:
                    self.last_used = self._last_sent
        except ChannelClosed as error:
            self.end(str(error))

    def _send_now(self, frame: Frame) -> bool:
        """Spare a lone small frame the way through the writer task; in a burst the writer joins what follows."""
        now = trio.current_time()
        lone = self._idle and self.active and not self._proposed and now - self._last_sent >= QUIET_S
        if not lone or len(frame.payload) >= BULK_BYTES_MIN or frame.kind == BYE:
            return False
        try:
            if not self.channel.send_now(_records([frame])[0]):
                return False
        except ChannelClosed as error:
            self.end(str(error))
            return True
        self._last_sent = now
        if frame.kind != PING:
            self.last_used = now
        if self.channel.unsent:
            self.outbox.append(Frame(PING, 0, b""))  # wakes the writer, which sends the rest
        return True

    async def _read(self, on_frame: Callable[[Frame], Awaitable[None]]) -> None:
        try:
            while True:
                await self._one_record(await self.channel.receive(), on_frame)
        except ChannelClosed as error:
            self.end(str(error))

    async def _one_record(self, record: bytes, on_frame: Callable[[Frame], Awaitable[None]]) -> None:
        place, size = 0, len(record)
        while place < size:
            if size - place < _HEADER.size:
                raise ChannelClosed("the other end broke the frame format")
            kind, number, length = _HEADER.unpack_from(record, place)
            place += _HEADER.size
            payload: bytes
            if kind & _BULK:
                payload = await self.channel.receive()
            else:
                payload = record[place : place + length]
                place += length
            if len(payload) != length or length > MESSAGE_BYTES_MAX:
                raise ChannelClosed("the other end broke the frame format")
            if kind == PING:
                self._pinged(number)
            elif kind == BYE:
                raise ChannelClosed(f"the other end closed it: {payload[:200].decode(errors='replace')}")
            else:
                self.last_used = trio.current_time()
                await on_frame(Frame(kind & ~_BULK, number, payload))

    def tell_use(self) -> None:
        """Say at once what the next ping would."""
        self.outbox.force(Frame(PING, self.use(), b""))

    def _pinged(self, number: int) -> None:
        if number == SPARE:
            self._answer_spare()
            return
        if number == DECLINED:
            self.last_used = trio.current_time()
            self._declined()
            return
        self.use_there = number
        if number:
            self.last_used = trio.current_time()

    async def _tend(self) -> None:
        before = trio.current_time()
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            stalled, before = now - before > 2 * TICK_S, now  # this process itself stood still: bytes may be waiting
            since = self.channel.waiting_since
            if since is not None and now - since > DEAD_S and not stalled:
                self.end(f"no sign of life for {DEAD_S:g} s")
            if now - self._last_sent > KEEPALIVE_S - TICK_S / 2 and not len(self.outbox):
                self.outbox.force(Frame(PING, self.use(), b""))


def _records(batch: list[Frame]) -> list[Buffer]:
    """The batch as one record, and a bulk payload (always the last frame's) as a second."""
    parts: list[Buffer] = []
    bulk: list[Buffer] = []
    for frame in batch:
        length = len(frame.payload)
        if length >= BULK_BYTES_MIN:
            parts.append(_HEADER.pack(frame.kind | _BULK, frame.id, length))
            bulk.append(frame.payload)
        else:
            parts.append(_HEADER.pack(frame.kind, frame.id, length))
            parts.append(frame.payload)
    return [b"".join(parts), *bulk]
