"""Following a job: its driver's output, its progress, its end; and what Ctrl-C means meanwhile.

A connection that breaks is taken up again where it stopped: the offsets of stdout and stderr say what was shown.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cli.console import StdoutClosed, clean, console, short
from cli.errors import GRID_FAILED, Failure
from cli.progress import Prints, Progress
from grid.api.client import Client, ConnectionLost, ControlError, NoPeer, Stream

SECOND_INTERRUPT_S = 2.0
RECONNECT_S = 15.0
"""A peer that is restarted answers again within seconds; a laptop that woke takes a moment."""
RETRY_INTERVAL_S = 0.25


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: like Ctrl-C, but nobody is there for a second one."""


class Detached(Exception):
    """The user left (or who read our stdout did); the job goes on or was cancelled."""


class Follower:
    """Shows one job until it ends. `client` is replaced when its connection breaks."""

    def __init__(self, home: Path, client: Client, *, throwaway: bool = False) -> None:
        self._home = home
        self._throwaway = throwaway
        self.client = client
        self.job = ""
        self._from = {"stdout": 0, "stderr": 0}
        self._print_at: dict[str, Any] = {"from_print": 0, "by": ""}
        self._outcome: dict[str, Any] | None = None
        self._progress = Progress(console)
        self._prints = Prints(console, "")

    def run(self, stream: Stream, on_accepted: Callable[[str], None]) -> dict[str, Any]:
        """Show a `submit` (or `follow`) stream to the job's end; return {state, exit_code, signal, error}.

        Raises Detached, ControlError.
        """
        try:
            events: Iterable[tuple[str, dict[str, Any], bytes]] = stream
            while True:
                try:
                    for name, data, body in events:
                        self._show(name, data, body, on_accepted)
                    break
                except ConnectionLost:
                    events = self._reconnect()
        except Terminated:
            self._leave("terminated")
        except KeyboardInterrupt:
            self._interrupted()
        except StdoutClosed:
            self._leave("stdout was closed")
        finally:
            self._progress.close()
            self._prints.close()
        if self._outcome is None:
            raise ControlError("internal", "the peer ended the stream without an outcome", "see: grid show last")
        return self._outcome

    def _show(self, name: str, data: Mapping[str, Any], body: bytes, on_accepted: Callable[[str], None]) -> None:
        if name in ("stdout", "stderr"):
            body = self._unseen(name, data, body)
            if name == "stdout":
                console.raw(body)
            else:
                console.raw_stderr(body)
        elif name == "print":
            self._prints.show(int(data["stage"]), int(data["index"]), body)
            self._print_at = {"from_print": int(data.get("next", 0)), "by": str(data.get("by", ""))}
        elif name == "progress":
            self._progress.update(list(data.get("stages", ())), int(data.get("peers") or 0))
        elif name == "note":
            console.say(clean(str(data.get("text", ""))), "dim")
        elif name == "accepted":
            self.job = str(data["job"])
            self._prints = Prints(console, self.job)
            on_accepted(self.job)
        elif name == "final":
            self._outcome = dict(data)

    def _unseen(self, name: str, data: Mapping[str, Any], body: bytes) -> bytes:
        """Return what of an output event was not shown yet."""
        offset = int(data.get("offset", self._from[name]))
        seen = max(self._from[name] - offset, 0)
        self._from[name] = max(self._from[name], offset + len(body))
        return body[seen:]

    def _reconnect(self) -> Stream:
        self.client.close()
        if self._throwaway or not self.job:
            raise ConnectionLost
        console.say("this machine's peer went away; the job goes on where others hold it; waiting for the peer", "yellow")
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                self.client = Client.open(self._home)
                offsets = {f"from_{name}": offset for name, offset in self._from.items()}
                return self.client.stream("follow", job=self.job, prints=True, **offsets, **self._print_at)
            except (NoPeer, ConnectionLost):
                if time.monotonic() > deadline:
                    raise self._lost() from None
            time.sleep(RETRY_INTERVAL_S)

    def _lost(self) -> Failure:
        """This command can't go on without its peer; the job can."""
        how = f"on another machine of the grid: grid logs {short(self.job)} -f; or here, after grid join -d"
        text = "this machine's peer is gone; the job goes on if another machine holds it"
        return Failure("peer-lost", text, f"follow it {how}", status=GRID_FAILED)

    # -- leaving

    def _interrupted(self) -> None:
        """First Ctrl-C: detach (on a throwaway grid: cancel); a second one within two seconds: cancel."""
        if self._throwaway or not self.job:
            self._leave("interrupted")
        id_ = short(self.job)
        self._progress.close()
        try:
            how = f"follow it: grid logs {id_} -f, cancel it: grid cancel {id_} or Ctrl-C again"
            console.say(f"detached; the job goes on; {how}")
            self.client.close()
            time.sleep(SECOND_INTERRUPT_S)
        except KeyboardInterrupt:
            self._cancel()
        raise Detached

    def _leave(self, why: str) -> None:
        self.client.close()
        id_ = short(self.job)
        if not self.job:
            console.say(f"{why} before the job was accepted: nothing runs")
        elif self._throwaway:
            console.say(f"{why}: the job is cancelled, for its throwaway grid ends with this command")
        else:
            console.say(f"{why}: detached; the job goes on. Its output: grid result {id_}, cancel it: grid cancel {id_}")
        raise Detached

    def _cancel(self) -> None:
        try:
            with Client.open(self._home) as client:
                client.call("cancel", job=self.job, force=False)
            console.say(f"job {short(self.job)} is cancelled")
        except ControlError as error:
            console.fail(error)


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise Terminated, so that what must be put in order is."""

    def leave(number: int, frame: object) -> None:
        raise Terminated

    old = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
