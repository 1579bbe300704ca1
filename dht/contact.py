"""Contacts: where a peer can be reached, as the kademlia package's nodes, and what this peer remembers of each.

Rules this file keeps:

- a contact's id is the hash of its key, never something it says;
- what is remembered of peers is bounded; the least recently used is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kademlia.node import Node as KademliaNode

from dht.core.datagram import NO_TOKEN
from dht.core.identity import PeerId, peer_id
from dht.network import Address

PEERS_REMEMBERED_MAX = 4_096
"""Peers whose token and round trip time are remembered, about 300 B each."""
RTT_GAIN = 0.25
"""Weight of a new sample in what a peer needs beyond the usual round trip time."""
USUAL_RTT_S = 0.05
"""Taken for the usual round trip until some were measured."""
USUAL_RTT_GAIN = 0.2
"""Weight of a new sample, of any peer, in the usual round trip time."""
FALL_FACTOR = 3
"""What falls is believed so much sooner: too short a wait costs a datagram, too long a one costs time."""


class Contact(KademliaNode):  # type: ignore[misc]
    """A peer's key and address. Two contacts are equal when both are."""

    id: PeerId
    long_id: int

    def __init__(self, key: bytes, address: Address) -> None:
        super().__init__(peer_id(key), address[0], address[1])
        self.key = key

    @property
    def address(self) -> Address:
        return self.ip, self.port

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contact) and (self.key, self.address) == (other.key, other.address)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Contact({self.id.hex()[:8]} at {self.ip}:{self.port})"


class Target(KademliaNode):  # type: ignore[misc]
    """A point in the id space: what a lookup looks for."""

    def __init__(self, id_: bytes) -> None:
        super().__init__(id_)


@dataclass
class PeerState:
    """What is remembered of one peer. Times are monotonic seconds."""

    token: bytes = NO_TOKEN
    token_address: Address | None = None
    beyond_usual_s: float = 0.0  # its smoothed round trip time, less the usual one at each measurement
    heard_s: float = float("-inf")
    misses: int = 0
    missed_s: float = float("-inf")
    advertised: Address | None = None  # where it wants to be contacted, once proven


class PeerStates:
    """The memory of peers by id."""

    def __init__(self, peers_max: int = PEERS_REMEMBERED_MAX) -> None:
        self._states: OrderedDict[bytes, PeerState] = OrderedDict()
        self._peers_max = peers_max
        self.usual_rtt_s = USUAL_RTT_S
        """Smoothed over all peers: what to expect of one that wasn't measured yet, or of a machine that is busy."""

    def __len__(self) -> int:
        return len(self._states)

    def of(self, id_: bytes) -> PeerState:
        """The state of a peer, a fresh one if it isn't remembered."""
        state = self._states.get(id_)
        if state is None:
            state = self._states[id_] = PeerState()
            while len(self._states) > self._peers_max:
                self._states.popitem(last=False)
        else:
            self._states.move_to_end(id_)
        return state

    def peek(self, id_: bytes) -> PeerState | None:
        """The state of a peer if it is remembered; doesn't count as use."""
        return self._states.get(id_)

    def sample(self, id_: bytes, rtt_s: float, *, is_exact: bool) -> None:
        """Take in a round trip to a peer: measured, or an upper bound where several sendings preceded the answer.

        Of the peer itself only what was measured says something (Karn's rule). The usual time takes in both: else, on a
        machine that got slower than the first wait, no sample were ever taken, each request were sent three times, and
        what is busy made busier.
        """
        if is_exact:
            state = self.of(id_)
            state.beyond_usual_s = _smoothed(state.beyond_usual_s, rtt_s - self.usual_rtt_s, RTT_GAIN)
        self.usual_rtt_s = _smoothed(self.usual_rtt_s, rtt_s, USUAL_RTT_GAIN)

    def rtt_s(self, id_: bytes) -> float:
        """What a round trip to this peer should take: the usual time, which follows how busy this machine is, and what
        the peer needs beyond that."""
        state = self._states.get(id_)
        return max(0.0, self.usual_rtt_s + (0.0 if state is None else state.beyond_usual_s))

    def forget(self, id_: bytes) -> None:
        self._states.pop(id_, None)


def _smoothed(before: float, sample: float, gain: float) -> float:
    return before + (gain if sample > before else FALL_FACTOR * gain) * (sample - before)
