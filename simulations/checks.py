"""What must hold in every world. A checker never repairs and never guesses: it compares what different observers saw.

- Shown: every byte of output that any member released or any follower was shown stays what it was, and is what a serial run
  prints.
- Final: one outcome a job (a branch), the same wherever one asks; results, files and exit status are a serial run's.
- Work: what a live peer claims is not given to others by the leader's sweep.
- Left: nothing of a peer that ended: no process, no socket, no pin of an ended job's blobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from grid.api.client import ControlError
from grid.core import limits
from grid.core.job import FINISHED

if TYPE_CHECKING:
    from grid.core.deque import Work
    from grid.leader import Leader
    from simulations.host import Host
    from simulations.world import SimJob, World


DISSOLVED_S = 80.0
"""For the last replica to go after its job's end: one that was away waits for its group for a minute."""
KEPT_OWNERS = ("outcome:", "restart")
"""Pins that stay: files of outcomes, and what was found at a start, for some minutes."""


class Shown:
    """Bytes of one stream that somebody saw. A member that got the log's state from another may have a gap, for a while."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._known = bytearray()

    def add(self, at: int, data: bytes) -> bytes | None:
        """Bytes from `at` on. Returns what was shown there before if that was something else."""
        end = at + len(data)
        if end > len(self._data):
            self._data += bytes(end - len(self._data))
            self._known += bytes(end - len(self._known))
        before = bytes(self._data[at:end])
        known = self._known[at:end]
        if any(seen and old != new for seen, old, new in zip(known, before, data, strict=True)):
            return before
        self._data[at:end] = data
        self._known[at:end] = b"\1" * len(data)
        return None

    def whole(self) -> bytes | None:
        """All of it, None while there are gaps."""
        return bytes(self._data) if all(self._known) else None


class Checks:
    """All checkers of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._jobs: dict[str, SimJob] = {}
        self._shown: dict[tuple[str, int], Shown] = {}
        self._early: dict[str, list[tuple[str, int, int, bytes]]] = {}

    def accepted(self, job: SimJob) -> None:
        """A job has its id."""
        if job.id:
            self._jobs[job.id] = job
            for entry in self._early.pop(job.id, ()):
                self._compare(job, *entry)

    # ---- output ----

    def released(self, job: str, host: str, fd: int, at: int, data: bytes) -> None:
        """A member made output bytes readable."""
        if not self._world.groups.is_final(bytes.fromhex(job), fd, at + len(data)):
            self._world.violation(f"{host} releases output up to byte {at + len(data)} of fd {fd} before it is committed")
        known = self._jobs.get(job)
        if known is None:
            self._early.setdefault(job, []).append((host, fd, at, data))
        else:
            self._compare(known, host, fd, at, data)

    def shown(self, job: SimJob, host: str, fd: int, at: int, data: bytes) -> None:
        """A follower got output bytes."""
        self._compare(job, f"a follower on {host}", fd, at, data)

    def _compare(self, job: SimJob, who: str, fd: int, at: int, data: bytes) -> None:
        seen = self._shown.setdefault((job.id, fd), Shown())
        change = seen.add(at, data)
        if change is not None:
            self._world.violation(f"{who} shows {data!r} at byte {at} of job {job.number}'s fd {fd}, where {change!r} was shown")
        wanted = job.expected.stdout if fd == 1 else job.expected.stderr
        if wanted[at : at + len(data)] != data:
            self._world.violation(f"{who} shows {data!r} at byte {at} of job {job.number}'s fd {fd}, which no serial run prints")

    # ---- outcomes ----

    def final(self, job: SimJob, host: Host, outcome: dict[str, Any]) -> None:
        """A follower heard the end."""
        world = self._world
        if not job.outcomes:
            job.final_s = trio.current_time()
            world.count("job_s", job.final_s - job.submitted_s)
            world.count("jobs")
            if outcome["state"] != FINISHED or outcome["exit_code"] != 0:
                world.violation(f"job {job.number} ended as {outcome}")
            elif self._shown.get((job.id, 1), Shown()).whole() != job.expected.stdout:
                world.violation(f"job {job.number} ended with output missing")
        job.outcomes[host.name] = outcome
        world.trace.add("final", host.name, job.number, outcome["state"])
        branches = self._world.groups.branches(job.id)
        if job.spec.strict and branches > 1:
            world.violation(f"job {job.number} is strict and has {branches} branches")
        for first in job.outcomes.values():
            other_branch = branches > 1 and first["recovered"] != outcome["recovered"]  # each branch may have its own
            if first != outcome and not other_branch:
                world.violation(f"job {job.number} has another outcome on {host.name}: {outcome}, before: {first}")
                break

    async def agreement(self, within_s: float) -> None:
        """All is over: every member must come to say the same, and give the same results."""
        world = self._world
        for job in world.jobs:
            if not job.id:
                continue
            await world.until(lambda job=job: len(job.outcomes) == len(world.followers), within_s)  # type: ignore[misc]
            for host in world.followers:
                if host.name not in job.outcomes:
                    world.violation(f"the member {host.name} does not know how job {job.number} ended")
            await self._results(job)

    async def _results(self, job: SimJob) -> None:
        world = self._world
        if next(iter(job.outcomes.values()))["state"] != FINISHED:
            return
        host = world.rng.choice(world.hosts)
        text = bytearray()

        def event(name: str, data: dict[str, Any], body: bytes) -> None:
            if name == "stdout":
                text.extend(body)

        try:
            answer = await host.ask("result", {"job": job.id, "stdout": True}, event)
            files = [(file["name"], await self._file(job, host, file["name"])) for file in answer["files"]]
        except ControlError as error:
            world.violation(f"the result of job {job.number} is not to be had on {host.name}: {error}")
            return
        if bytes(text) != job.expected.stdout:
            world.violation(f"job {job.number}'s stdout on {host.name} is {bytes(text)!r}, not {job.expected.stdout!r}")
        if tuple(sorted(files)) != job.expected.files:
            world.violation(f"job {job.number} left {files} on {host.name}, not {job.expected.files}")

    async def _file(self, job: SimJob, host: Host, name: str) -> bytes:
        content = bytearray()

        def event(_name: str, _data: dict[str, Any], body: bytes) -> None:
            content.extend(body)

        await host.ask("result_file", {"job": job.id, "name": name}, event)
        return bytes(content)

    def explain(self, job: SimJob) -> None:
        """For people: where a job that does not end stands."""
        for host in self._world.hosts:
            lead = host.peer.jobs.led.get(bytes.fromhex(job.id)) if host.peer is not None and job.id else None  # type: ignore[call-overload]
            if lead is not None:
                self._world.violations[-1] += f"\n  {host.name} leads it: {lead.describe()}"

    # ---- work ----

    def requeued(self, leader: Leader, works: list[Work], now_s: float) -> None:
        """A leader runs these ranges again: nobody who is alive may have said that it holds them."""
        claims = leader.claims
        for work in works:
            for peer in claims.peers():
                if claims.silent_s(peer, now_s) <= limits.LEASE_S and claims.held(peer, work.stage).intersect(work.lo, work.hi):
                    self._world.violation(f"{work} is requeued though peer {peer.hex()[:8]} claims it")

    # ---- what is left ----

    async def pins(self) -> None:
        """Once all is over, blobs are kept for nothing but the outcomes' files; replicas of logs are gone."""
        world = self._world

        def held() -> list[str]:
            found = []
            for host in world.hosts:
                if host.peer is not None and host.up:
                    owners = host.peer.services.store._pins._owners
                    found += [f"{host.name} {owner}" for owner in owners if not owner.startswith(KEPT_OWNERS)]
                    found += [f"{host.name} {replica!r}" for replica in host.peer.replicas.all()]
            return found

        if world.jobs and not await world.until(lambda: not held(), DISSOLVED_S):
            world.violation(f"still there {DISSOLVED_S:g} s after all jobs were final: {held()}")

    def leaks(self) -> None:
        """Nothing of the peers is left."""
        for host in self._world.hosts:
            if host.children:
                self._world.violation(f"processes are left on {host.name}: {[child.role for child in host.children]}")
            if host.network.streams:
                self._world.violation(f"{len(host.network.streams)} connections are left on {host.name}")
