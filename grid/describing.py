"""What a peer says of a job, for programs: the objects of `grid show`, `grid jobs`, `grid explain`, and of outcomes.

Rules: keys are only ever added; ids are full, in hex. No I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dht.core.identity import PeerId
from grid.core.board import Entry
from grid.core.job import JobId, JobSpec, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grid.core.chronicle import Chronicle
    from grid.jobview import JobView
    from grid.leadjob import LeadJob

EXPLAIN_PEERS = 64


def describe(
    job: JobId,
    spec: JobSpec,
    view: JobView,
    epoch: int,
    leader: PeerId | None,
    stages: list[dict[str, Any]],
    peers: dict[str, Any],
    replicas: Sequence[PeerId] = (),
) -> dict[str, Any]:
    """The object of `grid show --json`, without the schema. leader None: it has none at the moment."""
    outcome = view.outcome
    return {
        "id": job.hex(),
        "name": spec.name,
        "owner": spec.owner.hex(),
        "owner_name": spec.owner_name,
        "state": view.state,
        "epoch": epoch,
        "leader": leader.hex() if leader is not None else "",
        "replicas": [peer.hex() for peer in replicas or ([leader] if leader is not None else [])],
        "recovered": bool(outcome and outcome.recovered),
        "stages": stages,
        "peers": peers,
        "exit_code": outcome.exit_code if outcome else None,
        "error": outcome.error if outcome else "",
        "submitted_s": spec.created_s,
        "ended_s": outcome.ended_s if outcome else None,
    }


def with_branches(shown: dict[str, Any], branch: bytes, entry: Entry | None) -> dict[str, Any]:
    """The same, with what tells of lost majorities: the branch where it isn't the root, outcomes of other branches."""
    found = dict(shown)
    if branch:
        found["branch"] = branch.hex()
        found["recovered"] = True
    if entry is not None and entry.conflict is not None:
        found["conflicts"] = [
            {"branch": each.branch.hex(), "state": each.state, "leader": each.leader.hex()} for each in entry.conflicts
        ]
    return found


def stages_of(chronicle: Chronicle) -> list[dict[str, Any]]:
    """A job's stages as its log has them."""
    return [
        {
            "index": index,
            "name": stage.name,
            "total": stage.declared.count if stage.total is None else max(stage.total, stage.declared.count),
            "open": stage.total is None,
            "done": stage.done,
            "failed": len(stage.failures),
        }
        for index, stage in sorted(chronicle.stages.items())
    ]


def peers_of(chronicle: Chronicle) -> dict[str, Any]:
    """Who did how many tasks, as the log has it."""
    return {PeerId(peer).hex(): {"done": done, "executed": done, "stolen": 0} for peer, done in chronicle.tallies.items()}


def summary(
    job: JobId, spec: JobSpec, state: str, leader: PeerId | None, stages: Any = (), epoch: int = 1, replicas: int = 1
) -> dict[str, Any]:
    """One job in a list. replicas: how many peers are known to hold it."""
    return {
        "id": job.hex(),
        "name": spec.name,
        "owner": spec.owner.hex(),
        "owner_name": spec.owner_name,
        "state": state,
        "leader": leader.hex() if leader is not None else "",
        "epoch": epoch,
        "replicas": replicas,
        "conflict": False,  # True: branches of the job ended twice
        "done": sum(stage["done"] for stage in stages),
        "total": sum(stage["total"] for stage in stages),
        "failed": sum(stage["failed"] for stage in stages),
        "submitted_s": spec.created_s,
        "reachable": True,  # False: nothing was heard of its leader for a while
    }


def summary_of(shown: dict[str, Any], job: JobId, spec: JobSpec) -> dict[str, Any]:
    """One job in a list, from what `describe` says of it."""
    leader = PeerId(bytes.fromhex(shown["leader"])) if shown.get("leader") else None
    replicas = len(shown.get("replicas", ()))
    return summary(job, spec, shown["state"], leader, shown.get("stages", ()), int(shown.get("epoch", 1)), replicas)


def outcome_of(outcome: Outcome | None) -> dict[str, Any]:
    """An outcome for programs."""
    if outcome is None:
        return {"state": "running", "exit_code": None, "signal": None, "error": None}
    error = {"code": outcome.code or "failed", "message": outcome.error, "hint": ""} if outcome.error else None
    return {
        "state": outcome.state,
        "exit_code": outcome.exit_code,
        "signal": outcome.signal or None,
        "error": error,
        "recovered": outcome.recovered,
    }


def leaderless(why: str, chronicle: Chronicle | None) -> list[dict[str, Any]]:
    """Why nothing of a job without a leader runs."""
    tasks = 0
    if chronicle is not None:
        tasks = sum(max(0, stage.declared.count - stage.done - len(stage.failures)) for stage in chronicle.stages.values())
    text = why or "the job has no leader at the moment: its replicas are choosing one"
    return [{"code": "no-leader", "text": text, "tasks": tasks}]


def explain(lead: LeadJob) -> list[dict[str, Any]]:
    """Why tasks of a job led here wait."""
    reasons: list[dict[str, Any]] = []
    if lead.leader is None or lead.place is None:
        text = "the job is being set up: its environment is built, its inputs are read"
        return [{"code": "starting", "text": text, "tasks": 0}]
    site = lead.place.site
    queued = site.deque.total
    if lead.leader.unsettled == 0:
        return [{"code": "driver", "text": "no task waits: the script itself is running", "tasks": 0}]
    running = sum(ticket.hi - ticket.at for worker in site.workers for ticket in worker.tickets.values())
    if running:
        reasons.append({"code": "running", "text": "tasks run on the leader's peer", "tasks": running})
    elsewhere = lead.leader.unsettled - queued - running
    if elsewhere > 0:
        count = len(lead.leader.claims.peers())
        text = f"tasks are held by {count} other peer{'s' * (count != 1)}"
        reasons.append({"code": "elsewhere", "text": text, "tasks": elsewhere})
    for stage in site.deque.stages():
        tags = site.stages[stage].options.tags
        if not site.workshop.tags.issuperset(tags):
            text = f"stage {stage} needs a peer tagged {' '.join(tags)}, which the leader's peer is not"
            reasons.append({"code": "no-tag", "text": text, "tasks": site.deque.count(stage)})
            queued -= site.deque.count(stage)
    if queued > 0:
        if site.workshop.slots:  # a task that wants more than there are takes them all
            reasons.append({"code": "no-free-slot", "text": "tasks wait for a free slot", "tasks": queued})
        else:
            text = "tasks wait for other peers to take them: the leader's peer runs none"
            reasons.append({"code": "no-slot", "text": text, "tasks": queued})
    if lead.outreach is not None:
        for peer, reason in list(lead.outreach.reasons.items())[:EXPLAIN_PEERS]:
            reasons.append({"code": "peer", "text": f"peer {peer.hex()[:8]} can't run it: {reason}", "tasks": 0})
    return reasons
