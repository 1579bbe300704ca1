"""When and whom a peer with free slots asks for work (`Thief`, one a peer), and whom a leader names to it (`Referrals`).

Rules:
- at most one ask a job is under way; a job that gave nothing is left alone for a backoff that doubles up to a bound, and a
  poke or fresh news ends the backoff at once;
- first asked is whom the leader's last answer named, one after the other, else the leader; jobs take turns;
- it never waits: `next` says whom to ask now, or when to ask again;
- a leader names a holder to as many thieves as it can serve, not to all who ask: each that was named is taken to have left with
  half of it. So a peer is asked as often as it has work to give, however many peers look for some.
Deterministic: time and randomness are arguments. No I/O.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import JobId

FAVOUR_MAX: Final = 64.0
"""How much a thief is drawn to one holder rather than to another: among 100 with as much, mostly to ten."""
MIX: Final = 0x9E3779B97F4A7C15
MASK: Final = (1 << 64) - 1
"""Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4): mixes the bits of two ids."""


@dataclass(slots=True)
class _Source:
    leader: PeerId
    hints: list[PeerId] = field(default_factory=list)
    not_before_s: float = 0.0
    backoff_s: float = limits.STEAL_BACKOFF_S
    backoff_s_max: float = limits.STEAL_BACKOFF_S_MAX
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

    def paced(self, job: JobId, most_s: float) -> None:
        """The job's leader wants to be asked no more often than this while it has nothing."""
        source = self._sources.get(job)
        if source is not None and source.asked_leader:
            source.backoff_s_max = min(max(most_s, limits.STEAL_BACKOFF_S_MAX), limits.JOB_FORGET_S)

    def granted(self, job: JobId, now_s: float) -> None:
        """An ask brought work."""
        source = self._sources.get(job)
        if source is not None:
            source.asking = False
            source.served_s = now_s
            self._awake(source, now_s)

    def refused(self, job: JobId, hints: tuple[PeerId, ...], now_s: float, parked: bool = False) -> None:
        """An ask brought nothing (or no answer): later again, first at the hinted. parked: who was asked will poke."""
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
        if parked:
            source.backoff_s = max(source.backoff_s, limits.STEAL_PARKED_S)
        source.not_before_s = now_s + source.backoff_s * (0.5 + self._rng.random())
        source.backoff_s = min(2 * source.backoff_s, source.backoff_s_max)

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


class Referrals:
    """Whom a leader without work of its own names to thieves: those who hold more than their slots run.

    Each thief is drawn to holders of its own, always the same ones, who are drawn to it: what they have counts for up to
    FAVOUR_MAX times as much. So it needs connections to a few others only, but finds whoever has much more than those.
    What a leader knows of a holder is its last heartbeat. Each time that a holder is named it counts for half as much, as if the
    thief had taken half; its next heartbeat ends that, or the end of REFERRAL_S.
    """

    def __init__(self, surplus: Callable[[PeerId], int]) -> None:
        """surplus: tasks that a peer can give, as far as is known."""
        self._surplus = surplus
        self._holders: dict[PeerId, int] = {}
        self._named: dict[PeerId, tuple[float, int]] = {}

    def heard(self, peer: PeerId) -> None:
        """The peer said anew what it holds, was given more, or is gone."""
        self._named.pop(peer, None)
        if self._surplus(peer) > 0:
            self._holders[peer] = int.from_bytes(peer[-8:], "big")
        else:
            self._holders.pop(peer, None)

    def choose(self, thief: PeerId, now_s: float, allowed: Callable[[PeerId], bool] = lambda peer: True) -> tuple[PeerId, ...]:
        """The first is named for good, the others for the case that it has nothing."""
        own = int.from_bytes(thief[-8:], "big")
        found: list[tuple[float, PeerId]] = []
        for peer, place in list(self._holders.items()):
            left = self._left(peer, now_s)
            if left > 0 and peer != thief and allowed(peer):
                found.append((left * _favour(own ^ place), peer))
        best = heapq.nlargest(limits.HINTS_MAX, found)
        if best:
            first = best[0][1]
            since_s, times = self._named.get(first, (now_s, 0))
            self._named[first] = since_s, times + 1
        return tuple(peer for _, peer in best)

    def _left(self, peer: PeerId, now_s: float) -> int:
        tasks = self._surplus(peer)
        if tasks <= 0:
            self._holders.pop(peer)
        since_s, times = self._named.get(peer, (now_s, 0))
        if now_s - since_s > limits.REFERRAL_S:
            del self._named[peer]
            return tasks
        return tasks >> times


def _favour(pair: int) -> float:
    """1 to FAVOUR_MAX, the inverse of a uniform number: a few of all others stand out. The same both ways."""
    mixed = (pair * MIX & MASK) >> 32
    return FAVOUR_MAX / (1 + (FAVOUR_MAX - 1) * mixed / (1 << 32))
