"""Declared dependencies → a lock: uv resolves them once, for all platforms, with hashes.

The same requirements within CACHE_S get the same lock without asking an index: a second submit starts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from grid.pack_errors import PackError

RESOLVE_S_MAX = 300.0
"""A resolution with a cold cache over a slow line; beyond, it hangs."""
CACHE_S = 24 * 3600.0
"""A day: new releases of what was not pinned are taken up then."""
CACHE_FILES_MAX = 500
OWN_NAME = "peergrid"
_INDEX_VARIABLES = ("UV_INDEX", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_EXCLUDE_NEWER")


def requirements(script: Path, texts: Iterable[str]) -> list[Requirement]:
    """Parse requirements; ours is left out, for peers supply it. Raises PackError."""
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            hint = "write a package's name, as in --with 'numpy>=2'"
            if "/" in text or text.startswith("."):
                hint = "a package on this disk can't travel: put its modules beside the script"
            raise PackError(f"{text!r} is no requirement", hint) from None
        if requirement.url is not None and requirement.url.startswith("file:"):
            raise PackError(f"{text!r} is on this disk, other machines can't install it", "put its modules beside the script")
        if canonicalize_name(requirement.name) != OWN_NAME:
            found.append(requirement)
    return found


def resolve(wanted: list[Requirement], python: str, cache: Path | None = None) -> str:
    """Return the lock of these requirements for a minor version of Python. Raises PackError."""
    text = "\n".join(sorted(map(str, wanted))) + "\n"
    uv = _find_uv()
    key = "\0".join((text, python, uv, *(os.environ.get(name, "") for name in _INDEX_VARIABLES)))
    folder = cache if cache is not None else _cache_folder()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.txt"
    known = _cached(path)
    if known is not None:
        return known
    lock = _compile(uv, text, python)
    with contextlib.suppress(OSError):  # a cache that can't be written only costs time
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(lock, encoding="utf-8")
        temporary.replace(path)
        _trim(folder)
    return lock


def _cached(path: Path) -> str | None:
    try:
        if not 0 <= time.time() - path.stat().st_mtime < CACHE_S:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _trim(folder: Path) -> None:
    files = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime)
    for file in files[:-CACHE_FILES_MAX]:
        file.unlink(missing_ok=True)


def _cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("peergrid")) / "locks"


def _find_uv() -> str:
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
        if found is None:
            raise PackError("uv is not installed, and the script declares dependencies", "pip install uv") from None
        return found


def _compile(uv: str, text: str, python: str) -> str:
    command = [uv, "pip", "compile", "--universal", "--generate-hashes", "--python-version", python]
    command += ["--no-header", "--no-annotate", "--quiet", "--color", "never", "--python", sys.executable, "-"]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    environment.pop("VIRTUAL_ENV", None)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=RESOLVE_S_MAX, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise PackError(
            f"resolving the dependencies took more than {RESOLVE_S_MAX:.0f} s", "is the package index reachable?"
        ) from None
    except OSError as error:
        raise PackError(f"uv can't be started ({uv}): {error.strerror}") from None
    if done.returncode:
        names = ", ".join(text.split("\n")[:-1])
        raise PackError(f"the dependencies ({names}) can't be resolved: {_one_line(done.stderr)}")
    return done.stdout


def _one_line(text: str) -> str:
    """uv's explanation, without its drawing."""
    cleaned = re.sub(r"[^\x00-\x7f]+", " ", text)
    lines = [re.sub(r"^(error|cause):\s*", "", line.strip()) for line in cleaned.splitlines()]
    joined = " ".join(line for line in lines if line and not line.startswith("No solution found"))
    return re.sub(r"\s+", " ", joined).strip()[:600] or "uv gave no reason"
