"""The commands that ask a running peer: what they print for people, what for programs, how they fail."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from grid.api.client import Client, Stream
from tests.cli.conftest import FINISHED, Grid, error_line

JOB_KEYS = {"id", "name", "owner", "state"}
REPORTING = ["status", "jobs", "invite", "explain last", "show last", "doctor"]
NEED_PEER = [
    "status",
    "jobs",
    "invite",
    "leave",
    "trust all",
    "revoke ab",
    "show last",
    "logs last",
    "cancel last",
    "explain last",
]


def test_version(grid: Grid) -> None:
    assert grid("--version").stdout.startswith("grid 0.")


def test_help_names_every_command(grid: Grid) -> None:
    from cli.main import COMMANDS

    text = grid("--help").stdout
    assert all(f" {name} " in text for name in COMMANDS)
    assert grid().stdout.strip() == text.strip()


@pytest.mark.parametrize("command", ["join", "submit", "result", "logs"])
def test_help_of_a_command(grid: Grid, command: str) -> None:
    done = grid(command, "--help")
    assert done.returncode == 0
    assert f"Usage: grid {command}" in done.stdout


def test_status_json(peer: Grid) -> None:
    peer("submit", "-d", peer.script(FINISHED))
    found = peer.json("status", "--json")
    assert found["schema"] == 1
    assert set(found) >= {"grid", "self", "peers", "jobs"}
    assert set(found["peers"][0]) >= {"id", "name", "owner", "address", "state", "slots", "leads", "version"}
    assert found["peers"][0]["slots"] == {"total": 4, "busy": 1}
    assert len(found["peers"][0]["leads"][0]) == 64


def test_status_for_people_is_cleaned_of_escapes(peer: Grid) -> None:
    done = peer("status")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "evilname" in done.stdout
    assert "aaaaaaaa  ours (this)" in done.stdout
    assert "grid cccccccc, 2 peers" in done.stderr


@pytest.mark.parametrize("words", NEED_PEER)
def test_no_peer_where_no_grid_was_joined(grid: Grid, words: str) -> None:
    done = grid(*words.split())
    assert done.returncode == 3
    line = error_line(done)
    assert "joined no grid" in line
    assert "grid join INVITE" in line
    assert not grid.home.exists()


@pytest.mark.parametrize(("command", "status"), [("status", 3), ("jobs", 3), ("wait", 125), ("result", 125)])
def test_no_peer_as_json(grid: Grid, command: str, status: int) -> None:
    done = grid(command, *(["ab"] if status == 125 else []), "--json")
    assert done.returncode == status
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["error"]["code"] == "no-peer"
    assert set(found["error"]) == {"code", "message", "hint"}


def test_peer_stopped_since_it_joined(grid: Grid) -> None:
    assert grid("join", "-d", "--listen", "127.0.0.1:0").returncode == 0
    assert grid("leave").returncode == 0
    done = grid("status")
    assert done.returncode == 3
    assert "is not running" in error_line(done)
    assert "start it with: grid join -d" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nosuch", "no such command 'nosuch'"),
        ("status --nosuch", "no such option: --nosuch"),
        ("show", "missing argument 'JOB'"),
        ("submit", "missing argument"),
        ("submit --retries", "requires an argument"),
        ("submit --retries many job.py", "retries"),
        ("submit --retries -1 job.py", "retries"),
        ("submit --timeout soon job.py", "is not a duration"),
        ("submit --memory lots job.py", "is not a size"),
        ("submit --local 0 job.py", "local"),
        ("submit --local 2 -d job.py", "can't be detached"),
        ("submit --env NOT_SET_ANYWHERE job.py", "is not set here"),
        ("submit --env =x job.py", "is no environment variable"),
        ("invite --role king", "role"),
        ("invite --uses 0", "uses"),
        ("invite --expires never", "is not a duration"),
        ("logs ab --task 5", "names no task"),
        ("join --listen host:port", "is not an address"),
        ("join --slots 0", "slots"),
        ("join --memory 0", "is not a size"),
        ("join -", "stdin held no invite"),
        ("join not-an-invite", "not an invite"),
        ("join grid1abc", "cut short"),
        ("join --name \x1b[31m", "a name has"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(grid: Grid, words: str, message: str) -> None:
    done = grid(*words.split(" "))
    assert done.returncode == 2, done.stderr
    assert message in error_line(done)
    assert not grid.home.exists()


@pytest.mark.parametrize("words", [("status", "--json", "--nosuch"), ("submit", "--json", "job.py"), ("show", "--json")])
def test_wrong_use_as_json(grid: Grid, words: tuple[str, ...]) -> None:
    done = grid(*words)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"


def test_debug_shows_the_traceback(grid: Grid) -> None:
    assert "Traceback" in grid("status", "--debug").stderr


def test_invite(peer: Grid) -> None:
    done = peer("invite")
    assert done.stdout.startswith("grid1")
    assert len(done.stdout.split()) == 1
    found = peer.json("invite", "--uses", "3", "--expires", "2h", "--role", "worker", "--same-owner", "--json")
    assert found["invite"].startswith("grid1")
    assert peer.calls()[-1] == ("invite", {"uses": 3, "expires_s": 7200.0, "role": "worker", "same_owner": True})


def test_trust_revoke_leave(peer: Grid) -> None:
    assert peer("trust", "all").returncode == 0
    assert peer("revoke", "ab12").returncode == 0
    done = peer("leave", "--forget")
    assert done.returncode == 0
    assert "handing over 2 blobs" in done.stderr
    assert peer.calls()[-3:] == [("trust", {"peer": "all"}), ("revoke", {"peer": "ab12"}), ("leave", {"forget": True})]
    assert peer("status").returncode == 3


def test_jobs_show_explain(peer: Grid) -> None:
    assert "no jobs" in peer("jobs").stderr
    job = peer("submit", "-d", peer.script(["hang"])).stdout.strip()
    assert set(peer.json("jobs", "--json")["jobs"][0]) >= JOB_KEYS
    table = peer("jobs").stdout
    assert job[:8] in table
    assert "\x1b" not in table
    found = peer.json("show", job[:4], "--json")
    assert found["id"] == job
    assert {"epoch", "leader", "replicas", "recovered", "stages", "peers", "exit_code"} <= set(found)
    text = peer("show", "last").stdout
    assert "epoch 3" in text
    assert "count" in text
    assert "5 tasks: no peer has the tag gpu" in peer("explain", "last").stdout
    assert peer.json("explain", "last", "--json")["reasons"][0]["code"] == "no-tag"


def shown(monkeypatch: pytest.MonkeyPatch, peer: Grid, **changes: Any) -> str:
    """What `grid show` prints of a job that is so."""
    peer("submit", "-d", peer.script(["hang"]))
    found = peer.json("show", "last", "--json") | changes
    call = Client.call

    def patched(self: Client, method: str, **params: Any) -> Any:
        return found if method == "show" else call(self, method, **params)

    monkeypatch.setattr(Client, "call", patched)
    return peer("show", "last").stdout


def test_show_of_a_job_without_a_leader(monkeypatch: pytest.MonkeyPatch, peer: Grid) -> None:
    assert "none at the moment: grid explain says why" in shown(monkeypatch, peer, leader="")


def test_show_of_a_job_that_ended_twice(monkeypatch: pytest.MonkeyPatch, peer: Grid) -> None:
    other = {"branch": "ab" * 20, "state": "failed", "leader": "bb" * 20}
    text = shown(monkeypatch, peer, state="finished", branch="cd" * 20, recovered=True, conflicts=[other])
    assert "outcomes  2, for it went on in two places; the other: failed at bbbbbbbb" in text
    assert "branch    cdcdcdcd" in text
    assert "went on without a majority" in text


def test_jobs_tell_epoch_replicas_and_two_outcomes(monkeypatch: pytest.MonkeyPatch, peer: Grid) -> None:
    peer("submit", "-d", peer.script(["hang"]))
    (row,) = peer.json("jobs", "--json")["jobs"]
    row |= {"epoch": 7, "replicas": 5, "conflict": True, "state": "finished"}
    monkeypatch.setattr(Client, "call", lambda self, method, **params: [row])
    head, line = peer("jobs").stdout.splitlines()
    assert {"EPOCH", "REPLICAS"} <= set(head.split())
    assert "finished, two outcomes" in line
    assert {"7", "5"} <= set(line.split())


def test_leave_that_would_lose_jobs_is_forced(peer: Grid) -> None:
    assert peer("leave", "--forget", "--force").returncode == 0
    assert peer.calls()[-1] == ("leave", {"forget": True, "force": True})
    assert "goes on when the machine" in " ".join(peer("leave", "--help").stdout.split())


@pytest.mark.parametrize("words", [("logs", "last", "-f"), ("wait", "last"), ("result", "last")])
def test_change_of_leaders_is_a_line_on_stderr(monkeypatch: pytest.MonkeyPatch, peer: Grid, words: tuple[str, ...]) -> None:
    peer("submit", peer.script(["stdout", "abc\n"], FINISHED))
    plain = peer(*words)
    following = Stream.__next__
    told: list[bool] = []

    def noted(self: Stream) -> tuple[str, dict[str, Any], bytes]:
        if not told:
            told.append(True)
            return "note", {"text": "the job's leader went away; following the new one"}, b""
        return following(self)

    monkeypatch.setattr(Stream, "__next__", noted)
    done = peer(*words)
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout)
    assert done.stderr.count("the job's leader went away; following the new one\n") == 1


def test_ids_unknown_ambiguous_and_hostile(peer: Grid) -> None:
    assert "no job was submitted from this home" in error_line(peer("show", "last"))
    for _ in range(2):
        peer("submit", "-d", peer.script(["hang"]))
    done = peer("show", "0")
    assert done.returncode == 1
    assert "00eeeeee or 01eeeeee" in error_line(done)
    assert peer("show", "ff").returncode == 1
    assert "not a job id" in error_line(peer("show", "../../etc"))
    assert peer("wait", "ff").returncode == 125
    assert peer("result", "ff").returncode == 125
    assert peer("cancel", "ff").returncode == 1
    assert peer("show", "00EE").returncode == 0
    assert peer.json("show", "last", "--json")["id"].startswith("01")


def test_cancel_wants_force_for_others(peer: Grid) -> None:
    peer("submit", "-d", "--name", "not ours", peer.script(["hang"]))
    done = peer("cancel", "last")
    assert done.returncode == 1
    assert "another owner's" in error_line(done)
    assert peer("cancel", "last", "--force").returncode == 0
    assert peer("wait", "last").returncode == 130


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ({"state": "finished", "exit_code": 0}, 0),
        ({"state": "failed", "exit_code": 3}, 3),
        ({"state": "failed", "exit_code": None, "signal": 9}, 137),
        ({"state": "failed", "error": {"code": "timeout", "message": "over its time"}}, 124),
        ({"state": "failed", "error": {"code": "lost", "message": "all replicas are gone", "hint": "none"}}, 125),
        ({"state": "cancelled"}, 130),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_submit_wait_and_result_end_as_the_driver_did(peer: Grid, outcome: dict[str, object], status: int) -> None:
    assert peer("submit", peer.script(["stdout", "out\n"], ["final", outcome])).returncode == status
    assert peer("wait", "last").returncode == status
    found = peer("wait", "last", "--json")
    assert found.returncode == status
    assert json.loads(found.stdout)["state"] == outcome["state"]
    done = peer("result", "last")
    assert (done.returncode, done.stdout) == (status, "out\n")


def test_wait_gives_up(peer: Grid) -> None:
    peer("submit", "-d", peer.script(["hang"]))
    done = peer("wait", "last", "--timeout", "50ms")
    assert done.returncode == 124
    assert "still running after 50ms" in error_line(done)


def test_logs(peer: Grid) -> None:
    peer("submit", "-d", peer.script(["stdout", "a\nb\n"], ["hang"]))
    assert peer("logs", "last").stdout == "a\nb\n"
    assert peer("logs", "last", "--task", "2:17").stdout == "task 2:17\n"
    line = json.loads(peer("logs", "last", "--json").stdout)
    assert line == {"schema": 1, "stream": "stdout", "offset": 0, "text": "a\nb\n"}


def test_result_brings_all_files(peer: Grid) -> None:
    files = {"output/a/b.txt": "first file", "plot.png": "png"}
    peer("submit", peer.script(["stdout", "out\n"], ["files", files], FINISHED))
    shutil.rmtree(peer.folder / "output")
    done = peer("result", "last")
    assert done.stdout == "out\n"
    assert "it left 2 files" in done.stderr
    done = peer("result", "last", "-o", "got")
    assert done.returncode == 0
    assert {name: (peer.folder / "got" / name).read_text() for name in files} == files
    found = json.loads(peer("result", "last", "--json").stdout)
    assert found["stdout"] == "out\n"
    assert {"name": "plot.png", "size": 3} in found["files"]


def test_doctor(peer: Grid) -> None:
    found = json.loads(peer("doctor", "--json").stdout)
    names = {check["name"]: check["ok"] for check in found["checks"]}
    assert {"python", "home", "disk", "clock", "sandbox", "peer", "reach"} <= set(names)
    assert names["peer"] is True


def test_doctor_without_a_peer(grid: Grid) -> None:
    text = grid("doctor").stdout
    assert "ok    python" in text
    assert "note  peer" in text
    assert "ports" in text


def test_home_of_another_machine(grid: Grid) -> None:
    grid.home.mkdir()
    (grid.home / "machine.json").write_text(json.dumps({"machine": "0" * 32, "host": "elsewhere"}))
    for words in (["status"], ["join"], ["submit", grid.script(FINISHED)]):
        done = grid(*words)
        assert done.returncode == (125 if words[0] == "submit" else 1)
        assert "belongs to another machine (elsewhere)" in error_line(done)
