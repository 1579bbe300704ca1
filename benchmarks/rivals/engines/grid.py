"""Ours, durable: `grid submit` to a running peer, the job's ledger replicated on other peers of this machine.

Layouts, each a fresh grid with homes of its own. *durable*: one peer with the workers, two that run no tasks and keep the ledger.
*three*: three peers that share the tasks, a worker each. *alone*: one peer (its memory is not shared with others). *apart*: a
submitter without workers and a peer with them, so that all data crosses the transport. *many*: N peers of M workers.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.rivals import processes, work
from benchmarks.rivals.engines.base import ALL, IDLE_S, timed_line
from benchmarks.rivals.engines.scripted import Scripted, wait_until
from tests.e2e.grids import PROGRAM, Grid, Peer

JOINED_S = 120.0
TIMED_OUTSIDE = ("cold", "memory", "many_workers")
"""Measures that hold, too, if the job's leader changed meanwhile."""


class Durable(Scripted):
    """The settings that the promise needs, and that carry the bars."""

    name = "grid"
    rows: ClassVar[frozenset[str]] = ALL | {"blob", "many_workers", "tasks"}
    layout: ClassVar[str] = "durable"

    def start(self) -> None:
        super().start()
        self.grid: Grid | None = None
        self.now: tuple[Any, ...] = ()
        self.submitter: Peer

    def stop(self) -> None:
        self.take_down()
        super().stop()

    def take_down(self) -> None:
        """End all peers."""
        if self.grid is not None:
            self.grid.__exit__(None, None, None)
            self.grid = None

    def lay_out(self, layout: str, *size: int) -> None:
        """Have such a grid, a fresh one if there is another."""
        if self.now == (layout, *size) and self.grid is not None:
            return
        self.take_down()
        root = Path(self.folder.name) / f"grid{time.monotonic_ns()}"
        root.mkdir()
        grid = self.grid = Grid(root)
        self.now = (layout, *size)
        if layout == "many":
            nodes, slots = size
            self.submitter = grid.found(slots=slots)
            for _ in range(nodes - 1):
                grid.join(self.submitter, slots=slots)
        elif layout == "apart":
            self.submitter = grid.home().start("--no-work")
            grid.join(self.submitter, slots=self.workers)
        elif layout == "three":
            self.submitter = grid.found(slots=1)
            grid.join(self.submitter)
            grid.join(self.submitter)
        else:
            self.submitter = grid.found(slots=self.workers)
            for _ in range(2 if layout == "durable" else 0):
                grid.join(self.submitter, "--no-work")
        wait_until(lambda: len(self.submitter.status()["peers"]) == len(grid.peers), JOINED_S, "all peers know each other")

    def command(self, options: list[str]) -> tuple[list[str], dict[str, str]]:
        return [*PROGRAM, "submit", *options], self.submitter.environment()

    def kill_worker(self, pid: int) -> None:
        assert self.submitter.process is not None
        outer = processes.outer_pid(self.submitter.process.pid, pid)
        if outer is not None:
            os.kill(outer, signal.SIGKILL)

    def values(self, row: str, measure: str, params: dict[str, Any]) -> work.Values:
        self.ensure()
        if getattr(self, f"grid_{measure}", None) is None:
            self.lay_out(self.layout)
        found = super().values(row, measure, params)
        shown = self.submitter.show("last")
        if shown["epoch"] > 1 and measure not in TIMED_OUTSIDE:
            raise RuntimeError(f"another peer took the job over (epoch {shown['epoch']}): what its script timed is a replay")
        return {"replicas": len(shown["replicas"]), "epoch": shown["epoch"], **found}

    # ---- rows of their own kind ----

    def grid_cold(self) -> work.Values:
        """From `grid submit` to the first result on its stdout; the peer runs already."""
        self.lay_out(self.layout)
        command, env = self.cold()
        return {"s": timed_line(command, "first", env, self.folder.name)}

    def grid_memory(self) -> work.Values:
        """A peer without a job; then each idle worker of a job that waits; then all of it."""
        self.lay_out("alone")
        assert self.submitter.process is not None
        root = self.submitter.process.pid
        time.sleep(IDLE_S)
        found: work.Values = {"peer_mb": processes.pss_mb(root), "peer_and_spares_mb": processes.pss_mb(*processes.tree(root))}

        def look(event: dict[str, Any]) -> None:
            time.sleep(IDLE_S)
            pids = [processes.outer_pid(root, pid) or pid for pid in event["pids"]]
            sizes = [processes.pss_mb(pid) for pid in pids]
            found.update(
                worker_mb=max(sizes), workers=len(sizes), engine_mb=processes.pss_mb(*processes.tree(root)),
                peer_with_job_mb=processes.pss_mb(root), processes=len(processes.tree(root)),
            )  # fmt: skip
            cancelled = self.submitter("cancel", "last")
            if cancelled.status:
                raise RuntimeError(f"cancel: {cancelled.err}")

        try:
            self.script("idle", {}, look)
        except RuntimeError:
            if "worker_mb" not in found:
                raise
        return found

    def grid_tasks(self, **params: Any) -> work.Values:
        """The leader's memory with it: its peak while so many tasks ran."""
        self.lay_out(self.layout)
        assert self.submitter.process is not None
        leader = self.submitter.process.pid
        peaks: dict[str, float] = {}

        def note(event: dict[str, Any]) -> None:
            what, _, n = event["name"].partition(" ")
            if what == "begin":
                processes.forget_peak(leader)
            else:
                peaks[n] = processes.peak_mb(leader)

        found = self.script("tasks", params, note)
        first, last = peaks[str(params["counts"][0])], peaks[str(params["counts"][-1])]
        return {**found, "leader_peak_mb": peaks, "leader_growth": last / first, "leader_grows_mb": last - first}

    def grid_many_workers(self, *, nodes: int, slots: int, **params: Any) -> work.Values:
        """One submit to so many peers; they idle, and no worker of this job is there yet."""
        self.lay_out("many", nodes, slots)
        workers, self.workers = self.workers, nodes * slots
        try:
            return self.script("many_workers", {**params, "began_s": time.monotonic()})
        finally:
            self.workers = workers

    def grid_blob(self, *, megabytes: int, count: int) -> work.Values:
        """Between two peers: the transport alone (as `python -m benchmarks.transport`), beside plain TCP; then a job's blob."""
        from benchmarks.rivals import blob

        found = blob.measure(megabytes)
        self.lay_out("apart")
        whole = self.script("sent", {"megabytes": min(megabytes, 256), "count": count})
        return {**found, "job_mb_s": whole["mb_s"], "job_first_mb_s": whole["first_mb_s"]}


class Three(Durable):
    """Three peers that all work: three workers on this machine's cores."""

    name = "grid-3"
    layout = "three"
    rows: ClassVar[frozenset[str]] = frozenset({"submits", "map_integers", "results", "words", "tasks"})


class Files(Durable):
    """The word count over the job's own inputs (`--file`): hashed, kept, read from blobs; no path of this machine is used."""

    name = "grid-files"
    rows: ClassVar[frozenset[str]] = frozenset({"words"})

    def options(self, measure: str, params: dict[str, Any]) -> list[str]:
        return [*super().options(measure, params), "--file", params["corpus"]]

    def values(self, row: str, measure: str, params: dict[str, Any]) -> work.Values:
        """From the command on: taking in the files is part of it."""
        self.ensure()
        self.lay_out(self.layout)
        began = time.perf_counter()
        found = super().values(row, measure, {**params, "files": True})
        return {**found, "s": time.perf_counter() - began, "count_alone_s": found["s"]}
