"""News of jobs among neighbours, and who the neighbours are.

Every peer keeps connections to up to NEIGHBOURS others (all of them in a small grid): the nearest by id, so that the graph
hangs together, and random ones, so that it is shallow. News is verified once and passed on once; who tells what is over
(an earlier leader that came back, a branch that lost) is told what replaced it.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from dht.core.identity import PeerId
from dht.core.membership import Certificate, Chain
from grid.core import limits
from grid.core.board import Board, Entry, standing
from grid.core.job import JobId, job_id, open_spec
from grid.core.messages import JobNews, JobsWanted
from grid.core.news import check_news
from grid.core.recovery import wins

if TYPE_CHECKING:
    from dht.node import Node
    from grid.post import PostOffice
    from grid.transport.mesh import Mesh

NEIGHBOUR_CHECK_S: Final = 1.0
FIRST_CHECK_S: Final = 1 / 16
"""After the start, and twice as long each time: who has just joined soon has neighbours, and hears no news before."""
RECHOOSE_S: Final = 60.0
"""Random neighbours are chosen anew this often, so that an unlucky graph doesn't stay."""
CORRECTED_MAX: Final = 1_024
"""Peers and jobs of which is remembered when the peer was last told that its news is over."""
log = logging.getLogger(__name__)


class Gossip:
    """The peer's part in spreading news."""

    def __init__(
        self,
        me: PeerId,
        grid: bytes,
        board: Board,
        node: Node,
        mesh: Mesh,
        post: PostOffice,
        check: Callable[[Chain], Certificate],
        rng: random.Random,
        heard: Callable[[JobId, Entry], None],
    ) -> None:
        self._me = me
        self._grid = grid
        self._board = board
        self._node = node
        self._mesh = mesh
        self._post = post
        self._check = check
        self._rng = rng
        self._heard = heard
        self._kept: set[PeerId] = set()
        self._corrected: OrderedDict[tuple[PeerId, JobId], float] = OrderedDict()

    # ---- news ----

    def tell(self, news: JobNews) -> None:
        """News of a job led here."""
        lineage = self._board.lineage(job_id(news.spec.payload), news)
        self._take(msgspec.structs.replace(news, lineage=lineage), None)

    def hear(self, news: JobNews, by: PeerId) -> None:
        """News from a neighbour. Raises RefusedError, BadSignature, MembershipError, CodecError."""
        self._take(news, by)

    def _take(self, news: JobNews, by: PeerId | None) -> None:
        job = job_id(news.spec.payload)
        spec = self._board.spec(job)
        if spec is None:
            job, spec = open_spec(news.spec, self._check, self._grid)
        if by is not None and (self._board.is_news(job, news) or self._board.is_conflict(job, news)):
            known = self._board.get(job)
            check_news(news, spec, known.voters if known else (), known.news if known else None)
        fresh = self._board.hear(job, spec, news, trio.current_time())
        entry = self._board.get(job)
        if entry is None:  # the table is full of jobs that matter more
            return
        if fresh and news.leader != self._me:
            self._mesh.learn(PeerId(news.leader), [news.leader_address])
        self._heard(job, entry)
        if fresh:
            for peer in self._mesh.neighbours():
                if peer != by and peer != news.leader:
                    self._post.post(peer, news)
        elif by is not None and wins(standing(entry.news), standing(news)):
            self._correct(by, job, entry, news)

    def _correct(self, by: PeerId, job: JobId, entry: Entry, news: JobNews) -> None:
        """Tell who is behind; now and then only, for an outdated message may have been under way for long."""
        if entry.live and (news.branch.name, news.epoch) == (entry.news.branch.name, entry.news.epoch):
            return
        now_s = trio.current_time()
        if now_s - self._corrected.get((by, job), -limits.ANNOUNCE_S) < limits.ANNOUNCE_S:
            return
        self._corrected[by, job] = now_s
        self._corrected.move_to_end((by, job))
        while len(self._corrected) > CORRECTED_MAX:
            self._corrected.popitem(last=False)
        self._post.post(by, entry.news)

    def wanted(self, peer: PeerId) -> None:
        """A neighbour asks for all live news."""
        for _, entry in self._board.live(trio.current_time()):
            self._post.post(peer, entry.news)

    def up(self, peer: PeerId) -> None:
        """A connection stands: learn what a neighbour knows."""
        if peer in self._kept:
            self._post.post(peer, JobsWanted())

    # ---- neighbours ----

    async def run(self) -> None:
        """Keep the neighbours connected, until cancelled."""
        chosen_s = -RECHOOSE_S
        pause_s = FIRST_CHECK_S
        while True:
            now_s = trio.current_time()
            contacts = {contact.id: contact for contact in self._node.contacts() if contact.id != self._me}
            gone = self._kept - set(contacts)
            if gone or now_s - chosen_s >= RECHOOSE_S or len(self._kept) < min(limits.NEIGHBOURS, len(contacts)):
                chosen_s = now_s
                self._choose(set(contacts))
            for peer in sorted(self._kept):
                self._mesh.keep(peer, [contacts[peer].address] if peer in contacts else [])
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, NEIGHBOUR_CHECK_S)

    def _choose(self, peers: set[PeerId]) -> None:
        own = int.from_bytes(self._me, "big")
        near = sorted(peers, key=lambda peer: int.from_bytes(peer, "big") ^ own)[: limits.NEIGHBOURS // 2]
        rest = sorted(peers - set(near))
        chosen = {*near, *self._rng.sample(rest, min(len(rest), limits.NEIGHBOURS - len(near)))}
        for peer in sorted(self._kept - chosen):
            self._mesh.unkeep(peer)
        for peer in sorted((chosen - self._kept).intersection(self._mesh.connected())):
            self._post.post(peer, JobsWanted())
        self._kept = chosen
