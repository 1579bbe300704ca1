"""The network as the peers see it: datagrams and streams behind one interface, and its real form on trio sockets.

Rules this file keeps:

- nothing above this file touches a socket, so the in-memory twin (`dht.memory`) can stand in for all of it;
- one port number serves TCP and UDP: when port 0 is asked for, the number given is free for the other protocol too;
- a datagram that can't be sent is a lost datagram; a stream that can't be opened is an `OSError`.
"""

from __future__ import annotations

import abc
import errno
import socket as stdlib_socket
from typing import Protocol

import trio
from trio import socket
from trio.abc import HalfCloseableStream

Address = tuple[str, int]
"""(host, port), the host numeric wherever it came from the network."""

DATAGRAM_BYTES_MAX = 1_400
"""Largest datagram: fits every common path (Ethernet 1,500, PPPoE 1,492, WireGuard 1,420) without fragments."""
RECEIVE_BUFFER_BYTES = 2_048
"""More than the largest datagram of ours; longer ones arrive cut and fail their signature."""
SOCKET_BUFFER_BYTES = 1 << 20
"""Kernel buffer of the datagram socket: a burst of some hundred replies must not be lost while a task runs."""
LISTEN_BACKLOG = 256
PORT_TRIES_MAX = 64
"""Tries to find a port number free for both protocols; fails in earnest only where nearly all are taken."""


class DatagramSocket(Protocol):
    """An unconnected datagram socket."""

    @property
    def address(self) -> Address: ...

    async def send_to(self, data: bytes, address: Address) -> None:
        """Send, or lose silently: datagrams promise nothing. Never raises `OSError`."""

    async def receive_from(self) -> tuple[bytes, Address]:
        """The next datagram and its sender's address. Raises `trio.ClosedResourceError` once closed."""

    def close(self) -> None: ...


class Listener(Protocol):
    """A listening stream socket."""

    @property
    def address(self) -> Address: ...

    async def accept(self) -> tuple[HalfCloseableStream, Address]:
        """The next stream and its peer's address. Raises `trio.ClosedResourceError` once closed."""

    async def aclose(self) -> None: ...


class Network(abc.ABC):
    """Where sockets come from."""

    @abc.abstractmethod
    async def open_datagram(self, address: Address) -> DatagramSocket:
        """Bind. Raises `OSError` (EADDRINUSE when the port is taken)."""

    @abc.abstractmethod
    async def listen_stream(self, address: Address) -> Listener:
        """Bind and listen. Raises `OSError` (EADDRINUSE when the port is taken)."""

    @abc.abstractmethod
    async def open_stream(self, address: Address) -> HalfCloseableStream:
        """Connect; bound the wait with a cancel scope. Raises `OSError`."""


class RealDatagramSocket:
    """A UDP socket."""

    def __init__(self, sock: socket.SocketType) -> None:
        self._socket = sock
        self.address: Address = _address(sock.getsockname())
        self.send_failures = 0

    async def send_to(self, data: bytes, address: Address) -> None:
        try:
            await self._socket.sendto(data, address)
        except (OSError, ValueError, OverflowError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EBADF:
                raise trio.ClosedResourceError from None
            self.send_failures += 1  # unreachable, unresolvable, or a nonsense address: as good as lost

    async def receive_from(self) -> tuple[bytes, Address]:
        while True:
            try:
                data, sender = await self._socket.recvfrom(RECEIVE_BUFFER_BYTES)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError from None
                continue  # an ICMP error of an earlier send; says nothing that a missing reply doesn't
            return data, _address(sender)

    def close(self) -> None:
        self._socket.close()


class RealListener:
    """A listening TCP socket."""

    def __init__(self, sock: socket.SocketType) -> None:
        self._listener = trio.SocketListener(sock)
        self.address: Address = _address(sock.getsockname())

    async def accept(self) -> tuple[HalfCloseableStream, Address]:
        while True:
            stream = await self._listener.accept()
            try:
                peer = _address(stream.socket.getpeername())
            except OSError:  # gone before we looked
                await trio.aclose_forcefully(stream)
                continue
            return stream, peer

    async def aclose(self) -> None:
        await self._listener.aclose()


class RealNetwork(Network):
    """UDP and TCP of this machine."""

    async def open_datagram(self, address: Address) -> RealDatagramSocket:
        sock = await _bind(address, socket.SOCK_DGRAM, socket.SOCK_STREAM)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        return RealDatagramSocket(sock)

    async def listen_stream(self, address: Address) -> RealListener:
        sock = await _bind(address, socket.SOCK_STREAM, socket.SOCK_DGRAM)
        sock.listen(LISTEN_BACKLOG)
        return RealListener(sock)

    async def open_stream(self, address: Address) -> trio.SocketStream:
        return await trio.open_tcp_stream(*address)  # SocketStream sets NODELAY itself


def _address(name: tuple[object, ...]) -> Address:
    return str(name[0]), int(str(name[1]))


async def _bind(address: Address, kind: int, other_kind: int) -> socket.SocketType:
    """A bound socket of `kind`; when any port will do, one whose number is free for `other_kind` too."""
    host, port = address
    found = await socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    family, name = found[0][0], found[0][4]
    for _ in range(PORT_TRIES_MAX):
        sock = socket.socket(family, kind)
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(name)
            if port != 0 or _is_free(family, other_kind, sock.getsockname()):
                return sock
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise OSError(errno.EADDRINUSE, f"no port of {host} is free for both TCP and UDP")


def _is_free(family: int, kind: int, name: tuple[object, ...]) -> bool:
    with stdlib_socket.socket(family, kind) as probe:
        try:
            probe.bind(name)
        except OSError:
            return False
        return True
