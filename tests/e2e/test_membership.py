"""Peers come, go, and see each other; invites and homes that can't be used; strangers at both ports."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

import pytest

from dht.core.invite import Invite
from tests.e2e.grids import PROGRAM, Grid, Peer, runs, until

pytestmark = pytest.mark.real

ALL_SEEN_S = 5.0


def alive(peer: Peer) -> set[str]:
    """Ids of the peers that this one lists as alive."""
    return {row["id"] for row in peer.status()["peers"] if row["state"] == "alive"}


def fails(peer: Peer, *words: str, status: int) -> str:
    """Run a command that must fail with this status and one line on stderr; returns the line."""
    done = peer(*words)
    assert done.status == status, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    return done.error


def test_three_peers_all_listed_alive_on_each(grid: Grid) -> None:
    first = grid.found()
    assert set(first.ready) >= {"schema", "event", "grid", "peer", "address", "invite"}
    second = grid.home().start(first.ready["invite"])
    third = grid.join(first)
    joined = time.monotonic()
    everybody = {first.id, second.id, third.id}
    for peer in (first, second, third):
        until(lambda peer=peer: alive(peer) == everybody, ALL_SEEN_S - (time.monotonic() - joined), f"{peer.home.name} sees all")  # type: ignore[misc]
        status = peer.status()
        assert status["schema"] == 1
        assert status["self"] == peer.id
        assert status["grid"] == first.ready["grid"]
        assert {row["name"] for row in status["peers"]} == {"peer0", "peer1", "peer2"}
        assert all(row["slots"] == {"total": 1, "busy": 0} for row in status["peers"])


def test_founder_leaves_and_a_newcomer_still_finds_everybody(grid: Grid) -> None:
    first = grid.found()
    second = grid.join(first)
    third = grid.join(first)
    until(lambda: len(alive(second)) == 3, ALL_SEEN_S, "second sees all")
    issued_by_the_founder = first.invite
    first.end(lambda process: first("leave"))
    assert first.process is not None
    assert first.process.returncode == 0
    fourth = grid.join(second)
    survivors = {second.id, third.id, fourth.id}
    for peer in (second, third, fourth):
        until(lambda peer=peer: alive(peer) >= survivors, ALL_SEEN_S, f"{peer.home.name} sees the survivors")  # type: ignore[misc]
    until(lambda: first.id not in alive(fourth), 15, "the founder is not alive any more")
    fifth = grid.home().start(issued_by_the_founder)  # its first address is dead; any member admits
    until(lambda: alive(fifth) >= survivors, ALL_SEEN_S, "the invite outlives who made it")


def test_peer_comes_back_to_its_grid_by_itself(grid: Grid) -> None:
    first = grid.found()
    second = grid.join(first)
    id_before = second.id
    second.stop()
    second.start()
    assert second.id == id_before
    until(lambda: len(alive(second)) == 2, ALL_SEEN_S, "back among the others")
    second.kill()
    second.start()
    until(lambda: len(alive(first)) == 2, ALL_SEEN_S, "back after SIGKILL")


def test_grid_that_was_down_finds_itself_again(grid: Grid) -> None:
    peers = [first := grid.found(), grid.join(first)]
    runs(first.job("import grid\nprint(sum(grid.map(abs, range(50))))"), "1225\n")
    addresses = [peer.address for peer in peers]
    for peer in peers:
        peer.kill()
    (peers[1].home / "jobs" / "ab" / "code").mkdir(parents=True)  # killed while it helped
    for peer in peers:
        peer.start()
    assert [peer.address for peer in peers] == addresses  # port 0 means a free one, the same each time
    until(lambda: all(len(alive(peer)) == 2 for peer in peers), ALL_SEEN_S, "both are back")
    assert not (peers[1].home / "jobs" / "ab").exists()
    assert "damaged" not in peers[1].log.read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda invite: "grid1", "cut short"),
        (lambda invite: "hello", "not an invite"),
        (lambda invite: invite[:-9], "cut short"),
        (lambda invite: invite[:40] + ("b" if invite[40] != "b" else "c") + invite[41:], "wrong character"),
        (lambda invite: "grid9" + invite[5:], "version"),
        (lambda invite: invite + "aaaaaaa", ""),
        (lambda invite: "", ""),
    ],
    ids=["only the prefix", "another word", "truncated", "one letter wrong", "a later version", "too long", "empty"],
)
def test_malformed_invite(three: list[Peer], grid: Grid, spoil: object, words: str) -> None:
    assert callable(spoil)
    line = fails(grid.home(), "join", "--listen", "127.0.0.1:0", spoil(three[0].ready["invite"]), status=2)
    assert "invite" in line
    assert words in line


def test_expired_invite(three: list[Peer], grid: Grid) -> None:
    invite = three[0]("invite", "--expires", "1s", "--json").json["invite"]
    expires_s = Invite.decode(invite).expires_s
    until(lambda: time.time() > expires_s, 5, "the invite's end")
    assert "expired" in fails(grid.home(), "join", "--listen", "127.0.0.1:0", invite, status=1)


def test_invite_is_for_one_use(three: list[Peer], grid: Grid) -> None:
    founder = grid.found()
    invite = founder.invite
    grid.home().start(invite)
    line = fails(grid.home(), "join", "--listen", "127.0.0.1:0", invite, status=1)
    assert "used" in line


def test_invite_of_another_grid(three: list[Peer], grid: Grid) -> None:
    member = grid.found()
    member.stop()
    line = fails(member, "join", "--listen", "127.0.0.1:0", three[0].ready["invite"], status=1)
    assert member.ready["grid"][:8] in line
    assert "leave --forget" in line
    member.start()  # and nothing was lost


def test_roles_bound_what_a_member_may_do(three: list[Peer], grid: Grid) -> None:
    worker = grid.home().start(three[0]("invite", "--role", "worker", "--json").json["invite"])
    worker.script("print('never')")
    assert "invite" in fails(worker, "submit", "job.py", status=125)
    assert "may not invite" in fails(worker, "invite", status=1)
    submitter = grid.home().start(three[0]("invite", "--role", "submitter", "--json").json["invite"])
    assert submitter.job("print('mine')").out == "mine\n"
    for peer in (worker, submitter):
        assert peer("leave").status == 0


def test_nobody_answers_an_invite(grid: Grid) -> None:
    founder = grid.found()
    invite = founder.invite
    founder.stop()
    line = fails(grid.home(), "join", "--listen", "127.0.0.1:0", invite, status=1)
    assert "reach" in line or "answer" in line


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_port_taken(grid: Grid, kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        line = fails(grid.home(), "join", "--listen", f"127.0.0.1:{port}", status=1)
    assert str(port) in line
    assert "--listen" in line


def test_peer_already_runs_in_this_home(three: list[Peer]) -> None:
    line = fails(three[0], "join", "--listen", "127.0.0.1:0", status=1)
    assert "already" in line
    assert len(alive(three[0])) == 3


def test_commands_without_a_peer(grid: Grid) -> None:
    nobody = grid.home()
    for line in ("status", "jobs", "show abc", "leave", "invite"):
        assert "grid join" in fails(nobody, *line.split(), status=3)
    for line in ("wait abc", "result abc", "submit -d job.py"):
        assert "grid join" in fails(nobody, *line.split(), status=125)
    done = nobody("status", "--json")
    assert done.status == 3
    assert set(json.loads(done.out)["error"]) == {"code", "message", "hint"}
    assert not nobody.home.exists() or not (nobody.home / "membership").exists()


def test_garbage_and_half_open_connections_at_both_ports(three: list[Peer]) -> None:
    """Strangers get nothing, cost nothing that lasts, and harm nobody."""
    address = three[1].address
    idle = [socket.create_connection(address) for _ in range(300)]  # half-open: never say a word
    try:
        for length in (1, 16, 4096, 1 << 20):
            with socket.create_connection(address) as stream:
                stream.settimeout(10)
                with contextlib.suppress(ConnectionError):  # cut off in mid-sentence
                    stream.sendall(secrets.token_bytes(length))
                    while stream.recv(1 << 16):  # the other end closes; a time-out fails the test
                        pass
        with socket.create_connection(address) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            for length in (0, 1, 20, 90, 508, 1400, 60_000):
                for _ in range(50):
                    datagrams.sendto(secrets.token_bytes(length), address)
            datagrams.setblocking(False)
            with pytest.raises(BlockingIOError):
                datagrams.recv(1 << 16)  # no reply to strangers
        assert len(alive(three[1])) == 3
        assert len(alive(three[0])) == 3
        assert three[1].job("import grid\nprint(sum(grid.map(abs, range(50))))").out == "1225\n"
    finally:
        for stream in idle:
            stream.close()


def test_home_of_another_user_or_damaged(grid: Grid, tmp_path: Path) -> None:
    peer = grid.found()
    peer.stop()
    membership = next(path for path in peer.home.iterdir() if path.name.startswith("membership"))
    membership.write_bytes(b"\xff\x00 damaged")
    line = fails(peer, "join", "--listen", "127.0.0.1:0", status=1)
    assert "damaged" in line


def test_detached_peer_serves_until_told_to_leave(grid: Grid) -> None:
    home = grid.home()
    done = home("join", "-d", "--listen", "127.0.0.1:0", "--slots", "1")
    assert done.status == 0, done.err
    pid = int((home.home / "lock").read_text())
    try:
        assert done.out.startswith("grid join grid1")
        assert home.status()["peers"][0]["state"] == "alive"
        assert home.job("print('hello')").out == "hello\n"
        assert home("leave", "--forget").status == 0
        until(lambda: not Path(f"/proc/{pid}").exists(), 10, "the peer is gone")
    finally:
        if Path(f"/proc/{pid}").exists():
            os.killpg(pid, 9)
    assert home("status").status == 3


def test_foreground_peer_prints_what_to_paste(grid: Grid) -> None:
    home = grid.home()
    command = home.begin("join", "--listen", "127.0.0.1:0", "--slots", "1")
    line = command.lines_until("stdout", "grid join grid1", 20)
    other = grid.home().start(line.split()[2])
    fresh = command.lines_until("stdout", "grid join grid1", 20)
    assert fresh != line
    grid.home().start(fresh.split()[2])
    until(lambda: len(alive(other)) == 3, ALL_SEEN_S, "all see all")
    command.interrupt()
    assert command.finish(20).status in (0, 130)


def test_version_and_help_need_no_peer(grid: Grid) -> None:
    home = grid.home()
    assert home("--help").status == 0
    assert home("submit", "--help").status == 0
    assert home("--version").status == 0
    assert home("nonsense").status == 2
    done = subprocess.run([*PROGRAM], capture_output=True, text=True, check=False, env=home.environment(), timeout=30)
    assert "Traceback" not in done.stderr
