"""What this machine's commands can ask of their peer: one method each, over the control socket.

Results are plain data in the shapes the commands' --json prints. A method about a job works from any member: it asks
whoever leads or keeps the job, and follows by long polls at byte offsets, across changes of the leader.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.node import Unanswered
from grid.api.client import ControlError
from grid.config import format_address
from grid.control import Call, Handler
from grid.core import limits
from grid.core.errors import GridError
from grid.core.job import FINAL, JobId, sign_spec
from grid.core.messages import Answer, Ask, decode, encode
from grid.submission import make_spec
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.peer import Peer

STATUS_PEERS_MAX: Final = 1_000
STATUS_S: Final = 2.0
"""For all peers' answers: what has not answered then is shown as silent."""
STATUS_JOBS_MAX: Final = 100
JOBS_PEERS_MAX: Final = 32
"""Peers asked for their jobs."""
FILE_BYTES: Final = 1 << 20
UNBUILT: Final = ("verify", "network")
"""Options that are kept in the spec and change nothing yet."""
HOLDERS_ASKED_MAX: Final = 16
"""Peers asked for a file that a job left."""
METHODS: Final = (
    *("status", "invite", "leave", "trust", "revoke", "submit", "follow", "jobs", "show", "logs"),
    *("wait", "cancel", "result", "result_file", "explain", "resolve", "doctor", "attach"),
)


