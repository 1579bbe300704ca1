"""What a peer asks others about replicas, and what their connections say of their age.

Rules: every question has a time limit; no answer, a refusal and garbage are the same: None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from dht.core.codec import CodecError
from dht.core.identity import PeerId
from grid.bell import Bell
from grid.core import choice
from grid.core.messages import Enlist, Enlisted, Message, Survey, Surveyed, decode, encode
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.replica_ports import Links

ENLIST_S: Final = 1.0
"""For the candidates of a new group to answer; who is later is taken in afterwards, as a learner."""
ENLIST_FIRST_S: Final = 3.0
"""More, for one at least."""
ENLIST_LATE_S: Final = 5.0
"""For a single peer that is to join a group that runs."""
log = logging.getLogger(__name__)


class Asking:
    """One peer's questions."""

    def __init__(self, me: PeerId, started_s: float, links: Links, wall: Callable[[], float]) -> None:
        """started_s: since when this peer runs. wall: unix time."""
        self.started_s = started_s
        self._me = me
        self._links = links
        self._wall = wall

    def ages(self) -> dict[PeerId, float]:
        """This peer and those connected that may hold replicas, and since when they run (unix time)."""
        ages = {self._me: self.started_s}
        for peer in self._links.connected():
            hello = self._links.hello(peer)
            age = choice.started_s(hello.info, self._wall()) if hello is not None else None
            if age is not None:
                ages[peer] = age
        return ages

    async def request(self, peer: PeerId, message: Message, timeout_s: float) -> Message | None:
        """The answer."""
        try:
            with trio.move_on_after(timeout_s):
                return decode(await self._links.request(peer, encode(message), timeout_s))
        except (TransportError, OSError, CodecError, trio.TooSlowError) as error:
            log.debug("peer %s: %s: %s", peer.hex()[:8], type(message).__name__, error)
        return None

    async def survey(self, peer: PeerId, survey: Survey, timeout_s: float) -> Surveyed | None:
        """What a peer has of a job."""
        answer = await self.request(peer, survey, timeout_s)
        return answer if isinstance(answer, Surveyed) else None

    async def enlist(self, peer: PeerId, enlist: Enlist, timeout_s: float = ENLIST_LATE_S) -> int | None:
        """The incarnation under which a peer holds a replica now."""
        answer = await self.request(peer, enlist, timeout_s)
        return answer.incarnation if isinstance(answer, Enlisted) else None

    async def gather(self, candidates: Sequence[PeerId], enlist: Enlist) -> dict[PeerId, int]:
        """Who enlisted within ENLIST_S, or the first one after that, and their incarnations."""
        members: dict[PeerId, int] = {}
        waiting = set(candidates)
        answered = Bell()

        async def ask(peer: PeerId) -> None:
            incarnation = await self.enlist(peer, enlist, ENLIST_S + ENLIST_FIRST_S)
            if incarnation is not None:
                members[peer] = incarnation
            waiting.discard(peer)
            answered.ring()

        async with trio.open_nursery() as nursery:
            for peer in candidates:
                nursery.start_soon(ask, peer)
            with trio.move_on_after(ENLIST_S):
                while waiting:
                    await answered.wait()
            with trio.move_on_after(ENLIST_FIRST_S):
                while waiting and not members:
                    await answered.wait()
            nursery.cancel_scope.cancel()
        return members
