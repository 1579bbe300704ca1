"""What a mesh asks of the peer it belongs to."""

from __future__ import annotations

from typing import Protocol

from dht.core.identity import PeerId
from dht.core.membership import Chain
from grid.core.noise import Buffer
from grid.transport.hello import Hello


class MeshHandler(Protocol):
    """What the peer does with what arrives. An exception other than RemoteError closes the connection it came by."""

    async def on_message(self, peer: PeerId, message: bytes) -> None:
        """In order, one at a time for each peer; not cancelled when the connection goes."""

    async def on_request(self, peer: PeerId, message: bytes) -> bytes:
        """The answer; may raise RemoteError. Cancelled when the asker gives up or its connection goes: shield what must
        not be."""

    async def on_up(self, peer: PeerId, hello: Hello) -> None: ...

    async def on_down(self, peer: PeerId, why: str) -> None: ...

    async def admit(self, invite: bytes, key: bytes, hello: Hello) -> Chain:
        """The chain for the joiner with this key, who holds the invite's key (public, 32 bytes). Raises RemoteError."""

    async def read_blob(self, peer: PeerId, blob: bytes, offset: int, length: int) -> Buffer | None:
        """Exactly these bytes (length ≤ 1 MiB), or None when they are not all held."""
