"""What an engine leaves behind is ended: daemons too, and also when the runner is gone without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rivals import keeper

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="subreapers are Linux's")

DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep({stay_s})
sys.exit(7)
"""
WITHIN_S = 20.0


def kept(stay_s: float) -> tuple[subprocess.Popen[str], int, int]:
    """A command with a daemon, under a keeper: (the keeper, the lifeline's other end, the daemon's pid)."""
    theirs, ours = os.pipe()
    command = [sys.executable, keeper.__file__, str(theirs), sys.executable, "-c", DAEMON.format(stay_s=stay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[theirs])
    os.close(theirs)
    assert process.stdout is not None
    daemon = int(process.stdout.readline())
    process.stdout.close()
    return process, ours, daemon


def gone(pid: int) -> bool:
    """Ended, and reaped by its keeper."""
    deadline = time.monotonic() + WITHIN_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_daemon_of_a_command_that_ends_is_ended() -> None:
    process, lifeline, daemon = kept(0)
    assert process.wait(WITHIN_S) == 7
    assert gone(daemon)
    os.close(lifeline)


@pytest.mark.parametrize("how", ["terminated", "forgotten"])
def test_the_daemon_of_a_command_that_runs_is_ended(how: str) -> None:
    process, lifeline, daemon = kept(600)
    if how == "terminated":
        process.send_signal(signal.SIGTERM)
    else:
        os.close(lifeline)
    assert process.wait(WITHIN_S) == 1
    assert gone(daemon)
    if how == "terminated":
        os.close(lifeline)
