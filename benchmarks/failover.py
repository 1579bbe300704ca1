"""What the death of leaders costs: pauses and repeated work, with real peers killed by SIGKILL.

    python -m benchmarks.failover                   # 30 deaths of leaders, a power failure, a leader asleep for 60 s
    python -m benchmarks.failover --only deaths --kills 6 --tasks 500

Jobs of 2,000 tasks of 50 ms are submitted detached to five peers on this machine. *Deaths*: at a random moment the submitter's
peer is killed, then the next leader, then the one after it; the dead are started again for the next job. *Power*: all peers are
killed at half time, all but the submitter's come back. *Sleep*: the leader is stopped, all its processes with it, and woken while
the job runs.

Printed for each death: the *takeover* (until a living peer is named as leader by all), when the new leader *counts* a task that
ended after the death (the script has been run again up to here), the *pause* (the longest time from the death to the next one in
which no task began anywhere: peers go on with what they hold while nobody leads), the tasks that had *finished* (an execution
had ended, whether or not anybody had heard of it), and those of them that ran *again*. Every job's result is checked. The last
line is all of it as JSON.

The harness is the tests' own (tests/e2e/survival.py).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.e2e.grids import Grid, Peer, until
from tests.e2e.survival import TAKEOVER_S, Watched, ask, can_come_back, grow, printed, revive, steady, submit

IN_A_ROW = 3
AWAKE_S = 10.0
"""The job that slept goes on for about as long after it woke."""
SCENARIOS = ("deaths", "power", "sleep")


@dataclass
class Row:
    """One loss of a leader."""

    scenario: str
    job: str
    epoch: int
    takeover_s: float
    counted_s: float
    pause_s: float = 0.0
    finished: int = 0
    again: int = 0

    @property
    def line(self) -> str:
        """For people."""
        times = f"takeover {self.takeover_s:6.2f} s  counts {self.counted_s:6.2f} s  pause {self.pause_s:6.2f} s"
        return f"{self.scenario:8}{self.job[:8]}  epoch {self.epoch:3}  {times}  finished {self.finished:5}  again {self.again:4}"


class Program:
    """The measurement."""

    def __init__(self, options: argparse.Namespace, grid: Grid) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        self.rows: list[Row] = []
        self.peers = grow(grid, options.peers)
        can_come_back(self.peers)
        self.tasks: int = options.tasks

    def job(self, submitter: Peer, tasks: int) -> Watched:
        """One more job."""
        revive(self.peers)
        return submit(submitter, self.peers, steady(tasks, self.options.task_ms / 1000))

    def ends(self, job: Watched, tasks: int, rows: list[Row]) -> None:
        """Check its result; fill in what only its diary knows."""
        job.ends(printed(tasks), tasks)
        last_s = max(note.at_s for note in job.diary.notes())
        for row, at_s, to_s in zip(rows, job.deaths_s, [*job.deaths_s[1:], last_s], strict=True):
            row.pause_s = job.diary.pause_s(at_s, to_s)
            row.finished = len(job.diary.finished(at_s))
            row.again = len(job.diary.again(at_s))
            print(row.line, flush=True)
        self.rows += rows

    def taken_over(self, scenario: str, job: Watched, at_s: float) -> Row:
        """Wait until somebody leads, and counts."""
        leader = job.leader()
        took_s = time.monotonic() - at_s
        finished = len(job.diary.finished(at_s))

        def counts() -> dict[str, Any] | None:
            shown: dict[str, Any] = ask(leader, "show", job=job.id) or {"stages": []}
            return shown if sum(stage["done"] for stage in shown["stages"]) > finished or job.over else None

        shown = until(counts, TAKEOVER_S, "the new leader counts")
        return Row(scenario, job.id, shown["epoch"], took_s, time.monotonic() - at_s)

    def deaths(self, kills: int) -> None:
        """The submitter's peer, then whoever leads, some times in a row."""
        victim = self.rng.choice(self.peers)
        job, rows = self.job(victim, self.tasks), list[Row]()
        for _ in range(kills):
            job.begun(job.diary.begun() + self.rng.randint(20, self.tasks // (IN_A_ROW + 1)))
            if self.options.unplug:
                rows.append(self.taken_over("deaths", job, job.unplug(victim)))
                job.bury(victim)
            else:
                rows.append(self.taken_over("deaths", job, job.kill(victim)))
            victim = job.leader()
        self.ends(job, self.tasks, rows)

    def power(self) -> None:
        """All at once, at half time."""
        submitter = self.rng.choice(self.peers)
        job = self.job(submitter, self.tasks)
        job.begun(self.tasks // 2)
        at_s = job.kill(*self.peers)
        for peer in self.rng.sample(self.peers, len(self.peers)):
            if peer is not submitter:
                peer.start()
        self.ends(job, self.tasks, [self.taken_over("power", job, at_s)])

    def sleep(self, asleep_s: float) -> None:
        """The leader stands still, and wakes."""
        submitter = self.rng.choice(self.peers)
        tasks = self.tasks // 2 + int((asleep_s + AWAKE_S) * len(self.peers) * 1000 / self.options.task_ms)
        job = self.job(submitter, tasks)
        job.begun(self.rng.randint(20, self.tasks // 2))
        with job.frozen(submitter) as at_s:
            row = self.taken_over("sleep", job, at_s)
            time.sleep(max(0.0, at_s + asleep_s - time.monotonic()))
        self.ends(job, tasks, [row])


def summary(rows: list[Row]) -> dict[str, object]:
    """The figures that are promised."""
    deaths = [row for row in rows if row.scenario == "deaths"]
    if not deaths:
        return {}
    pauses = [row.pause_s for row in deaths]
    last = {row.job: row.finished for row in deaths}  # of a job's deaths the last one: each finished task counts once
    finished, again = sum(last.values()), sum(row.again for row in deaths)
    return {
        "deaths": len(deaths),
        "pause_median_s": round(statistics.median(pauses), 3),
        "pause_worst_s": round(max(pauses), 3),
        "counted_median_s": round(statistics.median(row.counted_s for row in deaths), 3),
        "counted_worst_s": round(max(row.counted_s for row in deaths), 3),
        "takeover_median_s": round(statistics.median(row.takeover_s for row in deaths), 3),
        "takeover_worst_s": round(max(row.takeover_s for row in deaths), 3),
        "again_percent": round(100 * again / max(finished, 1), 3),
        "again_percent_worst": round(max(100 * row.again / max(row.finished, 1) for row in deaths), 3),  # of one death
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="deaths of leaders in all")
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=2000, help="of a job")
    parser.add_argument("--task-ms", type=float, default=50)
    parser.add_argument("--asleep-s", type=float, default=60)
    parser.add_argument("--unplug", action="store_true", help="deaths by which no connection ends: SIGSTOP, SIGKILL only later")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="a scenario; repeatable")
    options = parser.parse_args()
    wanted = options.only or SCENARIOS
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, Grid(Path(folder)) as grid:
        program = Program(options, grid)
        if "deaths" in wanted:
            for first in range(0, options.kills, IN_A_ROW):
                program.deaths(min(IN_A_ROW, options.kills - first))
        if "power" in wanted:
            program.power()
        if "sleep" in wanted:
            program.sleep(options.asleep_s)
        found = summary(program.rows)
        for name, value in found.items():
            print(f"{name:24} {value}")
        print(json.dumps({"schema": 1, "seed": options.seed, **found, "rows": [asdict(row) for row in program.rows]}))


if __name__ == "__main__":
    main()
