"""Ordinary scripts go on where they were when their leader died: nothing that had ended runs again, nothing shown changes.

All scripts run at once, submitted from one peer that does no task and dies when each is at half time: it has printed "half", and
waits for a gate that only opens after the death. So what must not run again is exactly known: all that had ended.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from grid.api.client import ControlError
from tests.e2e.grids import Done, Grid, Peer, until
from tests.e2e.ordinary import DIVERGENT, HALF, ORDINARY
from tests.e2e.survival import END_S, Watched, ask, see_each_other, start, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

TOLD = "grid: "
"""How a line of the grid's own begins among the driver's stderr."""
ALL = ORDINARY | DIVERGENT


@dataclass
class Ended:
    """What became of a script whose leader died at half time."""

    job: Watched
    released: str = ""
    done: Done = field(default_factory=lambda: Done(-1, "", "it never ended"))
    stderr: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @property
    def told(self) -> list[str]:
        """What the grid said of its replay."""
        return [line for line in self.stderr.splitlines() if line.startswith(TOLD)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """Each script, from its submission to its end."""
    root = tmp_path_factory.mktemp("halves")
    gate = root / "gate"
    with Grid(root) as grid, ThreadPoolExecutor(4) as pool:
        submitter = grid.home().start("--no-work")
        others = [grid.home() for _ in range(3)]
        start(others, str(submitter("invite", "--json", "--uses", "3").json["invite"]), slots=2)
        peers = [submitter, *others]
        see_each_other(peers)

        def send(name: str) -> Ended:
            script = ALL[name]
            options, file = ("--env", f"GATE={gate}"), f"script{list(ALL).index(name)}.py"
            return Ended(submit(submitter, peers, HALF + script.text, *options, file=file, arguments=script.arguments))

        jobs = dict(zip(ALL, pool.map(send, ALL), strict=True))
        with contextlib.suppress(AssertionError):  # those that are not there fail their own tests
            until(lambda: all(at_half(each, others[0]) for each in jobs.values()), END_S, "all scripts are at half time")
        at_s = jobs[next(iter(ALL))].job.kill(submitter)
        gate.touch()

        def fetch(name: str) -> None:
            each = jobs[name]
            each.job.deaths_s[:] = [at_s]
            with contextlib.suppress(subprocess.TimeoutExpired):
                folder = others[0].folder / each.job.id
                each.done = others[0]("result", each.job.id, "-o", str(folder), within_s=END_S)
                each.files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
            with contextlib.suppress(ControlError):
                each.stderr = each.job.output(others[0])[1]

        for _ in pool.map(fetch, ALL):
            pass
        yield jobs
        assert not any("Traceback" in peer.log.read_text() for peer in peers), "\n".join(p.log.read_text() for p in peers)


def at_half(each: Ended, witness: Peer) -> bool:
    """It has shown that it waits, and all tasks that it declared are settled."""
    each.released = each.job.stdout(witness)
    stages = (ask(witness, "show", job=each.job.id) or {"stages": []})["stages"]
    return each.released.endswith("half\n") and all(stage["done"] + stage["failed"] == stage["total"] for stage in stages)


@pytest.mark.parametrize("name", ALL)
def test_replay_runs_nothing_twice_that_had_ended(ended: dict[str, Ended], name: str) -> None:
    script, each = ALL[name], ended[name]
    assert each.released.endswith("half\n")
    assert (each.done.status, each.done.out) == (0, each.released + script.out), (each.done, each.stderr)
    wasted = each.job.wasted()
    why = [note for note in each.job.diary.notes() if note.task in wasted]
    assert wasted == script.again, (each.job.deaths_s, why, each.job.logs())
    assert script.stderr in each.stderr
    assert each.files.items() >= script.files.items()
    shown = each.job.shown()
    assert shown["epoch"] > 1
    assert shown["leader"] != each.job.peers[0].id


@pytest.mark.parametrize("name", ORDINARY)
def test_replay_of_an_ordinary_script_is_not_told(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].done.status == 0
    assert ended[name].told == []


@pytest.mark.parametrize("name", DIVERGENT)
def test_replay_that_differs_is_told_once(ended: dict[str, Ended], name: str) -> None:
    assert len(ended[name].told) == 1, ended[name].stderr
