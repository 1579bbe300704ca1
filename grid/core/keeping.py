"""Who shall hold copies of a job's blobs: what its leader wants kept, who keeps it, whom to ask next, what is lost.

Rules:
- a copy counts when the peer, asked to keep the blob, said that it does (on its disk), and while the peer is connected;
- what is missing is asked for at once, inputs, code and outcome first: of peers that have the bytes already, then (for those)
  of the job's replicas, then of whom the blob's name falls to on a ring of all connected peers, so that a later leader finds
  copies that no fact tells it of;
- what is asked for is bounded, for each peer and in all; who refuses or does not answer is left alone for a while;
- a blob with no copy at hand is looked for at its old holders, the replicas and the first on its ring; when none of them has
  it and LOST_AFTER_S went by, it is reported lost, once: whoever needs it makes it again (the ranges that refer to it).
Deterministic: time is an argument, in seconds of any clock. No I/O.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from dht.core.identity import PeerId
from grid.core.asks import Asks, Load
from grid.core.hashring import HashRing

COPY_BYTES_PER_S: Final = 100e6
"""What a gigabit network copies. A result that was made faster than that is made again when its only copy is lost."""
RESULT_COPIES: Final = 2
"""Holders of a result that took longer to make than to copy: one may be lost at any time."""
BLOBS_MAX: Final = 1 << 16
"""Results watched for one job, about 40 MB of tables; further ones have no second copy. Vital blobs always fit."""
SHUN_S: Final = 30.0
"""Before a peer that refused a blob, or gave no answer, is asked for that one again."""
SEARCH_PEERS_MAX: Final = 32
"""Peers on a blob's ring that are considered for it."""
SEARCH_AT_ONCE: Final = 4
"""Peers asked at a time for a blob that nobody at hand holds."""
SOURCES_MAX: Final = 8
"""Peers named to copy from in one order."""
LOST_AFTER_S: Final = 10.0
"""A blob whose last holder went away may come back with it within so long: a connection's hiccup is no loss."""
SCAN_MAX: Final = 256
"""Blobs looked at for one plan, so that a plan's cost does not grow with what waits."""


def worth_a_copy(size: int, made_s: float) -> bool:
    """Whether bytes took longer to make than they take to copy."""
    return made_s > size / COPY_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Order:
    """`peer` shall keep these (blob, size); `sources` (and the leader, if it holds them) have them."""

    peer: PeerId
    blobs: tuple[tuple[bytes, int], ...]
    sources: tuple[PeerId, ...]


@dataclass(slots=True)
class _Blob:
    size: int
    vital: bool
    copies: int
    required: dict[PeerId, None] = field(default_factory=dict)  # each of these shall hold it, besides `copies`
    holders: dict[PeerId, None] = field(default_factory=dict)  # keep it, and are connected
    near: dict[PeerId, None] = field(default_factory=dict)  # said to have the bytes, connected or not; not sworn to keep them
    asked: dict[PeerId, float] = field(default_factory=dict)  # until when an answer is waited for
    blind: dict[PeerId, None] = field(default_factory=dict)  # of those, who was asked when nobody had the blob
    shunned: dict[PeerId, float] = field(default_factory=dict)  # until when


