"""Starting peers as processes of their own: for `join --detach` and for throwaway grids."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from grid.api.client import ControlError

READY_TIMEOUT_S = 60.0
"""A peer is ready in under a second; on a laden machine that builds its first keys it may take many."""
LINE_BYTES_MAX = 64 << 10
"""The ready line is under 3 KiB."""


def start_peer(arguments: Sequence[str], log: IO[bytes], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start `grid join --json ARGUMENTS` in a session of its own; stdin and stdout are pipes, words go to `log`.

    The package is found where it is now, at the end of the path: a user's cli.py in the current folder is not ours.
    """
    root = str(Path(__file__).resolve().parents[1])
    program = f"import sys; sys.path.append({root!r}); from cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, "join", "--json", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=os.environ | (environment or {}),
        start_new_session=True,
    )


def wait_ready(process: subprocess.Popen[bytes], log: Path, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
    """Return what the peer printed when it was ready. Raises ControlError: its own error, or what its log ends with."""
    line = _read_line(process, timeout_s)
    try:
        found = json.loads(line) if line else {}
    except ValueError:
        found = {}
    if isinstance(found, dict) and found.get("event") == "ready":
        return found
    error = found.get("error") if isinstance(found, dict) else None
    if isinstance(error, dict):
        raise ControlError(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
    status = process.poll()
    what = f"was not ready within {timeout_s:.0f} s" if status is None else f"ended at once (status {status})"
    raise ControlError("peer-failed", f"the peer {what}: {_last_line(log)}", "try it in the foreground: grid join")


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while b"\n" not in line and len(line) < LINE_BYTES_MAX:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return b""
            data = os.read(process.stdout.fileno(), LINE_BYTES_MAX)
            if not data:
                process.wait(timeout=READY_TIMEOUT_S)
                return line
            line += data
    return line.partition(b"\n")[0]


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return lines[-1] if lines else "it said nothing"
