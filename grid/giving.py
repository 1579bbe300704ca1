"""Handing ranges to a thief: what a victim (the leader's site or any other) takes from its deque's tail and signs away.

Rules: the victim goes on holding what it gives until the thief says it has it (or the wait for that word ends, then the
ranges run here after all); a grant carries all the thief lacks, short segments inline, long ones as blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from dht.core.identity import Identity, PeerId
from grid import body as bodies
from grid.core import limits
from grid.core.bundle import GRANT_DOMAIN, Declaration, Grant, SegmentRef, Signed, sign
from grid.core.deque import DequeFull, Work
from grid.core.messages import Give, Steal
from grid.core.segments import Segment
from grid.site import without

if TYPE_CHECKING:
    from grid.jobdata import JobData
    from grid.site import Site

SEGMENTS_MAX = 512
"""Segments of one grant: their table stays under 50 KiB."""
STAGE_BYTES = 512
"""A signed declaration of a stage, about."""
REF_BYTES = 40
"""A blob that a segment's tasks will read, as it is named in a grant."""
KNOWN_RANGES_MAX = 64
"""Ranges of stages that a thief may say it knows."""

Declare = Callable[[int], Signed]
Strange = Callable[[PeerId, Sequence[Work]], tuple[list[Work], list[Work]]]


