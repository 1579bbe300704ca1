"""A job's Python environment: built once by uv from the job's lock, read-only, shared by the jobs that have the same lock.

Rules: an environment is visible only when it is whole (built under a temporary name, published by rename); one build at a
time for each cache folder, across processes; whoever uses one holds a shared lock on its marker, so that it is not evicted
under a job. Nothing here is imported by children.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import signal
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio
from blake3 import blake3

ENVIRONMENTS_MAX: Final = 16
"""Kept in one cache folder; the longest unused go first. uv's own cache makes building one again cheap."""
BUILD_S_MAX: Final = 900.0
"""Large wheels over a slow line; a hang beyond that is an error."""
LOCK_POLL_S: Final = 0.1
"""Between two looks at a lock that another process holds for the time of a build."""
MESSAGE_LINES_MAX: Final = 6
"""Of uv's explanation, shown to the job's author."""
OUTPUT_BYTES_KEPT: Final = 64 << 10


class EnvironmentFailed(Exception):
    """The environment can't be had; the text is for the job's author."""


class _Lease:
    """A shared lock on an environment's marker, for as long as this object lives."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True)
class Environment:
    """An interpreter and what it may import. An empty `path` means the bare standard library, plus `sites`."""

    python: str
    path: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    """site-packages folders; their .pth files count."""
    prefix: str = ""
    """sys.prefix; "": the base interpreter's."""
    folder: str = ""
    """Where it lies, for a sandbox to bind; "" if it is not ours."""
    lease: object = field(default=None, compare=False, repr=False)

    @classmethod
    def bare(cls) -> Environment:
        """The standard library of the interpreter that runs this peer."""
        return cls(base_python())

    @classmethod
    def caller(cls, python: str, path: list[str] | tuple[str, ...], prefix: str = "") -> Environment:
        """The environment of the program that asks (`python job.py`): its sys.executable, sys.path and sys.prefix."""
        entries = tuple(entry or os.getcwd() for entry in path)
        sites = tuple(entry for entry in entries if Path(entry).name in ("site-packages", "dist-packages"))
        return cls(python, entries, sites, prefix)


def base_python() -> str:
    """The interpreter behind this process's virtual environment."""
    return getattr(sys, "_base_executable", None) or sys.executable


