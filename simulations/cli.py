"""The commands. A failure is listed with the command that replays it; the exit status says whether there was one."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulations import scale, scenario, world

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Worlds of real peers in virtual time.")

FAILURES_SHOWN_MAX = 50
LINES_SHOWN_MAX = 3
"""Of a failure's first violation."""
BATCH = 4
"""Worlds a worker runs for one order."""
BATCHES_MAX = 100
"""For one worker, which grows: then come new ones. `max_tasks_per_child` can leave a pool without any (python/cpython#115634)."""


def replay(name: str, seed: int) -> str:
    """The command that runs this world again."""
    return f"python -m simulations run {name} --seed {seed}"


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="SCENARIO")],
    seed: Annotated[int, typer.Option()] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event.")] = False,
) -> None:
    """Run one world and say what was wrong with it. `scale` runs two, and prints how load grows between them."""
    if name == "scale":
        found = scale.compare(seed)
        for figures in found:
            for text in figures.report.violations:
                print(text, file=sys.stderr)
        print(scale.table(found))
        raise typer.Exit(0 if all(figures.report.ok for figures in found) else 1)
    report = world.run(scenario.load(name), seed, print if trace else None)
    for text in report.violations:
        print(text, file=sys.stderr)
    counters = " ".join(f"{key.replace(' ', '-')}={value:g}" for key, value in sorted(report.counters.items()))
    print(f"{name} seed {seed}: {'ok' if report.ok else 'FAILED'}, {report.virtual_s:.1f} virtual s in {report.real_s:.2f} s")
    print(f"trace {report.trace_hash} ({report.trace_lines} events) {counters}")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def swarm(
    name: Annotated[str, typer.Argument(metavar="SCENARIO", help="Or: all.")],
    seeds: Annotated[str, typer.Option(metavar="A..B", help="Both included.")] = "1..100",
    processes: Annotated[int, typer.Option(help="0: as many as there are cores.")] = 0,
) -> None:
    """Run many worlds, list those that failed."""
    first, _, last = seeds.partition("..")
    names = scenario.names(swarm=True) if name == "all" else [name]
    orders = [(each, seed) for seed in range(int(first), int(last or first) + 1) for each in names]
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    failed: list[world.Report] = []
    totals: dict[str, list[float]] = {each: [0, 0, 0.0, 0.0] for each in names}
    with bar:
        task = bar.add_task(name, total=len(orders))
        for report in reports(orders, processes or os.cpu_count() or 1):
            bar.advance(task)
            total = totals[report.scenario]
            total[0] += 1
            total[1] += not report.ok
            total[2] += report.virtual_s
            total[3] += report.real_s
            if not report.ok:
                failed.append(report)
                if len(failed) <= FAILURES_SHOWN_MAX:
                    bar.console.print(_failure(report), markup=False, highlight=False)
    for each, (runs, bad, virtual_s, real_s) in totals.items():
        print(f"{each:12} {runs:6.0f} runs {bad:5.0f} failed {virtual_s / 3600:9.2f} virtual h {real_s:9.1f} s")
    for report in sorted(failed, key=lambda report: (report.scenario, report.seed)):
        print(replay(report.scenario, report.seed))
    raise typer.Exit(1 if failed else 0)


def _failure(report: world.Report) -> str:
    lines = report.violations[0].splitlines()
    shown = [lines[0], *lines[1:][-LINES_SHOWN_MAX:]]
    return "\n  ".join([f"{report.scenario} seed {report.seed}: {len(report.violations)} violations", *shown])


def reports(orders: list[tuple[str, int]], processes: int) -> Iterator[world.Report]:
    """Run them all, on so many processes; reports come as they are done."""
    if processes == 1 or len(orders) == 1:
        yield from (run_order(order) for order in orders)
        return
    context = multiprocessing.get_context("forkserver")
    batches = [orders[at : at + BATCH] for at in range(0, len(orders), BATCH)]
    for at in range(0, len(batches), BATCHES_MAX * processes):
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for done in as_completed([pool.submit(run_orders, batch) for batch in batches[at : at + BATCHES_MAX * processes]]):
                yield from done.result()


def run_orders(orders: list[tuple[str, int]]) -> list[world.Report]:
    """In a worker."""
    return [run_order(order) for order in orders]


def run_order(order: tuple[str, int]) -> world.Report:
    """One world."""
    name, seed = order
    return world.run(scenario.load(name), seed)


@app.command()
def scenarios() -> None:
    """List the scenarios."""
    for name in scenario.names():
        print(f"{name:12} {scenario.load(name).about}")
