"""A peer's home folder: where it is, what lies in it, whose it is; and the settings a peer starts with.

- The folder belongs to one user (mode 0700) and one machine: a home that reaches a second machine over NFS is refused,
  since two peers with one identity would be two liars.
- Small files are written to a temporary name and renamed: a crash leaves the old one or the new one.
- Light to import: every command opens the home first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grid.api.client import POINTER_NAME, SOCKET_NAME, ControlError, home_folder, machine_id

DEFAULT_PORT = 4743
SOCKET_PATH_BYTES_MAX = 100
"""`sun_path` holds 108 bytes on Linux and 104 on macOS, with the final zero."""
SETTINGS_BYTES_MAX = 64 << 10
"""Ours are under 1 KiB; more is not our file."""


class ConfigError(ControlError):
    """The home, or an option, can't be used as it is. Code "usage": the value typed is wrong."""


# ---- values people type ----------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|s|m|h|d|w)?)", re.IGNORECASE)
_DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "": 1.0}


def parse_size(text: str) -> int:
    """Return bytes for "4G", "512M", "1.5GiB", "4096" (units are powers of 1024). Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * 1024 ** _SIZE_POWERS[match[2].lower()]) if match else 0
    if not 0 < size < 1 << 60:
        raise ConfigError("usage", f"{text!r} is not a size", "write a number with a unit, such as 512M or 4G")
    return size


def parse_duration(text: str) -> float:
    """Return seconds for "90s", "24h", "1h30m", "500ms", "2d", "90". Raises ConfigError."""
    rest = text.strip()
    total_s, position = 0.0, 0
    parts = 0
    while match := _DURATION.match(rest, position):
        unit = (match[2] or "").lower()
        if unit == "" and (parts or match.end() != len(rest)):
            break  # a number without a unit stands alone
        total_s += float(match[1]) * _DURATION_S[unit]
        position = match.end()
        parts += 1
    if position != len(rest) or not parts or not 0 < total_s < 1e9:
        raise ConfigError("usage", f"{text!r} is not a duration", "write a number with a unit, such as 90s, 15m or 24h")
    return total_s


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) for "HOST:PORT", "[V6]:PORT", "HOST", ":PORT" (else 0.0.0.0, 4743). Raises ConfigError."""
    wrong = ConfigError("usage", f"{text!r} is not an address", "write HOST:PORT, such as 0.0.0.0:4743 or 127.0.0.1:0")
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s/]*))(?::(\d{1,5}))?", text.strip())
    if match is None or not text.strip():
        raise wrong
    port = int(match[3]) if match[3] else DEFAULT_PORT
    if port > 65535:
        raise wrong
    return match[1] or match[2] or "0.0.0.0", port


