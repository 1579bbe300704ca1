"""A leader's own slots, when they have nothing to do, take back queued ranges from those who hold most.

Otherwise a leader would idle at a stage's end while thieves work off their queues. Rules: it asks only while slots are free
and its deque is empty; what it gets is signed, checked and acknowledged like any grant; it still holds every segment, so
only ranges come.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from dht.core.codec import CodecError
from dht.core.identity import BadSignature, PeerId
from grid.bell import Bell
from grid.core import limits
from grid.core.bundle import check_grant
from grid.core.errors import GridError
from grid.core.messages import Give, GrantTaken, Message, Steal
from grid.leader import Leader, PeerTally
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.outreach import Outreach
    from grid.post import PostOffice

Request = Callable[[PeerId, Message, float], Awaitable[Message]]
log = logging.getLogger(__name__)


class TakeBack:
    """One leadership's stealing from its thieves."""

    def __init__(self, leader: Leader, outreach: Outreach, epoch: int, post: PostOffice, request: Request) -> None:
        self._leader = leader
        self._outreach = outreach
        self._epoch = epoch
        self._post = post
        self._request = request
        self._bell = Bell()

    def hungry(self) -> None:
        """Slots may have come free."""
        if self._wanting():
            self._bell.ring()

    def _wanting(self) -> bool:
        site = self._leader.site
        workshop = site.workshop
        if workshop.draining or not site.quiet or workshop.free <= 0:
            return False
        return self._leader.unsettled > site.in_hand  # else all that is left runs here already

    async def run(self) -> None:
        """Ask while there is room, until cancelled."""
        backoff_s = limits.STEAL_BACKOFF_S
        while True:
            if not self._wanting():
                await self._bell.wait()
                backoff_s = limits.STEAL_BACKOFF_S
                continue
            if await self._ask_one():
                backoff_s = limits.STEAL_BACKOFF_S
                continue
            with trio.move_on_after(backoff_s):
                await self._bell.wait()
            backoff_s = min(2 * backoff_s, limits.STEAL_BACKOFF_S_MAX)

    async def _ask_one(self) -> bool:
        """Ask whoever claims most; True when that brought work."""
        me = self._leader.me
        for victim in self._outreach.hints(me)[:1]:
            stages = ((0, self._leader.ledger.next_stage),)
            tags = tuple(sorted(self._leader.site.workshop.tags))
            steal = Steal(self._leader.job, self._epoch, self._leader.site.workshop.free, tags, stages, bare=True)
            try:
                answer = await self._request(victim, steal, limits.STEAL_TIMEOUT_S)
                return isinstance(answer, Give) and self._take(victim, answer)
            except (TransportError, GridError, BadSignature, CodecError, trio.TooSlowError) as error:
                log.debug("nothing to take back from %s: %s", victim.hex()[:8], error)
        return False

    def _take(self, victim: PeerId, give: Give) -> bool:
        leader = self._leader
        grant, works = check_grant(give.grant, victim, leader.me, leader.job, self._epoch)
        taken = 0
        for work in works:
            taken += leader.take_back(work)
        leader.tallies.setdefault(leader.me, PeerTally()).stolen += taken
        self._post.post(victim, GrantTaken(leader.job, grant.number))
        return taken > 0
