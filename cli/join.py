"""`grid join`: runs this machine's peer, in the foreground or detached."""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import StdoutClosed, clean, console, is_terminal, short
from cli.errors import UsageError
from cli.options import Debug, Json
from grid.api.client import ControlError
from grid.config import Home, JoinOptions, parse_address, parse_size

if TYPE_CHECKING:
    import trio

DESCRIPTORS = 8192
"""Files and sockets a peer may have open: the transport's CONNECTIONS_MAX, blob links, and several for each child."""
POLL_INTERVAL_S = 1.0
LOG_BYTES_MAX = 8 << 20
"""A larger log of a detached peer is put aside when the next one starts; one old log is kept."""
FOOTER = "Ctrl-C stops this peer; 'grid invite' prints a line for another machine"


def join(
    invite: Annotated[
        str | None, typer.Argument(metavar="[INVITE|-]", help="An invite, or - to read it from stdin.", show_default=False)
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where to serve (default: 0.0.0.0:4743).")] = None,
    advertise: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The address others reach it at.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=4096, help="Tasks at once (default: the CPUs).")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What tasks may use together, such as 8G.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="T", help="What jobs can ask for with --tag; repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="The peer's name (default: the host's).")] = None,
    home: Annotated[Path | None, typer.Option(metavar="DIR", help="Where its state lives (default: $GRID_HOME).")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background; return when it serves.")] = False,
    no_work: Annotated[bool | None, typer.Option("--no-work/--work", help="Submit and follow only, run no tasks.")] = None,
    trust: Annotated[list[str] | None, typer.Option(metavar="PEER|all", help="Whose jobs may run unsandboxed.")] = None,
    throwaway: Annotated[bool, typer.Option("--throwaway", hidden=True)] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run this machine's peer: found a grid, join one with an INVITE, or come back to the one it belongs to."""
    if invite == "-":
        invite = sys.stdin.readline().strip()
        if not invite:
            raise UsageError("stdin held no invite", "pipe one in: grid invite | ssh HOST grid join -")
    options = JoinOptions(
        invite=_checked_invite(invite),
        listen=_checked_address(listen),
        advertise=_checked_address(advertise),
        slots=slots,
        memory_bytes=parse_size(memory) if memory else None,
        tags=tuple(tag) if tag else None,
        name=_checked_name(name),
        no_work=no_work,
        trust=tuple(trust) if trust else None,
        throwaway=throwaway,
    )
    place = Home.open(home, create=True)
    if detach:
        _detach(place, options)
    else:
        _serve(place, options)


def _checked_invite(text: str | None) -> str | None:
    if text is None:
        return None
    from dht.core.invite import Invite, InviteError

    try:
        invite = Invite.decode(text)
    except InviteError as error:
        message, _, hint = str(error).partition(": ")
        raise UsageError(message, hint) from None
    try:
        invite.check(time.time())
    except InviteError as error:
        message, _, hint = str(error).partition(": ")
        raise ControlError("invite-expired", message, hint) from None
    return text


def _checked_address(text: str | None) -> str | None:
    if text is not None:
        parse_address(text)
    return text


def _checked_name(text: str | None) -> str | None:
    if text is not None and (not text.isprintable() or not 0 < len(text) <= 64):
        raise UsageError("a name has 1 to 64 printable characters", "")
    return text


# ---- detached --------------------------------------------------------------------------------------------------------


def _detach(home: Home, options: JoinOptions) -> None:
    from cli.spawn import start_peer, wait_ready

    with home.lock():
        pass  # an error about a running peer is clearest here
    with contextlib.suppress(OSError):
        if home.log.stat().st_size > LOG_BYTES_MAX:
            home.log.replace(home.log.with_suffix(".log.1"))
    with home.log.open("ab") as log:
        process = start_peer(["--home", str(home.path), *_as_arguments(options)], log)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{options.invite}\n".encode() if options.invite else b"")
        process.stdin.close()
    try:
        ready = wait_ready(process, home.log)
    except BaseException:
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
        raise
    if console.json:
        console.record(ready)
    else:
        _announce(ready, f"runs in the background (pid {process.pid}, log {home.log}); stop it with: grid leave")


def _as_arguments(options: JoinOptions) -> list[str]:
    """Return the command line that says the same; the invite goes by stdin, out of sight of other users' `ps`."""
    values = {"--listen": options.listen, "--advertise": options.advertise, "--slots": options.slots, "--name": options.name}
    values["--memory"] = options.memory_bytes
    words = [word for option, value in values.items() if value is not None for word in (option, str(value))]
    words += [word for tag in options.tags or () for word in ("--tag", tag)]
    words += [word for peer in options.trust or () for word in ("--trust", peer)]
    if options.no_work is not None:
        words.append("--no-work" if options.no_work else "--work")
    return [*words, "-"] if options.invite else words


# ---- foreground ------------------------------------------------------------------------------------------------------


def _announce(ready: Mapping[str, Any], how: str) -> None:
    where = f"peer {short(str(ready.get('peer', '')))} of grid {short(str(ready.get('grid', '')))}"
    console.say(f"{where} at {clean(str(ready.get('address', '')))} {how}")
    if ready.get("invite"):
        console.say("on the next machine type:", "dim")
        console.data(f"grid join {ready['invite']}")


class LogHandler(logging.Handler):
    """Passes what the parts of the peer log to the report."""

    def __init__(self, report: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(logging.DEBUG if console.debug else logging.INFO)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report a line, and in a log the traceback below it."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._report({"event": "log", "text": level + self.format(record)})


class LogReport:
    """What a peer reports, as lines: the paste-ready command on stdout, the rest on stderr with the time."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        with contextlib.suppress(StdoutClosed):  # a peer outlives who read its first line
            self._report(event)

    def _report(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "ready":
            if console.json:
                console.record(event)
            else:
                _announce(event, "serves")
        elif event.get("event") == "invite" and not console.json:
            console.say("that invite was used; a fresh one for the next machine:", "dim")
            console.data(f"grid join {event['invite']}")
        elif event.get("text"):
            first, *rest = str(event["text"]).splitlines()
            console.say("\n".join([f"{time.strftime('%H:%M:%S')} {clean(first)}", *map(clean, rest)]))

    async def poll(self, home: Home) -> None:
        """Nothing to refresh."""

    def close(self) -> None:
        """Nothing to put back."""


class LiveReport:
    """What a peer reports, as a live view at the bottom of the terminal with the log scrolling above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        from cli.live import GridView

        self._view = GridView()
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind in ("ready", "invite"):
            text = f"serving at {event['address']}" if kind == "ready" else "that invite was used"
            if event.get("invite"):
                self._print(f"{text}; on the next machine type:")
                self._print(f"grid join {event['invite']}", stamp=False)
            else:
                self._print(text)
        elif event.get("text"):
            lines = str(event["text"]).splitlines()
            for line in lines if console.debug else lines[:1]:
                self._print(line)

    def _print(self, text: str, *, stamp: bool = True) -> None:
        from rich.text import Text

        line = Text(f"{time.strftime('%H:%M:%S')} ", style="dim") if stamp else Text()
        self._console.print(line.append(clean(text), style="default"), soft_wrap=True)

    async def poll(self, home: Home) -> None:
        """Redraw each second from what the peer says of the grid."""
        import trio

        from grid.api.client import Client

        def ask() -> Any:
            with Client.open(home.path) as client:
                return client.call("status")

        while True:
            with contextlib.suppress(ControlError):  # not serving yet, or no more
                self._view.update(await trio.to_thread.run_sync(ask, abandon_on_cancel=True))
                self._live.update(self._view.render(FOOTER), refresh=True)
            await trio.sleep(POLL_INTERVAL_S)

    def close(self) -> None:
        """Leave the last view on the screen."""
        self._live.stop()


def _serve(home: Home, options: JoinOptions) -> None:
    import trio

    live = not console.json and is_terminal(sys.stderr) and is_terminal(sys.stdout)
    report = LiveReport() if live else LogReport()
    settled = home.settle(options, save=False)

    def on_event(event: Mapping[str, Any]) -> None:
        if event.get("event") == "ready" and not options.throwaway:
            home.settle(options)  # what worked is remembered
        report(event)

    logger = logging.getLogger()
    handler = LogHandler(report)
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    raise_descriptor_limit()
    try:
        trio.run(functools.partial(_run, home, settled, report, on_event))
    except BaseException as error:
        leaf = _leaf(error)
        if console.debug or leaf is error:
            raise
        raise leaf from None
    finally:
        logger.removeHandler(handler)
        report.close()
        if options.throwaway:
            shutil.rmtree(home.path, ignore_errors=True)


def raise_descriptor_limit() -> None:
    """Allow as many connections as a leader may have: the usual soft limit is 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(home: Home, options: JoinOptions, report: LogReport | LiveReport, on_event: Any) -> None:
    import trio

    from grid.peer import serve

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(report.poll, home)
        if options.throwaway:
            nursery.start_soon(_stop_at_end_of_input, nursery.cancel_scope)
        await serve(options, on_event)
        nursery.cancel_scope.cancel()


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    """The first signal stops the peer in good order; the next one finds Python's own handlers again."""
    import signal

    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _stop_at_end_of_input(scope: trio.CancelScope) -> None:
    """Stop once the command that started this throwaway peer is gone: the other end of stdin closes with it."""
    import os

    import trio

    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            while await stream.receive_some():
                pass
    scope.cancel()


def _leaf(error: BaseException) -> BaseException:
    """Return the one error inside groups that nurseries made of it, in words for people where it is well known."""
    import errno

    while isinstance(error, BaseExceptionGroup):  # of several, the one that is meant for people
        error = next((each for each in error.exceptions if isinstance(each, ControlError)), error.exceptions[0])
    numbers = (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL)
    if isinstance(error, OSError) and error.errno in numbers and error.filename is None:
        what = {errno.EADDRINUSE: "the port is taken", errno.EACCES: "the port may not be used by this user"}
        message = what.get(error.errno, "this machine has no such address")
        return ControlError("listen", message, "choose another with: --listen HOST:PORT (port 0 takes a free one)")
    return error