class Handlers:
    """The table of methods."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def table(self) -> dict[str, Handler]:
        """By the names that `grid.api.client` uses."""
        methods: dict[str, Callable[[Call], Awaitable[Any]]] = {name: getattr(self, name) for name in METHODS}
        return methods

    # ---- the grid ----

    async def status(self, call: Call) -> Any:
        """All peers, as they say of themselves."""
        peer = self._peer
        contacts = [contact for contact in await peer.node.crawl() if contact.id != peer.me][:STATUS_PEERS_MAX]
        rows: dict[bytes, dict[str, Any]] = {}
        jobs: list[dict[str, Any]] = []

        async def ask_jobs() -> None:
            jobs.extend(await self._all_jobs({row["leader"] for row in peer.jobs.known().values()}))

        async def ask(contact: Any) -> None:
            row = {"id": contact.id.hex(), "address": format_address(contact.address)}
            try:
                rows[contact.id] = row | _peer_row(await peer.node.ask_info(contact, STATUS_S))
            except (OSError, Unanswered, CodecError):
                rows[contact.id] = row | _silent_row()

        with trio.move_on_after(STATUS_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_jobs)
                for contact in contacts:
                    nursery.start_soon(ask, contact)
        own = {"id": peer.me.hex(), "address": peer.addresses()[0]} | _peer_row(peer.info())
        rest = [rows.get(c.id, {"id": c.id.hex(), "address": format_address(c.address)} | _silent_row()) for c in contacts]
        return {
            "grid": peer.membership.grid.hex(),
            "self": peer.me.hex(),
            "peers": [own, *sorted(rest, key=lambda row: (row["name"], row["id"]))],
            "jobs": (jobs or list(peer.jobs.known().values()))[:STATUS_JOBS_MAX],
        }

    async def invite(self, call: Call) -> Any:
        """{"invite": text}."""
        params = call.params
        text = await self._peer.admission.invite(
            str(params.get("role", "member")),
            int(params.get("uses", 1)),
            float(params.get("expires_s", 86_400.0)),
            bool(params.get("same_owner", False)),
        )
        return {"invite": text}

    async def leave(self, call: Call) -> Any:
        """Hand over what is led here, drain, answer, stop. Raises ControlError: jobs would be lost, and nothing was done."""

        async def note(text: str) -> None:
            await call.event("note", {"text": text})

        forget = bool(call.params.get("forget", False))
        alone, bound = self._peer.jobs.stranded()
        if (alone or bound) and forget and not call.params.get("force"):
            names = " ".join(job.hex()[:8] for job in (*alone, *bound))
            hint = "wait for them, have another machine join, or lose them with: grid leave --forget --force"
            raise ControlError("jobs-here", f"no other machine holds what this one runs: {names}", hint)
        for job in alone:
            end = "is lost with this home's membership" if forget else "goes on here when this machine joins again"
            await note(f"job {job.hex()[:8]} is on this machine alone: it {end}")
        for job in bound:
            await note(f"job {job.hex()[:8]} is driven by a process of this machine: it ends")
        await self._peer.leave(note, forget)
        await call.reply({})
        self._peer.stop.cancel()
        return {}

    async def trust(self, call: Call) -> Any:
        """Remember a peer (or all) whose jobs may run here without a sandbox."""
        return self._peer.trust(str(call.params["peer"]))

    async def revoke(self, call: Call) -> Any:
        """Revocation has an issue of its own."""
        raise ControlError("not-yet", "revoking a peer is not built yet", "let its certificate run out, or found a new grid")

    async def doctor(self, call: Call) -> Any:
        """What only the running peer knows."""
        others = len([c for c in self._peer.node.contacts() if c.id != self._peer.me])
        linked = len(self._peer.mesh.connected())
        text = f"{others} other peers known, {linked} connected"
        return {"checks": [{"name": "reach", "ok": others == 0 or linked > 0, "text": text, "hint": ""}]}

    # ---- submitting ----

    async def submit(self, call: Call) -> Any:
        """Accept a packed script; detached: once it is durable; else follow it to its end."""
        submission = call.params["submission"]
        detach = bool(call.params.get("detach"))
        pins = f"submit:{secrets.token_hex(8)}"
        try:
            spec, blobs = await make_spec(self._peer, submission, pins)
            signed = sign_spec(spec, self._peer.identity, self._peer.membership.chain)
            job = await self._peer.lead(spec, signed, pins, blobs)
        except OSError as error:
            raise ControlError("disk", f"the job can't be kept on this peer's disk: {error.strerror}") from None
        except GridError as error:
            raise ControlError(error.code, f"the job was not accepted: {error}", error.hint) from None
        unbuilt = [f"--{name}" for name in UNBUILT if (submission.get("options") or {}).get(name)]
        if unbuilt:
            await call.event("note", {"text": f"{' '.join(unbuilt)}: not built yet, without effect"})
        if not detach:
            await call.event("accepted", {"job": job.hex()})
            await self._follow(call, job, {})
            return {}
        await call.event("submitted", {"job": job.hex()})
        if warning := await self._peer.leading.durable(job):
            await call.event("note", {"text": warning})
        await call.event("accepted", {"job": job.hex()})
        return {}

    # ---- following ----

    async def follow(self, call: Call) -> Any:
        """Output and progress from the given positions to the end."""
        await self._follow(call, _job(call.params), call.params)
        return {}

    async def _follow(self, call: Call, job: JobId, params: dict[str, Any]) -> None:
        """params: from_stdout, from_stderr, prints (bool), from_print and by (as the last print event said)."""
        progress = _Progress(call, str(params.get("by", "")))
        print_at = int(params.get("from_print", 0)) if params.get("prints", True) else -1
        position = {"stdout": int(params.get("from_stdout", 0)), "stderr": int(params.get("from_stderr", 0)), "print": print_at}
        while True:
            asked = {**position, "seen": progress.seen, "wait_s": limits.POLL_S_MAX}
            answer, body = await self._peer.jobs.ask(job, "poll", asked)
            moved = await progress.note(answer)
            at = await _send_output(call, answer, body, position)
            if moved and position["print"] >= 0:  # another leader counts its prints from 0
                position["print"] = 0
                continue
            for stage, index, fd, peer, length in answer["prints"]:
                told = {"stage": stage, "index": index, "fd": fd, "peer": peer, "next": answer["print_next"], "by": progress.by}
                await call.event("print", told, body[at : at + length])
                at += length
            position["print"] = answer["print_next"]
            await progress.show(answer)
            if answer["final"]:
                await call.event("final", answer["outcome"])
                return

    async def logs(self, call: Call) -> Any:
        """The driver's stdout and stderr, or one task's prints."""
        params = call.params
        job = _job(params)
        if params.get("stage") is not None:
            _, body = await self._peer.jobs.ask(job, "task_log", {"stage": params["stage"], "index": params["index"]})
            await call.event("stdout", {"offset": 0}, body)
            return {}
        await self._output(call, job, 0, 0, bool(params.get("follow")))
        return {}

    async def _output(self, call: Call, job: JobId, stdout: int, stderr: int, to_end: bool) -> dict[str, Any]:
        """Stream output from offsets (-1: not that one): what is there now, or to the job's end. Returns the last poll."""
        position = {"stdout": stdout, "stderr": stderr, "print": -1}
        progress = _Progress(call, "")
        while True:
            asked = {**position, "seen": progress.seen, "wait_s": limits.POLL_S_MAX if to_end else 0.0}
            answer, body = await self._peer.jobs.ask(job, "poll", asked)
            await progress.note(answer)
            progress.seen = answer.get("version", -1)
            await _send_output(call, answer, body, position)
            if answer["final"] or (not to_end and not body):
                return dict(answer)

    async def wait(self, call: Call) -> Any:
        """The outcome, once there is one or the time is up."""
        job = _job(call.params)
        timeout_s = call.params.get("timeout_s")
        answer: dict[str, Any] = {"state": "running"}
        progress = _Progress(call, "")
        with trio.move_on_after(float("inf") if timeout_s is None else float(timeout_s)):
            while answer["state"] not in FINAL:
                params = {"stdout": -1, "stderr": -1, "print": -1, "seen": answer.get("version", -1), "wait_s": limits.POLL_S_MAX}
                answer, _ = await self._peer.jobs.ask(job, "poll", params)
                await progress.note(answer)
        return answer.get("outcome") or {"state": answer["state"], "exit_code": None, "signal": None, "error": None}

    async def result(self, call: Call) -> Any:
        """The outcome of an ended job with its stdout and the list of its files. Waits for the end."""
        job = _job(call.params)
        answer = await self._output(call, job, 0 if call.params.get("stdout") else -1, -1, True)
        files, _ = await self._peer.jobs.ask(job, "files", {})
        return {**answer["outcome"], "files": [{"name": f["name"], "size": f["size"]} for f in files]}

    async def result_file(self, call: Call) -> Any:
        """One file that the job left."""
        job = _job(call.params)
        name = str(call.params["name"])
        files, _ = await self._peer.jobs.ask(job, "files", {})
        found = next((f for f in files if f["name"] == name), None)
        if found is None:
            raise ControlError("unknown-file", f"the job left no file {name!r}")
        holders = self._peer.jobs.holders(job)[:HOLDERS_ASKED_MAX]
        store, fetcher = self._peer.services.store, self._peer.services.fetcher
        blob, size = bytes.fromhex(found["blob"]), int(found["size"])
        owner = f"file:{secrets.token_hex(8)}"
        try:
            if not store.has(blob):  # type: ignore[arg-type]
                assert fetcher is not None
                await fetcher.ensure(blob, size, holders, owner=owner)  # type: ignore[arg-type]
            for at in range(0, size, FILE_BYTES):
                data = await store.read(blob, at, min(FILE_BYTES, size - at))  # type: ignore[arg-type]
                await call.event("data", {"offset": at}, data)
        finally:
            store.unpin(owner)
        return {}

    # ---- about jobs ----

    async def jobs(self, call: Call) -> Any:
        """All jobs that this peer or any it can reach knows."""
        return await self._all_jobs(None)

    async def _all_jobs(self, leaders: set[str] | None) -> list[dict[str, Any]]:
        """Newest first, each as its leader has it, where that answers. `leaders`: ask only those peers (hex)."""
        table = {row["id"]: row for row in await self._jobs_elsewhere(leaders)}
        for job, row in self._peer.jobs.known().items():
            known = table.get(job.hex())
            if known is None or _worth(row, row["leader"] == self._peer.me.hex()) >= _worth(known, known["told"]):
                table[job.hex()] = row
        for row in table.values():
            row.pop("told", None)
        return sorted(table.values(), key=lambda row: -row["submitted_s"])

    async def _jobs_elsewhere(self, leaders: set[str] | None = None) -> list[dict[str, Any]]:
        peer = self._peer
        contacts = [c for c in peer.node.contacts() if c.id != peer.me and (leaders is None or c.id.hex() in leaders)]
        found: dict[str, dict[str, Any]] = {}

        async def ask(contact: Any) -> None:
            try:
                answer = decode(await peer.mesh.request(contact.id, encode(Ask("jobs", b"{}")), STATUS_S))
            except (TransportError, CodecError, trio.TooSlowError):
                return
            for row in json.loads(answer.result) if isinstance(answer, Answer) else ():
                row["told"] = row["leader"] == contact.id.hex()
                known = found.get(row["id"])
                if known is None or _worth(row, row["told"]) > _worth(known, known["told"]):
                    found[row["id"]] = row

        with trio.move_on_after(STATUS_S):
            async with trio.open_nursery() as nursery:
                for contact in contacts[:JOBS_PEERS_MAX]:
                    nursery.start_soon(ask, contact)
        return list(found.values())

    async def show(self, call: Call) -> Any:
        """One job."""
        return (await self._peer.jobs.ask(_job(call.params), "show", {}))[0]

    async def cancel(self, call: Call) -> Any:
        """End a job: its owner's, or with `force` and the admin role anybody's."""
        job = _job(call.params)
        force = bool(call.params.get("force"))

        def check() -> None:
            self._peer.check_cancel(job, self._peer.me, force)

        return (await self._peer.jobs.ask(job, "cancel", {"force": force}, check))[0]

    async def explain(self, call: Call) -> Any:
        """Why tasks wait."""
        return (await self._peer.jobs.ask(_job(call.params), "explain", {}))[0]

    async def resolve(self, call: Call) -> Any:
        """{"id"} of the one job that the prefix names."""
        prefix = str(call.params["prefix"])
        try:
            return {"id": self._peer.jobs.resolve(prefix).hex()}
        except ControlError as error:
            if error.code != "unknown-job":
                raise
        rows = [row["id"] for row in await self._jobs_elsewhere() if row["id"].startswith(prefix)]
        if len(rows) > 1:
            raise ControlError(
                "ambiguous-job", f"{prefix!r} may be {' or '.join(r[:12] for r in rows[:4])}", "type more of the id"
            )
        if not rows:
            raise ControlError("unknown-job", f"no job {prefix!r} is known to this grid", "list jobs with: grid jobs")
        return {"id": rows[0]}

    async def attach(self, call: Call) -> Any:
        """The client becomes the driver of a job here (`grid.connect`)."""
        from grid.attached import run_attached

        return await run_attached(self._peer, call)


