"""The program `grid`: finds the command, runs it, turns what went wrong into one line and an exit status.

Only the module of the command that was typed is imported: the time from Enter to the first result is felt.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from grid.api.client import ControlError


class Command(NamedTuple):
    """Where a command's function is, and under which heading `grid --help` lists it."""

    module: str
    function: str
    panel: str
    settings: dict[str, Any] = {}


GRID, JOBS, MACHINE = "The grid", "Jobs", "This machine"
VERBATIM = {"allow_interspersed_args": False}  # what follows the script is the script's

COMMANDS = {
    "join": Command("cli.join", "join", GRID),
    "invite": Command("cli.peers", "invite", GRID),
    "status": Command("cli.status", "status", GRID),
    "leave": Command("cli.peers", "leave", GRID),
    "trust": Command("cli.peers", "trust", GRID),
    "revoke": Command("cli.peers", "revoke", GRID),
    "submit": Command("cli.submit", "submit", JOBS, VERBATIM),
    "jobs": Command("cli.jobs", "jobs", JOBS),
    "show": Command("cli.jobs", "show", JOBS),
    "logs": Command("cli.outcome", "logs", JOBS),
    "wait": Command("cli.outcome", "wait", JOBS),
    "result": Command("cli.outcome", "result", JOBS),
    "cancel": Command("cli.jobs", "cancel", JOBS),
    "explain": Command("cli.jobs", "explain", JOBS),
    "doctor": Command("cli.doctor", "doctor", MACHINE),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    argv = sys.argv[1:] if arguments is None else arguments
    if argv in (["--version"], ["-V"]):
        return _version()
    name = next((word for word in argv if not word.startswith("-")), "")
    try:
        return _run(name, argv)
    except KeyboardInterrupt:  # before there was a command to handle it
        return 130


def _run(name: str, argv: list[str]) -> int:
    import typer

    from cli.console import StdoutClosed, console
    from cli.errors import DETACHED, FAILED, status_of
    from grid.api.client import ControlError

    console.json, console.debug = _wants_json(name, argv), False
    click_error = typer.BadParameter.__mro__[2]  # ClickException: typer carries its own copy of click
    try:
        command = _command(name)
        return int(command.main(argv, prog_name="grid", standalone_mode=False) or 0)
    except ControlError as error:
        if console.debug:
            raise
        console.fail(error)
        return status_of(error, name)
    except typer.Exit as leaving:
        return leaving.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.live([])
        return DETACHED
    except StdoutClosed:
        return FAILED
    except Exception as error:
        if console.debug:
            raise
        failure = _usage(error, name) if isinstance(error, click_error) else _fault(error)
        console.fail(failure)
        return status_of(failure, name)


def _command(name: str) -> Any:
    """Return the click command for this command line: with the one subcommand that is named, or with all."""
    import importlib

    import typer

    from cli.light import lighten, lighten_help

    app = typer.Typer(
        help="A peer-to-peer compute grid: one command joins this machine, one runs a Python script on all of them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(version: bool = typer.Option(False, "--version", "-V", help="Print the version.")) -> None:
        if version:
            raise typer.Exit(_version())

    functions = {}
    for command, (module, function, panel, settings) in COMMANDS.items():
        if name == command or name not in COMMANDS:
            functions[command] = getattr(importlib.import_module(module), function)
            app.command(command, rich_help_panel=panel, context_settings=settings)(functions[command])
    group: Any = typer.main.get_command(app)
    lighten_help(group)
    for command, function in functions.items():
        lighten(group.commands[command], function)
    return group


def _usage(error: Any, name: str) -> ControlError:
    from cli.errors import UsageError

    message = str(error.format_message()).strip().rstrip(".")
    return UsageError(message[:1].lower() + message[1:], f"see: grid {name} --help" if name in COMMANDS else "see: grid --help")


def _fault(error: Exception) -> ControlError:
    from grid.api.client import ControlError

    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return ControlError("os", f"{where}{error.strerror}")
    return ControlError("internal", f"{type(error).__name__}: {error}", "this is a fault in grid: see it with --debug")


def _wants_json(name: str, argv: list[str]) -> bool:
    """Whether errors of parsing are wanted as JSON, too; what a script is passed doesn't count."""
    if name == "submit":
        script = next((i for i, word in enumerate(argv) if word.endswith(".py")), len(argv))
        argv = argv[:script]
    return "--json" in argv


def _version() -> int:
    from cli.console import StdoutClosed, console
    from grid import __version__

    try:
        console.data(f"grid {__version__}")
    except StdoutClosed:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
