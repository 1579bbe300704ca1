"""A job's life seen from several machines: detach, list, follow, wait, results, cancel; and ids that name no job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.grids import Grid, Peer, until

pytestmark = pytest.mark.real

STEPS = """
import sys, time
import grid

def work(i):
    print("task", i)
    time.sleep({task_s})
    return i

print("begun", flush=True)
print("careful", file=sys.stderr, flush=True)
print(sum(grid.map(work, range({count}))))
grid.output("report.txt").write_text("made")
sys.exit({status})
"""


def steps(count: int = 40, task_s: float = 0.02, status: int = 0) -> str:
    """A script that prints, maps, leaves a file and exits."""
    return STEPS.format(count=count, task_s=task_s, status=status)


ENDLESS = steps(count=1_000_000, task_s=0.05)


@pytest.fixture
def endless(three: list[Peer]) -> Iterator[str]:
    """A job that runs until the test ends."""
    job = three[0].detached(ENDLESS)
    yield job
    three[0]("cancel", job)


def state(peer: Peer, job: str) -> str:
    """As `grid show` has it; "" while it can't say."""
    done = peer("show", "--json", job)
    return str(done.json["state"]) if done.status == 0 else ""


# ---- the whole way ------------------------------------------------------------------------------------------------------


def test_detached_job_is_followed_from_another_machine(three: list[Peer]) -> None:
    first, second, third = three
    job = first.detached(steps(status=3), "--name", "nightly")
    assert len(job) == 64
    assert int(job, 16)
    until(lambda: any(row["id"] == job for row in second("jobs", "--json").json["jobs"]), 5, "others know the job")
    waited = third("wait", job[:12])
    assert waited.status == 3
    assert waited.out == ""
    row = next(row for row in second.status()["jobs"] if row["id"] == job)
    assert (row["state"], row["done"], row["total"]) == ("failed", 40, 40)
    row = next(row for row in second("jobs", "--json").json["jobs"] if row["id"] == job)
    assert (row["name"], row["state"], row["leader"]) == ("nightly", "failed", first.id)
    shown = second.show(job)
    assert shown["exit_code"] == 3
    assert shown["owner"] == row["owner"]
    assert [stage["done"] for stage in shown["stages"]] == [40]
    logs = second("logs", job)
    assert (logs.out, logs.err) == ("begun\n780\n", "careful\n")
    assert third("logs", job, "--task", "0:7").out == "task 7\n"
    assert "no stage 9" in third("logs", job, "--task", "9:0").error
    lines = [json.loads(line) for line in second("logs", "--json", job).out.splitlines()]
    assert "".join(line["text"] for line in lines if line["stream"] == "stdout") == "begun\n780\n"
    result = second("result", job, "-o", "brought")
    assert (result.status, result.out) == (3, "begun\n780\n")
    assert (second.folder / "brought" / "output" / "report.txt").read_text() == "made"
    told = json.loads(third("result", "--json", job).out)
    assert (told["exit_code"], told["stdout"]) == (3, "begun\n780\n")
    assert [file["name"] for file in told["files"]] == ["output/report.txt"]


def test_logs_follow_a_running_job_to_its_end(three: list[Peer]) -> None:
    job = three[0].detached(steps(count=60, task_s=0.05))
    follower = three[1].begin("logs", "-f", job)
    follower.lines_until("stdout", "begun", 10)
    assert state(three[1], job) == "running"  # output came before the end
    done = follower.finish(30)
    assert (done.status, done.out) == (0, f"{sum(range(60))}\n")
    assert state(three[1], job) == "finished"


def test_job_cancelled_from_another_machine(three: list[Peer]) -> None:
    """One person's machines: joined with --same-owner they may cancel each other's jobs."""
    owner = three[0]
    mine = Grid(owner.home.parent / "mine")
    mine.root.mkdir()
    with mine:
        other = mine.home("laptop").start(owner("invite", "--same-owner", "--json").json["invite"])
        job = owner.detached(ENDLESS)
        until(lambda: len(owner.show(job)["peers"]) > 1, 10, "others work")
        waiting = three[2].begin("wait", job)
        assert other("cancel", job).status == 0
        assert waiting.finish(10).status == 130
        assert state(owner, job) == "cancelled"
        for peer in (*three, other):
            until(lambda peer=peer: all(r["slots"]["busy"] == 0 for r in peer.status()["peers"]), 5, "slots are free")  # type: ignore[misc]
        assert other("leave").status == 0


