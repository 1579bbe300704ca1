"""What runs and why it doesn't: jobs, show, cancel, explain."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cli.console import clean, console, format_age, owner_of, short
from cli.options import Debug, JobArgument, Json, open_client, resolve_job
from cli.status import show_jobs


def jobs(json: Json = False, debug: Debug = False) -> None:
    """List the grid's jobs."""
    _home, client = open_client()
    with client:
        found = client.call("jobs")
    if json:
        console.record({"jobs": found})
    elif found:
        show_jobs(found)
    else:
        console.say("no jobs")


def show(job: JobArgument, json: Json = False, debug: Debug = False) -> None:
    """Show one job: its stages, its replicas, and what each peer did."""
    home, client = open_client()
    with client:
        found = client.call("show", job=resolve_job(home, client, job))
    if json:
        console.record(found)
    else:
        _show(found)


def _show(job: Mapping[str, Any]) -> None:
    fields = {
        "job": str(job.get("id", "")),
        "name": str(job.get("name", "")),
        "owner": owner_of(job),
        "state": str(job.get("state", "")),
        "exit": "" if job.get("exit_code") is None else str(job["exit_code"]),
        "age": format_age(job.get("submitted_s")),
        "error": str(job.get("error") or ""),
        "leader": _leader_of(job),
        "replicas": " ".join(short(str(peer)) for peer in job.get("replicas", ())),
        "branch": short(str(job.get("branch") or "")),
        "recovered": "yes: it went on without a majority of its replicas" if job.get("recovered") else "",
        "outcomes": _outcomes(job),
    }
    console.data("\n".join(f"{name:<10}{clean(value)}" for name, value in fields.items() if value))
    if stages := list(job.get("stages", ())):
        console.data("")
        console.table(
            ["STAGE", "NAME", "DONE", "FAILED"],
            [
                [str(s.get("index")), str(s.get("name", "")), f"{s.get('done', 0)}/{s.get('total')}", str(s.get("failed", 0))]
                for s in stages
            ],
        )
    if peers := dict(job.get("peers") or {}):
        console.data("")
        console.table(
            ["PEER", "DONE", "EXECUTED", "STOLEN"],
            [[short(id_), *(str(peer.get(key, 0)) for key in ("done", "executed", "stolen"))] for id_, peer in peers.items()],
        )


def _leader_of(job: Mapping[str, Any]) -> str:
    if not job.get("leader"):
        return "none at the moment: grid explain says why"
    return f"{short(str(job['leader']))}, epoch {job.get('epoch', 0)}"


def _outcomes(job: Mapping[str, Any]) -> str:
    """What other branches of the job ended with, where several did."""
    others = [f"{each.get('state')} at {short(str(each.get('leader', '')))}" for each in job.get("conflicts", ())]
    return f"{len(others) + 1}, for it went on in two places; the other: {', '.join(others)}" if others else ""


def cancel(
    job: JobArgument,
    force: Annotated[bool, typer.Option("--force", help="Cancel another owner's job (needs the admin role).")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Cancel a job, from any member's machine."""
    home, client = open_client()
    with client:
        full = resolve_job(home, client, job)
        found = client.call("cancel", job=full, force=force) or {}
    if json:
        console.record({"job": full, **found})
    else:
        console.say(f"job {short(full)} is {clean(str(found.get('state', 'cancelled')))}")


def explain(job: JobArgument, json: Json = False, debug: Debug = False) -> None:
    """Say why a job's tasks wait."""
    home, client = open_client()
    with client:
        full = resolve_job(home, client, job)
        found = client.call("explain", job=full)
    if json:
        console.record({"job": full, **found})
        return
    reasons = list(found.get("reasons", ()))
    for reason in reasons:
        tasks = reason.get("tasks")
        text = f"{tasks} task{'s' * (tasks != 1)}: " if isinstance(tasks, int) and tasks else ""
        console.data(clean(f"{text}{reason.get('text', reason.get('code', jsonlib.dumps(reason)))}"))
    if not reasons:
        console.say("nothing waits")
