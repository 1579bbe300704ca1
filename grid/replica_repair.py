"""What the leader of a job's group does for it: members that are lost leave, others come, and in the end all go.

Rules (DESIGN, section 6):
- repair starts when a replica is lost, not later: a voter that was silent for SILENT_S (LOST_S without a connection) is replaced
  by the oldest other peer (itself, if only its replica is lost), or just removed where that makes the majority smaller (of four
  voters three are needed, of three two); else it may come back as it was;
- a voter begins as an empty learner under a new incarnation and votes once it has caught up; one change at a time, which the
  core enforces (grid.core.raft_leader);
- an outcome is final when it is in the log: once all members have it, or after FAREWELL_S, the group is dissolved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from dht.core.identity import PeerId
from grid.core.choice import newcomers
from grid.core.raft_messages import Config, NodeId, config_of

if TYPE_CHECKING:
    from grid.replica import Replica

SILENT_S: Final = 3.0
"""More than two election timeouts: a pause of a disk or an interpreter is over by then."""
LOST_S: Final = 1.5
"""The same where there is no connection either, and no new one for an election timeout: the process is dead."""
UPKEEP_S: Final = 0.25
"""Between two looks at the group."""
SHUN_S: Final = 10.0
"""A peer that would or could not join is not asked again before."""
FAREWELL_S: Final = 10.0
"""For members to get the outcome; who was away longer learns it from news or by asking."""
TOLD_S: Final = 0.5
"""For the last commit index to reach everybody: two heartbeats."""
ORPHAN_S: Final = 60.0
"""A member that has the outcome, and was not dismissed, goes by itself."""


class Upkeep:
    """One replica's, on every member; it acts while that leads."""

    def __init__(
        self,
        replica: Replica,
        clock: Callable[[], float],
        started: Callable[[], dict[PeerId, float]],
        enlist: Callable[[Replica, PeerId], Awaitable[int | None]],
        dismiss: Callable[[Replica, NodeId], object],
    ) -> None:
        """started: connected peers, this one included, and since when they run. enlist: returns a peer's new incarnation.

        dismiss: tells a node that it is no member any more.
        """
        self._replica = replica
        self._clock = clock
        self._started = started
        self._enlist = enlist
        self._dismiss = dismiss
        self._shunned: dict[PeerId, float] = {}
        self._ended_s: float | None = None
        self._complete_s: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(UPKEEP_S)
            if self._replica.chronicle.outcome is not None:
                self._dissolve()
            elif self._replica.leads() and self._settled():
                await self._mend()

    def _settled(self) -> bool:
        raft = self._replica.raft
        return raft.log.config_index <= raft.commit and raft.transfer_to is None

    # ---- members -----------------------------------------------------------------------------------------------------

    async def _mend(self) -> None:
        """The one change that is due, if any."""
        raft = self._replica.raft
        config = raft.log.config
        silent = [node for node in config.members if node != raft.node and self._is_lost(node)]
        wanted = max(1, self._replica.spec.options.replicas)
        if gone := self._to_remove(config, silent):
            self._change(config, remove=gone)
        elif ready := [node for node in config.learners if raft.caught_up(node)]:
            if len(config.voters) < wanted:
                self._replica.change(config_of((*config.voters, ready[0]), set(config.learners) - {ready[0]}))
            else:
                self._change(config, remove=ready[0])
        elif len(config.members) < wanted and not config.learners:
            await self._grow()

    def _is_lost(self, node: NodeId) -> bool:
        progress = self._replica.raft.progress.get(node)
        silent_s = self._clock() - progress.contact_s if progress is not None else 0.0
        return silent_s > (SILENT_S if PeerId(node.peer) in self._started() else LOST_S)

    def _to_remove(self, config: Config, silent: list[NodeId]) -> NodeId | None:
        """A learner, or a voter whose peer is there but lost its replica; or any, where somebody can take its place or where
        without those that are silent a smaller majority will do."""
        connected = self._started()
        for node in silent:
            if node in config.learners or PeerId(node.peer) in connected:
                return node
        smaller = (len(config.voters) - len(silent)) // 2 + 1 < config.quorum
        return silent[0] if silent and (smaller or self._newcomers()) else None

    def _change(self, config: Config, remove: NodeId) -> None:
        self._replica.change(config_of(set(config.voters) - {remove}, set(config.learners) - {remove}))

    def _newcomers(self) -> list[PeerId]:
        now_s = self._clock()
        shunned = [peer for peer, until_s in self._shunned.items() if now_s < until_s]
        return newcomers(self._started(), self._replica.members, shunned)

    async def _grow(self) -> None:
        """Ask the best peer that is no member to be a learner."""
        found = self._newcomers()
        if not found:
            return
        self._shunned[found[0]] = self._clock() + SHUN_S
        incarnation = await self._enlist(self._replica, found[0])
        raft = self._replica.raft
        config = raft.log.config
        if incarnation is not None and self._replica.leads() and self._settled() and found[0] not in self._replica.members:
            self._replica.change(config_of(config.voters, (*config.learners, NodeId(found[0], incarnation))))
            del self._shunned[found[0]]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _dissolve(self) -> None:
        """The outcome is applied here."""
        now_s, replica = self._clock(), self._replica
        self._ended_s = self._ended_s if self._ended_s is not None else now_s
        if not replica.leads():
            if now_s - self._ended_s > ORPHAN_S:
                replica.stop("over")
            return
        raft = replica.raft
        if any(progress.match < replica.applied_index for progress in raft.progress.values()):
            self._complete_s = None
        elif self._complete_s is None:
            self._complete_s = now_s
        done = self._complete_s is not None and now_s - self._complete_s >= (TOLD_S if raft.progress else 0)
        if done or now_s - self._ended_s > FAREWELL_S:
            for node in raft.log.config.members:
                if node != raft.node:
                    self._dismiss(replica, node)
            replica.stop("over")
