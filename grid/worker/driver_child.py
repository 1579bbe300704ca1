"""The driver process: runs the job's script as Python would, with a session on the job's channel.

The script is the real `__main__`, its folder comes first in sys.path, its exit status is Python's. When it has ended, the
stages that are not done yet are waited for.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import types
from typing import Any

from grid.api import completion, session
from grid.api.channel import Channel
from grid.worker.child import start_child
from grid.worker.seeding import Seeder, stage_seed


def main(sock: socket.socket, early_fd: int | None = None) -> int:
    """Run the script; return the exit status, or raise SystemExit with it."""
    channel = Channel(sock)
    setup = start_child(channel)
    _renew_streams()
    completion.install()
    current = session.attach(channel, setup)
    current.early = None if early_fd is None else socket.socket(fileno=early_fd)
    seeder = Seeder(setup.seed)
    seed = stage_seed(setup.seed, -1)
    seeder.seed(seed)
    seeder.watch(lambda: seed)
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=setup.script, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = module
    try:
        with io.open_code(setup.script) as file:
            source = file.read()
        code = compile(source, setup.script, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except SystemExit:
        _finish(current)
        raise
    except BaseException as error:
        current.cancel_all("the script failed")
        return report(error)
    _finish(current)
    return 0


def _finish(current: session.Session) -> None:
    sys.stdout.flush()
    current.finish()


def _renew_streams() -> None:
    """Line-buffered streams on the descriptors that the driver was given, whatever the zygote had."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors = "backslashreplace" if fd == 2 else "strict"
        stream: Any = open(fd, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=fd > 0)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def report(error: BaseException) -> int:
    """Say what ended the script, as Python does, without our own frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__,):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    if isinstance(error, KeyboardInterrupt):
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1
