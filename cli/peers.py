"""Who belongs to the grid: invite, trust, revoke, leave."""

from __future__ import annotations

import contextlib
import enum
import time
from typing import Annotated

import typer

from cli.console import console, short
from cli.options import Debug, Json, open_client
from grid.config import ConfigError, Home, parse_duration

STOP_TIMEOUT_S = 10.0
"""For a peer that has answered to end its processes."""


class RoleName(enum.StrEnum):
    """What an invited machine may do."""

    member = "member"
    worker = "worker"
    submitter = "submitter"
    admin = "admin"


def invite(
    uses: Annotated[int, typer.Option("--uses", min=1, max=10_000, help="How many machines may join with it.")] = 1,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="How long it is good for.")] = "24h",
    role: Annotated[RoleName, typer.Option("--role", help="What the machines may do.")] = RoleName.member,
    same_owner: Annotated[
        bool, typer.Option("--same-owner", help="The machines are yours: they trust each other's jobs.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print an invite: one word to type on the next machine after 'grid join'."""
    expires_s = parse_duration(expires)
    _home, client = open_client()
    with client:
        text = client.call("invite", uses=uses, expires_s=expires_s, role=role.value, same_owner=same_owner)["invite"]
    if json:
        console.record({"invite": text, "uses": uses, "expires_s": expires_s, "role": role.value})
    else:
        console.data(text)


def trust(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer's id, a unique prefix of it, or 'all'.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a peer's jobs run here where this machine has no sandbox. This home's own always may."""
    _home, client = open_client()
    with client:
        trusted = client.call("trust", peer=peer)
    if json:
        console.record({"trusted": trusted})
    else:
        console.say(f"jobs of {'every peer' if peer == 'all' else short(peer)} may run here unsandboxed from now on")


def revoke(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer's id, or a unique prefix of it.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Throw a peer out of the grid, for good."""
    _home, client = open_client()
    with client:
        revoked = client.call("revoke", peer=peer)
    if json:
        console.record({"revoked": revoked})
    else:
        console.say(f"{short(peer)} is out; the others learn of it within seconds")


def leave(
    forget: Annotated[bool, typer.Option("--forget", help="Drop the membership, too: coming back needs an invite.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --forget: even if jobs are lost that no other machine holds.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand over what only this machine holds, then stop its peer.

    Jobs led here go on elsewhere. A job that no other machine holds stays on this one's disk and goes on when the machine
    joins again; with --forget it would be lost, so that is refused.
    """
    home, client = open_client()
    with client:
        for name, data, _body in (stream := client.stream("leave", forget=forget, **({"force": True} if force else {}))):
            if name == "note":
                console.say(str(data.get("text", "")), "dim")
    _wait_until_free(home)
    if json:
        console.record({"left": True, "forgotten": forget, **(stream.result or {})})
    else:
        console.say("this machine's peer has left" + (" and forgot the grid" if forget else ""))


def _wait_until_free(home: Home) -> None:
    """Wait until the peer's process is gone, so that a `join` typed next finds the home free."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError), home.lock():
            return
        time.sleep(0.02)
