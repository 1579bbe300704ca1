"""One child of a job as the peer sees it: frames in and out, its progress cell, its prints, its end.

Rules: at most one task iterates `frames`; nothing is read that was not asked for (a child that nobody listens to blocks);
what waits to be sent is bounded; a child that breaks the frame format is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import trio

from grid.api import wire
from grid.worker import memory, progress

RECEIVE_BYTES = 256 << 10
"""One read of a channel."""
ARRIVED_READS_MAX = 16
"""Of what arrived: several times what a child's socket holds."""
_INPUT = bytearray(RECEIVE_BYTES)
"""Where all reads go, one after the other: a fresh buffer for each costs several times what a small frame does."""
JOIN_BYTES_MAX = 64 << 10
"""Bodies up to this are copied behind their header: one system call, one small copy."""
OUT_BYTES_MAX = 4 << 20
"""Frames that a child has not read yet; then `send` waits."""
PRINT_BYTES_MAX = 64 << 10
"""What a child wrote to descriptors 1 and 2 and nobody has taken; then its writes block."""
LINGER_S = 0.2
"""For the last prints after a child's end: a process that it left behind may hold the pipe open."""


class ChildGone(Exception):
    """The child does not take frames any more: it ended or closed its channel."""


class Child:
    """A worker or driver process. `frames` ends at its end; `exited`, `status` and `why` tell of it."""

    def __init__(self, role: str, channel: socket.socket, cell: mmap.mmap | None) -> None:
        channel.setblocking(False)
        self.role = role
        self.pid = 0
        self.python = ""
        """Its version, such as 3.11.7."""
        self.exited = trio.Event()
        self.status: int | None = None
        """Exit code, or minus the signal that ended it; None: not known, or still running."""
        self.why = ""
        """Why we killed it: "memory", "timeout", "protocol" or what `kill` was given; "" if we did not."""
        self.memory_bytes_max = 0
        self.shared_bytes = 0
        """Of its memory: another process' that it was given to map, which is not for it to answer for."""
        self.takes_early = False
        """It has an end of the socket between its job's workers and driver on this machine."""
        self.grace_s = 2.0
        """What `stop` grants."""
        self._kill: Callable[[], None] = lambda: None
        self._socket = channel
        self._reader = wire.FrameReader(wire.from_child_decoder)
        self._frames: deque[tuple[Any, bytes]] = deque()
        self._prints: deque[tuple[Any, bytes]] = deque()
        self._prints_bytes = 0
        self._prints_taken = trio.Event()
        self._lingering: trio.CancelScope | None = None
        self._reading = False  # somebody waits for the socket
        self._drained = False  # the last read took all there was
        self._linger_until: float | None = None
        self._ended = False
        self._pipes_open = 0
        self._pipes_ended = trio.Event()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._out_waiting = trio.Event()
        self._out_drained = trio.Event()
        self._cell = cell
        self._stages: dict[int, int] = {}  # ticket → stage of the Runs sent and not finished
        self._finished = (-1, -1)  # ticket and stage of the Run finished last: its prints may come after it

    # ---- frames ------------------------------------------------------------------------------------------------------

    async def send(self, message: wire.ToChild, *bodies: wire.Buffer) -> None:
        """Send one frame, its body the given parts in order. Returns when it is under way, often without a checkpoint;
        waits while OUT_BYTES_MAX are on their way. Raises ChildGone."""
        while self._out_bytes > OUT_BYTES_MAX:
            await self._out_drained.wait()
        self.post(message, *bodies)

    def post(self, message: wire.ToChild, *bodies: wire.Buffer) -> None:
        """Send one frame without ever waiting, for senders that bound what is under way themselves. Raises ChildGone."""
        length = sum(map(_nbytes, bodies))
        head = wire.encode(message, length)
        if type(message) is wire.Run:
            self._stages[message.ticket] = message.stage
        if self.exited.is_set() or self._socket.fileno() < 0:
            raise ChildGone
        parts: list[wire.Buffer] = [b"".join((head, *bodies))] if length <= JOIN_BYTES_MAX else [head, *bodies]
        if not self._out:
            parts = self._send_now(parts)
        for part in parts:
            view = memoryview(part).cast("B")
            self._out.append(view)
            self._out_bytes += view.nbytes
        if self._out:
            self._out_waiting.set()

    def _send_now(self, parts: list[wire.Buffer]) -> list[wire.Buffer]:
        """Send what the socket takes at once; return the rest."""
        try:
            sent = self._socket.send(parts[0]) if len(parts) == 1 else self._socket.sendmsg(parts)
        except BlockingIOError:
            return parts
        except OSError:
            raise ChildGone from None
        rest: list[wire.Buffer] = []
        for part in parts:
            size = _nbytes(part)
            if sent < size:
                rest.append(memoryview(part).cast("B")[sent:] if sent else part)
            sent = max(0, sent - size)
        return rest

    async def write(self) -> None:
        """Background task: send what the socket would not take at once."""
        while self._socket.fileno() >= 0:
            await self._out_waiting.wait()
            while self._out:
                try:
                    sent = self._socket.send(self._out[0])
                except BlockingIOError:
                    try:
                        await trio.lowlevel.wait_writable(self._socket)
                    except trio.ClosedResourceError:
                        if self._socket.fileno() < 0:
                            break
                    continue
                except OSError:
                    break
                self._out_bytes -= sent
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
                if self._out_bytes <= OUT_BYTES_MAX:
                    self._wake_senders()
            if self._out:  # broken: the end of the child is told by `frames` and `exited`
                self._out.clear()
                self._out_bytes = 0
            self._wake_senders()
            if self._socket.fileno() >= 0:
                self._out_waiting = trio.Event()

    def _wake_senders(self) -> None:
        self._out_drained.set()
        self._out_drained = trio.Event()

    @property
    def frames(self) -> Child:
        """An async iterator of (message, body), Prints of descriptors 1 and 2 among them; it ends with the child."""
        return self

    def __aiter__(self) -> Child:
        return self

    async def __anext__(self) -> tuple[Any, bytes]:
        while True:
            if self._prints:
                message, body = self._prints.popleft()
                self._prints_bytes -= len(body)
                self._prints_taken.set()
                return message, body
            if self._frames:
                return self._next_frame()
            if self._ended:
                self.close()
                raise StopAsyncIteration
            if self._linger_until is None:
                await self._read()
            else:
                with trio.CancelScope() as self._lingering:
                    await self._linger()
                self._lingering = None

    def _next_frame(self) -> tuple[Any, bytes]:
        message, body = self._frames.popleft()
        if type(message) in _ENDS and message.final:
            self._finished = message.ticket, self._stages.pop(message.ticket, -1)
        return message, body

    def arrived(self) -> Iterator[tuple[Any, bytes]]:
        """The frames that the child has sent by now, without waiting; whoever iterates `frames` gets those that come later."""
        for _ in range(ARRIVED_READS_MAX):
            if self._linger_until is not None or self._socket.fileno() < 0:
                break
            self._receive()
            if self._drained:
                break
        while self._frames:
            yield self._next_frame()

    async def _read(self) -> None:
        """Take in what the socket has, waiting for it if it was empty. One checkpoint, always."""
        if self._drained:
            self._drained, self._reading = False, True
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except trio.ClosedResourceError:
                pass  # or there is a print (`_wake_reader`)
            finally:
                self._reading = False
        else:
            await trio.lowlevel.checkpoint()
        self._receive()

    def _receive(self) -> None:
        try:
            size = self._socket.recv_into(_INPUT)
        except BlockingIOError:
            self._drained = True
            return
        except OSError:
            size = 0
        self._drained = 0 < size < RECEIVE_BYTES
        if not size:
            self._linger_until = trio.current_time() + (LINGER_S if self._pipes_open else 0.0)
            return
        try:
            self._frames.extend(self._reader.feed(memoryview(_INPUT)[:size]))
        except wire.WireError:
            self.kill("protocol")
            self._linger_until = trio.current_time()

    async def _linger(self) -> None:
        """The channel has ended: wait for the last prints."""
        assert self._linger_until is not None
        with trio.move_on_at(self._linger_until) as scope:
            await self._pipes_ended.wait()
        self._ended = not self._prints and (self._pipes_ended.is_set() or scope.cancelled_caught)

    # ---- prints of C code and of subprocesses ------------------------------------------------------------------------

    def add_pipe(self) -> None:
        """Announce a `drain`."""
        self._pipes_open += 1

    async def drain(self, pipe: int, fd: int) -> None:
        """Background task: turn what comes through `pipe` into Prints of descriptor `fd`, tagged with the running task."""
        try:
            async with trio.lowlevel.FdStream(pipe) as stream:
                while True:
                    while self._prints_bytes > PRINT_BYTES_MAX:
                        self._prints_taken = trio.Event()
                        await self._prints_taken.wait()
                    try:
                        data = await stream.receive_some(16 << 10)
                    except (OSError, trio.BrokenResourceError):
                        return
                    if not data:
                        return
                    stage, index = self.running()
                    self._prints.append((wire.Print(stage, index, fd), bytes(data)))
                    self._prints_bytes += len(data)
                    self._wake_reader()
        finally:
            self._pipes_open -= 1
            if not self._pipes_open:
                self._pipes_ended.set()

    def _wake_reader(self) -> None:
        """There is something for whoever iterates `frames`. Cheaper for each frame than a cancel scope of its own would be."""
        if self._lingering is not None:
            self._lingering.cancel()
        elif self._reading and self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)  # it isn't closed: who waits for it looks again

    # ---- what it does ------------------------------------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """Index of the running task, or -1, and its start in CLOCK_MONOTONIC nanoseconds."""
        if self._cell is None:
            return -1, 0
        index, started_ns = wire.PROGRESS.unpack_from(self._cell)
        return index, started_ns

    def running(self) -> tuple[int, int]:
        """(stage, index) of the task that runs or ran last; (-1, -1) before the first."""
        if self._cell is None:
            return -1, -1
        index, _, ticket, last = progress.CELL.unpack_from(self._cell)
        stage = self._finished[1] if ticket == self._finished[0] else self._stages.get(ticket, -1)
        return stage, index if index >= 0 else last

    def running_ticket(self) -> int:
        """Ticket of the Run that it works on or finished last; -1 before the first."""
        return -1 if self._cell is None else int(progress.CELL.unpack_from(self._cell)[2])

    def overdue(self, now_ns: int, timeout_s: float) -> int | None:
        """Index of the running task if it has run for longer than `timeout_s`."""
        index, started_ns = self.progress()
        return index if index >= 0 and started_ns and now_ns - started_ns > timeout_s * 1e9 else None

    def rss_bytes(self) -> int:
        """Memory that it and its subprocesses took (without mapped files), in bytes."""
        return 0 if self.exited.is_set() else memory.tree_bytes(self.pid)

    # ---- its end -----------------------------------------------------------------------------------------------------

    def kill(self, reason: str = "killed") -> None:
        """SIGKILL it and its process group; `why` tells the first reason. Idempotent, returns at once."""
        if not self.exited.is_set():
            self.why = self.why or reason
            self._kill()

    async def stop(self, grace_s: float | None = None) -> None:
        """Ask it to finish what runs and exit; kill it after `grace_s`. Somebody must go on reading `frames`."""
        with trio.move_on_after(self.grace_s if grace_s is None else grace_s), contextlib.suppress(ChildGone):
            await self.send(wire.Stop())
            await self.exited.wait()
        self.kill("stopped")

    def on_fork(self, pid: int, kill: Callable[[], None]) -> None:
        """The pool tells who it became."""
        self.pid = pid
        self._kill = kill

    def on_exit(self, status: int | None) -> None:
        """The pool tells that it ended."""
        self.status = status
        self.exited.set()
        self._wake_senders()

    @property
    def closed(self) -> bool:
        """Whether the channel was given up: by `close`, or because `frames` has ended."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Give the channel up; a waiting iterator ends."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        self._out_waiting.set()
        self._wake_senders()


_ENDS = frozenset({wire.Done, wire.Failed})


def _nbytes(part: wire.Buffer) -> int:
    return len(part) if type(part) is bytes else memoryview(part).nbytes


def shared_cell() -> tuple[int, mmap.mmap]:
    """A progress cell: a descriptor to hand to the child, and our view of it, which says that nothing runs."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("progress")
    else:  # pragma: no cover - macOS
        import tempfile

        fd, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(fd, progress.CELL_BYTES)
    cell = mmap.mmap(fd, progress.CELL_BYTES)
    progress.CELL.pack_into(cell, 0, -1, 0, -1, -1)
    return fd, cell
