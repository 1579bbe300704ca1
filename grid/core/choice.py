"""Who holds a job's replicas: the peers that have been up for longest, the best predictor of who stays (FACTS: churn).

Rules: the submitter's peer is always first; in grids of up to the wanted size everybody is chosen; ties go by id, so that all
who know the same peers choose alike. A peer's age is its own claim: who lies gains work, and no rights. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import PeerId

REPLICAS: Final = 5
"""With five aged replicas 3 % of groups lose their majority within 24 h of the worst churn measured; with three random, 60 %."""


class _Info(codec.Struct, frozen=True):
    """`info` of a peer's hello. Fields are only added at the end, with a default."""

    started_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    leaving: bool = False


def hello_info(started_s: float, leaving: bool = False) -> bytes:
    """What a peer that runs since `started_s` (unix time) puts into its hello."""
    return codec.encode(_Info(started_s, leaving))


def started_s(info: bytes, now_s: float) -> float | None:
    """Since when the peer with this hello runs, at most now; None: it is leaving. What says nothing counts as just started."""
    try:
        found = codec.decode(info, _Info)
    except CodecError:
        return now_s
    return None if found.leaving else min(found.started_s or now_s, now_s)


def by_age(started: Mapping[PeerId, float]) -> list[PeerId]:
    """Oldest first."""
    return sorted(started, key=lambda peer: (started[peer], peer))


def choose(me: PeerId, started: Mapping[PeerId, float], count: int = REPLICAS) -> list[PeerId]:
    """At most `count` peers for a job that `me` submits: itself, then the oldest others."""
    others = [peer for peer in by_age(started) if peer != me]
    return [me, *others[: max(0, count - 1)]]


def newcomers(started: Mapping[PeerId, float], members: Iterable[PeerId], not_now: Iterable[PeerId] = ()) -> list[PeerId]:
    """Who may join a group of these members, best first."""
    out = {*members, *not_now}
    return [peer for peer in by_age(started) if peer not in out]
