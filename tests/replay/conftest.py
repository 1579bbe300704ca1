"""Fixtures: a script played on one machine, then again on another one."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio

from grid.api import wire
from grid.worker.environment import Environment
from grid.worker.pool import WorkerPool
from tests.replay.leader import Run

PATIENCE_S = 60.0
"""For real processes on a busy machine."""

Play = Callable[..., Awaitable[Run]]


@pytest.fixture
async def play(nursery: trio.Nursery, tmp_path: Path) -> Play:
    """Play a script in a home of its own; `earlier`: as a new leader would, with the record of that run."""
    pool = WorkerPool(spare_zygotes=0)
    await nursery.start(pool.run)
    homes = iter(("a", "another/home/much/longer", "c/d"))

    async def play(
        source: str,
        earlier: Run | None = None,
        *,
        modules: Mapping[str, str] | None = None,
        argv: tuple[str, ...] = (),
        workers: int = 2,
        packages: bool = False,
        prepare: Callable[[Run], None] = lambda run: None,
    ) -> Run:
        home = tmp_path / next(homes)
        for name in ("code", "work", "spool"):
            (home / name).mkdir(parents=True)
        script = home / "code" / "job.py"
        for name, text in {"job.py": source, **(modules or {})}.items():
            path = script.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        setup = wire.Setup(
            "driver", "ab" * 16, "job", "cd" * 20, 7, str(script), argv, str(home / "work"), str(home / "spool"), epoch=1
        )
        environment = Environment.caller(sys.executable, sys.path, sys.prefix) if packages else None
        with trio.fail_after(PATIENCE_S):
            processes = await pool.open_job(setup=setup, environment=environment)
            try:
                run = Run(processes, setup, earlier, workers)
                prepare(run)
                await run.play()
            finally:
                await processes.aclose()
        assert run.status == 0, run.stderr
        return run

    return play
