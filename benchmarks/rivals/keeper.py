"""Runs one command and ends all that ever descended from it, daemons included, whatever happens to whom.

    python keeper.py FD COMMAND…

Rules: descendants that lose their parent come back to this process (it is a subreaper), so nothing escapes by forking twice
or by a session of its own; only they are killed, by pid. It ends them when the command ends, on SIGTERM, SIGINT or SIGHUP, and
when FD (a pipe that its starter holds open) reads end-of-file: the starter may be killed without a word. Its exit status is the
command's. Linux only: elsewhere the command is run as it is. Standard library only, and quick to start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
GRACE_S = 0.5
"""What asked-for ends (SIGTERM) may take before they are SIGKILLed."""
ROUNDS_MAX = 200


def descendants() -> list[int]:
    """All that live below this process; zombies are reaped on the way."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    parents.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    left = [os.getpid()]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def reap() -> None:
    """Whoever has come back to us and ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_all() -> None:
    """Ask, then kill, until nobody is left."""
    deadline = time.monotonic() + GRACE_S
    for number in range(ROUNDS_MAX):
        reap()
        pids = descendants()
        if not pids:
            return
        if number == 0 or time.monotonic() > deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if number == 0 else signal.SIGKILL)
        time.sleep(POLL_S)


def main() -> int:
    """Entry point."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    child = os.posix_spawnp(command[0], command, os.environ)
    status: int | None = None
    try:
        while status is None:
            ready = select.select([lifeline, stop], [], [])[0]
            if lifeline in ready:
                break
            if set(os.read(stop, 4096)) - {signal.SIGCHLD}:
                break
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if ended[0] == child:
                        status = os.waitstatus_to_exitcode(ended[1])
    finally:
        end_all()
    return 1 if status is None else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
