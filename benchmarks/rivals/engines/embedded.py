"""Ours, embedded: `python job.py`, a grid of this machine alone, started by the script and gone with it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, ClassVar

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import BYTES, CALLS, environment, timed_line
from benchmarks.rivals.engines.scripted import Scripted


class Embedded(Scripted):
    """Nothing is durable here: the script's end is the grid's."""

    name = "embedded"
    rows: ClassVar[frozenset[str]] = CALLS | BYTES | {"words", "cold", "killed", "tasks"}

    def command(self, options: list[str]) -> tuple[list[str], dict[str, str]]:
        return [sys.executable], {**environment(), "GRID_SLOTS": str(self.workers)}

    def kill_worker(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def grid_cold(self) -> work.Values:
        """From the start of Python to the first result."""
        command, env = self.cold()
        return {"s": timed_line(command, "first", env, self.folder.name)}

    def grid_words(self, **params: Any) -> work.Values:
        """`grid.files` reads in place here."""
        return self.script("words", {**params, "files": True})
