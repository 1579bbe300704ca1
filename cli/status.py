"""`grid status`: the grid as this machine's peer sees it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cli.console import console, format_age, is_terminal, job_state, owner_of, short
from cli.options import Debug, Json, open_client
from grid.api.client import Client

WATCH_INTERVAL_S = 1.0
JOBS_SHOWN_MAX = 15
"""Below the peers, the newest first: more would push the peers off the screen."""


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it on the screen, live.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show peers, slots, load, jobs and who leads them."""
    _home, client = open_client()
    with client:
        if not watch:
            show(client.call("status"))
        elif not json and is_terminal(sys.stdout):
            _watch_on_screen(client)
        else:
            _watch_as_lines(client)


def show(found: Mapping[str, Any]) -> None:
    """Print one status object."""
    if console.json:
        console.record(found)
        return
    peers = list(found.get("peers", ()))
    console.say(f"grid {short(str(found.get('grid', '')))}, {len(peers)} peer{'s' * (len(peers) != 1)}", "bold")
    console.table(
        ["PEER", "NAME", "STATE", "SLOTS", "LEADS", "ADDRESS", "OWNER", "VERSION"],
        [_peer_row(peer, found.get("self")) for peer in peers],
        states=2,
    )
    if jobs := list(found.get("jobs", ())):
        console.data("")
        show_jobs(jobs[:JOBS_SHOWN_MAX])
        if len(jobs) > JOBS_SHOWN_MAX:
            console.say(f"and {len(jobs) - JOBS_SHOWN_MAX} older jobs: grid jobs", "dim")


def _peer_row(peer: Mapping[str, Any], own_id: object) -> list[str]:
    slots = peer.get("slots") or {}
    return [
        short(str(peer.get("id", ""))),
        str(peer.get("name", "")) + (" (this)" if peer.get("id") == own_id else ""),
        str(peer.get("state", "")),
        f"{slots.get('busy', 0)}/{slots.get('total', 0)}",
        " ".join(short(str(job)) for job in peer.get("leads", ())) or "-",
        str(peer.get("address", "")),
        owner_of(peer),
        str(peer.get("version", "")),
    ]


def show_jobs(jobs: list[Mapping[str, Any]]) -> None:
    """Print a table of jobs."""
    console.table(
        ["JOB", "NAME", "STATE", "DONE", "FAILED", "LEADER", "EPOCH", "REPLICAS", "OWNER", "AGE"],
        [
            [
                short(str(job.get("id", ""))),
                str(job.get("name", "")),
                job_state(job),
                f"{job.get('done') or 0}/{job.get('total') or 0}",
                str(job.get("failed") or 0),
                short(str(job.get("leader") or "-")),
                str(job.get("epoch", "-")),
                str(job.get("replicas", "-")),
                owner_of(job),
                format_age(job.get("submitted_s")),
            ]
            for job in jobs
        ],
        states=2,
    )


def _watch_on_screen(client: Client) -> None:
    from rich.console import Console
    from rich.live import Live

    from cli.live import GridView

    view = GridView()
    view.update(client.call("status"))
    try:
        with Live(view.render(), console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(view.render(), refresh=True)
                time.sleep(WATCH_INTERVAL_S)
                view.update(client.call("status"))
    except KeyboardInterrupt:
        return


def _watch_as_lines(client: Client) -> None:
    try:
        while True:
            show(client.call("status"))
            time.sleep(WATCH_INTERVAL_S)
    except KeyboardInterrupt:
        return
