"""Real peers on loopback, each with a home of its own, and the program `grid` run against them as a user would.

Rules: every wait has a deadline; every process is killed with all its children when the grid closes, whatever happened;
nothing of the user's own home is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

PROGRAM = [sys.executable, "-P", "-c", "import sys; from cli.main import main; sys.exit(main())"]
ROOT = Path(__file__).resolve().parents[2]
READY_S = 40.0
"""A peer serves in about half a second; a loaded machine may need many times that."""
COMMAND_S = 60.0
CHILDREN_END_S = 5.0
POLL_S = 0.02
DROPPED_PREFIXES = ("GRID_", "PYTEST_", "PYTHON", "NO_COLOR", "FORCE_COLOR", "COV_")
"""Variables of the tests' own environment that a user's shell would not have."""

T = TypeVar("T")


def until(look: Callable[[], T | None], within_s: float, what: str) -> T:
    """Return the first true value of `look`, asked again and again. Fails after `within_s`, saying what never came."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s (last: {found!r})"
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout as one JSON value; it must have succeeded."""
        assert self.status == 0, f"status {self.status}: {self.err}{self.out}"
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one `error:` line; a traceback of ours is a failure."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def runs(done: Done, out: str) -> None:
    """The command ended well and printed this."""
    assert (done.status, done.out) == (0, out), done.err


class Command:
    """A command in the background."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def finish(self, within_s: float = COMMAND_S) -> Done:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=within_s)
        return Done(self.process.returncode, out, err)

    def lines_until(self, stream: str, wanted: str, within_s: float = COMMAND_S) -> str:
        """Read lines of "stdout" or "stderr" up to the first with `wanted` in it; returns that one."""
        pipe = getattr(self.process, stream)
        deadline = time.monotonic() + within_s
        seen = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if not selector.select(deadline - time.monotonic()):
                    break
                data = os.read(pipe.fileno(), 1)
                seen += data
                if not data or data == b"\n":
                    line = seen.decode().splitlines()[-1] if seen else ""
                    if wanted in line or not data:
                        assert wanted in line, f"{stream} ended without {wanted!r}: {seen.decode()}"
                        return line
        raise AssertionError(f"no {wanted!r} in {stream} within {within_s:g} s: {seen.decode()}")


