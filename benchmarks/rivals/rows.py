"""The rows of the table: what each measures, with which sizes, and the bars that we set ourselves.

A bar is computed from what was measured in the same round (side by side), then the median over the rounds is taken: ratios
travel between machines better than figures.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rivals.engines import RIVALS

Round = Mapping[str, Mapping[str, Any]]
"""Engine → what it measured in one round. Engines that failed aren't in it."""
SENSES: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Metric:
    """One column. `better`: "low" or "high" (or "": told, not compared)."""

    key: str
    label: str
    better: str
    digits: int = 2
    scale: float = 1.0


@dataclass(frozen=True)
class Bar:
    """What must be reached: `value` of a round, or None where something it needs wasn't measured."""

    label: str
    sense: str
    limit: float
    value: Callable[[Round], float | None]

    def reached(self, value: float) -> bool:
        """Is it?"""
        return SENSES[self.sense](value, self.limit)


@dataclass(frozen=True)
class Row:
    """One measurement. `params` are full size; `small` what a smoke test replaces."""

    key: str
    title: str
    measure: str
    params: Mapping[str, Any]
    small: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    bars: tuple[Bar, ...] = ()
    group: str = ""
    within_s: float = 300.0
    rounds_max: int = 100
    notes: tuple[str, ...] = field(default=())


def of(engine: str, metric: str) -> Callable[[Round], float | None]:
    """A figure itself."""

    def value(given: Round) -> float | None:
        found = given.get(engine, {}).get(metric)
        return None if found is None else float(found)

    return value


def ratio(engine: str, metric: str, rival: str, rival_metric: str = "") -> Callable[[Round], float | None]:
    """Ours over a rival's."""

    def value(given: Round) -> float | None:
        ours, theirs = of(engine, metric)(given), of(rival, rival_metric or metric)(given)
        return None if ours is None or not theirs else ours / theirs

    return value


def against_best(engine: str, metric: str, better: str) -> Callable[[Round], float | None]:
    """Ours over the best rival's."""

    def value(given: Round) -> float | None:
        ours = of(engine, metric)(given)
        theirs = [found for rival in RIVALS if (found := of(rival, metric)(given))]
        if ours is None or not theirs:
            return None
        return ours / (max(theirs) if better == "high" else min(theirs))

    return value


def against_serial(engine: str) -> Callable[[Round], float | None]:
    """Efficiency of two workers against the serial program."""

    def value(given: Round) -> float | None:
        ours, alone = of(engine, "s")(given), of("serial", "s")(given)
        workers = given.get(engine, {}).get("asked_workers", 2)
        return None if not ours or alone is None else alone / (workers * ours)

    return value


COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
FLAT = 1.2
"""The leader's memory counts as flat if a thousand times the tasks take at most this many times its peak."""
EFFICIENCY = (Metric("map", "map", "high", 3), Metric("submit", "submit", "high", 3))

