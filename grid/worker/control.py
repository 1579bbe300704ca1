"""What a peer and a zygote say to each other, over an inherited Unix stream: wire.py's frames, with file descriptors.

An order that hands over descriptors is sent in one piece with SCM_RIGHTS, so they arrive with its first byte at the
latest; each order says how many are its own. Light: the zygote imports this file.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from typing import Any, TypeAlias

import msgspec

from grid.api import wire

FDS_MAX = 8
"""Descriptors in one order; a fork takes five."""


class Fork(wire.Message, tag=1, frozen=True):
    """Peer: fork child number `child`. One descriptor comes for each name in `fds`:

    channel, progress, early (kept), stdin, stdout, stderr (put in place of 0, 1, 2; /dev/null where not given).
    """

    child: int
    role: str  # "worker" or "driver"
    fds: tuple[str, ...]
    memory_bytes_max: int = 0  # 0: no limit


class Kill(wire.Message, tag=2, frozen=True):
    """Peer: SIGKILL this child and all processes of its group."""

    child: int


class Hello(wire.Message, tag=20, frozen=True):
    """Zygote: ready for orders."""

    pid: int
    python: str


class Forked(wire.Message, tag=21, frozen=True):
    """Zygote: the child runs, or `error` says why not."""

    child: int
    pid: int
    error: str = ""


class Exited(wire.Message, tag=22, frozen=True):
    """Zygote: the child and its group are gone. status: exit code, or minus the signal."""

    child: int
    status: int


Order: TypeAlias = Fork | Kill
Report: TypeAlias = Hello | Forked | Exited
order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class OrderReader:
    """The zygote's reading end: orders with their descriptors."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._reader = wire.FrameReader(order_decoder)
        self._fds: deque[int] = deque()

    def read(self) -> list[tuple[Any, list[int]]] | None:
        """Receive once and return the orders that are now whole; None at the end of the stream."""
        data, ancillary, _, _ = self._control.recvmsg(64 << 10, socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            return None
        orders = []
        for order, _ in self._reader.feed(data):
            wanted = len(order.fds) if isinstance(order, Fork) else 0
            orders.append((order, [self._fds.popleft() for _ in range(wanted)]))
        return orders


def send_order(control: socket.socket, order: Order, fds: list[int]) -> None:
    """Send without blocking; raises BlockingIOError when the zygote doesn't read, OSError when it is gone."""
    data = wire.encode(order)
    sent = socket.send_fds(control, [data], fds) if fds else control.send(data)
    if sent != len(data):
        raise BlockingIOError
