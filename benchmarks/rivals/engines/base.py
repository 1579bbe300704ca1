"""The common interface of the engines.

An engine lives in a process of its own (host.py), under a keeper (keeper.py). It has the calls of `work.Calls`, can be started
and stopped, and measures a row. Rules: settings are what the engine's own documentation advises for one machine; where its users
must choose (a chunk size, scatter), the adapter has the best choice we know and says so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.rivals import processes, work

ROOT = Path(__file__).resolve().parents[3]
COLD_S = 120.0
IDLE_S = 3.0
"""How long nothing is asked of an engine before its memory is looked at."""
CALLS = frozenset({"round_trip", "submits", "map_integers", "efficiency"})
BYTES = frozenset({"array", "results"})
ALL = CALLS | BYTES | {"words", "cold", "memory", "killed"}


class Unsupported(Exception):
    """This engine has nothing of the kind, or isn't asked."""


def version(package: str) -> str:
    """As installed, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Engine(work.Calls):
    """A rival. `modules` must be there for it to be installed; `packages` are told in the report."""

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[frozenset[str]] = ALL
    can_retry: ClassVar[bool] = False

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.started = False
        self.retries = 0

    @classmethod
    def installed(cls) -> bool:
        """All it needs can be imported (nothing is imported to find out)."""
        return all(importlib.util.find_spec(module) is not None for module in cls.modules)

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the packages that make it."""
        return {package: version(package) for package in cls.packages}

    # ---- life ----

    def start(self) -> None:
        """Be ready to take calls."""

    def stop(self) -> None:
        """End all processes. What is left the keeper ends."""

    def start_many(self, nodes: int, slots: int) -> None:
        """Start with so many nodes of so many workers each."""
        raise Unsupported("not asked")

    def ensure(self) -> None:
        """Start unless started."""
        if not self.started:
            self.start()
            self.started = True

    def restart(self) -> None:
        """Stop whatever there is; start again."""
        self.close()
        self.ensure()

    def close(self) -> None:
        """Stop if started."""
        if self.started:
            self.started = False
            self.stop()

    # ---- rows ----

    def values(self, row: str, measure: str, params: dict[str, Any]) -> work.Values:
        """Measure one row. Raises Unsupported; anything else is the engine's failure."""
        special = getattr(self, f"measure_{measure}", None)
        if special is not None:
            found: work.Values = special(**params)
            return found
        self.ensure()
        return work.MEASURES[measure](self, **params)

    def measure_cold(self) -> work.Values:
        """From the start of a fresh Python to the first result."""
        command = [sys.executable, "-m", "benchmarks.rivals.host", "--cold", self.name, str(self.workers)]
        return {"s": timed_line(command, "first")}

    def measure_memory(self) -> work.Values:
        """All processes of the idle engine, its user's own included; daemons are our keeper's children."""
        self.ensure()
        work.warm(self)
        time.sleep(IDLE_S)
        pids = processes.tree(os.getppid())[1:]
        return {"engine_mb": processes.pss_mb(*pids), "processes": len(pids)}

    def measure_killed(self, **params: Any) -> work.Values:
        """As its users have it by default; where that fails, with the retries that it offers."""
        self.ensure()
        try:
            return work.killed(self, **params)
        except Exception as error:
            failed = type(error).__name__
            if not self.can_retry:
                raise
        self.retries = 3
        self.restart()
        return {**work.killed(self, **params), "by_default": f"fails: {failed}"}

    def measure_many_workers(self, *, nodes: int, slots: int, **params: Any) -> work.Values:
        """Warm, for a start: its processes exist before we count."""
        self.close()
        self.start_many(nodes, slots)
        self.started = True
        self.workers = nodes * slots
        work.warm(self)
        return work.many_workers(self, **params)


def environment() -> dict[str, str]:
    """For processes that must import what we import, and find the programs that engines install beside Python."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    programs = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PATH": programs}


def timed_line(command: list[str], wanted: str, env: dict[str, str] | None = None, cwd: str | None = None) -> float:
    """Start a command; return the seconds until it printed a line with `wanted`. It is waited for."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env or environment(), cwd=cwd
    )
    elapsed_s = 0.0
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if wanted in line and not elapsed_s:
                elapsed_s = time.perf_counter() - began
    status = process.wait(COLD_S)
    if not elapsed_s or status:
        raise RuntimeError(f"{' '.join(command[:4])}: exit status {status}, first result {elapsed_s:.3f} s")
    return elapsed_s