def test_job_of_another_owner_is_not_cancelled(three: list[Peer], endless: str) -> None:
    refused = three[1]("cancel", endless)
    assert refused.status == 1
    assert "--force" in refused.error
    assert three[1]("cancel", "--force", endless).status == 1  # and it takes the admin role
    assert state(three[0], endless) == "running"


def test_wait_gives_up_and_the_job_goes_on(three: list[Peer], endless: str) -> None:
    done = three[1]("wait", "--timeout", "300ms", endless)
    assert done.status == 124
    assert "still running" in done.error
    assert state(three[0], endless) == "running"


def test_interrupted_submit_detaches(three: list[Peer]) -> None:
    peer = three[2]
    command = peer.begin("submit", peer.script(steps(count=300, task_s=0.05), "long.py"))
    job = command.lines_until("stderr", "job ").split()[1]
    command.lines_until("stdout", "begun")
    command.interrupt()
    done = command.finish(15)
    assert done.status == 130
    assert f"grid cancel {job[:8]}" in done.err
    assert state(peer, job) == "running"
    result = peer("result", job)
    assert (result.status, result.out) == (0, f"begun\n{sum(range(300))}\n")


def test_two_interrupts_cancel(three: list[Peer]) -> None:
    peer = three[2]
    command = peer.begin("submit", peer.script(ENDLESS, "endless.py"))
    job = command.lines_until("stderr", "job ").split()[1]
    command.lines_until("stdout", "begun")
    command.interrupt()
    command.lines_until("stderr", "cancel")
    command.interrupt()
    assert command.finish(15).status == 130
    until(lambda: state(peer, job) == "cancelled", 5, "the job is cancelled")


def test_killed_submit_command_costs_nothing(three: list[Peer]) -> None:
    peer = three[1]
    command = peer.begin("submit", peer.script(steps(count=60, task_s=0.05), "long.py"))
    job = command.lines_until("stderr", "job ").split()[1]
    command.process.kill()
    command.finish()
    result = three[0]("result", job)
    assert (result.status, result.out) == (0, f"begun\n{sum(range(60))}\n")


def test_two_jobs_share_the_grid(three: list[Peer]) -> None:
    first = three[0].detached(steps(count=100))
    second = three[1].detached(steps(count=120))
    assert three[2]("result", first).out == f"begun\n{sum(range(100))}\n"
    assert three[2]("result", second).out == f"begun\n{sum(range(120))}\n"
    ids = [row["id"] for row in three[2]("jobs", "--json").json["jobs"]]
    assert ids.index(second) < ids.index(first)  # newest first


def test_explain_says_why_tasks_wait(three: list[Peer]) -> None:
    script = "import grid\nprint(grid.options(tags=('gpu',)).submit(abs, -1).result())\n"
    job = three[0].detached(script)
    try:
        reasons = until(
            lambda: [r for r in three[1]("explain", "--json", job).json["reasons"] if "gpu" in r["text"]], 10, "the tag is named"
        )
        assert reasons[0]["tasks"] == 1
    finally:
        three[0]("cancel", job)


def test_tagged_tasks_run_where_the_tag_is(grid: Grid) -> None:
    first = grid.found()
    tagged = grid.join(first, "--tag", "gpu")
    script = """
import grid
def where(i): return grid.context().peer
print(set(grid.options(tags=("gpu",)).map(where, range(10))))
"""
    done = first.job(script)
    assert (done.status, done.out) == (0, f"{{{tagged.id!r}}}\n"), done.err


def test_peer_that_only_submits(grid: Grid) -> None:
    first = grid.found()
    lazy = grid.join(first, "--no-work")
    done = lazy.job(steps())
    assert (done.status, done.out) == (0, "begun\n780\n"), done.err
    assert lazy.show("last")["peers"][first.id]["done"] == 40


# ---- names of jobs --------------------------------------------------------------------------------------------------------


def test_job_ids_that_name_none_or_several(three: list[Peer]) -> None:
    peer = three[0]
    for _ in range(20):
        ids = [row["id"] for row in peer("jobs", "--json").json["jobs"]]
        shared = next((a[:1] for a in ids if sum(b[0] == a[0] for b in ids) > 1), "")
        if shared:
            break
        peer.detached("pass")
    for command, status in (("show", 1), ("logs", 1), ("cancel", 1), ("explain", 1), ("wait", 125), ("result", 125)):
        for prefix, words in (("zzzz", "job"), ("0" * 64, "job"), (shared, "type more")):
            done = peer(command, prefix)
            assert done.status == status, (command, prefix, done)
            assert words in done.error
            assert done.err.count("\n") == 1
    told = json.loads(peer("show", "--json", "zzzz").out)
    assert told["error"]["code"] == "unknown-job"


