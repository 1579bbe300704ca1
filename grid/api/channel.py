"""A child's end of the local channel: blocking, framed, safe to send on from several threads.

Rules this file keeps:

- a frame is written whole under one lock, gathered from its parts without joining them;
- one thread reads at a time; a large body is received straight into its own memory, once, and is writable there;
- a peer that is gone is `ChannelClosed`, whatever the operating system called it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Any

import msgspec

from grid.api import wire

RECEIVE_BYTES = 64 << 10
"""One read: takes in many small frames at once, and the front of a large one."""
IOV_PARTS_MAX = 512
"""Parts given to one sendmsg: under Linux's and macOS's IOV_MAX of 1,024."""


class ChannelClosed(ConnectionError):
    """The other end closed the channel or died."""


class Channel:
    """Frames over a connected stream socket, which it owns. `decoder` decides which direction's messages it reads."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Any] = wire.to_child_decoder) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._decoder = decoder
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._closed = False

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self._socket.fileno()

    def send(self, message: wire.Message, *buffers: wire.Buffer) -> None:
        """Send one frame, whose body is the buffers one after the other. Raises ChannelClosed."""
        if len(buffers) == 1:
            length = len(buffers[0]) if type(buffers[0]) is bytes else memoryview(buffers[0]).nbytes
        else:
            length = sum(memoryview(buffer).nbytes for buffer in buffers)
        if length > wire.BODY_BYTES_MAX:
            raise wire.WireError(f"body of {length} bytes is over the bound")
        head = wire.encode(message, length)
        with self._send_lock:
            try:
                if not length:
                    self._socket.sendall(head)
                else:
                    self._send_parts([head, *buffers], len(head) + length)
            except OSError as error:
                raise ChannelClosed("the grid's peer closed the channel") from error

    def _send_parts(self, parts: list[wire.Buffer], left: int) -> None:
        if len(parts) <= IOV_PARTS_MAX:
            sent = self._socket.sendmsg(parts)
            if sent == left:
                return
        else:
            sent = 0
        for part in parts:
            view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
            if sent >= view.nbytes:
                sent -= view.nbytes
                continue
            self._socket.sendall(view[sent:])
            sent = 0

    def ready(self, timeout_s: float | None = 0.0, also: socket.socket | None = None) -> bool:
        """Wait until there is something to receive, at most `timeout_s` seconds (None: for ever), or for `also`."""
        if self._end - self._start >= wire.PREFIX.size:
            return True
        try:
            wanted = [self._socket] if also is None else [self._socket, also]
            return self._socket in select.select(wanted, [], [], timeout_s)[0]
        except (OSError, ValueError):
            return True  # closed: receive says so

    def receive(self) -> tuple[Any, bytes | bytearray]:
        """Wait for one frame. Raises ChannelClosed at the end of the stream, WireError on a broken frame."""
        with self._receive_lock:
            self._need(wire.PREFIX.size)
            header_length, body_length = wire.PREFIX.unpack_from(self._buffer, self._start)
            if header_length > wire.HEADER_BYTES_MAX or body_length > wire.BODY_BYTES_MAX:
                raise wire.WireError(f"frame of {header_length} + {body_length} bytes is over the bound")
            self._start += wire.PREFIX.size
            header = self._take(header_length)
            body = self._take(body_length) if body_length else b""
        try:
            return self._decoder.decode(header), body
        except msgspec.MsgspecError as error:
            raise wire.WireError(f"not a message: {error}") from None

    def _need(self, size: int) -> None:
        """Have at least `size` (small) bytes in the buffer."""
        if self._end - self._start >= size:
            return
        if self._start:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        while self._end - self._start < size:
            self._end += self._receive_into(self._view[self._end :])

    def _take(self, size: int) -> bytes | bytearray:
        have = self._end - self._start
        if size <= have:
            data = bytes(self._view[self._start : self._start + size])
            self._start += size
            return data
        if size <= RECEIVE_BYTES:
            self._need(size)
            return self._take(size)
        large = bytearray(size)
        large[:have] = self._view[self._start : self._end]
        self._start = self._end = 0
        with memoryview(large) as view:
            while have < size:
                have += self._receive_into(view[have:])
        return large

    def _receive_into(self, view: memoryview) -> int:
        try:
            count = self._socket.recv_into(view)
        except OSError as error:
            raise ChannelClosed("the grid's peer closed the channel") from error
        if not count:
            raise ChannelClosed("the grid's peer closed the channel")
        return count

    def close(self) -> None:
        """Close the socket; a thread blocked in `receive` gets ChannelClosed. Idempotent."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
