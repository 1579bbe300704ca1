"""What an attached submit shows of the work on stderr: a line a stage, and the tasks' prints.

On a terminal the lines of the running stages stay at the bottom and move; elsewhere a stage gets a line when it ends, and
one now and then while it runs. Prints are limited to a rate: a million tasks that print must not drown the terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from cli.console import Console, clean, format_count, format_duration, is_terminal

REDRAW_INTERVAL_S = 0.1
LINE_INTERVAL_S = 10.0
"""Where stderr is a file: how often a running stage says how far it is."""
STAGES_SHOWN = 4
PRINT_LINES_PER_S = 50
"""More than this can't be read as it passes; `grid logs JOB --task S:I` has all."""
PRINT_LINES_BURST = 200
PRINT_LINE_CHARS_MAX = 2000
BAR_CHARS = 24


class Progress:
    """The stages' lines."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._started_s: dict[int, float] = {}
        self._ended: set[int] = set()
        self._next_s = 0.0
        self._next_line_s = now() + LINE_INTERVAL_S
        self._latest: tuple[list[Mapping[str, Any]], int] | None = None

    def update(self, stages: list[Mapping[str, Any]], peers: int) -> None:
        """Take in a progress event."""
        now_s = self._now()
        self._latest = stages, peers
        for stage in stages:
            index = int(stage["index"])
            self._started_s.setdefault(index, now_s)
            if _complete(stage) and index not in self._ended:
                self._ended.add(index)
                self._console.say(self._line(stage, peers, now_s), "dim")
        if is_terminal(sys.stderr):
            if now_s >= self._next_s:
                self._next_s = now_s + REDRAW_INTERVAL_S
                self._draw(stages, peers, now_s)
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_INTERVAL_S
            for stage in self._running(stages):
                self._console.say(self._line(stage, peers, now_s))

    def close(self) -> None:
        """Take the moving lines away."""
        self._console.live([])

    def _running(self, stages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [stage for stage in stages if int(stage["index"]) not in self._ended][-STAGES_SHOWN:]

    def _draw(self, stages: list[Mapping[str, Any]], peers: int, now_s: float) -> None:
        self._console.live([self._line(stage, peers, now_s) for stage in self._running(stages)])

    def _line(self, stage: Mapping[str, Any], peers: int, now_s: float) -> str:
        index, done = int(stage["index"]), int(stage.get("done") or 0)
        total = stage.get("total")
        failed = int(stage.get("failed") or 0)
        elapsed_s = now_s - self._started_s[index]
        rate = done / elapsed_s if elapsed_s > 0.2 else 0.0
        parts = [f"stage {index} {clean(str(stage.get('name') or ''))}".strip()]
        if total and not _complete(stage):
            filled = min(BAR_CHARS, int(done / total * BAR_CHARS))
            parts.append("█" * filled + "░" * (BAR_CHARS - filled))
        parts.append(f"{done}/{total}" if total is not None else f"{done}/?")
        if failed:
            parts.append(f"{failed} failed")
        parts.append(f"{peers} peer{'s' * (peers != 1)}")
        if _complete(stage):
            parts.append(f"in {format_duration(elapsed_s)}")
        elif rate:
            parts.append(f"{format_count(rate)}/s")
            if total:
                parts.append(f"{format_duration((total - done) / rate)} left")
        return "  ".join(parts)


class Prints:
    """The tasks' prints, prefixed and rate-limited (a token bucket)."""

    def __init__(self, console: Console, job: str, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._job = job
        self._now = now
        self._tokens = float(PRINT_LINES_BURST)
        self._at_s = now()
        self._left_out = 0

    def show(self, stage: int, index: int, body: bytes) -> None:
        """Show what a task printed, or count it."""
        now_s = self._now()
        self._tokens = min(PRINT_LINES_BURST, self._tokens + (now_s - self._at_s) * PRINT_LINES_PER_S)
        self._at_s = now_s
        for line in body.decode("utf-8", "replace").splitlines():
            if self._tokens < 1:
                self._left_out += 1
                continue
            self._tell_left_out()
            self._tokens -= 1
            self._console.say(f"[{stage}:{index}] {clean(line[:PRINT_LINE_CHARS_MAX])}")

    def close(self) -> None:
        """Say what was left out at last."""
        self._tell_left_out()

    def _tell_left_out(self) -> None:
        if self._left_out:
            many = f"{self._left_out} line{'s' * (self._left_out != 1)}"
            self._console.say(f"… {many} of prints left out; see: grid logs {self._job[:8]} --task STAGE:INDEX", "dim")
            self._left_out = 0


def _complete(stage: Mapping[str, Any]) -> bool:
    total = stage.get("total")
    return (
        total is not None and not stage.get("open") and int(stage.get("done") or 0) + int(stage.get("failed") or 0) >= int(total)
    )
