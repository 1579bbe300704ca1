"""Which connections are closed because nobody needs them: idle ones in the end, and sooner the more of them there are.

A peer asks, and is asked by, more and more others as a grid grows; without this it would end up connected to all of them. Rules
this file keeps:

- a connection goes on while either end keeps it, waits for an answer, works on one, or has something to send;
- of the others the longest silent are closed first, and none before it was silent for SPARE_S;
- what is closed is closed by both ends (`Link.propose_end`), so nothing that is under way is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dht.core.identity import PeerId
from grid.transport.limits import IDLE_S, SPARE_LINKS, SPARE_S
from grid.transport.link import Link
from grid.transport.outbox import IN_USE, KEPT
from grid.transport.remote import Remote


class Spare:
    """Looks after one mesh's connections."""

    def __init__(self, remotes: Mapping[PeerId, Remote], in_use: Callable[[PeerId], bool]) -> None:
        self._remotes = remotes
        self._in_use = in_use

    def use(self, remote: Remote) -> int:
        """What this end needs the connection for, silent as it may be: KEPT, IN_USE or 0."""
        if remote.wanted:
            return KEPT
        return IN_USE if remote.pending or remote.called is not None or self._in_use(remote.id) else 0

    def thin(self, now: float) -> None:
        """Let go of those that were silent for very long, and of the longest silent that are too many."""
        unused = self._unused()
        silent = sorted((link for link in unused if now - link.last_used > SPARE_S), key=lambda link: link.last_used)
        too_many = sum(not link.use_there for link in unused) - SPARE_LINKS
        for link in silent:
            if now - link.last_used > IDLE_S or too_many > 0:
                too_many -= 1
                link.propose_end()

    def _unused(self) -> list[Link]:
        """Connections that this end has no use for just now."""
        found = []
        for remote in self._remotes.values():
            link = remote.link
            if link is None or link.finishing or not link.quiet or remote.inbox.pumping:
                continue
            if not self.use(remote):
                found.append(link)
        return found
