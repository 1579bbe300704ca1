"""Streams of the in-memory network: TCP's manners without a kernel.

Rules this file keeps:

- bytes arrive in order, each after the link's latency; a full buffer makes the sender wait;
- a close is an EOF, a close with unread input or the death of the process a reset (`trio.BrokenResourceError`); what
  came before a reset can still be read, as on Linux;
- a cut link is silence, not an error, and what was sent into it arrives after it heals.
"""

from __future__ import annotations

import errno
import math
from collections import deque
from typing import TYPE_CHECKING

import trio
from trio.abc import HalfCloseableStream

if TYPE_CHECKING:
    from dht.memory import MemoryHost, MemoryNetwork

STREAM_BUFFER_BYTES = 256 << 10
"""Bytes under way in one direction of a stream; then the sender waits."""
RECEIVE_BYTES = 65_536
"""What one receive returns at most when the caller names no limit."""


class Pipe:
    """One direction of a stream: chunks with their arrival times, then perhaps an end."""

    def __init__(self, world: MemoryNetwork, source: str, target: str) -> None:
        self.world, self.source, self.target = world, source, target
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.waiting_bytes = 0
        self.last_arrival_s = 0.0
        self.eof_at_s: float | None = None
        self.reset_at_s: float | None = None
        self.dead = False  # the receiving end was shut: nothing is read any more
        self.changed = trio.Event()
        self.reader: trio.CancelScope | None = None  # the receiver's sleep until the next arrival

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def arrival_s(self) -> float:
        at_s = trio.current_time() + self.world.delay_s(self.source, self.target)
        self.last_arrival_s = max(self.last_arrival_s, at_s)
        return self.last_arrival_s

    def is_reset(self) -> bool:
        if self.reset_at_s is None or self.reset_at_s > trio.current_time():
            return False
        return not self.world.is_cut(self.source, self.target)

    def next_event_s(self) -> float:
        """When the receiver should look again; infinity while the link is cut (healing wakes it)."""
        at_s = self.chunks[0][0] if self.chunks else math.inf
        if self.eof_at_s is not None and self.eof_at_s < at_s:
            at_s = self.eof_at_s
        if self.reset_at_s is not None and self.reset_at_s < at_s:
            at_s = self.reset_at_s
        return at_s


def stream_pair(near: MemoryHost, far: MemoryHost, near_port: int, far_port: int) -> tuple[MemoryStream, MemoryStream]:
    world = near.world
    out, back = Pipe(world, near.name, far.name), Pipe(world, far.name, near.name)
    return MemoryStream(near, near_port, back, out), MemoryStream(far, far_port, out, back)


