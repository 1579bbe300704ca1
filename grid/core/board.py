"""What a peer knows of the grid's jobs from its neighbours: news in, news to pass on out.

Rules: news replaces older news of the same job only if its (epoch, version) is higher, and is passed on once, when it did;
a job that is final stays known (its outcome can be asked for) but is no longer announced; the table is bounded, the entries
longest unheard of go first, ended ones before live ones. The caller has verified the spec. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import FINAL, JobId, JobSpec
from grid.core.messages import JobNews


@dataclass(slots=True)
class Entry:
    """One known job."""

    spec: JobSpec
    news: JobNews
    heard_s: float

    @property
    def leader(self) -> PeerId:
        """Who led it when last heard of."""
        return PeerId(self.news.leader)

    @property
    def live(self) -> bool:
        """Not known to be over."""
        return self.news.state not in FINAL


class Board:
    """The job table."""

    def __init__(self) -> None:
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
        return known is None or (
            known.news.state not in FINAL and (news.epoch, news.version) > (known.news.epoch, known.news.version)
        )

    def hear(self, job: JobId, spec: JobSpec, news: JobNews, now_s: float) -> bool:
        """Returns True when the news is new: then pass it on."""
        known = self._entries.get(job)
        if known is not None:
            if not self.is_news(job, news):
                if (news.epoch, news.version) == (known.news.epoch, known.news.version):
                    known.heard_s = now_s
                return False
            known.news, known.heard_s = news, now_s
            return True
        self._entries[job] = Entry(spec, news, now_s)
        while len(self._entries) > limits.JOBS_KNOWN_MAX:
            oldest = min(self._entries, key=lambda j: (self._entries[j].live, self._entries[j].heard_s))
            del self._entries[oldest]
        return job in self._entries

    def live(self, now_s: float) -> list[tuple[JobId, Entry]]:
        """Jobs that may have work: not over, heard of lately."""
        return [
            (job, entry) for job, entry in self._entries.items() if entry.live and now_s - entry.heard_s <= limits.JOB_FORGET_S
        ]