def format_address(address: tuple[str, int]) -> str:
    """Return "host:port", with brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """What `grid join` was told. None: not said, so the saved setting or the default counts (see `Home.settle`)."""

    home: Path | None = None
    invite: str | None = None
    listen: str | None = None  # HOST:PORT
    advertise: str | None = None  # HOST:PORT
    slots: int | None = None
    memory_bytes: int | None = None
    tags: tuple[str, ...] | None = None
    name: str | None = None
    no_work: bool | None = None
    trust: tuple[str, ...] | None = None  # peer ids or prefixes, or "all"
    throwaway: bool = False  # lives as long as the command that started it; nothing of it is kept


SAVED = ("listen", "advertise", "slots", "memory_bytes", "tags", "name", "no_work", "trust")
"""What a home remembers from its joins, so that a plain `grid join` starts the same peer again."""


def slots_default() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# ---- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one peer. `Home.open` checks it; the attributes are paths in it."""

    path: Path
    identity: Path = field(init=False)  # the ed25519 seed, mode 0600
    membership: Path = field(init=False)  # its certificate chain; exists once the peer joined a grid
    contacts: Path = field(init=False)
    settings: Path = field(init=False)
    blobs: Path = field(init=False)
    jobs: Path = field(init=False)
    envs: Path = field(init=False)
    staging: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("identity", "membership", "contacts", "blobs", "jobs", "envs", "staging"):
            object.__setattr__(self, name, self.path / name)
        object.__setattr__(self, "settings", self.path / "settings.json")
        object.__setattr__(self, "log", self.path / "peer.log")

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, *, create: bool = False) -> Home:
        """Return the home at `path` (default: `home_folder()`); with `create`, make what is missing.

        Raises ConfigError: another machine's, another user's, or a folder that holds something else.
        """
        home = cls(home_folder(path))
        if create:
            home._create()
        if home.path.exists():
            home._check_owner()
            home._check_machine()
        return home

    @property
    def joined(self) -> bool:
        """Whether this home is a member of a grid."""
        return self.membership.exists()

    def _create(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._machine.exists():
                if any(self.path.iterdir()):
                    message = f"{self.path} holds something else than a grid home"
                    raise ConfigError("home-taken", message, "name an empty or new folder as GRID_HOME")
                self._check_owner()
                self.path.chmod(0o700)
                write_file(self._machine, json.dumps({"machine": machine_id(), **_host()}).encode())
            for folder in (self.blobs, self.jobs, self.envs, self.staging):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            message = f"can't make the home {self.path}: {error.strerror}"
            raise ConfigError("home-unusable", message, "set GRID_HOME to a folder you can write to") from None

    def _check_owner(self) -> None:
        found = self.path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError("home-unusable", f"{self.path} is not a folder", "set GRID_HOME to a folder")
        if found.st_uid != os.getuid():
            message = f"the home {self.path} is another user's"
            raise ConfigError("home-foreign", message, "set GRID_HOME to a folder of your own")

    @property
    def _machine(self) -> Path:
        return self.path / "machine.json"

    def _check_machine(self) -> None:
        """Refuse a home that another machine made.

        Cloned disk images share /etc/machine-id: there, a home is another machine's if neither host name nor any
        network card is the recorded one. Both change in a machine's life, hardly ever at once.
        """
        recorded = read_json(self._machine)
        if not recorded:
            return
        host = _host()
        cards = set(recorded.get("cards", ()))
        cloned = bool(cards and host["cards"] and cards.isdisjoint(host["cards"]) and recorded.get("host") != host["host"])
        if recorded.get("machine") != machine_id() or cloned:
            raise ConfigError(
                "home-foreign",
                f"the home {self.path} belongs to another machine ({recorded.get('host', '?')})",
                "set GRID_HOME to a folder of this machine",
            )

    # -- what is remembered

    def settle(self, options: JoinOptions, *, save: bool = True) -> JoinOptions:
        """Fill what `options` leaves open from the saved settings, then defaults; with `save`, remember the result."""
        saved = read_json(self.settings)
        known: dict[str, Any] = {name: saved[name] for name in SAVED if saved.get(name) is not None}
        known.update({name: value for name in SAVED if (value := getattr(options, name)) is not None})
        if save and known != saved:
            write_file(self.settings, json.dumps(known, default=list).encode())
        known["tags"] = tuple(known.get("tags", ()))
        known["trust"] = tuple(known.get("trust", ()))
        known.setdefault("listen", f"0.0.0.0:{DEFAULT_PORT}")
        known.setdefault("slots", slots_default())
        known.setdefault("name", socket.gethostname().split(".")[0] or "peer")
        known.setdefault("no_work", False)
        return replace(options, home=self.path, **known)

    @property
    def last_port(self) -> int:
        """The free port this peer served at when it was told to take one; 0: none yet."""
        try:
            number = int((self.path / "port").read_text("ascii")[:8])
        except (OSError, ValueError):
            return 0
        return number if 0 < number < 1 << 16 else 0

    def remember_port(self, number: int) -> None:
        """Make `number` the port to take again. A home that can't be written to only loses that."""
        with contextlib.suppress(OSError):
            write_file(self.path / "port", str(number).encode())

    @property
    def last_job(self) -> str | None:
        """Full id of the newest job submitted from this home."""
        try:
            text = (self.path / "last").read_text("ascii")[:200].strip()
        except (OSError, UnicodeError):
            return None
        return text or None

    def remember_job(self, job: str) -> None:
        """Make `job` what `last` means. A home that can't be written to loses only that convenience."""
        with contextlib.suppress(OSError):
            write_file(self.path / "last", job.encode())

    # -- one peer at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the home for this process; the kernel lets go when it dies. Raises ConfigError if a peer has it."""
        file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                pid = os.pread(file, 20, 0).decode("ascii", "replace").strip() or "unknown"
                raise ConfigError(
                    "peer-running",
                    f"a peer already runs in {self.path} (pid {pid})",
                    "stop it with: grid leave; or run a second peer with: grid join --home DIR",
                ) from None
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(file)

    def bind_path(self) -> Path:
        """Return where the control socket is to be bound, and write (or remove) the pointer file that tells clients.

        A socket address holds about 100 bytes, so a deep home's socket is named by a hash in the user's runtime folder.
        Call with the home locked.
        """
        pointer = self.path / POINTER_NAME
        direct = self.path / SOCKET_NAME
        if len(os.fsencode(direct)) <= SOCKET_PATH_BYTES_MAX:
            pointer.unlink(missing_ok=True)
            return direct
        digest = hashlib.blake2b(os.fsencode(self.path), digest_size=10).hexdigest()
        path = _runtime_folder() / f"{digest}.sock"
        write_file(pointer, os.fsencode(path))
        return path


def _runtime_folder() -> Path:
    """Return a folder with a short path that only this user can write to."""
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [Path(chosen) / "peergrid"] if chosen else []
    for folder in (*bases, Path(f"/tmp/peergrid-{os.getuid()}")):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        if ours and len(os.fsencode(folder)) + 26 <= SOCKET_PATH_BYTES_MAX:
            return folder
    message = "the home's path is too long for a socket address"
    raise ConfigError("home-unusable", message, "set GRID_HOME to a folder with a shorter path")


def _host() -> dict[str, Any]:
    """Return what tells two machines with one machine id apart: host name and addresses of real network cards."""
    cards: list[str] = []
    with contextlib.suppress(OSError):
        real = [card for card in Path("/sys/class/net").iterdir() if (card / "device").exists()]
        cards = [(card / "address").read_text("ascii").strip() for card in real]  # containers' cards come and go
    return {"host": socket.gethostname(), "cards": sorted(cards)}


# ---- small files -----------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a small file whole or not at all, durably. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; an empty one if the file is missing or damaged."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(SETTINGS_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


__all__ = [
    "DEFAULT_PORT", "ConfigError", "Home", "JoinOptions", "format_address", "home_folder", "machine_id",
    "parse_address", "parse_duration", "parse_size", "slots_default", "write_file",
]  # fmt: skip
