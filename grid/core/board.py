"""What a peer knows of the grid's jobs from its neighbours: news in, news to pass on out.

Rules: news replaces what is known of the job only if it wins over it (`grid.core.recovery.wins`: a higher epoch or version of
the same branch, or a branch that goes on where two meet), and is passed on once, when it did; a job that is final stays known
(its outcome can be asked for) but is no longer announced, and only another outcome that wins replaces its outcome; outcomes
that lost are remembered as conflicts. The table is bounded, the entries longest unheard of go first, ended ones before live
ones. The caller has verified spec and news. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dht.core.identity import PeerId, peer_id
from grid.core import limits
from grid.core.job import FINAL, JobId, JobSpec, first_leader
from grid.core.messages import Elected, JobNews
from grid.core.recovery import Standing, wins

CONFLICTS_MAX: Final = 4
"""Outcomes of other branches that are remembered of one job: each cost a majority lost and found again."""
VOTERS_KNOWN_MAX: Final = 64
"""Peers remembered as replicas of one job: two groups of the largest size."""
LINEAGE_MAX: Final = 16
"""Mandates that lead from a job's first replicas to those it has: one each time all of them were replaced."""


def standing(news: JobNews) -> Standing:
    """What decides which of two news of a job goes on."""
    return news.branch, news.epoch, news.version, news.state in FINAL


@dataclass(frozen=True, slots=True)
class Conflict:
    """An outcome of another branch than the one that is shown."""

    branch: bytes
    state: str
    leader: PeerId


@dataclass(slots=True)
class Entry:
    """One known job. `voters`: who was accepted as its replicas, the latest first. `conflicts`: other branches' outcomes."""

    spec: JobSpec
    news: JobNews
    heard_s: float
    voters: tuple[bytes, ...] = ()
    lineage: tuple[Elected, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    over: bool = False
    """A peer that keeps the outcome said so, or this one does: nobody may be left to sign the news of it."""

    @property
    def leader(self) -> PeerId:
        """Who led it when last heard of."""
        return PeerId(self.news.leader)

    @property
    def live(self) -> bool:
        """Not known to be over."""
        return not self.over and self.news.state not in FINAL

    @property
    def conflict(self) -> Conflict | None:
        """An outcome that contradicts the one shown; None while there is none."""
        return None if self.live or not self.conflicts else self.conflicts[0]

    @property
    def keepers(self) -> tuple[PeerId, ...]:
        """Peers that most likely hold the job: its leader, its replicas, the latest known first."""
        first = (first_leader(self.spec), *self.spec.replicas)
        return tuple(PeerId(peer) for peer in dict.fromkeys((self.news.leader, *self.voters, *first)))


class Board:
    """The job table. `listeners` are called after each change with the job's id."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[JobId], None]] = []
        self._entries: dict[JobId, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, job: JobId) -> Entry | None:
        """None for a job never heard of."""
        return self._entries.get(job)

    def entries(self) -> list[tuple[JobId, Entry]]:
        """All known jobs."""
        return list(self._entries.items())

    def spec(self, job: JobId) -> JobSpec | None:
        """The verified spec of a known job: spares verifying it again with each announcement."""
        entry = self._entries.get(job)
        return entry.spec if entry else None

    def is_news(self, job: JobId, news: JobNews) -> bool:
        """Would `hear` take it?"""
        known = self._entries.get(job)
        if known is None:
            return True
        if not known.live and news.state not in FINAL:
            return False
        return wins(standing(news), standing(known.news))

    def is_conflict(self, job: JobId, news: JobNews) -> bool:
        """Is it an outcome of another branch than the known one, and not known yet?"""
        known = self._entries.get(job)
        if known is None or news.state not in FINAL or news.branch.name == known.news.branch.name:
            return False
        return all(conflict.branch != news.branch.name for conflict in known.conflicts)

    def hear(self, job: JobId, spec: JobSpec, news: JobNews, now_s: float) -> bool:
        """Returns True when it is new: then pass it on."""
        known = self._entries.get(job)
        if known is None:
            fresh = self._add(job, Entry(spec, news, now_s, news.mandate.voters[:VOTERS_KNOWN_MAX], news.lineage[:LINEAGE_MAX]))
        elif self.is_news(job, news):
            fresh = True
            self._replace(job, known, news, now_s)
        else:
            fresh = self.is_conflict(job, news)
            if fresh:
                _remember(known, news)
            if standing(news)[1:3] == standing(known.news)[1:3] and news.branch.name == known.news.branch.name:
                known.heard_s = now_s
        if fresh:
            for listener in self.listeners:
                listener(job)
        return fresh

    def _add(self, job: JobId, entry: Entry) -> bool:
        self._entries[job] = entry
        while len(self._entries) > limits.JOBS_KNOWN_MAX:
            oldest = min(self._entries, key=lambda j: (self._entries[j].live, self._entries[j].heard_s))
            del self._entries[oldest]
        return job in self._entries

    def _replace(self, job: JobId, known: Entry, news: JobNews, now_s: float) -> None:
        if not known.live and news.branch.name != known.news.branch.name:
            _remember(known, known.news)
        known.conflicts = tuple(each for each in known.conflicts if each.branch != news.branch.name)
        known.lineage = (news.lineage or self.lineage(job, news))[:LINEAGE_MAX]
        known.voters = tuple(dict.fromkeys((*news.mandate.voters, *known.voters)))[:VOTERS_KNOWN_MAX]
        known.news, known.heard_s, known.over = news, now_s, False

    def lineage(self, job: JobId, news: JobNews) -> tuple[Elected, ...]:
        """What must go with news of this mandate so that a peer that never heard of the job can check it: the shortest chain."""
        known = self._entries.get(job)
        if known is None:
            return news.lineage
        backers = {peer_id(endorsement.key) for endorsement in news.mandate.endorsements}
        if not backers or not backers.isdisjoint((first_leader(known.spec), *known.spec.replicas)):
            return ()
        last = known.news
        if news.mandate == last.mandate:
            return known.lineage
        chain = [*known.lineage, Elected(last.branch.name, last.epoch, last.leader, last.mandate)]
        for at, link in enumerate(chain[:LINEAGE_MAX]):
            if not backers.isdisjoint(link.mandate.voters):
                return tuple(chain[: at + 1])
        return ()

    def close(self, job: JobId) -> None:
        """The job is over, whatever the last news say; until there are newer ones."""
        known = self._entries.get(job)
        if known is not None:
            known.over = True

    def live(self, now_s: float) -> list[tuple[JobId, Entry]]:
        """Jobs that may have work: not over, heard of lately."""
        return [
            (job, entry) for job, entry in self._entries.items() if entry.live and now_s - entry.heard_s <= limits.JOB_FORGET_S
        ]


def _remember(entry: Entry, outcome: JobNews) -> None:
    conflict = Conflict(outcome.branch.name, outcome.state, PeerId(outcome.leader))
    entry.conflicts = (*(each for each in entry.conflicts if each.branch != conflict.branch), conflict)[:CONFLICTS_MAX]
