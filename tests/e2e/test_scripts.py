"""What can't be submitted, how scripts end, and what a script gets from its command line and leaves behind."""

from __future__ import annotations

import subprocess

import pytest

from tests.e2e.grids import PROGRAM, Peer, runs

pytestmark = pytest.mark.real


@pytest.fixture
def peer(three: list[Peer]) -> Peer:
    """Any member; scripts fail the same everywhere."""
    return three[0]


# ---- scripts that can't be submitted: told before anything is sent ----------------------------------------------------


def refused(peer: Peer, *words: str) -> str:
    """Submit something that can't run; returns its one line of error. Nothing was sent."""
    before = len(peer("jobs", "--json").json["jobs"])
    done = peer("submit", *words)
    assert done.status == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert len(peer("jobs", "--json").json["jobs"]) == before
    return done.error


def test_missing_script(peer: Peer) -> None:
    assert "nowhere.py" in refused(peer, "nowhere.py")


def test_script_that_is_a_folder(peer: Peer) -> None:
    (peer.folder / "folder.py").mkdir(exist_ok=True)
    assert "folder.py" in refused(peer, "folder.py")


def test_syntax_error(peer: Peer) -> None:
    line = refused(peer, peer.script("import grid\n\nprint('open'\n", "broken.py"))
    assert "broken.py" in line
    assert "3" in line


def test_undeclared_import_names_the_option_to_type(peer: Peer) -> None:
    line = refused(peer, peer.script("import grid\nimport pandas_like_thing\n", "imports.py"))
    assert "pandas_like_thing" in line
    assert "--with" in line


def test_file_pattern_without_files(peer: Peer) -> None:
    assert "nothing-here" in refused(peer, "--file", "nothing-here/*.txt", peer.script("print(1)"))


def test_options_that_make_no_sense(peer: Peer) -> None:
    script = peer.script("print(1)")
    for line in ("--retries -1", "--timeout soon", "--memory lots", "--env =x", "--nonsense", "--local 2 -d"):
        done = peer("submit", *line.split(), script)
        assert done.status == 2, done
        assert done.out == ""
        assert "Traceback" not in done.err


def test_bad_header(peer: Peer) -> None:
    header = '# /// script\n# dependencies = ["numpy"\n# ///\nprint(1)\n'
    assert "header" in refused(peer, peer.script(header, "header.py"))


def test_own_module_called_grid_is_named(peer: Peer) -> None:
    (peer.folder / "shadow").mkdir(exist_ok=True)
    (peer.folder / "shadow" / "grid.py").write_text("x = 1\n")
    (peer.folder / "shadow" / "job.py").write_text("import grid\nprint(1)\n")
    assert "grid.py" in refused(peer, "shadow/job.py")


def test_own_modules_called_like_ours_are_fine(peer: Peer) -> None:
    folder = peer.folder / "own"
    folder.mkdir(exist_ok=True)
    (folder / "dht.py").write_text("def twice(x): return 2 * x\n")
    (folder / "cli.py").write_text("BASE = 5\n")
    (folder / "job.py").write_text("import grid, dht, cli\nprint(sum(grid.map(dht.twice, range(cli.BASE))))\n")
    runs(peer("submit", "own/job.py"), "20\n")


def test_local_package_travels(peer: Peer) -> None:
    folder = peer.folder / "pkg" / "helpers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("from .deep import cube\n")
    (folder / "deep.py").write_text("def cube(x):\n    return x ** 3\n")
    (folder.parent / "job.py").write_text("import grid\nfrom helpers import cube\nprint(sum(grid.map(cube, range(10))))\n")
    runs(peer("submit", "pkg/job.py"), "2025\n")


@pytest.mark.parametrize(
    ("name", "source", "out"),
    [
        ("with space ünï.py", b"import sys; print(sys.argv[0].rpartition('/')[2])", "with space ünï.py\n"),
        ("bom.py", b"\xef\xbb\xbfprint(1)\r\nprint(2)\r\n", "1\n2\n"),
        ("latin.py", b"# -*- coding: latin-1 -*-\nprint('\xe9')\n", "é\n"),
        ("no-extension", b"#!/usr/bin/env python3\nprint(__name__)\n", "__main__\n"),
    ],
)
def test_names_and_encodings_of_scripts(peer: Peer, name: str, source: bytes, out: str) -> None:
    (peer.folder / name).write_bytes(source)
    runs(peer("submit", name), out)


# ---- how scripts end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("import sys; print('out'); sys.exit(3)", 3, ""),
        ("import sys; print('out'); sys.exit('no luck')", 1, "no luck"),
        ("print('out'); raise ValueError('mine')", 1, "ValueError: mine"),
        ("import os, signal, sys; print('out'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)", 143, "SIGTERM"),
        ("import os, signal, sys; print('out'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
        ("import os, sys; print('out'); sys.stdout.flush(); os._exit(7)", 7, ""),
        ("import os; print('out', flush=True); os.abort()", 134, "SIGABRT"),
    ],
    ids=["exit 3", "exit text", "raises", "SIGTERM", "SIGKILL", "os._exit", "abort"],
)
def test_exit_status_is_the_scripts(peer: Peer, script: str, status: int, told: str) -> None:
    done = peer.job(script)
    assert (done.status, done.out) == (status, "out\n"), done
    assert told in done.err
    shown = peer.show("last")
    assert shown["state"] == "failed"
    assert peer("wait", "last").status == status
    again = peer("result", "last")
    assert (again.status, again.out) == (status, "out\n")


