"""`grid submit`: runs a script on the grid, on this machine's peer or on a throwaway grid."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.attach import Detached, Follower, termination_raises
from cli.console import clean, console, short
from cli.errors import DETACHED, GRID_FAILED, WRONG_USE, Failure, UsageError, status_of_outcome
from cli.options import Debug, Json
from grid.api.client import Client, ControlError, NoPeer, Stream
from grid.config import Home, parse_duration, parse_size

ENVIRONMENT, LIMITS, PLACE, OUTPUT = "What it needs", "Limits and retries", "Where and how it runs", "Output"
SEED_MAX = (1 << 63) - 1
MANY_FILES = "Files the job reads, or a pattern; repeatable."


def submit(
    script: Annotated[Path, typer.Argument(metavar="JOB.py", help="The script.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="The script's, verbatim.")] = None,
    file: Annotated[list[str] | None, typer.Option(metavar="PATH", help=MANY_FILES, rich_help_panel=ENVIRONMENT)] = None,
    requirement: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="REQUIREMENT", help="A package it imports; repeatable.", rich_help_panel=ENVIRONMENT),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="An environment variable; no secrets.", rich_help_panel=ENVIRONMENT),
    ] = None,
    stdin: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="What the script reads as stdin.", rich_help_panel=ENVIRONMENT)
    ] = None,
    network: Annotated[bool, typer.Option("--network", help="Tasks may use the network.", rich_help_panel=ENVIRONMENT)] = False,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="The job's limit.", rich_help_panel=LIMITS)] = None,
    task_timeout: Annotated[str | None, typer.Option(metavar="TIME", help="A task's limit.", rich_help_panel=LIMITS)] = None,
    retries: Annotated[
        int | None, typer.Option(min=0, max=1000, help="How often a task that raised runs again.", rich_help_panel=LIMITS)
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, max=4096, help="Slots a task takes.", rich_help_panel=LIMITS)] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="A task's memory.", rich_help_panel=LIMITS)] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="T", help="Only peers with this tag; repeatable.", rich_help_panel=PLACE)
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=99, help="Peers that keep the job (default 5).", rich_help_panel=PLACE)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Rather wait than go on without a majority.", rich_help_panel=PLACE)
    ] = False,
    verify: Annotated[str | None, typer.Option(metavar="MODE", help="How results are checked.", rich_help_panel=PLACE)] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=SEED_MAX, help="Fix the random seeds.", rich_help_panel=PLACE)] = None,
    local: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=64, help="Use a throwaway grid of N peers here.", rich_help_panel=PLACE),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Print the job's id once it is durable, and return.", rich_help_panel=PLACE)
    ] = False,
    name: Annotated[str | None, typer.Option(help="The job's name (default: the script's).", rich_help_panel=PLACE)] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where its files of output/ go (./output).", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Even over files that grid did not write.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a script on the grid. Options stand before the script; all after it is the script's.

    Its stdout is this command's, its exit status too. Ctrl-C detaches; the job goes on.
    """
    if json and not detach:
        raise UsageError("--json needs --detach: an attached submit's stdout is the script's", "follow with: grid logs --json")
    if local is not None and detach:
        raise UsageError("a throwaway grid ends with this command, so --local can't be detached", "leave out -d or --local")
    options: dict[str, Any] = {
        "files": file or None,
        "with": requirement or None,
        "env": _environment(env or []),
        "network": network or None,
        "timeout": parse_duration(timeout) if timeout else None,
        "task-timeout": parse_duration(task_timeout) if task_timeout else None,
        "retries": retries,
        "cpus": cpus,
        "memory": parse_size(memory) if memory else None,
        "tags": tag or None,
        "replicas": replicas,
        "strict": strict or None,
        "verify": verify,
        "seed": seed,
        "name": name,
    }
    given = {key: value for key, value in options.items() if value is not None}
    job = Job(script, arguments or [], given, stdin, detach, output, overwrite)
    try:
        with termination_raises():
            status = _submit(job, local)
    except KeyboardInterrupt:
        console.say("interrupted before the job was accepted: nothing runs")
        status = DETACHED
    raise typer.Exit(status)


@dataclass(frozen=True, slots=True)
class Job:
    """What was typed."""

    script: Path
    arguments: list[str]
    options: dict[str, Any]
    stdin: str | None
    detach: bool
    output: Path | None
    overwrite: bool
    notes: list[str] = field(default_factory=list)  # for stderr, below the job's id, which comes first

    def tell_notes(self) -> None:
        """Say what there is to say."""
        for note in self.notes:
            console.say(clean(note), "dim")


def _submit(job: Job, local: int | None) -> int:
    home = Home.open()
    if local is None:
        try:
            client = Client.open(home.path)
        except NoPeer:
            if home.joined or job.detach:
                raise
            job.notes.append("this machine has joined no grid: the job runs on a throwaway grid of its own")
            local = 1
        else:
            with client, _staging(home.staging) as staging:
                return _run(job, home, client, staging)
    from cli.local import LocalGrid

    with LocalGrid(local) as grid, _staging(grid.staging) as staging:
        submission = _pack(job, staging)  # while the peers start
        grid.ready()
        with Client.open(grid.home) as client:
            return _follow(job, grid.home, client, submission, throwaway=True)


