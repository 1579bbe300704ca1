"""`grid submit`: what goes where, what leaving means, throwaway grids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import FINISHED, Grid, error_line

JOB = "00" + "e" * 62


def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll until it is so; processes of their own can't be waited for otherwise."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.01)


def read_line(process: subprocess.Popen[str], stream: str = "stderr") -> str:
    return str(getattr(process, stream).readline())


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if f"--home\0{folder}" in words:
                found.append(words)
    return found


def test_streams_are_kept_apart(peer: Grid) -> None:
    stages = [{"index": 0, "name": "count", "total": 10, "done": 10, "failed": 0}]
    done = peer(
        "submit",
        peer.script(
            ["stderr", "driver's\n"], ["progress", stages], ["print", 0, 3, "one\ntwo\n"], ["note", "the leader changed"],
            ["stdout", "no newline"], FINISHED,
        ),
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == "no newline"
    assert done.stderr.splitlines() == [
        f"job {JOB}",
        "driver's",
        "stage 0 count  10/10  2 peers  in 0.0s",
        "[0:3] one",
        "[0:3] two",
        "the leader changed",
    ]


def test_stdout_is_verbatim(peer: Grid) -> None:
    text = "\x1b[31mred\x1b[0m\r\n\0ü\x07"
    with peer.start("submit", peer.script(["stdout", text], FINISHED)) as process:
        out, _ = process.communicate(timeout=20)
    assert out.encode() == text.replace("\r\n", "\n").encode()  # text mode reads newlines


def test_arguments_after_the_script_are_its_own(peer: Grid) -> None:
    words = ["--seed", "3", "--detach", "-d", "--json", "--", "--name=x", "-"]
    done = peer("submit", "--name", "ours", peer.script(["argv"], ["options"], FINISHED), *words)
    assert done.returncode == 0
    argv, options = map(json.loads, done.stdout.splitlines())
    assert argv == words
    assert options == {"name": "ours"}


def test_options_arrive(peer: Grid) -> None:
    (peer.folder / "input.txt").write_text("given")
    done = peer(
        "submit", "--file", "a", "--file", "b/*.txt", "--with", "numpy", "--env", "A=1=2", "--env", "HOME", "--stdin",
        "input.txt", "--network", "--timeout", "2h", "--task-timeout", "90s", "--retries", "2", "--seed", "7", "--cpus",
        "2", "--memory", "1G", "--tag", "gpu", "--tag", "big", "--replicas", "3", "--strict", "--verify", "twice", "--",
        peer.script(["options"], FINISHED),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "files": ["a", "b/*.txt"], "with": ["numpy"], "env": {"A": "1=2", "HOME": os.environ["HOME"]}, "stdin": "given",
        "network": True, "timeout": 7200.0, "task-timeout": 90.0, "retries": 2, "seed": 7, "cpus": 2,
        "memory": 1 << 30, "tags": ["gpu", "big"], "replicas": 3, "strict": True, "verify": "twice",
    }  # fmt: skip


def test_stdin_from_a_pipe(peer: Grid) -> None:
    done = peer("submit", "--stdin", "-", peer.script(["options"], FINISHED), stdin="piped\n")
    assert json.loads(done.stdout) == {"stdin": "piped\n"}
    assert list((peer.home / "staging").iterdir()) == []
    assert "no such file for --stdin" in error_line(peer("submit", "--stdin", "nosuch", "job.py"))


def test_detached(peer: Grid) -> None:
    done = peer("submit", "-d", peer.script(["hang"]))
    assert (done.returncode, done.stdout, done.stderr) == (0, JOB + "\n", "")
    found = json.loads(peer("submit", "-d", "--json", peer.script(["hang"])).stdout)
    assert found == {"schema": 1, "job": "01" + "e" * 62}
    assert (peer.home / "last").read_text() == found["job"]


def test_script_missing(peer: Grid) -> None:
    done = peer("submit", "nosuch.py")
    assert done.returncode == 2
    assert "no such script: nosuch.py" in error_line(done)


def test_what_packing_has_to_say(peer: Grid) -> None:
    done = peer("submit", "--with", "notes", peer.script(FINISHED))
    assert done.stderr.splitlines() == [f"job {JOB}", "2 dotfiles were left out"]


def test_prints_are_limited(peer: Grid) -> None:
    done = peer("submit", peer.script(["print", 0, 1, "line\n" * 5000], ["print", 0, 2, "\x1b[2Jx"], FINISHED))
    lines = done.stderr.splitlines()
    assert lines.count("[0:1] line") in range(200, 1000)
    assert any("of prints left out" in line for line in lines)
    assert "\x1b" not in done.stderr


# ---- files -----------------------------------------------------------------------------------------------------------


def test_output_is_brought_and_written_over_only_if_ours(peer: Grid) -> None:
    script = peer.script(["files", {"output/table.csv": "first", "output/a/b": "deep", "else.txt": "stays"}], FINISHED)
    assert peer("submit", script).returncode == 0
    output = peer.folder / "output"
    assert (output / "table.csv").read_text() == "first"
    assert (output / "a/b").read_text() == "deep"
    assert not (output / "else.txt").exists()

    script = peer.script(["files", {"output/table.csv": "second", "output/new": "n"}], FINISHED)
    assert peer("submit", script).returncode == 0
    assert (output / "table.csv").read_text() == "second"

    (output / "table.csv").write_text("edited by hand")
    (output / "new").unlink()
    done = peer("submit", script)
    assert done.returncode == 125
    assert "not written over: output/table.csv" in done.stderr
    assert "grid result 02eeeeee -o DIR" in done.stderr
    assert (output / "table.csv").read_text() == "edited by hand"
    assert (output / "new").read_text() == "n"

    assert peer("submit", "--overwrite", script).returncode == 0
    assert (output / "table.csv").read_text() == "second"
    assert peer("submit", "--output", "other", script).returncode == 0
    assert (peer.folder / "other/table.csv").read_text() == "second"


def test_drivers_status_beats_a_file_in_the_way(peer: Grid) -> None:
    (peer.folder / "output").mkdir()
    (peer.folder / "output/x").write_text("mine")
    done = peer("submit", peer.script(["files", {"output/x": "new"}], ["final", {"state": "failed", "exit_code": 3}]))
    assert done.returncode == 3
    assert "not written over" in done.stderr


def test_hostile_file_names(peer: Grid) -> None:
    (peer.folder / "output").mkdir()
    (peer.folder / "secret").mkdir()
    (peer.folder / "output/link").symlink_to(peer.folder / "secret")
    (peer.folder / "output/dangling").symlink_to(peer.folder / "made")
    names = ["../up", "/abs", "a/../../up", "link/x", "dangling", ".grid-files.json", "..", ""]
    files = {f"output/{name}": "evil" for name in names} | {"output/fine": "good"}
    done = peer("submit", peer.script(["files", files], FINISHED))
    assert done.returncode == 125
    assert "not written over" in done.stderr
    assert (peer.folder / "output/fine").read_text() == "good"
    found = {str(path.relative_to(peer.folder)) for path in peer.folder.rglob("*") if path.is_file()}
    assert found == {"job.py", "output/fine", "output/.grid-files.json"}
    assert not (peer.folder / "made").exists()


# ---- leaving ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_detaches(peer: Grid) -> None:
    with peer.start("submit", peer.script(["stdout", "begun\n"], ["hang"])) as process:
        assert read_line(process) == f"job {JOB}\n"
        assert read_line(process, "stdout") == "begun\n"
        process.send_signal(signal.SIGINT)
        line = read_line(process)
        assert "detached; the job goes on" in line
        assert "grid logs 00eeeeee -f" in line
        assert process.wait(10) == 130
    assert peer.json("jobs", "--json")["jobs"][0]["state"] == "running"


def test_second_ctrl_c_cancels(peer: Grid) -> None:
    with peer.start("submit", peer.script(["hang"])) as process:
        read_line(process)
        process.send_signal(signal.SIGINT)
        read_line(process)
        process.send_signal(signal.SIGINT)
        assert read_line(process) == "job 00eeeeee is cancelled\n"
        assert process.wait(10) == 130
    assert peer.json("jobs", "--json")["jobs"][0]["state"] == "cancelled"


def test_sigterm_detaches_at_once(peer: Grid) -> None:
    with peer.start("submit", peer.script(["hang"])) as process:
        read_line(process)
        process.terminate()
        assert "terminated: detached" in read_line(process)
        assert process.wait(1.5) == 130
    assert peer.json("jobs", "--json")["jobs"][0]["state"] == "running"


def test_reader_of_stdout_goes_away(peer: Grid) -> None:
    read, write = os.pipe()
    with peer.start("submit", peer.script(["stdout", "x" * 100], ["stdout", "y" * 100], FINISHED), stdout=write) as process:
        os.close(read)
        os.close(write)
        _, words = process.communicate(timeout=20)
        assert process.returncode == 130
    assert "stdout was closed: detached" in words
    assert "Traceback" not in words
    assert "Exception ignored" not in words


def test_reader_of_a_listing_goes_away(peer: Grid) -> None:
    read, write = os.pipe()
    os.close(read)
    with peer.start("status", stdout=write) as process:
        os.close(write)
        _, words = process.communicate(timeout=20)
        assert process.returncode == 1
    assert "Traceback" not in words


def test_connection_is_taken_up_again(peer: Grid) -> None:
    done = peer("submit", peer.script(["stdout", "abc\n"], ["drop"], ["stdout", "def\n"], FINISHED))
    assert done.returncode == 0
    assert done.stdout == "abc\ndef\n"
    assert "went away" in done.stderr
    method, params = peer.calls()[1]
    assert (method, params["from_stdout"], params["job"]) == ("follow", 4, JOB)


# ---- throwaway grids -------------------------------------------------------------------------------------------------


def nothing_is_left(grid: Grid) -> bool:
    return not processes_of(grid.folder) and not [path for path in grid.folder.iterdir() if path.name.startswith("grid-")]


def test_machine_that_never_joined_does_it_by_itself(grid: Grid) -> None:
    done = grid("submit", grid.script(["stdout", "out\n"], ["files", {"output/x": "file"}], FINISHED))
    assert done.returncode == 0
    assert done.stdout == "out\n"
    assert "throwaway grid" in done.stderr.splitlines()[1]
    assert (grid.folder / "output/x").read_text() == "file"
    assert nothing_is_left(grid)
    assert not grid.home.exists()


def test_machine_that_never_joined_detached(grid: Grid) -> None:
    done = grid("submit", "-d", grid.script(FINISHED))
    assert done.returncode == 125
    assert "joined no grid" in error_line(done)


def test_home_whose_peer_is_stopped_is_told_so(grid: Grid) -> None:
    grid("join", "-d", "--listen", "127.0.0.1:0")
    grid("leave")
    done = grid("submit", grid.script(FINISHED))
    assert done.returncode == 125
    assert "start it with: grid join -d" in error_line(done)


def test_local_grid_of_three(grid: Grid) -> None:
    with grid.start("submit", "--local", "3", grid.script(["hang"])) as process:
        assert read_line(process) == f"job {JOB}\n"
        (root,) = [path for path in grid.folder.iterdir() if path.name.startswith("grid-")]
        assert len(processes_of(root)) == 3
        calls = [json.loads(line) for line in (root / "0/calls.jsonl").read_text().splitlines()]
        assert calls[0] == ["invite", {"uses": 2, "expires_s": 600.0, "role": "member", "same_owner": True}]
        settled = [json.loads((root / str(i) / "settled").read_text()) for i in range(3)]
        assert [name for _, _, name in settled] == ["local-0", "local-1", "local-2"]
        process.send_signal(signal.SIGINT)  # the first one cancels
        assert "the job is cancelled" in read_line(process)
        assert process.wait(10) == 130
    assert nothing_is_left(grid)


def test_local_grid_beside_a_joined_one(peer: Grid) -> None:
    done = peer("submit", "--local", "1", peer.script(["stdout", "out\n"], FINISHED))
    assert done.stdout == "out\n"
    assert not (peer.home / "calls.jsonl").exists()  # the joined peer was asked nothing
    assert not (peer.home / "last").exists()


def test_local_grid_is_put_away_on_errors(grid: Grid) -> None:
    assert "no such script" in error_line(grid("submit", "--local", "1", "nosuch.py"))
    assert nothing_is_left(grid)
    done = grid("submit", "--local", "2", grid.script(FINISHED), FAKE_PORT_TAKEN="1")
    assert done.returncode == 125
    assert "the port is taken" in error_line(done)
    assert nothing_is_left(grid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_local_grid_ends_with_its_command(grid: Grid, number: signal.Signals) -> None:
    with grid.start("submit", "--local", "2", grid.script(["hang"])) as process:
        assert read_line(process).startswith("job ")
        assert len(processes_of(grid.folder)) == 2
        process.send_signal(number)
        process.wait(10)
    eventually(lambda: not processes_of(grid.folder))
    if number != signal.SIGKILL:
        assert nothing_is_left(grid)
    assert not list(grid.folder.glob("grid-*/*/identity"))


def test_interrupted_while_the_throwaway_grid_starts(grid: Grid) -> None:
    with grid.start("submit", "--local", "2", "--stdin", "-", grid.script(["hang"]), stdin=subprocess.PIPE) as process:
        eventually(lambda: bool(processes_of(grid.folder)))  # it reads stdin meanwhile, which doesn't end
        process.send_signal(signal.SIGINT)
        assert read_line(process) == "interrupted before the job was accepted: nothing runs\n"
        assert process.wait(10) == 130
    assert nothing_is_left(grid)