def test_script_that_raises_shows_its_own_traceback_only(peer: Peer) -> None:
    done = peer.job("import grid\n\ndef work(x):\n    return 1 // x\n\nprint(list(grid.map(work, [2, 1, 0, 5])))\n")
    assert done.status == 1
    assert "ZeroDivisionError" in done.err
    assert "in work" in done.err
    assert "job.py" in done.err


def test_stages_that_nobody_reads_complete_before_the_end(peer: Peer) -> None:
    script = """
import grid, time
def slow(i):
    time.sleep(0.05)
    print("ran", i)
stage = grid.map(slow, range(10))
futures = [grid.submit(slow, 100 + i) for i in range(3)]
print("end of script")
"""
    done = peer.job(script)
    runs(done, "end of script\n")
    shown = peer.show("last")
    assert sum(stage["done"] for stage in shown["stages"]) == 13


# ---- what scripts get ----------------------------------------------------------------------------------------------------


def test_arguments_are_the_scripts_even_where_ours_are_called_alike(peer: Peer) -> None:
    script = peer.script("import sys; print(sys.argv[1:])", "arguments.py")
    done = peer("submit", "--retries", "1", script, "--retries", "5", "-d", "--json", "--help", "--", "-x", "a b", "ünï")
    runs(done, f"{['--retries', '5', '-d', '--json', '--help', '--', '-x', 'a b', 'ünï']}\n")


def test_stdin_environment_and_seed(peer: Peer) -> None:
    shows = "import os, sys; print(sys.stdin.read(), os.environ.get('COLOUR'), os.environ.get('SECRET'))"
    script = peer.script(shows, "reads.py")
    runs(peer("submit", "--stdin", "-", "--env", "COLOUR=blue", script, stdin="given", SECRET="x"), "given blue None\n")
    runs(peer("submit", "--env", "COLOUR", script, COLOUR="red"), " red None\n")
    (peer.folder / "input.txt").write_text("from a file")
    runs(peer("submit", "--stdin", "input.txt", script), "from a file None None\n")
    missing = peer("submit", "--env", "NOT_SET_ANYWHERE", script)
    assert missing.status == 2
    assert "NOT_SET_ANYWHERE" in missing.error
    assert "--stdin" in refused(peer, "--stdin", "no-such-file", script)


def test_tasks_get_the_environment_too(peer: Peer) -> None:
    script = """
import os
import grid
def get(i): return os.environ.get("COLOUR"), os.environ.get("SECRET")
print(set(grid.map(get, range(9))))
"""
    runs(peer("submit", "--env", "COLOUR=blue", peer.script(script), SECRET="x"), "{('blue', None)}\n")


def test_seed_fixes_the_randomness_of_driver_and_tasks(peer: Peer) -> None:
    script = """
import random
import grid
def draw(i): return random.random(), grid.context().seed
print(random.random(), list(grid.map(draw, range(40))))
"""
    first = peer.job(script, "--seed", "5")
    second = peer.job(script, "--seed", "5")
    other = peer.job(script, "--seed", "6")
    assert first.status == 0
    assert first.out == second.out
    assert first.out != other.out


def test_header_options_and_their_order_of_precedence(peer: Peer) -> None:
    script = """
# /// script
# requires-python = ">=3.11"
# [tool.grid]
# env = ["A=header", "B=header"]
# name = "named-in-header"
# ///
import os
print(os.environ.get("A"), os.environ.get("B"))
"""
    done = peer.job(script, "--env", "A=typed")
    assert done.status == 0, done.err
    assert done.out.split()[0] == "typed"
    assert peer.show("last")["name"] == "named-in-header"


def test_python_that_is_not_to_be_had(peer: Peer) -> None:
    script = '# /// script\n# requires-python = ">=3.99"\n# ///\nprint(1)\n'
    assert "3.99" in refused(peer, peer.script(script, "future.py"))


def test_output_files_come_back_and_foreign_ones_are_spared(peer: Peer) -> None:
    script = """
import grid
from pathlib import Path
grid.output("table/a.csv").write_text("1,2")
grid.output("b.txt").write_text("made by the job")
Path("left.txt").write_text("beside")
print("done")
"""
    folder = peer.folder / "results"
    done = peer.job(script, "--output", "results")
    runs(done, "done\n")
    assert (folder / "table" / "a.csv").read_text() == "1,2"
    assert (folder / "b.txt").read_text() == "made by the job"
    runs(peer.job(script, "--output", "results"), "done\n")  # over what it wrote itself
    (folder / "b.txt").write_text("precious")
    spared = peer.job(script, "--output", "results")
    assert spared.status != 0
    assert "--overwrite" in spared.error
    assert (folder / "b.txt").read_text() == "precious"
    runs(peer.job(script, "--output", "results", "--overwrite"), "done\n")
    assert (folder / "b.txt").read_text() == "made by the job"
    fetched = peer("result", "last", "-o", "all")
    runs(fetched, "done\n")
    assert (peer.folder / "all" / "left.txt").read_text() == "beside"


def test_driver_output_is_bytes(peer: Peer) -> None:
    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4000); sys.stderr.write('to stderr\\n')"
    peer.script(script)
    done = subprocess.run(
        [*PROGRAM, "submit", "job.py"], cwd=peer.folder, env=peer.environment(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stdout == bytes(range(256)) * 4000
    assert b"to stderr\n" in done.stderr
