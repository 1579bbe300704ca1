"""A home, the program in it as a subprocess, and a pretended peer (fake_site/) in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_SITE = Path(__file__).parent / "fake_site"
PROGRAM = [sys.executable, "-P", "-c", "import sys; from cli.main import main; sys.exit(main())"]
COMMAND_TIMEOUT_S = 30.0


class Grid:
    """The program `grid` with one GRID_HOME and one current folder."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home = home
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("GRID_HOME", "NO_COLOR", "FORCE_COLOR")},
            "PYTHONPATH": os.pathsep.join([str(FAKE_SITE), str(ROOT)]),
            "GRID_HOME": str(home),
            "TERM": "xterm",
            "TMPDIR": str(folder),
        }

    def __call__(self, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            cwd=self.folder,
            env=self.environment | environment,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        return subprocess.Popen([*PROGRAM, *words], text=True, cwd=self.folder, env=self.environment, **options)

    def json(self, *words: str) -> Any:
        done = self(*words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def script(self, *plan: list[Any], name: str = "job.py") -> str:
        (self.folder / name).write_text("#" + json.dumps(plan) + "\n")
        return name

    def calls(self) -> list[tuple[str, Mapping[str, Any]]]:
        text = (self.home / "calls.jsonl").read_text()
        return [tuple(json.loads(line)) for line in text.splitlines()]


FINISHED = ["final", {"state": "finished", "exit_code": 0}]


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    folder = tmp_path / "work"
    folder.mkdir()
    return Grid(tmp_path / "home", folder)


@pytest.fixture
def peer(grid: Grid) -> Iterator[Grid]:
    """The same, with a peer that runs in the background until the test ends."""
    done = grid("join", "-d", "--listen", "127.0.0.1:0")
    assert done.returncode == 0, done.stderr
    try:
        yield grid
    finally:
        pid = int((grid.home / "lock").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failure: nothing else may be on stderr, nothing on stdout."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]