def all_strange(thief: PeerId, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
    """Of a peer that does not know what others hold."""
    return list(works), []


@dataclass(slots=True)
class _Given:
    works: list[Work]
    to: PeerId
    since_s: float


class Giver:
    """One site's grants under way."""

    def __init__(
        self,
        site: Site,
        data: JobData,
        identity: Identity,
        epoch: int,
        declare: Declare,
        declared: Callable[[int], bool] = lambda stage: True,
        strange: Strange = all_strange,
    ) -> None:
        """strange: cuts works into what a thief may have and what it holds already."""
        self._strange = strange
        self._site = site
        self._data = data
        self._identity = identity
        self.epoch = epoch
        self._declare = declare
        self._declared = declared  # by the present leader: what isn't can be given only to who knows it
        self._given: dict[int, _Given] = {}
        self._number = 0
        self.given_tasks = 0

    async def give(
        self, thief: PeerId, steal: Steal, works: list[Work] | None = None, thieves: int = 1
    ) -> tuple[Give, list[Work]] | None:
        """A share of the remaining time of the tasks that the thief can run; None when there is nothing for it.

        works: give these instead, which are not queued here. thieves: that look for work now; all of them get as much as stays
        here, but a thief at least a task for each of its slots, if that is no more than half.
        """
        if works is None:
            works = self._take(thief, steal, thieves)
        if not works:
            return None
        self._number += 1
        number = self._number
        self._given[number] = _Given(works, thief, trio.current_time())
        try:
            give = await self._pack(thief, steal, number, works)
        except BaseException:
            self._return(number)
            raise
        given = self._given.get(number)
        if give is None or given is None:  # settled or taken back meanwhile
            self._given.pop(number, None)
            return None
        return give, given.works

    def taken(self, thief: PeerId, number: int) -> list[Work]:
        """The thief has it: returns what is the thief's now."""
        given = self._given.get(number)
        if given is None or given.to != thief:
            return []
        del self._given[number]
        self.given_tasks += sum(work.hi - work.lo for work in given.works)
        return given.works

    def came_back(self, works: Sequence[Work]) -> None:
        """These arrived here in a grant: whoever they were given to had them, only its word for that is still on its way."""
        for given in self._given.values():
            for work in works:
                given.works = [part for each in given.works for part in without(each, *work)]

    def held(self) -> list[Work]:
        """Ranges under way: still claimed here."""
        return [work for given in self._given.values() for work in given.works]

    def expire(self, now_s: float) -> None:
        """Take back what no thief acknowledged."""
        for number, given in list(self._given.items()):
            if now_s - given.since_s > limits.STEAL_TIMEOUT_S:
                self._return(number)

    def _return(self, number: int) -> None:
        given = self._given.pop(number, None)
        if given is not None:
            for work in reversed(given.works):
                self._site.put_back(work)
            self._site.workshop.pump()

    def _take(self, thief: PeerId, steal: Steal, thieves: int) -> list[Work]:
        site = self._site
        tags = set(steal.tags)
        share = min(0.5, max(1 / (1 + thieves), steal.slots / max(1, site.deque.total)))

        def wanted(stage: int) -> bool:
            if not self._declared(stage) and not any(lo <= stage < hi for lo, hi in steal.known_stages[:KNOWN_RANGES_MAX]):
                return False
            return tags.issuperset(site.stages[stage].options.tags) and site.functions[site.stages[stage].fn] is not None

        works = site.deque.steal_tail(site.seconds_per_task, share, self._boundary, wanted=wanted)
        works, own = self._strange(thief, works)
        for work in own:
            self._push_back(work)
        kept: list[Work] = []
        stages: set[int] = set()
        count = size = 0
        for at, work in enumerate(works):
            if work.stage not in stages:
                stages.add(work.stage)
                body = site.functions[site.stages[work.stage].fn]
                size += STAGE_BYTES + (min(bodies.size_of(body), limits.SEGMENT_INLINE_BYTES) if body is not None else 0)
            for segment, part in site.pieces(work):
                count += 1
                size += min(segment.size, limits.SEGMENT_INLINE_BYTES) + REF_BYTES * len(segment.refs)
                if count > SEGMENTS_MAX or (size > limits.GRANT_BYTES_MAX and kept):
                    for rest in [Work(work.stage, part.lo, work.hi), *works[at + 1 :]]:
                        self._push_back(rest)
                    return kept
                _append(kept, part)
        return kept

    def _push_back(self, work: Work) -> None:
        try:
            self._site.deque.push_tail(work)
        except DequeFull:
            self._site.uplink.returned(*work)

    def _boundary(self, stage: int, index: int) -> int:
        segment = self._site.stages[stage].segments.at(index)
        if segment is None or index - segment.first > segment.count // 2:
            return index
        return segment.first

    async def _pack(self, thief: PeerId, steal: Steal, number: int, taken: list[Work]) -> Give | None:
        site = self._site
        refs: list[SegmentRef] = []
        inline: list[bytes] = []
        works: list[Work] = []
        packed: dict[tuple[int, int], bool] = {}
        for work in taken:
            for segment, part in site.pieces(work):
                key = (work.stage, segment.first)
                if key not in packed:
                    found = await self._segment(work.stage, segment, steal.bare)
                    packed[key] = found is not None
                    if found is not None:
                        refs.append(found[0])
                        inline.append(found[1])
                if packed[key]:
                    _append(works, part)
        if not works or number not in self._given:
            return None
        self._given[number].works = works
        stages = sorted({work.stage for work in works})
        declarations: list[Signed] = []
        functions: dict[bytes, bytes] = {}
        for index in stages:
            if any(lo <= index < hi for lo, hi in steal.known_stages[:KNOWN_RANGES_MAX]):
                continue
            signed = self._declare(index)
            declarations.append(signed)
            body = site.functions[site.stages[index].fn]
            assert body is not None
            digest = site.function_hash(index)
            if bodies.size_of(body) <= limits.SEGMENT_INLINE_BYTES:
                functions[digest] = bodies.read(body)
            else:
                await self._data.put("", bodies.read(body))
        paces = tuple((index, int(pace * 1e6)) for index in stages if (pace := site.stages[index].pace.per_task_s) is not None)
        attempts = tuple(
            (work.stage, index, attempt)
            for work in works
            for index, attempt in site.stages[work.stage].attempts.items()
            if work.lo <= index < work.hi
        )
        ranges = tuple((work.stage, work.lo, work.hi) for work in works)
        grant = Grant(self._data.job, self.epoch, thief, number, ranges, tuple(refs), attempts, paces)
        return Give(sign(grant, GRANT_DOMAIN, self._identity), tuple(declarations), tuple(functions.items()), tuple(inline))

    async def _segment(self, stage: int, segment: Segment, bare: bool) -> tuple[SegmentRef, bytes] | None:
        held = self._site.stages[stage].held.get(segment.first)
        if held is None:  # settled meanwhile
            return None
        if bare:
            return SegmentRef(stage, segment.first, segment.count, held.blob, segment.size, segment.refs), b""
        if not held.blob:
            assert held.body is not None
            if segment.size <= limits.SEGMENT_INLINE_BYTES:
                held.blob = bodies.hash_of(held.body)
            else:
                held.blob = await self._data.put("", bodies.read(held.body))
                held.digest = held.digest or held.blob
                if self._site.stages[stage].held.get(segment.first) is not held:
                    return None
        data = b""
        if segment.size <= limits.SEGMENT_INLINE_BYTES and held.body is not None:
            data = bodies.read(held.body)
        return SegmentRef(stage, segment.first, segment.count, held.blob, segment.size, segment.refs), data


def _append(works: list[Work], part: Work) -> None:
    """Add a part, to the last range where it continues that."""
    if works and works[-1].stage == part.stage and works[-1].hi == part.lo:
        works[-1] = Work(part.stage, works[-1].lo, part.hi)
    else:
        works.append(part)


def declaration_of(site: Site, job: bytes, epoch: int, stage: int, name: str) -> Declaration:
    """A stage as its leader declares it."""
    known = site.stages[stage]
    body = site.functions[known.fn]
    assert body is not None
    return Declaration(job, epoch, stage, site.function_hash(stage), bodies.size_of(body), name, known.options)
