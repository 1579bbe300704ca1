"""Outgoing messages about jobs: one ordered, bounded queue a peer, emptied by one task each.

Rules: `post` never waits; messages to one peer leave in the order they were posted; when a peer can't be reached its queue
is dropped and the fact is told (`lost`): whoever needs certainty repeats (claims, completions) or gives up (relays).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.errors import GridError
from grid.core.messages import Message, Relay, encode
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.core.job import JobId
    from grid.jobdata import JobData
    from grid.transport.mesh import Mesh

QUEUE_MAX: Final = 20_000
"""Messages waiting for one peer; a peer that lets so many pile up is treated as lost."""
SEND_TIMEOUT_S: Final = 15.0
"""For a message to enter the connection's own queue: longer means that the peer does not read."""

Item = Message | Callable[[], Awaitable[Message]]
log = logging.getLogger(__name__)


class PostOffice:
    """All peers' queues."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery, lost: Callable[[PeerId], None]) -> None:
        self._mesh = mesh
        self._nursery = nursery
        self._lost = lost
        self._queues: dict[PeerId, deque[Item]] = {}

    def post(self, peer: PeerId, item: Item) -> None:
        """Queue a message, or a function that makes it when its turn comes."""
        queue = self._queues.get(peer)
        if queue is None:
            self._queues[peer] = deque([item])
            self._nursery.start_soon(self._deliver, peer)
            return
        if len(queue) >= QUEUE_MAX:
            log.warning("peer %s does not take its messages: dropped", peer.hex()[:8])
            queue.clear()
            self._lost(peer)
            return
        queue.append(item)

    async def _deliver(self, peer: PeerId) -> None:
        """Send until the queue is empty; then the task ends, and the next post starts another."""
        queue = self._queues[peer]
        try:
            while queue:
                item = queue.popleft()
                try:
                    message = item if isinstance(item, Message) else await item()
                    with trio.fail_after(SEND_TIMEOUT_S):
                        await self._mesh.send(peer, encode(message))
                except ValueError as error:  # over the transport's bound: a bug of who posted it, not the peer's fault
                    log.error("a message for peer %s was dropped: %s", peer.hex()[:8], error)
                except (TransportError, GridError, OSError, trio.TooSlowError) as error:
                    log.debug("peer %s can't be reached: %s", peer.hex()[:8], error)
                    queue.clear()
                    self._lost(peer)
        finally:
            del self._queues[peer]

    def post_frame(self, peer: PeerId, data: JobData, job: JobId, token: int, frame: wire.Message, body: Body) -> None:
        """Queue a frame of a child's channel; a long body goes as a blob of this peer."""

        async def make() -> Message:
            header = wire.encode(frame)[wire.PREFIX.size :]
            if bodies.size_of(body) <= limits.SEGMENT_INLINE_BYTES:
                content = bodies.read(body)
                bodies.release(body)
                return Relay(job, token, header, content)
            blob = await data.put("", bodies.read(body))
            size = bodies.size_of(body)
            bodies.release(body)
            return Relay(job, token, header, b"", blob, size)

        self.post(peer, make)
