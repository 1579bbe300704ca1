"""The jobs a peer knows: those it leads, those it keeps the outcome of, those it can ask others about.

`ask` is the one way to learn something of any job: answered here when this peer leads or keeps it, else by the peer that
does. Answers are JSON with an optional raw body. Rules: a job's folder holds its signed spec from before it is announced,
its outcome from before anyone is told; a job whose leader stopped without an outcome is failed, and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.api.client import ControlError
from grid.core import limits
from grid.core.board import Board
from grid.core.job import CANCELLED, FAILED, FINAL, JobId, JobSpec, Outcome, SignedSpec, job_id
from grid.core.messages import Answer, Ask, decode, encode
from grid.jobplace import clean
from grid.jobview import JobView
from grid.leadjob import LeadJob, describe, write_record
from grid.transport.errors import RemoteError, TransportError

if TYPE_CHECKING:
    from grid.transport.mesh import Mesh

ARCHIVED_MAX = 200
"""Ended jobs kept with output and files; the oldest go first."""
EXPLAIN_PEERS = 64
log = logging.getLogger(__name__)


class Archived:
    """An ended job, as its folder has it."""

    def __init__(self, job: JobId, spec: JobSpec, outcome: Outcome, folder: Path, shown: dict[str, Any]) -> None:
        self.job = job
        self.spec = spec
        self.view = JobView(folder)
        self.view.outcome = outcome
        self.view.state = outcome.state
        self.shown = shown


class Jobs:
    """The registry. `spawn` starts a task that outlives the caller."""

    def __init__(self, folder: Path, me: PeerId, board: Board, mesh: Mesh | None, forget: Callable[[str], None]) -> None:
        self.folder = folder
        self.me = me
        self.board = board
        self.led: dict[JobId, LeadJob] = {}
        self.archived: dict[JobId, Archived] = {}
        self._mesh = mesh
        self._forget = forget

    # ---- keeping ----

    def load(self) -> None:
        """Read the folders of earlier runs."""
        for folder in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime):
            try:
                if not (folder / "spec").exists():
                    clean(folder)  # a peer that only helped was killed meanwhile
                if folder.exists():
                    self._load(folder)
            except (OSError, ValueError) as error:
                log.warning("the job folder %s is damaged: %s", folder.name[:8], error)

    def _load(self, folder: Path) -> None:
        signed = codec.decode((folder / "spec").read_bytes(), SignedSpec)
        job = job_id(signed.payload)
        spec = codec.decode(signed.payload, JobSpec)
        if (folder / "outcome").exists():
            outcome = codec.decode((folder / "outcome").read_bytes(), Outcome)
        else:
            outcome = Outcome(FAILED, None, "the peer that led the job stopped before it ended", code="leader-stopped")
            write_record(folder / "outcome", codec.encode(outcome))
            clean(folder)
        shown: dict[str, Any] = {}
        if (folder / "shown.json").exists():
            shown = json.loads((folder / "shown.json").read_bytes())
        self.archived[job] = Archived(job, spec, outcome, folder, shown)

    def begin(self, job: JobId, lead: LeadJob, signed: SignedSpec) -> None:
        """A job is led here from now on; its spec is on disk when this returns. Raises OSError."""
        write_record(lead.folder / "spec", codec.encode(signed))
        self.led[job] = lead

    def ended(self, lead: LeadJob) -> None:
        """Move a final job to the archive."""
        assert lead.view.outcome is not None
        shown = lead.describe()
        try:
            write_record(lead.folder / "shown.json", json.dumps(shown).encode())
        except OSError as error:  # a full disk costs what `show` tells after a restart, not this peer
            log.warning("job %s: its summary can't be written: %s", lead.job.hex()[:8], error)
        archived = Archived(lead.job, lead.spec, lead.view.outcome, lead.folder, shown)
        archived.view.prints = lead.view.prints
        self.archived[lead.job] = archived
        self.led.pop(lead.job, None)
        while len(self.archived) > ARCHIVED_MAX:
            oldest = next(iter(self.archived))
            del self.archived[oldest]
            self._forget(f"outcome:{oldest.hex()}")
            shutil.rmtree(self.folder / oldest.hex(), ignore_errors=True)

    # ---- finding ----

    def known(self) -> dict[JobId, dict[str, Any]]:
        """A line about each job this peer knows, newest first."""
        table: dict[JobId, dict[str, Any]] = {}
        for job, entry in self.board.entries():
            table[job] = summary(job, entry.spec, entry.news.state, entry.leader)
            silent_s = trio.current_time() - entry.heard_s
            table[job]["reachable"] = not entry.live or silent_s <= limits.JOB_FORGET_S
        for job, archived in self.archived.items():
            table[job] = summary(job, archived.spec, archived.view.state, self.me, archived.shown.get("stages", ()))
        for job, lead in self.led.items():
            table[job] = summary(job, lead.spec, lead.view.state, self.me, lead.describe()["stages"])
        return dict(sorted(table.items(), key=lambda item: -item[1]["submitted_s"]))

    def resolve(self, prefix: str) -> JobId:
        """The job whose id begins so. Raises ControlError."""
        table = self.known()
        found = [job for job in table if job.hex().startswith(prefix)]
        if len(found) > 1:
            names = " or ".join(job.hex()[:12] for job in found[:4])
            raise ControlError("ambiguous-job", f"{prefix!r} may be {names}", "type more of the id")
        if found:
            return found[0]
        with contextlib.suppress(ValueError):
            if len(prefix) == 64:
                return JobId(bytes.fromhex(prefix))
        raise ControlError("unknown-job", f"no job {prefix!r} is known here", "list jobs with: grid jobs")

    # ---- asking ----

    async def ask(self, job: JobId, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        """Ask whoever leads or keeps the job. Raises ControlError."""
        if job in self.led or job in self.archived:
            return await self.answer(job, method, params)
        entry = self.board.get(job)
        if entry is None or self._mesh is None:
            raise ControlError("unknown-job", f"no job {job.hex()[:12]} is known here", "list jobs with: grid jobs")
        wait_s = float(params.get("wait_s", 0.0)) + limits.CONTROL_TIMEOUT_S
        question = encode(Ask(method, json.dumps({**params, "job": job.hex()}).encode()))
        name = entry.news.leader.hex()[:8]
        try:
            answer = decode(await self._mesh.request(entry.leader, question, wait_s))
        except RemoteError as error:
            message, _, hint = str(error).partition("\n")
            raise ControlError(error.code, message, hint) from None
        except (TransportError, codec.CodecError, trio.TooSlowError) as error:
            hint = "if that machine is gone, submit the job again"
            raise ControlError(
                "leader-unreachable", f"peer {name}, which leads the job, can't be reached: {error}", hint
            ) from None
        if not isinstance(answer, Answer):
            raise ControlError("protocol", f"peer {name} gave no answer")
        return json.loads(answer.result), answer.body

    async def answer(self, job: JobId, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        """Answer for a job led or kept here. Raises ControlError."""
        lead = self.led.get(job)
        archived = self.archived.get(job)
        if lead is None and archived is None:
            raise ControlError("unknown-job", f"no job {job.hex()[:12]} is kept here", "list jobs with: grid jobs")
        view = lead.view if lead is not None else archived.view if archived else None
        assert view is not None
        match method:
            case "poll":
                answer, body = await view.poll(params)
                if lead is not None and lead.leader is not None:
                    shown = lead.describe()
                    answer["stages"], answer["peers"] = shown["stages"], sum(1 for p in shown["peers"].values() if p["executed"])
                elif archived is not None:
                    answer["stages"] = archived.shown.get("stages", [])
                    answer["peers"] = len(archived.shown.get("peers", ()))
                if answer["state"] in FINAL:
                    answer["outcome"] = outcome_of(view.outcome)
                return answer, body
            case "show":
                return (lead.describe() if lead is not None else self._show(job)), b""
            case "task_log":
                stage, index = int(params["stage"]), int(params["index"])
                printed = view.prints.of_task(stage, index)
                if not printed:
                    shown = lead.describe() if lead is not None else self._show(job)
                    _check_task(shown.get("stages", []), stage, index)
                return {}, printed
            case "files":
                files = view.outcome.files if view.outcome else ()
                return [{"name": f.name, "size": f.blob.size, "blob": f.blob.id.hex(), "mode": f.mode} for f in files], b""
            case "cancel":
                if lead is None:
                    return {"state": view.state}, b""
                lead.end(CANCELLED, None, "")
                return {"state": CANCELLED}, b""
            case "explain":
                return {"reasons": explain(lead) if lead is not None else []}, b""
        raise ControlError("unknown-method", f"a job has no {method!r}")

    def _show(self, job: JobId) -> dict[str, Any]:
        archived = self.archived[job]
        shown = archived.shown
        return describe(job, archived.spec, archived.view, 1, self.me, shown.get("stages", []), shown.get("peers", {}))


def summary(job: JobId, spec: JobSpec, state: str, leader: PeerId, stages: Any = ()) -> dict[str, Any]:
    """One job in a list."""
    return {
        "id": job.hex(),
        "name": spec.name,
        "owner": spec.owner.hex(),
        "owner_name": spec.owner_name,
        "state": state,
        "leader": leader.hex(),
        "done": sum(stage["done"] for stage in stages),
        "total": sum(stage["total"] for stage in stages),
        "failed": sum(stage["failed"] for stage in stages),
        "submitted_s": spec.created_s,
        "reachable": True,  # False: nothing was heard of its leader for a while
    }


def _check_task(stages: list[dict[str, Any]], stage: int, index: int) -> None:
    """Raises ControlError unless the job has this task."""
    found = next((each for each in stages if each["index"] == stage), None)
    if found is None or index >= found["total"]:
        what = f"no stage {stage}" if found is None else f"no task {stage}:{index}, the stage has {found['total']}"
        raise ControlError("unknown-task", f"the job has {what}", "list its stages with: grid show JOB")


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


def explain(lead: LeadJob) -> list[dict[str, Any]]:
    """Why tasks of a job wait."""
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
