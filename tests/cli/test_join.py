"""`grid join`: foreground and background, what is printed when, settings, signals."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.join import raise_descriptor_limit
from dht.core.invite import Invite
from tests.cli.conftest import Grid, error_line
from tests.cli.test_submit import eventually, processes_of

LISTEN = ("--listen", "127.0.0.1:0")
INVITE = Invite(b"g" * 32, b"s" * 32, int(time.time()) + 3600, ("127.0.0.1:1",)).encode()


def test_foreground_prints_the_line_to_paste(grid: Grid) -> None:
    with grid.start("join", *LISTEN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "grid join grid1fakeinvite\n"
        assert "peer aaaaaaaa of grid cccccccc at 127.0.0.1:4743 serves" in process.stderr.readline()
        assert grid("status").returncode == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        rest = process.stderr.read()
    assert "joined with None" in rest
    assert "Traceback" not in rest
    assert not (grid.home / "control.sock").exists()


def test_json_prints_one_line_when_it_serves(grid: Grid) -> None:
    with grid.start("join", "--json", *LISTEN, INVITE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = json.loads(process.stdout.readline())
        assert ready["schema"] == 1
        assert ready["event"] == "ready"
        assert {"grid", "peer", "address", "invite"} < set(ready)
        process.terminate()
        assert process.wait(10) == 0
        assert process.stdout.read() == ""
        assert f"joined with {INVITE}" in process.stderr.read()


def test_background_returns_when_it_serves(grid: Grid) -> None:
    assert grid("join", "-d", *LISTEN).returncode == 0
    assert grid.json("status", "--json")["schema"] == 1
    assert (grid.home / "peer.log").exists()
    assert grid("leave").returncode == 0


def test_second_peer_in_the_home(peer: Grid) -> None:
    done = peer("join", "-d")
    assert done.returncode == 1
    pid = (peer.home / "lock").read_text().strip()
    assert f"already runs in {peer.home} (pid {pid})" in error_line(done)
    assert f"(pid {pid})" in error_line(peer("join"))


def test_background_as_json(grid: Grid) -> None:
    done = grid("join", "-d", "--json", *LISTEN)
    assert json.loads(done.stdout)["event"] == "ready"
    assert grid("leave").returncode == 0


def test_invite_from_stdin_reaches_the_background_unseen(grid: Grid) -> None:
    done = grid("join", "-d", "-", *LISTEN, stdin=f"{INVITE}\n")
    assert done.returncode == 0, done.stderr
    (words,) = processes_of(grid.home)
    assert INVITE not in words
    eventually(lambda: f"joined with {INVITE}" in (grid.home / "peer.log").read_text())
    assert grid("leave").returncode == 0


def test_settings_are_remembered_from_the_join_that_worked(grid: Grid) -> None:
    def settled() -> list[object]:
        assert grid("leave").returncode == 0
        return list(json.loads((grid.home / "settled").read_text()))

    done = grid("join", "-d", "--slots", "9", FAKE_PORT_TAKEN="1")
    assert done.returncode == 1
    assert "the port is taken — choose another with: --listen" in error_line(done)
    grid("join", "-d", *LISTEN, "--slots", "3", "--name", "box", "--tag", "a", "--tag", "b", "--memory", "1G", "--no-work")
    assert settled() == ["127.0.0.1:0", 3, "box"]
    grid("join", "-d", "--slots", "2")
    assert settled() == ["127.0.0.1:0", 2, "box"]
    saved = json.loads((grid.home / "settings.json").read_text())
    assert (saved["tags"], saved["memory_bytes"], saved["no_work"]) == (["a", "b"], 1 << 30, True)


def test_home_option(grid: Grid, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert grid("join", "-d", "--home", str(other), *LISTEN).returncode == 0
    assert not grid.home.exists()
    grid.environment["GRID_HOME"] = str(other)
    assert grid("leave").returncode == 0


@pytest.mark.parametrize(
    ("invite", "status", "message"),
    [
        (INVITE[:-9], 2, "cut short"),
        (INVITE[:20] + "z" + INVITE[21:], 2, "invite"),
        (INVITE.replace("grid1", "grid9"), 2, "version 9"),
        (Invite(b"g" * 32, b"s" * 32, 1000, ()).encode(), 1, "has expired"),
    ],
    ids=["cut", "mistyped", "newer", "expired"],
)
def test_bad_invites(grid: Grid, invite: str, status: int, message: str) -> None:
    for words in (["join", invite], ["join", "-d", invite], ["join", "-"]):
        done = grid(*words, stdin=invite)
        assert done.returncode == status
        assert message in error_line(done)


def test_port_taken_in_the_foreground(grid: Grid) -> None:
    done = grid("join", FAKE_PORT_TAKEN="1")
    assert done.returncode == 1
    assert "the port is taken" in error_line(done)
    found = grid("join", "--json", FAKE_PORT_TAKEN="1")
    assert json.loads(found.stdout)["error"]["code"] == "listen"


def test_killed_peer_leaves_a_home_that_starts_again(peer: Grid) -> None:
    pid = int((peer.home / "lock").read_text())
    subprocess.run(["kill", "-9", str(pid)], check=True)
    eventually(lambda: peer("status").returncode == 3)
    assert peer("join", "-d", *LISTEN).returncode == 0
    assert peer("status").returncode == 0
    assert peer("leave").returncode == 0


def test_reader_of_the_first_line_goes_away(grid: Grid) -> None:
    with grid.start("join", *LISTEN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "serves" in process.stderr.readline()
        process.stdout.close()
        assert grid("invite", "--uses", "77").returncode == 0  # the fake reports a fresh invite then
        assert "that invite was used" in "".join(process.stderr.readline() for _ in range(3))
        assert grid("leave").returncode == 0
        assert process.wait(10) == 0


def test_leave_returns_when_the_home_is_free(grid: Grid) -> None:
    for _ in range(3):
        assert grid("join", "-d", *LISTEN).returncode == 0
        assert grid("leave").returncode == 0


def test_peer_may_have_more_files_open_than_usual() -> None:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard if 0 <= hard < 8192 else 8192, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
