"""`python job.py`: real scripts on the embedded grid, and what `import grid` costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import grid

ROOT = Path(grid.__file__).parent.parent


def run(folder: Path, text: str, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    script = folder / "job.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRID_SLOTS": "2"}
    return subprocess.run(
        [sys.executable, str(script), *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_import_grid_is_light(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import sys
        before = set(sys.modules)
        import grid
        print(sorted(set(sys.modules) - before - {"importlib", "typing", "_typing", "warnings"}))
        import grid.core.errors
        assert grid.map is grid.map and "submit" in dir(grid)
        heavy = {"trio", "asyncio", "dht", "blake3", "nacl", "cryptography", "rich", "typer"}
        print(sorted(heavy & set(sys.modules)))
        try:
            grid.nothing
        except AttributeError as error:
            print(error)
        """,
    )
    assert done.stdout.splitlines()[1:] == ["[]", "module 'grid' has no attribute 'nothing'"], done.stderr
    assert len(done.stdout.splitlines()[0]) < 700


def test_every_exported_name_is_there() -> None:
    for name in grid.__all__:
        assert getattr(grid, name).__doc__


@pytest.mark.real
def test_script_with_its_own_classes_and_local_modules(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "words.txt").write_text("a b a")
    done = run(
        tmp_path,
        """
        import dataclasses, sys
        import grid, helper

        @dataclasses.dataclass(frozen=True)
        class Point:
            x: int

        class Mine(Exception):
            pass

        def move(point):
            return Point(helper.double(point.x))

        def fail(x):
            raise Mine(x)

        def nested(n):
            return sum(grid.map(helper.double, range(n)))

        def words(file):
            return len(open(file).read().split())

        moved = list(grid.map(move, [Point(1), Point(2)]))
        assert moved == [Point(2), Point(4)], moved
        try:
            grid.submit(fail, 3).result()
        except Mine as error:
            print("mine", error, "job.py" in str(error.__cause__))
        print(grid.submit(nested, 10).result())
        print(list(grid.map(words, grid.files("*.txt"))))
        (grid.output("a/b.txt")).write_text("x")
        print(sys.argv[1:])
        """,
        "--file",
        "x",
    )
    assert done.stdout.splitlines() == ["mine 3 True", "90", "[3]", "['--file', 'x']"], done.stderr
    assert done.returncode == 0
    assert done.stderr == ""
    assert (tmp_path / "output/a/b.txt").read_text() == "x"


HEADER = """
# /// script
# dependencies = []
# [tool.grid]
# seed = 7
# retries = 2
# tags = ["gpu"]
# name = "sevens"
# ///
import grid, random
def flaky(x):
    if grid.context().attempt < 2:
        raise ValueError("flaky")
    return random.random()
print(list(grid.options(tags=["big"]).map(flaky, range(3))), grid.context().job_name)
"""


@pytest.mark.real
def test_header_options_hold_and_tags_dont_choose(tmp_path: Path) -> None:
    once, twice = run(tmp_path, HEADER), run(tmp_path, HEADER)
    assert once.returncode == 0, once.stderr
    assert once.stdout == twice.stdout
    assert once.stdout.endswith("] sevens\n")


@pytest.mark.real
def test_header_that_is_wrong_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, HEADER.replace("retries", "retrys"))
    assert done.returncode == 1
    assert done.stderr.startswith("grid: in the header of job.py, [tool.grid] has no option 'retrys'")
    assert "GridError: the embedded grid did not start (exit status 2): stderr says why" in done.stderr


@pytest.mark.real
def test_connect_after_the_first_map_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, "import grid\nprint(*grid.map(abs, [-1]))\ngrid.connect()\n")
    assert done.stdout == "1\n"
    assert done.stderr.rstrip().endswith("on an embedded grid already: call grid.connect() before the first map or submit")


@pytest.mark.real
def test_map_never_iterated_is_done_before_the_script_ends(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import grid, pathlib
        def leave(x):
            pathlib.Path(f"mark{x}").write_text("x")
        folder = pathlib.Path.cwd()
        def mark(x):
            (folder / f"mark{x}").write_text("x")
        grid.map(mark, range(20))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("mark*"))) == 20


@pytest.mark.real
def test_script_that_fails_does_not_wait_for_its_stages(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import grid, time
        futures = [grid.submit(time.sleep, 100) for _ in range(4)]
        raise RuntimeError("enough")
        """,
        timeout_s=40.0,
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: enough")


@pytest.mark.real
def test_embedded_grid_killed_in_mid_job_is_one_line(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import grid, os, signal, time
        future = grid.submit(time.sleep, 100)
        from grid.api import connect
        os.kill(connect._process.pid, signal.SIGKILL)
        try:
            future.result()
        except grid.GridError as error:
            print(error)
        """,
        timeout_s=40.0,
    )
    assert done.stdout == "the grid went away in the middle of this job: its peer stopped or was killed\n", done.stderr
    assert done.returncode == 0


@pytest.mark.real
def test_interrupt_reaches_the_script_alone(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import grid, time
            future = grid.submit(time.sleep, 100)
            try:
                print("ready", flush=True)
                future.result()
            except KeyboardInterrupt:
                print(grid.submit(pow, 2, 3).result() if future.cancel() else None, flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRID_SLOTS": "2"},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "8\n"
        assert process.wait(40) == 0


def test_connect_without_a_peer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(grid.GridError, match="grid join"):
        grid.connect(tmp_path)
