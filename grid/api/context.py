"""grid.context and grid.output: where a piece of the script runs, and where it may leave files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from grid.api.session import attached, current


@dataclass(frozen=True)
class Context:
    """Where this code runs. In the driver, `stage`, `task` are None."""

    job: str
    """The job's id, hex."""
    job_name: str
    stage: int | None
    task: int | None
    """Index in the stage."""
    attempt: int
    """0 at the first, then counting."""
    peer: str
    """The peer's id, hex."""
    peer_name: str
    seed: int
    """64 bits derived from the job's seed, the stage and the task: for generators of your own."""


def context() -> Context:
    """Return where this code runs."""
    from grid.worker.seeding import stage_seed, task_seed

    session = current()
    setup = session.setup
    stage, task, attempt = session.task
    seed = stage_seed(setup.seed, stage)
    if stage < 0:
        return Context(setup.job, setup.job_name, None, None, 0, setup.peer, setup.name, seed)
    return Context(setup.job, setup.job_name, stage, task, attempt, setup.peer, setup.name, task_seed(seed, task))


def output(name: str | os.PathLike[str]) -> Path:
    """Return the path of an output file, under `output/` in the driver's working folder; its folders are made.

    Files that the driver writes there are part of the job's result. Raises ValueError for a name that leads out of it.
    """
    text = os.fspath(name)
    relative = Path(text)
    if not text or "\0" in text or relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"{text!r} is no name for an output: give a path below output/, without '..'")
    session = attached()
    base = session.setup.workdir if session is not None and session.setup.workdir else os.getcwd()
    path = Path(base, "output", relative)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(Path(base, "output").resolve()):
        raise ValueError(f"{text!r} leads out of output/ through a link")
    return path
