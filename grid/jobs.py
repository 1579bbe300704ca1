"""The jobs a peer knows: those it leads, those it holds a replica of, those it keeps the outcome of, those it heard of.

`ask` is the one way to learn something of any job (`grid.asking`): answered here when this peer leads or keeps it, else by a
peer that does. Answers are JSON with an optional raw body. Rules: a job's folder holds its signed spec from before it is
announced, its outcome from before anyone is told; a job that lived in this peer alone (its driver was a process here) and has
no outcome after a restart is failed, and says so; one with a journal goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.api.client import ControlError
from grid.asking import Asking
from grid.core import limits
from grid.core.board import Board
from grid.core.job import CANCELLED, FAILED, FINAL, JobId, JobSpec, Outcome, SignedSpec, job_id
from grid.describing import describe, explain, leaderless, outcome_of, summary, summary_of, with_branches
from grid.followed import Followed
from grid.jobplace import clean
from grid.jobview import JobView
from grid.leadjob import LeadJob, write_record

if TYPE_CHECKING:
    from grid.transport.mesh import Mesh

ARCHIVED_MAX: Final = 200
"""Ended jobs kept with output and files; the oldest go first."""
CANCEL_S: Final = 8.0
"""For the outcome of a cancelled job to be final: within the time that who asks from elsewhere waits."""
ALONE: Final = "alone"
"""A file in the folder of a job that lives in this peer only."""
JOURNALS: Final = "raft-*"
"""The journals of a job's log in its folder, one for each branch."""
log = logging.getLogger(__name__)


class Archived:
    """An ended job, as its folder has it."""

    def __init__(
        self, job: JobId, spec: JobSpec, outcome: Outcome, folder: Path, shown: dict[str, Any], view: JobView | None = None
    ) -> None:
        self.job = job
        self.spec = spec
        self.view = view or JobView(folder)
        self.view.stdout.expect(outcome.stdout_bytes)
        self.view.stderr.expect(outcome.stderr_bytes)
        self.view.outcome = outcome
        self.view.state = outcome.state
        self.shown = shown

    def describe(self, me: PeerId) -> dict[str, Any]:
        """The object of `grid show --json`: what its leader said at the end, as far as it is kept."""
        shown = self.shown
        leader = PeerId(bytes.fromhex(shown["leader"])) if shown.get("leader") else me
        replicas = [PeerId(bytes.fromhex(peer)) for peer in shown.get("replicas", ())]
        stages, peers, epoch = shown.get("stages", []), shown.get("peers", {}), int(shown.get("epoch", 1))
        return describe(self.job, self.spec, self.view, epoch, leader, stages, peers, replicas)

    @property
    def branch(self) -> bytes:
        """Where it ended; b"": the root."""
        return bytes.fromhex(self.shown.get("branch", ""))


