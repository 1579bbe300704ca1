"""How a plain Python process gets a grid: an embedded one of this machine alone, or the peer that runs here.

The embedded grid is a process of its own: `python -P -m grid.embedded --fd N`, in its own process group, so that Ctrl-C
reaches only the script. Its stdin is one JSON object, then the end: {"path": sys.path, "script", "argv", "cwd"}. On the
socket N it speaks the driver's protocol (wire.py): we send Ready, it sends Setup. It ends when the socket does; tasks'
prints go to its stderr, which is ours.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import select
import socket
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from grid.api import session as sessions
from grid.api import wire
from grid.api.channel import Channel, ChannelClosed
from grid.api.errors import GridError
from grid.api.session import Session

START_S = 60.0
"""The embedded grid takes half a second to start; a machine that needs a minute has stopped."""
EXIT_HEADER = 2
"""The embedded grid's exit status when it told on stderr what is wrong with the script's header."""
END_S = 5.0
"""How long the embedded grid may take to stop its workers once the socket is closed."""

_process: subprocess.Popen[bytes] | None = None
_registered = False
_connection: Connection | None = None


def start_embedded() -> Session:
    """Start a one-machine grid and become its driver. Raises GridError. Called under session's lock."""
    global _process
    ours, theirs = socket.socketpair()
    early, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    command = [sys.executable, "-P", "-m", "grid.embedded", "--fd", str(theirs.fileno()), "--early", str(workers.fileno())]
    environment = dict(os.environ)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = root + (os.pathsep + inherited if inherited else "")
    try:
        _process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), workers.fileno()],
            env=environment,
            process_group=0,
        )
    except OSError as error:
        ours.close()
        early.close()
        raise GridError(f"the embedded grid can't be started with {sys.executable!r}: {error.strerror}") from error
    finally:
        theirs.close()
        workers.close()
    assert _process.stdin is not None
    with contextlib.suppress(OSError), _process.stdin as pipe:
        pipe.write(json.dumps(_origin()).encode())
    channel = Channel(ours)
    setup = _greet(channel, START_S)
    if setup is None:
        channel.close()
        early.close()
        status = _stop(_process)
        _process = None
        advice = "stderr says why" if status == EXIT_HEADER else "look with: grid doctor"
        raise GridError(f"the embedded grid did not start (exit status {status}): {advice}")
    session = _attached(channel, setup)
    session.early = early
    return session


def _origin() -> dict[str, Any]:
    """Where this process comes from, for the embedded grid's workers to import the same modules."""
    script = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    return {
        "path": [os.path.abspath(entry) for entry in sys.path],
        "script": os.path.abspath(script) if script else "",
        "argv": sys.argv[1:],
        "cwd": os.getcwd(),
    }


def _greet(channel: Channel, timeout_s: float) -> wire.Setup | None:
    try:
        channel.send(wire.Ready(os.getpid(), platform.python_version()))
        if not select.select([channel], [], [], timeout_s)[0]:
            return None
        message, _ = channel.receive()
    except (ChannelClosed, wire.WireError):
        return None
    return message if isinstance(message, wire.Setup) else None


def _attached(channel: Channel, setup: wire.Setup) -> Session:
    global _registered
    session = sessions.attach(channel, setup)
    if not _registered:
        _registered = True
        register = getattr(threading, "_register_atexit", atexit.register)  # the former: while threads still run
        register(_at_exit)
    return session


def _at_exit() -> None:
    """The script has ended: wait for its stages, or give them up if it failed; then leave."""
    session = sessions.attached()
    if session is None or session.pid != os.getpid() or session.worker:
        return
    try:
        if session.error is None:
            if getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1"):
                session.cancel_all("the script failed")
            else:
                session.finish()
    except KeyboardInterrupt:
        session.cancel_all("interrupted")
    except GridError as error:
        print(f"grid: {error}", file=sys.stderr)
    finally:
        _leave(session)


def _leave(session: Session) -> None:
    global _process
    session.close()
    sessions.detach()
    if _process is not None:
        _stop(_process)
        _process = None


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Wait for the embedded grid to end by itself, else end it."""
    for give_up in (process.terminate, process.kill):
        try:
            return process.wait(END_S)
        except subprocess.TimeoutExpired:
            give_up()
    return process.wait()


class Connection:
    """This process is the driver of a job on the running peer, until `close` or the end of the process."""

    def __init__(self, session: Session, home: str | os.PathLike[str] | None) -> None:
        self._session = session
        self._home = home

    @property
    def job(self) -> str:
        """The job's id, hex."""
        return self._session.setup.job

    def close(self) -> None:
        """Wait for what was submitted, then leave. Idempotent."""
        if sessions.attached() is self._session:
            try:
                if self._session.error is None:
                    self._session.finish()
            finally:
                _leave(self._session)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and self._session.error is None:
            self._session.cancel_all("the script failed")
        self.close()

    def __repr__(self) -> str:
        return f"<grid.Connection, job {self.job[:12]}>"


def connect(home: str | os.PathLike[str] | None = None, *, name: str = "") -> Connection:
    """Make this process the driver of a new job on the peer that runs in `home` (default: this machine's).

    For notebooks and the REPL; called again, as a cell is, it returns the connection there is. The job is not durable: it is
    cancelled 60 s after this process goes. Raises GridError when there is no peer, or this process has another grid already.
    """
    global _connection
    from grid.api.client import Client, ControlError, home_folder

    with sessions._starting:
        session = sessions.attached()
        if session is not None and session.error is None:
            return _connected(session, home, name)
        origin = _origin()
        try:
            client = Client.open(home_folder(home))
            sock = client.attach(
                name=name or os.path.basename(origin["script"]) or "session",
                python=platform.python_version(),
                path=origin["path"],
                cwd=origin["cwd"],
            )
        except ControlError as error:
            raise GridError(f"{error.message}: {error.hint}" if error.hint else error.message) from None
        channel = Channel(sock)
        setup = _greet(channel, START_S)
        if setup is None:
            channel.close()
            raise GridError("this machine's peer did not accept the connection: look with: grid doctor")
        _connection = Connection(_attached(channel, setup), home)
        return _connection


def _connected(session: Session, home: str | os.PathLike[str] | None, name: str) -> Connection:
    """The connection there is, if it is what connect was asked for. Raises GridError."""
    if _process is not None:
        raise GridError("this process runs on an embedded grid already: call grid.connect() before the first map or submit")
    if _connection is None or _connection._session is not session:
        raise GridError("this process is a job's on a grid already: leave grid.connect() out of jobs")
    if home not in (None, _connection._home) or name not in ("", session.setup.job_name):
        raise GridError("this process is connected already: close that connection first")
    return _connection
