"""What a terminal is shown: colour, moving lines, live views; and that none of it appears elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from cli.console import Console, clean, format_count, format_duration, format_size
from cli.live import GridView
from cli.progress import Prints, Progress
from tests.cli.conftest import FINISHED, PROGRAM, Grid

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """The program with a pseudo-terminal as stdin, stdout and stderr."""

    def __init__(self, grid: Grid, *words: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=slave, stdout=slave, stderr=slave, cwd=grid.folder, start_new_session=True,
            env=grid.environment | {"COLUMNS": "120", "LINES": "40"} | environment,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str, timeout_s: float = 10.0) -> str:
        """Read until the pattern was shown; returns all text so far."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.text):
            assert select.select([self._master], [], [], max(deadline - time.monotonic(), 0))[0], self.text
            self.text += os.read(self._master, 65536).decode()
        return self.text

    def read_all(self, timeout_s: float = 10.0) -> str:
        """Read to the end."""
        with contextlib.suppress(OSError):  # EIO: the last holder of the terminal is gone
            while select.select([self._master], [], [], timeout_s)[0]:
                self.text += os.read(self._master, 65536).decode()
        assert self.process.wait(timeout_s) is not None
        return self.text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(peer: Grid) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str, **environment: str) -> Terminal:
        opened.append(Terminal(peer, *words, **environment))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_colour_on_a_terminal_unless_told_otherwise(terminal: Callable[..., Terminal]) -> None:
    assert COLOUR.search(terminal("status").read_all())
    assert not COLOUR.search(terminal("status", NO_COLOR="1").read_all())
    assert not COLOUR.search(terminal("status", TERM="dumb").read_all())


def test_hostile_names_stay_text(terminal: Callable[..., Terminal]) -> None:
    text = terminal("status").read_all()
    assert "evilname" in text
    assert "\x1b]0;" not in text


def test_watch(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("status", "--watch")
    screen.read_until("2/8 slots busy")
    screen.read_until("tasks/s.*0/s")
    os.killpg(screen.process.pid, signal.SIGINT)
    text = screen.read_all()
    assert screen.process.returncode == 0
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1


def test_progress_moves_and_goes(peer: Grid, terminal: Callable[..., Terminal]) -> None:
    def stage(done: int) -> list[object]:
        return ["progress", [{"index": 0, "name": "count", "total": 10, "done": done, "failed": 0}]]

    script = peer.script(stage(0), ["stdout", "half a line"], ["stdout", " is whole\n"], stage(5), stage(10), FINISHED)
    text = terminal("submit", script).read_all()
    assert "half a line is whole\r\n" in text
    assert "stage 0 count  ░" in text
    assert text.count("10/10") == 1
    erased = re.sub(r"[^\n]*\n\x1b\[1A\r\x1b\[J", "", text)  # what moved on is gone from the screen
    assert "░" not in erased


def test_ctrl_c_on_a_terminal_stops_a_throwaway_grid_once(grid: Grid) -> None:
    terminal = Terminal(grid, "submit", "--local", "2", grid.script(["hang"]))
    try:
        terminal.read_until("job 00ee")
        os.killpg(terminal.process.pid, signal.SIGINT)
        text = terminal.read_all()
        assert terminal.process.returncode == 130
        assert "the job is cancelled" in text
        assert "Traceback" not in text
    finally:
        terminal.close()


def test_join_shows_a_live_view(grid: Grid) -> None:
    terminal = Terminal(grid, "join", "--listen", "127.0.0.1:0")
    try:
        terminal.read_until("grid join grid1fakeinvite")
        terminal.read_until("ours \\(this\\)")
        os.killpg(terminal.process.pid, signal.SIGINT)
        text = terminal.read_all()
        assert terminal.process.returncode == 0
        assert "evilname" in text
        assert "\x1b]0;" not in text
    finally:
        terminal.close()


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_clean() -> None:
    assert clean("\x1b[31mred\x1b[0m \x1b]0;title\x07x\ty\r\nz\x9b") == "red x y��z�"


def test_formats() -> None:
    assert [format_duration(s) for s in (0.44, 12.9, 185, 7620, 360000)] == ["0.4s", "12s", "3m 05s", "2h 07m", "4d 4h"]
    assert [format_size(n) for n in (512, 4096, 1610612736)] == ["512 B", "4.0 KiB", "1.5 GiB"]
    assert [format_count(n) for n in (999, 12345, 1.5e6, 2e9)] == ["999", "12.3k", "1.5M", "2.0G"]


def test_open_stage_is_not_done_when_it_has_caught_up(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(100))
    progress = Progress(Console(), now=lambda: float(next(clock)))
    stage = {"index": 0, "name": "gen", "total": 5, "open": True, "done": 5, "failed": 0}
    progress.update([stage], 1)
    assert capsys.readouterr().err == ""
    progress.update([{**stage, "open": False}], 1)
    progress.update([{**stage, "open": False}], 1)
    assert capsys.readouterr().err.count("5/5") == 1


def test_running_stage_says_so_now_and_then_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    progress = Progress(Console(), now=lambda: now_s)
    for now_s in range(35):
        progress.update([{"index": 0, "name": "f", "total": 100, "done": now_s, "failed": 1}], 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "1 failed  3 peers  1.0/s" in lines[-1] or "1 failed  3 peers  1/s" in lines[-1]


def test_words_begin_a_line_of_their_own_in_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.raw_stderr(b"\r1/2")
    console.say("stage 0")
    console.raw_stderr(b"\r2/2\n")
    console.say("stage 1")
    assert capfd.readouterr().err == "\r1/2\nstage 0\n\r2/2\nstage 1\n"


def test_prints_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    prints = Prints(Console(), "abcdef0123", now=lambda: now_s)
    prints.show(1, 2, b"x\n" * 210)
    now_s = 1.0
    prints.show(1, 3, b"y\n")
    prints.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[200] == "… 10 lines of prints left out; see: grid logs abcdef01 --task STAGE:INDEX"
    assert lines[201:] == ["[1:3] y"]


def test_throughput_is_measured_between_looks() -> None:
    from rich.console import Console as RichConsole

    view = GridView()
    job = {"id": "ab", "name": "j", "state": "running", "total": 5000}
    for second in range(1, 4):
        view.update({"grid": "cc", "self": "", "peers": [], "jobs": [{**job, "done": second * second * 100}]}, float(second))
    console = RichConsole(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(view.render("grid join x"))
    text = console.export_text()
    assert "500/s" in text
    assert "peak 500/s" in text
    assert "900/5.0k" in text
    assert "grid join x" in text
