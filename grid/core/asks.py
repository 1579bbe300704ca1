"""What peers were asked to copy and did not answer for: bounded for each of them and in all; who refuses is left alone a while.

Rule: one ask is always allowed, however large, where nothing else is under way. Time is an argument. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dht.core.identity import PeerId

ASKS_MAX: Final = 64
"""Blobs asked for and not answered for, of all peers."""
ASKS_PER_PEER_MAX: Final = 16
"""Of one peer: one message's worth, enough to hide its round trip."""
ASKED_BYTES_MAX: Final = 256 << 20
"""The same in bytes, for all peers: most of it leaves through the leader's uplink."""
ASKED_BYTES_PER_PEER_MAX: Final = 64 << 20
PATIENCE_S: Final = 15.0
"""For an answer, whatever was asked for, and"""
PATIENCE_BYTES_PER_S: Final = 1e6
"""for each byte that the peer was asked to copy: slower than this counts as no answer."""
PEER_SHUN_S: Final = 0.5
PEER_SHUN_S_MAX: Final = 60.0
"""Before a peer that refused is asked for anything else; doubles with each refusal in a row (its disk is full, say)."""


@dataclass(slots=True)
class Load:
    """Of one connected peer."""

    asks: int = 0
    asked_bytes: int = 0
    refusals: int = 0
    shunned_until_s: float = 0.0


class Asks:
    """All connected peers' asks."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, Load] = {}
        self.count = 0
        self.asked_bytes = 0

    @property
    def full(self) -> bool:
        """Nobody can be asked for anything now."""
        return self.count >= ASKS_MAX

    def room(self, peer: PeerId, size: int) -> bool:
        """Whether a connected peer may be asked for so many bytes now."""
        load = self.peers[peer]
        if self.full or load.asks >= ASKS_PER_PEER_MAX:
            return False
        fits = self.asked_bytes + size <= ASKED_BYTES_MAX or self.count == 0
        return fits and (load.asked_bytes + size <= ASKED_BYTES_PER_PEER_MAX or load.asks == 0)

    def begin(self, peer: PeerId, size: int, now_s: float) -> float:
        """A connected peer is asked; returns until when its answer is waited for."""
        load = self.peers[peer]
        load.asks += 1
        load.asked_bytes += size
        self.count += 1
        self.asked_bytes += size
        return now_s + PATIENCE_S + load.asked_bytes / PATIENCE_BYTES_PER_S

    def end(self, peer: PeerId, size: int) -> None:
        """It answered, or won't: it may be gone."""
        self.count -= 1
        self.asked_bytes -= size
        load = self.peers.get(peer)
        if load is not None:
            load.asks -= 1
            load.asked_bytes -= size

    def shunned(self, peer: PeerId, now_s: float) -> bool:
        """Whether a connected peer is left alone."""
        return self.peers[peer].shunned_until_s > now_s

    def shun(self, peer: PeerId, now_s: float) -> float | None:
        """The peer refused. Returns until when it is left alone; None: it is gone."""
        load = self.peers.get(peer)
        if load is None:
            return None
        load.shunned_until_s = now_s + min(PEER_SHUN_S * 2**load.refusals, PEER_SHUN_S_MAX)
        load.refusals = min(load.refusals + 1, 16)
        return load.shunned_until_s

    def obeyed(self, peer: PeerId) -> None:
        """The peer did what it was asked."""
        self.peers[peer].refusals = 0
