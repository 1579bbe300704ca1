"""Signing and checking news of a job: only who leads it may say how it stands.

In epoch 1 that is the submitter's peer, whose key the spec names; a later leader will show the certificate of its epoch. No I/O.
"""

from __future__ import annotations

from typing import Final

import msgspec

from dht.core import codec
from dht.core.identity import Identity, verify
from grid.core.errors import FencedError, RefusedError
from grid.core.job import JobSpec, first_leader, job_id
from grid.core.messages import JobNews

NEWS_DOMAIN: Final = "grid/news/1"


def _signed(news: JobNews) -> bytes:
    return codec.encode(
        (job_id(news.spec.payload), news.epoch, news.leader, news.leader_address, news.version, news.state, news.work)
    )


def sign_news(news: JobNews, leader: Identity) -> JobNews:
    """The same news with its leader's signature."""
    assert news.leader == leader.id
    return msgspec.structs.replace(news, signature=leader.sign(NEWS_DOMAIN, _signed(news)))


def check_news(news: JobNews, spec: JobSpec) -> None:
    """Raises RefusedError, FencedError, BadSignature unless the job's leader says so. `spec` is verified, and the news'."""
    if news.epoch != 1:
        raise FencedError(f"nobody was elected to epoch {news.epoch}")
    if news.leader != first_leader(spec):
        raise RefusedError("news that names another leader than the job has")
    verify(spec.submitter, NEWS_DOMAIN, _signed(news), news.signature)
