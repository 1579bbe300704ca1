"""Stand-ins for processes, blobs and the mesh, for tests of one job's site and leader."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import trio
from blake3 import blake3

from dht.core.identity import PeerId
from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core.bundle import StageOptions
from grid.core.job import JobId
from grid.core.segments import Segment
from grid.site import Held, Site, SiteStage, Uplink
from grid.siteworker import SiteWorker
from grid.worker.process import ChildGone
from grid.workshop import Workshop

JOB = JobId(b"j" * 32)
FUNCTION = b"the function"
DIGEST = blake3(FUNCTION).digest()


def segment_bytes(lo: int, hi: int) -> bytes:
    """Arguments of tasks [lo, hi): their own numbers."""
    return json.dumps(list(range(lo, hi))).encode()


def result_bytes(lo: int, hi: int) -> bytes:
    """Results of tasks [lo, hi)."""
    return json.dumps([index * 10 for index in range(lo, hi)]).encode()


class FakeChild:
    """A worker as the site sees it. The test reads `posted` and says what it answers."""

    def __init__(self) -> None:
        self.posted: list[tuple[Any, bytes]] = []
        self.exited = trio.Event()
        self.status: int | None = None
        self.why = ""
        self.cell = (-1, 0)
        self.lingers = False
        self.takes_early = False
        self._said: deque[tuple[Any, bytes]] = deque()
        self._news = trio.Event()
        self._ended = False

    @property
    def frames(self) -> AsyncIterator[tuple[Any, bytes]]:
        return self._frames()

    async def _frames(self) -> AsyncIterator[tuple[Any, bytes]]:
        while True:
            while self._said:
                yield self._said.popleft()
            if self._ended:
                return
            self._news = trio.Event()
            await self._news.wait()

    def post(self, message: Any, body: bytes = b"") -> None:
        if self.exited.is_set():
            raise ChildGone
        self.posted.append((message, body))

    def arrived(self) -> Iterator[tuple[Any, bytes]]:
        while self._said:
            yield self._said.popleft()

    def progress(self) -> tuple[int, int]:
        return self.cell

    def kill(self, why: str = "killed") -> None:
        if not self.exited.is_set():
            self.why = self.why or why
            self.die(-9)

    def die(self, status: int) -> None:
        """It ended."""
        self.status = status
        self.exited.set()
        self.close_channel()

    def close_channel(self) -> None:
        """It closed its descriptors and goes on."""
        self._ended = True
        self._news.set()

    # ---- what it says ----

    def say(self, message: wire.Message, body: bytes = b"") -> None:
        assert not self._ended
        self._said.append((message, body))
        self._news.set()

    @property
    def runs(self) -> list[wire.Run]:
        """Bundles it was given."""
        return [message for message, _ in self.posted if isinstance(message, wire.Run)]

    def body_of(self, run: wire.Run) -> bytes:
        body = next(body for message, body in self.posted if message is run)
        return Path(run.path).read_bytes() if run.path else body

    def finish(self, run: wire.Run, hi: int | None = None, lo: int | None = None, elapsed_us: int = 1) -> None:
        """Report tasks of a bundle."""
        lo, hi = run.lo if lo is None else lo, run.hi if hi is None else hi
        arguments = json.loads(self.body_of(run))[lo - run.first : hi - run.first]
        assert arguments == list(range(lo, hi)), "a bundle with another's arguments"
        self.say(wire.Done(run.ticket, lo, hi, elapsed_us, hi == run.hi), result_bytes(lo, hi))

    def fail(self, run: wire.Run, index: int, kind: str = "raised") -> None:
        self.say(wire.Failed(run.ticket, index, kind, "ValueError", "no", "trace", 1, index + 1 == run.hi), b"pickle")


class FakeProcesses:
    """Starts FakeChilds. `errors`: what the next starts raise."""

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.errors: list[Exception] = []
        self.takes_early = False
        self.gate: trio.Event | None = None

    async def start_worker(self) -> Any:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        child = FakeChild()
        child.takes_early = self.takes_early
        self.children.append(child)
        return child


class FakeUplink:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.results: list[tuple[int, int, int, bytes]] = []
        self.failures: list[tuple[int, wire.Failed]] = []
        self.prints: list[bytes] = []
        self.relayed: list[wire.Message] = []
        self.closed: list[SiteWorker] = []
        self.back: list[tuple[int, int, int]] = []

    def result(self, stage: int, lo: int, hi: int, body: Body, elapsed_us: int) -> None:
        self.results.append((stage, lo, hi, bodies.read(body)))

    def failure(self, stage: int, failure: wire.Failed, exception: bytes) -> None:
        self.failures.append((stage, failure))

    def printed(self, message: wire.Print, data: bytes) -> None:
        self.prints.append(data)

    def relay(self, worker: SiteWorker, message: wire.Message, body: Body) -> None:
        self.relayed.append(message)

    def relay_closed(self, worker: SiteWorker) -> None:
        self.closed.append(worker)

    def disputed(self) -> None:
        raise AssertionError("no result of these tests is early")

    def returned(self, stage: int, lo: int, hi: int) -> None:
        self.back.append((stage, lo, hi))


class Fetches:
    """Segments of which a site has only the names: each fetch waits for its gate if there is one."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.gate = trio.Event()
        self.gate.set()
        self.fails = False

    async def __call__(self, stage: SiteStage, held: Held) -> None:
        self.began.append(held.segment.first)
        await self.gate.wait()
        if self.fails:
            held.error = "nobody has it"
        else:
            held.body = segment_bytes(held.segment.first, held.segment.end)


