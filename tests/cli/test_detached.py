"""What is said around a job that outlives the command: durable or not, and when this machine's peer goes away for good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cli import attach
from cli.attach import Follower
from cli.console import console
from cli.errors import DETACHED, GRID_FAILED, Failure
from cli.submit import Job, _detached
from grid.api.client import Client, ControlError

JOB = "ab" * 32
Event = tuple[str, dict[str, Any], bytes]


@pytest.fixture
def home() -> Any:
    remembered: list[str] = []
    return SimpleNamespace(remember_job=remembered.append, remembered=remembered)


@pytest.fixture
def job() -> Job:
    return Job(Path("job.py"), [], {}, None, True, None, False)


@pytest.fixture(autouse=True)
def for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "json", False)


def detached(job: Job, home: Any, events: Iterator[Event]) -> int:
    return _detached(job, home, cast(Any, events))


def test_id_alone_is_on_stdout_and_what_it_is_worth_on_stderr(capfd: pytest.CaptureFixture[str], job: Job, home: Any) -> None:
    warning = "no other peer holds the job: it is durable on this machine alone"
    events: list[Event] = [("submitted", {"job": JOB}, b""), ("note", {"text": warning}, b""), ("accepted", {"job": JOB}, b"")]
    assert detached(job, home, iter(events)) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (f"{JOB}\n", f"{warning}\n")
    assert home.remembered[-1] == JOB


def test_interrupt_before_the_job_is_durable_says_that_it_runs(capfd: pytest.CaptureFixture[str], job: Job, home: Any) -> None:
    def events() -> Iterator[Event]:
        yield "submitted", {"job": JOB}, b""
        raise KeyboardInterrupt

    assert detached(job, home, events()) == DETACHED
    out, err = capfd.readouterr()
    assert out == ""
    assert "runs, but it is not known to be durable" in err
    assert f"grid cancel {JOB[:8]}" in err


def test_interrupt_before_there_is_a_job_is_passed_on(job: Job, home: Any) -> None:
    def events() -> Iterator[Event]:
        raise KeyboardInterrupt
        yield "", {}, b""

    with pytest.raises(KeyboardInterrupt):
        detached(job, home, events())


def test_stream_that_ends_without_a_job_is_an_error(job: Job, home: Any) -> None:
    with pytest.raises(ControlError, match="without accepting"):
        detached(job, home, iter([]))


def follower(tmp_path: Path) -> Follower:
    made = Follower(tmp_path, cast(Any, SimpleNamespace(close=lambda: None)))
    made.job = JOB
    return made


def test_peer_that_does_not_come_back_leaves_the_way_to_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attach, "RECONNECT_S", -1.0)
    with pytest.raises(Failure) as caught:
        follower(tmp_path)._reconnect()
    assert caught.value.status == GRID_FAILED
    assert f"on another machine of the grid: grid logs {JOB[:8]} -f" in caught.value.hint


def test_peer_that_comes_back_is_asked_from_where_the_output_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    client = SimpleNamespace(stream=lambda method, **params: asked.append(params), close=lambda: None)
    monkeypatch.setattr(Client, "open", lambda home: client)
    made = follower(tmp_path)
    made._show("stdout", {"offset": 0}, b"", lambda job: None)
    made._from = {"stdout": 5, "stderr": 7}
    made._show("print", {"stage": 0, "index": 1, "next": 9, "by": "cc:2"}, b"line\n", lambda job: None)
    made._reconnect()
    assert asked == [{"job": JOB, "prints": True, "from_stdout": 5, "from_stderr": 7, "from_print": 9, "by": "cc:2"}]
