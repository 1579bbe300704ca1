"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.console import console
from cli.errors import Failure
from grid.api.client import Client, ControlError
from grid.config import Home


def _set_json(value: bool) -> bool:
    console.json = console.json or value
    return value


def _set_debug(value: bool) -> bool:
    console.debug = console.debug or value
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.", callback=_set_json, is_eager=True)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug, is_eager=True, hidden=True)]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's id, any unique prefix of it, or 'last'.", show_default=False)
]


def open_client() -> tuple[Home, Client]:
    """Return this machine's home and a connection to its peer. Raises NoPeer, ConfigError."""
    home = Home.open()
    return home, Client.open(home.path)


def resolve_job(home: Home, client: Client, text: str) -> str:
    """Return the full id that `text` stands for. Raises ControlError: unknown or ambiguous."""
    if text == "last":
        job = home.last_job
        if job is None:
            raise ControlError("unknown-job", "no job was submitted from this home yet", "list jobs with: grid jobs")
        return job
    if not text or not all(char in "0123456789abcdef" for char in text.lower()):
        raise ControlError("unknown-job", f"{text!r} is not a job id", "list jobs with: grid jobs")
    result = client.call("resolve", prefix=text.lower())
    return str(result["id"] if isinstance(result, dict) else result)


def parse_task(text: str) -> tuple[int, int]:
    """Return (stage, index) for "S:I"."""
    stage, colon, index = text.partition(":")
    if not (colon and stage.isdecimal() and index.isdecimal()):
        raise Failure("usage", f"{text!r} names no task", "write STAGE:INDEX, such as 0:17", status=2)
    return int(stage), int(index)