class Keeping:
    """One job's table, on its leader. `me` is a peer like others: it is asked to make its copies durable."""

    def __init__(self, me: PeerId) -> None:
        self.me = me
        self._blobs: dict[bytes, _Blob] = {}
        self._results = 0
        self._asks = Asks()
        self._peers = self._asks.peers  # those connected
        self._ring = HashRing()
        self._replicas: tuple[PeerId, ...] = ()
        self._index: dict[PeerId, dict[bytes, None]] = {}  # blobs whose tables name the peer
        self._open: tuple[dict[bytes, None], dict[bytes, None]] = ({}, {})  # to be looked at: vital ones, results
        self._blocked: dict[bytes, None] = {}  # nobody can be asked for what they lack
        self._orphans: dict[bytes, float] = {}  # no copy at hand since then
        self._told: dict[bytes, None] = {}  # reported lost
        self._alarms: list[tuple[float, bytes, PeerId]] = []  # when an ask, a shun of a blob or (b"") of a peer ends
        self.up(me)

    # ---- peers ----

    @property
    def peers(self) -> list[PeerId]:
        """Those connected, this one included."""
        return list(self._peers)

    def up(self, peer: PeerId) -> None:
        """The peer is connected: it may hold what it held before."""
        if peer in self._peers:
            return
        self._peers[peer] = Load()
        self._ring.add(peer)
        for name in self._index.get(peer, ()):
            blob = self._blobs[name]
            blob.shunned.pop(peer, None)
            if peer in blob.near:
                self._found(name)
            self._reopen(name)
        self._reopen_blocked()

    def down(self, peer: PeerId, now_s: float) -> None:
        """The connection ended: its copies don't count until it is back and says so again."""
        if peer == self.me or self._peers.pop(peer, None) is None:
            return
        self._ring.remove(peer)
        for name in list(self._index.get(peer, ())):
            blob = self._blobs[name]
            if blob.asked.pop(peer, None) is not None:
                self._asks.end(peer, blob.size)
            if peer in blob.holders:
                del blob.holders[peer]
                blob.near[peer] = None
            self._unindex(name, blob, peer)
            self._reopen(name)
            self._check_sources(name, blob, now_s)

    def set_replicas(self, replicas: Iterable[PeerId]) -> None:
        """The job's replica set: asked first to hold vital blobs."""
        self._replicas = tuple(replicas)
        self._reopen_blocked()

    # ---- blobs ----

    def add(
        self, name: bytes, size: int, copies: int, *, vital: bool = False, near: Iterable[PeerId] = (), now_s: float
    ) -> bool:
        """Watch a blob, or want more copies of one that is watched. near: who has the bytes. False: the table is full."""
        blob = self._blobs.get(name)
        if blob is None:
            if not vital and self._results >= BLOBS_MAX:
                return False
            blob = self._blobs[name] = _Blob(size, vital, copies)
            self._results += not vital
        elif vital and not blob.vital:
            blob.vital = True
            self._results -= 1
            self._open[1].pop(name, None)
        blob.copies = max(blob.copies, copies)
        self._told.pop(name, None)  # it was made again, or is to be looked for again
        for peer in near:
            self.said(peer, name)
        self._reopen(name)
        self._check_sources(name, blob, now_s)
        return True

    def require(self, name: bytes, peers: Iterable[PeerId]) -> None:
        """Each of these peers shall hold the blob (which is watched)."""
        self._blobs[name].required.update(dict.fromkeys(peers))
        self._reopen(name)

    def forget(self, name: bytes) -> None:
        """Nobody needs the blob any more. Who keeps it does so until the job is over."""
        blob = self._blobs.pop(name, None)
        if blob is None:
            return
        self._results -= not blob.vital
        for peer in blob.asked:
            self._asks.end(peer, blob.size)
        for peer in dict.fromkeys([*blob.holders, *blob.near, *blob.asked, *blob.shunned]):
            self._drop_index(name, peer)
        for table in (*self._open, self._blocked, self._orphans, self._told):
            table.pop(name, None)

    def said(self, peer: PeerId, name: bytes) -> None:
        """The peer has the bytes, though nobody asked it to keep them."""
        blob = self._blobs.get(name)
        if blob is None or peer in blob.holders or peer in blob.near:
            return
        while len(blob.near) >= SEARCH_PEERS_MAX:
            oldest = next(iter(blob.near))
            del blob.near[oldest]
            self._unindex(name, blob, oldest)
        blob.near[peer] = None
        self._index.setdefault(peer, {})[name] = None
        if peer in self._peers:
            self._found(name)
            self._reopen(name)

    # ---- answers ----

    def kept(self, peer: PeerId, name: bytes) -> None:
        """The peer says that it keeps the blob: a copy, if it was asked to; else merely somebody who has the bytes."""
        blob = self._blobs.get(name)
        if blob is None or peer not in self._peers:
            return
        if peer not in blob.asked and peer not in blob.shunned:
            self.said(peer, name)
            return
        if blob.asked.pop(peer, None) is not None:
            self._asks.end(peer, blob.size)
        self._asks.obeyed(peer)
        blob.shunned.pop(peer, None)
        blob.near.pop(peer, None)
        blob.holders[peer] = None
        self._found(name)
        self._reopen(name)

    def refused(self, peer: PeerId, name: bytes, now_s: float) -> None:
        """The peer can't keep the blob, and does not hold it."""
        blob = self._blobs.get(name)
        if blob is None:
            return
        asked = blob.asked.pop(peer, None) is not None
        blob.holders.pop(peer, None)
        blob.near.pop(peer, None)
        if asked:
            self._asks.end(peer, blob.size)
            blind, sourced = peer in blob.blind, self._sourced(blob)
            blob.blind.pop(peer, None)
            if sourced and not blind:
                self._shun_peer(peer, now_s)
            if not (sourced and blind):  # else it had nobody to copy from, and has now
                self._shun(name, blob, peer, now_s)
        else:
            self._unindex(name, blob, peer)
        self._reopen(name)
        self._check_sources(name, blob, now_s)

    # ---- what to do ----

    def plan(self, now_s: float) -> list[Order]:
        """Whom to ask now for what: the asks are taken as made."""
        self._end_waits(now_s)
        asks: dict[PeerId, list[bytes]] = {}
        for queue in self._open:
            for name in list(islice(queue, SCAN_MAX)):
                if self._asks.full:
                    break
                self._place(name, asks, now_s)
        return [self._order(peer, names) for peer, names in asks.items()]

    def lost(self, now_s: float) -> list[bytes]:
        """Blobs that nobody at hand holds, each once."""
        found = []
        for name, since_s in self._orphans.items():
            blob = self._blobs[name]
            if now_s - since_s >= LOST_AFTER_S and not blob.asked and name in self._blocked:
                found.append(name)
        for name in found:
            del self._orphans[name]
            self._told[name] = None
        return found

    def wake_s(self, now_s: float) -> float | None:
        """When `plan` and `lost` may have something new by the passage of time alone."""
        times = [self._alarms[0][0]] if self._alarms else []
        times += islice((at for since_s in self._orphans.values() if (at := since_s + LOST_AFTER_S) > now_s), 1)  # by age
        return min(times, default=None)

    # ---- look ----

    def __contains__(self, name: bytes) -> bool:
        return name in self._blobs

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def asks(self) -> int:
        """Blobs asked for and not answered for, counted for each peer."""
        return self._asks.count

    def size(self, name: bytes) -> int:
        """In bytes. Raises KeyError for a blob that is not watched."""
        return self._blobs[name].size

    def keeps(self, peer: PeerId, name: bytes) -> bool:
        """Whether the peer is connected and swore to keep the blob."""
        blob = self._blobs.get(name)
        return blob is not None and peer in blob.holders

    def holders(self, name: bytes) -> list[PeerId]:
        """Connected peers that have the blob, those first that keep it."""
        blob = self._blobs.get(name)
        return self._sources(blob) if blob is not None else []

    def search(self, name: bytes) -> list[PeerId]:
        """Connected peers in the order in which one should ask for a blob, watched or not; this one not among them."""
        found = dict.fromkeys([*self.holders(name), *(peer for peer in self._replicas if peer in self._peers)])
        found.update(dict.fromkeys(islice(self._ring.walk(name), SEARCH_PEERS_MAX)))
        found.pop(self.me, None)
        return list(found)

    def short(self) -> list[bytes]:
        """Blobs with fewer copies than wanted."""
        return [name for name, blob in self._blobs.items() if self._missing(blob) > 0 or self._absent(blob)]

    # ---- choosing ----

    def _missing(self, blob: _Blob) -> int:
        return blob.copies - len(blob.holders)

    def _absent(self, blob: _Blob) -> list[PeerId]:
        return [peer for peer in blob.required if peer not in blob.holders]

    def _place(self, name: bytes, asks: dict[PeerId, list[bytes]], now_s: float) -> None:
        """Ask for what a blob lacks, as far as it goes; then it is out of the queue, or at its end."""
        blob = self._blobs[name]
        sourced = self._sourced(blob)
        full = False
        spoken_for = 0  # copies that wait for room at who has the bytes already: cheaper than a third peer
        for peer, required in self._candidates(name, blob):
            enough = self._missing(blob) <= len(blob.asked) + spoken_for if sourced else len(blob.asked) >= SEARCH_AT_ONCE
            if enough and not (required and sourced):
                break
            if peer not in self._peers or peer in blob.holders or peer in blob.asked or peer in blob.shunned:
                continue
            if self._asks.shunned(peer, now_s):
                continue
            if not self._asks.room(peer, blob.size):
                full = True
                spoken_for += peer in blob.near
                continue
            self._ask(name, blob, peer, now_s)
            asks.setdefault(peer, []).append(name)
        self._close(name)
        if full:
            self._reopen(name)  # at the end
        elif self._missing(blob) > len(blob.asked) or any(peer not in blob.asked for peer in self._absent(blob)):
            self._blocked[name] = None

    def _candidates(self, name: bytes, blob: _Blob) -> Iterator[tuple[PeerId, bool]]:
        """Whom to ask, best first, and whether it must hold the blob in any case."""
        for peer in blob.required:
            yield peer, True
        for peer in list(blob.near):
            yield peer, False
        for peer in self._replicas if blob.vital or not self._sourced(blob) else ():
            yield peer, False
        for peer in islice(self._ring.walk(name), SEARCH_PEERS_MAX):
            yield peer, False

    def _ask(self, name: bytes, blob: _Blob, peer: PeerId, now_s: float) -> None:
        blob.asked[peer] = self._asks.begin(peer, blob.size, now_s)
        if self._sourced(blob):
            blob.blind.pop(peer, None)
        else:
            blob.blind[peer] = None
        self._index.setdefault(peer, {})[name] = None
        heapq.heappush(self._alarms, (blob.asked[peer], name, peer))

    def _order(self, peer: PeerId, names: Sequence[bytes]) -> Order:
        sources = dict.fromkeys(source for name in names for source in self._sources(self._blobs[name]))
        sources.pop(peer, None)
        named = tuple(islice((source for source in sources if source != self.me), SOURCES_MAX))
        return Order(peer, tuple((name, self._blobs[name].size) for name in names), named)

    def _sources(self, blob: _Blob) -> list[PeerId]:
        return [*blob.holders, *(peer for peer in blob.near if peer in self._peers)]

    def _sourced(self, blob: _Blob) -> bool:
        return bool(blob.holders) or any(peer in self._peers for peer in blob.near)

    # ---- bookkeeping ----

    def _shun(self, name: bytes, blob: _Blob, peer: PeerId, now_s: float) -> None:
        blob.shunned[peer] = now_s + SHUN_S
        self._index.setdefault(peer, {})[name] = None
        heapq.heappush(self._alarms, (now_s + SHUN_S, name, peer))

    def _shun_peer(self, peer: PeerId, now_s: float) -> None:
        until_s = self._asks.shun(peer, now_s)
        if until_s is not None:
            heapq.heappush(self._alarms, (until_s, b"", peer))

    def _end_waits(self, now_s: float) -> None:
        """Answers that did not come, and who may be asked again."""
        while self._alarms and self._alarms[0][0] <= now_s:
            _, name, peer = heapq.heappop(self._alarms)
            blob = self._blobs.get(name)
            if blob is None:
                if not name:
                    self._reopen_blocked()
                continue
            if blob.asked.get(peer, now_s + 1) <= now_s:
                del blob.asked[peer]
                self._asks.end(peer, blob.size)
                blob.near.pop(peer, None)
                self._shun_peer(peer, now_s)
                self._shun(name, blob, peer, now_s)
                self._check_sources(name, blob, now_s)
            elif blob.shunned.get(peer, now_s + 1) <= now_s:
                del blob.shunned[peer]
                self._unindex(name, blob, peer)
            self._reopen(name)

    def _check_sources(self, name: bytes, blob: _Blob, now_s: float) -> None:
        if not self._sourced(blob) and name not in self._told:
            self._orphans.setdefault(name, now_s)

    def _found(self, name: bytes) -> None:
        """Somebody has the blob: who refused while nobody had it may be asked again."""
        if name in self._orphans or name in self._told:
            blob = self._blobs[name]
            self._orphans.pop(name, None)
            self._told.pop(name, None)
            shunned, blob.shunned = blob.shunned, {}
            for peer in shunned:
                self._unindex(name, blob, peer)

    def _reopen(self, name: bytes) -> None:
        """Look at the blob again if it lacks something that is not asked for."""
        blob = self._blobs[name]
        if self._missing(blob) > len(blob.asked) or any(peer not in blob.asked for peer in self._absent(blob)):
            self._blocked.pop(name, None)
            self._open[0 if blob.vital else 1][name] = None
        else:
            self._close(name)

    def _close(self, name: bytes) -> None:
        for table in (*self._open, self._blocked):
            table.pop(name, None)

    def _reopen_blocked(self) -> None:
        for name in list(self._blocked):
            self._reopen(name)

    def _unindex(self, name: bytes, blob: _Blob, peer: PeerId) -> None:
        if not (peer in blob.holders or peer in blob.near or peer in blob.asked or peer in blob.shunned):
            self._drop_index(name, peer)

    def _drop_index(self, name: bytes, peer: PeerId) -> None:
        names = self._index.get(peer)
        if names is not None:
            names.pop(name, None)
            if not names:
                del self._index[peer]
