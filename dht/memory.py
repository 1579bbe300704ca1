"""A network in memory: the twin of `dht.network.RealNetwork` for tests and for the simulated world.

Rules this file keeps:

- no task of its own: what is under way waits in the receiver's queue with its time of arrival, so nothing runs when
  nobody listens, and trio's MockClock can jump;
- every accident (loss, duplication, reordering, jitter) is drawn from the one seeded generator, in the order of sends:
  one seed replays one run;
- streams behave as TCP's do (`dht.memorystream`);
- every queue is bounded.
"""

from __future__ import annotations

import errno
import heapq
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import trio
from trio.abc import HalfCloseableStream

from dht.memorystream import MemoryStream, stream_pair
from dht.network import DATAGRAM_BYTES_MAX, Address, Network

DATAGRAMS_QUEUED_MAX = 4_096
"""Datagrams under way to one socket; more are lost, as in a full kernel buffer."""
ACCEPT_BACKLOG = 256
CONNECT_TIMEOUT_S = 127.0
"""How long Linux tries to connect to a host that says nothing."""
REORDER_DELAY_FACTOR = 10.0
"""A reordered datagram is late by up to so many latencies."""
FIRST_FREE_PORT = 40_000


@dataclass(frozen=True)
class Link:
    """One direction between two hosts. Chances are of one datagram; streams know latency and jitter only."""

    latency_s: float = 0.001
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class MemoryNetwork:
    """A world of hosts. `Link` arguments given here hold for every pair that `set_link` doesn't name."""

    def __init__(self, rng: random.Random | None = None, link: Link | None = None, **options: float) -> None:
        self._rng = rng if rng is not None else random.Random(0)
        self._link = replace(link or Link(), **options)
        self._links: dict[tuple[str, str], Link] = {}
        self._cut: dict[tuple[str, str], None] = {}
        self._hosts: dict[str, MemoryHost] = {}
        self.changed = trio.Event()

    def host(self, name: str) -> MemoryHost:
        """The host of this name, made on first use. Its name is the host part of its addresses."""
        if name not in self._hosts:
            self._hosts[name] = MemoryHost(self, name)
        return self._hosts[name]

    def set_link(self, a: str, b: str, *, one_way: bool = False, **options: float) -> None:
        """Change the link from `a` to `b`, and back unless `one_way`; options are `Link`'s fields."""
        for pair in [(a, b)] if one_way else [(a, b), (b, a)]:
            self._links[pair] = replace(self.link(*pair), **options)

    def link(self, a: str, b: str) -> Link:
        return self._links.get((a, b), self._link)

    def partition(self, a: str | Iterable[str], b: str | Iterable[str], one_way: bool = False) -> None:
        """Cut every link from a host in `a` to one in `b`, and back unless `one_way`."""
        for x in _names(a):
            for y in _names(b):
                self._cut[x, y] = None
                if not one_way:
                    self._cut[y, x] = None
        self._wake()

    def heal(self, a: str | Iterable[str] | None = None, b: str | Iterable[str] | None = None) -> None:
        """Mend the links between `a` and `b` in both directions; without arguments, all."""
        if a is None or b is None:
            self._cut.clear()
        else:
            for x in _names(a):
                for y in _names(b):
                    self._cut.pop((x, y), None)
                    self._cut.pop((y, x), None)
        self._wake()

    def kill(self, name: str, *, silent: bool = False) -> None:
        """The process on this host dies: sockets close, streams are reset, datagrams vanish.

        `silent`: the plug is pulled instead; the others hear nothing at all. `revive` lets it open sockets again.
        """
        self.host(name)._die(silent)
        self._wake()

    def revive(self, name: str) -> None:
        """The host can be used again; its old sockets stay dead."""
        host = self.host(name)
        host.dead = host.silent = False
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def is_cut(self, a: str, b: str) -> bool:
        """Whether nothing gets from `a` to `b` now."""
        return (a, b) in self._cut or self.host(b).silent or self.host(a).silent

    async def _until_open(self, a: str, b: str) -> None:
        while self.is_cut(a, b):
            await self.changed.wait()

    def delay_s(self, a: str, b: str) -> float:
        link = self.link(a, b)
        return link.latency_s + (self._rng.random() * link.jitter_s if link.jitter_s else 0.0)

    def _send_datagram(self, source: Address, data: bytes, target: Address) -> None:
        a, b = source[0], target[0]
        if b not in self._hosts or self.is_cut(a, b):
            return
        link = self.link(a, b)
        copies = 1
        if link.loss and self._rng.random() < link.loss:
            copies = 0
        elif link.duplicate and self._rng.random() < link.duplicate:
            copies = 2
        for _ in range(copies):
            delay_s = self.delay_s(a, b)
            if link.reorder and self._rng.random() < link.reorder:
                delay_s += self._rng.random() * REORDER_DELAY_FACTOR * link.latency_s
            receiver = self._hosts[b]._datagram_sockets.get(target[1])
            if receiver is not None:
                receiver._arrive(trio.current_time() + delay_s, data, source)


def _names(hosts: str | Iterable[str]) -> list[str]:
    return [hosts] if isinstance(hosts, str) else list(hosts)


