"""What waits to be sent to one peer: a bounded queue of frames that outlives the connections it is sent over.

A frame is (kind, id, payload). Rules this file keeps:

- order is kept; messages beyond the bound wait (`put`) or are turned away (`offer`);
- the frames of a request and its answer belong to one connection: `connection_lost` drops them, messages stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from grid.core.noise import Buffer
from grid.transport.errors import PeerUnreachable
from grid.transport.limits import BULK_BYTES_MIN, OUTBOX_BYTES_MAX, OUTBOX_FRAMES_MAX, RECORD_BYTES_TARGET

MESSAGE: Final = 1
REQUEST: Final = 2
REPLY: Final = 3
ERROR: Final = 4
CANCEL: Final = 5
PING: Final = 6
BYE: Final = 7
IN_USE: Final = 1
"""Id of a ping whose sender needs the connection although it has nothing to say."""
KEPT: Final = 4
"""The same, and it will dial again when the connection breaks: its sender chose the receiver as a neighbour."""
SPARE: Final = 2
"""Id of a ping whose sender has no use for the connection, and is silent until the other end has said goodbye or DECLINED."""
DECLINED: Final = 3
"""Id of a ping that answers SPARE: the connection is in use."""
SERVE_ME: Final = 8
"""Dial me with purpose `serve`: I want to read blobs of yours and can't get through."""
READ: Final = 16
DATA: Final = 17
MISSING: Final = 18

FRAME_OVERHEAD_BYTES: Final = 64
"""What a queued frame costs besides its payload, so that empty messages count too."""


class Frame(NamedTuple):
    kind: int
    id: int
    payload: Buffer


class Outbox:
    """Many tasks put, one link at a time takes."""

    def __init__(self, bytes_max: int = OUTBOX_BYTES_MAX, frames_max: int = OUTBOX_FRAMES_MAX) -> None:
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._bytes_max = bytes_max
        self._frames_max = frames_max
        self._room = trio.lowlevel.ParkingLot()
        self._work = trio.lowlevel.ParkingLot()
        self._failure: PeerUnreachable | None = None
        self._given_up = 0
        self.shortcut: Callable[[Frame], bool] | None = None
        """Asked first when nothing is queued: True when it has sent the frame already."""

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def full(self) -> bool:
        return self._bytes >= self._bytes_max or len(self._frames) >= self._frames_max

    def force(self, frame: Frame) -> None:
        """Queue regardless of the bound: for what the transport itself says."""
        if self._frames or self.shortcut is None or not self.shortcut(frame):
            self.append(frame)

    def append(self, frame: Frame) -> None:
        """Queue for the writer, regardless of bound and shortcut."""
        self._frames.append(frame)
        self._bytes += len(frame.payload) + FRAME_OVERHEAD_BYTES
        self._work.unpark()

    def offer(self, frame: Frame) -> bool:
        """Queue unless full; never waits."""
        if self.full or len(self._room):
            return False
        self.force(frame)
        return True

    async def put(self, frame: Frame) -> None:
        """Queue, waiting for room, first come first served. Raises PeerUnreachable when the peer is given up."""
        if not self.full and not len(self._room):
            self.force(frame)
            return
        given_up = self._given_up
        while True:
            await self._room.park()
            if self._given_up != given_up and self._failure is not None:
                raise self._failure
            if not self.full:
                break
        self.force(frame)
        if not self.full:
            self._room.unpark()

    async def wait(self) -> None:
        """Return once there is a frame to take."""
        while not self._frames:
            await self._work.park()

    def take(self) -> list[Frame]:
        """The next frames, none if there are none: as fit one record; a bulk frame, a goodbye or a SPARE is the last."""
        batch: list[Frame] = []
        size = 0
        while self._frames and size < RECORD_BYTES_TARGET:
            frame = self._frames.popleft()
            length = len(frame.payload)
            self._bytes -= length + FRAME_OVERHEAD_BYTES
            batch.append(frame)
            size += length
            if length >= BULK_BYTES_MIN or frame.kind == BYE or (frame.kind == PING and frame.id == SPARE):
                break
        if not self.full:
            self._room.unpark()
        return batch

    def connection_lost(self) -> None:
        """Keep only what makes sense on the next connection."""
        kept = [frame for frame in self._frames if frame.kind == MESSAGE]
        self._frames.clear()
        self._bytes = 0
        for frame in kept:
            self.append(frame)
        if not self.full:
            self._room.unpark()

    def give_up(self, failure: PeerUnreachable) -> int:
        """Drop everything; those who wait for room get `failure`. Returns the number of frames dropped."""
        dropped = len(self._frames)
        self._frames.clear()
        self._bytes = 0
        self._failure = failure
        self._given_up += 1
        self._room.unpark_all()
        return dropped
