"""The one place that prints.

Data goes to stdout, words for people to stderr. Colour and live lines only on a terminal that wants them. Text that
other machines chose (names, tags, error messages) is cleaned of control characters before a terminal sees it; a driver's
own stdout passes byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, TextIO

from grid.api.client import ControlError

SCHEMA = 1
SHORT_ID_CHARS = 8
LIVE_LINES_MAX = 6
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
STATE_STYLES = {
    "running": "cyan", "finished": "green", "failed": "red", "cancelled": "yellow", "pending": "dim",
    "alive": "green", "leaving": "yellow", "silent": "red",
}  # fmt: skip


def job_state(job: Mapping[str, Any]) -> str:
    """Return a job's state in one word; "silent" where its leader was not heard of for a while; and if it ended twice."""
    state = "silent" if job.get("reachable") is False else str(job.get("state", ""))
    return f"{state}, two outcomes" if job.get("conflict") else state


class StdoutClosed(Exception):
    """Who read our stdout is gone."""


class Console:
    """stdout and stderr of one command."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        self._live: list[str] = []
        self._drawn = 0
        self._at_line_start = True  # where the cursor of stdout is
        self._at_error_line_start = True

    # -- data

    def data(self, text: str) -> None:
        """Print a line of data."""
        self.raw(text.encode("utf-8", "surrogateescape") + b"\n")

    def raw(self, data: bytes) -> None:
        """Pass bytes to stdout as they are. Raises StdoutClosed."""
        if not data:
            return
        self._erase()
        try:
            stream: BinaryIO = sys.stdout.buffer
            stream.write(data)
            stream.flush()
        except (BrokenPipeError, ValueError):
            self._swallow_stdout()
            raise StdoutClosed from None
        self._at_line_start = data.endswith(b"\n")
        self._draw()

    def record(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object on a line of its own."""
        self.data(json.dumps({"schema": SCHEMA, **value}, separators=(",", ":"), default=_plain))

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]], *, states: int = -1) -> None:
        """Print aligned columns; column `states` is coloured by its word."""
        cells = [[clean(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
        terminal = is_terminal(sys.stdout)

        def line(row: Sequence[str], style: str = "") -> str:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            padded[-1] = padded[-1].rstrip()
            if terminal and states >= 0 and not style:
                padded[states] = paint(padded[states], STATE_STYLES.get(row[states], ""))
            text = "  ".join(padded).rstrip()
            return paint(text, style) if terminal else text

        self.data("\n".join([line(headers, "dim"), *(line(row) for row in cells)]))

    # -- words

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line for a person."""
        self._erase()
        self._fresh_line()
        self._error_text((paint(text, style) if style and is_terminal(sys.stderr) else text) + "\n")
        self._draw()

    def raw_stderr(self, data: bytes) -> None:
        """Pass bytes to stderr as they are."""
        if data:
            self._erase()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(data)
                sys.stderr.flush()
            self._at_error_line_start = data.endswith(b"\n")
            self._draw()

    def fail(self, error: ControlError) -> None:
        """Print an error: one line, or one JSON object on stdout."""
        self.live([])
        self._fresh_line()
        message, hint = _one_line(error.message), _one_line(error.hint)
        if self.json:
            with contextlib.suppress(StdoutClosed):
                self.record({"error": {"code": error.code, "message": message, "hint": hint}})
            return
        head = paint("error:", "red") if is_terminal(sys.stderr) else "error:"
        self._error_text(f"{head} {message}{f' — {hint}' if hint else ''}\n")

    # -- live lines: redrawn in place below what was printed

    def live(self, lines: Sequence[str]) -> None:
        """Show these lines at the bottom of the terminal until told otherwise; nothing where stderr is no terminal."""
        if is_terminal(sys.stderr):
            self._erase()
            self._live = list(lines)[-LIVE_LINES_MAX:]
            self._draw()

    def _erase(self) -> None:
        if self._drawn:
            self._error_text(f"\x1b[{self._drawn}A\r\x1b[J")
            self._drawn = 0

    def _mid_line(self) -> bool:
        """Whether the cursor of the terminal stands behind unfinished output."""
        return (not self._at_line_start and is_terminal(sys.stdout)) or not self._at_error_line_start

    def _fresh_line(self) -> None:
        if not self._at_error_line_start or (is_terminal(sys.stderr) and self._mid_line()):
            self._error_text("\n")
            self._at_line_start = self._at_error_line_start = True

    def _draw(self) -> None:
        if self._live and not self._mid_line():
            width = shutil.get_terminal_size().columns - 1
            self._error_text("".join(f"{line[:width]}\n" for line in self._live))
            self._drawn = len(self._live)

    def _error_text(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            try:
                sys.stderr.write(text)
            except UnicodeEncodeError:
                sys.stderr.write(text.encode("ascii", "replace").decode("ascii"))
            sys.stderr.flush()

    @staticmethod
    def _swallow_stdout() -> None:
        """Point stdout at nothing, or Python complains about it once more when it exits."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


console = Console()


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):
        return False


def paint(text: str, style: str) -> str:
    """Return text in a style, unless NO_COLOR is set."""
    code = _STYLES.get(style)
    return f"\x1b[{code}m{text}\x1b[0m" if code and not os.environ.get("NO_COLOR") else text


def clean(text: str) -> str:
    """Return text without escape sequences and control characters (tabs become spaces)."""
    plain = _ESCAPES.sub("", text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else " " if char == "\t" else "�" for char in plain)


def short(id_: str) -> str:
    """Return an id as people see it."""
    return clean(id_[:SHORT_ID_CHARS])


def owner_of(row: Mapping[str, Any]) -> str:
    """Return who a peer or job belongs to: the name its machine gives, else the short id."""
    return clean(str(row.get("owner_name") or short(str(row.get("owner", "")))))


def format_duration(duration_s: float) -> str:
    """Return "0.4s", "12s", "3m 05s", "2h 07m", "4d 3h"."""
    if duration_s < 10:
        return f"{max(duration_s, 0):.1f}s"
    whole = int(duration_s)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def format_age(unix_s: float | None) -> str:
    """Return how long ago a wall-clock time was."""
    return format_duration(time.time() - unix_s) if unix_s else ""


def format_size(size: float) -> str:
    """Return "512 B", "4.0 KiB", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(count: float) -> str:
    """Return "999", "12.3k", "1.5M"."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}G"


def _one_line(text: str) -> str:
    return clean(" ".join(text.split()))


def _plain(value: object) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)