def _run(job: Job, home: Home, client: Client, staging: Path) -> int:
    submission = _pack(job, staging)
    if job.detach:
        return _detached(job, home, client.stream("submit", submission=submission, detach=True))
    return _follow(job, home.path, client, submission, home=home)


def _detached(job: Job, home: Home, stream: Stream) -> int:
    """Print the job's id once it is durable; what there is to say of that goes to stderr."""
    submitted = ""
    try:
        for name, data, _body in stream:
            if name == "submitted":
                submitted = str(data["job"])
                home.remember_job(submitted)
            elif name == "note":
                job.notes.append(str(data.get("text", "")))
            elif name == "accepted":
                _accepted_detached(home, str(data["job"]))
                job.tell_notes()
                return 0
    except KeyboardInterrupt:
        if not submitted:
            raise
        how = f"follow it: grid logs {short(submitted)} -f, cancel it: grid cancel {short(submitted)}"
        console.say(f"interrupted: job {short(submitted)} runs, but it is not known to be durable; {how}")
        return DETACHED
    raise ControlError("internal", "the peer ended the stream without accepting the job", "see: grid jobs")


def _accepted_detached(home: Home, id_: str) -> None:
    home.remember_job(id_)
    if console.json:
        console.record({"job": id_})
    else:
        console.data(id_)


def _follow(
    job: Job,
    path: Path,
    client: Client,
    submission: Any,
    *,
    throwaway: bool = False,
    home: Home | None = None,
) -> int:
    def accepted(id_: str) -> None:
        console.say(f"job {id_}")
        job.tell_notes()
        if home is not None:
            home.remember_job(id_)

    follower = Follower(path, client, throwaway=throwaway)
    try:
        outcome = follower.run(client.stream("submit", submission=submission, detach=False), accepted)
        status = status_of_outcome(outcome)
        _tell(outcome, follower.job)
        output = job.output or Path(submission["options"].get("output") or "output")
        _bring_files(follower, output, job.overwrite, status)
    except Detached:
        return DETACHED
    finally:
        follower.client.close()
    return status


def _tell(outcome: dict[str, Any], id_: str) -> None:
    """Say why a job ended, where the driver's own output can't have."""
    error = outcome.get("error")
    if error:
        console.fail(ControlError(str(error.get("code")), str(error.get("message")), str(error.get("hint") or "")))
    elif outcome.get("state") == "cancelled":
        console.say(f"job {short(id_)} was cancelled")
    elif outcome.get("signal"):
        import signal

        with contextlib.suppress(ValueError):
            name = signal.Signals(int(outcome["signal"])).name
            console.fail(ControlError("signal", f"the script was killed by {name}"))


def _bring_files(follower: Follower, output: Path, overwrite: bool, status: int) -> None:
    """Fetch the files of output/. A failure counts only if the job had none."""
    from cli.files import OUTPUT_PREFIX, fetch

    try:
        files = follower.client.call("result", job=follower.job, stdout=False).get("files") or []
        fetch(follower.client, follower.job, files, output, overwrite=overwrite, prefix=OUTPUT_PREFIX)
    except ControlError as error:
        if status == 0:
            raise
        console.fail(error)


def _pack(job: Job, staging: Path) -> Any:
    """Return the submission as plain data. Raises Failure: what is wrong with the script or its options."""
    from grid.pack import PackError, pack

    options = dict(job.options)
    if job.stdin is not None:
        options["stdin"] = str(_stdin_file(job.stdin, staging))
    try:
        submission = pack(job.script, job.arguments, options, staging)
    except PackError as error:
        raise Failure(error.code, error.message, error.hint, status=WRONG_USE) from None
    job.notes.extend(submission.notes)
    import msgspec

    return msgspec.to_builtins(submission, builtin_types=(bytes,))


def _stdin_file(text: str, staging: Path) -> Path:
    if text != "-":
        if not Path(text).is_file():
            raise UsageError(f"no such file for --stdin: {text}", "")
        return Path(text).absolute()  # the peer runs in another folder
    path = staging / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def _environment(words: list[str]) -> dict[str, str] | None:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not name.isprintable() or " " in name:
            raise UsageError(f"{word!r} is no environment variable", "write --env NAME or --env NAME=VALUE")
        if not equals and name not in os.environ:
            raise UsageError(f"the environment variable {name} is not set here", f"write --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found or None


@contextlib.contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A folder on the peer's disk for what is submitted; the peer has adopted its files once it accepted the job."""
    try:
        path = Path(tempfile.mkdtemp(prefix="submit-", dir=parent))
    except OSError as error:
        raise Failure("disk", f"can't write to {parent}: {error.strerror}", "", status=GRID_FAILED) from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
