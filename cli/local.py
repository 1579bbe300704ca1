"""A throwaway grid on this machine: N peers in temporary homes, gone when the command is.

Each peer holds the read end of a pipe whose write end is ours: however this process ends, SIGKILL included, the kernel
closes it and the peers stop and remove their homes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from cli.spawn import start_peer, wait_ready
from grid.api.client import Client
from grid.config import slots_default

PEERS_MAX = 64
STOP_TIMEOUT_S = 5.0
"""Peers of a throwaway grid have nothing to hand over."""
INVITE_LIFETIME_S = 600.0


class LocalGrid:
    """A context: entering starts the first peer, `ready` waits for it and the others, leaving ends them all."""

    def __init__(self, peers: int) -> None:
        self._peers = peers
        self._slots = max(1, slots_default() // peers)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._root = Path()
        self._stopped = False

    def __enter__(self) -> LocalGrid:
        self._root = Path(tempfile.mkdtemp(prefix="grid-"))
        try:
            self._start(0)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def home(self) -> Path:
        """The home of the peer that the command talks to."""
        return self._root / "0"

    @property
    def staging(self) -> Path:
        """A folder on the same disk as the homes, which exists from the start."""
        return self._root

    def ready(self) -> None:
        """Wait until all peers serve. Raises ControlError."""
        wait_ready(self._processes[0], self._log(0))
        if self._peers == 1:
            return
        with Client.open(self.home) as client:
            invite = client.call("invite", uses=self._peers - 1, expires_s=INVITE_LIFETIME_S, role="member", same_owner=True)[
                "invite"
            ]
        for index in range(1, self._peers):
            self._start(index, invite)
        for index in range(1, self._peers):
            wait_ready(self._processes[index], self._log(index))

    def _log(self, index: int) -> Path:
        return self._root / f"{index}.log"

    def _start(self, index: int, invite: str = "") -> None:
        arguments = ["--throwaway", "--home", str(self._root / str(index)), "--listen", "127.0.0.1:0"]
        arguments += ["--slots", str(self._slots), "--name", f"local-{index}", *(["-"] if invite else [])]
        with self._log(index).open("wb") as log:
            process = start_peer(arguments, log)
        self._processes.append(process)
        if invite:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{invite}\n".encode())
                process.stdin.flush()

    def _stop(self) -> None:
        """End every peer and its children, and remove the homes. A Ctrl-C meanwhile changes nothing: this is short."""
        if self._stopped:
            return
        self._stopped = True
        with _uninterrupted():
            for process in self._processes:
                with contextlib.suppress(OSError):
                    process.terminate()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.01))
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
            shutil.rmtree(self._root, ignore_errors=True)


class _uninterrupted:
    def __enter__(self) -> None:
        self._old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
