"""A home, the program in it as a subprocess, and a pretended peer (fake_site/) in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

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
        """Run a command: in this process, which is quick, unless it needs the fakes or starts processes."""
        if not stdin and not environment and words and words[0] not in ("submit", "join"):
            return self._here(*words)
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

    def _here(self, *words: str) -> subprocess.CompletedProcess[str]:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for name in ("stdout", "stderr")}
        with pytest.MonkeyPatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            try:
                status = main(list(words))
            except Exception:
                traceback.print_exc()
                status = 1
        out, err = (stream.buffer.getvalue().decode() for stream in streams.values())
        return subprocess.CompletedProcess(words, status, out, err)

    @contextlib.contextmanager
    def start(self, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """Start a command; it is killed at the latest when the context ends."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        with subprocess.Popen([*PROGRAM, *words], text=True, cwd=self.folder, env=self.environment, **options) as process:
            try:
                yield process
            finally:
                process.kill()

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
    words = ("join", "--json", "--listen", "127.0.0.1:0")
    with grid.start(*words, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield grid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failure: nothing else may be on stderr, nothing on stdout."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]
