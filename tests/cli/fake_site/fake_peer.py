"""A peer that only pretends: the real home, lock and control socket, with jobs that follow the plan in their script.

A plan is a JSON list of steps: ["stdout", text], ["stderr", text], ["print", stage, index, text], ["progress", stages],
["note", text], ["argv"], ["options"], ["stdin"], ["hang"], ["drop"] (the connection), ["files", {name: text}],
["final", {outcome}].
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from dht.core.invite import Invite
from grid.api.client import ControlError
from grid.config import Home, JoinOptions
from grid.control import Call, Control, Handler

PEER, OTHER, GRID, OWNER = "aa" * 20, "bb" * 20, "cc" * 32, "dd" * 20


@dataclass
class Job:
    """One pretended job."""

    id: str
    plan: list[list[Any]]
    argv: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    over: trio.Event = field(default_factory=trio.Event)
    dropped: bool = False

    def output(self, upto: int | None = None) -> bytes:
        steps = self.plan if upto is None else self.plan[:upto]
        return b"".join(step[1].encode() for step in steps if step[0] == "stdout")


class FakePeer:
    """The handlers."""

    def __init__(self, options: JoinOptions, report: Callable[[dict[str, Any]], None], stop: trio.CancelScope) -> None:
        self.options = options
        self.report = report
        self.stop = stop
        self.table: dict[str, Job] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def handlers(self) -> dict[str, Handler]:
        names = ["status", "invite", "leave", "trust", "revoke", "submit", "follow", "jobs", "show", "logs", "wait", "cancel"]
        names += ["result", "result_file", "explain", "resolve", "doctor", "attach", "fault"]
        return {name: self._recorded(name) for name in names}

    def _recorded(self, name: str) -> Handler:
        async def handler(call: Call) -> Any:
            self.calls.append((name, call.params))
            with (Path(str(self.options.home)) / "calls.jsonl").open("a") as file:
                file.write(json.dumps([name, call.params], default=str) + "\n")
            return await getattr(self, name)(call)

        return handler

    # -- the grid

    def summary(self, job: Job) -> dict[str, Any]:
        state = (job.outcome or {"state": "running"})["state"]
        return {"id": job.id, "name": "job\x1b[31m.py", "owner": OWNER, "state": state, "leader": PEER,
                "done": 5, "total": 10, "failed": 0, "submitted_s": time.time() - 60}  # fmt: skip

    async def status(self, call: Call) -> Any:
        peers = [
            {"id": id_, "name": name, "owner": OWNER, "address": "127.0.0.1:4743", "state": "alive", "version": "0.1.0",
             "slots": {"total": 4, "busy": 1}, "leads": list(self.table)[:2]}
            for id_, name in ((PEER, "ours"), (OTHER, "evil\x1b]0;title\x07name"))
        ]  # fmt: skip
        return {"grid": GRID, "self": PEER, "peers": peers, "jobs": [self.summary(job) for job in self.table.values()]}

    async def invite(self, call: Call) -> Any:
        if call.params["uses"] == 77:
            self.report({"event": "invite", "invite": "grid1fresh"})
        return {"invite": Invite(b"g" * 32, b"s" * 32, int(time.time()) + 3600, ("127.0.0.1:4743",)).encode()}

    async def leave(self, call: Call) -> Any:
        await call.event("note", {"text": "handing over 2 blobs"})
        await call.reply({})
        self.stop.cancel()

    async def trust(self, call: Call) -> Any:
        return [call.params["peer"]]

    revoke = trust

    async def doctor(self, call: Call) -> Any:
        return {"checks": [{"name": "reach", "ok": True, "text": "2 peers answer", "hint": ""}]}

    async def fault(self, call: Call) -> Any:
        raise RuntimeError("a bug")

    # -- jobs

    def find(self, call: Call) -> Job:
        job = self.table.get(call.params["job"])
        if job is None:
            raise ControlError("unknown-job", f"no job {call.params['job'][:8]}", "list jobs with: grid jobs")
        return job

    async def resolve(self, call: Call) -> Any:
        prefix = call.params["prefix"]
        found = [id_ for id_ in self.table if id_.startswith(prefix)]
        if len(found) > 1:
            raise ControlError("ambiguous-job", f"{prefix!r} may be {' or '.join(id_[:8] for id_ in found)}", "type more of it")
        if not found:
            raise ControlError("unknown-job", f"no job {prefix!r}", "list jobs with: grid jobs")
        return {"id": found[0]}

    async def submit(self, call: Call) -> Any:
        submission = call.params["submission"]
        plan = json.loads(submission["plan"].removeprefix("#"))
        job = Job(f"{len(self.table):02x}{'e' * 62}", plan, submission["argv"], submission["options"])
        if stdin := job.options.get("stdin"):
            job.options["stdin"] = await trio.Path(stdin).read_text()
        self.table[job.id] = job
        await call.event("accepted", {"job": job.id})
        if not call.params["detach"]:
            await self.play(call, job, 0)
        return {}

    async def follow(self, call: Call) -> Any:
        await self.play(call, self.find(call), call.params["from_stdout"])
        return {}

    async def play(self, call: Call, job: Job, from_stdout: int) -> None:
        at = 0
        for step in job.plan:
            match step:
                case ["stdout", text]:
                    if at + len(text) > from_stdout:
                        await call.event("stdout", {"offset": at}, text.encode())
                    at += len(text)
                case ["stderr", text]:
                    await call.event("stderr", {}, text.encode())
                case ["print", stage, index, text]:
                    await call.event("print", {"stage": stage, "index": index, "fd": 1, "peer": PEER}, text.encode())
                case ["progress", stages]:
                    await call.event("progress", {"stages": stages, "peers": 2})
                case ["note", text]:
                    await call.event("note", {"text": text})
                case ["argv"]:
                    await call.event("stdout", {}, (json.dumps(job.argv) + "\n").encode())
                case ["options"]:
                    await call.event("stdout", {}, (json.dumps(job.options) + "\n").encode())
                case ["hang"]:
                    await job.over.wait()
                case ["drop"]:
                    if not job.dropped:
                        job.dropped = True
                        await trio.aclose_forcefully(call._client._stream)
                        await trio.sleep_forever()
                case ["files", files]:
                    job.files = files
                case ["final", outcome]:
                    job.outcome = {"exit_code": None, "signal": None, **outcome}
                    job.over.set()
        await call.event("final", job.outcome)

    async def jobs(self, call: Call) -> Any:
        return [self.summary(job) for job in self.table.values()]

    async def show(self, call: Call) -> Any:
        job = self.find(call)
        return {**self.summary(job), "epoch": 3, "replicas": [PEER, OTHER], "recovered": False,
                "stages": [{"index": 0, "name": "count", "total": 10, "open": True, "done": 5, "failed": 0}],
                "peers": {PEER: {"done": 5, "executed": 6, "stolen": 0}}, "exit_code": None}  # fmt: skip

    async def logs(self, call: Call) -> Any:
        job = self.find(call)
        if call.params["stage"] is not None:
            await call.event("stdout", {"offset": 0}, f"task {call.params['stage']}:{call.params['index']}\n".encode())
            return {}
        await call.event("stdout", {"offset": 0}, job.output())
        if call.params["follow"]:
            await job.over.wait()
        return {}

    async def wait(self, call: Call) -> Any:
        job = self.find(call)
        with trio.move_on_after(call.params["timeout_s"] or 1000):
            await job.over.wait()
        return job.outcome or {"state": "running"}

    async def cancel(self, call: Call) -> Any:
        job = self.find(call)
        if job.options.get("name") == "not ours" and not call.params["force"]:
            raise ControlError("not-owner", "the job is another owner's", "an admin may: grid cancel --force")
        job.outcome = {"state": "cancelled", "exit_code": None, "signal": None}
        job.over.set()
        return {"state": "cancelled"}

    async def result(self, call: Call) -> Any:
        job = self.find(call)
        if call.params["stdout"]:
            await call.event("stdout", {"offset": 0}, job.output())
        files = [{"name": name, "size": len(text)} for name, text in job.files.items()]
        return {**(job.outcome or {"state": "running"}), "files": files}

    async def result_file(self, call: Call) -> Any:
        text = self.find(call).files[call.params["name"]].encode()
        for at in range(0, len(text), 4):
            await call.event("data", {"offset": at}, text[at : at + 4])
        return {}

    async def explain(self, call: Call) -> Any:
        self.find(call)
        return {"reasons": [{"code": "no-tag", "text": "no peer has the tag gpu", "tasks": 5}]}

    async def attach(self, call: Call) -> Any:
        stream = await call.takeover({})
        data = await stream.receive_some(100)
        await stream.send_all(b"echo " + data)


async def serve(options: JoinOptions, report: Callable[[dict[str, Any]], None]) -> None:
    """Pretend to be a peer until cancelled."""
    home = Home(Path(str(options.home)))
    if os.environ.get("FAKE_PORT_TAKEN"):
        import errno

        raise ExceptionGroup("nursery", [OSError(errno.EADDRINUSE, "Address already in use")])
    with home.lock():
        home.membership.touch()
        (home.path / "settled").write_text(json.dumps([options.listen, options.slots, options.name]))
        async with trio.open_nursery() as nursery:
            peer = FakePeer(options, report, nursery.cancel_scope)
            await nursery.start(Control(home).serve, peer.handlers())
            report({"event": "ready", "grid": GRID, "peer": PEER, "address": "127.0.0.1:4743", "invite": "grid1fakeinvite"})
            report({"event": "note", "text": f"joined with {options.invite}"})
            await trio.sleep_forever()
