"""The fork server: one process for each (job, environment) that forks the job's workers and its driver.

It imports once what every child needs, so that a child starts in the time of a fork and shares that memory. Rules:

- single-threaded, and it runs no user's code: that happens in its children only;
- a child has its own session and process group, dies with the zygote (PR_SET_PDEATHSIG), keeps no descriptor but its own;
- whatever a child leaves behind (its group; processes that fled the group, which the kernel hands to us as subreaper) is killed;
- when the peer's end of the control socket closes, for whatever reason, all children are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from grid.api import wire
from grid.worker import control

API_MODULES = ("calls", "context", "errors", "files", "refs")
"""What scripts and tasks are likely to use of grid.api."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def preload() -> None:
    """Import what children need, so that forks share it."""
    import cloudpickle

    from grid.worker import child, driver_child  # noqa: F401

    cloudpickle.loads(cloudpickle.dumps(lambda: None))  # what it imports on first use
    for name in API_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"grid.api.{name}")


def serve(control_fd: int) -> Callable[[], int]:
    """Serve until the peer goes away. Returns in forked children only: with the function that the child is to run."""
    connection = socket.socket(fileno=control_fd)
    connection.setblocking(True)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    gc.collect()
    gc.disable()
    gc.freeze()
    zygote = Zygote(connection)
    try:
        become = zygote.run()
    except BaseException:
        if os.getpid() == zygote.pid:
            zygote.end(1)
        raise
    if become is None:
        zygote.end(0)
    return become


class Zygote:
    """State of the serving process."""

    def __init__(self, connection: socket.socket) -> None:
        self.pid = os.getpid()
        self._control = connection
        self._orders = control.OrderReader(connection)
        self._pids: dict[int, int] = {}  # child number → pid
        self._children: dict[int, int] = {}  # pid → child number

    def run(self) -> Callable[[], int] | None:
        """Serve. Returns None when the peer is gone; in a forked child, what it is to run."""
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        self._report(control.Hello(self.pid, "{}.{}.{}".format(*sys.version_info)))
        while True:
            for fd, _ in poll.poll():
                if fd == wake_read.fileno():
                    with contextlib.suppress(BlockingIOError):
                        wake_read.recv(4096)
                    self._reap()
                    continue
                orders = self._orders.read()
                if orders is None:
                    return None
                for order, fds in orders:
                    become = self._obey(order, fds)
                    if become is not None:  # we are a child: these numbers are other descriptors by now
                        for own in (self._control, wake_read, wake_write):
                            own.detach()
                        return become

    def end(self, status: int) -> NoReturn:
        """Kill every descendant, then exit."""
        for pid in self._children:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:  # orphans that become ours as their parents die are found by the next round
                for pid in _children_of(self.pid) or self._children:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                pid, _ = os.waitpid(-1, 0)
                self._children.pop(pid, None)
        os._exit(status)

    def _report(self, report: control.Report) -> None:
        try:
            self._control.sendall(wire.encode(report))
        except OSError:
            self.end(0)

    def _obey(self, order: control.Order, fds: list[int]) -> Callable[[], int] | None:
        if isinstance(order, control.Kill):
            pid = self._pids.get(order.child)
            if pid is not None:  # not reaped yet, so the number is still its own
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)  # if it has not made its group yet
            return None
        try:
            pid = os.fork()
        except OSError as error:
            self._report(control.Forked(order.child, 0, f"can't fork: {error.strerror}"))
            pid = -1
        if pid == 0:
            return enter_child(order, dict(zip(order.fds, fds, strict=True)), self.pid)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            self._pids[order.child] = pid
            self._children[pid] = order.child
            self._report(control.Forked(order.child, pid))
        return None

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            child = self._children.pop(pid, None)
            if child is not None:  # while it is not waited for, its pid and group number stay its own
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if child is not None:
                del self._pids[child]
                self._report(control.Exited(child, os.waitstatus_to_exitcode(status)))


def enter_child(order: control.Fork, fds: dict[str, int], parent: int) -> Callable[[], int]:
    """Turn the freshly forked process into a child of its own; return its main function."""
    os.setsid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kept = _arrange_descriptors(fds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order.memory_bytes_max:
        limit = order.memory_bytes_max
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    gc.enable()
    if order.role == "driver":
        from grid.worker import driver_child

        return lambda: driver_child.main(socket.socket(fileno=kept["channel"]), kept.get("early"))
    from grid.worker import child

    return lambda: child.main(socket.socket(fileno=kept["channel"]), kept["progress"], kept.get("early"))


def _arrange_descriptors(fds: dict[str, int]) -> dict[str, int]:
    """Put standard streams in place, what is kept behind them, close everything else. Returns where what is kept is."""
    null = os.open(os.devnull, os.O_RDWR)
    floor = 16 + max([null, *fds.values()])  # first out of each other's way
    kept = [name for name in ("channel", "progress", "early") if name in fds]
    places = [fds.get("stdin", null), fds.get("stdout", null), fds.get("stderr", null), *(fds[name] for name in kept)]
    for place, fd in enumerate(places):
        os.dup2(fd, floor + place, inheritable=False)
    for place in range(len(places)):
        os.dup2(floor + place, place, inheritable=place < 3)
    os.closerange(len(places), _descriptors_max())
    return {name: place for place, name in enumerate(kept, start=3)}


def _descriptors_max() -> int:
    try:
        return max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []
