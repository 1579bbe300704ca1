"""Signing and checking news of a job: only who leads it may say how it stands.

In epoch 1 of the root branch that is the submitter's peer, whose key the spec names. A later leader, or a branch's, shows the
mandate of its epoch: a majority of its replicas, at least one of which is known here as a replica of the job, or is tied to
one by earlier mandates (the news' lineage). No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from dht.core import codec
from dht.core.identity import Identity, PeerId, peer_id, verify
from grid.core.board import LINEAGE_MAX
from grid.core.errors import FencedError, RefusedError
from grid.core.job import JobSpec, first_leader, job_id
from grid.core.mandate import DEPTH_MAX, Branch, check_mandate
from grid.core.messages import JobNews

NEWS_DOMAIN: Final = "grid/news/1"
NAME_BYTES_MAX: Final = 32
"""Of a branch."""


def _signed(news: JobNews) -> bytes:
    """All but the lineage, whose parts prove themselves: who passes news on may find a shorter one."""
    return codec.encode(
        (
            job_id(news.spec.payload),
            news.epoch,
            news.leader,
            news.leader_address,
            news.version,
            news.state,
            news.work,
            news.branch,
            news.mandate,
            news.key,
        )
    )


def sign_news(news: JobNews, leader: Identity) -> JobNews:
    """The same news with its leader's key and signature."""
    assert news.leader == leader.id
    keyed = news if is_first(news) else msgspec.structs.replace(news, key=leader.public)
    return msgspec.structs.replace(keyed, signature=leader.sign(NEWS_DOMAIN, _signed(keyed)))


def is_first(news: JobNews) -> bool:
    """Of epoch 1 of the root branch: the spec alone says who leads it."""
    return news.epoch == 1 and not news.branch.name


def check_news(news: JobNews, spec: JobSpec, known: Iterable[bytes] = (), believed: JobNews | None = None) -> None:
    """Raises RefusedError, FencedError, BadSignature unless the job's leader says so. `spec` is verified, and the news'.

    known: peers that mandates which were accepted here name as the job's replicas. believed: news of this job that was
    accepted: the same mandate is not verified again.
    """
    _check_branch(news.branch)
    if is_first(news):
        if news.leader != first_leader(spec):
            raise RefusedError("news that names another leader than the job has")
        verify(spec.submitter, NEWS_DOMAIN, _signed(news), news.signature)
        return
    if news.epoch < 1 or not news.mandate.voters:
        raise FencedError(f"nobody was elected to epoch {news.epoch}")
    if not news.key or peer_id(news.key) != news.leader:
        raise RefusedError("news that is not signed with its leader's key")
    verify(news.key, NEWS_DOMAIN, _signed(news), news.signature)
    if believed is None or _mandate_of(believed) != _mandate_of(news):
        _check_mandate(news, spec, known)


def _check_mandate(news: JobNews, spec: JobSpec, known: Iterable[bytes]) -> None:
    job = job_id(news.spec.payload)
    trusted = {first_leader(spec), *spec.replicas, *known}
    if trusted.isdisjoint(peer_id(endorsement.key) for endorsement in news.mandate.endorsements):
        for link in news.lineage[:LINEAGE_MAX]:
            check_mandate(link.mandate, job, link.branch, link.epoch, PeerId(link.leader), trusted)
            trusted.update(link.mandate.voters)
    check_mandate(news.mandate, job, news.branch.name, news.epoch, PeerId(news.leader), trusted)


def _check_branch(branch: Branch) -> None:
    names = (branch.name, *branch.ancestors)
    if len(branch.ancestors) > DEPTH_MAX or any(len(name) > NAME_BYTES_MAX for name in names):
        raise RefusedError("a branch that is named beyond measure")
    if bool(branch.name) != bool(branch.ancestors) or branch.name in branch.ancestors:
        raise RefusedError("a branch without ancestors, or the root with some")


def _mandate_of(news: JobNews) -> tuple[object, ...]:
    return news.branch.name, news.epoch, news.leader, news.mandate
