"""When survivors of a lost majority open a branch, and which of two histories of a job goes on where they meet (DESIGN,
section 6).

Rules of the survey: no branch where anybody hears a leader, knows an outcome, or where a majority of the configuration can be
reached (then an election is due, nothing else); else the most advanced of those reached opens it, and the others wait for it.
Rules of the meeting: an outcome beats none, whoever has it: users have seen it, and going on could only contradict it. Else,
within a branch the higher (epoch, version) wins; between a branch and one of its ancestors the ancestor wins if both are over, or
if its news is newer than what the branch was opened from, which proves a majority; between others the lower name wins, compared
where their histories part. No I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from grid.core.mandate import Branch
from grid.core.messages import Surveyed
from grid.core.raft_messages import Config, NodeId

RECOVERY_S: Final = 6.0
"""Without a leader before a survey: several elections fail in that time only if there is no majority."""
NEWS_SLACK: Final = 3
"""News of the parent that may be on its way when a branch is opened: only what is newer by more than this proves that the
parent still has a majority. A living one proves it within a few announcements."""

Standing: TypeAlias = tuple[Branch, int, int, bool]
"""branch, epoch, version, final."""


def wins(a: Standing, b: Standing) -> bool:
    """Whether `a` replaces `b`. Never both ways; equal standings replace nothing, nor does anything replace its own outcome."""
    branch_a, *order_a, final_a = a
    branch_b, *order_b, final_b = b
    if final_a != final_b:
        return final_a
    if branch_a.name == branch_b.name:
        return order_a > order_b and not final_b
    if branch_a.name in branch_b.ancestors:
        return _parent_wins(a, branch_b)
    if branch_b.name in branch_a.ancestors:
        return not _parent_wins(b, branch_a)
    return path(branch_a) < path(branch_b)


def _parent_wins(parent: Standing, child: Branch) -> bool:
    branch, epoch, version, final = parent
    return final or (epoch, version) > child.base(branch.name)


def path(branch: Branch) -> tuple[bytes, ...]:
    """The names of its ancestors and its own: of unrelated branches the lower one goes on."""
    return (*branch.ancestors, branch.name)


# ---- the survey --------------------------------------------------------------------------------------------------------


class Step(enum.Enum):
    """What a survey leads to."""

    WAIT = "wait"  # somebody is led, or a majority is there
    FINAL = "final"  # the job is over
    OPEN = "open"  # this member opens a branch
    FOLLOW = "follow"  # another one should
    STRICT = "strict"  # a branch is due, but the job forbids it


@dataclass(frozen=True, slots=True)
class Verdict:
    """`opener`: the most advanced survivor. `missing`: voters that did not answer, or have no replica any more."""

    step: Step
    opener: NodeId
    missing: tuple[NodeId, ...] = ()


def judge(me: NodeId, log_end: tuple[int, int], config: Config, answers: Mapping[NodeId, Surveyed], strict: bool) -> Verdict:
    """What follows from the answers of the other members. log_end: this member's (last_term, last_index)."""
    holders = {node: answer for node, answer in answers.items() if answer.incarnation == node.incarnation}
    ends = {node: (answer.last_term, answer.last_index) for node, answer in holders.items()} | {me: log_end}
    opener = min(ends, key=lambda node: (-ends[node][0], -ends[node][1], node.peer))
    missing = tuple(node for node in config.voters if node not in ends)
    if any(answer.final for answer in answers.values()):
        return Verdict(Step.FINAL, opener, missing)
    if any(answer.led for answer in answers.values()) or len(config.voters) - len(missing) >= config.quorum:
        return Verdict(Step.WAIT, opener, missing)
    if strict:
        return Verdict(Step.STRICT, opener, missing)
    return Verdict(Step.OPEN if opener == me else Step.FOLLOW, opener, missing)