async def no_requests(post: Callable[[wire.ToChild], None], message: wire.Message, data: bytes) -> None:
    raise AssertionError("no child asked for anything")


class Place:
    """A site of fakes, with one stage 0 whose function is here."""

    def __init__(
        self,
        nursery: trio.Nursery,
        folder: Path,
        uplink: Uplink,
        slots: int = 1,
        workshop: Workshop | None = None,
        options: StageOptions | None = None,
    ) -> None:
        self.workshop = workshop or Workshop(cast(Any, None), slots)
        self.processes = FakeProcesses()
        self.fetches = Fetches()
        self.spool = bodies.Spool(folder)
        self.site = Site(JOB, self.workshop, cast(Any, self.processes), self.spool, uplink, nursery, self.fetches, no_requests)
        self.workshop.sites.append(self.site)
        if options is not None:
            self.site.add_stage(0, options, self.site.add_function(DIGEST, FUNCTION))

    @property
    def children(self) -> list[FakeChild]:
        return self.processes.children

    def hold(self, first: int, count: int, here: bool = True, stage: int = 0) -> None:
        """A segment of a stage."""
        data = segment_bytes(first, first + count)
        self.site.hold(stage, Segment(first, count, len(data)), data if here else None, blake3(data).digest())


async def settle() -> None:
    """Let everything that can run now run (under a MockClock: without a step in time)."""
    await trio.testing.wait_all_tasks_blocked()


class FakePost:
    """Every peer's outgoing messages, in order; delivered by the test."""

    def __init__(self) -> None:
        self.sent: list[tuple[PeerId, Any]] = []

    def post(self, peer: PeerId, item: Any) -> None:
        self.sent.append((peer, item))

    def post_frame(self, peer: PeerId, data: Any, job: JobId, token: int, frame: wire.Message, body: Body) -> None:
        self.sent.append((peer, (token, frame, body)))

    def take(self, kind: type[Any]) -> list[Any]:
        """Remove and return the messages of this kind."""
        found = [item for _, item in self.sent if isinstance(item, kind)]
        self.sent = [(peer, item) for peer, item in self.sent if not isinstance(item, kind)]
        return found


class FakeStore:
    """Pins are counted, nothing else."""

    def __init__(self) -> None:
        self.unpinned: list[bytes] = []

    def unpin(self, owner: str, blob: bytes | None = None) -> None:
        if blob is not None:
            self.unpinned.append(blob)


class FakeData:
    """Blobs of all peers in one dictionary, as files."""

    def __init__(self, folder: Path, blobs: dict[bytes, bytes] | None = None) -> None:
        self.job = JOB
        self.owner = JOB.hex()
        self.store = FakeStore()
        self.inputs = None
        self.fetched: list[bytes] = []
        self.blobs: dict[bytes, bytes] = {} if blobs is None else blobs
        self.lost = False
        self.gate: trio.Event | None = None
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    async def path(self, blob: bytes, size: int, holders: Any = ()) -> Path:
        await trio.lowlevel.checkpoint()
        if self.lost or blob not in self.blobs:
            raise FileNotFoundError("no peer holds it")
        path = self._folder / blob.hex()
        path.write_bytes(self.blobs[blob])
        return path

    async def put(self, path: str, data: bytes, durable: bool = False) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if path:
            data = await trio.Path(path).read_bytes()
            await trio.Path(path).unlink()
        name = blake3(data).digest()
        self.blobs[name] = data
        return name