def test_last_is_the_newest_of_this_home(three: list[Peer]) -> None:
    mine = three[0].detached("print('mine')")
    theirs = three[1].detached("print('theirs')")
    assert three[0]("result", "last").out == "mine\n"
    assert three[1].show("last")["id"] == theirs
    assert three[0].show("last")["id"] == mine


# ---- losses ---------------------------------------------------------------------------------------------------------------


def test_job_is_followed_past_its_leaders_death(grid: Grid) -> None:
    """From another machine, in the middle of everything; what ended before is still to be had, there too."""
    first = grid.found()
    second = grid.join(first)
    ended = first.detached("print('kept')")
    assert second("result", ended).out == "kept\n"
    job = first.detached(steps(count=400, task_s=0.05))
    follower = second.begin("logs", "-f", job)
    follower.lines_until("stdout", "begun", 10)
    until(lambda: first.show(job)["peers"].get(second.id, {}).get("done"), 10, "the second peer works")
    until(lambda: (first.home / "contacts").exists(), 15, "whom it knows is on disk")
    first.kill()
    done = follower.finish(60)
    assert (done.status, done.out) == (0, f"{sum(range(400))}\n")
    assert "following the new one" in done.err
    assert second("wait", job).status == 0
    assert second("result", ended).out == "kept\n"
    first.start()
    until(lambda: state(first, job) == "finished", 10, "who comes back learns it")
    assert first("result", job).out == f"begun\n{sum(range(400))}\n"
    assert first("result", ended).out == "kept\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("needs root to mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"can't mount: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_fails_the_job_not_the_peer(grid: Grid, small_disk: Path) -> None:
    peer = Peer(grid, small_disk / "home").start()
    (peer.folder / "big.bin").unlink(missing_ok=True)
    other = grid.join(peer)
    scripts = {  # each needs more than the disk has
        "object": "import grid\nprint(grid.submit(len, grid.put(bytes(200 << 20))).result())",
        "result": "import grid\nprint(len(grid.submit(bytes, 200 << 20).result()))",
        "output": "import grid\ngrid.output('x').write_bytes(bytes(200 << 20))",
        "stdout": "for _ in range(200): print('x' * (1 << 20))",
    }
    healthy = "import grid\nprint(sum(grid.map(abs, range(100))))"
    for name, script in scripts.items():
        done = peer.job(script)
        assert peer.running, (name, peer.log.read_text()[-2000:])
        if name == "stdout" and done.status == 0:  # the log had no room left here first: the peer that has it took the job over
            assert done.out == ("x" * (1 << 20) + "\n") * 200
            assert state(peer, "last") == "finished"
        else:
            assert done.status != 0, name
            assert "space" in done.err, (name, done.err[-500:])
            assert state(peer, "last") == "failed", name
        again = peer.job(healthy)
        assert again.out == "4950\n", (name, again.err, peer.log.read_text()[-2000:])
    done = peer.job("import grid\nprint(grid.submit(len, bytes(200 << 20)).result())")
    assert (done.status, done.out) == (0, f"{200 << 20}\n"), "an argument of a task at the same peer needs no disk"
    assert other.job(healthy).out == "4950\n"
    (other.folder / "big.bin").write_bytes(os.urandom(100 << 20))
    reads = """
import grid
def size(file):
    with open(file, "rb") as data:
        return len(data.read())
print(grid.submit(size, grid.files("big.bin")[0]).result())
"""
    done = other.job(reads, "--file", "big.bin")  # the peer with the small disk can't take part
    assert (done.status, done.out) == (0, f"{100 << 20}\n"), done.err
    assert peer.running


def test_job_of_a_peer_that_was_stopped_goes_on_when_it_is_started(grid: Grid) -> None:
    peer = grid.found()
    job = peer.detached(steps(count=100, task_s=0.05))
    until(lambda: state(peer, job) == "running", 5, "the job runs")
    peer.end(lambda process: process.send_signal(signal.SIGINT))
    peer.start()
    result = peer("result", job)
    assert (result.status, result.out) == (0, f"begun\n{sum(range(100))}\n")
