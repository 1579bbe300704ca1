"""A leader and its helpers in one process: real sites, leaders, remotes and signatures; fake workers, post and blobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import trio
from blake3 import blake3

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.api import wire
from grid.core.bundle import StageOptions
from grid.core.messages import Give, Message, Nothing
from grid.leader import Leader
from grid.outreach import Outreach
from grid.producer import Producer
from grid.remote import Remote
from tests.core.fakes import FUNCTION, JOB, FakeData, FakePost, Place, segment_bytes
from tests.core.material import LEADER, OTHER, THIEF
from tests.core.test_leader import Driver

IDENTITIES = (THIEF, OTHER, Identity(b"x" * 32))


class Helper:
    """A peer that does not lead."""

    def __init__(self, team: Team, identity: Identity, folder: Path, slots: int) -> None:
        self.id: PeerId = identity.id
        self.post = FakePost()
        self.data = FakeData(folder / "blobs", team.blobs)
        self.remote = Remote(JOB, team.epoch, team.id, cast(Any, self.data), identity, identity.id, cast(Any, self.post))
        self.place = Place(team.nursery, folder / "spool", self.remote, slots)
        self.place.site._fetch = self._fetch
        self.remote.attach(self.place.site)
        self.site = self.place.site

    async def _fetch(self, stage: Any, held: Any) -> None:
        try:
            held.body = bodies.whole_file(str(await self.data.path(held.blob, held.segment.size)), owned=False)
        except OSError as error:
            held.error = str(error)


class Team:
    """The leader's peer and its helpers. Messages wait in each one's post until a test hands them over."""

    def __init__(
        self,
        nursery: trio.Nursery,
        folder: Path,
        helpers: int = 1,
        slots: int = 0,
        identity: Identity = LEADER,
        epoch: int = 1,
    ) -> None:
        self.id, self.epoch = identity.id, epoch
        self.nursery = nursery
        self.folder = folder
        self.blobs: dict[bytes, bytes] = {}
        self.post = FakePost()
        self.data = FakeData(folder / "blobs", self.blobs)
        self.leader = Leader(JOB, identity.id, StageOptions(), bodies.Spool(folder / "spool"), lambda *entry: None)
        self.place = Place(nursery, folder / "spool", self.leader, slots)
        self.site = self.leader.site = self.place.site
        self.outreach = Outreach(self.leader, cast(Any, self.data), identity, epoch, cast(Any, self.post), nursery)
        self.driver = Driver(self.leader.spool)
        self.producer = Producer(self.leader, self.driver.post, nested=False)
        self.helpers = [Helper(self, IDENTITIES[n], folder / f"helper{n}", slots=0) for n in range(helpers)]

    def open(self, stage: int = 0, function: bytes = FUNCTION, ordered: bool = True, **options: Any) -> None:
        self.producer.handle(wire.Define(stage, "f"), function)
        self.producer.handle(wire.Stage(stage, stage, "f", ordered, wire.Options(**options)), b"")

    def page(self, *sizes: int, stage: int = 0, filler: int = 0) -> None:
        first = lo = self.leader.ledger.stage(stage).declared
        pieces = []
        for size in sizes:
            pieces.append(segment_bytes(lo, lo + size) + b" " * filler)
            lo += size
        self.producer.handle(wire.Page(stage, first, sizes, tuple(map(len, pieces))), b"".join(pieces))

    async def steal(self, helper: Helper, victim: Helper | None = None, slots: int = 1) -> Message:
        """One question and its answer; what it brought is the helper's then."""
        question = helper.remote.ask(slots)
        answer = await (self.outreach.steal(helper.id, question) if victim is None else victim.remote.steal(helper.id, question))
        if isinstance(answer, Give):
            await helper.remote.take(self.id if victim is None else victim.id, answer)
        else:
            assert isinstance(answer, Nothing)
        return answer

    async def deliver(self) -> None:
        """Hand over everything that was posted, until nothing is."""
        peers = {helper.id: helper for helper in self.helpers}
        while self.post.sent or any(helper.post.sent for helper in self.helpers):
            sent, self.post.sent = self.post.sent, []
            for to, message in sent:
                if to in peers:
                    await peers[to].remote.handle(self.id, message)
            for helper in self.helpers:
                sent, helper.post.sent = helper.post.sent, []
                for to, message in sent:
                    if to == self.id:
                        await self.outreach.handle(helper.id, message)
                    else:
                        await peers[to].remote.handle(helper.id, message)

    @property
    def function(self) -> bytes:
        return blake3(FUNCTION).digest()
