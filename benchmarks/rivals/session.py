"""The runner's end of one engine's process: start it under a keeper, ask, end it and all that descended from it.

Rules: every wait has a deadline; after a failure or a time-out nothing of the engine is left, and the next one starts clean.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.rivals import keeper
from benchmarks.rivals.engines.base import environment

END_S = 20.0
"""How long an engine may take to end by itself before its keeper ends it."""
KEPT_S = 30.0


class Kept:
    """A command under a keeper. Use it in a `with`."""

    def __init__(self, command: list[str], stderr: IO[bytes] | int, cwd: str, env: dict[str, str] | None = None) -> None:
        theirs, self._lifeline = os.pipe()
        os.set_inheritable(theirs, True)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", keeper.__file__, str(theirs), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, pass_fds=[theirs], cwd=cwd, env=env or environment(),
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S if kind is None else 0.0)
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.close(self._lifeline)
            try:
                self.process.wait(KEPT_S)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
            self.process.stdout.close()


class Failed(Exception):
    """The engine failed, or took too long: `message` for the table."""


class Session:
    """One engine's process, as long as it lives. Start it with `with`."""

    def __init__(self, engine: str, workers: int) -> None:
        self.engine = engine
        self._folder = tempfile.TemporaryDirectory(prefix="rivals-", ignore_cleanup_errors=True)
        self._log = (Path(self._folder.name) / "stderr").open("w+b")
        command = [sys.executable, "-m", "benchmarks.rivals.host", engine, str(workers)]
        self._kept = Kept(command, self._log, self._folder.name)
        self._seen = b""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kept.__exit__(kind, error, trace)
        self._log.close()
        self._folder.cleanup()

    def ask(self, row: str, measure: str, params: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Return the reply. Raises Failed: the process is of no use any more."""
        stdin = self._kept.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"row": row, "measure": measure, "params": params}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise Failed(f"ended: {self.last_words()}") from None
        reply: dict[str, Any] = json.loads(self._line(within_s))
        return reply

    def _line(self, within_s: float) -> bytes:
        stdout = self._kept.process.stdout
        assert stdout is not None
        deadline = time.monotonic() + within_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._seen:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise Failed(f"no result within {within_s:g} s")
                data = os.read(stdout.fileno(), 1 << 16)
                if not data:
                    raise Failed(f"ended: {self.last_words()}")
                self._seen += data
        line, _, self._seen = self._seen.partition(b"\n")
        return line

    def last_words(self) -> str:
        """The end of its stderr."""
        self._log.flush()
        with open(self._log.name, errors="replace") as file:
            return " ".join(file.read()[-600:].split())
