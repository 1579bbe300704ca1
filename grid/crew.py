"""The worker processes of one site: started when there is work, heard, buried, sent home.

Rules: a worker's frames are handled in their order; one that breaks the channel's contract is ended; when one ends, the task
that its progress cell names has failed (unless the peer ended it on purpose) and the rest of its tickets runs again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from grid import body as bodies
from grid.api import wire
from grid.body import Body
from grid.core import limits
from grid.core.deque import Work
from grid.core.ledger import DIED, MEMORY, TIMEOUT
from grid.siteworker import SiteWorker, Ticket
from grid.worker.fork_server import WorkerStartError

if TYPE_CHECKING:
    from grid.site import Site
    from grid.worker.pool import Child, JobProcesses

ON_PURPOSE = frozenset({"dropped", "idle"})
"""Why a worker was ended by its peer: nothing it ran is to blame."""

AWAKE_NS = 100_000
"""A trivial task is there and back in half of it."""

Requests = Callable[[Callable[[wire.ToChild], None], wire.Message, bytes], Awaitable[None]]


class Crew:
    """One site's workers."""

    def __init__(self, site: Site, processes: JobProcesses, nursery: trio.Nursery, requests: Requests) -> None:
        self.workers: list[SiteWorker] = []
        self.early: dict[SiteWorker, Ticket] = {}
        """Those whose result may reach the driver before us, and what they work on."""
        self.starting = 0
        self.executed = 0
        self.idle_since_s = trio.current_time()
        self._site = site
        self._processes = processes
        self._nursery = nursery
        self._requests = requests
        self._start_failures = 0
        self._token = 0

    def start_worker(self) -> None:
        """Start one more worker process; it is fed when it is there."""
        self.starting += 1
        self._nursery.start_soon(self._run_worker)

    def expect(self, modules: tuple[str, ...]) -> None:
        """Tell the worker that is likely to get the next bundle what that will need."""
        worker = next((worker for worker in self.workers if worker.idle), None)
        if worker is not None:
            worker.prepare(modules)

    def hear(self) -> None:
        """Handle what those workers have said by now: the driver may know it already, and act on it."""
        for worker in list(self.early):
            for message, data in worker.child.arrived():
                self._handle(worker, message, data)

    async def stay_awake(self) -> None:
        """Let the loop go round without sleeping until those workers are heard or had AWAKE_NS for their task.

        To wake a process that sleeps costs whoever sends to it as much as a trivial task.
        """
        until_ns = max((ticket.given_ns for ticket in self.early.values()), default=0) + AWAKE_NS
        while self.early and time.monotonic_ns() < until_ns:
            await trio.lowlevel.checkpoint()

    def contest(self, stage: int, lo: int, hi: int) -> None:
        """Another peer's word about these tasks counted."""
        for ticket in self.early.values():
            if ticket.stage == stage and lo <= ticket.lo < hi:
                ticket.contested = True

    async def _run_worker(self) -> None:
        child: Child | None = None
        try:
            child = await self._processes.start_worker()
        except WorkerStartError:
            self._start_failures += 1
            if self._start_failures > limits.RETRIES_LOST_MAX:
                raise
            await trio.sleep(limits.WORKER_RESTART_S)
        finally:
            self.starting -= 1
        if child is None:
            self._site.workshop.pump()
            return
        self._token += 1
        worker = SiteWorker(child, self._token)
        self.workers.append(worker)
        self._site.workshop.pump()
        try:
            async for message, data in child.frames:
                self._handle(worker, message, data)
        finally:
            worker.gone = True
        with trio.move_on_after(limits.WORKER_EXIT_S):
            await child.exited.wait()
        worker.end("closed its channel")
        await child.exited.wait()
        self.workers.remove(worker)
        self.early.pop(worker, None)
        self._bury(worker)
        self._site.workshop.pump()

    def _handle(self, worker: SiteWorker, message: wire.Message, data: bytes) -> None:
        match message:
            case wire.Done():
                self._done(worker, message, data)
            case wire.Failed():
                self._failed(worker, message, data)
            case wire.Waiting():
                worker.wait(message.blocked)
                self._site.workshop.pump()
            case wire.Returned():
                self._returned(worker, message)
            case wire.Unmapped(ticket=number, clean=clean):
                worker.unmapped(number, clean)
            case wire.Print():
                self._site.uplink.printed(message, data)
            case wire.Ready():
                pass
            case wire.Put() | wire.Fetch() | wire.OpenInput() | wire.ListInputs():
                self._nursery.start_soon(self._requests, worker.post, message, data)
            case wire.Page(path=path) if path:
                worker.nests = True
                file = _adopt(worker, path)
                if file is not None:
                    self._site.uplink.relay(worker, message, file)
            case _:
                worker.nests = True
                self._site.uplink.relay(worker, message, data)

    def _done(self, worker: SiteWorker, message: wire.Done, data: bytes) -> None:
        ticket = worker.tickets.get(message.ticket)
        if ticket is None or message.lo != ticket.at or not ticket.at < message.hi <= ticket.hi:
            worker.end("broke the protocol")
            return
        body = _adopt(worker, message.path) if message.path else data
        if body is None:
            return
        if message.early and ticket.contested:
            self._site.uplink.disputed()
        self._progress(worker, ticket, message.hi, message.elapsed_us, message.final)
        self._site.uplink.result(ticket.stage, message.lo, message.hi, body, message.elapsed_us)
        if message.final:
            self._site.workshop.pump()

    def _failed(self, worker: SiteWorker, message: wire.Failed, data: bytes) -> None:
        ticket = worker.tickets.get(message.ticket)
        if ticket is None or message.index != ticket.at or ticket.at >= ticket.hi:
            worker.end("broke the protocol")
            return
        self._progress(worker, ticket, message.index + 1, message.elapsed_us, message.final)
        self._site.uplink.failure(ticket.stage, message, data)
        if message.final:
            self._site.workshop.pump()

    def _returned(self, worker: SiteWorker, message: wire.Returned) -> None:
        if message.lo < 0:  # else it works on the rest, and tells itself when it is through
            worker.unmapped(message.ticket, clean=True)
        ticket = worker.tickets.get(message.ticket)
        if ticket is None:
            return
        lo, hi = max(message.lo, ticket.at), ticket.hi
        ticket.hi = min(lo, hi)
        if ticket.at == ticket.hi:
            worker.close(ticket)
        elif message.lo >= 0:  # so that no more of them are handed out than it is worth
            self._site.stages[ticket.stage].pace.record(ticket.hi - ticket.at, max(0, message.elapsed_us) / 1e6)
        self._requeue(ticket, lo, hi)
        self._site.workshop.pump()

    def _progress(self, worker: SiteWorker, ticket: Ticket, at: int, elapsed_us: int, final: bool) -> None:
        count = at - ticket.at
        stage = self._site.stages[ticket.stage]
        stage.pace.record(count, max(0, elapsed_us) / 1e6)
        for index in [i for i in stage.attempts if ticket.at <= i < at]:
            del stage.attempts[index]
        self.executed += count
        self._start_failures = 0
        ticket.at = at
        if self.early.get(worker) is ticket:
            del self.early[worker]
        if final:
            worker.close(ticket)
        self.idle_since_s = trio.current_time()

    def _requeue(self, ticket: Ticket, lo: int, hi: int) -> None:
        if lo >= hi:
            return
        for a, b in reversed(ticket.dropped.gaps(lo, hi)) if ticket.dropped else [(lo, hi)]:
            self._site.put_back(Work(ticket.stage, a, b))

    def _bury(self, worker: SiteWorker) -> None:
        """A worker ended: the task it ran failed (unless the peer ended it on purpose); the rest runs again."""
        for number in list(worker.lent):
            worker.unmapped(number, clean=False)  # what it forked may live on for a moment
        if worker.nests:
            self._site.uplink.relay_closed(worker)
        if self._site.closed:
            return
        child = worker.child
        index, _ = child.progress()
        tickets = list(worker.tickets.values())
        for ticket in tickets:
            worker.close(ticket)
        blamed = child.why not in ON_PURPOSE
        culprit = next((ticket for ticket in tickets if blamed and ticket.at <= index < ticket.hi), None)
        for ticket in reversed(tickets):
            if ticket is culprit:
                self._requeue(ticket, index + 1, ticket.hi)
                self._requeue(ticket, ticket.at, index)
            else:
                self._requeue(ticket, ticket.at, ticket.hi)
        if culprit is not None:
            self._site.uplink.failure(culprit.stage, _death(culprit, index, child), b"")
        elif tickets and blamed:
            self._start_failures += 1
            if self._start_failures > limits.RETRIES_LOST_MAX:
                ticket = tickets[0]
                self._site.deque.remove(ticket.stage, ticket.at, ticket.at + 1)
                self._site.uplink.failure(ticket.stage, _death(ticket, ticket.at, child), b"")

    # ---- watching ----

    def check_timeouts(self) -> None:
        """End workers whose task runs longer than its stage allows. Called every 50 ms while such a stage is here."""
        now_ns = time.monotonic_ns()
        for worker in self.workers:
            ticket = worker.running
            if ticket is None:
                continue
            timeout_s = self._site.stages[ticket.stage].options.task_timeout_s
            if timeout_s:
                index, started_ns = worker.child.progress()
                if ticket.at <= index < ticket.hi and now_ns - started_ns > timeout_s * 1e9:
                    worker.end("timeout")

    def rest(self, now_s: float) -> None:
        """Let workers go that had nothing to do for a while."""
        if not self._site.quiet or now_s - self.idle_since_s < limits.WORKER_IDLE_S:
            return
        for worker in self.workers:
            if worker.idle:
                worker.end("idle")


def _adopt(worker: SiteWorker, path: str) -> Body | None:
    """The file that a worker named as a body; None, and the end of the worker, if there is none."""
    try:
        return bodies.whole_file(path)
    except OSError:
        worker.end("broke the protocol")
        return None


def _death(ticket: Ticket, index: int, child: Child) -> wire.Failed:
    status = child.status
    how = child.why or (f"signal {-status}" if status is not None and status < 0 else f"exit status {status}")
    kind, message = {
        "timeout": (TIMEOUT, "the task ran longer than its time limit"),
        "memory": (MEMORY, "the task used more memory than its limit"),
    }.get(child.why, (DIED, f"the worker process died while it ran the task ({how})"))
    return wire.Failed(ticket.number, index, kind, "", message, "", 0, False)