class MemoryStream(HalfCloseableStream):
    """One end of a stream in memory."""

    def __init__(self, host: MemoryHost, port: int, inbound: Pipe, outbound: Pipe) -> None:
        self.port = port
        self._host = host
        self._in = inbound
        self._out = outbound
        self._closed = False
        self._broken = False
        self._sending = False
        self._receiving = False
        host.streams[id(self)] = self

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._broken or self._in.is_reset():
            raise trio.BrokenResourceError("connection reset")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._out.eof_at_s is not None:
                raise trio.ClosedResourceError("send_eof was called")
            rest = memoryview(bytes(data))
            while rest:
                room = STREAM_BUFFER_BYTES - self._out.waiting_bytes
                if room > 0:
                    self._push(bytes(rest[:room]))
                    rest = rest[room:]
                else:
                    await self._wait(self._out, self._in.reset_at_s)
                self._check_open()
        finally:
            self._sending = False

    def _push(self, data: bytes) -> None:
        if self._out.dead and self._out.world.is_cut(self._out.source, self._out.target):
            self._out.waiting_bytes += len(data)  # into the dark: nothing is acknowledged
        elif self._out.dead:  # the far end is closed: the data meets nobody and is answered with a reset
            if self._in.reset_at_s is None:
                self._in.reset_at_s = self._out.arrival_s() + self._out.world.delay_s(self._in.source, self._in.target)
                self._in.wake()
        else:
            at_s = self._out.arrival_s()
            self._out.chunks.append((at_s, data))
            self._out.waiting_bytes += len(data)
            if self._out.reader is not None:  # it need not wake only to sleep again
                self._out.reader.deadline = min(self._out.reader.deadline, at_s)

    async def _wait(self, pipe: Pipe, at_s: float | None) -> None:
        with trio.move_on_at(float("inf") if at_s is None else max(at_s, trio.current_time())):
            await pipe.changed.wait()

    def write_now(self, data: bytes | bytearray | memoryview) -> int:
        """Send what fits without waiting; returns how many bytes. Raises BlockingIOError, OSError, as a socket's write."""
        room = STREAM_BUFFER_BYTES - self._out.waiting_bytes
        if self._closed or self._broken or self._out.eof_at_s is not None or self._in.is_reset():
            raise BrokenPipeError(errno.EPIPE, "the connection is gone")
        if room <= 0 or self._sending:
            raise BlockingIOError(errno.EAGAIN, "no room")
        self._push(bytes(data[:room]))
        return min(room, len(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()
        while self._out.waiting_bytes >= STREAM_BUFFER_BYTES:
            await self._wait(self._out, self._in.reset_at_s)
            self._check_open()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._receiving = True
        try:
            if self._in.next_event_s() <= trio.current_time():
                await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError
                data = self._pull(max_bytes or RECEIVE_BYTES)
                if not data:  # what came before a reset can still be read, as on Linux
                    self._check_open()
                if data is not None:
                    return data
                await self._wait_input()  # a checkpoint
        finally:
            self._receiving = False

    def _pull(self, max_bytes: int) -> bytes | None:
        """What has arrived, b"" for the end, None for nothing yet."""
        pipe, now_s = self._in, trio.current_time()
        if pipe.world.is_cut(pipe.source, pipe.target):
            return None
        if not pipe.chunks or pipe.chunks[0][0] > now_s:
            return b"" if not pipe.chunks and pipe.eof_at_s is not None and pipe.eof_at_s <= now_s else None
        got = bytearray()
        while pipe.chunks and pipe.chunks[0][0] <= now_s and len(got) < max_bytes:
            at_s, chunk = pipe.chunks.popleft()
            take = max_bytes - len(got)
            if len(chunk) > take:
                pipe.chunks.appendleft((at_s, chunk[take:]))
            got += chunk[:take]
        pipe.waiting_bytes -= len(got)
        pipe.wake()
        return bytes(got)

    async def _wait_input(self) -> None:
        pipe = self._in
        if pipe.world.is_cut(pipe.source, pipe.target):
            async with trio.open_nursery() as nursery:  # a healed link, or something that happens at this end
                for event in (pipe.world.changed, pipe.changed):
                    nursery.start_soon(_first_of, event, nursery.cancel_scope)
            return
        with trio.CancelScope(deadline=max(pipe.next_event_s(), trio.current_time())) as pipe.reader:
            await pipe.changed.wait()
        pipe.reader = None

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._check_open()
        if self._out.eof_at_s is None:
            self._out.eof_at_s = self._out.arrival_s()
            self._out.wake()

    async def aclose(self) -> None:
        self.shut(reset=bool(self._in.chunks) and self._in.chunks[0][0] <= trio.current_time())
        await trio.lowlevel.checkpoint()

    def shut(self, *, reset: bool, silent: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self._host.streams.pop(id(self), None)
        self._in.dead = True
        late = bool(self._in.chunks) and not reset  # arrives after the close: answered with a reset then
        self._in.chunks.clear()
        if not silent:
            if not reset and self._out.eof_at_s is None:
                self._out.eof_at_s = self._out.arrival_s()
            if reset or late:
                self._out.reset_at_s = self._out.arrival_s()
        self._in.wake()
        self._out.wake()


async def _first_of(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