class MemoryHost(Network):
    """One host: the `Network` its processes use."""

    def __init__(self, world: MemoryNetwork, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.silent = False
        self._next_port = FIRST_FREE_PORT
        self._datagram_sockets: dict[int, MemoryDatagramSocket] = {}
        self._listeners: dict[int, MemoryListener] = {}
        self.streams: dict[int, MemoryStream] = {}

    def _port(self, port: int, taken: dict[int, Any]) -> int:
        if self.dead:
            raise OSError(errno.ENETDOWN, f"{self.name} is down")
        if port in taken:
            raise OSError(errno.EADDRINUSE, f"port {port} of {self.name} is taken")
        return port or self._free_port()

    def _free_port(self) -> int:
        self._next_port += 1
        return self._next_port

    async def open_datagram(self, address: Address) -> MemoryDatagramSocket:
        await trio.lowlevel.checkpoint()
        port = self._port(address[1], self._datagram_sockets)
        self._datagram_sockets[port] = MemoryDatagramSocket(self, (self.name, port))
        return self._datagram_sockets[port]

    async def listen_stream(self, address: Address) -> MemoryListener:
        await trio.lowlevel.checkpoint()
        port = self._port(address[1], self._listeners)
        self._listeners[port] = MemoryListener(self, (self.name, port))
        return self._listeners[port]

    async def open_stream(self, address: Address) -> HalfCloseableStream:
        world, (name, port) = self.world, address
        if self.dead:
            raise OSError(errno.ENETDOWN, f"{self.name} is down")
        if name not in world._hosts:
            raise OSError(errno.EHOSTUNREACH, f"no host {name}")
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await world._until_open(self.name, name)
                await trio.sleep(world.delay_s(self.name, name))
                await world._until_open(name, self.name)
                far = world._hosts[name]
                listener = far._listeners.get(port)
                if listener is None or listener._is_full():
                    await trio.sleep(world.delay_s(name, self.name))
                    raise ConnectionRefusedError(errno.ECONNREFUSED, f"nothing listens at {name}:{port}")
                near_end, far_end = stream_pair(self, far, self._free_port(), port)
                listener._arrive(far_end, (self.name, near_end.port))
                try:
                    await trio.sleep(world.delay_s(name, self.name))
                except BaseException:
                    near_end.shut(reset=True)
                    raise
        except trio.TooSlowError:
            raise TimeoutError(errno.ETIMEDOUT, f"{name}:{port} does not answer") from None
        return near_end

    def _die(self, silent: bool) -> None:
        self.dead, self.silent = True, silent
        for sock in list(self._datagram_sockets.values()):
            sock.close()
        for listener in list(self._listeners.values()):
            listener._close()
        for stream in list(self.streams.values()):
            stream.shut(reset=True, silent=silent)


class MemoryDatagramSocket:
    """A datagram socket in memory."""

    def __init__(self, host: MemoryHost, address: Address) -> None:
        self.address = address
        self._host = host
        self._queue: list[tuple[float, int, bytes, Address]] = []
        self._count = 0
        self._arrived = trio.Event()
        self._closed = False

    async def send_to(self, data: bytes, address: Address) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        if len(data) > DATAGRAM_BYTES_MAX:
            raise AssertionError(f"a datagram of {len(data)} B, over the {DATAGRAM_BYTES_MAX} B all paths carry")
        self._host.world._send_datagram(self.address, data, address)

    def _arrive(self, at_s: float, data: bytes, source: Address) -> None:
        if len(self._queue) < DATAGRAMS_QUEUED_MAX:
            self._count += 1
            heapq.heappush(self._queue, (at_s, self._count, data, source))
            self._arrived.set()

    async def receive_from(self) -> tuple[bytes, Address]:
        await trio.lowlevel.checkpoint()
        while not self._closed:
            if self._queue and self._queue[0][0] <= trio.current_time():
                _, _, data, source = heapq.heappop(self._queue)
                return data, source
            self._arrived = trio.Event()
            with trio.move_on_at(self._queue[0][0] if self._queue else float("inf")):
                await self._arrived.wait()
        raise trio.ClosedResourceError

    def close(self) -> None:
        self._closed = True
        self._queue.clear()
        if self._host._datagram_sockets.get(self.address[1]) is self:
            del self._host._datagram_sockets[self.address[1]]
        self._arrived.set()


class MemoryListener:
    """A listening socket in memory."""

    def __init__(self, host: MemoryHost, address: Address) -> None:
        self.address = address
        self._host = host
        self._queue: deque[tuple[MemoryStream, Address]] = deque()
        self._arrived = trio.Event()
        self._closed = False

    def _is_full(self) -> bool:
        return len(self._queue) >= ACCEPT_BACKLOG

    def _arrive(self, stream: MemoryStream, peer: Address) -> None:
        self._queue.append((stream, peer))
        self._arrived.set()

    async def accept(self) -> tuple[HalfCloseableStream, Address]:
        await trio.lowlevel.checkpoint()
        while not self._closed:
            if self._queue:
                return self._queue.popleft()
            self._arrived = trio.Event()
            await self._arrived.wait()
        raise trio.ClosedResourceError

    def _close(self) -> None:
        self._closed = True
        if self._host._listeners.get(self.address[1]) is self:
            del self._host._listeners[self.address[1]]
        for stream, _ in self._queue:
            stream.shut(reset=True)
        self._queue.clear()
        self._arrived.set()

    async def aclose(self) -> None:
        self._close()
        await trio.lowlevel.checkpoint()