class Jobs:
    """The registry."""

    def __init__(self, folder: Path, me: PeerId, board: Board, mesh: Mesh | None, forget: Callable[[str], None]) -> None:
        self.folder = folder
        self.me = me
        self.board = board
        self.led: dict[JobId, LeadJob] = {}
        self.followed: dict[JobId, Followed] = {}
        self.archived: dict[JobId, Archived] = {}
        self.unfinished: list[tuple[JobId, SignedSpec, JobSpec, Path]] = []
        """Jobs that had a journal here when `load` read the folders, and no outcome."""
        self.why_leaderless: Callable[[JobId], str] = lambda job: ""
        """Why a job that is followed here has no leader, for people; "": nothing special."""
        self._forget = forget
        self._asking = Asking(self, board, mesh)

    # ---- keeping ----

    def load(self) -> None:
        """Read the folders of earlier runs."""
        for folder in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime):
            try:
                if not (folder / "spec").exists():
                    clean(folder)  # a peer that only helped was killed meanwhile
                if folder.exists():
                    self._load(folder)
            except (OSError, ValueError, codec.CodecError) as error:
                log.warning("the job folder %s is damaged: %s", folder.name[:8], error)

    def _load(self, folder: Path) -> None:
        signed = codec.decode((folder / "spec").read_bytes(), SignedSpec)
        job = job_id(signed.payload)
        spec = codec.decode(signed.payload, JobSpec)
        if (folder / "outcome").exists():
            outcome = codec.decode((folder / "outcome").read_bytes(), Outcome)
        elif any(folder.glob(JOURNALS)):
            clean(folder)
            self.unfinished.append((job, signed, spec, folder))
            return
        elif (folder / ALONE).exists():
            outcome = Outcome(FAILED, None, "the peer that led the job stopped before it ended", code="leader-stopped")
            write_record(folder / "outcome", codec.encode(outcome))
            clean(folder)
        else:
            _forget_folder(folder)  # it was never accepted, or others hold it
            return
        shown: dict[str, Any] = {}
        if (folder / "shown.json").exists():
            shown = json.loads((folder / "shown.json").read_bytes())
        self.archived[job] = Archived(job, spec, outcome, folder, shown)

    def begin(self, job: JobId, lead: LeadJob, signed: SignedSpec) -> None:
        """A job is led here, and lives here alone, from now on; its spec is on disk when this returns. Raises OSError."""
        write_record(lead.folder / ALONE, b"")
        write_record(lead.folder / "spec", codec.encode(signed))
        self.led[job] = lead

    def follow(self, job: JobId, signed: SignedSpec, spec: JobSpec, folder: Path) -> Followed:
        """This peer holds (or is about to hold) a replica of the job's log."""
        followed = self.followed.get(job)
        if followed is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / "spec").exists():
                    write_record(folder / "spec", codec.encode(signed))
            except OSError as error:  # the log's own record has it, too
                log.warning("job %s: its spec can't be written: %s", job.hex()[:8], error)
            followed = self.followed[job] = Followed(job, spec, folder, self.me)
        return followed

    def unfollow(self, job: JobId) -> None:
        """It holds none any more, and the job is not over: others hold it."""
        followed = self.followed.pop(job, None)
        if followed is not None and job not in self.archived:
            _forget_folder(followed.folder)

    def archive(self, job: JobId, spec: JobSpec, outcome: Outcome, shown: dict[str, Any]) -> None:
        """The job is over: keep how it ended. Whoever leads or follows it here does so no more."""
        lead, followed = self.led.pop(job, None), self.followed.pop(job, None)
        known = self.archived.get(job)
        if known is not None and shown.get("leader") != self.me.hex():  # who led it knows more
            return
        folder = self.folder / job.hex()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not (folder / "outcome").exists():
                write_record(folder / "outcome", codec.encode(outcome))
            write_record(folder / "shown.json", json.dumps(shown).encode())
        except OSError as error:  # a full disk costs what `show` tells after a restart, not this peer
            log.warning("job %s: its summary can't be written: %s", job.hex()[:8], error)
        source = lead or followed or known
        self.archived[job] = Archived(job, spec, outcome, folder, shown, source.view if source is not None else None)
        while len(self.archived) > ARCHIVED_MAX:
            oldest = next(iter(self.archived))
            del self.archived[oldest]
            self._forget(f"outcome:{oldest.hex()}")
            shutil.rmtree(self.folder / oldest.hex(), ignore_errors=True)

    def ended(self, lead: LeadJob) -> None:
        """Move a final job that was led here to the archive."""
        assert lead.view.outcome is not None
        self.archive(lead.job, lead.spec, lead.view.outcome, self._shown_by(lead))

    # ---- finding ----

    def known(self) -> dict[JobId, dict[str, Any]]:
        """A line about each job this peer knows, newest first."""
        table: dict[JobId, dict[str, Any]] = {}
        for job, entry in self.board.entries():
            voters = max(1, len(entry.news.mandate.voters), len(entry.spec.replicas))
            table[job] = summary(job, entry.spec, entry.news.state, entry.leader, (), entry.news.epoch, voters)
            silent_s = trio.current_time() - entry.heard_s
            table[job]["reachable"] = not entry.live or silent_s <= limits.JOB_FORGET_S
        for job, followed in self.followed.items():
            heard = table.get(job)
            table[job] = row = summary_of(followed.describe(), job, followed.spec)
            if not row["leader"] and row["state"] not in FINAL and heard is not None:
                row.update(leader=heard["leader"], epoch=heard["epoch"], reachable=False)
        for job, archived in self.archived.items():
            table[job] = summary_of(archived.describe(self.me), job, archived.spec)
        for job, lead in self.led.items():
            if not self.left(lead):
                table[job] = summary_of(lead.describe(), job, lead.spec)
        for job, row in table.items():
            known = self.board.get(job)
            row["conflict"] = known is not None and known.conflict is not None
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

    def left(self, lead: LeadJob) -> bool:
        """The leadership is over though its place is not closed yet: others lead, or will."""
        return bool(getattr(lead, "abandoned", False)) and lead.view.outcome is None

    def stranded(self) -> tuple[list[JobId], list[JobId]]:
        """Jobs led here that nobody can take over: on this machine's disk alone, and driven by a process of it."""
        alone: list[JobId] = []
        bound: list[JobId] = []
        for job, lead in self.led.items():
            if lead.view.outcome is not None or self.left(lead):
                continue
            if lead.replica is None:
                bound.append(job)
            elif all(peer == self.me for peer in lead.replica.voters):
                alone.append(job)
        return alone, bound

    def holders(self, job: JobId) -> list[PeerId]:
        """Peers that most likely have what a job left, best first."""
        return self._asking.keepers(job)

    # ---- asking ----

    async def ask(
        self, job: JobId, method: str, params: dict[str, Any], check: Callable[[], None] = lambda: None
    ) -> tuple[Any, bytes]:
        """Ask whoever leads or keeps the job, and whoever does so next if they go. Raises ControlError.

        check: called before the question is put to this peer's own leadership; raises ControlError.
        """
        return await self._asking.ask(job, method, params, check)

    async def answer(self, job: JobId, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        """Answer for a job led, followed or kept here. Raises ControlError.

        A replica answers for its job only where the asker says so ("replica": true) or the job is over: who leads knows more.
        """
        lead, followed, archived = self.led.get(job), self.followed.get(job), self.archived.get(job)
        if lead is not None and not self.left(lead):
            return await self._answer_leading(lead, method, params)
        if archived is not None:
            return await self._answer_ended(job, archived.view, method, params)
        if followed is None:
            raise ControlError("unknown-job", f"no job {job.hex()[:12]} is kept here", "list jobs with: grid jobs")
        if followed.view.outcome is not None:
            return await self._answer_ended(job, followed.view, method, params)
        if not params.get("replica"):
            raise ControlError("not-leader", f"this peer does not lead job {job.hex()[:12]}")
        return await self._answer_following(followed, method, params)

    async def _answer_leading(self, lead: LeadJob, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        match method:
            case "poll":
                _check_here(lead.view, params)
                answer, body = await lead.view.poll(params)
                if lead.leader is not None:
                    shown = lead.describe()
                    answer["stages"], answer["peers"] = shown["stages"], sum(1 for p in shown["peers"].values() if p["executed"])
                answer["leader"] = self.me.hex()
                answer["by"] = f"{self.me.hex()}:{lead.epoch}"
                return _with_outcome(answer, lead.view), body
            case "show":
                return self._shown_by(lead), b""
            case "task_log":
                return _task_log(lead.view, lead.describe(), params)
            case "files":
                return _files(lead.view.outcome), b""
            case "cancel":
                return await self._cancel(lead), b""
            case "explain":
                return {"reasons": explain(lead)}, b""
        raise ControlError("unknown-method", f"a job has no {method!r}")

    async def _answer_ended(self, job: JobId, view: JobView, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        match method:
            case "poll":
                _check_here(view, params)
                answer, body = await view.poll(params)
                shown = self._shown(job)
                answer["stages"], answer["peers"] = shown.get("stages", []), len(shown.get("peers", ()))
                answer["leader"] = shown.get("leader", "")
                answer["by"] = f"{shown['leader']}:{shown['epoch']}" if shown.get("leader") == self.me.hex() else ""
                return _with_outcome(answer, view), body
            case "show":
                return self._shown(job), b""
            case "task_log":
                if not view.prints.next and self._shown(job).get("leader") != self.me.hex():
                    raise ControlError("not-here", "what its tasks printed is kept by the peer that led the job")
                return _task_log(view, self._shown(job), params)
            case "outcome":  # for a replica that was away when the job ended
                assert view.outcome is not None
                return self._shown(job), codec.encode(view.outcome)
            case "files":
                return _files(view.outcome), b""
            case "cancel":
                return {"state": view.state}, b""
            case "explain":
                return {"reasons": []}, b""
        raise ControlError("unknown-method", f"a job has no {method!r}")

    async def _answer_following(self, followed: Followed, method: str, params: dict[str, Any]) -> tuple[Any, bytes]:
        match method:
            case "poll":
                if followed.replica is not None and followed.replica.empty:
                    raise ControlError("not-here", "nothing of the job's log has reached this peer")
                _check_here(followed.view, params)
                answer, body = await followed.view.poll({**params, "print": -1, "seen": followed.view.version})
                answer |= {"state": followed.state, "print_next": params.get("print", -1), "leader": "", "by": ""}
                answer["final"] = answer["final"] and followed.view.outcome is not None
                return _with_outcome(answer, followed.view), body
            case "show":
                return self._shown(followed.job), b""
            case "explain":
                return {"reasons": leaderless(self.why_leaderless(followed.job), followed.chronicle)}, b""
            case "files":
                return [], b""
        raise ControlError("not-leader", f"only the leader of job {followed.job.hex()[:12]} can do that")

    async def _cancel(self, lead: LeadJob) -> dict[str, Any]:
        """Returns once the job is over: what is not final yet a later leader might not know."""
        lead.end(CANCELLED, None, "")
        with trio.move_on_after(CANCEL_S):
            while lead.view.outcome is None:
                if self.left(lead):
                    raise ControlError("not-leader", "the job got another leader")
                with trio.move_on_after(limits.HEARTBEAT_S):
                    await lead.view.bell.wait()
        if lead.view.outcome is None:
            hint = "its replicas can't be reached: see grid explain, and try again"
            raise ControlError("not-final", "the job can't be cancelled now", hint)
        return {"state": lead.view.state}

    # ---- telling ----

    def _shown_by(self, lead: LeadJob) -> dict[str, Any]:
        branch = lead.replica.branch.name if lead.replica is not None else b""
        return with_branches(lead.describe(), branch, self.board.get(lead.job))

    def _shown(self, job: JobId) -> dict[str, Any]:
        """`grid show` of a job that is not led here."""
        entry = self.board.get(job)
        archived = self.archived.get(job)
        if archived is not None:
            return with_branches(archived.describe(self.me), archived.branch, entry)
        followed = self.followed[job]
        return with_branches(followed.describe(), followed.branch, entry)


def _with_outcome(answer: dict[str, Any], view: JobView) -> dict[str, Any]:
    if answer["state"] in FINAL:
        answer["outcome"] = outcome_of(view.outcome)
    return answer


def _check_here(view: JobView, params: dict[str, Any]) -> None:
    """Raises ControlError when there are bytes at one of these positions which are not on this peer."""
    logs = ((view.stdout, params.get("stdout", -1)), (view.stderr, params.get("stderr", -1)))
    if any(0 <= at < each.length and not each.readable(at) for each, at in logs):
        raise ControlError("not-here", "no peer that answers has that part of the job's output")


def _files(outcome: Outcome | None) -> list[dict[str, Any]]:
    files = outcome.files if outcome else ()
    return [{"name": f.name, "size": f.blob.size, "blob": f.blob.id.hex(), "mode": f.mode} for f in files]


def _task_log(view: JobView, shown: dict[str, Any], params: dict[str, Any]) -> tuple[Any, bytes]:
    """Raises ControlError unless the job has this task."""
    stage, index = int(params["stage"]), int(params["index"])
    printed = view.prints.of_task(stage, index)
    if printed:
        return {}, printed
    found = next((each for each in shown.get("stages", []) if each["index"] == stage), None)
    if found is None or index >= found["total"]:
        what = f"no stage {stage}" if found is None else f"no task {stage}:{index}, the stage has {found['total']}"
        raise ControlError("unknown-task", f"the job has {what}", "list its stages with: grid show JOB")
    return {}, b""


def _forget_folder(folder: Path) -> None:
    (folder / "spec").unlink(missing_ok=True)
    for name in ("stdout", "stderr"):
        (folder / name).unlink(missing_ok=True)
    clean(folder)
