"""Bugs put in on purpose: each a context manager under which worlds must be found wrong, or the checkers check nothing.

`WHERE` names for each a scenario in which it can do harm. Rules: a bug is planted in the product's own code, from outside, for
the time of the context; it changes one decision and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from grid.core.facts import Output
from grid.core.liveness import Claims
from grid.core.raft import Raft
from grid.core.raft_base import Role
from grid.core.raft_effects import BecameLeader
from grid.core.raft_messages import AppendEntries, config_of
from grid.replica import Replica
from simulations.disk import LifeDisk


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def drops_fsync() -> AbstractContextManager[None]:
    """Journals are told that their bytes are on the disk when they are in the kernel's memory."""

    def fsync(self: LifeDisk, fd: int) -> None:
        self._check()

    return _replaced(LifeDisk, "fsync", fsync)


def ignores_an_epoch() -> AbstractContextManager[None]:
    """A replica takes entries of a leader that was deposed."""
    answer: Callable[..., None] = Raft._answer_stale

    def stale(self: Raft, sender: Any, message: Any) -> None:
        if isinstance(message, AppendEntries) and self.role is Role.FOLLOWER:
            self._append_entries(sender, message)
        else:
            answer(self, sender, message)

    return _replaced(_home(Raft, "_answer_stale"), "_answer_stale", stale)


def commits_earlier_epochs() -> AbstractContextManager[None]:
    """A leader takes an entry of an earlier epoch for committed because it is on a majority's disks."""

    def committable(self: Raft, index: int) -> bool:
        return True

    return _replaced(_home(Raft, "_committable"), "_committable", committable)


@contextlib.contextmanager
def changes_before_noop() -> Iterator[None]:
    """A leader changes the replicas at once, before an entry of its own epoch is committed."""
    do: Callable[..., Awaitable[None]] = Replica._do

    def own_commit(self: Raft) -> bool:
        return True

    async def hasty(self: Replica, effect: Any) -> None:
        await do(self, effect)
        if isinstance(effect, BecameLeader):
            config = self.raft.log.config
            others = [node for node in config.voters if node != self.node]
            if len(others) > 1:
                self.change(config_of(set(config.voters) - {others[0]}, config.learners))

    with _replaced(_home(Raft, "_own_commit"), "_own_commit", own_commit), _replaced(Replica, "_do", hasty):
        yield


def votes_twice() -> AbstractContextManager[None]:
    """A follower votes for whoever asks, a second time in a term, too."""

    def free_to_vote(self: Raft, candidate: Any) -> bool:
        return self.vote in (None, candidate) or self.role is Role.FOLLOWER

    return _replaced(_home(Raft, "_free_to_vote"), "_free_to_vote", free_to_vote)


def releases_early() -> AbstractContextManager[None]:
    """A leader shows the driver's output when it is written, not when the facts behind it are final."""
    propose: Callable[..., int] = Replica.propose

    def early(self: Any, proposed: Any, patient: bool = False) -> int:
        number = propose(self, proposed, patient)
        held = self._hooks.held.get(self.job)
        for fact in proposed:
            if isinstance(fact, Output) and held is not None:
                held.followed.view.write_at(fact.fd, fact.at, fact.data)
        return number

    return _replaced(Replica, "propose", early)


def requeues_claimed() -> AbstractContextManager[None]:
    """A leader runs again what other peers say they hold."""
    sweep: Callable[..., Any] = Claims.sweep

    def forgetful(self: Claims, missing: Any, own: Any, now_s: float) -> Any:
        held, self._held = self._held, {}
        try:
            return sweep(self, missing, own, now_s)
        finally:
            self._held = held

    return _replaced(Claims, "sweep", forgetful)


def _home(kind: type, name: str) -> type:
    """The class in whose body a method stands."""
    return next(each for each in kind.__mro__ if name in each.__dict__)


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "drops an fsync": drops_fsync,
    "ignores an epoch": ignores_an_epoch,
    "commits an earlier epoch's entry by counting copies": commits_earlier_epochs,
    "changes replicas before the no-op": changes_before_noop,
    "votes twice": votes_twice,
    "releases stdout early": releases_early,
    "requeues a claimed range": requeues_claimed,
}
WHERE: dict[str, str] = {
    "drops an fsync": "blackout",
    "ignores an epoch": "oneway",
    "commits an earlier epoch's entry by counting copies": "elections",
    "changes replicas before the no-op": "leaders",
    "votes twice": "elections",
    "releases stdout early": "leaders",
    "requeues a claimed range": "quiet",
}
