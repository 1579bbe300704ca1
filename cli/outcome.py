"""What a job said and left: logs, wait, result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import clean, console, format_size, short
from cli.errors import TIMED_OUT, Failure, status_of_outcome
from cli.options import Debug, JobArgument, Json, open_client, parse_task, resolve_job
from grid.api.client import ControlError
from grid.config import parse_duration

FILES_NAMED_MAX = 20


def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    task: Annotated[str | None, typer.Option(metavar="S:I", help="One task's: stage and index.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what the job's driver wrote, or one of its tasks."""
    stage, index = parse_task(task) if task else (None, None)
    home, client = open_client()
    with client:
        full = resolve_job(home, client, job)
        try:
            for name, data, body in client.stream("logs", job=full, follow=follow, stage=stage, index=index):
                if name in ("stdout", "stderr"):
                    _log(name, data, body)
                else:
                    _note(name, data)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _note(name: str, data: dict[str, Any]) -> None:
    if name == "note":
        console.say(clean(str(data.get("text", ""))), "dim")


def _log(name: str, data: dict[str, Any], body: bytes) -> None:
    if console.json:
        console.record({"stream": name, "offset": data.get("offset"), "text": body.decode("utf-8", "replace")})
    elif name == "stdout":
        console.raw(body)
    else:
        console.raw_stderr(body)


def wait(
    job: JobArgument,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Give up after this long (status 124).")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Wait for a job's end; exit with its driver's status."""
    timeout_s = parse_duration(timeout) if timeout else None
    home, client = open_client()
    with client:
        full = resolve_job(home, client, job)
        stream = client.stream("wait", job=full, timeout_s=timeout_s)
        for name, data, _body in stream:
            _note(name, data)
        outcome = stream.result
    if outcome.get("state") in ("pending", "running"):
        hint = f"wait on with: grid wait {short(full)}"
        raise Failure("wait-timeout", f"job {short(full)} is still {outcome['state']} after {timeout}", hint, status=TIMED_OUT)
    if json:
        console.record({"job": full, **outcome})
    else:
        _tell(full, outcome)
    raise typer.Exit(status_of_outcome(outcome))


def _tell(full: str, outcome: dict[str, Any]) -> None:
    error = outcome.get("error")
    if error:
        console.fail(ControlError(str(error.get("code")), str(error.get("message")), str(error.get("hint") or "")))
        return
    status = status_of_outcome(outcome)
    console.say(f"job {short(full)} {clean(str(outcome.get('state')))}" + (f", exit status {status}" if status else ""))


def result(
    job: JobArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Put the files it left there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Even over files that grid did not write.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a finished job's stdout, bring its files, exit with its status."""
    home, client = open_client()
    with client:
        full = resolve_job(home, client, job)
        text = bytearray()
        for name, data, body in (stream := client.stream("result", job=full, stdout=True)):
            if name == "stdout" and json:
                text += body
            elif name == "stdout":
                console.raw(body)
            else:
                _note(name, data)
        outcome = stream.result
        files = list(outcome.get("files") or [])
        if json:
            console.record({"job": full, **outcome, "stdout": text.decode("utf-8", "replace")})
        else:
            _tell_end(full, outcome, files, fetched=output is not None)
        status = status_of_outcome(outcome)
        if output is not None:
            from cli.files import fetch

            fetch(client, full, files, output, overwrite=overwrite)
    raise typer.Exit(status)


def _tell_end(full: str, outcome: dict[str, Any], files: list[dict[str, Any]], *, fetched: bool) -> None:
    if status_of_outcome(outcome) or outcome.get("error"):
        _tell(full, outcome)
    if not files or fetched:
        return
    console.say(f"it left {len(files)} file{'s' * (len(files) != 1)}; fetch with: grid result {short(full)} -o DIR", "dim")
    for file in files[:FILES_NAMED_MAX]:
        console.say(f"  {clean(str(file['name']))}  {format_size(int(file.get('size') or 0))}", "dim")
    if len(files) > FILES_NAMED_MAX:
        console.say(f"  … and {len(files) - FILES_NAMED_MAX} more", "dim")
