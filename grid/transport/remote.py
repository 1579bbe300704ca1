"""What a mesh knows of one other peer, connected or not: its queues, its link, the dial under way, open requests."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import TypeAlias

import trio

from dht.core.identity import PeerId
from grid.transport.blobs import BlobReader
from grid.transport.errors import PeerUnreachable
from grid.transport.hello import Hello
from grid.transport.limits import INBOX_BYTES_MAX, INBOX_EVENTS_MAX, REQUESTS_RUNNING_MAX
from grid.transport.link import Link
from grid.transport.outbox import FRAME_OVERHEAD_BYTES, Outbox
from grid.transport.pending import Pending


class Up:
    """A connection stands."""

    def __init__(self, hello: Hello, link: Link) -> None:
        self.hello = hello
        self.link = link


class Down:
    """It is gone."""

    def __init__(self, why: str) -> None:
        self.why = why


Event: TypeAlias = Up | Down | bytes
"""bytes: a message."""


class Inbox:
    """What happened with one peer and its handler has not seen yet, in order."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._room = trio.lowlevel.ParkingLot()
        self.pumping = False

    def __len__(self) -> int:
        return len(self._events)

    @property
    def full(self) -> bool:
        return self._bytes >= INBOX_BYTES_MAX or len(self._events) >= INBOX_EVENTS_MAX

    def push(self, event: Event) -> None:
        self._events.append(event)
        self._bytes += FRAME_OVERHEAD_BYTES + (len(event) if isinstance(event, bytes) else 0)

    async def room(self) -> None:
        """Wait until a message may be pushed: this is what stops the reader, hence the sender."""
        while self.full:
            await self._room.park()

    def pop(self) -> Event | None:
        if not self._events:
            return None
        event = self._events.popleft()
        self._bytes -= FRAME_OVERHEAD_BYTES + (len(event) if isinstance(event, bytes) else 0)
        if not self.full:
            self._room.unpark_all()
        return event


class Dial:
    """One attempt to connect, shared by all who want that peer."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.authenticated = False
        """The other end is there and has proven itself: it will see our proof unless the connection breaks."""
        self.done = trio.Event()
        self.error: PeerUnreachable | None = None


class Remote:
    """One other peer. Its queues outlive its connections."""

    def __init__(self, peer: PeerId) -> None:
        self.id = peer
        self.outbox = Outbox()
        self.inbox = Inbox()
        self.link: Link | None = None
        self.hello: Hello | None = None
        self.up = trio.Event()
        """Set while there is a link; replaced when it goes."""
        self.dial: Dial | None = None
        self.wanted = False
        self.redialing = False
        self.failures = 0
        self.why = "not connected"
        """What the last failure to reach it said."""
        self.retry_at = 0.0
        """Trio's time before which nobody but an explicit connect dials again."""
        self.pending: dict[int, Pending] = {}
        self.numbers = count(1)
        self.slots = trio.Semaphore(REQUESTS_RUNNING_MAX)
        """For requests of theirs that are handled."""
        self.reader: BlobReader | None = None
        self.reader_lock = trio.Lock()
        self.called: trio.Event | None = None
        """We asked it to dial us with a blob link; set when it did."""
        self.serving = False
        """We dial it with a blob link because it asked."""

    @property
    def forgettable(self) -> bool:
        return not (
            self.link
            or self.dial
            or self.wanted
            or self.redialing
            or self.pending
            or self.reader
            or self.reader_lock.locked()
            or self.serving
            or self.inbox.pumping
            or len(self.outbox)
            or len(self.inbox)
        )
