"""When and whom a peer with free slots asks for work. One instance a peer, for all jobs.

Rules:
- at most one ask a job is under way; a job that gave nothing is left alone for a backoff that doubles up to a bound, and a
  poke or fresh news ends the backoff at once;
- first asked is whom the leader's last answer named, one after the other, else the leader; jobs take turns;
- it never waits: `next` says whom to ask now, or when to ask again.
Deterministic: time and randomness are arguments. No I/O.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import JobId


@dataclass(slots=True)
class _Source:
    leader: PeerId
    hints: list[PeerId] = field(default_factory=list)
    not_before_s: float = 0.0
    backoff_s: float = limits.STEAL_BACKOFF_S
    asking: bool = False
    asked_leader: bool = False
    again: bool = False  # a poke came while the answer was on its way
    served_s: float = -1.0


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `victim` for work of `job`, for `slots` slots."""

    job: JobId
    victim: PeerId
    slots: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to ask before `until_s` (None: before the next event)."""

    until_s: float | None


class Thief:
    """The state of a peer's search for work."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._sources: dict[JobId, _Source] = {}

    def jobs(self) -> list[JobId]:
        """Jobs it would ask for."""
        return list(self._sources)

    def job_known(self, job: JobId, leader: PeerId, work: bool, now_s: float) -> None:
        """News of a live job; `work`: its leader has ranges to give, so ask at once."""
        source = self._sources.get(job)
        if source is None or source.leader != leader:
            self._sources[job] = _Source(leader, not_before_s=now_s)
        elif work:
            self._awake(source, now_s)

    def job_gone(self, job: JobId) -> None:
        """The job ended, or can't run here."""
        self._sources.pop(job, None)

    def poked(self, job: JobId, by: PeerId, now_s: float) -> None:
        """A peer says it has work again."""
        source = self._sources.get(job)
        if source is not None:
            if by != source.leader and by not in source.hints:
                source.hints = [by, *source.hints][: limits.HINTS_MAX]
            self._awake(source, now_s)

    def granted(self, job: JobId, now_s: float) -> None:
        """An ask brought work."""
        source = self._sources.get(job)
        if source is not None:
            source.asking = False
            source.served_s = now_s
            self._awake(source, now_s)

    def refused(self, job: JobId, hints: tuple[PeerId, ...], now_s: float) -> None:
        """An ask brought nothing (or no answer): later again, first at the hinted."""
        source = self._sources.get(job)
        if source is None:
            return
        source.asking = False
        if source.asked_leader:  # hints of hints are not followed: they could lead round in circles
            named = [hint for hint in dict.fromkeys([*source.hints, *hints]) if hint != source.leader]
            source.hints = named[: limits.HINTS_MAX]
        if source.hints or source.again:
            source.again = False
            source.not_before_s = now_s
            return
        source.not_before_s = now_s + source.backoff_s * (0.5 + self._rng.random())
        source.backoff_s = min(2 * source.backoff_s, limits.STEAL_BACKOFF_S_MAX)

    def next(self, now_s: float, wanted: Callable[[JobId], int]) -> Ask | Wait:
        """`wanted(job)`: slots that job could use here now (0: none)."""
        wake_s: float | None = None
        for job, source in sorted(self._sources.items(), key=lambda item: (item[1].served_s, item[0])):
            if source.asking:
                continue
            slots = wanted(job)
            if slots <= 0:
                continue
            if source.not_before_s > now_s:
                wake_s = source.not_before_s if wake_s is None else min(wake_s, source.not_before_s)
                continue
            source.asking = True
            source.asked_leader = not source.hints
            victim = source.hints.pop(0) if source.hints else source.leader
            return Ask(job, victim, slots)
        return Wait(wake_s)

    def _awake(self, source: _Source, now_s: float) -> None:
        source.again = source.asking
        source.backoff_s = limits.STEAL_BACKOFF_S
        source.not_before_s = min(source.not_before_s, now_s)