class Peer:
    """One peer: a process and its home."""

    def __init__(self, grid: Grid, home: Path) -> None:
        self.home = home
        self.folder = home.parent / f"{home.name}-work"
        self.folder.mkdir(exist_ok=True)
        self.log = home.parent / f"{home.name}.log"
        self.ready: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self.wrapper: list[str] = []  # words before the command that runs the peer: to run it in another network, say
        self._grid = grid

    # ---- life ----

    def start(self, *words: str, slots: int = 1, listen: str = "127.0.0.1:0", within_s: float = READY_S) -> Peer:
        """Run `grid join` and wait until it serves."""
        command = [*self.wrapper, *PROGRAM, "join", "--json", "--listen", listen]
        command += ["--slots", str(slots), "--name", self.home.name, *words]
        with self.log.open("ab") as log:
            process = self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        self._grid.processes.append(process)
        line = Command(process).lines_until("stdout", '"ready"', within_s)
        self.ready = json.loads(line)
        return self

    @property
    def id(self) -> str:
        """Its peer id, hex."""
        return str(self.ready["peer"])

    @property
    def address(self) -> tuple[str, int]:
        """Where it serves."""
        host, _, port = str(self.ready["address"]).rpartition(":")
        return host, int(port)

    @property
    def invite(self) -> str:
        """A fresh invite to its grid."""
        return str(self("invite", "--json").json["invite"])

    def kill(self) -> None:
        """SIGKILL to the peer alone: nobody tells its children or the others. Its children must end all the same."""
        assert self.process is not None
        self.end(lambda process: process.kill())

    def stop(self) -> None:
        """SIGTERM: it and all its children end."""
        self.end(lambda process: process.terminate())

    def end(self, how: Callable[[subprocess.Popen[str]], object]) -> None:
        """End the peer in some way, and see that nothing of it is left."""
        assert self.process is not None
        processes = self.processes()
        self._grid.orphans += processes
        how(self.process)
        self.process.wait(READY_S)
        until(lambda: not any(pid.lives for pid in processes), CHILDREN_END_S, "the peer's children end")

    @property
    def running(self) -> bool:
        """The process has not ended."""
        return self.process is not None and self.process.poll() is None

    def processes(self) -> list[Pid]:
        """The peer's process and all its children's."""
        assert self.process is not None
        return tree(self.process.pid)

    # ---- commands ----

    def environment(self, **more: str) -> dict[str, str]:
        """What its user's shell exports."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED_PREFIXES)}
        return {**kept, "PYTHONPATH": str(ROOT), "GRID_HOME": str(self.home), **more}

    def __call__(self, *words: str, stdin: str | None = None, within_s: float = COMMAND_S, **environment: str) -> Done:
        """Run one command to its end."""
        done = subprocess.run(
            [*PROGRAM, *words],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
            env=self.environment(**environment),
            cwd=self.folder,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def begin(self, *words: str) -> Command:
        """Start a command in the background; the grid ends it if the test does not."""
        process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            start_new_session=True,
        )
        self._grid.processes.append(process)
        return Command(process)

    def script(self, text: str, name: str = "job.py") -> str:
        """Write a script into the folder where commands run; returns its name."""
        (self.folder / name).write_text(text)
        return name

    def job(self, text: str, *options: str, arguments: Sequence[str] = ()) -> Done:
        """Submit a script and wait for its end."""
        return self("submit", *options, self.script(text), *arguments)

    def detached(self, text: str, *options: str) -> str:
        """Submit a script with -d; returns the job's id."""
        done = self("submit", "-d", *options, self.script(text))
        assert done.status == 0, done.err
        return done.out.strip()

    def show(self, job: str) -> Any:
        """`grid show --json`."""
        return self("show", "--json", job).json

    def status(self) -> Any:
        """`grid status --json`."""
        return self("status", "--json").json


class Grid:
    """Peers of one test, or of one module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[subprocess.Popen[str]] = []
        self.orphans: list[Pid] = []
        self.peers: list[Peer] = []

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pid in [*self.orphans, *(pid for process in self.processes if process.poll() is None for pid in tree(process.pid))]:
            pid.send(signal.SIGKILL)
        for process in self.processes:
            process.wait(READY_S)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def home(self, name: str = "") -> Peer:
        """A machine that has no peer yet."""
        peer = Peer(self, self.root / (name or f"peer{len(self.peers)}"))
        self.peers.append(peer)
        return peer

    def found(self, *, slots: int = 1) -> Peer:
        """Start a grid's first peer."""
        return self.home().start(slots=slots)

    def join(self, through: Peer, *words: str, slots: int = 1) -> Peer:
        """Start one more peer with an invite from that one."""
        return self.home().start(*words, through.invite, slots=slots)


@dataclass(frozen=True)
class Pid:
    """A process, told from a later one of the same number."""

    number: int
    started: str

    @property
    def lives(self) -> bool:
        """It runs still, and is no zombie."""
        return _stat(self.number)[1:] == (self.started, True)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.number, number)


def tree(root: int) -> list[Pid]:
    """A process and all that descend from it, whatever session they are in."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(_stat(int(entry.name))[0], []).append(int(entry.name))
    found, left = [], [root]
    while left:
        number = left.pop()
        _, started, lives = _stat(number)
        if lives:
            found.append(Pid(number, started))
        left += children.get(number, [])
    return found


def _stat(number: int) -> tuple[int, str, bool]:
    """A process's parent, start time, and whether it runs."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, "", False
    return int(fields[1]), fields[19], fields[0] not in "ZX"
