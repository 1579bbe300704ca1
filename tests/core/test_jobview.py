"""What followers of a job see: each byte once, whatever they ask and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.core import limits
from grid.core.job import FINISHED, PENDING, RUNNING, Outcome
from grid.jobview import CHUNK_BYTES_MAX, PRINT_ENTRY_BYTES, PROGRESS_S, JobLog, JobView, Prints

P = PeerId(b"p" * 20)


@pytest.fixture
def view(tmp_path: Path) -> JobView:
    made = JobView(tmp_path)
    made.state = RUNNING
    return made


class Follower:
    """Asks again and again from where it is."""

    def __init__(self, view: JobView) -> None:
        self.view = view
        self.at: dict[str, Any] = {"stdout": 0, "stderr": 0, "print": 0, "seen": -1}
        self.out = b""
        self.err = b""
        self.prints: list[bytes] = []
        self.final = False

    async def ask(self, wait_s: float = 0.0) -> dict[str, Any]:
        answer, body = await self.view.poll({**self.at, "wait_s": wait_s})
        (out_at, out_size), (err_at, err_size) = answer["stdout"], answer["stderr"]
        assert (out_at, err_at) == (self.at["stdout"], self.at["stderr"])
        self.out += body[:out_size]
        self.err += body[out_size : out_size + err_size]
        place = out_size + err_size
        for *_, size in answer["prints"]:
            self.prints.append(body[place : place + size])
            place += size
        assert place == len(body)
        self.at = {
            "stdout": out_at + out_size,
            "stderr": err_at + err_size,
            "print": answer["print_next"],
            "seen": answer["version"],
        }
        self.final = answer["final"]
        return answer


async def test_follower_gets_every_byte_once(view: JobView) -> None:
    follower = Follower(view)
    expected = {1: b"", 2: b""}
    for number in range(50):
        fd = 1 + number % 2
        data = bytes([number]) * 20_000
        view.write(fd, data)
        expected[fd] += data
        if number % 5 == 0:
            view.prints.add(P, 0, number, 1, b"print %d" % number)
        if number % 7 == 0:
            answer = await follower.ask()
            assert sum(size for _, size in (answer["stdout"], answer["stderr"])) <= CHUNK_BYTES_MAX
    view.finish(Outcome(FINISHED, 0))
    while not follower.final:
        await follower.ask(1.0)
    assert (follower.out, follower.err) == (expected[1], expected[2])
    assert follower.prints == [b"print %d" % number for number in range(0, 50, 5)]


async def test_answer_is_final_only_with_the_last_byte(view: JobView) -> None:
    follower = Follower(view)
    view.write(1, b"x" * (CHUNK_BYTES_MAX + 1))
    view.finish(Outcome(FINISHED, 3))
    answer = await follower.ask()
    assert answer["state"] == FINISHED
    assert answer["exit_code"] == 3
    assert not answer["final"]
    assert (await follower.ask())["final"]


async def test_prints_too_must_be_had_before_an_answer_is_final(view: JobView) -> None:
    follower = Follower(view)
    for number in range(3):
        view.prints.add(P, 0, number, 1, b"x" * (CHUNK_BYTES_MAX // 2))
    view.finish(Outcome(FINISHED, 0))
    assert not (await follower.ask())["final"]
    assert (await follower.ask())["final"]
    assert len(follower.prints) == 3


async def test_what_is_not_wanted_is_not_waited_for(view: JobView) -> None:
    view.write(1, b"x")
    view.finish(Outcome(FINISHED, 0))
    answer, body = await view.poll({})
    assert answer["final"]
    assert body == b""


async def test_output_ends_a_long_poll_at_once(view: JobView, autojump_clock: trio.testing.MockClock) -> None:
    follower = Follower(view)
    await follower.ask()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.ask, 10.0)
        await trio.sleep(3.0)
        view.write(2, b"oh")
    assert trio.current_time() < 3.0 + 2 * PROGRESS_S
    assert follower.err == b"oh"


async def test_end_of_the_job_ends_a_long_poll(view: JobView, autojump_clock: trio.testing.MockClock) -> None:
    follower = Follower(view)
    await follower.ask()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.ask, 10.0)
        await trio.sleep(3.0)
        view.finish(Outcome(FINISHED, 0))
    assert trio.current_time() < 3.0 + 2 * PROGRESS_S
    assert follower.final


async def test_progress_alone_ends_a_poll_after_a_moment(view: JobView, autojump_clock: trio.testing.MockClock) -> None:
    follower = Follower(view)
    await follower.ask()
    began_s = trio.current_time()
    view.changed()
    await follower.ask(10.0)
    assert PROGRESS_S <= trio.current_time() - began_s <= 3 * PROGRESS_S
    began_s = trio.current_time()
    await follower.ask(10.0)
    assert trio.current_time() - began_s == pytest.approx(10.0)


async def test_long_poll_is_bounded(view: JobView, autojump_clock: trio.testing.MockClock) -> None:
    follower = Follower(view)
    await follower.ask()
    began_s = trio.current_time()
    await follower.ask(1e9)
    assert trio.current_time() - began_s == pytest.approx(limits.POLL_S_MAX)
    await follower.ask(-5.0)


async def test_position_beyond_the_end(view: JobView) -> None:
    view.write(1, b"abc")
    answer, body = await view.poll({"stdout": 99, "print": 99})
    assert answer["stdout"] == [99, 0]
    assert body == b""


def test_job_that_begins_anew_has_no_old_output(tmp_path: Path) -> None:
    JobView(tmp_path).write(1, b"old")
    assert JobView(tmp_path).stdout.length == 3
    fresh = JobView(tmp_path, clear=True)
    assert fresh.stdout.length == 0
    assert fresh.state == PENDING


def test_outcome_is_written_once(tmp_path: Path) -> None:
    view = JobView(tmp_path)
    view.finish(Outcome(FINISHED, 0))
    with pytest.raises(AssertionError):
        view.finish(Outcome(FINISHED, 1))


def test_log_over_its_bound_is_an_error_not_a_silent_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOG_BYTES_MAX", 10)
    log = JobLog(tmp_path / "stdout")
    log.append(b"x" * 8)
    with pytest.raises(OSError, match="more than"):
        log.append(b"y" * 8)
    assert log.read(0, 100) == b"x" * 8
    assert log.read(6, 1) == b"x"
    assert log.read(-1, 5) == log.read(8, 5) == b""


def test_ring_of_prints_is_bounded_and_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRINT_BYTES_MAX", 10 * (PRINT_ENTRY_BYTES + 10))
    prints = Prints()
    for number in range(25):
        prints.add(P, 0, number, 1, b"%010d" % number)
    lines, after = prints.after(0, 1 << 20)
    assert [index for _, _, index, _, _ in lines] == list(range(15, 25))
    assert after == prints.next == 25
    lines, after = prints.after(20, 25)
    assert [index for _, _, index, _, _ in lines] == [20, 21]
    assert after == 22
    assert prints.after(25, 100) == ([], 25)
    assert prints.of_task(0, 24) == b"0000000024"
    assert prints.of_task(0, 3) == b""


def test_many_tiny_prints_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRINT_BYTES_MAX", 10_000)
    prints = Prints()
    for number in range(5_000):
        prints.add(P, 0, number, 1, b".")
    assert len(prints.after(0, 1 << 20)[0]) < 10_000 // PRINT_ENTRY_BYTES


def test_print_larger_than_the_ring_or_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRINT_BYTES_MAX", 100)
    prints = Prints()
    prints.add(P, 0, 0, 1, b"x" * 1000)
    assert prints.after(0, 10) == ([(P, 0, 0, 1, b"x" * 1000)], 1)