def python_minor() -> str:
    """Such as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def environment_key(lock_text: str) -> str:
    """Names the environment: the same lock, interpreter and platform give the same one."""
    system = (sysconfig.get_platform(), *platform.libc_ver())
    parts = (lock_text, sys.implementation.cache_tag, platform.python_version(), *system, base_python())
    return blake3("\0".join(map(str, parts)).encode()).hexdigest()[:32]


async def ensure(lock_text: str, python: str, cache_dir: Path) -> Environment:
    """Return the environment of a lock (pip's requirements format, pinned, with hashes), built if it is not there.

    `python` is the job's minor version, such as "3.11". Raises EnvironmentFailed. Cancelling kills the build.
    """
    if python != python_minor():
        raise EnvironmentFailed(f"the job needs Python {python}, this peer runs {python_minor()}")
    cache_dir = _folder(cache_dir)
    key = environment_key(lock_text)
    environment = _open(cache_dir, key)
    if environment is not None:
        return environment
    async with _locked(cache_dir / "build.lock"):
        environment = _open(cache_dir, key)
        if environment is None:
            await _build(lock_text, cache_dir, key)
            environment = _open(cache_dir, key)
        await trio.to_thread.run_sync(_evict, cache_dir, key)
    assert environment is not None
    return environment


def _folder(path: Path) -> Path:
    """The absolute path of a folder, made if need be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailed(f"no environments can be kept in {path}: {error.strerror}") from error
    return Path(os.path.abspath(path))


def _open(cache_dir: Path, key: str) -> Environment | None:
    """The environment if it is there, leased."""
    folder = cache_dir / key
    fd = os.open(cache_dir / f"{key}.used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    lease = _Lease(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return None  # being evicted: the build lock is held, and after it we look again
    if not (folder / "bin" / "python").exists():
        return None
    os.utime(fd)
    site = folder / "lib" / f"python{python_minor()}" / "site-packages"
    return Environment(str(folder / "bin" / "python"), (), (str(site),), str(folder), str(folder), lease)


@contextlib.asynccontextmanager
async def _locked(path: Path):  # type: ignore[no-untyped-def]
    """Hold a lock among processes (and among tasks: each has a descriptor of its own)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


async def _build(lock_text: str, cache_dir: Path, key: str) -> None:
    """Build under a temporary name and publish. Called with the build lock held."""
    await trio.to_thread.run_sync(_remove_stale, cache_dir)
    work = cache_dir / f"{key}-{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        venv = work / "venv"
        lock = work / "requirements.txt"
        lock.write_text(lock_text, encoding="utf-8")
        with trio.move_on_after(BUILD_S_MAX) as scope:
            await _uv(work, "venv", "--relocatable", "--no-project", "--python", base_python(), str(venv))
            if lock_text.strip():
                # Everything is in the lock: nothing is resolved, and nothing comes whose hash is not there.
                options = ("--no-deps", "--require-hashes", "--python", str(venv / "bin" / "python"))
                await _uv(work, "pip", "install", *options, "-r", str(lock))
        if scope.cancelled_caught:
            raise EnvironmentFailed(f"building the job's environment took longer than {BUILD_S_MAX:.0f} s")
        await trio.to_thread.run_sync(_freeze, venv)
        venv.chmod(0o755)  # a folder can be renamed into another only if it can be written to
        await trio.to_thread.run_sync(_remove, cache_dir / key)  # one that broke, since its interpreter went, say
        os.rename(venv, cache_dir / key)
        (cache_dir / key).chmod(0o555)
    except OSError as error:
        raise EnvironmentFailed(f"the job's environment can't be built here: {error.strerror or error}") from error
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove, work)


async def _uv(folder: Path, *arguments: str) -> None:
    """Run uv to its end, in a process group of its own. Raises EnvironmentFailed with what it said."""
    import uv

    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    try:
        result = await trio.run_process(
            [uv.find_uv_bin(), *arguments],
            env=env,
            cwd=folder,
            stdin=b"",
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            start_new_session=True,
            deliver_cancel=_kill_group,
        )
    except FileNotFoundError as error:
        raise EnvironmentFailed("this peer's uv is not installed properly: its program is missing") from error
    if result.returncode:
        text = (result.stderr or result.stdout)[-OUTPUT_BYTES_KEPT:].decode(errors="replace")
        raise EnvironmentFailed("the job's environment can't be built: " + telling_lines(text))


async def _kill_group(process: trio.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def telling_lines(text: str) -> str:
    """Reduce uv's stderr to what it complains of."""
    raw = text.splitlines()
    start = next((i for i, line in enumerate(raw) if line.lstrip().startswith(("error", _CROSS))), 0)
    lines = [line.strip(_ORNAMENT) for line in raw[start:]]
    kept = [line.removeprefix("error: ") for line in lines if line and not line.startswith(_NOISE)]
    if not kept:
        return "uv failed and did not say why"
    more = len(kept) - MESSAGE_LINES_MAX
    return "\n".join(kept[:MESSAGE_LINES_MAX]) + (f"\n({more} more lines)" if more > 0 else "")


_CROSS: Final = "\u00d7"
_ORNAMENT: Final = f" \t\u2502\u2570\u2500\u25b6\u251c{_CROSS}"
"""The frame that uv draws around its explanations."""
_NOISE = ("Using ", "Resolved ", "Prepared ", "Downloading ", "Downloaded ", "Creating ", "Activate with")


def _freeze(folder: Path) -> None:
    """Take everybody's right to write away, from the leaves up."""
    for path in _walk_up(folder):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~0o222)


def _walk_up(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            yield Path(parent, name)
    yield folder


def _remove(folder: Path) -> None:
    """Remove a tree that may be read-only."""
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o755)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(cache_dir: Path) -> None:
    """Remove what processes that were killed left. Called with the build lock held."""
    for folder in cache_dir.glob("*.tmp"):
        _remove(folder)


def _evict(cache_dir: Path, keep: str) -> None:
    """Remove the longest unused environments over the bound, but none in use. Called with the build lock held."""
    found = []
    for marker in cache_dir.glob("*.used"):
        if (cache_dir / marker.stem).is_dir():
            found.append((marker.stat().st_mtime, marker))
        elif marker.stem != keep:
            marker.unlink(missing_ok=True)  # of a build that failed
    found.sort()
    excess = len(found) - ENVIRONMENTS_MAX
    for _, marker in found:
        if excess <= 0:
            return
        if marker.stem != keep and _evict_one(cache_dir, marker):
            excess -= 1


def _evict_one(cache_dir: Path, marker: Path) -> bool:
    with open(marker, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        grave = cache_dir / f"{marker.stem}.tmp"
        (cache_dir / marker.stem).chmod(0o755)
        os.rename(cache_dir / marker.stem, grave)
        _remove(grave)
        marker.unlink(missing_ok=True)
        return True