ROWS = (
    Row(
        "round_trip", "round trip of one trivial task, warm", "round_trip",
        {"count": 1000, "budget_s": 3.0}, {"count": 50, "budget_s": 0.3},
        (Metric("p50_ms", "p50 ms", "low", 3), Metric("p99_ms", "p99 ms", "low", 3)),
        (
            Bar("p50: grid / pool", "<=", 1.2, ratio("grid", "p50_ms", "pool")),
            Bar("p50: grid / ray", "<=", 0.25, ratio("grid", "p50_ms", "ray")),
            Bar("grid: p99 / p50", "<=", 4.0, ratio("grid", "p99_ms", "grid", "p50_ms")),
        ), "calls",
    ),
    Row(
        "submits", "100,000 trivial tasks submitted one by one", "submits",
        {"count": 100_000, "budget_s": 10.0}, {"count": 1000, "budget_s": 0.5},
        (Metric("per_s", "tasks/s", "high", 0), Metric("count", "tasks", "", 0)),
        (
            Bar("grid / pool", ">=", 6.0, ratio("grid", "per_s", "pool")),
            Bar("grid / ray", ">=", 30.0, ratio("grid", "per_s", "ray")),
        ), "calls", notes=("slow engines get as many tasks as fit in 10 s",),
    ),
    Row(
        "map", "map over 1,000,000 small integers", "map_integers",
        {"count": 1_000_000}, {"count": 20_000},
        (Metric("per_s", "items/s", "high", 0), Metric("best", "best way", "")),
        (Bar("grid / best of all", ">=", 1.0, against_best("grid", "per_s", "high")),), "calls",
        notes=("rivals: the best of several chunk sizes chosen by hand; ours: no chunk size given",),
    ),
    Row(
        "eff_1ms", "efficiency, tasks of 1 ms", "efficiency",
        {"task_s": 0.001, "total_s": 4.0}, {"task_s": 0.001, "total_s": 0.2}, EFFICIENCY,
        (Bar("grid, map", ">=", 0.96, of("grid", "map")), Bar("grid, submit", ">=", 0.90, of("grid", "submit"))), "calls",
        notes=("bare: forked processes that each spin through their half, no engine at all",),
    ),
    Row(
        "eff_10ms", "efficiency, tasks of 10 ms", "efficiency",
        {"task_s": 0.01, "total_s": 4.0}, {"task_s": 0.01, "total_s": 0.2}, EFFICIENCY,
        (Bar("grid, map", ">=", 0.985, of("grid", "map")), Bar("grid, submit", ">=", 0.97, of("grid", "submit"))), "calls",
    ),
    Row(
        "array", "256 MB array to a task, checksum back", "array",
        {"megabytes": 256, "count": 3}, {"megabytes": 4, "count": 1},
        (
            Metric("first_mb_s", "first MB/s", "high", 0), Metric("mb_s", "then MB/s", "high", 0),
            Metric("checksum_alone_mb_s", "the sum alone, MB/s", "", 0),
        ),
        (
            Bar("first: grid / ray", ">=", 1.0, ratio("grid", "first_mb_s", "ray")),
            Bar("then: grid / ray", ">=", 1.0, ratio("grid", "mb_s", "ray")),
        ), "bytes", 600.0,
        notes=("contents are new each time; `then` is the median of the following ones",),
    ),
    Row(
        "results", "1,000 results of 1 MB to the caller", "results",
        {"count": 1000}, {"count": 20},
        (Metric("mb_s", "MB/s", "high", 0),),
        (Bar("grid / best of all", ">=", 1.5, against_best("grid", "mb_s", "high")),), "bytes",
    ),
    Row(
        "blob", "blob between two peers over the encrypted transport", "blob",
        {"megabytes": 512, "count": 3}, {"megabytes": 8, "count": 1},
        (
            Metric("mb_s", "MB/s", "high", 0), Metric("plain_tcp_mb_s", "plain TCP MB/s", "", 0),
            Metric("job_mb_s", "in a job MB/s", "high", 0), Metric("round_trip_us", "256 B round trip µs", "low", 0),
            Metric("plain_round_trip_us", "plain TCP µs", "", 0),
        ),
        (Bar("grid, MB/s", ">=", 500.0, of("grid", "mb_s")),),
        notes=("`in a job`: put on one peer, read by a task on another: hashed, fetched, verified, mapped",),
    ),
    Row(
        "words", "word count of a corpus", "words",
        {"batch_bytes": 2 << 20}, {"batch_bytes": 32 << 10},
        (Metric("s", "seconds", "low", 2), Metric("megabytes", "MB", "", 0), Metric("files", "files", "", 0)),
        (
            Bar("seconds: grid / best Python engine", "<=", 1.0, against_best("grid", "s", "low")),
            Bar("efficiency against serial Python", ">=", 0.9, against_serial("grid")),
        ), within_s=900.0,
        notes=("grid-files: the corpus travels as the job's inputs; duckdb, polars: no Python a word, one process",),
    ),
    Row(
        "cold", "first result of a cold start", "cold", {}, {},
        (Metric("s", "seconds", "low", 3),),
        (Bar("python job.py, s", "<=", 0.8, of("embedded", "s")), Bar("grid submit, s", "<=", 0.5, of("grid", "s"))),
        notes=("grid: `grid submit` to a peer that runs",),
    ),
    Row(
        "memory", "memory when idle (proportional set size)", "memory", {}, {},
        (
            Metric("engine_mb", "all MB", "low", 1), Metric("peer_mb", "peer MB", "low", 1),
            Metric("worker_mb", "a worker MB", "low", 1), Metric("processes", "processes", "", 0),
        ),
        (Bar("peer, MB", "<=", 70.0, of("grid", "peer_mb")), Bar("idle worker, MB", "<=", 25.0, of("grid", "worker_mb"))),
        rounds_max=3,
    ),
    Row(
        "killed", "a worker killed in a 20 s job", "killed",
        {"seconds": 20.0, "task_s": 0.1}, {"seconds": 1.5, "task_s": 0.05},
        (
            Metric("extra_s", "extra s", "", 2), Metric("unharmed_s", "unharmed s", "", 2),
            Metric("by_default", "by default", ""),
        ),
        (Bar("extra, s", "<=", 0.5, of("grid", "extra_s")),), rounds_max=3,
    ),
    Row(
        "peers", "16 peers of 4 workers, sleeps of 100 ms, one submit", "many_workers",
        {"nodes": 16, "slots": 4, "seconds": 60.0, "task_s": 0.1}, {"nodes": 3, "slots": 2, "seconds": 1.5, "task_s": 0.05},
        (
            Metric("efficiency", "efficiency", "high", 3), Metric("busy_s", "all busy after s", "low", 2),
            Metric("busy_since_submit_s", "since `grid submit` s", "low", 2), Metric("workers", "workers seen", "", 0),
        ),
        (
            Bar("efficiency", ">=", 0.95, of("grid", "efficiency")),
            Bar("all busy since submit, s", "<=", 1.0, of("grid", "busy_since_submit_s")),
        ), within_s=900.0, rounds_max=2,
        notes=("rivals' workers are warm before the clock starts, ours don't exist yet",),
    ),
    Row(
        "tasks", "tasks from 1e4 to 1e7 through map", "tasks",
        {"counts": COUNTS}, {"counts": (1000, 10_000)},
        (
            Metric("flatness", "slowest / fastest", "high", 2), Metric("leader_growth", "leader's peak, last / first", "low", 2),
            *(Metric(f"rates.{n}", f"{n:.0e} tasks/s".replace("e+0", "e"), "high", 0) for n in COUNTS),
        ),
        (
            Bar("slowest / fastest", ">=", 0.8, of("grid", "flatness")),
            Bar("leader's peak memory, last / first", "<=", FLAT, of("grid", "leader_growth")),
        ), rounds_max=3,
    ),
)  # fmt: skip
