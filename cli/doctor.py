"""`grid doctor`: what this machine has and can enforce, checked here, and what its peer says of itself if one runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import typer

from cli.console import clean, console, format_size, is_terminal, paint
from cli.errors import FAILED
from cli.options import Debug, Json
from grid.api.client import Client, ControlError, NoPeer
from grid.config import Home, parse_address

DISK_FREE_BYTES_MIN = 1 << 30
"""Below this, spooled results of a modest job fill the disk."""
YEAR_2025_S = 1_735_689_600
PROBE_TIMEOUT_S = 10.0


class Check(NamedTuple):
    """One finding. `ok` is None where something is merely worth knowing."""

    name: str
    ok: bool | None
    text: str
    hint: str = ""


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check this machine: Python, uv, home, ports, clock, disk, sandbox."""
    checks = list(_checks())
    failed = any(check.ok is False for check in checks)
    if json:
        console.record({"ok": not failed, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            _show(check)
    if failed:
        raise typer.Exit(FAILED)


def _show(check: Check) -> None:
    mark, style = {True: ("ok", "green"), False: ("FAIL", "red"), None: ("note", "yellow")}[check.ok]
    painted = paint(mark.ljust(4), style) if is_terminal(sys.stdout) else mark.ljust(4)
    console.data(f"{painted}  {check.name:<8} {clean(check.text)}{' — ' + clean(check.hint) if check.hint else ''}")


def _checks() -> Iterator[Check]:
    yield Check("python", True, f"{sys.version.split()[0]} at {sys.executable}")
    yield _uv()
    try:
        home = Home.open()
    except ControlError as error:
        yield Check("home", False, error.message, error.hint)
        return
    yield Check("home", True, f"{home.path}{'' if home.joined else ' (no grid joined yet)'}")
    yield _disk(home)
    yield _clock()
    yield _sandbox()
    yield from _peer(home)


def _uv() -> Check:
    from importlib.util import find_spec

    if find_spec("uv") is not None:
        import uv

        try:
            return Check("uv", True, str(uv.find_uv_bin()))
        except FileNotFoundError:
            pass
    path = shutil.which("uv")
    if path:
        return Check("uv", True, path)
    return Check("uv", False, "not found: jobs with dependencies can't be built here", "pip install uv")


def _disk(home: Home) -> Check:
    folder = home.path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    ok = free >= DISK_FREE_BYTES_MIN and os.access(folder, os.W_OK)
    return Check("disk", ok, f"{format_size(free)} free at {folder}", "" if ok else "make room, or move it: GRID_HOME")


def _clock() -> Check:
    now_s = time.time()
    if now_s < YEAR_2025_S:
        return Check("clock", False, f"says {time.strftime('%F', time.gmtime(now_s))}", "set it: certificates expire by it")
    return Check("clock", True, time.strftime("%F %T UTC", time.gmtime(now_s)))


def _sandbox() -> Check:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        text = "no bubblewrap: only this home's jobs, and those of peers it trusts, run here"
        return Check("sandbox", None, text, "install the package bubblewrap")
    command = [bwrap, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "true"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
        reason = done.stderr.decode("utf-8", "replace").strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        return Check("sandbox", None, f"bubblewrap does not work here: {reason}", "allow user namespaces")
    return Check("sandbox", True, f"{bwrap} works (jobs do not run in it yet)")


def _peer(home: Home) -> Iterator[Check]:
    try:
        with Client.open(home.path) as client:
            yield Check("peer", True, "runs")
            for found in client.call("doctor").get("checks", ()):
                yield Check(str(found["name"]), found.get("ok"), str(found.get("text", "")), str(found.get("hint", "")))
    except NoPeer as error:
        yield Check("peer", None, error.message, error.hint)
        yield _ports(home)
    except ControlError as error:
        yield Check("peer", False, error.message, error.hint)


def _ports(home: Home) -> Check:
    from grid.config import JoinOptions

    listen = home.settle(JoinOptions(), save=False).listen or ""
    host, port = parse_address(listen)
    for kind, what in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            return Check("ports", False, f"{what} {listen}: {error.strerror}", "choose another: grid join --listen HOST:PORT")
    return Check("ports", True, f"TCP and UDP {listen} are free")
