"""One worker process as its site sees it: the bundles it was given and not yet reported.

Rules: tickets are answered in the order they were given; a blocked worker (its task waits for children) uses no slot, and
the tickets it has not begun are asked back.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grid import body as bodies
from grid.api import wire
from grid.body import FileSlice, SharedFile, SpoolFile
from grid.core.ranges import RangeSet
from grid.worker.process import ChildGone

if TYPE_CHECKING:
    from grid.site import Held, Site, SiteStage
    from grid.worker.pool import Child


PARTS_BYTES_MIN = 16 << 10
PARTS_MIN = 4
"""A segment of this size that is run in so many parts is written to a file once, instead of being sent with each of them."""


@dataclass(slots=True)
class Ticket:
    """Tasks [lo, hi) given to a worker; [lo, at) are reported."""

    number: int
    stage: int
    lo: int
    hi: int
    at: int
    fn: int
    dropped: RangeSet | None = None  # of [lo, hi): settled elsewhere or cancelled, not to be run again
    file: SpoolFile | None = None  # it may still have to open this, whoever else is through with it
    given_ns: int = 0  # CLOCK_MONOTONIC when it was given, where its result may reach the driver before us
    contested: bool = False  # another peer's word about its task counted


class SiteWorker:
    """A worker process of one job."""

    def __init__(self, child: Child, token: int) -> None:
        self.child = child
        self.token = token
        self.tickets: dict[int, Ticket] = {}
        self.blocked = False
        self.gone = False
        self.nests = False
        self.cpus = 1
        self.lent: dict[int, SharedFile] = {}
        """Shared memory that it maps, by ticket."""
        self._prepared = False
        self._functions: set[int] = set()

    @property
    def idle(self) -> bool:
        """It has nothing to run."""
        return not self.tickets and not self.blocked and not self.gone

    @property
    def running(self) -> Ticket | None:
        """The ticket it works on."""
        return next(iter(self.tickets.values()), None)

    @property
    def slots(self) -> int:
        """Slots in use."""
        return 0 if self.blocked or not self.tickets else self.cpus

    def post(self, message: wire.ToChild, body: bytes = b"") -> None:
        """Send without waiting; the channel's queue is bounded by the tickets a worker may have and its credit."""
        with contextlib.suppress(ChildGone):  # its end is told by the frames' end
            self.child.post(message, body)

    def end(self, why: str) -> None:
        """Kill it; it gets no more work. What it had is dealt with when it is buried."""
        self.gone = True
        self.child.kill(why)

    def prepare(self, modules: tuple[str, ...]) -> None:
        """Have it import these while it has nothing to do; once before each bundle, so that what waits for it is bounded."""
        if not self._prepared:
            self._prepared = True
            self.post(wire.Import(modules))

    def run(self, ticket: Ticket, stage: SiteStage, held: Held, site: Site) -> None:
        """Give it a bundle."""
        if not self.tickets:
            self.cpus = min(stage.options.cpus, site.workshop.slots)
        self.tickets[ticket.number] = ticket
        self._prepared = False
        if ticket.fn not in self._functions:
            self._functions.add(ticket.fn)
            function = site.functions[ticket.fn]
            assert function is not None
            self.post(wire.Function(ticket.fn), bodies.read(function))
        body = held.body
        assert body is not None
        path, data, shared = "", b"", False
        if isinstance(body, FileSlice):
            whole = body.whole
            if not whole and body.length > wire.INLINE_BYTES_MAX:
                body = held.body = site.spool.own(body)  # once: each run of a part of it would need a copy
                whole = True
            if whole:
                path = body.file.path
                if isinstance(body.file, SharedFile):
                    shared = True
                    body.file.lent += 1
                    self.lent[ticket.number] = body.file
                    self.child.shared_bytes += body.length
            else:
                data = bodies.read(body)
        else:
            path, data = _in_parts(held, body, ticket, site)
        first, attempt = held.segment.first, stage.attempts.get(ticket.lo, 0)
        timed = bool(stage.options.task_timeout_s)
        early = -1 if attempt else self._early(ticket, stage, site)
        lo, hi, given_ns = ticket.lo, ticket.hi, ticket.given_ns
        run = wire.Run(ticket.number, ticket.stage, ticket.fn, first, lo, hi, attempt, path, timed, shared, early, given_ns)
        self.post(run, data)

    def _early(self, ticket: Ticket, stage: SiteStage, site: Site) -> int:
        """The driver's number for the stage, if the ticket's result may go to the driver, too; else -1."""
        if stage.early < 0 or ticket.hi - ticket.lo > 1 or len(self.tickets) > 1 or not self.child.takes_early:
            return -1
        ticket.given_ns = time.monotonic_ns()
        site.crew.early[self] = ticket
        return stage.early

    def close(self, ticket: Ticket) -> None:
        """It is answered, or this worker is gone."""
        del self.tickets[ticket.number]
        if ticket.file is not None:
            ticket.file.release()

    def unmapped(self, number: int, clean: bool) -> None:
        """It is through with a ticket's shared memory, or never began it. clean: it maps it no longer."""
        file = self.lent.pop(number, None)
        if file is None:
            return
        if clean:
            self.child.shared_bytes -= file.size
        file.give_back(clean)

    def wait(self, blocked: bool) -> None:
        """Its task began or ended a wait for children."""
        self.blocked = blocked
        if blocked:
            for number in list(self.tickets)[1:]:
                self.post(wire.Revoke(number))


def _in_parts(held: Held, body: bytes, ticket: Ticket, site: Site) -> tuple[str, bytes]:
    """How a worker gets a segment that is in memory: (path, "") or ("", bytes)."""
    if held.copy is None and len(body) >= PARTS_BYTES_MIN and PARTS_MIN * (ticket.hi - ticket.lo) <= held.segment.count:
        with contextlib.suppress(OSError):  # a full disk
            held.copy = site.spool.write("segment", body)
            held.copy.owners = 1
    if held.copy is None:
        return "", body
    held.copy.owners += 1
    ticket.file = held.copy
    return held.copy.path, b""
