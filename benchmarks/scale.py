"""How our cost grows with tasks, bytes, peers and workers: `grid submit` to running peers of this machine.

    python -m benchmarks scale [--only tasks|submits|bytes|peers|workers …] [--small] [--json FILE] [--plot FILE.svg]

tasks: trivial ones through map, 1e3 to 1e7, the leader's peak memory beside; submits: the same one by one, to 1e6; bytes: the
same total in arguments and results of 4 B to 64 MiB, there and back; peers: 1 to 16 of one worker; workers: 1 to 32 of one peer,
both with tasks that sleep, so that this machine's cores aren't the limit. Settings are those of the rivals' `grid`: two peers
more keep the ledger (not where peers are counted).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rivals.report import aligned, machine, number, versions
from benchmarks.rivals.session import Failed, Session

NODES = (1, 2, 4, 8, 16)
SLOTS = (1, 2, 4, 8, 16, 32)
TASK_S = 0.02
WITHIN_S = 900.0
KINDS = ("tasks", "submits", "bytes", "peers", "workers")


@dataclass
class Curve:
    """`points`: x, and what was measured there."""

    kind: str
    across: str
    columns: dict[str, str]
    points: list[tuple[int, dict[str, float]]]


class Scale:
    """The program."""

    def __init__(self, small: bool, workers: int) -> None:
        self.small = small
        self.workers = workers

    def ask(self, measure: str, params: dict[str, Any]) -> dict[str, Any]:
        """In a process of its own: what came before must not be seen in what comes after."""
        with Session("grid", self.workers) as session:
            reply = session.ask(measure, measure, params, WITHIN_S)
            if "values" not in reply:
                raise Failed(str(reply))
        values: dict[str, Any] = reply["values"]
        return values

    def tasks(self) -> Curve:
        """Through map."""
        counts = [10**power for power in range(3, 5 if self.small else 8)]
        values = self.ask("tasks", {"counts": counts})
        points = [(n, {"per_s": values["rates"][str(n)], "leader_mb": values["leader_peak_mb"][str(n)]}) for n in counts]
        return Curve("tasks", "tasks", {"per_s": "tasks/s", "leader_mb": "leader's peak MB"}, points)

    def submits(self) -> Curve:
        """One by one."""
        counts = [10**power for power in range(3, 4 if self.small else 7)]
        values = self.ask("submit_counts", {"counts": counts})
        return Curve("submits", "tasks", {"per_s": "tasks/s"}, [(n, {"per_s": values["rates"][str(n)]}) for n in counts])

    def bytes(self) -> Curve:
        """There and back."""
        sizes = [4, 1 << 10, 64 << 10] if self.small else [4, 64, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20]
        total = (1 if self.small else 256) << 20
        values = self.ask("payloads", {"sizes": sizes, "total_bytes": total, "count_max": 1000 if self.small else 100_000})
        points = [(size, values["sizes"][str(size)]) for size in sizes]
        return Curve("bytes", "bytes", {"s_per_task": "s/task", "mb_s": "MB/s each way"}, points)

    def peers(self) -> Curve:
        """Of one worker each."""
        return self.sleeping("peers", [(nodes, nodes, 1) for nodes in (NODES[:2] if self.small else NODES)])

    def workers_of_one(self) -> Curve:
        """Of one peer."""
        return self.sleeping("workers", [(slots, 1, slots) for slots in (SLOTS[:2] if self.small else SLOTS)])

    def sleeping(self, kind: str, layouts: Sequence[tuple[int, int, int]]) -> Curve:
        """Efficiency of sleeps, and how soon all are busy."""
        points: list[tuple[int, dict[str, float]]] = []
        for x, nodes, slots in layouts:
            params = {"nodes": nodes, "slots": slots, "seconds": 1.0 if self.small else 10.0, "task_s": TASK_S}
            values = self.ask("many_workers", params)
            points.append((x, {key: values[key] for key in ("efficiency", "busy_s") if key in values}))
        return Curve(kind, kind, {"efficiency": "efficiency", "busy_s": "all busy after s"}, points)


def table(curve: Curve) -> str:
    """For people."""
    lines = [(curve.across, *curve.columns.values())]
    for x, values in curve.points:
        cells = ("-" if key not in values else shown(values[key]) for key in curve.columns)
        lines.append((f"{x:,}", *cells))
    return f"{curve.kind}\n{aligned(lines)}"


def shown(value: float) -> str:
    """Enough digits."""
    return number(value, 0 if value >= 1000 else 3 if value >= 0.01 else 6)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """A panel a curve: its first column."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), squeeze=False)
    for axis, curve in zip(axes[0], curves, strict=True):
        key = "mb_s" if curve.kind == "bytes" else next(iter(curve.columns))
        xs, ys = zip(*((x, values[key]) for x, values in curve.points if key in values), strict=True)
        axis.plot(xs, ys, marker="o")
        axis.set_xscale("log", base=10 if curve.kind in ("tasks", "submits", "bytes") else 2)
        axis.set_ylim(0, 1.1 * max(ys))
        axis.set_xlabel(curve.across)
        axis.set_title(f"{curve.kind}: {curve.columns[key]}")
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks scale", description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--workers", type=int, default=2, help="of the peer that has them (default 2)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    scale = Scale(options.small, options.workers)
    programs = {"tasks": scale.tasks, "submits": scale.submits, "bytes": scale.bytes, "peers": scale.peers}
    programs["workers"] = scale.workers_of_one
    where = machine()
    print(f"{where['date']}, {where['cores']} cores, {where['cpu']}, Python {where['python']}")
    curves, failed = [], False
    for kind in options.only:
        try:
            curves.append(programs[kind]())
        except Failed as error:
            print(f"{kind} fails: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"\n{table(curves[-1])}", flush=True)
    if options.json is not None:
        told = [{"kind": each.kind, "points": [{"x": x, **values} for x, values in each.points]} for each in curves]
        whole = {"schema": 1, "machine": where, "versions": versions(["grid"]), "curves": told}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    if options.plot is not None and curves:
        plot(curves, options.plot)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
