"""What a replica does when it hears no leader: ask the others, and when a majority is gone, open a branch.

Rules: `grid.core.recovery` decides; a machine that itself slept, or was stopped, waits anew before it asks; a strict job waits
for its majority, and `waiting` says for whom.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.core.errors import RefusedError
from grid.core.mandate import Branch
from grid.core.messages import Survey, Surveyed
from grid.core.raft_messages import NodeId
from grid.core.recovery import NEWS_SLACK, RECOVERY_S, Standing, Step, Verdict, judge

if TYPE_CHECKING:
    from grid.replica import Replica
    from grid.replica_ports import Knowledge

LOOK_S: Final = 0.5
"""Between two looks at how long the leader is silent."""
SLEPT_S: Final = 2.0
"""A look that comes late by more than this: the machine slept, and so may its connections."""
RESTART_S: Final = 15.0
"""No branch sooner after a start: when all machines lost power, the others come back, too."""
SURVEY_TIMEOUT_S: Final = 2.0
"""For the others' answers."""
SURVEY_S: Final = 1.0
"""Between surveys."""
EMPTY_S: Final = 45.0
"""A replica that nothing ever reached is forgotten: its group was never founded, or goes on without it."""
log = logging.getLogger(__name__)


class Patience:
    """One replica's."""

    def __init__(
        self,
        replica: Replica,
        clock: Callable[[], float],
        ask: Callable[[PeerId, Survey, float], Awaitable[Surveyed | None]],
        open_branch: Callable[[Replica, Branch, bytes, tuple[bytes, ...], list[PeerId]], Awaitable[None]],
        knowledge: Knowledge,
        found: bool,
    ) -> None:
        """open_branch(replica, branch, state, payloads after it, survivors). found: the replica was on the disk already."""
        self.waiting = ""
        """For people: what a job without a leader waits for."""
        self._replica = replica
        self._clock = clock
        self._ask = ask
        self._open = open_branch
        self._knowledge = knowledge
        self._awake_s = clock()
        self._open_after_s = clock() + (RESTART_S if found else 0.0)

    async def run(self) -> None:
        """Until cancelled."""
        last_s = self._clock()
        while True:
            await trio.sleep(LOOK_S)
            now_s = self._clock()
            if now_s - last_s > LOOK_S + SLEPT_S:
                self._awake_s = now_s
            await self._look(now_s)
            last_s = self._clock()

    async def _look(self, now_s: float) -> None:
        replica = self._replica
        silent_s = now_s - max(replica.heard_s, self._awake_s)
        if replica.empty:
            if silent_s > EMPTY_S:
                replica.stop("empty")
        elif silent_s < RECOVERY_S or replica.chronicle.outcome is not None or replica.hears_leader():
            self.waiting = ""
        elif self._knowledge.is_final(replica.job) or await self._learn_from_news():
            replica.stop("final")
        else:
            await self._survey()

    async def _learn_from_news(self) -> bool:
        """Where the news say that it is over, who led it at its end has the outcome: that may be no member known here."""
        known = self._knowledge.standing(self._replica.job)
        return known is not None and known[0][3] and await self._knowledge.learn_outcome(self._replica, [known[1]])

    async def _survey(self) -> None:
        replica = self._replica
        others = [node for node in replica.raft.log.config.members if node != replica.node]
        answers: dict[NodeId, Surveyed] = {}

        async def ask(node: NodeId) -> None:
            answer = await self._ask(PeerId(node.peer), Survey(replica.job, replica.branch.name), SURVEY_TIMEOUT_S)
            if answer is not None:
                answers[node] = answer

        async with trio.open_nursery() as nursery:
            for node in others:
                nursery.start_soon(ask, node)
        if replica.hears_leader() or replica.closed.is_set():
            return
        raft_log = replica.raft.log
        end = raft_log.last_term, raft_log.last_index
        verdict = judge(replica.node, end, raft_log.config, answers, replica.spec.options.strict)
        self.waiting = _what_for(replica, verdict)
        log.info("job %s: no leader: %s; %s", replica.job.hex()[:8], verdict.step.value, self.waiting)
        if verdict.step is Step.FINAL:
            keepers = [PeerId(node.peer) for node, answer in answers.items() if answer.final]
            if await self._knowledge.learn_outcome(replica, keepers):
                replica.stop("final")
            else:
                await trio.sleep(SURVEY_S)
        elif verdict.step is Step.OPEN and self._clock() >= self._open_after_s and not self._led_elsewhere():
            await self._branch([PeerId(node.peer) for node, answer in answers.items() if answer.incarnation])
        else:
            await trio.sleep(SURVEY_S)

    def _led_elsewhere(self) -> bool:
        """Somebody was heard of lately that leads the job: this member was replaced, or the way to it is."""
        known = self._knowledge.standing(self._replica.job)
        return known is not None and known[2] < RECOVERY_S

    async def _branch(self, survivors: list[PeerId]) -> None:
        replica = self._replica
        state, payloads = replica.chronicle.snapshot(), replica.uncommitted()
        raft_log = replica.raft.log
        epoch, version = base(replica, self._knowledge)
        try:
            branch = replica.branch.child(
                raft_log.last_term,
                raft_log.last_index,
                codec.encode((state, payloads)),
                replica.node.peer,
                epoch,
                version + NEWS_SLACK,
            )
        except RefusedError as error:
            self.waiting = str(error)
            await trio.sleep(SURVEY_S)
            return
        log.warning(
            "job %s: a majority of its replicas is gone; it goes on from what this one has (entry %d of epoch %d)",
            replica.job.hex()[:8],
            raft_log.last_index,
            raft_log.last_term,
        )
        await self._open(replica, branch, state, payloads, survivors)


def base(replica: Replica, knowledge: Knowledge) -> tuple[int, int]:
    """The newest (epoch, version) of this replica's branch that is known here."""
    known = knowledge.standing(replica.job)
    mine = replica.led_term, 0
    if known is not None and known[0][0].name == replica.branch.name:
        return max(mine, known[0][1:3])
    return mine


def standing(replica: Replica, knowledge: Knowledge) -> Standing:
    """How the replica's branch stands, as far as is known here."""
    return replica.branch, *base(replica, knowledge), replica.chronicle.outcome is not None


def _what_for(replica: Replica, verdict: Verdict) -> str:
    """One line for people."""
    voters = replica.raft.log.config.voters
    names = ", ".join(sorted(node.peer.hex()[:8] for node in verdict.missing))
    match verdict.step:
        case Step.STRICT:
            what = "a strict job waits for a majority of them"
        case Step.FOLLOW:
            what = f"peer {verdict.opener.peer.hex()[:8]} has the newest copy and is to go on"
        case Step.OPEN:
            what = "it goes on from the copy here"
        case _:
            return "a new leader is being elected"
    return f"{len(verdict.missing)} of {len(voters)} replicas can't be reached ({names}): {what}"