class _Progress:
    """Who answers a follower, and what it was shown of the job's stages."""

    def __init__(self, call: Call, by: str) -> None:
        self.by = by
        """The leadership that answered last: its peer and epoch."""
        self.seen = -1
        """The version of the progress that was shown; each leadership counts its own."""
        self._call = call
        self._shown = -1

    async def note(self, answer: dict[str, Any]) -> bool:
        """Whether another leadership answers than before; that another peer leads is told. A replica is none."""
        by, last = str(answer.get("by", "")), self.by
        if not by or by == last:
            return False
        self.by = by
        self.seen = self._shown = -1
        if last and by.partition(":")[0] != last.partition(":")[0]:
            await self._call.event("note", {"text": "the job's leader went away; following the new one"})
        return bool(last)

    async def show(self, answer: dict[str, Any]) -> None:
        """Tell of progress, once for each version."""
        if "stages" in answer and answer["version"] != self._shown:
            self.seen = self._shown = answer["version"]
            await self._call.event("progress", {"stages": answer["stages"], "peers": answer.get("peers", 0)})


async def _send_output(call: Call, answer: dict[str, Any], body: bytes, position: dict[str, int]) -> int:
    """Pass on the output in an answer and move the positions; returns where in the body the rest begins."""
    at = 0
    for name in ("stdout", "stderr"):
        offset, length = answer[name]
        if length:
            await call.event(name, {"offset": offset}, body[at : at + length])
            position[name] = offset + length
        at += length
    return at


def _job(params: dict[str, Any]) -> JobId:
    return JobId(bytes.fromhex(str(params["job"])))


def _worth(row: dict[str, Any], told_by_leader: bool) -> tuple[bool, int, bool]:
    """Which of two lines about a job says more: an outcome, a later epoch, the leader's own word."""
    return row["state"] in FINAL, int(row.get("epoch", 1)), told_by_leader


def _peer_row(info: bytes) -> dict[str, Any]:
    name, owner, slots, busy, leads, version, state, user = codec.decode(
        info, tuple[str, bytes, int, int, tuple[bytes, ...], str, str, str]
    )
    return {
        "name": name,
        "owner": owner.hex(),
        "owner_name": user,
        "state": state,
        "slots": {"total": slots, "busy": busy},
        "leads": [job.hex() for job in leads],
        "version": version,
    }


def _silent_row() -> dict[str, Any]:
    return {
        "name": "",
        "owner": "",
        "owner_name": "",
        "state": "silent",
        "slots": {"total": 0, "busy": 0},
        "leads": [],
        "version": "",
    }
