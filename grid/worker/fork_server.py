"""The peer's side of one zygote: starts it, orders forks and kills, hears of exits.

When the control socket ends, the zygote and all it forked are gone (zygote.py's promise; PR_SET_PDEATHSIG keeps it where
the zygote was killed). Processes are started in the thread that runs trio, never in a helper thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio

from grid.api import wire
from grid.worker import control
from grid.worker.environment import Environment
from grid.worker.sandbox import Bind, Sandbox

START_S_MAX = 60.0
"""A cold start imports from a cold disk; anything slower is broken."""
END_S_MAX = 2.0
"""For a zygote that was told to end, before it is killed."""
STDERR_BYTES_KEPT = 16 << 10
"""The end of what a zygote wrote: why it could not start."""
CHANNEL_BUFFER_BYTES = 1 << 20
"""Of the sockets to children: large enough that a page goes out in a few system calls."""
BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


class WorkerStartError(Exception):
    """A job's process could not be started; one line that says why."""


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """The bootstrap arguments that name our own package and the libraries children fall back on."""
    arguments = [f"grid={Path(__file__).parents[2]}"]
    for name in ("cloudpickle", "msgspec"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        arguments.append(f"fallback={name}={Path(spec.origin).parents[1]}")
    return tuple(arguments)


def command(environment: Environment, control_fd: int) -> list[str]:
    """The command line of a zygote."""
    return [
        environment.python,
        *("-S", "-s", "-P", "-X", "utf8"),
        str(BOOTSTRAP),
        f"control={control_fd}",
        *_library_folders(),
        *(f"path={entry}" for entry in environment.path),
        *(f"site={folder}" for folder in environment.sites),
        f"prefix={environment.prefix}",
    ]


class ForkServer:
    """One running zygote. `start`, then `run` in a nursery; `close` ends it and everything it forked."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, stderr_fd: int) -> None:
        connection.setblocking(False)
        self._process = process
        self._socket = connection
        self._stderr_fd = stderr_fd
        self._stderr = bytearray()
        self._last = 0
        self._forks: dict[int, tuple[trio.Event, list[control.Forked]]] = {}
        self._on_exit: dict[int, Callable[[int | None], None]] = {}
        self._closed = False
        self.ready = trio.Event()
        """Set when it takes orders, and when it is gone."""
        self.gone = trio.Event()
        """Set when the zygote and all its children are gone."""
        self.pid = process.pid

    @classmethod
    def start(
        cls, environment: Environment, sandbox: Sandbox, binds: Sequence[Bind] = (), env: Mapping[str, str] | None = None
    ) -> ForkServer:
        """Start a zygote; its environment variables are `env` and nothing else. Raises WorkerStartError."""
        ours, theirs = socket.socketpair()
        stderr_read, stderr_write = os.pipe()
        try:
            # All PYTHON* variables count (there is no -E, for it would switch this one off): so there are none but this.
            variables = {**(env or {}), "PYTHONHASHSEED": "0"}
            fds = [theirs.fileno()]
            process = subprocess.Popen(
                sandbox.wrap(command(environment, theirs.fileno()), variables, fds, binds),
                env=variables,
                cwd="/",
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=stderr_write,
                stderr=stderr_write,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(stderr_read)
            raise WorkerStartError(f"can't start {environment.python}: {error.strerror or error}") from error
        finally:
            theirs.close()
            os.close(stderr_write)
        return cls(process, ours, stderr_read)

    async def run(self) -> None:
        """Hear the zygote until it is gone."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain_stderr)
                await self._hear()
                await self._end()
                nursery.cancel_scope.deadline = trio.current_time() + 0.5
        finally:
            self.close()
            with trio.CancelScope(shield=True):
                await self._end()
            self._forget_children()
            self.gone.set()
            self.ready.set()
            self._socket.close()

    async def wait_ready(self) -> None:
        """Wait until it takes orders. Raises WorkerStartError."""
        with trio.move_on_after(START_S_MAX):
            await self.ready.wait()
        if not self.ready.is_set():
            self.close()
            raise WorkerStartError(f"{self._process.args!r} did not start within {START_S_MAX:.0f} s")
        if self.gone.is_set() or self._closed:
            raise WorkerStartError(f"the job's Python could not start: {self.last_words()}")

    def last_words(self) -> str:
        """The last line that the zygote wrote to its stderr."""
        lines = self._stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._process.poll()}"

    async def fork(
        self, role: str, fds: dict[str, int], memory_bytes_max: int, on_exit: Callable[[int | None], None]
    ) -> tuple[int, int]:
        """Fork a child and return (its number, its pid); `fds` stay the caller's.

        `on_exit` is called once with its status (None: unknown) when it has ended. Raises WorkerStartError.
        """
        self._last += 1
        number = self._last
        forked, answer = trio.Event(), list[control.Forked]()
        self._forks[number] = forked, answer
        self._on_exit[number] = on_exit
        try:
            control.send_order(self._socket, control.Fork(number, role, tuple(fds), memory_bytes_max), list(fds.values()))
        except OSError as error:
            self._on_exit.pop(number, None)
            self._forks.pop(number, None)
            raise WorkerStartError(f"the job's fork server is gone: {self.last_words()}") from error
        try:
            with trio.move_on_after(START_S_MAX):
                await forked.wait()
        finally:
            self._forks.pop(number, None)
            if not answer:
                self.kill(number)
        if not answer or answer[0].error:
            self._on_exit.pop(number, None)
            raise WorkerStartError(answer[0].error if answer else f"the job's fork server ended: {self.last_words()}")
        return number, answer[0].pid

    def kill(self, number: int) -> None:
        """SIGKILL a child and its process group."""
        try:
            control.send_order(self._socket, control.Kill(number), [])
        except BlockingIOError:
            self._kill_zygote()  # it does not read its orders: PR_SET_PDEATHSIG takes its children along
        except OSError:
            pass  # gone already, and its children with it

    def close(self) -> None:
        """End the zygote and everything it forked; `gone` says when. Idempotent."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    async def _hear(self) -> None:
        reader = wire.FrameReader(control.report_decoder)
        while True:
            try:
                data = self._socket.recv(64 << 10)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except OSError:
                return
            if not data:
                return
            try:
                for report, _ in reader.feed(data):
                    self._handle(report)
            except wire.WireError:
                return

    def _handle(self, report: control.Report) -> None:
        if isinstance(report, control.Hello):
            self.ready.set()
        elif isinstance(report, control.Forked):
            waiting = self._forks.get(report.child)
            if waiting is not None:
                waiting[1].append(report)
                waiting[0].set()
        else:
            on_exit = self._on_exit.pop(report.child, None)
            if on_exit is not None:
                on_exit(report.status)

    def _forget_children(self) -> None:
        for forked, _ in self._forks.values():
            forked.set()
        for on_exit in list(self._on_exit.values()):
            on_exit(None)
        self._on_exit.clear()

    async def _end(self) -> None:
        """Wait for the process to end, kill it if it does not."""
        self.close()
        with trio.move_on_after(END_S_MAX):
            await _wait(self._process)
        if self._process.poll() is None:
            self._kill_zygote()
            await _wait(self._process)

    def _kill_zygote(self) -> None:
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGKILL)

    async def _drain_stderr(self) -> None:
        async with trio.lowlevel.FdStream(self._stderr_fd) as stream:
            while data := await stream.receive_some(4096):
                self._stderr += data
                del self._stderr[:-STDERR_BYTES_KEPT]


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that is about to end has ended."""
    if sys.platform == "linux":
        try:
            fd = os.pidfd_open(process.pid)
        except OSError:
            pass
        else:
            try:
                if process.poll() is None:
                    await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)
    while process.poll() is None:  # noqa: ASYNC110 - nobody tells: it is a look at a process
        await trio.sleep(0.005)
