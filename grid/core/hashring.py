"""Which peers a name falls to: a consistent-hash ring (Karger et al. 1997), so that two peers that know about the same others
look for a thing at about the same few of them, though nobody wrote down where it went.

Rules: deterministic; a peer that comes or goes moves only what falls to it. No I/O.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final

from blake3 import blake3

from dht.core.identity import PeerId

POINTS_A_PEER: Final = 8
"""Places of one peer on the ring: the fullest of a hundred peers then gets about twice the mean."""
POINT_BYTES: Final = 8


class HashRing:
    """Peers, ordered anew for each name."""

    def __init__(self) -> None:
        self._points: list[tuple[int, PeerId]] = []
        self._peers: set[PeerId] = set()  # for membership only: never iterated

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._peers

    def add(self, peer: PeerId) -> None:
        """Idempotent."""
        if peer not in self._peers:
            self._peers.add(peer)
            for point in _points(peer):
                insort(self._points, (point, peer))

    def remove(self, peer: PeerId) -> None:
        """Idempotent."""
        if peer in self._peers:
            self._peers.discard(peer)
            for point in _points(peer):
                del self._points[bisect_left(self._points, (point, peer))]

    def walk(self, name: bytes) -> Iterator[PeerId]:
        """Every peer once, from where the name (uniform bytes: a hash) lies. The ring must not change meanwhile."""
        start = bisect_left(self._points, (int.from_bytes(name[:POINT_BYTES]), b""))
        seen: set[PeerId] = set()
        for at in range(start, start + len(self._points)):
            peer = self._points[at % len(self._points)][1]
            if peer not in seen:
                seen.add(peer)
                yield peer


def _points(peer: PeerId) -> list[int]:
    digest = blake3(peer).digest(POINT_BYTES * POINTS_A_PEER)
    return [int.from_bytes(digest[at : at + POINT_BYTES]) for at in range(0, len(digest), POINT_BYTES)]
